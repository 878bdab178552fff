"""GPTQ by llm-compressor with its defaults, 4 bits; the contract is in peer.py.

`--observer imatrix_mse` searches for the scales with the least error, weighted by the mean square of each input.
"""

import argparse
from pathlib import Path
from typing import Any

from peer import main, windows

NAME, PACKAGE = "llm-compressor", "llmcompressor"
REQUIREMENTS = ["llmcompressor==0.14.0.1", "torch==2.13.0"]  # supports torch up to 2.14; this is the version of llmq

OPTIONS = [("--observer", {})]


def quantize(options: argparse.Namespace, packed: Path) -> None:
    from compressed_tensors.quantization import preset_name_to_scheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    tokens = windows(options.tokens)
    masks = [[1] * len(window) for window in tokens]
    scheme = preset_name_to_scheme("W4A16_ASYM" if options.asymmetric else "W4A16", ["Linear"])
    scheme.weights.group_size = options.group_size
    if options.observer:
        scheme.weights.observer = options.observer
    oneshot(
        model=str(options.model),
        dataset=Dataset.from_dict({"input_ids": tokens, "attention_mask": masks}),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        max_seq_length=len(tokens[0]),
        num_calibration_samples=len(tokens),
        output_dir=str(packed),
    )


def weights(options: argparse.Namespace, packed: Path) -> dict[str, Any]:
    import torch
    from plain import read_out
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    settings = CompressedTensorsConfig(dequantize=True)
    read = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32, quantization_config=settings)
    return read_out(read, options.model)


if __name__ == "__main__":
    main(NAME, REQUIREMENTS, __file__, quantize, weights, OPTIONS)
