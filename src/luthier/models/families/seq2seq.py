"""The sequence-to-sequence family: an encoder reads sources, a decoder generates targets. Read `hf_model.py` first.

Its input is the same packed row. Roots are sources, their children are targets. Several targets share one encoding, and
a grandchild continues its parent in the decoder. In the returned row of states

    a root's last token     has the state of the decoder's start token, which predicts the first token of every target
    its other tokens        have the encoder's states
    a target's tokens       have the decoder's states

So a child's first token is predicted from its parent's last token, as in all other families.

Relative positions do not support packed rows, so the row is split into padded batches, of sources and of targets of
similar length. Paper: T5, Raffel et al. 2020 (arXiv:1910.10683) section 2.1.

Shape letters: T tokens of the packed row, D hidden size, B rows and L columns of a padded batch, N positions of all
padded batches, S segments, V vocabulary, L' columns of a source with its virtual tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, EncoderDecoderCache

from luthier.core.errors import BaseError, DataError, RunError
from luthier.core.protocols import GenerationOutput, ModelStructure, SamplingParams, TargetLinear, TransformerLayer
from luthier.core.types import Inputs, LossInputs, Outputs, SegmentTree
from luthier.models.activation_recompute import ActivationRecomputer
from luthier.models.adapter_routing import route_indices
from luthier.models.decoding import (
    DecodingEngine,
    build_requests,
    find_eos_tokens,
    restore_order,
    run_requests,
    sort_by_length,
    stream_request,
)
from luthier.models.hf_attributes import get_optional
from luthier.models.hf_model import HFModel
from luthier.models.mixed_embeddings import mix_embeddings
from luthier.models.ops.fused_logprobs import compute_logprobs
from luthier.models.padded_decoder import BatchDecoder
from luthier.models.soft_prompts.seq2seq import Seq2SeqInjector
from luthier.models.structure import find_linears
from luthier.models.task_heads import LOG_PROBS, Pooling

# a padded batch has at most FACTOR * tokens + ALLOWANCE positions
PADDING_FACTOR, PADDING_ALLOWANCE = 1.5, 64


class Seq2Seq(HFModel):
    """An encoder and a decoder of Transformers as a `Family`.

    Args:
        model: an `AutoModelForSeq2SeqLM` model.
        tokenizer: its tokenizer.

    Raises:
        BaseError: the config has no start token, or a probe of a few tokens shows that the model's logits are computed
            in an unsupported way.
    """

    task: ClassVar[str] = "SEQ_2_SEQ_LM"
    is_encoder_decoder: ClassVar[bool] = True
    can_generate: ClassVar[bool] = True
    pooling: Pooling = "last"

    def __init__(self, model: Any, tokenizer: Any) -> None:
        # `HFModel.__init__` is not called: attention remains Transformers' own, which supports relative positions.
        self.model, self.tokenizer = model, tokenizer
        self.encoder, self.decoder = model.get_encoder(), model.get_decoder()
        parts = find_structure(model, tokenizer)
        self._injector = Seq2SeqInjector(parts, self.encoder, self.decoder)
        self.structure = replace(parts, injector=self._injector)
        self.start = _find_start_token(model)
        # T5 scales the states if its head is the tied embedding; later versions have an untied head.
        self.scale = model.config.d_model ** -0.5 if get_optional(model.config, "scale_decoder_outputs") else 1.0
        self._recompute_over: int | None = None
        self._recomputer = ActivationRecomputer()  # never active
        self.add_heads((), 0)
        self._check_logits()

    def forward(self, inputs: Inputs, target: LossInputs, needs: frozenset[str]) -> Outputs:
        """Raises RuntimeError if a token of a source is to be predicted: the encoder attends to all of it."""
        if needs & LOG_PROBS:
            # Asynchronous: an `if` would wait for the device.
            torch._assert_async(_is_decoder_token(inputs.segment_tree).to(self.device)[target.state_index].all(),
                                "tokens of a source cannot be predicted")
        return super().forward(inputs, target, needs)

    def _log_probs(self, states: Tensor, tokens: Tensor, entropies: bool,
                   temperature: float) -> tuple[Tensor, Tensor, Tensor | None]:
        # Scale the states, not the logits: a plain linear head uses the fused implementation.
        head = self.model.get_output_embeddings()
        return compute_logprobs(head, states * (self.scale / temperature), tokens, entropies=entropies)

    # ---------------------------------------------------------------- the packed row

    def states(self, inputs: Inputs) -> Tensor:
        """[T, D] The states of the row; see the table in the module docstring."""
        recompute = self._recompute_over is not None and inputs.tokens.shape[0] > self._recompute_over
        for block in self.structure.layers:
            block.module.gradient_checkpointing = recompute and torch.is_grad_enabled()  # type: ignore[assignment]
        segment_tree = inputs.segment_tree
        spans = [torch.arange(start, start + n) for start, n in zip(segment_tree.starts, segment_tree.lengths,
                                                                    strict=True)]
        home = torch.zeros(inputs.tokens.shape[0], dtype=torch.int64)  # [T] each token's index among all N states
        read, memory = self._run_encoder(inputs, segment_tree, spans, home)
        written = self._run_decoder(inputs.tokens, segment_tree, spans, read, memory, home)
        return torch.cat([read, written]).index_select(0, home.to(read.device))  # [N, D] -> [T, D]

    def _run_encoder(self, inputs: Inputs, segment_tree: SegmentTree, spans: list[Tensor],
              home: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """[N, D] The encoder's states of all sources, with padding; each token's index is written to `home`. And for
        each source the indices that the decoder attends to: those of virtual tokens and of its own tokens."""
        found, before, tokens = [], 0, inputs.tokens
        embeds = mix_embeddings(self.model.get_input_embeddings(), inputs)
        memory: dict[int, Tensor] = {}
        roots = [i for i, parent in enumerate(segment_tree.parents) if parent < 0]
        for group in self._group_rows(roots, [segment_tree.lengths[i] for i in roots], segment_tree.adapters,
                                      {i: i for i in roots}):
            # [B, L] indices into the row
            rows = pad_sequence([spans[i] for i in group], batch_first=True, padding_value=-1)
            seen = rows >= 0  # [B, L]
            places, mask = rows.to(tokens.device).clamp(min=0), seen.to(tokens.device).long()  # [B, L] each
            given = {"input_ids": tokens[places]} if embeds is None else {"inputs_embeds": embeds[places]}
            with route_indices(self.router, 0, [segment_tree.adapters[i] for i in group] if segment_tree.adapters
                               else ()):
                states = self.encoder(**given, attention_mask=mask).last_hidden_state  # [B, L', D]
            virtual = states.shape[1] - rows.shape[1]
            # [B, L'] indices among all N states
            places = before + torch.arange(states.shape[0] * states.shape[1]).view(states.shape[:2])
            home[rows[seen]] = places[:, virtual:][seen]  # only of own tokens
            # Padding follows a source, so its virtual and own tokens come first.
            memory |= {i: line[:virtual + len(spans[i])] for i, line in zip(group, places, strict=True)}
            before += places.numel()
            found.append(states.flatten(0, 1))  # [B * L', D]
        return torch.cat(found), memory

    def _group_rows(self, names: Sequence[int], sizes: Sequence[int], adapters: Sequence[int],
                 owner: Mapping[int, int]) -> list[list[int]]:
        """The rows of each padded batch. With virtual tokens, all rows of a batch have the same adapter."""
        if not adapters or not self._injector.injections:
            return _group_by_length(names, sizes)
        parted: dict[int, list[tuple[int, int]]] = {}
        for name, size in zip(names, sizes, strict=True):
            parted.setdefault(owner[name], []).append((name, size))
        return [group for part in parted.values() for group in _group_by_length(*zip(*part, strict=True))]

    def _run_decoder(self, tokens: Tensor, segment_tree: SegmentTree, spans: list[Tensor], read: Tensor,
                     memories: dict[int, Tensor],
                 home: Tensor) -> Tensor:
        """[N, D] The decoder's states of every path from a root to a leaf; indices in `home` continue after `read`.

        Tokens that several paths share are computed in each path; `home` refers to the first one.
        """
        inner = set(segment_tree.parents)
        paths = {i: segment_tree.find_path(i) for i in range(len(spans)) if i not in inner}
        sources = {i: memories[path[0]] for i, path in paths.items()}
        owner = {i: _get_adapter(segment_tree, path) for i, path in paths.items()} if segment_tree.adapters else {}
        # The start token takes the position of the root's last token.
        answers = {i: torch.cat([spans[path[0]][-1:], *(spans[a] for a in path[1:])]) for i, path in paths.items()}
        found, before = [], read.shape[0]
        fresh = torch.ones_like(home, dtype=torch.bool)
        sizes = [len(answers[i]) + len(sources[i]) for i in paths]
        for group in self._group_rows([*paths], sizes, segment_tree.adapters, owner):
            # [B, L] indices into the row
            rows = pad_sequence([answers[i] for i in group], batch_first=True, padding_value=-1)
            for line, i in enumerate(group):
                new = fresh[answers[i]]  # [tokens of the path] not in an earlier path
                home[answers[i][new]] = (before + line * rows.shape[1] + torch.arange(len(new)))[new]
                fresh[answers[i]] = False
            before += rows.numel()
            # [B, L'] indices among the encoder's states
            memory = pad_sequence([sources[i] for i in group], batch_first=True, padding_value=-1).to(tokens.device)
            given = tokens[rows.to(tokens.device).clamp(min=0)]  # [B, L]
            given[:, 0] = self.start  # in place of the source's last token
            with route_indices(self.router, 0, [owner[i] for i in group] if segment_tree.adapters else ()):
                # Padding follows all tokens, so a causal decoder needs no mask for it.
                states = self.decoder(input_ids=given, use_cache=False, encoder_attention_mask=(memory >= 0).long(),
                                      encoder_hidden_states=_gather_rows(read, memory.clamp(min=0))).last_hidden_state
            found.append(states.flatten(0, 1))  # [B * L, D]
        return torch.cat(found)

    @torch.no_grad()
    def _check_logits(self) -> None:
        """Raises `BaseError` if the model's own logits differ from those of its parts as they are called here."""
        was_training = self.model.training
        self.model.eval()
        row = torch.tensor([1, 2, 3, 2, 3], device=self.device)
        # [3, V]
        own = self.model(input_ids=row[None, :3], use_cache=False,
                         decoder_input_ids=torch.tensor([[self.start, 2, 3]], device=self.device)).logits[0]
        states = self.states(Inputs(row, torch.arange(5, device=self.device), SegmentTree((3, 2), (-1, 0))))  # [5, D]
        found = self.model.get_output_embeddings()(states[2:] * self.scale)  # [3, V] start token, then the target
        self.model.train(was_training)
        if not torch.allclose(found.float(), own.float(), rtol=1e-2, atol=1e-2 * float(own.float().abs().max())):
            raise BaseError(f"{type(self.model).__name__} computes its logits in an unsupported way",
                            "use a base of the T5 family")

    # ---------------------------------------------------------------- generation

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams,
                 adapters: Sequence[int] = ()) -> Iterator[GenerationOutput]:
        """See `Family`. `adapters`: for each prompt an index of the adapter manager, -1 for the base; empty: no
        routing."""
        requests = build_requests([self._prepare_source(i, prompt) for i, prompt in enumerate(prompts)],
                                  self._limit(sampling), adapters)
        # With virtual tokens, all rows of a batch have the same adapter.
        groups = list(adapters) if self._injector.injections else []
        order = sort_by_length(requests, groups)
        parts = [[one for one in order if one.adapter == adapter] for adapter in dict.fromkeys(
            one.adapter for one in order)] if groups else [order]
        engine = self.build_engine(sampling.batch_size)
        return chain.from_iterable(restore_order(requests, run_requests(engine, part), part) for part in parts)

    def stream(self, prompt: Sequence[int], sampling: SamplingParams) -> Iterator[int]:
        """One output, token by token."""
        return stream_request(self.build_engine(1), build_requests([self._prepare_source(0, prompt)],
                                                                     self._limit(sampling))[0])

    def build_engine(self, max_num_seqs: int) -> DecodingEngine:
        """An engine that decodes padded batches with this model."""
        def route(adapters: Sequence[int | None]) -> AbstractContextManager[None]:
            routed = any(adapter is not None for adapter in adapters)
            return route_indices(self.router, 0, [-1 if a is None else a for a in adapters] if routed else ())

        # The source and the output have a context each, so the source takes no room of the output.
        return DecodingEngine(BatchDecoder(partial(_Seq2SeqDecodeBatch, self), route), self.stop_tokens,
                              lambda adapter: 2**62, max_num_seqs=max_num_seqs)

    def _limit(self, sampling: SamplingParams) -> SamplingParams:
        return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, self.structure.sizes["context"]))

    def _prepare_source(self, index: int, prompt: Sequence[int]) -> list[int]:
        """A prompt as a source of the encoder: with the eos token."""
        end, context = self.tokenizer.eos_token_id, self.structure.sizes["context"]
        found = [*prompt] if not prompt or end is None or prompt[-1] == end else [*prompt, end]
        if not found:
            raise DataError(f"prompt {index} has no tokens", "give the prompt at least one token")
        if len(found) > context:
            raise BaseError(f"prompt {index} has {len(found)} tokens, and the base reads at most {context}",
                            "shorten the prompt, or choose a base with a longer context")
        return found

    @property
    def stop_tokens(self) -> set[int]:
        return find_eos_tokens(self.model, self.tokenizer) | set(self.chat_format.stop_tokens)


