"""The vision family: Transformers' own model picture by picture, and methods as on any other. Read `lab.py` first."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import apart, attach, digest, judged, scored, stir
from peft import LoraConfig as PeftLora
from peft import get_peft_model, set_peft_model_state_dict
from transformers import AutoConfig, AutoModelForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from luthier.core.errors import BaseError
from luthier.core.examples import Origin
from luthier.core.protocols import SamplingParams
from luthier.core.types import TokenizedExample, TokenSpan
from luthier.data.packing import build_batch, pack_examples
from luthier.models import ModelConfig, Vision, load_tokenizer, open_family
from luthier.models.image_processor import ImageProcessor
from tiny import VISIONS, save_tiny, tiny

SAME, FAR = 1e-9, 1e-3
METHOD = pytest.mark.parametrize("method", ["full", "lora"])


def settings(path: Path, told: dict[str, Any] | None = None, **changes: Any) -> ImageProcessor:
    """What turns pixels into inputs, as a folder with these settings says."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"image_size": 8, "num_channels": 3, **changes}))
    if told is not None:
        (path / "preprocessor_config.json").write_text(json.dumps(told))
    return ImageProcessor.from_pretrained(path)


@pytest.fixture
def family(tmp_path: Path) -> Vision:
    return Vision(tiny("vit"), settings(tmp_path / "pictures"))


