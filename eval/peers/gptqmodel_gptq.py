"""GPTQ and GPTAQ by GPTQModel with its defaults, 4 bits; the contract is in peer.py.

`--gptaq` turns on the asymmetric target (Li et al. 2025), with the default strength of 0.25. `--search` is the recipe
for quality: columns in the order of activations, and scales with the least error (`mse=2.4`, from its documentation).
"""

import argparse
import os
from pathlib import Path
from typing import Any

from peer import main, windows

NAME, PACKAGE = "gptqmodel", "GPTQModel"
REQUIREMENTS = ["gptqmodel==7.7.0"]  # needs torch 2.14.1 or later
OPTIONS = [("--gptaq", {"action": "store_true"}), ("--search", {"action": "store_true"})]


def quantize(options: argparse.Namespace, packed: Path) -> None:
    # With two cores it chooses one worker, and then refuses to start with one.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import GPTAQConfig

    gptaq = GPTAQConfig() if options.gptaq else None
    quality = {"desc_act": True, "mse": 2.4} if options.search else {}
    settings = QuantizeConfig(bits=4, group_size=options.group_size, sym=not options.asymmetric, gptaq=gptaq, **quality)
    loaded = GPTQModel.load(str(options.model), settings)
    calibration = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows(options.tokens)]
    loaded.quantize(calibration)
    loaded.save(str(packed))


def weights(options: argparse.Namespace, packed: Path) -> dict[str, Any]:
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from plain import read_out

    # its CPU kernel supports only half precision
    return read_out(GPTQModel.load(str(packed), backend=BACKEND.TORCH, dtype=torch.float16).model, options.model)


if __name__ == "__main__":
    main(NAME, REQUIREMENTS, __file__, quantize, weights, OPTIONS)
