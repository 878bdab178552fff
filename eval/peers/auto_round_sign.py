"""AutoRound (Cheng et al. 2023) with its defaults, 4 bits; the contract is in peer.py.

`--iterations 200` is its default recipe, 1000 the best one according to its documentation; `--extension` turns on its
algorithm extension, and `--algorithms awq,signround` combines algorithms. All use the same tokens as all other tools.
AutoRound packs asymmetric grids like AWQ, for which it has no CPU layer: for these, its rounded floats before packing
are used. AWQ folds scales into the norms, so everything in the blocks is read back and not only the linear layers.
"""

import argparse
from pathlib import Path
from typing import Any

from peer import main, windows

NAME, PACKAGE = "auto-round", "auto-round"
REQUIREMENTS = ["auto-round==0.16.1", "torch==2.13.0"]
OPTIONS = [
    ("--iterations", {"type": int, "default": 200}),
    ("--algorithms", {"default": "signround"}),
    ("--extension", {"action": "store_true"}),
]


def quantize(options: argparse.Namespace, packed: Path) -> None:
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = torch.tensor(windows(options.tokens))  # (S, L)
    AutoRound(
        AutoModelForCausalLM.from_pretrained(options.model),
        AutoTokenizer.from_pretrained(options.model),
        alg_configs=options.algorithms,
        bits=4,
        group_size=options.group_size,
        sym=not options.asymmetric,
        iters=options.iterations,
        enable_alg_ext=options.extension,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        dataset=list(tokens.split(8)),  # its default batch
    ).quantize_and_save(str(packed), format="fake" if options.asymmetric else "auto_round")


def weights(options: argparse.Namespace, packed: Path) -> dict[str, Any]:
    import torch
    from plain import linears, others, read_out, tensors
    from transformers import AutoModelForCausalLM

    folder = next(packed.rglob("config.json")).parent
    if options.asymmetric:
        stored, wanted = dict(tensors(folder)), linears(options.model)
        return {f"{name}.weight": stored[f"{name}.weight"] for name in wanted}
    read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return read_out(read, options.model) | others(read, options.model)


if __name__ == "__main__":
    main(NAME, REQUIREMENTS, __file__, quantize, weights, OPTIONS)
