"""A random Qwen2 of 0.26 M parameters with tokenizer and chat template. Every real engine loads it within seconds."""

from pathlib import Path

TOKENS = 352  # of the tokenizer; the model has 512 rows
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The same with tools and calls of them, as Qwen's template has them.
WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m['tool_calls'] %}<call>{{ c['function'] | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "What is the capital of the country? The capital is a city by the sea.",
    "Turn on the light in the kitchen, then play a song and set the temperature.",
    '{"Action": "setLight", "Action Input": {"room": "kitchen", "state": "on"}}',
]


def make_tiny_model(folder: Path, seed: int = 0, pairs: int = 1) -> Path:
    """Write the model into `folder`. head_dim is 64, since vLLM's CPU attention has kernels for it.

    pairs: heads of keys and values, of which each part of an engine that is split has one or more.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    assert tokenizer.get_vocab_size() == TOKENS
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=pairs,
        max_position_embeddings=4096,
        eos_token_id=wrapped.eos_token_id,
        pad_token_id=wrapped.pad_token_id,
        tie_word_embeddings=True,
        initializer_range=0.08,  # above the default, so that logits differ enough for comparisons
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder
