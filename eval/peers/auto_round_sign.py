"""AutoRound (Cheng et al. 2023), its defaults, 4 bits in groups of 128; the contract is in peer.py.

`--iterations 200` is its default recipe, 1000 what its documents call best; both on the same tokens as everybody.
Asymmetric grids it packs as AWQ does, for which it has no layer on a CPU: there its own rounded floats are taken, from
before packing.
"""

import argparse
from pathlib import Path
from typing import Any

from peer import main, windows

NAME, PACKAGE = "auto-round", "auto-round"
REQUIREMENTS = ["auto-round==0.16.1", "torch==2.13.0"]
OPTIONS = [("--iterations", {"type": int, "default": 200})]


def quantize(asked: argparse.Namespace, packed: Path) -> None:
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = torch.tensor(windows(asked.tokens))  # (S, L)
    AutoRound(
        AutoModelForCausalLM.from_pretrained(asked.model),
        AutoTokenizer.from_pretrained(asked.model),
        bits=4,
        group_size=128,
        sym=not asked.asymmetric,
        iters=asked.iterations,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        dataset=list(tokens.split(8)),  # its default batch
    ).quantize_and_save(str(packed), format="fake" if asked.asymmetric else "auto_round")


def weights(asked: argparse.Namespace, packed: Path) -> dict[str, Any]:
    import torch
    from plain import linears, read_out, tensors
    from transformers import AutoModelForCausalLM

    folder = next(packed.rglob("config.json")).parent
    if asked.asymmetric:
        stored, wanted = dict(tensors(folder)), linears(asked.model)
        return {f"{name}.weight": stored[f"{name}.weight"] for name in wanted}
    return read_out(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), asked.model)


if __name__ == "__main__":
    main(NAME, REQUIREMENTS, __file__, quantize, weights, OPTIONS)
