"""Read a GGUF file as a model: its tensors with Hugging Face names, one block after the other.

The changes of the writer are reversed: names, the order of rows, values (`changes.py`), stacked experts.
So the code that evaluates a folder can also evaluate a file, dequantized to float.

A file describes its model with keys of GGUF, which transformers translates for the architectures that it knows.  The
folder of the original model is a better description, and so is a config.json next to the file.
"""

import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmq.errors import FormatError, UnsupportedModelError
from llmq.formats.codecs import gguf_blocks
from llmq.gguf.architecture import FULL
from llmq.gguf.architectures import ARCHITECTURES
from llmq.gguf.changes import in_columns, undone
from llmq.gguf.container import FLOATS, Container, dequantize
from llmq.gguf.metadata import add_sizes
from llmq.gguf.names import Names, Place
from llmq.gguf.rotation import from_settings
from llmq.gguf.supported import architecture, attention_scale, language_config
from llmq.model.build import skeleton
from llmq.model.build.checkpoint_names import ModelWeights
from llmq.model.build.skeleton import Skeleton
from llmq.model.experts.separate import separate

__all__ = ["Container", "Weights", "dequantize", "described", "is_file", "open_skeleton"]

SUFFIX = ".gguf"
ORIGINAL = "put config.json and tokenizer of the original next to the file, or give the original with --against"
NEUTRAL: tuple[tuple[str, Any], ...] = (
    ("rope.scaling.type", "none"),
    ("rope.scaling.factor", 1.0),
    ("rope.scaling.attn_factor", 1.0),
    ("rope.scaling.finetuned", False),
    ("attention.causal", True),
)
"""Keys with values that change nothing."""
SIZES: Mapping[str, str] = MappingProxyType(
    {
        "attention.key_length": "head_dim",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    }
)
"""Key -> entry of a configuration, where transformers uses a default instead for some architectures."""


def is_file(path: Path) -> bool:
    """Whether a path names a GGUF file."""
    return path.suffix == SUFFIX


class Weights:
    """The tensors of a file by their names in a Hugging Face checkpoint of the same model.

    `folder` holds the config.json of the model.  Raises UnsupportedModelError where the file has another architecture.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.container = Container(path)
        self._config = language_config(skeleton.load_config(folder, remote_code=False).to_dict())
        self._arch = architecture(self._config)
        if self.container.architecture != self._arch.name:
            raise UnsupportedModelError(
                f"{path} holds a model of llama.cpp's architecture {self.container.architecture}, and {folder} "
                f"describes one of {self._arch.name}",
                hint="give the model from which the file was made",
            )
        self._names = Names(self._arch, self._config)

    def __contains__(self, name: object) -> bool:
        place = self._names.place(name) if isinstance(name, str) else None
        return place is not None and place.name in self.container.tensors

    def tensor(self, name: str) -> Tensor:
        """A tensor, float32, as transformers expects it."""
        places = self._names.places(name) or (Place(name),)
        if (order := self._names.columns(places[0].name)) is not None:
            values = self.container.floats(places[0].name)
            return values[:, torch.from_numpy(np.argsort(order))]
        parts = [(place, self.container.floats(place.name, place.expert)) for place in places]
        if not self.is_quantized(name) and (value := self._names.value(places[0].name)) is not None:
            parts = [
                (place, torch.from_numpy(np.ascontiguousarray(value.backward(one.numpy())))) for place, one in parts
            ]
        orders = [(place.rows, one.numpy()) for place, one in parts if place.rows is not None]
        return torch.from_numpy(undone(orders)) if orders else parts[0][1]

    def require_read(self, names: Iterable[str]) -> None:
        """Raise FormatError for a tensor of the file in which none of the tensors `names` of the model is stored.

        Blocks after the last one, for multi-token prediction, and factors of a rotary embedding are left.
        """
        read = {place.name for places in map(self._names.places, names) for place in places}
        blocks = tuple(f"blk.{number}." for number in range(self._config["num_hidden_layers"]))
        for name in self.container.tensors:
            if name not in read and not name.startswith("rope_") and name.startswith((*blocks, "output", "token_embd")):
                raise FormatError(
                    f"the model does not use the tensor {name} of {self.container.path}: without it the model would "
                    "compute something else",
                    hint="check that config.json next to the file, or the given original, belongs to it",
                )

    def kind(self, name: str) -> str:
        """The GGUF type of a tensor."""
        place = self._names.place(name)
        return self.container.info(place.name if place else name).kind

    def size(self, name: str) -> int:
        """The number of elements of a tensor, or of those in the file from which it is taken."""
        places = self._names.places(name) or (Place(name),)
        shapes = [(self.container.info(place.name).shape, place.expert) for place in places]
        return sum(math.prod(shape if expert is None else shape[1:]) for shape, expert in shapes)

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor is stored as quantized values and not in float."""
        return self.kind(name) not in FLOATS

    def rows(self, name: str) -> NDArray[np.uint8]:
        """(N, bytes of a row) uint8 of a tensor, rows in the order that transformers expects."""
        places = self._names.places(name) or (Place(name),)
        if (order := self._names.columns(places[0].name)) is not None:
            block = gguf_blocks.SIZES[self.kind(name)][0]
            return in_columns(self.container.rows(places[0].name), np.argsort(order), block)
        parts = [(place.rows, self.container.rows(place.name, place.expert)) for place in places]
        orders = [(rows, raw) for rows, raw in parts if rows is not None]
        return undone(orders) if orders else parts[0][1]

    def weight(self, module: str) -> Tensor:
        """The weight of a module, (N, K) float32."""
        return self.tensor(f"{module}.weight")

    def shape(self, module: str) -> tuple[int, ...]:
        """The shape of a module's weight, without reading it."""
        place = self._names.place(f"{module}.weight")
        if place is None:
            raise FormatError(f"{self.container.path} has no place for {module}.weight")
        shape = self.container.info(place.name).shape
        return shape if place.expert is None else shape[1:]

    def experts(self) -> list[str]:
        """The modules of all stacked experts, by all names that checkpoints use for them."""
        return [
            module
            for name, info in self.container.tensors.items()
            if len(info.shape) == 3
            for module in self._names.expert_modules(name, info.shape[0])
        ]


