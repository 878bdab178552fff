"""Write the result of a peer as a plain float32 checkpoint; runs in the environment of the peer.

The results of all peers are evaluated by the same code on the same kind of file: a float32 checkpoint in which the
linear layers of the blocks are dequantized by the peer, and everything else is the original. A weight is read from a
layer by multiplying with the identity matrix, so this file does not depend on any packing.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = "model.safetensors"


def tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield the name and tensor of everything in a checkpoint."""
    from safetensors.torch import load_file

    for file in sorted(folder.glob("*.safetensors")):
        yield from load_file(file).items()


def linears(folder: Path) -> list[str]:
    """Names of the linear layers in the blocks: the matrices in a numbered block."""
    names = [name for name, tensor in tensors(folder) if tensor.ndim == 2 and re.search(r"\.\d+\..*\.weight$", name)]
    return sorted(name.removesuffix(".weight") for name in names)


def read_out(model: Any, folder: Path) -> dict[str, Any]:
    """Name -> (N, K) float32 of the linear layers of `model`, the quantized checkpoint of `folder`."""
    import torch

    shapes = {name: tensor.shape for name, tensor in tensors(folder)}
    weights = {}
    with torch.no_grad():
        for name in linears(folder):
            layer, columns = model.get_submodule(name), shapes[f"{name}.weight"][1]
            dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
            product = layer(torch.eye(columns, dtype=dtype))  # (K, N)
            bias = getattr(layer, "bias", None)
            weights[f"{name}.weight"] = (product if bias is None else product - bias).float().T.contiguous()
    return weights


def others(model: Any, folder: Path) -> dict[str, Any]:
    """Name -> float32 of the norms and biases in the blocks of `model`, the quantized checkpoint of `folder`."""
    names = {name for name, tensor in tensors(folder) if tensor.ndim == 1 and re.search(r"\.\d+\.", name)}
    return {name: tensor.detach().float() for name, tensor in model.named_parameters() if name in names}


def write_plain(folder: Path, weights: dict[str, Any], out: Path) -> None:
    """The checkpoint of `folder` in float32 at `out`, with `weights` instead of the original ones."""
    import torch
    from safetensors.torch import save_file

    complete = {name: tensor.float() for name, tensor in tensors(folder)}
    missing = set(linears(folder)) - {name.removesuffix(".weight") for name in weights}
    if missing:
        raise ValueError(f"the peer returned no weights for {sorted(missing)}")
    for name, weight in weights.items():
        if weight.shape != complete[name].shape or not torch.isfinite(weight).all():
            raise ValueError(f"{name}: {tuple(weight.shape)}, expected {tuple(complete[name].shape)} finite values")
        complete[name] = weight.detach().float().contiguous().clone()
    out.mkdir(parents=True, exist_ok=True)
    save_file(complete, out / NAME, metadata={"format": "pt"})
    for file in folder.glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copyfile(file, out / file.name)
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2))
