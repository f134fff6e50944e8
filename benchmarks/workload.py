"""What every side is given, and how much arithmetic it cannot avoid. Read this file first; it imports the stdlib only.

The rows are public data in their natural order, cut only by `max_length`. They are written as prompt and completion
conversations, which TRL, Unsloth and Luthier all read, so no side needs a conversion that another does not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

DATA = ("mix", "alpaca", "gsm8k")
PROGRESS = "[progress] "  # a side's line that starts so is for whoever waits; everything else is its log


@dataclass(frozen=True)
class Setting:
    """The fixed part of a comparison: the same for every side."""

    base: str = "smollm2"
    dtype: str = "float32"
    rank: int = 8
    alpha: int = 16
    batch_size: int = 8
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 1024
    seed: int = 0
    data: str = "mix"
    objective: str = "sft"
    steps: int = 4
    warmup: int = 1


@dataclass(frozen=True)
class Job:
    """What one side has to do: the file that `sft.py` writes for it.

    Args:
        side: which side this is, with its options: `luthier`, `trl`, `trl-nockpt`, `unsloth`, `unsloth-nockpt`.
        folder: the base as a Transformers folder.
        rows: JSON lines, prompt and completion conversations.
        work: an empty folder for whatever the side writes.
        account: the file for what it measured.
        started: `time.time()` when its process was asked for.
    """

    side: str
    setting: Setting
    folder: str
    rows: str
    work: str
    account: str
    started: float

    @classmethod
    def read(cls, path: str) -> Job:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**{**raw, "setting": Setting(**raw["setting"])})

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @property
    def steps(self) -> int:
        return self.setting.warmup + self.setting.steps

    def examples(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in Path(self.rows).read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------- rows


def rows(data: str, count: int, folder: Path) -> list[dict[str, Any]]:
    """The first `count` rows of `data` (`mix`, `alpaca` or `gsm8k`) as prompt and completion conversations."""
    assert data in DATA, data
    alpaca, gsm8k = _alpaca(folder), _gsm8k(folder)
    source = {"alpaca": alpaca, "gsm8k": gsm8k, "mix": chain.from_iterable(zip(alpaca, gsm8k, strict=False))}[data]
    taken = [_conversation(question, answer) for question, answer in islice(source, count)]
    if len(taken) < count:
        raise SystemExit(f"--data {data} has {len(taken)} rows, and {count} are needed: take fewer steps")
    return taken


def pairs(data: str, count: int, folder: Path) -> list[dict[str, Any]]:
    """The first `count` pairs of HH-RLHF's harmless test rows, as prompt, chosen and rejected conversations.

    Args:
        data: `hh` in natural order, or only those whose prompt has a share of all their words that is `hh-short` (below
            0.4), `hh-middle` or `hh-long` (from 0.7 on); the prompt's words are counted once for each answer.
    """
    low, high = {"hh": (0.0, 1.0), "hh-short": (0.0, 0.4), "hh-middle": (0.4, 0.7), "hh-long": (0.7, 1.0)}[data]
    taken = []
    with (folder / "hh_rlhf_harmless.jsonl").open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            chosen, rejected = _turns(row["chosen"]), _turns(row["rejected"])
            if not (chosen[:-1] == rejected[:-1] and len(chosen) > 1 and chosen[-1] != rejected[-1]
                    and all(turn["content"] for turn in (*chosen, rejected[-1]))):
                continue
            pair = {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
            if low <= prompt_share(pair) < high:
                taken.append(pair)
            if len(taken) == count:
                return taken
    raise SystemExit(f"--data {data} has {len(taken)} pairs, and {count} are needed: take fewer steps")


def without_last_break(template: str) -> str:
    """A ChatML template that writes the line break behind a turn only where something follows it. Luthier trains an answer
    up to its end mark; so that the peers are given the same tokens, they are given this template."""
    behind = "'<|im_end|>' + '\n'}}"
    assert template.count(behind) == 1, template
    return template.replace(behind, "'<|im_end|>'}}{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}")


def prompt_share(pair: Mapping[str, list[dict[str, str]]]) -> float:
    """The prompt's share of a pair's words, counted once for each answer."""
    asked, chosen, rejected = (sum(len(turn["content"].split()) for turn in pair[part])
                               for part in ("prompt", "chosen", "rejected"))
    return 2 * asked / (2 * asked + chosen + rejected)


def _turns(transcript: str) -> list[dict[str, str]]:
    said = re.split(r"\n\n(Human|Assistant): ?", transcript)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": words.strip()} for who, words in zip(said[::2], said[1::2], strict=True)]


def _alpaca(folder: Path) -> Iterator[tuple[str, str]]:
    for row in json.loads((folder / "alpaca_en_demo.json").read_text(encoding="utf-8")):
        yield "\n".join(filter(None, (row["instruction"], row["input"]))), row["output"]


def _gsm8k(folder: Path) -> Iterator[tuple[str, str]]:
    with (folder / "gsm8k_train.jsonl").open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            yield row["question"], row["answer"]


def _conversation(question: str, answer: str) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}


# ---------------------------------------------------------------- arithmetic


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-like decoder that its arithmetic depends on."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Shape:
        """From the content of a model folder's `config.json`."""
        heads = config["num_attention_heads"]
        return cls(hidden=config["hidden_size"], layers=config["num_hidden_layers"], heads=heads,
                   kv_heads=config.get("num_key_value_heads") or heads,
                   head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                   inner=config["intermediate_size"], vocabulary=config["vocab_size"])

    @property
    def maps(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of each linear map of one layer: q, k, v, o, gate, up, down."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [(self.hidden, q), (self.hidden, kv), (self.hidden, kv), (q, self.hidden),
                (self.hidden, self.inner), (self.hidden, self.inner), (self.inner, self.hidden)]

    @property
    def weights(self) -> int:
        """Weights of all linear maps of all layers: the parameters without embedding and norms."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.maps)


def flops(shape: Shape, documents: Sequence[tuple[int, int]]) -> int:
    """Floating-point operations of a LoRA step that nobody can avoid, for documents of (tokens, trained positions).

        4 N               a token: forward and input gradient through N frozen weights (2 N each)
        4 D V             a trained position: the head and its input gradient
        12 H d n(n+1)/2   a document of n tokens and a layer: causal attention, two products forward and four backward

    Left out: padding, recomputation, positions that are not trained, and the adapters' own work (about 3 % at rank 8).
    """
    tokens, trained = sum(n for n, _ in documents), sum(n for _, n in documents)
    pairs = sum(n * (n + 1) // 2 for n, _ in documents)
    return (4 * shape.weights * tokens + 4 * shape.hidden * shape.vocabulary * trained
            + 12 * shape.layers * shape.heads * shape.head_dim * pairs)
