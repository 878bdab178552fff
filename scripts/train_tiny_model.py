"""Train a bundled model and its tokenizer on the sources of the standard library.

    python scripts/train_tiny_model.py OUT [--shape llama|qwen3|qwen2_moe] [--steps 1800] [--batch 16]

Small decoders with grouped-query attention, byte-level BPE of 2048 tokens, tied embeddings, bf16. Every dimension is a
multiple of 256, so that every group size and every format works. `llama` has 3.7 M parameters: 4 layers, hidden 256,
ffn 768. `qwen3` has 2.3 M parameters and norms on queries and keys: 3 layers, hidden 256, ffn 512. `qwen2_moe` is a
mixture of 3.5 M parameters that is not bundled: 3 layers, hidden 128, a shared expert and 20 routed experts of ffn 128,
of which each token uses 4; attention and shared experts hold one weight in eleven. The models are not useful as
language models; they exist to demonstrate, measure and test quantization without a download. Training takes about an
hour on two CPU cores. The text comes from `stdlib_text.py`, which excludes the evaluation files.
"""

import argparse
import math
import platform
import time
from pathlib import Path

import torch
from stdlib_text import documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

BOS = "<|begin|>"
VOCABULARY, CONTEXT = 2048, 512
SHAPES = {
    "llama": {"num_hidden_layers": 4, "intermediate_size": 768},
    "qwen3": {"num_hidden_layers": 3, "intermediate_size": 512},
    "qwen2_moe": {
        "num_hidden_layers": 3, "hidden_size": 128, "head_dim": 32, "intermediate_size": 256,
        "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128, "num_experts": 20,
        "num_experts_per_tok": 4, "norm_topk_prob": True, "output_router_logits": True, "router_aux_loss_coef": 0.01,
    },
}  # fmt: skip
PEAK_RATE, WARM_UP, TRAIN_WINDOW = 2e-3, 100, 256

CARD = """---
license: apache-2.0
library_name: transformers
language: [en, code]
tags: [{shape}, tiny, quantization-test]
---

# tiny-python-{shape}

A {shape} of {parameters:,} parameters ({layers} layers, hidden {hidden}, ffn {ffn}, 4 heads, 2 kv heads, {vocabulary}
tokens) that is bundled with llmq, so that its demo, tests and experiments need no download. It completes Python code,
badly.

Made by `scripts/train_tiny_model.py`: {steps} steps of {batch} x {window} tokens of the standard library of Python
{python} (Python Software Foundation License), AdamW, peak rate {rate}, in {minutes:.0f} minutes on {threads} CPU
threads.  Files whose path has a SHA-256 that starts with a byte below 26 were held out (`scripts/stdlib_text.py`).
Cross-entropy per token: {train_loss:.3f} on training text, **{held_out_loss:.3f} on held-out text**
(perplexity {perplexity:.2f}), measured on the bf16 weights with sequences of {window} tokens.
"""


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train byte-level BPE, with a beginning-of-text token in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, model_max_length=CONTEXT)


def new_model(shape: str, bos_id: int) -> PreTrainedModel:
    sizes = {"hidden_size": 256, "head_dim": 64} | SHAPES[shape]
    config = AutoConfig.for_model(
        shape, **sizes, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT, tie_word_embeddings=True, rms_norm_eps=1e-5,
        bos_token_id=bos_id, eos_token_id=bos_id, pad_token_id=None,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts, each after its BOS, as one int64 vector."""
    return torch.tensor([token for text in texts for token in tokenizer(text).input_ids])


def rate_at(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to 2 % of the peak."""
    progress = min(1.0, step / steps)
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: PreTrainedModel, stream: torch.Tensor, steps: int, batch_size: int) -> None:
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    model.train()
    start = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps)
        offsets = torch.randint(0, len(stream) - TRAIN_WINDOW, (batch_size,))
        batch = torch.stack([stream[o : o + TRAIN_WINDOW] for o in offsets.tolist()])
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            seconds = (time.monotonic() - start) / (step + 1)
            print(f"step {step:5d}  loss {loss.item():.3f}  {seconds:.2f} s per step", flush=True)


@torch.no_grad()
def mean_loss(model: PreTrainedModel, stream: torch.Tensor, windows: int = 128) -> float:
    """Cross-entropy in nats per token over the first `windows` sequences."""
    model.eval()
    count = min(windows, len(stream) // TRAIN_WINDOW)
    chunks = stream[: count * TRAIN_WINDOW].view(-1, 16 if count % 16 == 0 else 1, TRAIN_WINDOW)
    return sum(model(chunk, labels=chunk).loss.item() for chunk in chunks) / len(chunks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)

    texts = documents(held_out=False)
    tokenizer = train_tokenizer(texts)
    stream = token_stream(tokenizer, texts)
    held_out = token_stream(tokenizer, documents(held_out=True))
    model = new_model(arguments.shape, tokenizer.bos_token_id)
    print(
        f"{len(texts)} files, {len(stream):,} tokens, {len(held_out):,} held out, {model.num_parameters():,} parameters"
    )

    start = time.monotonic()
    train(model, stream, arguments.steps, arguments.batch)
    minutes = (time.monotonic() - start) / 60
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    model.float()
    train_loss, held_out_loss = mean_loss(model, stream), mean_loss(model, held_out)
    card = CARD.format(
        shape=arguments.shape, layers=model.config.num_hidden_layers,
        hidden=model.config.hidden_size, ffn=model.config.intermediate_size,
        parameters=model.num_parameters(), vocabulary=VOCABULARY,
        steps=arguments.steps, batch=arguments.batch, window=TRAIN_WINDOW,
        python=platform.python_version(), rate=PEAK_RATE, minutes=minutes, threads=torch.get_num_threads(),
        train_loss=train_loss, held_out_loss=held_out_loss, perplexity=math.exp(held_out_loss),
    )  # fmt: skip
    (arguments.out / "README.md").write_text(card, encoding="utf-8")
    print(f"loss {train_loss:.3f}, held out {held_out_loss:.3f}; written to {arguments.out}")


if __name__ == "__main__":
    main()
