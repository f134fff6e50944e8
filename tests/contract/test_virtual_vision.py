"""Virtual tokens on ViT: against Transformers' own layers with them put in by hand. Read `test_vision.py` and
`test_virtual.py` first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import apart, attach, judged, scored, stir
from test_vision import FAR, SAME, photographs, settings, states
from torch import Tensor
from transformers import AutoConfig, AutoModel

from luthier import assembly
from luthier.api.inspect_run import inspect_run
from luthier.assembly.factory import attach_method, load_family
from luthier.assembly.run_io import open_run, save_tuned
from luthier.core.errors import BaseError, RecipeError
from luthier.data.packing import build_batch, pack_examples
from luthier.methods.multi_adapter import AdapterManager
from luthier.models import Vision
from luthier.training.run_folder import Run
from tiny import VISIONS, save_tiny, tiny

N = 5
SETTINGS: dict[str, dict[str, Any]] = {"prompt": {"num_virtual_tokens": N}, "ptuning": {"num_virtual_tokens": N, "encoder_hidden_size": 7},
                                       "prefix": {"num_virtual_tokens": N}, "ptuning_v2": {"num_virtual_tokens": N}}
METHOD = pytest.mark.parametrize("method", SETTINGS)
DEEP = {"prefix", "ptuning_v2"}


@pytest.fixture
def family(tmp_path: Path) -> Vision:
    return Vision(tiny("vit"), settings(tmp_path / "pictures"))


def by_hand(plain: Any, pixels: Tensor, virtual: Tensor, deep: bool) -> Tensor:
    """[1 + P, D] states of one picture, layer by layer. A prompt [N, D] stands among the patches; of a prefix
    [layers, 2, G, N, d] N tokens do, whose keys and values are exchanged for it: what else becomes of them, nobody sees."""
    seen = plain.embeddings(pixels[None].double())
    row = torch.cat([seen[:, :1], (torch.zeros_like(seen[:, :1]).expand(-1, N, -1) if deep else virtual[None]),
                     seen[:, 1:]], 1)
    for layer, pair in zip(plain.layers, virtual if deep else [None] * len(plain.layers), strict=True):
        handles = []
        for site, rows in zip((layer.attention.k_proj, layer.attention.v_proj), pair if deep else (), strict=False):
            flat = rows.transpose(0, 1).flatten(1)[None]
            handles.append(site.register_forward_hook(
                lambda _m, _a, out, flat=flat: torch.cat([out[:, :1], flat, out[:, 1 + N:]], 1)))
        row = layer(row)
        for handle in handles:
            handle.remove()
    found = plain.layernorm(row)[0]
    return torch.cat([found[:1], found[1 + N:]])


@pytest.mark.usefixtures("double")
@METHOD
def test_it_stands_among_the_patches_in_loss_and_every_gradient(method: str, family: Vision) -> None:
    examples = photographs(family)
    attached = attach(family, method, **SETTINGS[method])
    found = scored(family, attached, [build_batch(examples)])
    head = family.heads.modules["score"]
    plain = tiny("vit")
    plain.set_attn_implementation("eager")
    for token in (0, 1):  # 1: the control, another token's state
        loss = torch.zeros((), dtype=torch.float64)
        for example in examples:
            state = by_hand(plain, example.images[0], attached.compute_virtual_tokens(), method in DEEP)[token]
            label = torch.tensor(example.labeled_spans[0].label, dtype=torch.float32).double()
            loss = loss + (head(state) - label).square().sum() / len(examples)
        named = attached.parameters()
        wanted = {"loss": loss.detach(), **dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))}
        mine = {name: found[name] for name in wanted}
        assert (apart(mine, wanted) < SAME) if token == 0 else (apart(mine, wanted) > FAR)


@pytest.mark.usefixtures("double")
@METHOD
def test_whoever_calls_the_model_gets_its_own_tokens_and_no_others(method: str, family: Vision) -> None:
    attached = attach(family, method, **SETTINGS[method])
    (example, *_) = photographs(family)
    pixels = example.images[0][None].double()
    with torch.no_grad():
        wanted = by_hand(tiny("vit"), pixels[0], attached.compute_virtual_tokens(), method in DEEP)
        found = family.model(pixel_values=pixels, output_hidden_states=True)
        assert (found.last_hidden_state[0] - wanted).abs().max() < SAME
        assert {states.shape[1] for states in found.hidden_states} == {family.structure.sizes["unit"]}
        assert torch.equal(family.model(pixels, return_dict=False)[0], found.last_hidden_state)


@METHOD
def test_the_laws_of_a_method(method: str, family: Vision, tmp_path: Path) -> None:
    bare = states(family)
    attached = attach(family, method, **SETTINGS[method])
    found = scored(family, attached, [build_batch(photographs(family))])
    assert all(float(t.abs().sum()) > 0 for t in found.values())
    assert all(p.grad is None for p in family.model.parameters())
    tuned, state = states(family), {n: t.clone() for n, t in attached.state().items()}
    assert (tuned - bare).abs().max() > FAR
    with attached.disabled(), attached.disabled():
        assert torch.equal(states(family), bare)
    assert torch.equal(states(family), tuned)
    fresh = Vision(tiny("vit"), settings(tmp_path))
    attach(fresh, method, seed=9, stirred=False, **SETTINGS[method]).load(state)
    assert torch.equal(states(fresh), tuned)


@METHOD
def test_how_a_batch_is_cut_and_recomputed_changes_nothing(method: str, family: Vision) -> None:
    examples = photographs(family)
    attached = attach(family, method, **SETTINGS[method])
    whole = scored(family, attached, pack_examples(examples, None))
    assert apart(scored(family, attached, pack_examples(examples, 2)), whole) < SAME
    family.enable_gradient_checkpointing()
    family.train(True)
    assert apart(scored(family, attached, pack_examples(examples, None)), whole) < SAME
    assert apart(scored(family, attached, pack_examples(judged(examples[1:]), None)), whole) > FAR


def test_a_prompt_and_a_prefix_stand_beside_one_another(family: Vision) -> None:
    prompt, prefix = attach(family, "prompt", num_virtual_tokens=3), attach(family, "prefix", num_virtual_tokens=4)
    both = states(family)
    for part in (prompt, prefix):
        with part.disabled():
            assert (states(family) - both).abs().max() > FAR
    other = Vision(tiny("vit"), family.tokenizer)
    longer = prompt.compute_virtual_tokens().detach()
    again = attach(other, "prefix", num_virtual_tokens=4, stirred=False)
    again.load(prefix.state())
    handle = other.model.embeddings.register_forward_hook(
        lambda _m, _a, seen: torch.cat([seen[:, :1], longer.expand(len(seen), -1, -1), seen[:, 1:]], 1))
    assert torch.equal(states(other), both)
    handle.remove()


def test_pictures_go_through_adapters_of_their_own(family: Vision) -> None:
    manager = AdapterManager(family.structure)
    for name, method in (("a", "prompt"), ("b", "prefix")):
        manager.add(name, attach(family, method, **SETTINGS[method]))
    found = {}
    for who in ("a", "b", None):
        with manager.use_adapter(who):
            found[who] = states(family)
    assert all((found[x] - found[y]).abs().max() > FAR for x, y in (("a", "b"), ("a", None), ("b", None)))
    family.router = manager
    names = ["b", "a", None, "b", "a"]
    row = build_batch(photographs(family))
    with torch.no_grad():
        mixed = family.states(manager.with_adapters(row.inputs, names))
    for i, who in enumerate(names):
        assert (mixed[i] - found[who][i]).abs().max() < 1e-12


# ---------------------------------------------------------------- where they start

def test_they_start_as_plain_patches(family: Vision) -> None:
    """Each is what the first layer gets of a picture of one color, at one of its places."""
    attached = attach(family, "prompt", stirred=False, num_virtual_tokens=40)
    other = attach(Vision(tiny("vit"), family.tokenizer), "prompt", stirred=False, seed=4, num_virtual_tokens=40)
    assert not torch.equal(attached.compute_virtual_tokens(), other.compute_virtual_tokens())
    embeddings = tiny("vit").embeddings
    weight = embeddings.patch_embeddings.projection.weight.sum((2, 3))  # [D, channels]
    places = embeddings.position_embeddings[0, 1:] + embeddings.patch_embeddings.projection.bias
    with torch.no_grad():
        colors, used = [], set()
        for token in attached.compute_virtual_tokens():
            left = token - places  # [P, D], of which one is a color
            color = torch.linalg.lstsq(weight.expand(len(places), -1, -1), left[..., None]).solution[..., 0]
            errors = (left - color @ weight.T).norm(dim=1)
            used.add(int(errors.argmin()))
            assert errors.min() < SAME < FAR < errors.sort().values[1]
            colors.append(color[errors.argmin()])
    assert used == set(range(len(places)))
    assert float(torch.stack(colors).std()) == pytest.approx(1, abs=0.25)
    assert float(torch.stack(colors).mean()) == pytest.approx(0, abs=0.25)


@METHOD
def test_a_text_to_start_from_is_refused(method: str, family: Vision) -> None:
    settings_ = {**SETTINGS[method], "prompt_tuning_init": "text", "prompt_tuning_init_text": "a picture"}
    with pytest.raises(RecipeError, match="this base has no vocabulary"):
        attach(family, method, **settings_)
    attach(family, method, **{**SETTINGS[method], "prompt_tuning_init": "random"})


def test_a_model_whose_layers_know_places_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("data2vec-vision", **{k: v for k, v in VISIONS["vit"].items() if k != "model_type"})
    other = Vision(AutoModel.from_config(config, dtype=torch.float64).eval(), settings(tmp_path))
    for method in ("prompt", "prefix"):
        with pytest.raises(BaseError, match="positions in its layers"):
            attach(other, method, num_virtual_tokens=N)


# ---------------------------------------------------------------- runs


@METHOD
def test_a_run_opens_again_and_is_inspected(method: str, tmp_path: Path) -> None:
    origin = save_tiny(tmp_path / "base", "vit", dtype=torch.float32)
    made = assembly.build_recipe({"model": str(origin), "data": "-", "output_dir": str(tmp_path / "run"),
                         "method": {"name": method, **SETTINGS[method]}})
    family = load_family(made.model)
    attached = attach_method(family, made.method, made.seed)
    stir(attached, size=1.0)
    run = Run(tmp_path / "run")
    run.create(assembly.dump_recipe(made), {})
    save_tuned(run, made, family, attached)
    assert json.loads((run.path / "adapter_config.json").read_text())["peft_type"] == "LUTHIER"
    (reading,) = inspect_run(run, quiet=True)["readings"]
    assert "this base has no vocabulary" in reading["about"]
    assert len(reading["rows"]) == N
    for row in reading["rows"]:
        assert row["start"]["nearest"] == row["end"]["nearest"] == []
        assert 0.2 < row["start"]["size"] < 5
        assert row["start"]["size"] != row["end"]["size"]
    (run.path / "recipe.yaml").unlink()  # the adapter alone says what it is
    _, other, _ = open_run(run)
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(other.model(pixel_values=pixels).last_hidden_state,
                           family.model(pixel_values=pixels).last_hidden_state)
