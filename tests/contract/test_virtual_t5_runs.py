"""Runs of virtual tokens on T5: ours open in PEFT, PEFT's open here. Read `test_virtual_t5.py` first."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from lab import SFT, attach, stir
from lab_t5 import FAR, SAME, base, padded, pairs, t5, tokenizer, widen
from test_virtual_t5 import CONFIGS, METHOD, ORACLE, SETTINGS, SUBMODULES, N
from transformers import T5ForConditionalGeneration

from luthier import assembly
from luthier.assembly.factory import attach_method, load_family
from luthier.assembly.run_io import open_run, save_tuned
from luthier.core.errors import RunError
from luthier.data.packing import build_batch
from luthier.methods.prompt import EMBEDDINGS
from luthier.models.families.seq2seq import Seq2Seq
from luthier.training.run_folder import Run


def written(tmp_path: Path, dtype: torch.dtype = torch.float64) -> Path:
    """A T5 as a folder of Transformers."""
    t5("relu", dtype).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@ORACLE
def test_our_folder_loads_in_peft(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widen(monkeypatch)
    family = base("relu")
    attached = attach(family, method, **SETTINGS[method])
    made = assembly.build_recipe({"model": str(written(tmp_path)), "data": "-", "method": {"name": method, **SETTINGS[method]}})
    (tmp_path / "run").mkdir()
    save_tuned(Run(tmp_path / "run"), made, family, attached)
    plain = T5ForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float64)
    other = peft.PeftModel.from_pretrained(plain, tmp_path / "run").double().eval()
    attached.load({EMBEDDINGS: attached.state()[EMBEDDINGS].float().double()})  # as PEFT holds them
    given = padded(pairs())
    with torch.no_grad():
        assert (other(**given).logits - family.model(**given).logits).abs().max() < SAME
        with attached.disabled():
            assert (other(**given).logits - family.model(**given).logits).abs().max() > FAR


@ORACLE
@SUBMODULES
def test_a_folder_of_pefts_opens_as_a_run(method: str, submodules: int, tmp_path: Path) -> None:
    origin = written(tmp_path, torch.float32)
    plain = T5ForConditionalGeneration.from_pretrained(origin)
    other = peft.get_peft_model(plain, CONFIGS[method](num_transformer_submodules=submodules)).eval()
    other.peft_config["default"].base_model_name_or_path = str(origin)
    with torch.no_grad():
        wanted = other(**padded(pairs())).logits
    other.save_pretrained(tmp_path / "run")
    made, family, attached = open_run(Run(tmp_path / "run"))
    assert made.method.num_virtual_tokens == N
    with torch.no_grad():
        assert (family.model(**padded(pairs())).logits - wanted).abs().max() < 1e-4
        with attached.disabled():
            assert (family.model(**padded(pairs())).logits - wanted).abs().max() > FAR


def test_a_prefix_of_pefts_is_another_method(tmp_path: Path) -> None:
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=N, num_layers=3)
    other = peft.get_peft_model(t5("relu"), config)
    other.peft_config["default"].base_model_name_or_path = str(written(tmp_path))
    other.save_pretrained(tmp_path / "run")
    with pytest.raises(RunError, match="only the decoder's self-attention"):
        open_run(Run(tmp_path / "run"))


@METHOD
def test_a_run_opens_again(method: str, tmp_path: Path) -> None:
    origin = written(tmp_path)
    made = assembly.build_recipe({"model": {"name_or_path": str(origin), "dtype": "float32"}, "data": "-", "output_dir": str(tmp_path / "run"),
                         "method": {"name": method, **SETTINGS[method]}})
    family = load_family(made.model)
    attached = attach_method(family, made.method, 0)
    stir(attached)
    run = Run(tmp_path / "run")
    run.create(assembly.dump_recipe(made), {})
    save_tuned(run, made, family, attached)
    kind = json.loads((run.path / "adapter_config.json").read_text())["peft_type"]
    assert kind == {"prompt": "PROMPT_TUNING", "ptuning": "P_TUNING"}.get(method, "LUTHIER")
    (run.path / "recipe.yaml").unlink()  # the adapter alone says what it is
    _, other, again = open_run(run)
    given = padded(pairs())
    with torch.no_grad():
        assert torch.equal(other.model(**given).logits, family.model(**given).logits)
        with again.disabled():
            assert (other.model(**given).logits - family.model(**given).logits).abs().max() > FAR


@METHOD
@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, False), (torch.float32, True)])
def test_sixteen_bits_give_about_the_same_loss(method: str, dtype: torch.dtype, autocast: bool) -> None:
    losses = []
    for kept, cast in ((torch.float32, False), (dtype, autocast)):
        family = Seq2Seq(t5("gated", kept), tokenizer())
        attached = attach(family, method, **SETTINGS[method])
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            row = build_batch(pairs())
            loss = SFT(family.forward(row.inputs, row.target, SFT.required_outputs), row.target).total / SFT.count(row.target)
        loss.backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in attached.parameters().values())
        losses.append(float(loss))
    assert 0 < abs(losses[0] - losses[1]) < 0.01 * losses[0]
