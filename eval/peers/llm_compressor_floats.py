"""NVFP4A16, NVFP4 and MXFP4A16 by llm-compressor: `eval/floats.py --llm-compressor PYTHON` starts this in that Python.

    PYTHON eval/peers/llm_compressor_floats.py MODEL TOKENS OUT SCHEME {rtn,gptq}

OUT becomes the folder that a user gets.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model, tokens, out, scheme, method = sys.argv[1:]
    if method == "rtn" and scheme.endswith("A16"):
        oneshot(
            model=model, recipe=QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"]),
            output_dir=out,
        )  # fmt: skip
        return
    windows = json.loads(Path(tokens).read_text(encoding="utf-8"))
    masks = [[1] * len(window) for window in windows]
    modifier = GPTQModifier if method == "gptq" else QuantizationModifier
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": windows, "attention_mask": masks}),
        recipe=modifier(targets="Linear", scheme=scheme, ignore=["lm_head"]),
        max_seq_length=len(windows[0]),
        num_calibration_samples=len(windows),
        output_dir=out,
    )


if __name__ == "__main__":
    main()
