"""Wraps PEFT's own tuners that Luthier does not implement: LoHa, LoKr, VeRA, OFT, BOFT, HRA and others.

Read `full.py` first. PEFT builds the tuner from its own config; this file gives it the interface of a method:

    method: {name: peft, type: LOHA, config: {r: 8, alpha: 16}}

PEFT replaces each module that it changes. While the method is disabled or merged, the base's own modules are put back,
so the base is unchanged bit for bit and is saved under its own names. PEFT's modules cannot act on some tokens only or
with a weight, so `gates` is None.

Learning rate 5e-3: most tuners are products of several factors that start small (four in LoHa), so they change more
slowly than LoRA. On the demo's rows LoHa had a loss of 4.5 after 15 steps at 2e-4, and of 0.4 after 40 steps at 5e-3.
The best rate depends on the tuner.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from luthier.core.config import Config
from luthier.core.errors import MissingExtra, NotMergeable, RecipeError, RunError, suggest_nearest
from luthier.core.protocols import ModelStructure
from luthier.methods.hooks import check_state_shapes, refuse_quantized
from luthier.methods.ia3 import PEFT_FIELDS as IA3_FIELDS
from luthier.methods.lora import PEFT_FIELDS as LORA_FIELDS
from luthier.methods.lora import refuse_moved_base
from luthier.methods.peft_settings import MERGE, ORIGIN, refuse_unread

# Tuners that need calls from the training loop or extra arguments of the model, which Luthier does not provide.
UNSUPPORTED_TUNERS = {
    "ADALORA": "it needs a call in every step, to allocate ranks; use the method adalora",
    "POLY": "it needs the task of every row",
    "XLORA": "it is a mixture of previously trained adapters",
}
# Settings with which an adapter type that Luthier implements is loaded by PEFT's own tuner instead.
PEFT_ONLY_FIELDS = {
    "LORA": ("modules_to_save", "trainable_token_indices", "bias", "lora_bias", "ensure_weight_tying"),
    "IA3": ("modules_to_save",),
}
# Fields on LoRA's initialization, which a trained adapter does not need.
INIT_FIELDS = ("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core",
          "qalora_group_size")


class PeftConfig(Config):
    """A PEFT tuner and its settings."""

    default_learning_rate: ClassVar[float] = 5e-3

    name: Literal["peft"] = "peft"
    type: str = Field("LOHA", description="PEFT's peft_type of the tuner, such as LOHA, LOKR, VERA, OFT")
    config: dict[str, Any] = Field({}, description="fields of PEFT's config for the tuner; target_modules "
                                                   "defaults to all-linear")

    @field_validator("type")
    @classmethod
    def _check_installed(cls, given: str) -> str:
        if find_spec("peft") is None:
            raise MissingExtra("peft", "peft", f"the tuner {given}")
        return given.upper()

    @classmethod
    def from_peft(cls, adapter: Mapping[str, Any]) -> PeftConfig:
        """Settings from PEFT's adapter_config.json. Raises `RunError` if it has no peft_type."""
        if "peft_type" not in adapter:
            raise RunError("adapter_config.json has no peft_type, so the method is unknown",
                           "use a run of Luthier or a PEFT adapter")
        kind = str(adapter["peft_type"])
        config = cls.parse({"type": kind})
        fields = config.get_config_fields()
        if kind in PEFT_ONLY_FIELDS:
            refuse_unread(adapter, {"LORA": LORA_FIELDS, "IA3": IA3_FIELDS}[kind] | set(PEFT_ONLY_FIELDS[kind]))
            refuse_moved_base(adapter)
        refuse_unread(adapter, fields | ORIGIN)
        dropped = ORIGIN | set(INIT_FIELDS if kind in PEFT_ONLY_FIELDS else ())
        return config.model_copy(update={"config": {key: value for key, value in adapter.items() if key in fields
                                                  and key not in dropped and value is not None}})

    @staticmethod
    def _get_config_classes() -> dict[str, Any]:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as KNOWN
        return {kind.value: config_class for kind, config_class in KNOWN.items()}

    def get_config_fields(self) -> frozenset[str]:
        """The fields of PEFT's config for the tuner. Raises `RecipeError` for an unknown tuner."""
        names = self._get_config_classes()
        if self.type not in names:
            raise RecipeError(f"method.type: PEFT has no tuner {self.type!r}", suggest_nearest(self.type, names))
        return frozenset(names[self.type].__dataclass_fields__)

    def attach(self, structure: ModelStructure, *, seed: int) -> Peft:
        return Peft(self.build_tuner_config(structure.task), structure, seed)

    def build_tuner_config(self, task: str) -> Any:
        """PEFT's config. Raises `RecipeError` for an unknown or unsupported tuner or field."""
        fields, config_class = self.get_config_fields(), self._get_config_classes()[self.type]
        if self.type in UNSUPPORTED_TUNERS:
            raise RecipeError(f"method.type: {self.type} cannot be trained: {UNSUPPORTED_TUNERS[self.type]}",
                              "use another tuner")
        given = dict(self.config)
        if "target_modules" in fields:
            given.setdefault("target_modules", "all-linear")
        if unknown := sorted(given.keys() - fields):
            raise RecipeError(f"method.config: {self.type} has no field {unknown[0]!r}",
                              suggest_nearest(unknown[0], fields))
        tuner_config = config_class(task_type=task, **given)
        if tuner_config.is_prompt_learning:
            raise RecipeError(f"method.type: {self.type} replaces the model's forward, which is not supported",
                              "use the methods prompt, prefix or ptuning")
        return tuner_config