class _Seq2SeqDecodeBatch:
    """Sources, encoded once, and their outputs so far."""

    def __init__(self, family: Seq2Seq, sources: Sequence[Sequence[int]]) -> None:
        assert not family.training, "dropout would change the outputs: call train(False) first"
        self.family = family
        rows = [torch.tensor(source, device=family.device) for source in sources]
        self.mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)  # [B, L]
        # [B, L', D]
        self.read = family.encoder(input_ids=pad_sequence(rows, batch_first=True),
                                   attention_mask=self.mask).last_hidden_state
        described = family.decoder.config
        self.cache = EncoderDecoderCache(DynamicCache(config=described), DynamicCache(config=described))
        self.tokens = self.mask.new_full((len(rows), 1), family.start)  # [B, 1]

    def logits(self) -> Tensor:
        family = self.family
        states = family.decoder(input_ids=self.tokens, encoder_hidden_states=self.read,
                                encoder_attention_mask=self.mask, past_key_values=self.cache,
                                use_cache=True).last_hidden_state[:, -1]  # [B, D]
        found: Tensor = family.model.get_output_embeddings()(states * family.scale)  # [B, V]
        return found

    def append(self, next_tokens: Tensor, kept_rows: Tensor | None) -> None:
        if kept_rows is not None:
            self.cache.batch_select_indices(kept_rows)
            next_tokens, self.mask, self.read = next_tokens[kept_rows], self.mask[kept_rows], self.read[kept_rows]
        self.tokens = next_tokens[:, None]  # [B, 1]


