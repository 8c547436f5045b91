"""Small chat templates and tokenizers that behave like those of well-known models. Their tokens fit the tiny model."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from tests.fakes.tiny import CORPUS

# Reasoning of a reply is rendered between the marks; an empty one too, as in Qwen3.
QWEN = """\
{%- for m in messages %}
    {%- if loop.first and m.role != 'system' %}{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}
    {%- set content = m.content %}
    {%- set reasoning = '' %}
    {%- if m.role == 'assistant' and '</think>' in content %}
        {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' and loop.last %}
        {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""
# The same with tools and calls of them.
QWEN_TOOLS = (
    "{%- if tools %}{{ '<|im_start|>system' }}{% for t in tools %}{{ '\\n' + (t | tojson) }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}"
) + QWEN.replace(
    "{{- content + '<|im_end|>",
    "{{- content }}{% for c in m.tool_calls %}{{ '<tool_call>' + (c.function | tojson) + '</tool_call>' }}{% endfor %}"
    "{{- '<|im_end|>",
)
LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' + system + '<|eot_id|>' }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""
GEMMA = """\
{{ bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- set role = 'model' if m.role == 'assistant' else m.role %}
    {{- '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}
"""
# The end of the text follows the end of the turn.
PHI = """\
{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% else %}{{- eos_token }}{% endif %}
"""
# Nothing opens a reply, and a space comes before it.
MISTRAL = """\
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '[INST] ' + m.content + ' [/INST]' }}
    {%- elif m.role == 'assistant' %}
        {{- ' ' + m.content | trim + eos_token }}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}
"""
# Nothing ends a turn.
GLM = """\
[gMASK]<sop>
{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% endif %}
"""
# A prompt begins the reasoning, and a reply is rendered without it.
R1 = """\
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|Assistant|>' + m.content.split('</think>')[-1] + '<|end_of_sentence|>' }}
    {%- else %}{{- '<|User|>' + m.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\\n' }}{% endif %}
"""


@dataclass(frozen=True)
class Family:
    """A chat template with its tokenizer and the ends that the model's files name."""

    template: str
    special: tuple[str, ...]  # tokens with the ids 0, 1, ...
    end: str  # what ends a reply
    eos: str  # eos_token of the tokenizer, and eos_token_id in config.json
    bos: str | None = None
    named: tuple[str, ...] = ()  # eos_token_id in generation_config.json; none: as in config.json
    adds: tuple[str, ...] = ()  # tokens that the tokenizer puts before a text
    ordinary: tuple[str, ...] = field(default=())  # added tokens that are not special


FAMILIES = {
    "qwen": Family(
        QWEN,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        end="<|im_end|>",
        eos="<|im_end|>",
        named=("<|im_end|>", "<|endoftext|>"),
        ordinary=("<think>", "</think>"),
    ),
    "llama3": Family(
        LLAMA3,
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        end="<|eot_id|>",
        eos="<|end_of_text|>",
        bos="<|begin_of_text|>",
        named=("<|end_of_text|>", "<|eot_id|>"),
        adds=("<|begin_of_text|>",),
    ),
    "gemma": Family(
        GEMMA,
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        end="<end_of_turn>",
        eos="<eos>",
        bos="<bos>",
        named=("<eos>", "<end_of_turn>"),
        adds=("<bos>",),
    ),
    "phi": Family(
        PHI,
        ("<|endoftext|>", "<|assistant|>", "<|user|>", "<|system|>", "<|end|>"),
        end="<|end|>",
        eos="<|endoftext|>",
        named=("<|endoftext|>", "<|assistant|>", "<|end|>"),
    ),
    "phi-eos": Family(
        PHI,
        ("<|endoftext|>", "<|assistant|>", "<|user|>", "<|system|>", "<|end|>"),
        end="<|end|>",
        eos="<|endoftext|>",
    ),
    "mistral": Family(
        MISTRAL, ("<unk>", "<s>", "</s>"), end="</s>", eos="</s>", bos="<s>", adds=("<s>",)
    ),
    "glm": Family(
        GLM,
        ("<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"),
        end="<|user|>",
        eos="<|endoftext|>",
        named=("<|endoftext|>", "<|user|>"),
        adds=("[gMASK]", "<sop>"),
    ),
    "r1": Family(
        R1,
        ("<|begin_of_sentence|>", "<|end_of_sentence|>", "<|User|>", "<|Assistant|>"),
        end="<|end_of_sentence|>",
        eos="<|end_of_sentence|>",
        bos="<|begin_of_sentence|>",
        adds=("<|begin_of_sentence|>",),
        ordinary=("<think>", "</think>"),
    ),
}  # fmt: skip


def make_chat_model(folder: Path, tiny_model: Path, family: Family) -> Path:
    """Copy the tiny model into `folder`, with the tokenizer, chat template and ends of the family."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(tiny_model, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=list(family.special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.ordinary])
    if family.adds:
        added = [(token, tokenizer.token_to_id(token)) for token in family.adds]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*family.adds, "$A"], pair=[*family.adds, "$A", "$B"], special_tokens=added
        )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=family.eos, bos_token=family.bos)
    wrapped.chat_template = family.template
    wrapped.save_pretrained(folder)
    ends = [tokenizer.token_to_id(token) for token in family.named]
    change(folder / "config.json", eos_token_id=tokenizer.token_to_id(family.eos))
    change(folder / "generation_config.json", eos_token_id=ends or tokenizer.token_to_id(family.eos))
    return folder


def change(path: Path, **values: object) -> None:
    """Change members of the JSON object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
