"""Tokens per second of a small model on this machine's CPU: float32 by transformers, and the same in 4 bits by llmq.

    PYTHONPATH=.:kernels python -m bench.cpu_decode --out kernels/bench/results/cpu-decode-DATE.json

A random Llama of 12 layers, 512 wide, is saved, quantized (by rtn, since speed does not depend on the codes) and
loaded as a user loads it.

Batch 1, greedy: after a short prompt, each step runs one token through the whole model with a cache, and is timed.  The
models take turns of a few steps, so that other load on the machine affects all of them; the CPU time of a step, of all
threads, hardly includes other load.  `by pieces` is llmq without torch's int4 product.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llmq
from bench.cpu import stamp
from bench.timing import Spread
from llmq.cli.terminal import quiet_transformers
from llmq.model.passes.generate import cache_argument, returned_cache
from llmq.runtime.load import load_model
from llmq_kernels.w4a16 import small_batches

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "eval" / "models" / "tiny-python-llama"
SHAPE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 12, "num_attention_heads": 8,
         "num_key_value_heads": 8, "vocab_size": 4096, "max_position_embeddings": 512}  # fmt: skip
FLOAT, PACKED, PIECES = "transformers fp32", "llmq", "llmq by pieces"
PROMPT, WARM_UP, STEPS = 32, 2, 8  # tokens; steps per turn that are not timed; timed steps per turn


def make_models(folder: Path) -> dict[str, Any]:
    """The three models, from one set of random weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder / "float")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder / "float")
    llmq.quantize(str(folder / "float"), folder / "packed", method="rtn", scales="minmax")
    models = {FLOAT: AutoModelForCausalLM.from_pretrained(folder / "float", dtype=torch.float32).eval()}
    models[PACKED] = load_model(folder / "packed", device="cpu")
    setting = os.environ.get(small_batches.VARIABLE)
    os.environ[small_batches.VARIABLE] = "off"
    models[PIECES] = load_model(folder / "packed", device="cpu")  # has no int4 copy, whatever the variable is later
    del os.environ[small_batches.VARIABLE]
    if setting is not None:
        os.environ[small_batches.VARIABLE] = setting
    return models


def seconds_of_steps(model: Any, prompt: Tensor) -> list[tuple[float, float]]:
    """Prompt (1, T) int64 -> (wall, CPU) seconds of each of the `STEPS` single-token steps after it."""
    taken = []
    name = cache_argument(model)
    assert name is not None, "the model keeps no keys and values"
    out = model(prompt, use_cache=True)
    for step in range(WARM_UP + STEPS):
        wall, cpu = time.perf_counter(), time.process_time()
        token = out.logits[:, -1:].argmax(dim=-1)  # (1, 1)
        out = model(token, **{name: returned_cache(out)}, use_cache=True)
        if step >= WARM_UP:
            taken.append((time.perf_counter() - wall, time.process_time() - cpu))
    return taken


def measure(turns: int) -> dict[str, Any]:
    """Name -> tokens per second of the median step, and the spread of the steps."""
    prompt = torch.randint(0, SHAPE["vocab_size"], (1, PROMPT))
    seconds: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        models = make_models(Path(scratch))
        with torch.inference_mode():
            for turn in range(turns + 1):
                for name, model in models.items():
                    taken = seconds_of_steps(model, prompt)
                    if turn:
                        seconds.setdefault(name, []).extend(taken)
    return {name: _figures(steps) for name, steps in seconds.items()}


def _figures(steps: list[tuple[float, float]]) -> dict[str, Any]:
    wall, cpu = (Spread.of(list(values)) for values in zip(*steps, strict=True))
    return {
        "tokens_per_second": round(1 / wall.median, 2),
        "step_microseconds": wall.microseconds(),
        "step_cpu_microseconds": cpu.microseconds(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--note", default="", help="other load on the machine, for the record")
    arguments = parser.parse_args()
    quiet_transformers()
    torch.manual_seed(0)
    measured = measure(arguments.turns)
    packed, unquantized = measured[PACKED], measured[FLOAT]
    ratios = {
        "tokens_per_second": packed["tokens_per_second"] / unquantized["tokens_per_second"],
        "cpu": unquantized["step_cpu_microseconds"]["median"] / packed["step_cpu_microseconds"]["median"],
    }
    for name, figures in measured.items():
        spread = figures["step_microseconds"]
        steps = f"{spread['median']:.0f} µs per step (p10 {spread['p10']:.0f}, p90 {spread['p90']:.0f})"
        steps += f", CPU {figures['step_cpu_microseconds']['median']:.0f} µs"
        print(f"{name:>18}  {figures['tokens_per_second']:7.1f} tokens/s  {steps}")
    print(f"{PACKED} to {FLOAT}: {ratios['tokens_per_second']:.2f} times the tokens per second")
    print(f"by CPU time: {ratios['cpu']:.2f} times")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        ratios = {name: round(ratio, 3) for name, ratio in ratios.items()}
        record = {**stamp(arguments.note, 4), "shape": SHAPE, "prompt": PROMPT, "models": measured, "ratios": ratios}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