class Peft:
    """A PEFT tuner on a model."""

    gates = None
    optimizer_hooks = ()

    def __init__(self, config: Any, structure: ModelStructure, seed: int) -> None:
        from peft import get_peft_model
        self.config, self.base, self._tied = config, structure.model, structure.tied
        self._embedding, self._head = structure.embedding, structure.head
        before, own = dict(self.base.named_modules()), {id(parameter) for parameter in self.base.parameters()}
        _check_saved_modules(config, before)
        with torch.random.fork_rng(devices=[]):  # PEFT uses the global random generator
            torch.manual_seed(seed)
            try:
                self.model: Any = get_peft_model(self.base, config)
            except (ValueError, TypeError, NotImplementedError) as error:
                raise RecipeError(f"PEFT cannot apply {config.peft_type.value} to this model: {error}",
                                  "use other target_modules, or another tuner") from error
        now = dict(self.base.named_modules())
        # Path -> the base's module, and path -> PEFT's replacement.
        self._base_modules = {name: module for name, module in before.items()
                              if name and now.get(name, module) is not module}
        self._peft_modules = {name: now[name] for name in self._base_modules}
        self._parameters = {name.replace(".default", ""): parameter
                            for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        # Parameters of the base that are trained in place (`bias`), each with its value in the other state.
        self._swapped_parameters = [(p, p.detach().clone()) for p in self._parameters.values() if id(p) in own]
        self._is_active = True
        self._disabled_depth = 0
        self._originals: dict[str, Tensor] = {}
        self._quantized = [site for site in structure.linears
                           if site.dequantize is not None and site.name in self._base_modules]
        self._probe()

    @torch.no_grad()
    def _probe(self) -> None:
        """Raises `RecipeError` for a tuner that reads the shape of a weight that is quantized."""
        for site in self._quantized[:1]:
            module = self._peft_modules[site.name]
            try:
                module(torch.zeros(1, 1, site.in_features, device=next(module.parameters()).device))
            except RuntimeError as error:
                self._install(self._base_modules)
                raise RecipeError(f"PEFT's {self.config.peft_type.value} does not support this quantization: "
                                  f"{error}", "set model.quantize: int8 or none, or use a method of Luthier "
                                  "(lora, adapter)") from error

    def parameters(self) -> dict[str, nn.Parameter]:
        return self._parameters

    def lr_multiplier(self, name: str) -> float:
        return 1.0

    def _install(self, modules: Mapping[str, nn.Module]) -> None:
        acting = modules is not self._base_modules
        if acting is not self._is_active:
            for parameter, other in self._swapped_parameters:
                parameter.data, other.data = other.data, parameter.data
        self._is_active = acting
        for path, module in modules.items():
            parent, _, name = path.rpartition(".")
            setattr(self.base.get_submodule(parent), name, module)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        if self._originals:
            self.unmerge()
            try:
                with self.disabled():
                    yield
            finally:
                self.merge()
            return
        self._disabled_depth += 1
        self._install(self._base_modules)
        try:
            yield
        finally:
            self._disabled_depth -= 1
            if not self._disabled_depth:
                self._install(self._peft_modules)

    @torch.no_grad()
    def merge(self) -> None:
        from peft.utils.other import AuxiliaryTrainingWrapper
        assert not self._originals, "merged already"
        refuse_quantized(self._quantized)
        self._untie()
        originals = {f"{path}.{name}": parameter.detach().clone() for path, module in self._base_modules.items()
                     for name, parameter in module.named_parameters() if not name.startswith("base_layer")}
        try:
            self.model.base_model.merge_adapter()
        except (ValueError, NotImplementedError, AttributeError, RuntimeError) as error:
            self._originals = originals  # some modules may have been merged
            self.unmerge()
            raise NotMergeable(f"PEFT cannot merge {self.config.peft_type.value}: {error}",
                               "use the adapter as it is") from error
        self._originals = originals
        for path, copy in self._get_saved_copies().items():  # PEFT does not merge `modules_to_save`
            for name, parameter in self._base_modules[path].named_parameters():
                parameter.data.copy_(copy.get_parameter(name))
        # PEFT's LN tuning replaces the layer itself.
        self._install({path: self._base_modules[path] if isinstance(module, AuxiliaryTrainingWrapper)
                       else module.get_base_layer() for path, module in self._peft_modules.items()})

    def _get_saved_copies(self) -> dict[str, nn.Module]:
        """The trained copies of `modules_to_save`, by the path of the module that each replaces."""
        from peft.utils.other import ModulesToSaveWrapper
        return {path: module.modules_to_save["default"] for path, module in self._peft_modules.items()
                if isinstance(module, ModulesToSaveWrapper)}

    def _untie(self) -> None:
        """Give a tied head its own weight if PEFT changes the head or the embedding, and update the model's config."""
        replaced = {id(module) for module in self._base_modules.values()}
        if not self._tied or not {id(self._embedding), id(self._head)} & replaced:
            return
        assert self._head is not None
        self._head.weight = nn.Parameter(self._head.weight.detach().clone(), requires_grad=False)  # type: ignore[operator]
        self._tie(False)

    def _tie(self, tied: bool) -> None:
        whole: Any = self.base.config
        for config in {id(c): c for c in (whole, whole.get_text_config())}.values():
            config.tie_word_embeddings = tied

    @torch.no_grad()
    def unmerge(self) -> None:
        assert self._originals, "not merged"
        self._install(self._peft_modules)
        self.model.base_model.unmerge_adapter()
        for path, module in self._base_modules.items():  # PEFT subtracts the update, which is not exact
            for name, parameter in module.named_parameters():
                parameter.data = self._originals[f"{path}.{name}"]  # PEFT may have left it transposed
        if self._tied and self._head is not None and self._head.weight is not self._embedding.weight:
            self._head.weight = self._embedding.weight
            self._tie(True)
        self._originals = {}

    def state(self) -> dict[str, Tensor]:
        from peft import get_peft_model_state_dict
        with self._with_peft_modules():
            return dict(get_peft_model_state_dict(self.model, save_embedding_layers=False))

    def load(self, state: Mapping[str, Tensor]) -> None:
        from peft import set_peft_model_state_dict
        check_state_shapes(self.state(), state)
        with self._with_peft_modules():
            set_peft_model_state_dict(self.model, dict(state))

    @contextmanager
    def _with_peft_modules(self) -> Iterator[None]:
        """Install PEFT's modules: PEFT finds its weights only there."""
        assert not self._originals, "merged"
        self._install(self._peft_modules)
        try:
            yield
        finally:
            if self._disabled_depth:
                self._install(self._base_modules)

    def get_peft_config(self) -> dict[str, Any] | None:
        return {**_to_json(self.config.to_dict()), "inference_mode": True}


def _check_saved_modules(config: Any, modules: Mapping[str, nn.Module]) -> None:
    """Raises `RecipeError` for `modules_to_save` that the base lacks, or that contain other modules."""
    for name in vars(config).get("modules_to_save") or ():
        found = [module for path, module in modules.items() if path.endswith(name)]
        if not found:
            raise RecipeError(f"method.config.modules_to_save: this base has no module {name!r}",
                              "name a module of the base; the objective adds the task's head")
        if any(True for module in found for _ in module.children()):
            raise RecipeError(f"method.config.modules_to_save: {name!r} contains other modules, which is not "
                              "supported", "name single modules, such as lm_head; for a saved PEFT adapter: "
                              + MERGE)


def _to_json(value: Any) -> Any:
    """Convert enums, sets and tuples to values that JSON can hold."""
    if isinstance(value, dict):
        return {key: _to_json(inner) for key, inner in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_to_json(inner) for inner in value)
    if isinstance(value, (list, tuple)):
        return [_to_json(inner) for inner in value]
    return value.value if isinstance(value, Enum) else value