def photographs(family: Vision, count: int = 5) -> list[TokenizedExample]:
    """Random pictures of several sizes, each one placeholder token."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(count):
        pixels = torch.randint(256, (8 + i, 9, 3), generator=generator, dtype=torch.uint8)
        found.append(TokenizedExample((TokenSpan((0,), (0.0,)),), Origin("lab", i), images=(family.tokenizer(pixels),)))
    return judged(found)


def states(family: Vision) -> torch.Tensor:
    """[S, D] of some pictures."""
    with torch.no_grad():
        return family.states(build_batch(photographs(family)).inputs)


@pytest.mark.usefixtures("double")
@METHOD
def test_it_is_transformers_own_model_one_picture_at_a_time(method: str, family: Vision) -> None:
    """The loss and every gradient of the untouched model, eager attention, by its first state."""
    examples = photographs(family)
    found = scored(family, attach(family, method, stirred=False), [build_batch(examples)])
    plain, head = tiny("vit"), family.heads.modules["score"]
    plain.set_attn_implementation("eager")
    for token in (0, 1):  # 1: the control, another token's state
        plain.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for example in examples:
            state = plain(pixel_values=example.images[0][None].double()).last_hidden_state[0, token]
            label = torch.tensor(example.labeled_spans[0].label, dtype=torch.float32).double()
            loss = loss + (head(state) - label).square().sum() / len(examples)
        loss.backward()
        wanted = {"loss": loss.detach(), **({n: p.grad for n, p in plain.named_parameters()} if method == "full" else {})}
        mine = {name: tensor for name, tensor in found.items() if name in wanted}
        assert (apart(mine, wanted) < SAME) if token == 0 else (apart(mine, wanted) > FAR)


@METHOD
def test_how_a_batch_is_cut_changes_nothing(method: str, family: Vision) -> None:
    examples = photographs(family)
    attached = attach(family, method)
    whole = scored(family, attached, pack_examples(examples, None))
    for max_tokens in (1, 2):
        rows = pack_examples(examples, max_tokens)
        assert len(rows) > 1
        assert apart(scored(family, attached, rows), whole) < SAME
    assert apart(scored(family, attached, pack_examples(examples[1:], None)), whole) > FAR


@METHOD
def test_gradient_checkpointing_changes_nothing_but_the_work(method: str, tmp_path: Path) -> None:
    calls: list[int] = []

    def run(checkpointing: bool) -> dict[str, torch.Tensor]:
        family = Vision(tiny("vit"), settings(tmp_path))
        family.train(True)
        if checkpointing:
            family.enable_gradient_checkpointing()
        calls.append(0)

        def count(*_: object) -> None:
            calls[-1] += 1

        family.structure.layers[0].attention.register_forward_hook(count)
        return scored(family, attach(family, method), [build_batch(photographs(family))])

    without = run(False)
    assert apart(run(True), without) < SAME
    assert calls == [1, 2]


def test_the_parts_are_found(family: Vision) -> None:
    for number, block in enumerate(family.structure.layers):
        sites = {s.role: s.module for s in family.structure.linears if s.layer_index == number}
        assert list(sites) == ["q", "k", "v", "o", "up", "down"]
        assert (block.attention_out, block.mlp_out) == (sites["o"], sites["down"])
        assert block.mlp_in is block.mlp
        assert sites["q"] in list(block.attention.children())
        assert len(block.norms) == 2
    assert family.structure.task == "FEATURE_EXTRACTION"
    assert family.structure.embedding.weight.shape == (32, 3, 4, 4)
    assert {"unit": 5, "channels": 3, "height": 8, "width": 8}.items() <= family.structure.sizes.items()


@pytest.mark.parametrize(("name", "options"), [("full", {"keep_base": True}), ("lora", {}), ("lora", {"use_dora": True})])
def test_the_laws_of_a_method(name: str, options: dict[str, Any], family: Vision, tmp_path: Path) -> None:
    bare, weights = states(family), digest(family)
    attached = attach(family, name, stirred=False, **options)
    assert (states(family) - bare).abs().max() < 1e-12
    stir(attached)
    scored(family, attached, [build_batch(photographs(family))])
    assert all(float(p.grad.abs().sum()) > 0 for p in attached.parameters().values())
    tuned, state = states(family), {n: t.clone() for n, t in attached.state().items()}
    assert (tuned - bare).abs().max() > FAR
    with attached.disabled(), attached.disabled():
        assert torch.equal(states(family), bare)
        assert digest(family) == weights
    assert torch.equal(states(family), tuned)
    fresh = Vision(tiny("vit"), settings(tmp_path))
    other = attach(fresh, name, seed=9, stirred=False, **options)
    other.load(state)
    assert torch.equal(states(fresh), tuned)
    if name == "lora":
        attached.merge()
        assert (states(family) - tuned).abs().max() < 1e-10
        attached.unmerge()
        assert digest(family) == weights


def test_lora_is_pefts(family: Vision) -> None:
    attached = attach(family, "lora", rank=4, alpha=8)
    form = attached.get_peft_config()
    assert form is not None
    theirs = get_peft_model(tiny("vit"), PeftLora(r=4, lora_alpha=8, target_modules=form["target_modules"])).double().eval()
    pixels = build_batch(photographs(family)).inputs.images
    with torch.no_grad():
        bare = theirs(pixel_values=pixels).last_hidden_state[:, 0]
        loaded = set_peft_model_state_dict(theirs, attached.state())
        wanted = theirs(pixel_values=pixels).last_hidden_state[:, 0]
    assert not loaded.unexpected_keys
    assert (states(family) - wanted).abs().max() < SAME
    assert (bare - wanted).abs().max() > FAR


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("headed", [False, True])
def test_a_folder_opens_as_a_vision_base_and_is_written_as_one(headed: bool, tmp_path: Path,
                                                               capfd: pytest.CaptureFixture[str]) -> None:
    """A head of earlier training stays in the file."""
    base = tmp_path / "base"
    save_tiny(base, "vit")
    if headed:
        config = dict(VISIONS["vit"])
        AutoModelForImageClassification.from_config(AutoConfig.for_model(config.pop("model_type"), **config),
                                                    dtype=torch.float64).save_pretrained(base)
    (base / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 8, "width": 8}, "image_mean": [0.1] * 3}))
    capfd.readouterr()
    family = open_family(ModelConfig(name_or_path=str(base), dtype="auto", device="cpu"))
    assert capfd.readouterr() == ("", ""), "loading is silent"
    assert isinstance(family, Vision)
    assert family.tokenizer.mean == (0.1,) * 3
    assert load_tokenizer(ModelConfig(name_or_path=str(base))) == family.tokenizer
    (tmp_path / "again").mkdir()
    family.save(tmp_path / "again")
    again = open_family(ModelConfig(name_or_path=str(tmp_path / "again"), dtype="auto", device="cpu"))
    assert isinstance(again, Vision)
    assert again.tokenizer == family.tokenizer
    assert all(torch.equal(mine, other) for mine, other in
               zip(again.model.state_dict().values(), family.model.state_dict().values(), strict=True))
    # The last bits of a product depend, on some processors, on where in memory its numbers lie.
    torch.testing.assert_close(states(again), states(family), rtol=1e-12, atol=1e-12)


def test_it_refuses_what_it_cannot(family: Vision, tmp_path: Path) -> None:
    row = build_batch(photographs(family))
    with pytest.raises(BaseError, match="predicts no tokens"):
        family.forward(row.inputs, row.target, frozenset({"token_logps"}))
    with pytest.raises(BaseError, match="cannot generate"):
        family.generate([[1, 2]], SamplingParams())
    with pytest.raises(AssertionError, match="needs images"):
        family.states(replace(row.inputs, images=None))
    save_tiny(tmp_path / "base", "vit")
    with pytest.raises(BaseError, match=r"model\.pooling"):
        open_family(ModelConfig(name_or_path=str(tmp_path / "base"), pooling="mean", device="cpu"))


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize("shape", [(8, 8, 3), (28, 28, 3), (5, 11, 3), (28, 28)])
@pytest.mark.parametrize("told", [{}, {"resample": 3}, {"resample": 2, "do_normalize": False},
                                  {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}])
def test_pixels_are_prepared_as_transformers_does(told: dict[str, Any], shape: tuple[int, ...], tmp_path: Path) -> None:
    """To one step of a byte, where it resizes: Pillow's numbers are integers, ours are not."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    size = {"height": 8, "width": 8}
    found = settings(tmp_path, {"size": size, **told})(pixels.numpy())
    theirs = ViTImageProcessorPil(size=size, **told)
    colored = pixels if pixels.ndim == 3 else pixels[:, :, None].expand(-1, -1, 3)
    wanted = theirs(colored.numpy(), return_tensors="pt", input_data_format="channels_last").pixel_values[0]
    step = 1 / 255 / min(told.get("image_std", [0.5]) if told.get("do_normalize", True) else [1.0])
    assert found.shape == (3, 8, 8)
    assert found.dtype == torch.float32
    assert (found - wanted).abs().max() <= (1e-6 if shape[:2] == (8, 8) else 1.01 * step)
    assert (found - wanted.flip(-1)).abs().max() > 3 * step


