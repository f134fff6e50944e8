"""Mixup against torch by hand: embeddings mixed, a forward pass for each example, cross-entropy with shares, in float64.

Read `test_weights.py` first, for rows that go the whole way.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lab import TOKENIZER, stir
from test_weights import apart, made, measured
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from luthier.assembly.factory import attach_method
from luthier.core.errors import DataError, RecipeError
from luthier.core.examples import ClassificationExample, Origin
from luthier.core.types import LabeledSpan, Outputs, TokenizedExample, TokenSpan
from luthier.data import DataConfig, InMemoryBatchSource, build_batch, format_preview, read_datasets
from luthier.data.augmentation import MixupAugmentation
from luthier.data.label_encoding import LabelEncoder
from luthier.data.mixup import MixupDraw, draw_pairs, mix_examples
from luthier.methods import METHODS
from luthier.models import CausalLM
from luthier.models.families.encoder import Encoder
from luthier.models.families.seq2seq import Seq2Seq
from luthier.objectives import OBJECTIVES
from tiny import END_OF_TEXT, IM_END, VOCABULARY, pair_tokenizer, save_tiny, tiny, tiny_tokenizer
from trials import SETTINGS, prepare, trial

CLASSES = LabelEncoder(("a", "b", "c"))
SHARES = (0.25, 0.875, 0.5, 1.0)
LENGTHS = ((5, 9), (8, 3), (6, 6), (7, 4))
LABELS = ((0, 1), (2, 0), (1, 1), (2, 0))
WEIGHTS = {"b": 2.0, "c": 0.5}


def plain(length: int, label: Any, seed: int, weight: float = 1.0) -> TokenizedExample:
    ids = torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return TokenizedExample((TokenSpan(tuple(ids), (0.0,) * length),), Origin("f", seed), labeled_spans=(LabeledSpan(0, label, weight=weight),))


def couples() -> list[tuple[TokenizedExample, TokenizedExample, float]]:
    return [(plain(n, float(x), 2 * i, 1.0 + i), plain(m, float(y), 2 * i + 1), share)
            for i, ((n, m), (x, y), share) in enumerate(zip(LENGTHS, LABELS, SHARES, strict=True))]


def mixtures() -> list[TokenizedExample]:
    """Four mixtures, and an example that is none."""
    return [*(mix_examples(a, b, share, CLASSES) for a, b, share in couples()), plain(6, 1.0, 99)]


def family(kind: str, layout: Any = None) -> Any:
    if kind == "t5":
        marks: dict[str, Any] = {"decoder_start_token_id": END_OF_TEXT, "pad_token_id": END_OF_TEXT, "eos_token_id": IM_END}
        config = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, dropout_rate=0.0, **marks)
        torch.manual_seed(0)
        return Seq2Seq(T5ForConditionalGeneration(config).double().eval(), tiny_tokenizer())
    if kind in ("bert", "distilbert"):
        return Encoder(tiny(kind), pair_tokenizer(), layout=layout)
    return CausalLM(tiny(kind), TOKENIZER, layout=layout)


def by_hand(base: Any, one: TokenizedExample, two: TokenizedExample | None, share: float) -> Tensor:
    """[D] the pooled state of one example alone, its embeddings mixed by torch and put into Transformers' own backbone."""
    weight = base.structure.embedding.weight
    texts = [torch.tensor(e.spans[0].ids) for e in (one, *([two] if two else []))]
    width = max(map(len, texts))
    scale = getattr(base.structure.embedding, "embed_scale", torch.ones(())).double()
    rows = [F.pad(scale * F.embedding(ids, weight), (0, 0, 0, width - len(ids))) for ids in texts]
    embeds = (share * rows[0] + (1 - share) * rows[1] if two else rows[0])[None]
    if isinstance(base, Seq2Seq):
        read = base.encoder(inputs_embeds=embeds).last_hidden_state
        return base.decoder(input_ids=torch.tensor([[base.start]]), encoder_hidden_states=read).last_hidden_state[0, 0]
    types = {"token_type_ids": torch.zeros(1, width, dtype=torch.int64)} if base.model.config.model_type == "bert" else {}
    states = base.structure.backbone(inputs_embeds=embeds, attention_mask=torch.ones(1, width, dtype=torch.int64), **types,
                                   **base.options).last_hidden_state[0]
    return states[-1] if base.pooling == "last" else states[0]