def open_skeleton(path: Path, device: torch.device, dtype: torch.dtype, like: Path | None) -> Skeleton:
    """The model in a file, its blocks read and computed one at a time; `like` is the folder of the original, if known.

    Raises CheckpointError, FormatError, UnsupportedModelError.
    """
    with described(path, like) as folder:
        stored = Weights(path, folder)
        model = skeleton.build(folder, dtype=dtype, remote_code=False)
    weights = ModelWeights(model, stored.tensor, stored.__contains__, quantized=stored.is_quantized)
    separate(model, weights, stored.experts(), stored.shape, _no_member)
    names = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    stored.require_read(stored_name for name, _ in names if (stored_name := weights.stored_name(name)) is not None)
    return Skeleton(model, weights, device)


@contextmanager
def described(path: Path, like: Path | None = None) -> Iterator[Path]:
    """A folder with the config.json and the tokenizer of the model in `path`, available inside the `with` block.

    It is the folder `like` of the original model; else the folder of the file, if that has a config.json; else a
    temporary folder that transformers creates from the keys of the file.  If `path` is a folder, it is returned.
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
    raise FormatError(f"{name} can be read only as a whole expert from a GGUF file")


def _translate(path: Path, folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    container = Container(path)  # its errors for a damaged file are clearer than those of transformers
    if any(name.startswith("rope_") for name in container.tensors):
        raise UnsupportedModelError(
            f"{path} has factors of a rotary embedding, but no settings from which they were computed",
            hint=ORIGINAL,
        )
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except Exception as error:  # an architecture, a tokenizer or a key that transformers does not know
        raise UnsupportedModelError(
            f"transformers cannot read from {path} which model it holds: {error}",
            hint=ORIGINAL,
        ) from error
    _complete(config, container)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _complete(configuration: Any, container: Container) -> None:
    """Add the keys of a file that transformers does not translate to the configuration that it made.

    Raises UnsupportedModelError if llmq would still write other keys for this configuration than the file has: the
    configuration lacks something of the model, and predictions would differ without a message.
    """
    import gguf

    settings = container.settings()
    for key, entry in SIZES.items():
        if (size := settings.get(key)) and hasattr(configuration, entry):
            setattr(configuration, entry, size)
    _fix(configuration)
    rotation = configuration.rope_parameters
    rotation.get(FULL, rotation).update(from_settings(settings))
    config = language_config(configuration.to_dict())
    arch = architecture(config)
    writer = gguf.GGUFWriter(None, arch.name)
    add_sizes(writer, config, arch)
    written = {key.removeprefix(f"{arch.name}."): entry.value for key, entry in writer.kv_data[0].items()}
    for key, value in settings.items():
        unknown = key not in written and key.startswith(("rope.", "attention.", "expert"))
        if (unknown and (key, value) not in NEUTRAL) or (key in written and not _equal(written[key], value)):
            raise UnsupportedModelError(
                f"{container.path} has {key} = {value!r}, and the configuration that transformers makes of its keys "
                f"has {written.get(key, 'nothing like it')!r}",
                hint=ORIGINAL,
            )


def _fix(configuration: Any) -> None:
    """Give entries for which a file has no key the value that llama.cpp computes with."""
    config = language_config(configuration.to_dict())
    arch = ARCHITECTURES.get(str(config.get("model_type")))
    if arch is None:
        return
    if hasattr(configuration, "query_pre_attn_scalar"):
        configuration.query_pre_attn_scalar = int(attention_scale(arch, config))
    for entry, supported in arch.expects.items():
        if hasattr(configuration, entry) and getattr(configuration, entry) not in supported:
            setattr(configuration, entry, supported[0])


def _equal(written: Any, value: Any) -> bool:
    """Whether two values of a key are the same, up to float32."""
    if isinstance(value, int | float) and isinstance(written, int | float):
        return math.isclose(written, value, rel_tol=1e-6)
    return bool(written == value)
