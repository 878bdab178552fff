"""GPTQ by llm-compressor, its defaults, 4 bits in groups of 128.

    python eval/peers/llm_compressor_gptq.py MODEL TOKENS OUT

TOKENS is a JSON file of equally long lists of token ids.  Makes llm-compressor's own environment at the first call and
prints what the whole process takes.
"""

import json
import sys
from pathlib import Path

NAME, PACKAGE = "llm-compressor", "llmcompressor"
REQUIREMENTS = ["llmcompressor==0.14.0.1", "torch==2.13.0"]  # it takes torch up to 2.14; this is llmq's


def quantize(model: str, tokens: str, out: str) -> None:
    """The work itself, in the environment."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    windows = json.loads(Path(tokens).read_text())
    masks = [[1] * len(window) for window in windows]
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": windows, "attention_mask": masks}),
        recipe=GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"]),
        max_seq_length=len(windows[0]),
        num_calibration_samples=len(windows),
        output_dir=out,
    )


if __name__ == "__main__":
    if Path(sys.prefix).name == NAME:
        quantize(*sys.argv[1:])
    else:
        from peer import time_peer

        print(time_peer(NAME, REQUIREMENTS, Path(__file__), sys.argv[1:]))
