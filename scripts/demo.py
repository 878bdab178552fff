"""Quantize the bundled model with three methods, measure each against the original, let the last one write.

    python scripts/demo.py FOLDER        the folder is made anew; bash scripts/demo.sh prepares the environment

Text for calibration and for measuring comes from the standard library of the running Python (`stdlib_text.py`), from
files that are kept apart.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

import torch
from stdlib_text import write_texts

import llmq
from llmq.cli.terminal import megabytes, print_table, quiet_transformers
from llmq.evaluation.measure import Measurement, measure

MODEL = Path(__file__).resolve().parents[1] / "eval" / "models" / "tiny-python-llama"
METHODS = ("rtn", "gptq", "balanced")
PROMPT = 'def read_lines(path):\n    """Return'
WINDOWS = 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    quiet_transformers()
    start = time.monotonic()
    calibration, held_out = write_texts(folder / "text")
    found = {method: quantize_and_measure(method, folder / method, calibration, held_out) for method in METHODS}
    print_results(found)
    print_writing(folder / METHODS[-1])
    print(f"\nThe 4-bit models are in {folder}/{{{','.join(METHODS)}}}, the text in {folder}/text.")
    print(f"Done in {time.monotonic() - start:.0f} seconds.")


def quantize_and_measure(method: str, out: Path, calibration: Path, held_out: Path) -> Measurement:
    """One method, measured on the file that it wrote."""
    shutil.rmtree(out, ignore_errors=True)
    print(f"quantizing to 4 bits with {method} …", file=sys.stderr, flush=True)
    llmq.quantize(str(MODEL), out, method=method, calibration=[str(calibration)], samples=160, seqlen=256)
    print(f"measuring {method} against the original …", file=sys.stderr, flush=True)
    return measure(out, MODEL, str(held_out), seqlen=256, limit=WINDOWS)


def print_results(found: dict[str, Measurement]) -> None:
    any_method = next(iter(found.values()))
    original, size = any_method.original, any_method.original_size
    assert original is not None and size is not None, "measured against the original"
    rows = [("float (bf16)", megabytes(size.file_bytes), "16", f"{original.perplexity:.3f}", "0", "100 %")]
    for method, measured in found.items():
        figures = measured.model
        rows.append(
            (
                f"4-bit {method}",
                megabytes(measured.size.file_bytes),
                f"{measured.size.bits_per_weight:.2f}",
                f"{figures.perplexity:.3f}",
                f"{figures.kl_mean:.4f}",
                f"{figures.same_top_1:.1%}",
            )
        )
    columns = ("model", "size", "bits per weight", "perplexity", "KL divergence", "same top token")
    print_table(f"{MODEL.name} on held-out text, {any_method.model.tokens} tokens", columns, rows)


def print_writing(path: Path) -> None:
    model, tokenizer = llmq.load(path)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    start = time.monotonic()
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=64, do_sample=False, repetition_penalty=1.1)
    written = output.shape[1] - inputs["input_ids"].shape[1]
    print(f"\nThe {path.name} model continues, at {written / (time.monotonic() - start):.0f} tokens per second:\n")
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
