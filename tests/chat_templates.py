"""A collection of chat templates, each after a kind that public models have, with a tokenizer that knows its tokens.

    tokenizer = tokenizer_with("llama3")            # bytes and the template's own special tokens
    tokenizer = tokenizer_with("llama3", "merging") # the same with merges, so that tokens cross borders of words
    tokenizer = tokenizer_with("mistral", "spaces") # writes a space before a text, as SentencePiece does
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tiny import CHATML


@dataclass(frozen=True)
class Kind:
    """A template, the tokens that it writes, which of them are eos and bos, and the token that ends a turn.

    Args:
        plain: added tokens that are not special, as `<think>` of Qwen3.
        bos_added: whether the tokenizer puts its bos before every text too.
    """

    template: str | dict[str, str] | None
    special: tuple[str, ...]
    eos: str
    end: str
    bos: str | None = None
    plain: tuple[str, ...] = ()
    bos_added: bool = False


LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}")
QWEN3 = (
    "{%- if tools %}<|im_start|>system\n{%- if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{%- endif %}"
    "# Tools\n{%- for t in tools %}{{ '\n' + (t | tojson) }}{%- endfor %}<|im_end|>\n"
    "{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}"
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}"
    "{%- endfor %}"
    "{%- for m in messages %}{%- set content = m.content or '' %}"
    "{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}"
    "{%- elif m.role == 'assistant' %}{%- set thought = m.reasoning_content or '' %}"
    "{%- if not thought and '</think>' in content %}{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{%- endif %}"
    "{{- content }}{%- for c in m.tool_calls or [] %}{{ '\n<tool_call>\n' + (c.function | tojson) + '\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}"
    "{%- elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + content + '\n</tool_response><|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}")
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|Assistant|>' + content + '<|end_of_sentence|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}")
# Drops the system turn unless the last turn is the user's, and what is said beside a call; lists tools there alone.
MISTRAL_V3 = (
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set messages = messages[1:] %}{%- endif %}"
    "{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}{%- set ns = namespace(index=0) %}"
    "{%- for m in messages %}{%- if not (m.role == 'tool' or m.tool_calls) %}{%- if (m.role == 'user') != (ns.index % 2 == 0) %}"
    "{{- raise_exception('After the optional system message, conversation roles must alternate') }}{%- endif %}"
    "{%- set ns.index = ns.index + 1 %}{%- endif %}{%- endfor %}{{- bos_token }}"
    "{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- if tools and m == users[-1] %}{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}"
    "{{- '[INST] ' + (system + '\n\n' if loop.last and system is defined else '') + m.content + '[/INST]' }}"
    "{%- elif m.tool_calls %}{{- '[TOOL_CALLS] [' }}{%- for call in m.tool_calls %}"
    "{%- if not call.id is defined or call.id | length != 9 %}{{- raise_exception('Tool call IDs should have length 9!') }}{%- endif %}"
    "{{- (call.function | tojson)[:-1] + ', \"id\": \"' + call.id + '\"}' + (']' + eos_token if loop.last else ', ') }}{%- endfor %}"
    "{%- elif m.role == 'assistant' %}{{- ' ' + m.content | trim + eos_token }}"
    "{%- elif m.role == 'tool' %}{%- if not m.tool_call_id is defined or m.tool_call_id | length != 9 %}"
    "{{- raise_exception('Tool call IDs should have length 9!') }}{%- endif %}"
    "{{- '[TOOL_RESULTS] {\"content\": ' + m.content + ', \"call_id\": \"' + m.tool_call_id + '\"}[/TOOL_RESULTS]' }}"
    "{%- else %}{{- raise_exception('Only user and assistant roles are supported') }}{%- endif %}{%- endfor %}")
# Keeps the last system turn alone, drops every thought, and opens none in its generation prompt.
DEEPSEEK_R1 = (
    "{% set ns = namespace(system='', tool=false) %}{% for m in messages %}{% if m['role'] == 'system' %}{% set ns.system = m['content'] %}"
    "{% endif %}{% endfor %}{{ bos_token + ns.system }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{% set ns.tool = false %}{{ '<|User|>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{% if ns.tool %}{{ '<|tool_outputs_end|>' + m['content'] }}{% else %}"
    "{{ '<|Assistant|>' + m['content'].split('</think>')[-1] }}{% endif %}{% set ns.tool = false %}{{ '<|end_of_sentence|>' }}"
    "{% elif m['role'] == 'tool' %}{{ ('' if ns.tool else '<|tool_outputs_begin|>') + m['content'] }}{% set ns.tool = true %}"
    "{% endif %}{% endfor %}{% if ns.tool %}<|tool_outputs_end|>{% elif add_generation_prompt %}<|Assistant|>{% endif %}")
# Closes the thought in its generation prompt, and drops the thoughts of every turn.
DEEPSEEK_V31 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% set ns = namespace(asked=false) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.asked = true %}"
    "{{ '<|User|>' + m['content'] }}{% elif m['role'] == 'assistant' %}{{ '<|Assistant|></think>' if ns.asked }}{% set ns.asked = false %}"
    "{{ m['content'].split('</think>', 1)[-1] }}{% if m.tool_calls %}<|tool_calls_begin|>{% for call in m.tool_calls %}"
    "{{ '<|tool_call_begin|>' + call.function.name + '<|tool_sep|>' + (call.function.arguments | tojson) + '<|tool_call_end|>' }}"
    "{% endfor %}<|tool_calls_end|>{% endif %}<|end_of_sentence|>"
    "{% elif m['role'] == 'tool' %}{{ '<|tool_output_begin|>' + m['content'] + '<|tool_output_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and ns.asked %}<|Assistant|></think>{% endif %}")
# Writes a system turn of its own, and a generation prompt only behind another turn than that.
GRANITE = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set messages = messages[1:] %}{%- else %}"
    "{%- set system = 'You are Granite.' %}{%- endif %}{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\n' }}"
    "{%- if tools %}{{- '<|start_of_role|>tools<|end_of_role|>' + (tools | tojson) + '<|end_of_text|>\n' }}{%- endif %}"
    "{%- for m in messages %}{{- '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] + '<|end_of_text|>\n' }}"
    "{%- if loop.last and add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}{%- endfor %}")
NOMARK = ("{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}[assistant]{% endif %}")
TOOL_USE = CHATML.replace("{{ message['content'] }}", "{{ message['content'] }}{% if message.tool_calls %}"
                          "<tool_call>{{ message.tool_calls[0].function | tojson }}</tool_call>{% endif %}")
TOOL_MARKS = tuple(f"<|tool_{name}|>" for name in ("calls_begin", "calls_end", "call_begin", "call_end", "sep", "outputs_begin",
                                                  "outputs_end", "output_begin", "output_end"))
MARKS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
KINDS: dict[str, Kind] = {
    "chatml": Kind(CHATML, MARKS, "<|im_end|>", "<|im_end|>"),
    "other_eos": Kind(CHATML, MARKS, "<|endoftext|>", "<|im_end|>"),
    "llama3": Kind(LLAMA3, ("<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
                   "<|end_of_text|>", "<|eot_id|>", "<|begin|>", bos_added=True),
    "gemma": Kind(GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<end_of_turn>", "<bos>", bos_added=True),
    "mistral": Kind(MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", "</s>", "<s>", bos_added=True),
    "qwen3": Kind(QWEN3, MARKS, "<|im_end|>", "<|im_end|>", plain=("<think>", "</think>", "<tool_call>", "</tool_call>")),
    "deepseek": Kind(DEEPSEEK, ("<|begin|>", "<|end_of_sentence|>", "<|User|>", "<|Assistant|>"), "<|end_of_sentence|>",
                     "<|end_of_sentence|>", "<|begin|>", plain=("<think>", "</think>"), bos_added=True),
    "mistral_v3": Kind(MISTRAL_V3, ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
                                    "[TOOL_RESULTS]", "[/TOOL_RESULTS]"), "</s>", "</s>", "<s>", bos_added=True),
    "deepseek_r1": Kind(DEEPSEEK_R1, ("<|begin|>", "<|end_of_sentence|>", "<|User|>", "<|Assistant|>", *TOOL_MARKS),
                        "<|end_of_sentence|>", "<|end_of_sentence|>", "<|begin|>", plain=("<think>", "</think>"), bos_added=True),
    "deepseek_v31": Kind(DEEPSEEK_V31, ("<|begin|>", "<|end_of_sentence|>", "<|User|>", "<|Assistant|>", *TOOL_MARKS),
                         "<|end_of_sentence|>", "<|end_of_sentence|>", "<|begin|>", plain=("<think>", "</think>"), bos_added=True),
    "granite": Kind(GRANITE, ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"), "<|end_of_text|>", "<|end_of_text|>"),
    "nomark": Kind(NOMARK, ("<|endoftext|>",), "<|endoftext|>", "<|endoftext|>"),
    "none": Kind(None, ("<s>", "</s>"), "</s>", "</s>", "<s>", bos_added=True),
    "several": Kind({"default": CHATML, "tool_use": TOOL_USE}, MARKS, "<|im_end|>", "<|im_end|>"),
    "bos_twice": Kind("{{ bos_token }}" + CHATML, MARKS, "<|im_end|>", "<|im_end|>", "<|endoftext|>", bos_added=True),
}
LINES = ["user system assistant model tool", "the answer is yes\n\nno", "\n\n \n", "one two three, what is that?", "ａ 你好 🙂"]


@cache
def tokenizer_with(name: str, backend: str = "bytes") -> PreTrainedTokenizerFast:
    """A tokenizer for the template `name`. `backend`: `bytes`, `merging` (byte-level BPE with merges), or `spaces` (BPE
    that writes a space before a text)."""
    kind = KINDS[name]
    special = [AddedToken(token, special=True, normalized=False) for token in kind.special]
    if backend == "spaces":
        built = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
        trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, special_tokens=[
            "<unk>", *(f"<0x{i:02X}>" for i in range(256))])
        built.train_from_iterator(LINES * 5, trainer)
        described = json.loads(built.to_str())
        described["added_tokens"] = []  # the trainer's: bytes are ordinary tokens
        built = Tokenizer.from_str(json.dumps(described))
    else:
        built = Tokenizer(models.BPE())
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=backend == "merging")
        built.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=600 if backend == "merging" else 256, show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        built.train_from_iterator(LINES * 10 if backend == "merging" else [], trainer)
    built.add_special_tokens(special)
    built.add_tokens([AddedToken(token, special=False, normalized=False) for token in kind.plain])
    if kind.bos_added:
        built.post_processor = processors.TemplateProcessing(
            single=f"{kind.bos} $A", pair=f"{kind.bos} $A $B", special_tokens=[(kind.bos, built.token_to_id(kind.bos))])
    elif backend == "merging":
        built.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, eos_token=kind.eos, bos_token=kind.bos)
    tokenizer.chat_template = kind.template
    return tokenizer
