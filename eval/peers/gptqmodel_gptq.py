"""GPTQ by GPTQModel, its defaults, 4 bits in groups of 128.

    python eval/peers/gptqmodel_gptq.py MODEL TOKENS OUT

TOKENS is a JSON file of equally long lists of token ids.  Makes GPTQModel's own environment at the first call and
prints what the whole process takes.
"""

import json
import os
import sys
from pathlib import Path

NAME, PACKAGE = "gptqmodel", "GPTQModel"
REQUIREMENTS = ["gptqmodel==7.7.0"]  # it wants torch 2.14.1 or later


def quantize(model: str, tokens: str, out: str) -> None:
    """The work itself, in the environment."""
    os.environ.setdefault(
        "GPTQMODEL_CPU_WORKERS", "2"
    )  # with two cores it takes one, and then refuses to start with one
    from gptqmodel import GPTQModel, QuantizeConfig

    windows = json.loads(Path(tokens).read_text())
    loaded = GPTQModel.load(model, QuantizeConfig(bits=4, group_size=128))
    loaded.quantize([{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows])
    loaded.save(out)


if __name__ == "__main__":
    if Path(sys.prefix).name == NAME:
        quantize(*sys.argv[1:])
    else:
        from peer import time_peer

        print(time_peer(NAME, REQUIREMENTS, Path(__file__), sys.argv[1:]))
