"""HQQ (Badri and Shaji 2023) with its defaults for 4 bits, groups of 128 along the inputs; the contract is in peer.py.

It needs no calibration text. Its zero points are floats, so no integer format can hold its results.
"""

import argparse
from pathlib import Path
from typing import Any

from environment import SHARED, SHARED_REQUIREMENTS
from peer import main

NAME, REQUIREMENTS, PACKAGE = SHARED, SHARED_REQUIREMENTS, "hqq"


def quantize(options: argparse.Namespace, packed: Path) -> None:
    import torch
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    settings = BaseQuantizeConfig(nbits=4, group_size=options.group_size, axis=1)
    AutoHQQHFModel.quantize_model(model, quant_config=settings, compute_dtype=torch.float32, device="cpu")
    AutoHQQHFModel.save_quantized(model, str(packed))


def weights(options: argparse.Namespace, packed: Path) -> dict[str, Any]:
    import torch
    from hqq.models.hf.base import AutoHQQHFModel
    from plain import read_out

    read = AutoHQQHFModel.from_quantized(str(packed), compute_dtype=torch.float32, device="cpu")
    return read_out(read, options.model)


if __name__ == "__main__":
    main(NAME, REQUIREMENTS, __file__, quantize, weights)