# ---------------------------------------------------------------- parts


def find_structure(model: Any, tokenizer: Any = None) -> ModelStructure:
    """The parts of a sequence-to-sequence model: the encoder's layers first, then the decoder's."""
    names = {id(module): name for name, module in model.named_modules()}
    all_layers: list[TransformerLayer] = []
    for stack in (model.get_encoder(), model.get_decoder()):
        layers = next((child for child in stack.children() if isinstance(child, nn.ModuleList)), None)
        if layers is None:
            raise BaseError(f"{type(stack).__name__} has no stack of layers of one class, so its parts cannot be found",
                            "use a base of the T5 family")
        all_layers += [_describe_layer(len(all_layers) + i, names[id(layer)], layer) for i, layer in enumerate(layers)]
    config, embedding, head = model.config, model.get_input_embeddings(), model.get_output_embeddings()
    sizes = {
        "hidden": config.hidden_size, "layers": len(all_layers), "heads": config.num_attention_heads,
        "kv_heads": config.num_attention_heads,
        "head_dim": get_optional(config, "head_dim") or config.hidden_size // config.num_attention_heads,
        "vocabulary": embedding.weight.shape[0],
        "context": get_optional(config, "max_position_embeddings") or 1_000_000, "unit": 1,
    }
    return ModelStructure(model, model.base_model, tuple(all_layers),
                          tuple(s for b in all_layers for s in find_linears(b)),
                          embedding,
                   head, head.weight is embedding.weight, sizes, "SEQ_2_SEQ_LM", tokenizer)


