"""What the families share: `HFModel`, a base behind the contract, and `PackedHFModel`, one that takes rows of segments.

Read `structure.py` (the parts), `models/attention/packed.py` (attention) and `task_heads.py` (what becomes of the
states) first. `models/families/causal.py`
and `models/families/encoder.py` go on from here, each with what is its own.
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
from luthier.core.protocols import ChatFormat, Head, Router, Tuner
from luthier.core.types import Inputs, LossInputs, Outputs, SegmentTree, to_device
from luthier.models.activation_recompute import ActivationRecomputer, replace_gated_mlps
from luthier.models.adapter_routing import route_segments, snapshot_routing
from luthier.models.attention import packed as _forest
from luthier.models.bias_config import sync_bias_config
from luthier.models.decoding import find_eos_tokens
from luthier.models.hf_logging import silence_transformers, summarize_error
from luthier.models.hf_task_heads import TaskHead, build_task_head
from luthier.models.mixed_embeddings import mix_embeddings
from luthier.models.padding_token import make_padding_tokenizer
from luthier.models.soft_prompts import causal
from luthier.models.structure import find_structure
from luthier.models.task_heads import Pooling, TaskHeads

Layout = Literal["packed", "padded"]


class HFModel:
    """A model of Transformers behind the family's contract; a subclass says how a row runs (`_run`).

    Args:
        model: as Transformers loads it.
        tokenizer: what turns rows into its inputs; written beside it.
    """

    task: ClassVar[str]
    is_encoder_decoder: ClassVar[bool] = False
    can_generate: ClassVar[bool] = False
    pooling: Pooling
    # whether the recipe names it; else a head may pool as its class of Transformers does
    has_explicit_pooling: bool = False
    layout: Layout = "padded"
    padding_reason = ""  # why rows are padded although the family packs them
    router: Router | None = None  # who sends segments and rows through adapters of their own
    chat_format: ChatFormat = ChatFormat()
    critic: Callable[[], AbstractContextManager[None]] | None = None  # where values are read; None: on the same states

    def __init__(self, model: Any, tokenizer: Any) -> None:
        with silence_transformers():  # whoever knows no registry keeps its own attention, and its rows are padded
            model.set_attn_implementation(_forest.NAME)
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
        """From now on, in rows of more than `over` tokens, keep the activations of as many blocks as fit into the
        memory of a row of `over`, and recompute the others in the backward pass. The one long document of a data set
        then does not set the memory of the whole run."""
        self._recompute_over = over
        for block in self.structure.layers:
            block.module._gradient_checkpointing_func = partial(  # type: ignore[assignment]
                checkpoint, use_reentrant=False, context_fn=lambda: (self._recomputer.suspended(),
                                                                     snapshot_routing(self.router)))

    def add_heads(self, heads: Sequence[Head], seed: int) -> Tuner:
        self.heads = TaskHeads(heads, self.structure.sizes["hidden"], self.device, seed, self.structure.task,
                               self._build_task_head)
        return self.heads

    def _build_task_head(self, head: Head, generator: torch.Generator) -> TaskHead | str:
        if self.is_encoder_decoder:
            return "an encoder-decoder's class of Transformers classifies by the state of the text's own end mark"
        return build_task_head(head, self.model, self.structure.backbone,
                               self.pooling if self.has_explicit_pooling else None,
                         "channels" in self.structure.sizes, generator)

    def get_padded_tokenizer(self) -> Any:
        """The tokenizer that is saved: of a decoder with a head, one that pads with a token that ends no text."""
        if self.heads.task_head is None or not self.can_generate:
            return self.get_saved_tokenizer()
        return make_padding_tokenizer(self.get_saved_tokenizer(), find_eos_tokens(self.model, self.tokenizer))

    @property
    def backbone_prefix(self) -> str:
        """What the names of the stack's weights begin with: `model.` in a Llama with its head, nothing in a stack."""
        return next((f"{name}." for name, module in self.model.named_modules() if module is self.structure.backbone
                     and name), "")

    def forward(self, inputs: Inputs, target: LossInputs, needs: frozenset[str]) -> Outputs:
        if self.critic is None or "token_scores" not in needs:
            return self._outputs(inputs, target, needs)
        with self.critic():
            values = self._outputs(inputs, target, frozenset({"token_scores"})).token_scores
        return replace(self._outputs(inputs, target, needs - {"token_scores"}), token_scores=values)

    def _outputs(self, inputs: Inputs, target: LossInputs, needs: frozenset[str]) -> Outputs:
        return self.heads.compute_outputs(self.states(inputs), inputs.forest, target, needs, self.pooling,
                                          self._log_probs)

    def states(self, inputs: Inputs) -> Tensor:
        """[T, D] last hidden states of the row."""
        with route_segments(self.router, inputs.forest, self.layout == "packed"):
            return self._states(inputs)

    def _states(self, inputs: Inputs) -> Tensor:
        if not torch.is_grad_enabled():
            return self._run(inputs)
        # The last blocks are kept: the backward pass lets go of them before the first ones are computed again.
        again = len(self.structure.layers) - self._count_kept_layers(inputs.tokens.shape[0])
        for place, block in enumerate(self.structure.layers):
            block.module.gradient_checkpointing = place < again  # type: ignore[assignment]
        with self._recomputer():
            return self._run(inputs)

    def _count_kept_layers(self, tokens: int) -> int:
        """How many blocks of a row keep their activations."""
        count, over = len(self.structure.layers), self._recompute_over
        return count if over is None or tokens <= over else count * over // tokens

    def _run(self, inputs: Inputs) -> Tensor:
        raise NotImplementedError

    def _log_probs(self, states: Tensor, tokens: Tensor, entropies: bool,
                   temperature: float) -> tuple[Tensor, Tensor, Tensor | None]:
        raise NotImplementedError

    def save(self, path: Path) -> None:
        """Write the whole model as a Transformers folder, tokenizer included."""
        sync_bias_config(self.model)
        own, tokenizer = self.heads.task_head, self.get_padded_tokenizer()
        with (silence_transformers(), self._saved_stop_tokens(),
              nullcontext(self.model) if own is None else own.assembled(self.model, self.structure.backbone) as whole):
            if own is not None and self.can_generate:
                whole.config.pad_token_id = tokenizer.pad_token_id
            whole.save_pretrained(path)
            tokenizer.save_pretrained(path)
        for file in path.glob("*.safetensors"):  # the library makes its files readable to their owner alone
            file.chmod(path.stat().st_mode & 0o666)

    def get_saved_tokenizer(self) -> Any:
        """The tokenizer as it is written beside what was trained: where that were conversations, with the chat template
        that rendered them, and with the token that ends a turn as its eos token."""
        if not self.chat_format.trained:
            return self.tokenizer
        tokenizer = deepcopy(self.tokenizer)
        tokenizer.chat_template = self.chat_format.template
        if self.chat_format.stop_tokens and not self.is_encoder_decoder:  # a source of a divided base ends with eos
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(self.chat_format.stop_tokens[0])
        return tokenizer

    @contextmanager
    def _saved_stop_tokens(self) -> Iterator[None]:
        """While open, the model's generation config names the tokens that end a turn before its own."""
        settings = getattr(self.model, "generation_config", None)
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
        """Write which tokens end an answer beside an adapter, where it was tuned on conversations."""
        if self.chat_format.trained and (settings := getattr(self.model, "generation_config", None)) is not None:
            with silence_transformers(), self._saved_stop_tokens():
                settings.save_pretrained(path)


