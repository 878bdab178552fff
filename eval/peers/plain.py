"""What a peer made, as weights that anybody can read: runs inside the peer's environment.

The outcome of every peer is measured by the same code on the same kind of file, a float32 checkpoint in which the
linear layers of the blocks hold what the peer's own arithmetic makes of its codes, and everything else is the
original's.  The weight is read out of a layer by multiplying with the identity matrix, so this file knows no packing.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = "model.safetensors"


def tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Name and tensor of everything in a checkpoint."""
    from safetensors.torch import load_file

    for file in sorted(folder.glob("*.safetensors")):
        yield from load_file(file).items()


def linears(folder: Path) -> list[str]:
    """Names of the block's linear layers: the matrices that lie under a numbered block."""
    found = [name for name, tensor in tensors(folder) if tensor.ndim == 2 and re.search(r"\.\d+\..*\.weight$", name)]
    return sorted(name.removesuffix(".weight") for name in found)


def read_out(model: Any, folder: Path) -> dict[str, Any]:
    """Name -> (N, K) float32 of the linear layers of `model`, the peer's form of the checkpoint in `folder`."""
    import torch

    shapes = {name: tensor.shape for name, tensor in tensors(folder)}
    found = {}
    with torch.no_grad():
        for name in linears(folder):
            layer, columns = model.get_submodule(name), shapes[f"{name}.weight"][1]
            dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
            product = layer(torch.eye(columns, dtype=dtype))  # (K, N)
            bias = getattr(layer, "bias", None)
            found[f"{name}.weight"] = (product if bias is None else product - bias).float().T.contiguous()
    return found


def write_plain(folder: Path, weights: dict[str, Any], out: Path) -> None:
    """The checkpoint of `folder` in float32 at `out`, with `weights` in the place of its own."""
    import torch
    from safetensors.torch import save_file

    whole = {name: tensor.float() for name, tensor in tensors(folder)}
    missing = set(linears(folder)) - {name.removesuffix(".weight") for name in weights}
    if missing:
        raise ValueError(f"the peer returned no weights for {sorted(missing)}")
    for name, weight in weights.items():
        if weight.shape != whole[name].shape or not torch.isfinite(weight).all():
            raise ValueError(f"{name}: {tuple(weight.shape)}, expected {tuple(whole[name].shape)} finite numbers")
        whole[name] = weight.detach().float().contiguous().clone()
    out.mkdir(parents=True, exist_ok=True)
    save_file(whole, out / NAME, metadata={"format": "pt"})
    for file in folder.glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copyfile(file, out / file.name)
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2))
