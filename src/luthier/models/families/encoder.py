"""The family of encoders such as BERT, whose tokens attend to their whole text. Read `families/causal.py` and
`hf_model.py` first.

Three things differ from a decoder. Attention is not causal (`attention/packed.py`). Some architectures number positions
from a value other than 0. BERT marks the second of two texts by a token type. With its head (`mlm_head.py`), an encoder
predicts a masked token at the token's own position.

Shape letters: T tokens of the row, S segments, L columns of a padded row, P predictions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from luthier.core.errors import BaseError
from luthier.core.protocols import GenerationOutput, SamplingParams
from luthier.core.types import Inputs, LossInputs, Outputs, SegmentTree, to_device
from luthier.models.attention.packed import describe_segments
from luthier.models.hf_attributes import get_optional
from luthier.models.hf_model import Layout, PackedHFModel
from luthier.models.mlm_head import MaskedLMHead
from luthier.models.ops.fused_logprobs import compute_logprobs
from luthier.models.sentence_files import read_pooling as read_pooling
from luthier.models.sentence_files import write_sentence_files
from luthier.models.soft_prompts import causal
from luthier.models.task_heads import LOG_PROBS, Pooling


class Encoder(PackedHFModel):
    """An encoder of Transformers as a `Family`.

    Args:
        model: an `AutoModel` model without a pooler, or an `AutoModelForMaskedLM` model.
        tokenizer: its tokenizer.
        layout: see `PackedHFModel`.
        pooling: of items: `first` is BERT's [CLS]; sentence encoders use the `mean`.

    Raises:
        BaseError: a probe of a few tokens shows that the model's position ids or logits are computed in an
            unsupported way.
    """

    task: ClassVar[str] = "FEATURE_EXTRACTION"

    def __init__(self, model: Any, tokenizer: Any, layout: Layout | None = None, pooling: Pooling = "first") -> None:
        self.pooling = pooling
        types = get_optional(model.config, "type_vocab_size") or 0
        self._separator = _find_separator(tokenizer) if types > 1 else None
        self._offset = _detect_position_offset(model)
        super().__init__(model, tokenizer, layout)
        context = self.structure.sizes["context"] - self._offset
        self.structure = causal.attach_injector(replace(self.structure,
                                                        sizes={**self.structure.sizes, "context": context}),
                                         self._offset, lambda: self.router)
        self.mlm_head = None if self.structure.head is None else MaskedLMHead(model)
        if self.mlm_head is not None:
            self._check_logits(self.mlm_head)

    def _build_columns(self, inputs: Inputs) -> dict[str, Tensor]:
        columns = {"input_ids": inputs.tokens, "position_ids": inputs.positions + self._offset}
        if self._separator is not None:
            columns["token_type_ids"] = compute_token_types(inputs.tokens, inputs.segment_tree, self._separator)
        return columns

    def _build_mask(self, segment_tree: SegmentTree, runs: Sequence[Tensor]) -> Tensor:
        if segment_tree.is_flat:
            return super()._build_mask(segment_tree, runs)
        # An ancestor does not attend to its descendants, although they share a padded row.
        segment, _, related = describe_segments(segment_tree)  # [T], [S, S]
        # [rows, L] each token's segment, -1 for padding
        rows = pad_sequence([segment[run] for run in runs], batch_first=True, padding_value=-1)
        sees = related[rows[:, :, None], rows[:, None, :]] & (rows >= 0)[:, None, :]  # [rows, L, L]
        # [rows, 1, L, L] Padding sees itself: a softmax over nothing would be NaN.
        return (sees | torch.eye(rows.shape[1], dtype=torch.bool))[:, None]

    def forward(self, inputs: Inputs, target: LossInputs, needs: frozenset[str]) -> Outputs:
        if needs & LOG_PROBS and self.mlm_head is None:
            raise BaseError("an encoder without its masked-language-modeling head predicts no tokens",
                            "choose an objective for texts or labeled tokens, or a causal language model")
        return super().forward(inputs, target, needs)

    def _log_probs(self, states: Tensor, tokens: Tensor, entropies: bool,
                   temperature: float) -> tuple[Tensor, Tensor, Tensor | None]:
        return compute_logprobs(self.mlm_head, states, tokens, entropies=entropies, temperature=temperature)  # [P] each

    @torch.no_grad()
    def _check_logits(self, mlm_head: MaskedLMHead) -> None:
        """Raises `BaseError` if the model's own logits differ from those of its parts as they are called here."""
        was_training = self.model.training
        self.model.eval()
        row = torch.tensor([t for t in range(5, 9) if t != self.model.config.pad_token_id][:3], device=self.device)
        own = self.model(input_ids=row[None]).logits[0].float()  # [3, V]
        found = mlm_head(self.states(Inputs(row, torch.arange(3, device=self.device),
                                            SegmentTree((3,), (-1,))))).float()  # [3, V]
        self.model.train(was_training)
        if not torch.allclose(found, own, rtol=1e-2, atol=1e-2 * float(own.abs().max())):
            raise BaseError(f"{type(self.model).__name__} computes its logits in an unsupported way",
                            "choose another encoder, such as BERT or RoBERTa")

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> Iterator[GenerationOutput]:
        raise BaseError("an encoder cannot generate text", "choose a causal language model, such as 'smollm2'")

    def save(self, path: Path) -> None:
        """Write the whole model as a Transformers folder. Without a task head, also write the files that Sentence
        Transformers needs to load it."""
        super().save(path)
        if self.heads.task_head is None:
            write_sentence_files(path, self.structure.sizes["hidden"], self.pooling)