class PackedHFModel(HFModel):
    """A stack that takes rows of tokens.

    Args:
        layout: `packed` runs a row as a forest; `padded` is its slow twin, one row for each leaf with a mask. Left out:
            packed where the model proves, on a probe of a few tokens, that both give the same.
    """

    options: ClassVar[Mapping[str, Any]] = {}  # of every call of the backbone

    def __init__(self, model: Any, tokenizer: Any, layout: Layout | None = None) -> None:
        super().__init__(model, tokenizer)
        self.structure = causal.attach_injector(self.structure, router=lambda: self.router)
        self.layout = layout or self._detect_layout()

    def _build_columns(self, inputs: Inputs) -> dict[str, Tensor]:
        """What the backbone is told about each token, by its argument's name, each [T]."""
        return {"input_ids": inputs.tokens, "position_ids": inputs.positions}

    def _build_arguments(self, inputs: Inputs) -> dict[str, Tensor]:
        """The columns, with embeddings in place of the tokens where these are mixtures."""
        columns = self._build_columns(inputs)
        if (embeds := mix_embeddings(self.model.get_input_embeddings(), inputs)) is not None:
            columns["inputs_embeds"] = embeds
            del columns["input_ids"]
        return columns

    def _run(self, inputs: Inputs) -> Tensor:
        return self._run_packed(inputs) if self.layout == "packed" else self._run_padded(inputs)

    def _run_packed(self, inputs: Inputs) -> Tensor:
        # A mask that is already four-dimensional is handed through untouched; it is empty, so that a model which
        # would use it instead of the forest fails loudly.
        placeholder = inputs.positions.new_empty(1, 1, 0, 0, dtype=torch.bool)
        columns = {name: column[None] for name, column in self._build_arguments(inputs).items()}
        result = self.structure.backbone(**columns, attention_mask=placeholder, forest=inputs.forest, **self.options)
        return result.last_hidden_state[0]

    def _run_padded(self, inputs: Inputs) -> Tensor:
        """Every leaf of the forest with all its ancestors as one padded row; shared prompts are computed repeatedly."""
        runs, home = list_leaf_paths(inputs.forest)
        device = inputs.tokens.device
        mask = to_device(self._build_mask(inputs.forest, runs), device)
        runs = [to_device(run, device) for run in runs]
        columns = {name: pad_sequence([column[run] for run in runs], batch_first=True)
                   for name, column in self._build_arguments(inputs).items()}
        result = self.structure.backbone(**columns, attention_mask=mask, **self.options)
        return result.last_hidden_state.flatten(0, 1)[to_device(home(mask.shape[-1]), device)]

    def _build_mask(self, forest: SegmentTree, runs: Sequence[Tensor]) -> Tensor:
        """Of the padded rows: [rows, L] which tokens count, or [rows, 1, L, L] which token sees which."""
        return pad_sequence([torch.ones_like(run) for run in runs], batch_first=True)

    @torch.no_grad()
    def _detect_layout(self) -> Layout:
        """Two segments in one row must get what they have alone; some architectures leak or cannot."""
        device, was = self.device, self.model.training
        self.model.eval()
        inputs = Inputs(torch.tensor([1, 2, 3, 4, 2, 3], device=device),
                        torch.tensor([0, 1, 2, 0, 1, 2], device=device), SegmentTree((3, 3), (-1, -1)))
        try:
            packed, padded = self._run_packed(inputs).float(), self._run_padded(inputs).float()
        except LuthierError:
            raise
        except TypeError as error:
            if "forest" not in str(error):  # not the model that refuses the argument: a defect here or in a kernel
                raise
            return self._fall_back_to_padded("it takes no arguments for its attention")
        except (RuntimeError, ValueError, AttributeError) as error:  # the model took the mask, not the forest
            return self._fall_back_to_padded(summarize_error(error))
        finally:
            self.model.train(was)
        if not bool(padded.isfinite().all()):
            raise BaseError(f"base {self.model.name_or_path!r}: its output is not a number",
                            "set base.dtype to float32; if it is, the weights are damaged: get them anew")
        close = torch.allclose(packed, padded, rtol=1e-2, atol=1e-2 * float(padded.abs().max()))
        return "packed" if close else self._fall_back_to_padded("documents of one row influence each other")

    def _fall_back_to_padded(self, why: str) -> Layout:
        self.padding_reason = (f"{type(self.model).__name__} cannot compute several documents in one row ({why}); each "
                           "gets a padded row of its own, which is slower and changes no result")
        return "padded"


def list_leaf_paths(forest: SegmentTree) -> tuple[list[Tensor], Callable[[int], Tensor]]:
    """For each leaf the row's indices that make up its path, and a map of each token to its first place there."""
    parents = set(forest.parents)
    starts = forest.starts
    spans = [torch.arange(start, start + n) for start, n in zip(starts, forest.lengths, strict=True)]
    runs = [torch.cat([spans[a] for a in forest.find_path(i)]) for i in range(len(spans)) if i not in parents]

    def home(width: int) -> Tensor:
        found = torch.full((sum(forest.lengths),), -1)
        for row, run in reversed(list(enumerate(runs))):
            found[run] = torch.arange(len(run)) + row * width
        return found

    return runs, home
