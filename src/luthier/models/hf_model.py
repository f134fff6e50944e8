"""What all families share: `HFModel` implements the `Family` protocol, `PackedHFModel` adds packed rows.

Read `structure.py` (the parts of a model), `attention/packed.py` (attention) and `task_heads.py` (outputs and heads)
first. `families/causal.py` and `families/encoder.py` build on this file.

Shape letters: T tokens of the row, P predictions, D hidden size, S segments, C width of a head, L columns of a padded
row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from luthier.core.errors import BaseError, LuthierError
from luthier.core.protocols import ChatFormat, Head, Heads, Router
from luthier.core.types import Inputs, LossInputs, Outputs, SegmentTree, to_device
from luthier.models.activation_recompute import ActivationRecomputer, replace_gated_mlps
from luthier.models.adapter_routing import route_segments, snapshot_routing
from luthier.models.attention import packed
from luthier.models.bias_config import sync_bias_config
from luthier.models.decoding import find_eos_tokens
from luthier.models.hf_attributes import get_optional
from luthier.models.hf_logging import silence_transformers, summarize_error
from luthier.models.hf_task_heads import TaskHead, build_task_head
from luthier.models.mixed_embeddings import mix_embeddings
from luthier.models.padding_token import make_padding_tokenizer
from luthier.models.soft_prompts import causal
from luthier.models.structure import find_structure
from luthier.models.task_heads import Pooling, TaskHeads

Layout = Literal["packed", "padded"]


class HFModel:
    """A Transformers model that implements the `Family` protocol; a subclass computes the states of a row (`_run`).

    Args:
        model: as Transformers loads it.
        tokenizer: its tokenizer or image processor; saved with it.
    """

    task: ClassVar[str]
    is_encoder_decoder: ClassVar[bool] = False
    can_generate: ClassVar[bool] = False
    pooling: Pooling
    # set by the recipe; otherwise a head may pool like its Transformers class
    has_explicit_pooling: bool = False
    layout: Layout = "padded"
    padding_reason = ""  # why rows are padded although the family normally packs them
    router: Router | None = None  # selects an adapter for each segment or row
    chat_format: ChatFormat = ChatFormat()
    critic: Callable[[], AbstractContextManager[None]] | None = None  # context of values; None: the same pass

    def __init__(self, model: Any, tokenizer: Any) -> None:
        with silence_transformers():  # a model without the attention registry keeps its own attention: rows are padded
            model.set_attn_implementation(packed.NAME)
        self.model, self.tokenizer = model, tokenizer
        self._recomputer = ActivationRecomputer()
        replace_gated_mlps(model, self._recomputer)
        self.structure = find_structure(model, tokenizer, self.task)
        self._recomputer.register(self.structure.layers)
        self._recompute_over: int | None = None
        self.add_heads((), 0)

    @property
    def device(self) -> torch.device:
        weight = self.structure.embedding.weight
        assert isinstance(weight, Tensor)
        return weight.device

    @property
    def training(self) -> bool:
        return bool(self.model.training)

    def train(self, mode: bool) -> None:
        self.model.train(mode)

    def enable_gradient_checkpointing(self, over: int = 0) -> None:
        """Recompute activations in the backward pass. A row of more than `over` tokens keeps the activations of as many
        layers as fit into the memory of a row of `over` tokens, and recomputes the others. A single long document then
        does not determine the memory of the whole run."""
        self._recompute_over = over
        for layer in self.structure.layers:
            layer.module._gradient_checkpointing_func = partial(  # type: ignore[assignment]
                checkpoint, use_reentrant=False, context_fn=lambda: (self._recomputer.suspended(),
                                                                     snapshot_routing(self.router)))

    def add_heads(self, heads: Sequence[Head], seed: int) -> TaskHeads:
        self.heads = self.build_heads(heads, seed)
        return self.heads

    def build_heads(self, heads: Sequence[Head], seed: int) -> TaskHeads:
        return TaskHeads(heads, self.structure.sizes["hidden"], self.device, seed, self.structure.task,
                         self._build_task_head)

    @contextmanager
    def using_heads(self, heads: Heads) -> Iterator[None]:
        assert isinstance(heads, TaskHeads), "made by build_heads"
        previous, self.heads = self.heads, heads
        try:
            yield
        finally:
            self.heads = previous

    def _build_task_head(self, head: Head, generator: torch.Generator) -> TaskHead | str:
        if self.is_encoder_decoder:
            return "Transformers' encoder-decoder classes classify by the state of the source's own eos token"
        return build_task_head(head, self.model, self.structure.backbone,
                               self.pooling if self.has_explicit_pooling else None,
                         "channels" in self.structure.sizes, generator)

    def get_padded_tokenizer(self) -> Any:
        """The tokenizer to save: for a decoder with a task head, one whose padding token ends no text."""
        if self.heads.task_head is None or not self.can_generate:
            return self.get_saved_tokenizer()
        return make_padding_tokenizer(self.get_saved_tokenizer(), find_eos_tokens(self.model, self.tokenizer))

    @property
    def backbone_prefix(self) -> str:
        """The prefix of the backbone's weight names: `model.` for a Llama with its head, empty for a bare backbone."""
        return next((f"{name}." for name, module in self.model.named_modules() if module is self.structure.backbone
                     and name), "")

    def forward(self, inputs: Inputs, target: LossInputs, needs: frozenset[str]) -> Outputs:
        if self.critic is None or "token_scores" not in needs:
            return self._outputs(inputs, target, needs)
        with self.critic():
            values = self._outputs(inputs, target, frozenset({"token_scores"})).token_scores  # [P, C]
        return replace(self._outputs(inputs, target, needs - {"token_scores"}), token_scores=values)

    def _outputs(self, inputs: Inputs, target: LossInputs, needs: frozenset[str]) -> Outputs:
        return self.heads.compute_outputs(self.states(inputs), inputs.segment_tree, target, needs, self.pooling,
                                          self._log_probs)

    def states(self, inputs: Inputs) -> Tensor:
        """[T, D] The row's last hidden states."""
        with route_segments(self.router, inputs.segment_tree, self.layout == "packed"):
            return self._states(inputs)

    def _states(self, inputs: Inputs) -> Tensor:
        if not torch.is_grad_enabled():
            return self._run(inputs)
        # Keep the last layers: the backward pass frees their activations before it recomputes the first ones.
        recomputed = len(self.structure.layers) - self._count_kept_layers(inputs.tokens.shape[0])
        for index, layer in enumerate(self.structure.layers):
            layer.module.gradient_checkpointing = index < recomputed  # type: ignore[assignment]
        with self._recomputer():
            return self._run(inputs)

    def _count_kept_layers(self, tokens: int) -> int:
        """The number of layers that keep their activations for a row of this many tokens."""
        count, over = len(self.structure.layers), self._recompute_over
        return count if over is None or tokens <= over else count * over // tokens

    def _run(self, inputs: Inputs) -> Tensor:
        raise NotImplementedError

    def _log_probs(self, states: Tensor, tokens: Tensor, entropies: bool,
                   temperature: float) -> tuple[Tensor, Tensor, Tensor | None]:
        raise NotImplementedError

    def save(self, path: Path) -> None:
        """Write the whole model as a Transformers folder, including the tokenizer."""
        sync_bias_config(self.model)
        own, tokenizer = self.heads.task_head, self.get_padded_tokenizer()
        with (silence_transformers(), self._saved_stop_tokens(),
              nullcontext(self.model) if own is None else own.assembled(self.model, self.structure.backbone) as whole):
            if own is not None and self.can_generate:
                whole.config.pad_token_id = tokenizer.pad_token_id
            whole.save_pretrained(path)
            tokenizer.save_pretrained(path)
        for file in path.glob("*.safetensors"):  # safetensors creates files that only their owner can read
            file.chmod(path.stat().st_mode & 0o666)

    def get_saved_tokenizer(self) -> Any:
        """The tokenizer to save with the trained weights. After training on conversations it has the chat template that
        rendered them, and the token that ends a turn is its eos token."""
        if not self.chat_format.trained:
            return self.tokenizer
        tokenizer = deepcopy(self.tokenizer)
        tokenizer.chat_template = self.chat_format.template
        # an encoder-decoder's source ends with the original eos
        if self.chat_format.stop_tokens and not self.is_encoder_decoder:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(self.chat_format.stop_tokens[0])
        return tokenizer

    @contextmanager
    def _saved_stop_tokens(self) -> Iterator[None]:
        """A context in which the generation config lists the tokens that end a turn before its own eos tokens."""
        settings = get_optional(self.model, "generation_config")
        if settings is None or not self.chat_format.trained or not self.chat_format.stop_tokens:
            yield
            return
        before = settings.eos_token_id
        own = before if isinstance(before, list) else [before]
        listed = list(dict.fromkeys([*self.chat_format.stop_tokens, *(token for token in own if token is not None)]))
        settings.eos_token_id = listed if len(listed) > 1 else listed[0]
        try:
            yield
        finally:
            settings.eos_token_id = before

    def save_generation_config(self, path: Path) -> None:
        """Write the eos tokens next to an adapter that was trained on conversations."""
        if self.chat_format.trained and (settings := get_optional(self.model, "generation_config")) is not None:
            with silence_transformers(), self._saved_stop_tokens():
                settings.save_pretrained(path)


