"""Open a quantized checkpoint: as a transformers model that runs packed, or as plain float weights.

The module tree is built on meta; each linear layer that the file holds packed is replaced by a `PackedLinear`, packed
experts by `PackedExperts`, and the rest is read as it is.  At no time is there a full-precision copy of more than one
layer.  Layers that are fed the same tensor run as one (`fuse.py`).
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from llmq import formats
from llmq.checkpoint import hub
from llmq.checkpoint.reader import Checkpoint
from llmq.config import Scheme
from llmq.errors import BackendError, CheckpointError, FormatError
from llmq.formats import Reading
from llmq.model import skeleton
from llmq.model.block import is_plain_linear
from llmq.model.weights import ModelWeights
from llmq.quantized import QuantizedTensor
from llmq.runtime.experts import fill_experts, pack_experts
from llmq.runtime.fuse import fuse_rows, shared_inputs
from llmq.runtime.linear import PackedLinear
from llmq.runtime.stacking import Stacking, all_packed, find_stackings, stackings_of

MODEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class PackedWeights:
    """The packed weights of a checkpoint, read one at a time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        settings = quantization_settings(checkpoint)
        if settings is None:
            raise FormatError(f"{checkpoint.folder} is not quantized: its config.json has no quantization_config")
        self._checkpoint = checkpoint
        self._layout = formats.detect(settings)
        self._reading = self._layout.read_config(settings)
        self.modules = checkpoint.modules_with(self._layout.CODES)

    def read(self, module: str) -> QuantizedTensor:
        """One module's weight, by its name in the checkpoint."""
        reading = self._how(module)
        names = {suffix: f"{module}.{suffix}" for suffix in self._layout.SUFFIXES}
        tensors = {s: self._checkpoint.tensor(n) for s, n in names.items() if n in self._checkpoint}
        try:
            return self._layout.unpack(tensors, reading)
        except FormatError as error:
            raise FormatError(f"{module}: {error}", hint=error.hint) from error

    def scheme(self, module: str) -> Scheme:
        """The grid of a module's weight, from config.json alone."""
        return self._how(module).scheme

    def shape(self, module: str) -> tuple[int, int]:
        """(N, K) of a module's weight, packed or not, without reading it."""
        if f"{module}.weight" in self._checkpoint:
            N, K = self._checkpoint.info(f"{module}.weight").shape
            return N, K
        names = {suffix: f"{module}.{suffix}" for suffix in self._layout.SUFFIXES}
        shapes = {
            suffix: self._checkpoint.info(name).shape for suffix, name in names.items() if name in self._checkpoint
        }
        return self._layout.weight_shape(
            shapes, self._how(module), lambda suffix: self._checkpoint.tensor(names[suffix])
        )

    def _how(self, module: str) -> Reading:
        reading = self._reading(module)
        if reading is None:
            raise FormatError(f"{module} is packed, but config.json says that it is not quantized")
        return reading

    def stored_bytes(self, module: str) -> int:
        """What the module's weight takes on disk, scales and zeros and the rest of it counted."""
        names = [f"{module}.{suffix}" for suffix in self._layout.SUFFIXES]
        infos = [self._checkpoint.info(name) for name in names if name in self._checkpoint]
        return sum(info.stop - info.start for info in infos)


def quantization_settings(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The `quantization_config` of a checkpoint, or None where it is a float one."""
    settings = checkpoint.config.get("quantization_config")
    return settings if isinstance(settings, dict) else None


def load(
    path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    fuse: bool = True,
) -> tuple[Any, Any]:
    """A model, quantized or not, and its tokenizer, ready for `model.generate`.

    `path` is a folder or a Hub id.  `dtype` is that of activations and unpacked weights: by default the checkpoint's
    own, but float32 on a CPU, where half precision is slow.  With `fuse`, packed layers that are fed the same tensor
    (q, k and v; gate and up) run as one; without, each stays a `PackedLinear` of its own.  Raises CheckpointError,
    FormatError and UnsupportedModelError.
    """
    folder = hub.locate(str(path), revision, remote_code=trust_remote_code)
    tokenizer = load_tokenizer(folder, remote_code=trust_remote_code)
    model = load_model(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code, fuse=fuse)
    return model, tokenizer


def load_model(
    folder: Path,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    fuse: bool = True,
) -> Any:
    """The model alone, from a local folder; otherwise as `load`."""
    checkpoint = Checkpoint.open(folder)
    chosen = choose_device(device)
    if dtype is None:
        dtype = torch.float32 if chosen.type == "cpu" else stored_dtype(checkpoint)
    if quantization_settings(checkpoint) is None:
        from transformers import AutoModelForCausalLM

        skeleton.load_config(folder, remote_code=trust_remote_code)
        float_model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code)
        return float_model.to(chosen).eval()
    model = skeleton.build(folder, dtype=dtype, remote_code=trust_remote_code)
    _fill_packed(model, checkpoint, chosen, fuse=fuse)
    _restore_generation(model, folder)
    return model


def dequantize(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """`(name, weight)` for every quantized weight: (N, K) float32, under the name that it had before."""
    packed = PackedWeights(Checkpoint.open(hub.locate(str(path), None)))
    for module in packed.modules:
        yield f"{module}.weight", packed.read(module).dequantize()


def load_tokenizer(folder: Path, *, remote_code: bool) -> Any:
    """The checkpoint's tokenizer; raises CheckpointError where there is none."""
    from transformers import AutoTokenizer

    hint = "copy tokenizer.json and tokenizer_config.json from the original model into the folder"
    if not any(
        (folder / name).is_file()
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    ):
        raise CheckpointError(f"{folder} has no tokenizer", hint=hint)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=remote_code)
    except Exception as error:  # every tokenizer class fails in its own way
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}", hint=hint) from error