def compute_token_types(tokens: Tensor, segment_tree: SegmentTree, separator: int) -> Tensor:
    """[T] 1 for tokens after the first separator of their document, 0 for the others: `[CLS] a [SEP]` has type 0, a
    second text and its own `[SEP]` type 1. A `[SEP]` inside a text counts like any other."""
    found = (tokens == separator).long()  # [T]
    # [T], [S, S]
    owner, _, related = (to_device(x, tokens.device) for x in describe_segments(segment_tree))
    own = found.new_zeros(len(segment_tree.lengths)).index_add(0, owner, found)  # [S] separators of each segment
    # [T] separators before the token in its own segment
    before = found.cumsum(0) - found - (own.cumsum(0) - own)[owner]
    if not segment_tree.is_flat:
        before = before + ((related * own).sum(1) - own)[owner]  # [T] and those of the ancestors
    return (before > 0).long()  # [T]


def _find_separator(tokenizer: Any) -> int | None:
    """The separator token, if the tokenizer's token types equal `compute_token_types`; otherwise None: all types
    are
    0."""
    separator = get_optional(tokenizer, "sep_token_id")
    if separator is None:
        return None
    pair = tokenizer("a", "a b")
    ids, told = torch.tensor(pair["input_ids"]), pair.get("token_type_ids")
    return separator if told == compute_token_types(ids, SegmentTree((len(ids),), (-1,)), separator).tolist() else None


@torch.no_grad()
def _detect_position_offset(model: Any) -> int:
    """The position id of a text's first token: 0, or after that of padding (RoBERTa), whichever reproduces the model's
    own states."""
    was_training, device = model.training, model.get_input_embeddings().weight.device
    model.eval()
    tokens = torch.tensor([[t for t in range(5, 9) if t != model.config.pad_token_id][:3]], device=device)
    stack = model.base_model
    plain = stack(input_ids=tokens).last_hidden_state.float()  # [1, 3, D]
    found = None
    for offset in (0, (model.config.pad_token_id or 0) + 1):
        place = torch.arange(3, device=device)[None] + offset  # [1, 3]
        placed = stack(input_ids=tokens, position_ids=place).last_hidden_state.float()  # [1, 3, D]
        if torch.allclose(placed, plain, rtol=1e-2, atol=1e-2 * float(plain.abs().max())):
            found = offset
            break
    model.train(was_training)
    if found is None:
        raise BaseError(f"a {model.config.model_type} computes position ids in an unsupported way",
                        "choose another encoder, such as 'minilm'")
    return found