def _describe_layer(index: int, name: str, layer: nn.Module) -> TransformerLayer:
    """Describes a layer; `attention` of a decoder layer is its self-attention. All linear layers are listed."""
    norms = tuple(m for m in layer.modules() if "Norm" in type(m).__name__)
    bare = TransformerLayer(index, name, layer, layer, layer, norms, layer, layer, layer)
    first: dict[str, TargetLinear] = {}
    for linear in find_linears(bare):
        first.setdefault(linear.role, linear)
    if not {"o", "down", "up"} <= first.keys():
        raise BaseError(f"{type(layer).__name__} has no attention and MLP whose linear layers have known names",
                        "use a base of the T5 family")
    modules = {f"{name}.{path}": module for path, module in layer.named_modules() if path} | {name: layer}
    attention, mlp = (modules[first[role].name.rpartition(".")[0]] for role in ("o", "down"))
    alone = mlp is layer  # the MLP's two linear layers belong to the layer itself
    return TransformerLayer(index, name, layer, attention, mlp, norms, attention_out=first["o"].module,
                 mlp_in=first["up"].module if alone else mlp, mlp_out=first["down"].module if alone else mlp)


def _find_start_token(model: Any) -> int:
    """The token that begins every target."""
    for config in (model.config, model.generation_config):
        if (token := get_optional(config, "decoder_start_token_id")) is not None:
            return int(token)
    raise BaseError(f"the config of this {type(model).__name__} names no decoder_start_token_id",
                    "add it to the base's config.json (T5: the id of the padding token)")