def choose_device(asked: str | torch.device) -> torch.device:
    """`auto`, `cpu` or `cuda[:N]` as a device that is there."""
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise BackendError(f"there is no device {asked!r}", hint="use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise BackendError(f"llmq does not run on {device.type}", hint="use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackendError(
            f"{asked} is not there: torch sees {torch.cuda.device_count()} CUDA devices", hint="use --device cpu"
        )
    return device


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that config.json names, else that of the checkpoint's first float tensor."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    dtype = getattr(torch, named, None) if isinstance(named, str) else None
    if dtype in MODEL_DTYPES:
        return cast(torch.dtype, dtype)
    found = (checkpoint.info(name).dtype for name in checkpoint.names())
    return next((dtype for dtype in found if dtype in MODEL_DTYPES), torch.float32)


def _fill_packed(model: nn.Module, checkpoint: Checkpoint, device: torch.device, *, fuse: bool) -> None:
    packed = PackedWeights(checkpoint)
    waiting = set(packed.modules)
    weights = ModelWeights(model, checkpoint.tensor, checkpoint.__contains__)
    complete = _groups_by_last(model, weights, waiting) if fuse else {}
    stackings = find_stackings(model, [*packed.modules, *checkpoint.modules_with("weight")], packed.shape)
    for path, module in list(model.named_modules()):
        name = next((candidate for candidate in weights.candidates(path) if candidate in waiting), None)
        if name is not None and is_plain_linear(module):
            bias = checkpoint.tensor(f"{name}.bias").to(module.weight.dtype) if module.bias is not None else None
            model.set_submodule(path, PackedLinear(packed.read(name), bias).to(device))
            waiting.discard(name)
            fuse_rows(model, complete.get(path, ()))
        elif own := stackings_of(path, module, stackings):
            _fill_experts(model, path, own, packed, waiting, weights, device)
        else:
            weights.fill(path, module, device)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.prepare()
    if waiting:
        raise FormatError(
            f"the model has no linear layer for {sorted(waiting)[0]} ({len(waiting)} packed weights left over)"
        )
    tie: Callable[[], None] = model.tie_weights  # type: ignore[assignment]
    tie()
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:  # torch computes garbage with those, without a word
        raise CheckpointError(f"no tensor of the checkpoint is for {empty[0]} ({len(empty)} in all)")


def _fill_experts(
    model: nn.Module,
    path: str,
    stackings: Sequence[Stacking],
    packed: PackedWeights,
    waiting: set[str],
    weights: ModelWeights,
    device: torch.device,
) -> None:
    """Fill or pack the experts at `path`; what goes there waits no longer."""
    experts = model.get_submodule(path)
    if all_packed(path, stackings, waiting):
        model.set_submodule(path, pack_experts(path, experts, stackings, packed.read, weights, device))
        waiting.difference_update(*(stacking.modules() for stacking in stackings))
    else:
        fill_experts(path, experts, stackings, weights, device)


def _groups_by_last(model: nn.Module, weights: ModelWeights, packed: Collection[str]) -> dict[str, list[str]]:
    """The groups of layers that share an input, each under the path of the one that is filled last."""
    order = {
        path: position
        for position, (path, module) in enumerate(model.named_modules())
        if any(candidate in packed for candidate in weights.candidates(path)) and is_plain_linear(module)
    }
    return {max(group, key=order.__getitem__): group for group in shared_inputs(model, order)}


def _restore_generation(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
