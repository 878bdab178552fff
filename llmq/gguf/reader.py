"""A GGUF file as a model: its tensors under Hugging Face names, one block after the other.

What the writer changes is changed back: names, the order of q's and k's rows, norms stored as 1 + w, stacked experts.
So the same code that evaluates a folder evaluates a file, in float, from what the file says.

A file does say what its model is, in words of its own; transformers translates them for the architectures that it
knows.  The folder of the original says it better, as does a config.json beside the file.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmq.errors import FormatError, UnsupportedModelError
from llmq.gguf.architectures import architecture
from llmq.gguf.container import FLOATS, Container, dequantize
from llmq.gguf.names import Names, separate_halves
from llmq.gguf.writer import rotated_heads
from llmq.model.build import skeleton
from llmq.model.build.checkpoint_names import ModelWeights
from llmq.model.build.skeleton import Skeleton
from llmq.model.experts.separate import separate

__all__ = ["Container", "Weights", "dequantize", "described", "is_file", "open_skeleton"]

SUFFIX = ".gguf"


def is_file(path: Path) -> bool:
    """Whether a path names a GGUF file."""
    return path.suffix == SUFFIX


class Weights:
    """The tensors of a file by the names that they have in a Hugging Face checkpoint of the same model.

    `folder` holds the config.json of the model.  Raises UnsupportedModelError where the file is another architecture's.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.container = Container(path)
        self._config = skeleton.load_config(folder, remote_code=False).to_dict()
        self._arch = architecture(self._config)
        if self.container.architecture != self._arch.name:
            raise UnsupportedModelError(
                f"{path} holds a model of llama.cpp's architecture {self.container.architecture}, and {folder} "
                f"describes one of {self._arch.name}",
                hint="compare a file with the model that it was made from",
            )
        self._names = Names(self._arch.name, self._config["num_hidden_layers"])

    def __contains__(self, name: object) -> bool:
        place = self._names.place(name) if isinstance(name, str) else None
        return place is not None and place.name in self.container.tensors

    def tensor(self, name: str) -> Tensor:
        """A tensor, float32, as transformers wants it."""
        place = self._names.place(name)
        found = self.container.floats(place.name if place else name, place.expert if place else None)
        if place is None:
            return found
        if self._arch.interleaved and (heads := rotated_heads(place.name, self._config)):
            found = torch.from_numpy(separate_halves(found.numpy(), heads)).contiguous()
        if place.name.endswith("_norm.weight"):
            found = found - self._arch.norm_offset
        return found

    def kind(self, name: str) -> str:
        """The GGUF type of a tensor."""
        place = self._names.place(name)
        return self.container.info(place.name if place else name).kind

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor is stored as codes and not in float."""
        return self.kind(name) not in FLOATS

    def rows(self, name: str) -> NDArray[np.uint8]:
        """(N, bytes of a row) of a tensor, rows in the order in which transformers wants them."""
        place = self._names.place(name)
        found = self.container.rows(place.name if place else name, place.expert if place else None)
        if place and self._arch.interleaved and (heads := rotated_heads(place.name, self._config)):
            return np.ascontiguousarray(separate_halves(found, heads)).view(np.uint8)
        return found

    def weight(self, module: str) -> Tensor:
        """(N, K) float32 of a module."""
        return self.tensor(f"{module}.weight")

    def shape(self, module: str) -> tuple[int, ...]:
        """That of a module's weight, without reading it."""
        place = self._names.place(f"{module}.weight")
        if place is None:
            raise FormatError(f"{self.container.path} has no place for {module}.weight")
        shape = self.container.info(place.name).shape
        return shape if place.expert is None else shape[1:]

    def experts(self) -> list[str]:
        """The modules that the stacked experts may be in a checkpoint: by all the names that are in use for them."""
        return [
            module
            for name, info in self.container.tensors.items()
            if len(info.shape) == 3
            for module in self._names.expert_modules(name, info.shape[0])
        ]


def open_skeleton(path: Path, device: torch.device, dtype: torch.dtype, like: Path | None) -> Skeleton:
    """The model in a file, its blocks read and computed one at a time; `like` is the folder of its original, if known.

    Raises CheckpointError, FormatError, UnsupportedModelError.
    """
    with described(path, like) as folder:
        stored = Weights(path, folder)
        model = skeleton.build(folder, dtype=dtype, remote_code=False)
    weights = ModelWeights(model, stored.tensor, stored.__contains__, quantized=stored.is_quantized)
    separate(model, weights, stored.experts(), stored.shape, _no_member)
    return Skeleton(model, weights, device)


@contextmanager
def described(path: Path, like: Path | None = None) -> Iterator[Path]:
    """A folder with the config.json and the tokenizer of the model in a file, for as long as the block lasts.

    It is the original's; else the one that the file lies in, if it has a config.json; else one that transformers makes
    of what the file says.  The folder of a model is its own.
    """
    if not is_file(path):
        yield path
    elif like is not None and not is_file(like):
        yield like
    elif (path.parent / "config.json").is_file():
        yield path.parent
    else:
        with tempfile.TemporaryDirectory() as made:
            _translate(path, Path(made))
            yield Path(made)


def _no_member(name: str, expert: int) -> Tensor:
    raise FormatError(f"{name} is read expert by expert from a GGUF file")


def _translate(path: Path, folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    container = Container(path)  # which says what is wrong with a file better than transformers does
    if any(name.startswith("rope_") for name in container.tensors):
        raise UnsupportedModelError(
            f"{path} has factors of its rotation, and nothing says what made them",
            hint="put the original's config.json and tokenizer beside the file, or give the original with --against",
        )
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except Exception as error:  # an architecture, a tokenizer or a key that transformers does not know
        raise UnsupportedModelError(
            f"transformers cannot tell from {path} what model it holds: {error}",
            hint="put the original's config.json and tokenizer beside the file, or give the original with --against",
        ) from error
    if head := container.value(f"{container.architecture}.attention.key_length"):
        config.head_dim = head  # transformers takes its own default for some architectures
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