@pytest.mark.parametrize(("kind", "layout", "method"), [
    ("llama", "packed", "full"), ("llama", "padded", "lora"), ("bert", "packed", "full"), ("bert", "padded", "bitfit"),
    ("distilbert", None, "lora"), ("gpt2", None, "ia3"), ("gemma3", None, "lora"), ("qwen2", None, "adapter"), ("t5", None, "lora"),
    *[(kind, layout, method) for kind in ("llama", "bert") for layout in ("packed", "padded")
      for method in ("prompt", "ptuning", "prefix", "ptuning_v2")]])
@pytest.mark.parametrize("weights", [{}, WEIGHTS], ids=["plain", "weighted"])
def test_it_is_torchs_by_hand(double: None, kind: str, layout: Any, method: str, weights: dict[str, float]) -> None:
    base = family(kind, layout)
    attached = attach_method(base, METHODS[method](**SETTINGS.get(method, {})), 3)
    objective = OBJECTIVES["classify"](labels=CLASSES.classes, class_weights=weights)
    heads = base.add_heads(objective.heads, 7)
    base.heads.modules["score"].double()
    for one in (attached, heads):
        for parameter in one.parameters().values():
            parameter.data = parameter.data.double()
        stir(one)
    trained = {**attached.parameters(), **heads.parameters()}
    one = build_batch(mixtures())
    loss = objective(base.forward(one.inputs, one.target, objective.required_outputs), one.target)
    found = torch.autograd.grad(loss.total / loss.count, list(trained.values()), allow_unused=True)

    states = torch.stack([by_hand(base, a, b, share) for a, b, share in couples()] + [by_hand(base, mixtures()[-1], None, 1.0)])
    scores = base.heads.modules["score"](states)
    shares = torch.stack([share * F.one_hot(torch.tensor(x), 3) + (1 - share) * F.one_hot(torch.tensor(y), 3)
                          for (x, y), share in zip(LABELS, SHARES, strict=True)] + [F.one_hot(torch.tensor(1), 3)]).double()
    of_class = torch.tensor([weights.get(name, 1.0) for name in "abc"], dtype=torch.float64)
    of_row = torch.tensor([share * (1.0 + i) + (1 - share) for i, share in enumerate(SHARES)] + [1.0], dtype=torch.float64)
    each = F.cross_entropy(scores, shares, weight=of_class, reduction="none")
    wanted = (of_row * each).sum() / (of_row * (shares @ of_class)).sum()
    assert float(loss.count) == pytest.approx(objective.count(one.target)) == pytest.approx(float((of_row * (shares @ of_class)).sum()))
    torch.testing.assert_close(loss.total / loss.count, wanted, rtol=1e-6, atol=0)
    theirs = torch.autograd.grad(wanted, list(trained.values()), allow_unused=True)
    largest = max(float(g.abs().max()) for g in theirs if g is not None)
    assert largest > 1e-3
    for name, mine, other in zip(trained, found, theirs, strict=True):
        assert (mine is None) == (other is None), name
        assert mine is None or float((mine - other).abs().max()) < 1e-6 * largest, name
    # The controls: with other shares it is another loss.
    hard = build_batch([mix_examples(a, b, 1.0, CLASSES) for a, b, _ in couples()] + mixtures()[-1:])
    other = objective(base.forward(hard.inputs, hard.target, objective.required_outputs), hard.target)
    assert abs(float(other.total / other.count - wanted)) > 1e-3


def test_without_weights_it_is_cross_entropy_with_probabilities() -> None:
    target = replace(build_batch(mixtures()).target, item_weights=torch.zeros(0))
    scores = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores[torch.arange(5), target.labels.long()] += 9.0
    scores[3] = scores[3].roll(1)
    objective = OBJECTIVES["classify"](labels=CLASSES.classes)
    found = objective(Outputs(scores=scores), target)
    torch.testing.assert_close(found.total / found.count, F.cross_entropy(scores, target.soft_labels.double()), rtol=1e-12, atol=0)
    guesses, truth = scores.argmax(-1), target.soft_labels.argmax(-1)
    assert float(found.metrics["accuracy"][0]) == 4 == float((guesses == truth).sum()) != float((guesses == truth.roll(1)).sum())


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_a_share_of_one_is_the_example_itself(kind: str) -> None:
    base = family(kind)
    a, b = plain(9, 0.0, 1), plain(5, 2.0, 2)
    states = [base.states(build_batch([one, plain(4, 1.0, 3)]).inputs) for one in (a, mix_examples(a, b, 1.0, CLASSES))]
    assert torch.equal(*states)
    less = mix_examples(a, b, 0.5, CLASSES)
    assert not torch.allclose(base.states(build_batch([less, plain(4, 1.0, 3)]).inputs), states[0], atol=1e-3)
    swapped = mix_examples(b, a, 0.0, CLASSES)  # the longer one's tokens, whichever came first
    assert (swapped.spans[0].ids, swapped.spans[0].mix.share) == (a.spans[0].ids, 1.0)
    assert torch.equal(base.states(build_batch([swapped, plain(4, 1.0, 3)]).inputs), states[0])