def test_a_grey_model_takes_grey_pictures(tmp_path: Path) -> None:
    gray = torch.arange(64, dtype=torch.uint8).view(8, 8)
    prepare = settings(tmp_path, num_channels=1)
    assert torch.allclose(prepare(gray), (gray[None] / 255 - 0.5) / 0.5)
    assert torch.equal(prepare(gray[:, :, None].expand(-1, -1, 3)), prepare(gray))
    red = torch.zeros(8, 8, 3, dtype=torch.uint8)
    red[..., 0] = 200
    assert torch.allclose(prepare(red), torch.full((1, 8, 8), (60 / 255 - 0.5) / 0.5))


def test_the_middle_is_cut_out(tmp_path: Path) -> None:
    prepare = settings(tmp_path, {"size": {"shortest_edge": 10}, "do_center_crop": True, "crop_size": 8})
    pixels = torch.zeros(10, 20, 3, dtype=torch.uint8)
    pixels[1:9, 6:14] = 255
    assert bool((prepare(pixels) == 1).all())


@pytest.mark.parametrize(("told", "message"), [
    ({"size": {"height": 16, "width": 16}}, "the model takes"), ({"resample": 1}, "resample 1"),
    ({"do_resize": False}, "do_resize False"), ({"image_mean": [0.1, 0.2]}, "2 numbers for 3 channels"),
])
def test_settings_that_cannot_be_are_refused(told: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BaseError, match=message):
        settings(tmp_path, told)
