"""Weight-only 4 bits in groups of 128 by torchao; the contract is in peer.py.

`--recipe intx` runs on CPUs (integers of any width), `hqq` is the same with searched scales. `int4`, the usual recipe,
and `gptq`, a prototype, store their weights in the layout of GPU kernels.
"""

import argparse
from pathlib import Path
from typing import Any

from environment import SHARED, SHARED_REQUIREMENTS
from peer import main, windows

NAME, REQUIREMENTS, PACKAGE = SHARED, SHARED_REQUIREMENTS, "torchao"
OPTIONS = [("--recipe", {"choices": ("intx", "hqq", "int4", "gptq"), "default": "intx"})]


def quantize(options: argparse.Namespace, packed: Path) -> None:
    import torch
    from torchao.prototype.gptq import GPTQConfig
    from torchao.quantization import Int4WeightOnlyConfig, quantize_
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    blocks = model.base_model.layers  # the head is kept in float
    if options.recipe == "gptq":
        quantize_(blocks, GPTQConfig(step="observe", base_config=Int4WeightOnlyConfig(group_size=options.group_size)))
        for window in windows(options.tokens):
            model(torch.tensor([window]))
        quantize_(blocks, GPTQConfig(step="convert", base_config=Int4WeightOnlyConfig(group_size=options.group_size)))
    elif options.recipe == "int4":
        quantize_(blocks, Int4WeightOnlyConfig(group_size=options.group_size))
    else:
        quantize_(blocks, _any_width(options))
    packed.mkdir()
    torch.save(model.state_dict(), packed / "model.pt")


def _any_width(options: argparse.Namespace) -> Any:
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup
    from torchao.quantization.quant_primitives import MappingType
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm as Search

    return IntxWeightOnlyConfig(
        weight_dtype=torch.int4,
        granularity=PerGroup(options.group_size),
        mapping_type=MappingType.ASYMMETRIC if options.asymmetric else MappingType.SYMMETRIC,
        intx_choose_qparams_algorithm=Search.HQQ_SCALE_ONLY if options.recipe == "hqq" else Search.AFFINE,
    )


def weights(options: argparse.Namespace, packed: Path) -> dict[str, Any]:
    import torch
    from plain import read_out
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.model), dtype=torch.float32)
    model.load_state_dict(torch.load(packed / "model.pt", weights_only=False), assign=True)
    return read_out(model, options.model)


if __name__ == "__main__":
    main(NAME, REQUIREMENTS, __file__, quantize, weights, OPTIONS)