def test_labels_of_every_kind_are_mixed() -> None:
    items = mix_examples(plain(3, 0.0, 0), plain(3, 2.0, 1), 0.25, CLASSES).labeled_spans
    assert (items[0].label, items[0].soft_label) == (2.0, (0.25, 0.0, 0.75))
    assert mix_examples(plain(3, 4.0, 0), plain(3, 2.0, 1), 0.25, LabelEncoder(None)).labeled_spans[0].label == 2.5
    flags = mix_examples(plain(3, (1.0, 1.0, 0.0), 0), plain(3, (0.0, 1.0, 0.0), 1), 0.25, replace(CLASSES, several=True)).labeled_spans[0]
    assert (flags.label, flags.soft_label) == ((0.25, 1.0, 0.0), ())
    assert mix_examples(plain(3, 0.0, 0, 3.0), plain(3, 0.0, 1, 1.0), 0.25, CLASSES).labeled_spans[0].weight == 1.5
    shown = str(format_preview(mix_examples(plain(3, 0.0, 0), plain(3, 2.0, 1), 0.25, CLASSES), tiny_tokenizer(), CLASSES.classes))
    assert "0.25 a, 0.75 c" in shown


# ---------------------------------------------------------------- from rows on


ROWS = [{"text": word * (1 + i % 3), "label": "abc"[i % 3]} for i, word in enumerate(("alpha", "beta", "gamma", "delta", "eta"))]
MIXUP = {"name": "mixup", "alpha": 1.0, "copies": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixup")
    save_tiny(folder / "base", "llama", num_hidden_layers=1)
    return folder


def rows(home: Path, *augment: Any, seed: int = 0, given: Any = ROWS, classes: Any = ()) -> Any:
    path = home / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return read_datasets(DataConfig.parse({"train": str(path), "test": str(path), "augment": list(augment)}), tiny_tokenizer(), seed=seed,
                         classes=classes)


def test_how_a_batch_is_cut_changes_nothing(home: Path, double: None) -> None:
    for objective, given in (({"name": "classify", "class_weights": "balanced"}, ROWS),
                             ({"name": "classify", "task": "regression"}, [{**row, "label": i} for i, row in enumerate(ROWS)]),
                             ({"name": "classify", "task": "multi"}, [{**row, "label": ["a", "b"][:i % 3]} for i, row in enumerate(ROWS)])):
        recipe = made(home, objective, given)
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"augment": (MixupAugmentation.parse(MIXUP),)})})
        whole = measured(recipe)
        assert apart(measured(recipe, 24), whole) < 1e-6
        assert apart(measured(made(home, objective, given)), whole) > 1e-3  # the control


def test_mixtures_are_seeded_counted_and_of_training_rows_alone(home: Path) -> None:
    found = rows(home, MIXUP)
    part = found.report.parts["train"]
    assert (part.read, part.kept, part.encoded, part.augmented, part.labels) == (5, 5, 15, {"mixup": 10}, {"a": 2, "b": 2, "c": 1})
    assert "train: 10 rows changed or added by mixup" in found.report.lines()
    assert [bool(one.spans[0].mix) for one in found.train] == [False, True, True] * 5
    assert found.train == rows(home, MIXUP).train
    assert found.train != rows(home, MIXUP, seed=1).train
    assert not any(one.spans[0].mix or one.labeled_spans[0].soft_label for one in found.test)
    assert found.mix == ((15, 1.0),)
    assert sum(found.counts.values()) == pytest.approx(15)
    replaced = rows(home, {**MIXUP, "copies": 0, "replace": 0.5}, seed=3)
    assert 0 < sum(bool(one.spans[0].mix) for one in replaced.train) == replaced.report.parts["train"].augmented["mixup"] < 5
    both = rows(home, {"name": "deletion", "copies": 1}, {"name": "mixup"})
    assert (len(both.train), both.report.parts["train"].augmented) == (20, {"deletion": 5, "mixup": 10})


def test_shares_are_of_the_beta_distribution_and_partners_are_others() -> None:
    examples = [ClassificationExample("t", "a", Origin("f", i)) for i in range(7)]
    for alpha in (0.2, 2.0):
        found = [(row, one) for seed in range(60) for row, (_, *copies) in enumerate(
            draw_pairs(examples, MixupAugmentation(name="mixup", alpha=alpha, copies=4), seed, 0)) for one in copies]
        shares = np.array([one.share for _, one in found])
        assert abs(shares.mean() - 0.5) < 0.03
        assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)
        assert all(isinstance(one, MixupDraw) and one.row != row for row, one in found)
        assert {one.row for row, one in found if row == 3} == {0, 1, 2, 4, 5, 6}