class PackedHFModel(HFModel):
    """A model whose inputs are rows of tokens.

    Args:
        layout: `packed` computes a row as a segment tree; `padded` is the slow reference, one padded row for each leaf.
            Omitted: packed if both give the same states for a probe of a few tokens.
    """

    options: ClassVar[Mapping[str, Any]] = {}  # passed to every call of the backbone

    def __init__(self, model: Any, tokenizer: Any, layout: Layout | None = None) -> None:
        super().__init__(model, tokenizer)
        self.structure = causal.attach_injector(self.structure, router=lambda: self.router)
        self.layout = layout or self._detect_layout()

    def _build_columns(self, inputs: Inputs) -> dict[str, Tensor]:
        """The backbone's per-token arguments, each [T]."""
        return {"input_ids": inputs.tokens, "position_ids": inputs.positions}

    def _build_arguments(self, inputs: Inputs) -> dict[str, Tensor]:
        """The per-token arguments, with embeddings [T, D] in place of token ids where embeddings are mixed."""
        columns = self._build_columns(inputs)
        if (embeds := mix_embeddings(self.model.get_input_embeddings(), inputs)) is not None:
            columns["inputs_embeds"] = embeds
            del columns["input_ids"]
        return columns

    def _run(self, inputs: Inputs) -> Tensor:
        return self._run_packed(inputs) if self.layout == "packed" else self._run_padded(inputs)

    def _run_packed(self, inputs: Inputs, **arguments: Any) -> Tensor:
        # Transformers passes a four-dimensional mask through unchanged. It is empty, so that a model which would use it
        # instead of the segment tree raises an error.
        placeholder = inputs.positions.new_empty(1, 1, 0, 0, dtype=torch.bool)
        columns = {name: column[None] for name, column in self._build_arguments(inputs).items()}  # [1, T] or [1, T, D]
        result = self.structure.backbone(**columns, attention_mask=placeholder, segment_tree=inputs.segment_tree,
                                         **arguments, **self.options)
        return result.last_hidden_state[0]  # [T, D]

    def _run_padded(self, inputs: Inputs) -> Tensor:
        """Every leaf with all its ancestors as one padded row; shared prompts are computed several times."""
        runs, locate = list_leaf_paths(inputs.segment_tree)
        device = inputs.tokens.device
        mask = to_device(self._build_mask(inputs.segment_tree, runs), device)  # [rows, L] or [rows, 1, L, L]
        runs = [to_device(run, device) for run in runs]
        columns = {name: pad_sequence([column[run] for run in runs], batch_first=True)
                   for name, column in self._build_arguments(inputs).items()}  # [rows, L] or [rows, L, D]
        result = self.structure.backbone(**columns, attention_mask=mask, **self.options)
        return result.last_hidden_state.flatten(0, 1)[to_device(locate(mask.shape[-1]), device)]  # [T, D]

    def _build_mask(self, segment_tree: SegmentTree, runs: Sequence[Tensor]) -> Tensor:
        """The mask of the padded rows: [rows, L], or [rows, 1, L, L] for each query and key."""
        return pad_sequence([torch.ones_like(run) for run in runs], batch_first=True)

    @torch.no_grad()
    def _detect_layout(self) -> Layout:
        """Packed if two segments in one row have the same states as on their own; some architectures do not support
        it."""
        device, was_training = self.device, self.model.training
        self.model.eval()
        inputs = Inputs(torch.tensor([1, 2, 3, 4, 2, 3], device=device),
                        torch.tensor([0, 1, 2, 0, 1, 2], device=device), SegmentTree((3, 3), (-1, -1)))
        try:
            packed, padded = self._run_packed(inputs).float(), self._run_padded(inputs).float()  # [6, D] each
        except LuthierError:
            raise
        except TypeError as error:
            # not the unsupported argument, but a defect in this package or a kernel
            if "segment_tree" not in str(error):
                raise
            return self._fall_back_to_padded("it passes no arguments to its attention")
        except (RuntimeError, ValueError, AttributeError) as error:  # the model used the empty mask
            return self._fall_back_to_padded(summarize_error(error))
        finally:
            self.model.train(was_training)
        if not bool(padded.isfinite().all()):
            raise BaseError(f"base {self.model.name_or_path!r}: its output is not a number",
                            "set model.dtype to float32; if it is, the weights are damaged: download them again")
        close = torch.allclose(packed, padded, rtol=1e-2, atol=1e-2 * float(padded.abs().max()))
        return "packed" if close else self._fall_back_to_padded("documents of one row influence each other")

    def _fall_back_to_padded(self, why: str) -> Layout:
        self.padding_reason = (f"{type(self.model).__name__} cannot compute several documents in one row ({why}); each "
                           "document is padded in its own row, which is slower and does not change results")
        return "padded"


def list_leaf_paths(segment_tree: SegmentTree) -> tuple[list[Tensor], Callable[[int], Tensor]]:
    """For each leaf the row indices of its path [L_i], and a function that maps each token [T] to its position in the
    padded rows of a given width (the first one, if several paths contain it)."""
    parents = set(segment_tree.parents)
    starts = segment_tree.starts
    spans = [torch.arange(start, start + n) for start, n in zip(starts, segment_tree.lengths, strict=True)]
    runs = [torch.cat([spans[a] for a in segment_tree.find_path(i)]) for i in range(len(spans)) if i not in parents]

    def locate(width: int) -> Tensor:
        positions = torch.full((sum(segment_tree.lengths),), -1)  # [T]
        for row, run in reversed(list(enumerate(runs))):  # reversed: the first path of a token has the last word
            positions[run] = torch.arange(len(run)) + row * width
        return positions

    return runs, locate
