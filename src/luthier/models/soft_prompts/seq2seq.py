"""Virtual tokens of encoder-decoder models such as T5. Read `soft_prompts/causal.py` and `attention/biased.py` first.

A prompt precedes every source, in the encoder only. The decoder attends to its states (Lester et al. 2021,
arXiv:2104.08691; PEFT does the same), so the encoder returns them before those of the source. A caller's mask covers
the source only, so the decoder's hook extends a mask that is too short.

A prefix has keys and values for each of the three attentions: the encoder's, the decoder's self-attention and its
cross-attention (Li and Liang 2021, arXiv:2101.00190, section 4). In the first two it has the N positions before the
first token, and T5's bias is that of those distances; cross-attention has no positions in T5 and no bias. Learned
positions (BART) are added to embeddings, which a prefix does not have: the text keeps its positions there.

A prefix's pairs are in the order in which the attentions run: the encoder's layers, then self-attention and
cross-attention of each decoder layer.

Shape letters: B rows, L tokens of a source, N virtual tokens, H heads of width d, D hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from luthier.core.adapter_gate import AdapterGate
from luthier.core.errors import BaseError
from luthier.core.protocols import ModelStructure
from luthier.core.soft_prompts import SoftPromptKind
from luthier.models.attention import biased
from luthier.models.attention.biased import BiasedVirtualKeyValues
from luthier.models.attention.packed import KeyValue
from luthier.models.hf_attributes import get_optional
from luthier.models.hf_logging import silence_transformers
from luthier.models.soft_prompts.causal import KeyValueRecorder, RecordingComplete
from luthier.models.soft_prompts.injection import Injection, is_active


class InjectedKeyValues:
    """The virtual keys and values of one call, passed to the stack's attention functions."""

    def __init__(self, before: dict[nn.Module, BiasedVirtualKeyValues]) -> None:
        self.before = before

    def __call__(self, module: nn.Module, key: Tensor, value: Tensor) -> BiasedVirtualKeyValues | None:
        return self.before.get(module)


