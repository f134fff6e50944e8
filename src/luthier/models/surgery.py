"""Changes of a base's own structure before any training: words added, blocks added, blocks left out. Read
`structure.py`.

A changed base is a base: it is written once, as a Transformers folder in the cache, and everything goes on from that
folder as from any other. So runs reopen, merge and export as ever, every method trains on it, and PEFT finds it by its
path. Where the cache was emptied, the recipe makes the same folder again.

New words (`new_tokens`): with d_1 ... d_n the tokens of the description and E the embedding,

    E[new] = (E[d_1] + ... + E[d_n]) / n        and so each row (and bias) of a head with weights of its own.

New blocks (`expand_layers`): copies of blocks whose last maps, of the attention and of the MLP, are zero. With a block
h = x + O a(x), y = h + D m(h), a copy with O = D = 0 gives y = x, bit for bit; O and D have gradients from the first
step on, all that stands before them from the second. LLaMA Pro, Wu et al. 2024 (arXiv:2401.02415) section 3.2.

Fewer blocks (`drop_layers`): Sajjad et al. 2020 (2004.03844); deep blocks first, Gromov et al. 2024 (2403.17887).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import AddedToken, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from luthier.core.config import Config
from luthier.core.digests import cache
from luthier.core.errors import BaseError, RecipeError
from luthier.models.architectures import kind_of
from luthier.models.gguf.reader import once
from luthier.models.hf_logging import complete
from luthier.models.structure import anatomy, linear_sites

MAKER = "2"  # raise it when `change` makes something else: folders made by older ones are then left unused
WORDS = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.jinja", "*tokens*.json", "generation_config.json")
LAST = ("o", "down")  # the roles of the maps that end a block's attention and its MLP


class SurgeryConfig(Config):
    """What is changed in a base before anything is attached or trained. Blocks are numbered as in the base, from 0."""

    new_tokens: Mapping[str, str] = Field(default_factory=dict, description=(
        "new word: its description, the mean of whose embeddings it starts from"))
    expand_layers: int | tuple[int, ...] = Field((), description=(
        "a copy behind each of these blocks, or so many spread evenly; each starts as the identity"))
    drop_layers: tuple[int, ...] = Field((), description="the blocks that are left out")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.new_tokens or self.expand_layers or self.drop_layers):
            raise ValueError("nothing is changed; "
                             "leave surgery out, or name new_tokens, expand_layers or drop_layers")
        behind = () if isinstance(self.expand_layers, int) else self.expand_layers
        if isinstance(self.expand_layers, int) and self.expand_layers < 0:
            raise ValueError("expand_layers is a number above 0, or a list of blocks")
        for named in (behind, self.drop_layers):
            if len(set(named)) != len(named) or min(named, default=0) < 0:
                raise ValueError("a block is named once, by its number in the base, from 0")
        if both := sorted(set(behind) & set(self.drop_layers)):
            raise ValueError(f"block {both[0]} is both copied and left out")
        return self

    def order(self, count: int) -> list[tuple[int, bool]]:
        """The blocks of the changed base: for each the block of the base that it is, and whether it is a copy.

        Raises: `RecipeError` where the base has no such blocks.
        """
        kept = [block for block in range(count) if block not in self.drop_layers]
        behind = self.expand_layers
        if isinstance(behind, int):
            if behind > len(kept):
                raise RecipeError(f"model.surgery.expand_layers: {behind} blocks, "
                                  f"one behind each of {len(kept)} at most",
                                  f"add {len(kept)} or fewer")
            behind = tuple(kept[(i + 1) * len(kept) // behind - 1] for i in range(behind))
        if strange := [block for block in (*behind, *self.drop_layers) if block >= count]:
            raise RecipeError(f"model.surgery: block {strange[0]}, and the base has 0 to {count - 1}",
                              "number blocks as they are in the base")
        if not kept:
            raise RecipeError("model.surgery.drop_layers: no block would be left", "keep one at least")
        return [entry for block in kept for entry in ((block, False), (block, True))[:1 + (block in behind)]]


# ---------------------------------------------------------------- a folder to a folder


def restructured(path: Path, name: str, fingerprint: str, structure: SurgeryConfig) -> Path:
    """The folder of the changed base: found in the cache, or made now.

    Args:
        path: the base's own folder.
        name: what the user calls it.
        fingerprint: of the base's weights.

    Raises:
        BaseError: the base is no causal language model, or does not stay what it says once changed.
        RecipeError: the changes do not fit it.
    """
    digest = hashlib.sha256(f"{fingerprint} {structure.model_dump_json()}".encode())
    for file in sorted({file for pattern in WORDS for file in path.glob(pattern)}):
        digest.update(file.name.encode() + file.read_bytes())
    made = cache() / f"{path.name}-{digest.hexdigest()[:32]}-{MAKER}"
    return once(made, lambda to: _make(path, name, to, structure))


def _make(path: Path, name: str, to: Path, structure: SurgeryConfig) -> None:
    described = AutoConfig.from_pretrained(path)
    if kind_of(described) != "causal" or described.get_text_config() is not described:
        raise BaseError(f"base {name!r} ({described.model_type}) is no plain causal language model, and the structure "
                        "of others is not changed", "leave model.surgery out, or choose another base")
    model = _opened(path, name)
    tokenizer = AutoTokenizer.from_pretrained(path)
    change(model, tokenizer, structure)
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)
    if not torch.equal(_probe(_opened(to, name)), _probe(model)):
        raise BaseError(f"base {name!r} ({described.model_type}) says something else once its changed blocks are "
                        "saved and loaded: what a block is depends on its number in a way that is not known here",
                        "leave model.surgery.expand_layers and drop_layers out, or choose another base")


def _opened(path: Path, name: str) -> Any:
    read: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto", use_safetensors=True,
                                                     ignore_mismatched_sizes=True, output_loading_info=True)
    complete(name, read[1])
    if read[0].dtype == torch.float64:
        read[0].set_experts_implementation("eager")  # the grouped product of experts knows no float64
    return read[0].eval()


# ---------------------------------------------------------------- a model to a model


@torch.no_grad()
def change(model: Any, tokenizer: Any, structure: SurgeryConfig) -> None:
    """Change a causal language model of Transformers, its config and its tokenizer in place. Raises `RecipeError`
    where the changes do not fit it, and `BaseError` where an added block of it would not be the identity."""
    if structure.new_tokens:
        _grow(model, tokenizer, structure.new_tokens)
    blocks = anatomy(model).blocks
    order = structure.order(len(blocks))
    home = blocks[0].name.rpartition(".")[0]
    sources, kind = [block.module for block in blocks], model.config.model_type
    if structure.drop_layers:
        _stack(model, home, [(block, sources[block]) for block, copy in order if not copy])
    if structure.expand_layers:
        silent = {block: _silent(blocks[block], model.config) for block, copy in order if copy}
        before, numbers = _probe(model), [block for block, copy in order if not copy]
        _stack(model, home, [(numbers.index(block), silent[block] if copy else sources[block])
                             for block, copy in order])
        if not torch.equal(_probe(model), before):
            raise BaseError(f"blocks of {kind} do not become the identity when the last maps of their attention and "
                            "MLP are zero", "leave model.surgery.expand_layers out, or choose another base")


def _silent(block: Any, config: Any) -> nn.Module:
    """A copy of the block that adds nothing to what goes in."""
    last = [site for site in linear_sites(block) if site.role in LAST]
    if {site.role for site in last} != set(LAST):
        raise BaseError(f"a block of {config.model_type} has no linear map that ends its attention, or none that "
                        "ends its MLP, so no copy of it can start as the identity",
                        "leave model.surgery.expand_layers out, or choose another base")
    found: nn.Module = deepcopy(block.module, {id(config): config})  # settings of the whole model reach it
    for site in last:
        for parameter in found.get_submodule(site.name.removeprefix(f"{block.name}.")).parameters():
            parameter.zero_()
    return found


def _stack(model: Any, home: str, blocks: Sequence[tuple[int, nn.Module]]) -> None:
    """Put `blocks` in place of the model's, each with the number in the present config that it is described by."""
    config = model.config
    for key, value in list(vars(config).items()):
        if "layer" in key and isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(config, key, [value[number] for number, _ in blocks])
    config.num_hidden_layers = len(blocks)
    for place, (_, block) in enumerate(blocks):
        inner: Any
        for inner in block.modules():
            if hasattr(inner, "layer_idx"):  # where its part of a cache is
                inner.layer_idx = place
    model.set_submodule(home, nn.ModuleList(block for _, block in blocks))