def test_the_cursor_is_exact_and_knows_the_mixtures(home: Path) -> None:
    encoded = rows(home, MIXUP).train
    one = InMemoryBatchSource(encoded, 4, 60, seed=2)
    next(one)
    saved, again = one.state(), InMemoryBatchSource(encoded, 4, 60, seed=2)
    again.load(saved)
    for _ in range(5):
        for mine, theirs in zip(next(one), next(again), strict=True):
            assert torch.equal(mine.inputs.tokens, theirs.inputs.tokens)
            a, b = mine.inputs.mix, theirs.inputs.mix
            assert (a is None and b is None) or (torch.equal(a.ids, b.ids) and torch.equal(a.shares, b.shares))
            assert torch.equal(mine.target.soft_labels, theirs.target.soft_labels)
    less = [replace(e, spans=(replace(e.spans[0], mix=replace(e.spans[0].mix, share=e.spans[0].mix.share * 0.5)),)) if e.spans[0].mix else e for e in encoded]
    with pytest.raises(DataError, match="differs from the data that this run was trained on"):
        InMemoryBatchSource(less, 4, 60, seed=2).load(saved)


def test_a_run_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trials
    plain_recipe = trials.recipe
    augment = (MixupAugmentation(name="mixup", alpha=1.0, copies=0, replace=1.0),)
    monkeypatch.setattr(trials, "recipe", lambda *axes: (lambda made: made.model_copy(
        update={"data": made.data.model_copy(update={"augment": augment})}))(plain_recipe(*axes)))
    home = prepare(tmp_path)
    for base in ("llama", "bert", "t5", "vit"):
        assert trial(home, base, "lora", "classify") == ""
    assert "mixup mixes labels, and objective 'sft'" in trial(home, "llama", "lora", "sft")
    assert "objective 'contrastive'" in trial(home, "bert", "lora", "contrastive")
    assert "objective 'reward'" in trial(home, "llama", "lora", "reward")


def test_pictures_are_mixed_as_their_pixels_are(tmp_path: Path) -> None:
    home = prepare(tmp_path)

    def see(pixels: Any) -> Tensor:
        return torch.as_tensor(pixels)[None].double() / 255 - 0.5

    config = DataConfig.parse({"train": str(home / "train-images-idx3-ubyte"), "augment": [MIXUP, {"name": "noise", "probability": 1.0}]})
    found = read_datasets(config, see, seed=0, reads=frozenset({"ImageExample"})).train
    bare = read_datasets(config.model_copy(update={"augment": ()}), see, seed=0, reads=frozenset({"ImageExample"})).train
    one = next(e for e in found if e.images[0].other is not None)
    image = replace(one.images[0], changes=(), other=replace(one.images[0].other, changes=()))
    parts = [p.images[0].tensor() for p in bare]
    wanted = image.share * see(np.array(image.pixels)) + (1 - image.share) * see(np.array(image.other.pixels))
    torch.testing.assert_close(image.tensor(), wanted, rtol=1e-12, atol=0)
    assert not any(torch.allclose(wanted, part) for part in parts)
    noisy = replace(image, other=one.images[0].other)  # the changes of the other are drawn with it
    assert not torch.equal(replace(noisy, draw=(1,)).tensor(), replace(noisy, draw=(2,)).tensor())
    step = InMemoryBatchSource(found, 12, None, seed=1)
    first, second = (next(step)[0] for _ in range(2))  # noise is drawn anew in every epoch, in both pictures
    assert first.inputs.mix is None
    assert first.target.soft_labels.shape == (12, 2)
    assert not torch.equal(first.inputs.images, second.inputs.images)


def test_what_cannot_be_mixed_is_told(home: Path) -> None:
    with pytest.raises(DataError, match="mixup does not support TokenClassificationExample"):
        rows(home, "mixup", given=[{"words": ["a", "b"], "tags": ["X", "Y"]}] * 2)
    with pytest.raises(DataError, match="mixup needs two rows, and there is one"):
        rows(home, "mixup", given=ROWS[:1])
    with pytest.raises(RecipeError, match="mixup may be given only once"):
        DataConfig.parse({"train": "x", "augment": ["mixup", {"name": "mixup"}]})
    assert not OBJECTIVES["classify"](task="tokens").supports_soft_labels