class Seq2SeqInjector:
    """See `core.soft_prompts.SoftPromptInjector`.

    Args:
        structure: of the whole model.
        encoder, decoder: its two stacks.
    """

    typical_embeddings: Callable[[int, int], Tensor] | None = None
    # its prefix affects the decoder's self-attention only
    peft_kinds: frozenset[SoftPromptKind] = frozenset({"prompt"})

    def __init__(self, structure: ModelStructure, encoder: nn.Module, decoder: nn.Module) -> None:
        model: Any = structure.model
        self._model, self._context = model, structure.sizes["context"]
        self._encoder, self._decoder = encoder, decoder
        self._names = {stack: list(inspect.signature(type(stack).forward).parameters)[1:]
                       for stack in (encoder, decoder)}
        self._modules: dict[nn.Module, list[nn.Module]] = {}  # the attentions of each stack, in their order
        self._suspended = False
        self.injections: list[Injection] = []

    # ------------------------------------------------------------ called by methods

    def add_prompt(self, make: Callable[[], Tensor], gate: AdapterGate) -> None:
        self._add_injection(Injection("prompt", make, gate, make().shape[0]))

    def add_prefix(self, make: Callable[[], Sequence[KeyValue]], gate: AdapterGate) -> None:
        if not self._modules:
            self.compute_keys_values([0])
        self._add_injection(Injection("prefix", make, gate, make()[0][0].shape[1]))

    def _add_injection(self, injection: Injection) -> None:
        if not self.injections:
            for stack, enter in ((self._encoder, self._before_encoder), (self._decoder, self._before_decoder)):
                stack.register_forward_pre_hook(enter, with_kwargs=True)
        self.injections.append(injection)

    @torch.no_grad()
    def compute_keys_values(self, start: Sequence[int] | Tensor) -> list[KeyValue]:
        assert not isinstance(start, Tensor), "a base with a vocabulary is initialized from tokens"
        self._install()
        tokens = torch.tensor([[*start]], device=self._device)  # [1, N]
        recorder = KeyValueRecorder()
        with self._base_only():
            read = self._encoder(input_ids=tokens, virtual=recorder).last_hidden_state  # [1, N, D]
            self._modules[self._encoder] = list(recorder.recorded)
            self._decoder(input_ids=tokens, encoder_hidden_states=read, use_cache=False, virtual=recorder)
        self._modules[self._decoder] = [m for m in recorder.recorded if m not in set(self._modules[self._encoder])]
        maps = {name.rpartition(".")[0] for name, module in self._model.named_modules()
                if name.rpartition(".")[2] in ("k", "k_proj") and isinstance(module, nn.Linear)}
        if {self._model.get_submodule(name) for name in maps} != set(recorder.recorded):
            raise self._unreachable_error()
        return [(key[0], value[0]) for key, value in recorder.recorded.values()]  # [H, N, d] each

    @torch.no_grad()
    def compute_first_layer_keys(self, ids: Sequence[int], place: int) -> Tensor:
        """Independent of `place`: T5's keys have no positions. (BART's do; there it is the first position.)"""
        self._install()
        recorder = KeyValueRecorder(max_modules=1)
        with self._base_only(), suppress(RecordingComplete):
            self._encoder(input_ids=torch.tensor([[token] for token in ids], device=self._device), virtual=recorder)
        (key, _), = recorder.recorded.values()
        return key.flatten(1)  # [n, H, 1, d] -> [n, H * d] for n token ids

    @property
    def _device(self) -> torch.device:
        return next(self._encoder.parameters()).device

    def _install(self) -> None:
        """Select our attention function in the config. Raises `BaseError` if the model does not support it."""
        now = self._model.config._attn_implementation
        carries = all(inspect.signature(type(stack).forward).parameters[names[-1]].kind is inspect.Parameter.VAR_KEYWORD
                      for stack, names in self._names.items())
        if not carries or now not in ("sdpa", biased.NAME):
            raise self._unreachable_error()
        with silence_transformers():
            self._model.set_attn_implementation(biased.NAME)

    def _unreachable_error(self) -> BaseError:
        return BaseError(f"{type(self._model).__name__} does not expose the keys and values of its layers, so a prefix "
                         "is not supported", "use the method prompt, or another base")

    @contextmanager
    def _base_only(self) -> Iterator[None]:
        was_training, self._suspended = self._model.training, True
        self._model.eval()
        try:
            yield
        finally:
            self._model.train(was_training)
            self._suspended = False

    # ------------------------------------------------------------ the two hooks

    def _list_active(self, kind: SoftPromptKind) -> list[Injection]:
        return [] if self._suspended else [d for d in self.injections if d.kind == kind and is_active(d.gate)]

    def _before_encoder(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The encoder's pre-forward hook: inserts the prompt before each source, and adds the prefix argument."""
        kwargs = {**dict(zip(self._names[stack], args, strict=False)), **kwargs}
        if prompts := self._list_active("prompt"):
            kwargs = self._insert_prompts(kwargs, torch.cat([injection.compute() for injection in prompts]))
        return (), self._add_prefix_argument(stack, kwargs, 0)

    def _before_decoder(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The decoder's pre-forward hook: extends a source mask that does not include the virtual tokens."""
        kwargs = {**dict(zip(self._names[stack], args, strict=False)), **kwargs}
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if states is not None and isinstance(mask, Tensor) and states.shape[1] > mask.shape[1]:
            # [B, N + L]
            kwargs["encoder_attention_mask"] = mask.gather(1, _index_padded(mask, states.shape[1] - mask.shape[1])[1])
        cache = kwargs.get("past_key_values")
        return (), self._add_prefix_argument(stack, kwargs, 0 if cache is None else int(cache.get_seq_length()))

    def _insert_prompts(self, kwargs: dict[str, Any], virtual: Tensor) -> dict[str, Any]:
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        if embeds is None:
            embeds = self._encoder.get_input_embeddings()(kwargs["input_ids"])  # type: ignore[operator]
        width = embeds.shape[1] if mask is None else int(mask.sum(1).max())
        if width + len(virtual) > self._context:
            raise BaseError(f"a source of {width} tokens and {len(virtual)} virtual ones do not fit into the base's "
                            f"context of {self._context} tokens", f"set data.max_length to "
                            f"{self._context - len(virtual)} or less, or use fewer virtual tokens "
                            "(method.num_virtual_tokens)")
        virtual = virtual.to(embeds).expand(len(embeds), -1, -1)  # [B, N, D]
        if mask is None:
            return {**kwargs, "input_ids": None, "inputs_embeds": torch.cat([virtual, embeds], 1)}
        source, like = _index_padded(mask, virtual.shape[1])  # [B, N + L] each
        # [B, N + L, D]
        embeds = torch.cat([virtual, embeds], 1).gather(1, source[..., None].expand(-1, -1, embeds.shape[2]))
        return {**kwargs, "input_ids": None, "inputs_embeds": embeds, "attention_mask": mask.gather(1, like)}

    # ------------------------------------------------------------ a prefix

    def _add_prefix_argument(self, stack: nn.Module, kwargs: dict[str, Any], seen: int) -> dict[str, Any]:
        computed = [injection.compute() for injection in self._list_active("prefix")]
        if not computed:
            return kwargs
        # [H, sum of all N, d] each
        pairs = [tuple(torch.cat(parts, 1) for parts in zip(*each, strict=True)) for each in zip(*computed,
                                                                                                 strict=True)]
        modules, before = self._modules[stack], len(self._modules[self._encoder]) * (stack is self._decoder)
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        width = (embeds if ids is None else ids).shape[1]  # type: ignore[union-attr]
        biases = self._compute_biases(stack, width, seen, pairs[0][0].shape[1], kwargs.get("attention_mask"))
        # [1, H, N, d] each
        found = {module: BiasedVirtualKeyValues(key[None], value[None], biases.get(module))
                 for module, (key, value) in zip(modules, pairs[before:before + len(modules)], strict=True)}
        return {**kwargs, "virtual": InjectedKeyValues(found)}

    def _compute_biases(self, stack: nn.Module, width: int, seen: int, n: int, mask: Tensor | None) -> dict[nn.Module,
                                                                                                            Tensor]:
        """[1 or B, H, width, n] of each attention within a text, for a prefix in the n places before it, where the
        call has `width` tokens after `seen` earlier ones. T5's first block has the table for all layers. If a row has
        padding on its left (`mask` [B, seen + width]), its tokens are nearer to the prefix."""
        within = [m for m in self._modules[stack] if stack is self._encoder or get_optional(m, "is_causal")]
        # [B] padding before the text
        left = mask.ne(0).int().argmax(1) if mask is not None and mask.ndim == 2 else None
        shifted = left is not None and bool(left.any())
        found: dict[nn.Module, Tensor] = {}
        last = None
        for module in within:
            if get_optional(module, "has_relative_attention_bias"):
                rows, past = (seen + width, n) if shifted else (width, seen + n)
                # [1, H, rows, n]
                last = module.compute_bias(rows, n, device=self._device, past_seen_tokens=past)  # type: ignore[operator]
                if shifted:
                    assert left is not None
                    place = torch.arange(seen, seen + width, device=left.device) - left[:, None]  # [B, width]
                    # [B, width, H, n] -> [B, H, width, n] Clamped: padding has no distance of its own.
                    last = last[0].transpose(0, 1)[place.clamp(min=0)].transpose(1, 2)
            if last is not None:
                found[module] = last
        return found


def _index_padded(mask: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """For rows with the mask [B, L] and n virtual tokens before the first token of each: [B, n + L] the source of each
    position (an index into the virtual tokens followed by the row's own tokens), and the own token whose mask it
    uses."""
    first = mask.ne(0).int().argmax(1, keepdim=True)  # [B, 1]
    at = torch.arange(mask.shape[1] + n, device=mask.device)  # [n + L]
    virtual = (at >= first) & (at < first + n)  # [B, n + L]
    own = torch.where(at < first, at, at - n)  # [B, n + L]
    return torch.where(virtual, at - first, own + n), torch.where(virtual, first, own)