def _grow(model: Any, tokenizer: Any, new: Mapping[str, str]) -> None:
    """Make each word a token of its own, with the mean of its description's rows."""
    known, rows = tokenizer.get_vocab(), model.get_input_embeddings().weight.shape[0]
    described = {word: tokenizer(words, add_special_tokens=False)["input_ids"] for word, words in new.items()}
    for word, ids in described.items():
        if known.get(word, rows) < rows or not word.strip():  # a token without a row is as good as new
            raise RecipeError(f"model.surgery.new_tokens: {word!r} is "
                              + ("a token of this base already" if word.strip() else "empty"),
                              "name words that the base does not have as one token")
        if not ids:
            raise RecipeError(f"model.surgery.new_tokens: the description of {word!r} has no tokens",
                              "describe it in words")
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in new])
    places = tokenizer.convert_tokens_to_ids(list(new))
    if max(places) >= rows:  # some bases have rows to spare
        model.resize_token_embeddings(max(places) + 1, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for parameter in module.parameters():
            for place, ids in zip(places, described.values(), strict=True):
                parameter[place] = parameter[ids].double().mean(0).to(parameter.dtype)


@torch.no_grad()
def _probe(model: Any) -> Tensor:
    """Logits of some tokens, each after the ones before it."""
    tokens = (torch.arange(16) + 1) * 7 % model.get_input_embeddings().weight.shape[0]
    found: Tensor = model(input_ids=tokens[None], use_cache=False).logits
    return found