# ---------------------------------------------------------------- rows


def _is_decoder_token(segment_tree: SegmentTree) -> Tensor:
    """[T] bool: whether the token has a state of the decoder."""
    root = torch.tensor([parent < 0 for parent in segment_tree.parents])  # [S]
    lengths = torch.tensor(segment_tree.lengths)  # [S]
    found = ~root.repeat_interleave(lengths)  # [T]
    found[lengths.cumsum(0) - 1] = True  # a root's last token has the state of the start token
    return found


def _get_adapter(segment_tree: SegmentTree, path: Sequence[int]) -> int:
    """The adapter of a row of the decoder. Its source may have another one."""
    found = {segment_tree.adapters[i] for i in path[1:] or path}
    if len(found) > 1:
        raise RunError("a segment has a different adapter than its parent, and this base computes every target as one "
                       "padded row", "use one adapter for each target")
    return found.pop()


def _group_by_length(names: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Groups rows of similar length, the longest first, so that padded batches contain little padding."""
    groups: list[list[int]] = []
    longest = used = 0
    for size, name in sorted(zip(sizes, names, strict=True), key=lambda pair: -pair[0]):
        if groups and (len(groups[-1]) + 1) * longest <= PADDING_FACTOR * (used + size) + PADDING_ALLOWANCE:
            groups[-1].append(name)
            used += size
        else:
            groups.append([name])
            longest = used = size
    return groups


def _gather_rows(states: Tensor, rows: Tensor) -> Tensor:
    """[N, D] at indices [B, L] -> [B, L, D]."""
    return states.index_select(0, rows.flatten()).view(*rows.shape, -1)  # [B, L, D]
