"""Changes to a base model before training: new tokens, added layers, dropped layers. Read `structure.py` first;
`modified_folder.py` saves the result.

New tokens (`new_tokens`): with d_1 ... d_n the tokens of the description and E the embedding matrix,

    E[new] = (E[d_1] + ... + E[d_n]) / n        and the same for each row (and bias) of an untied head.

Added layers (`expand_layers`): copies of layers whose output projections, of the attention and of the MLP, are zero.
With
a layer h = x + O a(x), y = h + D m(h), a copy with O = D = 0 gives y = x exactly. O and D get gradients from the first
step on, all weights before them from the second. LLaMA Pro, Wu et al. 2024 (arXiv:2401.02415) section 3.2.

Dropped layers (`drop_layers`): Sajjad et al. 2020 (2004.03844); deep layers first, Gromov et al. 2024 (2403.17887).

Shape letters: V vocabulary, D hidden size, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import AddedToken

from luthier.core.config import Config
from luthier.core.errors import BaseError, RecipeError
from luthier.core.protocols import TransformerLayer
from luthier.models.structure import find_linears, find_structure

OUTPUT_ROLES = ("o", "down")  # the roles of the output projections of a layer's attention and MLP


class SurgeryConfig(Config):
    """Changes to a base model before a method is attached. Layers are numbered as in the base, from 0."""

    new_tokens: Mapping[str, str] = Field(default_factory=dict, description=(
        "new token: its description; the new embedding is the mean of the description's embeddings"))
    expand_layers: int | tuple[int, ...] = Field((), description=(
        "insert a copy after each of these layers, or this many copies spread evenly; each copy starts as the "
        "identity"))
    drop_layers: tuple[int, ...] = Field((), description="the layers that are removed")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.new_tokens or self.expand_layers or self.drop_layers):
            raise ValueError("nothing is changed; omit surgery, or set new_tokens, expand_layers or drop_layers")
        copied = () if isinstance(self.expand_layers, int) else self.expand_layers
        if isinstance(self.expand_layers, int) and self.expand_layers < 0:
            raise ValueError("expand_layers is a number above 0, or a list of layers")
        for indices in (copied, self.drop_layers):
            if len(set(indices)) != len(indices) or min(indices, default=0) < 0:
                raise ValueError("a layer is named once, by its index in the base, from 0")
        if both := sorted(set(copied) & set(self.drop_layers)):
            raise ValueError(f"layer {both[0]} is both copied and dropped")
        return self

    def list_layers(self, count: int) -> list[tuple[int, bool]]:
        """The layers of the modified base: for each the index of its source layer, and whether it is a copy.

        Args:
            count: the number of layers of the base.

        Raises:
            RecipeError: the base has no such layers.
        """
        kept = [index for index in range(count) if index not in self.drop_layers]
        copied = self.expand_layers
        if isinstance(copied, int):
            if copied > len(kept):
                raise RecipeError(f"model.surgery.expand_layers: {copied} layers, but at most one copy after each of "
                                  f"{len(kept)}", f"add {len(kept)} or fewer")
            copied = tuple(kept[(i + 1) * len(kept) // copied - 1] for i in range(copied))
        if unknown := [index for index in (*copied, *self.drop_layers) if index >= count]:
            raise RecipeError(f"model.surgery: layer {unknown[0]}, but the base has layers 0 to {count - 1}",
                              "use the base's layer indices")
        if not kept:
            raise RecipeError("model.surgery.drop_layers: no layer would be left", "keep at least one")
        return [entry for index in kept for entry in ((index, False), (index, True))[:1 + (index in copied)]]


@torch.no_grad()
def modify_model(model: Any, tokenizer: Any, surgery: SurgeryConfig) -> None:
    """Change a causal language model of Transformers, its config and its tokenizer in place.

    Raises:
        RecipeError: the changes do not fit the model.
        BaseError: an added layer would not be the identity.
    """
    if surgery.new_tokens:
        _add_tokens(model, tokenizer, surgery.new_tokens)
    layers = find_structure(model).layers
    order = surgery.list_layers(len(layers))
    path = layers[0].name.rpartition(".")[0]
    sources, model_type = [layer.module for layer in layers], model.config.model_type
    if surgery.drop_layers:
        _replace_layers(model, path, [(index, sources[index]) for index, is_copy in order if not is_copy])
    if surgery.expand_layers:
        copies = {index: _make_identity_layer(layers[index], model.config) for index, is_copy in order if is_copy}
        before, kept = compute_probe_logits(model), [index for index, is_copy in order if not is_copy]
        _replace_layers(model, path, [(kept.index(index), copies[index] if is_copy else sources[index])
                                      for index, is_copy in order])
        if not torch.equal(compute_probe_logits(model), before):
            raise BaseError(f"layers of {model_type} do not become the identity when the output projections of their "
                            "attention and MLP are zero", "omit model.surgery.expand_layers, or choose another base")


def _make_identity_layer(layer: TransformerLayer, config: Any) -> nn.Module:
    """A copy of the layer that adds nothing to its input."""
    outputs = [linear for linear in find_linears(layer) if linear.role in OUTPUT_ROLES]
    if {linear.role for linear in outputs} != set(OUTPUT_ROLES):
        raise BaseError(f"a layer of {config.model_type} has no linear output projection in its attention or its MLP, "
                        "so no copy of it can start as the identity",
                        "omit model.surgery.expand_layers, or choose another base")
    # The memo keeps the copy on the model's own config, so that later changes of it apply to the copy as well.
    copied: nn.Module = deepcopy(layer.module, {id(config): config})
    for linear in outputs:
        for parameter in copied.get_submodule(linear.name.removeprefix(f"{layer.name}.")).parameters():
            parameter.zero_()
    return copied


def _replace_layers(model: Any, path: str, layers: Sequence[tuple[int, nn.Module]]) -> None:
    """Replace the model's layers by `layers`, each with the index of its entry in the config's per-layer lists."""
    config = model.config
    for key, value in list(vars(config).items()):
        if "layer" in key and isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(config, key, [value[index] for index, _ in layers])
    config.num_hidden_layers = len(layers)
    for position, (_, layer) in enumerate(layers):
        module: Any
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # the index of its entry in a cache
                module.layer_idx = position
    model.set_submodule(path, nn.ModuleList(layer for _, layer in layers))


def _add_tokens(model: Any, tokenizer: Any, new: Mapping[str, str]) -> None:
    """Add each token to the tokenizer, with the mean of its description's embedding rows."""
    vocabulary, rows = tokenizer.get_vocab(), model.get_input_embeddings().weight.shape[0]  # rows: V
    descriptions = {token: tokenizer(text, add_special_tokens=False)["input_ids"] for token, text in new.items()}
    for token, ids in descriptions.items():
        if vocabulary.get(token, rows) < rows or not token.strip():  # a token without an embedding row counts as new
            raise RecipeError(f"model.surgery.new_tokens: {token!r} is "
                              + ("already a token of this base" if token.strip() else "empty"),
                              "name tokens that the base does not have")
        if not ids:
            raise RecipeError(f"model.surgery.new_tokens: the description of {token!r} has no tokens",
                              "describe it in words")
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in new])
    token_ids = tokenizer.convert_tokens_to_ids(list(new))
    if max(token_ids) >= rows:  # some bases have more embedding rows than tokens
        model.resize_token_embeddings(max(token_ids) + 1, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for parameter in module.parameters():  # [V, D] weights, [V] biases
            for token_id, ids in zip(token_ids, descriptions.values(), strict=True):
                parameter[token_id] = parameter[ids].double().mean(0).to(parameter.dtype)


@torch.no_grad()
def compute_probe_logits(model: Any) -> Tensor:
    """Logits of a fixed sequence of tokens, to compare two models."""
    tokens = (torch.arange(16) + 1) * 7 % model.get_input_embeddings().weight.shape[0]  # [L]
    logits: Tensor = model(input_ids=tokens[None], use_cache=False).logits  # [1, L, V]
    return logits
