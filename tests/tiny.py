"""A Llama of 100,000 random weights with a tokenizer, and text: what a whole run needs, made in a second.

The vocabulary is the 256 bytes and two marks, so any text can be tokenized and any ids are text.
"""

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BEGIN, END = "<s>", "</s>"
VOCABULARY = 264  # 258 used, the rest so that packed formats can hold a quantized head
WORDS = "the a small model reads text and writes of it what was seen one more time before night".split()


def write_llama(folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Path:
    """A checkpoint in `folder`, which is made: weights, configuration, tokenizer.  Returns the folder."""
    settings: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "bos_token_id": 256,
        "eos_token_id": 257, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= 5  # transformers' 0.02 makes nearly constant logits, which would hide mistakes
        elif parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) * 0.1
    model.to(dtype).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """One token a byte; a text begins with `<s>`, as in most models."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, BEGIN, END])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=END)
    fast.padding_side = "left"
    fast.save_pretrained(folder)


def write_text(file: Path, *, words: int = 600, seed: int = 0) -> Path:
    """Random words, with a blank line now and then."""
    draw = random.Random(seed)
    text = " ".join(draw.choice(WORDS) + ("\n\n" if draw.random() < 0.02 else "") for _ in range(words))
    file.write_text(text, encoding="utf-8")
    return file
