"""What the contract tests share: examples with odd weights, a loss with all of its gradients, and how far two are apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from luthier.assembly.factory import attach_method
from luthier.core.examples import Origin
from luthier.core.protocols import Head, Tuner
from luthier.core.types import Batch, LabeledSpan, TokenizedExample, TokenSpan
from luthier.methods import METHODS
from luthier.models import CausalLM
from luthier.objectives import OBJECTIVES
from tiny import BYTES, tiny, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SFT = OBJECTIVES["sft"]()
LENGTHS = (23, 5, 9, 14, 2, 31, 7, 12)  # longer and shorter than the tiny models' window of 8
TREES = ((-1, 0, 0, 0), (-1, 0, 1, 1, 0, 4), (-1, 0, 1))  # a prompt with answers; depth 3 with forks; a chain


class Dice:
    """Random tokens and weights. Every weight is another one, so a prediction can be known by its weight."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self._weights = iter((torch.randperm(10_000, generator=self.generator) + 1).div(4096.0).tolist())

    def span(self, length: int, parent: int = -1, masked: int = 0) -> TokenSpan:
        ids = torch.randint(BYTES, (length,), generator=self.generator).tolist()
        return TokenSpan(tuple(ids), (0.0,) * masked + tuple(next(self._weights) for _ in range(length - masked)), parent)


def documents(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[TokenizedExample]:
    """One document for each length; a third of its tokens, the prompt, has no weight."""
    dice = Dice(seed)
    return [TokenizedExample((dice.span(n, masked=n // 3),), Origin("lab", i), n) for i, n in enumerate(lengths)]


def trees(seed: int = 1) -> list[TokenizedExample]:
    """One example for each shape in `TREES`; its spans differ in length and all of them have weights."""
    dice = Dice(seed)
    return [TokenizedExample(tuple(dice.span(3 + 4 * ((i + j) % 4), parent) for j, parent in enumerate(shape)),
                             Origin("lab", i), 1) for i, shape in enumerate(TREES)]


def paths(tree: TokenizedExample) -> list[TokenizedExample]:
    """Each leaf of a tree with all its ancestors as a document. What several share has its weights in the first alone."""
    parents, seen, found = {span.parent for span in tree.spans}, set(), []
    for leaf in (i for i in range(len(tree.spans)) if i not in parents):
        path = [leaf]
        while (parent := tree.spans[path[0]].parent) >= 0:
            path.insert(0, parent)
        ids = tuple(token for i in path for token in tree.spans[i].ids)
        weights = tuple(0.0 if i in seen else w for i in path for w in tree.spans[i].weights)
        seen.update(path)
        found.append(TokenizedExample((TokenSpan(ids, weights),), tree.origin, 1))
    return found


def base(kind: str, layout: Any = None, **overrides: Any) -> CausalLM:
    """A tiny model behind the family's contract."""
    return CausalLM(tiny(kind, **overrides), TOKENIZER, layout=layout)


def attach(family: CausalLM, name: str, seed: int = 3, stirred: bool = True, **settings: Any) -> Tuner:
    """A method on the family, by its name in `METHODS`; `stirred` away from its start, where half of LoRA's gradients are 0."""
    attached = attach_method(family, METHODS[name](**settings), seed)
    if stirred:
        stir(attached)
    return attached


@torch.no_grad()
def stir(attached: Tuner, size: float = 0.1, seed: int = 4) -> None:
    """Move every trainable parameter a little."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in attached.parameters().values():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter += size * noise.to(parameter.dtype)


def measured(family: CausalLM, attached: Tuner, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Loss and every gradient of the batches together, divided once; the loss under the name `loss`."""
    batches = list(batches)
    count = sum(SFT.count(batch.target) for batch in batches)
    loss = torch.zeros((), dtype=torch.float64)
    for parameter in attached.parameters().values():
        parameter.grad = None
    for batch in batches:
        total = SFT(family.forward(batch.inputs, batch.target, SFT.required_outputs), batch.target).total
        (total / count).backward()
        loss += total.detach() / count
    gradients = {name: p.grad for name, p in attached.parameters().items()}
    assert all(g is not None for g in gradients.values())
    return {"loss": loss, **gradients}


def apart(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest difference of any entry, relative to the largest number in its tensor.

    Some gradients are zero by the mathematics (of a bias on the keys), hence noise; they are compared with 1e-4 of the
    largest number of all.
    """
    assert found.keys() == wanted.keys()
    floor = 1e-4 * max(float(t.abs().max()) for t in wanted.values())
    return max(float((found[n] - t).abs().max()) / max(float(t.abs().max()), floor) for n, t in wanted.items())


@torch.no_grad()
def logits(family: CausalLM, tokens: Sequence[int] = tuple(range(40, 60))) -> Tensor:
    """[T, V] of one document, through Transformers' own call."""
    return family.model(input_ids=torch.tensor([list(tokens)])).logits[0]


def digest(family: CausalLM) -> dict[str, bytes]:
    """The bytes of every weight and buffer of the base."""
    return {name: tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
            for name, tensor in family.model.state_dict().items() if tensor.dim()}


# ---------------------------------------------------------------- items: what is judged as a whole

SCORE = Head("score", "item", 2)


def scored(family: Any, attached: Tuner, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Loss and every gradient, the head's too, of the batches together: the squared distance of an item's scores from
    its labels (`judged`), summed over all items and divided once by their number."""
    batches = list(batches)
    heads = family.add_heads((SCORE,), 7)
    family.heads.modules["score"].double()
    trained = {**attached.parameters(), **heads.parameters()}
    items = sum(len(batch.target.labeled_segments) for batch in batches)
    loss = torch.zeros((), dtype=torch.float64)
    for parameter in trained.values():
        parameter.grad = None
    for batch in batches:
        found = family.forward(batch.inputs, batch.target, frozenset({"scores"})).scores
        total = (found - batch.target.labels.double()).square().sum() / items
        total.backward()
        loss += total.detach()
    gradients = {name: p.grad for name, p in trained.items()}
    assert all(g is not None for g in gradients.values())
    return {"loss": loss, **gradients}


def judged(examples: Iterable[TokenizedExample]) -> list[TokenizedExample]:
    """The examples, the last span of each labeled with two odd numbers as its label."""
    return [replace(e, labeled_spans=(LabeledSpan(len(e.spans) - 1, (0.1 + 0.37 * i % 1, 0.9 - 0.23 * i % 1)),))
            for i, e in enumerate(examples)]
