"""The causal language model family: one packed row in, what the objective asked for out.

Read `anatomy.py` (the parts), `forest.py` (attention) and `head.py` (the loss's end) first; this file joins them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from luthier.core.protocols import Attached, Generated, Head, Sampling
from luthier.core.types import Forest, Inputs, Outputs, Target
from luthier.families import forest as _forest
from luthier.families.anatomy import anatomy
from luthier.families.generate import eos_tokens, generate, stream
from luthier.families.head import log_probs
from luthier.families.heads import Heads, Pooling
from luthier.families.lean import Lean, slim
from luthier.families.load import quiet

Layout = Literal["packed", "padded"]


class CausalLM:
    """A decoder of Transformers behind the family's contract.

    Args:
        model: an `AutoModelForCausalLM` model.
        tokenizer: its tokenizer.
        layout: `packed` runs a row as a forest; `padded` is its slow twin, one row for each leaf with a mask. Left out:
            packed where the model proves, on a probe of a few tokens, that its segments do not see one another.
    """

    pooling: Pooling = "last"

    def __init__(self, model: Any, tokenizer: Any, layout: Layout | None = None) -> None:
        model.set_attn_implementation(_forest.NAME)
        self.model, self.tokenizer = model, tokenizer
        self._lean = Lean()
        slim(model, self._lean)
        self.anatomy = anatomy(model, tokenizer)
        self._lean.watch(self.anatomy.blocks)
        self.add((), 0)
        self._recompute_over: int | None = None
        self.layout: Layout = layout or self._proven_layout()
        config = model.config.get_text_config()
        self._softcap = getattr(config, "final_logit_softcapping", None)
        times, over = (getattr(config, name, None) or 1.0 for name in ("logit_scale", "logits_scaling"))
        self._scale = float(times) / float(over)

    @property
    def device(self) -> torch.device:
        weight = self.anatomy.embedding.weight
        assert isinstance(weight, Tensor)
        return weight.device

    @property
    def training(self) -> bool:
        return bool(self.model.training)

    def train(self, mode: bool) -> None:
        self.model.train(mode)

    def checkpointing(self, over: int = 0) -> None:
        """From now on, in rows of more than `over` tokens, recompute every block in the backward pass instead of
        keeping its activations. The one long document of a data set then does not set the memory of the whole run."""
        self._recompute_over = over
        for block in self.anatomy.blocks:
            block.module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]

    def add(self, heads: Sequence[Head], seed: int) -> Attached:
        self.heads = Heads(heads, self.anatomy.sizes["hidden"], self.device, seed, self.anatomy.task)
        return self.heads

    def forward(self, inputs: Inputs, target: Target, needs: frozenset[str]) -> Outputs:
        return self.heads.outputs(self.states(inputs), inputs.forest, target, needs, self.pooling, self._log_probs)

    def _log_probs(self, states: Tensor, tokens: Tensor, entropies: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        assert self.anatomy.head is not None
        return log_probs(self.anatomy.head, states, tokens, self._softcap, self._scale, entropies)

    def states(self, inputs: Inputs) -> Tensor:
        """[T, D] last hidden states of the row."""
        run = self._packed if self.layout == "packed" else self._padded
        if not torch.is_grad_enabled():
            return run(inputs)
        recompute = self._recompute_over is not None and inputs.tokens.shape[0] > self._recompute_over
        for block in self.anatomy.blocks:
            block.module.gradient_checkpointing = recompute  # type: ignore[assignment]
        with nullcontext() if recompute else self._lean():
            return run(inputs)

    def _packed(self, inputs: Inputs) -> Tensor:
        # A mask that is already four-dimensional is handed through untouched; it is empty, so that a model which
        # would use it instead of the forest fails loudly.
        placeholder = inputs.positions.new_empty(1, 1, 0, 0, dtype=torch.bool)
        result = self.anatomy.backbone(input_ids=inputs.tokens[None], position_ids=inputs.positions[None],
                                       attention_mask=placeholder, forest=inputs.forest, use_cache=False)
        return result.last_hidden_state[0]

    def _padded(self, inputs: Inputs) -> Tensor:
        """Every leaf of the forest with all its ancestors as one padded row; shared prompts are computed repeatedly."""
        runs, home = _leaves(inputs.forest)
        rows = pad_sequence([inputs.tokens[run] for run in runs], batch_first=True)
        positions = pad_sequence([inputs.positions[run] for run in runs], batch_first=True)
        mask = pad_sequence([torch.ones_like(inputs.tokens[run]) for run in runs], batch_first=True)
        result = self.anatomy.backbone(input_ids=rows, position_ids=positions, attention_mask=mask, use_cache=False)
        return result.last_hidden_state.flatten(0, 1)[home(rows.shape[1]).to(rows.device)]

    @torch.no_grad()
    def _proven_layout(self) -> Layout:
        """Two segments in one row must give the second what it has alone; some architectures leak or cannot."""
        device, was = self.device, self.model.training
        self.model.eval()
        tokens = torch.tensor([1, 2, 3, 4, 2, 3], device=device)
        place = torch.tensor([0, 1, 2, 0, 1, 2], device=device)
        try:
            both = self._packed(Inputs(tokens, place, Forest((3, 3), (-1, -1))))
            alone = self._packed(Inputs(tokens[3:], place[3:], Forest((3,), (-1,))))
        except (RuntimeError, TypeError, ValueError, AttributeError):  # the model took the mask, not the forest
            return "padded"
        finally:
            self.model.train(was)
        close = torch.allclose(both[3:].float(), alone.float(), rtol=1e-2, atol=1e-2 * float(alone.float().abs().max()))
        return "packed" if close else "padded"

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Generated]:
        return generate(self.model, prompts, sampling, eos=self.stops, pad=0, device=self.device)

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """One answer token by token."""
        return stream(self.model, prompt, sampling, eos=self.stops)

    @property
    def stops(self) -> set[int]:
        return eos_tokens(self.model, self.tokenizer)

    def save(self, path: Path) -> None:
        """Write the whole model as a Transformers folder, tokenizer included."""
        with quiet():
            self.model.save_pretrained(path)
            self.tokenizer.save_pretrained(path)
        for file in path.glob("*.safetensors"):  # the library makes its files readable to their owner alone
            file.chmod(path.stat().st_mode & 0o666)


def _leaves(forest: Forest) -> tuple[list[Tensor], Any]:
    """For each leaf the row's indices that make up its path, and a map of each token to its first place there."""
    parents = set(forest.parents)
    starts = forest.starts
    spans = [torch.arange(start, start + n) for start, n in zip(starts, forest.lengths, strict=True)]
    runs = [torch.cat([spans[a] for a in forest.path(i)]) for i in range(len(spans)) if i not in parents]

    def home(width: int) -> Tensor:
        found = torch.full((sum(forest.lengths),), -1)
        for row, run in reversed(list(enumerate(runs))):
            found[run] = torch.arange(len(run)) + row * width
        return found

    return runs, home
