"""GPTQ and GPTAQ by GPTQModel, its defaults, 4 bits in groups of 128; the contract is in peer.py.

`--gptaq` turns on its asymmetric target (Li et al. 2025), with its default strength of 0.25.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from peer import main, windows

NAME, PACKAGE = "gptqmodel", "GPTQModel"
REQUIREMENTS = ["gptqmodel==7.7.0"]  # it wants torch 2.14.1 or later
OPTIONS = [("--gptaq", {"action": "store_true"})]


def quantize(asked: argparse.Namespace, packed: Path) -> None:
    # With two cores it takes one, and then refuses to start with one.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import GPTAQConfig

    gptaq = GPTAQConfig() if asked.gptaq else None
    settings = QuantizeConfig(bits=4, group_size=128, sym=not asked.asymmetric, gptaq=gptaq)
    loaded = GPTQModel.load(str(asked.model), settings)
    calibration = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows(asked.tokens)]
    loaded.quantize(calibration)
    loaded.save(str(packed))


def weights(asked: argparse.Namespace, packed: Path) -> dict[str, Any]:
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from plain import read_out

    # its kernel for CPUs takes only half precision
    return read_out(GPTQModel.load(str(packed), backend=BACKEND.TORCH, dtype=torch.float16).model, asked.model)


if __name__ == "__main__":
    main(NAME, REQUIREMENTS, __file__, quantize, weights, OPTIONS)
