"""From a row of states to the outputs that an objective needs: pooling, heads, log-probabilities. Read
`ops/fused_logprobs.py` first.

Shape letters: T tokens of the row, P predictions, A items, S segments, D hidden size, C width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from luthier.core.adapter_gate import AdapterGate
from luthier.core.errors import RunError
from luthier.core.protocols import Head
from luthier.core.types import LossInputs, Outputs, SegmentTree, to_device
from luthier.models.attention.packed import describe_segments
from luthier.models.hf_task_heads import TaskHead

Pooling = Literal["last", "first", "mean"]
PREFIX = "base_model.model."  # PEFT's prefix of a module that is saved as a whole
LOG_PROBS = frozenset({"token_logps", "token_hits", "token_entropies"})


class TaskHeads:
    """The heads of one objective on one model; there may be none. See `core.protocols.Heads`."""

    gates: tuple[AdapterGate, ...] = ()  # heads change nothing in the base
    optimizer_hooks = ()

    def __init__(self, heads: Sequence[Head], hidden: int, device: torch.device, seed: int, task: str,
                 build: Callable[[Head, torch.Generator], TaskHead | str] | None = None) -> None:
        """`build`: returns the head of Transformers' own class of the task, or the reason why there is none."""
        self.heads, self.task = tuple(heads), task
        self.modules: dict[str, nn.Linear | TaskHead] = {}
        self.task_head: TaskHead | None = None  # the one of Transformers' own class
        self.no_task_head_reason = ""  # why a requested head is not available
        self.scalars: dict[str, nn.Parameter] = {}
        generator = torch.Generator().manual_seed(seed)
        for head in heads:
            if head.kind == "scalar":
                self.scalars[head.name] = nn.Parameter(torch.tensor(head.start, device=device))
                continue
            found = build(head, generator) if head.task and build is not None else ""
            if isinstance(found, TaskHead):
                self.modules[head.name] = self.task_head = found.to(device)
                self.task = found.task or ""
                continue
            self.no_task_head_reason = found
            module = nn.Linear(hidden, head.width)
            with torch.no_grad():
                # [C, D] From a CPU generator: the same head on every device.
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * 0.02)
                module.bias.zero_()
            self.modules[head.name] = module.to(device)

    def parameters(self) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for name, module in self.modules.items():
            if isinstance(module, TaskHead):
                found |= {f"{PREFIX}{path}": parameter for path, parameter in module.weights().items()}
            else:
                found |= {f"{PREFIX}{name}.{part}": parameter for part, parameter in module.named_parameters()}
        return found | {f"{PREFIX}{name}": parameter for name, parameter in self.scalars.items()}

    def lr_multiplier(self, name: str) -> float:
        return 1.0

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Heads change nothing in the base, so there is nothing to disable."""
        yield

    def merge(self) -> None:
        """Heads are separate modules, so there is nothing to merge."""

    unmerge = merge

    def state(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.parameters().items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        mine = self.parameters()
        wrong = sorted(name for name in mine.keys() | state.keys()
                       if name not in mine or name not in state or state[name].shape != mine[name].shape)
        if wrong:
            kind = ("missing" if wrong[0] not in state else "unknown" if wrong[0] not in mine else "misshapen")
            raise RunError(f"the saved heads do not fit this objective: {len(wrong)} {kind}, the first {wrong[0]!r}",
                           "use the objective and the classes of their training")
        for name, parameter in mine.items():
            parameter.copy_(state[name])

    def get_peft_config(self) -> dict[str, Any] | None:
        """The heads' part of PEFT's config. A scalar is not a module, so it is not in `modules_to_save`."""
        kept = [name for name, module in self.modules.items() if not isinstance(module, TaskHead)]
        kept += self.task_head.modules_to_save() if self.task_head is not None else []
        return {"peft_type": None, "task_type": self.task or None, "modules_to_save": sorted(kept)}

    def _compute_scores(self, kind: str, states: Tensor) -> Tensor:
        """[.., C] The scores, in float32 even under autocast: rewards and values need more than bfloat16's three
        digits."""
        name = next(head.name for head in self.heads if head.kind == kind)
        module = self.modules[name]
        with _without_autocast(states.device):
            scores: Tensor = module(states.to(next(module.parameters()).dtype))  # [.., C]
        return scores

    def compute_outputs(self, row: Tensor, segment_tree: SegmentTree, target: LossInputs, needs: frozenset[str],
                        pooling: Pooling,
                log_probs: Callable[[Tensor, Tensor, bool, float], tuple[Tensor, Tensor, Tensor | None]]) -> Outputs:
        """The outputs in `needs` from a row of states.

        Args:
            row: [T, D].
            log_probs: (states [P, D], tokens [P], with entropies, temperature) -> log-probabilities, hits, entropies,
                all [P].
        """
        made: dict[str, Any] = {"scalars": dict(self.scalars)}
        if needs & (LOG_PROBS | {"states", "token_scores"}):
            made["states"] = states = row.index_select(0, target.state_index)  # [P, D]
            if needs & LOG_PROBS:
                # [P] each
                logps, hits, entropies = log_probs(states, target.token_ids, "token_entropies" in needs,
                                                   target.temperature)
                made |= {"token_logps": logps, "token_hits": hits, "token_entropies": entropies}
            if "token_scores" in needs:
                made["token_scores"] = self._compute_scores("token", states)  # [P, C]
        if "pooled" in needs:
            # [A, D]
            made["pooled"] = pool_states(row, segment_tree, target.labeled_segments, pooling)
        if "scores" in needs:
            own = pooling if self.task_head is None else cast(Pooling, self.task_head.pooling)
            # [A, C]
            made["scores"] = self._compute_scores("item", pool_states(row, segment_tree, target.labeled_segments, own))
        return Outputs(**{name: value for name, value in made.items() if name in needs or name == "scalars"})


def pool_states(row: Tensor, segment_tree: SegmentTree, items: Tensor, how: Pooling) -> Tensor:
    """[A, D] One state for each item: that of its last token, of its root's first token, or the mean over its path."""
    # [S] each
    starts, lengths = (to_device(torch.tensor(x), row.device) for x in (segment_tree.starts, segment_tree.lengths))
    if how == "last":
        return row.index_select(0, (starts + lengths - 1)[items])  # [A, D]
    if how == "first":
        # [S]
        roots = to_device(torch.tensor([segment_tree.find_path(i)[0] for i in range(len(segment_tree.lengths))]),
                          row.device)
        return row.index_select(0, starts[roots[items]])  # [A, D]
    # One product with [A, T] flags, in float32 or wider. `index_add` would use atomic additions on a GPU: in the row's
    # dtype, and in a different order in every run.
    segment, _, related = (to_device(x, row.device) for x in describe_segments(segment_tree))  # [T], [S, S]
    wide = torch.promote_types(row.dtype, torch.float32)
    counts = related[items].index_select(1, segment).to(wide)  # [A, T]
    with _without_autocast(row.device):
        return (counts @ row.to(wide)) / counts.sum(1, keepdim=True)  # [A, D]


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context without autocast."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
