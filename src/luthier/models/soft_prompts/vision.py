"""Virtual tokens of a vision transformer. Read `soft_prompts/causal.py` first.

    layers see  [CLS, p_1, ..., p_N, patch_1, ..., patch_P]          p: a prompt, no position added

Visual prompt tuning, shallow (Jia et al. 2022, arXiv:2203.12119, section 3.2, equations 4-6): the tokens are inserted
after the embeddings, and their states are removed from the result. A prefix adds keys and values to every layer, as in
other families. Position embeddings are added to patches before the first layer, so no positions are shifted.

There is no vocabulary to initialize from. Instead, patches of one uniform color each are used: the color is random,
with mean 0 and standard deviation 1 like normalized images, and the position in the image is random as well. Such
vectors have the magnitude and the directions of the first layer's usual inputs.

Shape letters: S images, P patches, D hidden size, N virtual tokens, G heads of width d.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from luthier.core.adapter_gate import AdapterGate
from luthier.core.errors import BaseError
from luthier.core.protocols import ModelStructure
from luthier.core.soft_prompts import SoftPromptKind
from luthier.models.attention.packed import KeyValue
from luthier.models.hf_attributes import get_optional
from luthier.models.soft_prompts.causal import InjectedKeyValues, KeyValueRecorder
from luthier.models.soft_prompts.injection import Injection, is_active


class VisionInjector:
    """See `core.soft_prompts.SoftPromptInjector`.

    Args:
        structure: of the whole model; its sizes have `channels`, `height` and `width`.
        embeddings: the module that computes [CLS] and patch embeddings from pixels.
    """

    peft_kinds: frozenset[SoftPromptKind] = frozenset()  # PEFT inserts nothing into a model without a vocabulary

    def __init__(self, structure: ModelStructure, embeddings: nn.Module) -> None:
        self._backbone, self._embeddings = structure.backbone, embeddings
        self._layers = len(structure.layers)
        self._shape = tuple(structure.sizes[name] for name in ("channels", "height", "width"))
        arguments = inspect.signature(type(structure.backbone).forward).parameters
        self._names = list(arguments)[1:]
        self._accepts_kwargs = any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values())
        self._modules: list[nn.Module] = []
        self.injections: list[Injection] = []

    # ------------------------------------------------------------ called by methods

    @torch.no_grad()
    def typical_embeddings(self, n: int, seed: int) -> Tensor:
        """[n, D] The embeddings of uniform patches; see the module docstring."""
        generator = torch.Generator().manual_seed(seed)
        colors = torch.randn(n, self._shape[0], generator=generator)  # [n, channels]
        # [n, channels, height, width]
        pixels = self._zero_pixels(n) + colors.to(self._zero_pixels(1))[:, :, None, None]
        with self._base_only():
            seen = self._embed(pixels)  # [n, 1 + P, D]
        # [n] From 1 on: 0 is [CLS].
        places = torch.randint(1, seen.shape[1], (n,), generator=generator).to(seen.device)
        found: Tensor = seen[torch.arange(n, device=seen.device), places]  # [n, D]
        return found

    def add_prompt(self, make: Callable[[], Tensor], gate: AdapterGate) -> None:
        n = make().shape[0]
        with torch.no_grad(), self._base_only():
            seen = self._embed(self._zero_pixels(1))[0]  # [1 + P, D]
            self._record_row(torch.cat([seen, seen[:1].expand(n, -1)]))  # a probe: do the layers take 1 + P + n tokens?
        self._add_injection(Injection("prompt", make, gate, n))

    def add_prefix(self, make: Callable[[], Sequence[KeyValue]], gate: AdapterGate) -> None:
        if not self._modules:
            self.compute_keys_values(self.typical_embeddings(1, 0))
        self._add_injection(Injection("prefix", make, gate, make()[0][0].shape[1]))

    def _add_injection(self, injection: Injection) -> None:
        if not self._accepts_kwargs:
            raise BaseError(f"{type(self._backbone).__name__} accepts no keyword arguments for its attention, so a "
                            f"prefix is not supported",
                            "use a method that changes its layers, such as lora, or another base")
        if not self.injections:
            self._backbone.register_forward_pre_hook(self._before_forward, with_kwargs=True)
            self._backbone.register_forward_hook(self._after_forward, with_kwargs=True)
            self._embeddings.register_forward_hook(self._insert_prompts)
        self.injections.append(injection)

    @torch.no_grad()
    def compute_keys_values(self, start: Sequence[int] | Tensor) -> list[KeyValue]:
        assert isinstance(start, Tensor), "there is no vocabulary"
        with self._base_only():
            recorder = self._record_row(start)
        if len(recorder.recorded) != self._layers:
            raise BaseError(f"{type(self._backbone).__name__} does not expose the keys and values of its layers, so a "
                            "prefix is not supported", "use the method prompt, or another base")
        self._modules = list(recorder.recorded)
        return [(key[0], value[0]) for key, value in recorder.recorded.values()]  # [G, N, d] each

    def compute_first_layer_keys(self, ids: Sequence[int], place: int) -> Tensor:
        raise AssertionError("there is no vocabulary")

    def _zero_pixels(self, n: int) -> Tensor:
        return next(self._embeddings.parameters()).new_zeros(n, *self._shape)

    def _embed(self, pixels: Tensor) -> Tensor:
        """[S, 1 + P, D] The input of the layers. Raises `BaseError` if they have further inputs."""
        seen = self._embeddings(pixels)
        if not isinstance(seen, Tensor):
            raise self._unsupported_error()
        return seen

    def _record_row(self, row: Tensor) -> KeyValueRecorder:
        """The keys and values if the layers get `row` [L, D] as input. Raises `BaseError` if the layers do not
        support rows of another length than an image's."""
        recorder = KeyValueRecorder()
        handle = self._embeddings.register_forward_hook(lambda _module, _args, seen: row[None].to(seen))
        try:
            self._backbone(pixel_values=self._zero_pixels(1), virtual=recorder)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise self._unsupported_error() from error
        finally:
            handle.remove()
        return recorder

    def _unsupported_error(self) -> BaseError:
        return BaseError(f"{type(self._backbone).__name__} computes positions in its layers, so virtual tokens are "
                         "not supported", "use lora or another method that changes its layers, or a ViT")

    @contextmanager
    def _base_only(self) -> Iterator[None]:
        """A context with the base in evaluation mode, without injections."""
        was_training, before = self._backbone.training, self.injections
        self._backbone.eval()
        self.injections = []
        try:
            yield
        finally:
            self._backbone.train(was_training)
            self.injections = before

    # ------------------------------------------------------------ the hooks

    def _list_active(self, kind: SoftPromptKind) -> list[Injection]:
        return [injection for injection in self.injections if injection.kind == kind and is_active(injection.gate)]

    def _before_forward(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        computed = [injection.compute() for injection in self._list_active("prefix")]
        if not computed:
            return None
        # [G, sum of all N, d] each
        joined = [tuple(torch.cat(parts, 1) for parts in zip(*layer, strict=True)) for layer in zip(*computed,
                                                                                                    strict=True)]
        pairs = {module: [(key, value)] for module, (key, value) in zip(self._modules, joined, strict=True)}
        return (), {**dict(zip(self._names, args, strict=False)), **kwargs, "virtual": InjectedKeyValues(pairs)}

    def _insert_prompts(self, _module: nn.Module, _args: tuple[Any, ...], seen: Tensor) -> Tensor:
        """[S, 1 + P, D] -> [S, 1 + N + P, D]."""
        virtual = [injection.compute().to(seen).expand(len(seen), -1, -1) for injection in self._list_active("prompt")]
        return torch.cat([seen[:, :1], *virtual, seen[:, 1:]], 1) if virtual else seen  # [S, 1 + N + P, D]

    def _after_forward(self, _module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], result: Any) -> Any:
        n = sum(injection.num_tokens for injection in self._list_active("prompt"))
        if not n:
            return None
        if isinstance(result, tuple):
            return _remove_prompt(result[0], n), *result[1:]
        result.last_hidden_state = _remove_prompt(result.last_hidden_state, n)
        if get_optional(result, "hidden_states") is not None:
            result.hidden_states = tuple(_remove_prompt(states, n) for states in result.hidden_states)
        return result


def _remove_prompt(states: Tensor, n: int) -> Tensor:
    """[S, 1 + n + P, D] -> [S, 1 + P, D]: without the n virtual tokens after [CLS]."""
    return torch.cat([states[:, :1], states[:, 1 + n:]], 1)
