"""A model in an ONNX file, run by ONNX Runtime or OpenVINO on a CPU.

The graph is one that `llmq convert --to onnx` or the builder of onnxruntime-genai writes: tokens, positions or a mask,
and keys and values of earlier tokens go in; logits, and keys and values of all tokens come out.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llmq.checkpoint.index import ONNX_FILE, read_json_object
from llmq.checkpoint.output_folder import CONFIG
from llmq.errors import BackendError, ConfigError, FormatError
from llmq.runtime import ONNX_ENGINES, ONNXRUNTIME, OPENVINO

CACHED = (("input.", "output."), ("past_key_values.", "present."))  # prefixes of a cached tensor: before, after a run
TOKENS = ("input_ids", "position_ids", "attention_mask")
LOGITS = "logits"
ERRORS_ONLY = 3  # severity in the log of ONNX Runtime
AS_WRITTEN = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}  # of OpenVINO

Arrays = Mapping[str, NDArray[Any]]
Sizes = tuple[int | None, ...]  # None is a variable size


class Graph(Protocol):
    """A graph in an engine: its version, and the sizes of its inputs and outputs by their names."""

    version: str
    inputs: Mapping[str, Sizes]
    outputs: Mapping[str, Sizes]

    def __call__(self, feed: Arrays) -> Arrays: ...


class OnnxRuntimeGraph:
    """See `Graph`."""

    def __init__(self, file: Path, threads: int | None) -> None:
        import onnxruntime

        self.version = onnxruntime.__version__
        options = onnxruntime.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        if threads is not None:
            options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.inputs: Mapping[str, Sizes] = {value.name: _sizes(value.shape) for value in self._session.get_inputs()}
        self.outputs: Mapping[str, Sizes] = {value.name: _sizes(value.shape) for value in self._session.get_outputs()}

    def __call__(self, feed: Arrays) -> Arrays:
        return dict(zip(self.outputs, self._session.run(None, dict(feed)), strict=True))


class OpenVinoGraph:
    """See `Graph`. OpenVINO rounds the inputs of quantized products to 8 bits by default; here it computes floats."""

    def __init__(self, file: Path, threads: int | None) -> None:
        import openvino

        self.version = openvino.__version__.partition("-")[0]
        core = openvino.Core()
        settings = AS_WRITTEN if threads is None else {**AS_WRITTEN, "INFERENCE_NUM_THREADS": threads}
        self._model = core.compile_model(core.read_model(str(file)), "CPU", settings)
        self.inputs: Mapping[str, Sizes] = {
            value.any_name: _partial(value.partial_shape) for value in self._model.inputs
        }
        self.outputs: Mapping[str, Sizes] = {
            value.any_name: _partial(value.partial_shape) for value in self._model.outputs
        }

    def __call__(self, feed: Arrays) -> Arrays:
        outputs = self._model(dict(feed))
        return {value.any_name: outputs[value].copy() for value in self._model.outputs}


GRAPHS: dict[str, Callable[[Path, int | None], Graph]] = {ONNXRUNTIME: OnnxRuntimeGraph, OPENVINO: OpenVinoGraph}


def is_installed(engine: str = ONNXRUNTIME) -> bool:
    """Whether this Python has an engine."""
    return importlib.util.find_spec(engine) is not None


class OnnxModel:
    """A graph in an engine.

    engine      its name and version
    vocabulary  the number of tokens
    """

    def __init__(self, folder: Path, engine: str = ONNXRUNTIME) -> None:
        """Raises BackendError if the engine is not installed, FormatError if it cannot run the file."""
        if engine not in ONNX_ENGINES:
            raise ConfigError(f"engine is {engine!r}, expected one of {', '.join(ONNX_ENGINES)} for an ONNX model")
        if not is_installed(engine):
            raise BackendError(f"{folder} needs {engine}, which is not installed", hint=f"pip install {engine}")
        threads = os.environ.get("OMP_NUM_THREADS", "")  # engines count all cores of the machine otherwise
        try:
            self._graph: Graph = GRAPHS[engine](folder / ONNX_FILE, int(threads) if threads.isdecimal() else None)
        except Exception as error:  # each engine has several classes of errors
            raise FormatError(
                f"{engine} cannot open {folder / ONNX_FILE}: {error}", hint="convert the model again"
            ) from error
        self._cached = {name: after for name in self._graph.inputs if (after := _after(name)) is not None}
        self._refuse_unknown(folder)
        self.engine = f"{engine} {self._graph.version}"
        self.vocabulary = self._graph.outputs[LOGITS][-1] or 0
        config = language_config(folder)
        self._window = _number(config, "sliding_window")
        self._head_size = _number(config, "head_dim") or (
            _number(config, "hidden_size") // max(1, _number(config, "num_attention_heads"))
        )

    def _refuse_unknown(self, folder: Path) -> None:
        unknown = [name for name in self._graph.inputs if name not in TOKENS and name not in self._cached]
        if unknown or LOGITS not in self._graph.outputs:
            what = f"the input {unknown[0]}" if unknown else f"no output {LOGITS}"
            raise FormatError(
                f"{folder / ONNX_FILE} has {what}, expected a graph of llmq convert --to onnx",
                hint="convert the model with llmq, or with the builder of onnxruntime-genai",
            )

    def run(self, tokens: NDArray[np.int64], past: Arrays | None = None, start: int = 0) -> tuple[Any, Arrays]:
        """Logits (B, T, V) float32 of tokens (B, T), and the cache for tokens that follow them.

        past   the cache after `start` earlier tokens; None if there are none
        """
        B, T = tokens.shape
        positions = np.broadcast_to(np.arange(start, start + T), (B, T)).copy()
        given = dict(zip(TOKENS, (tokens, positions, np.ones((B, start + T), np.int64)), strict=True))
        feed = {name: given[name] for name in TOKENS if name in self._graph.inputs}
        try:
            outputs = self._graph({**feed, **(self._empty(B) if past is None else past)})
        except Exception as error:  # each engine has several classes of errors
            raise BackendError(
                f"{self.engine} failed: {error}", hint="check config.json, or convert the model again"
            ) from error
        return outputs[LOGITS], {name: outputs[after] for name, after in self._cached.items()}

    def _empty(self, batch: int) -> dict[str, NDArray[Any]]:
        """The cache before any token: the first of its sizes is the batch, other variable sizes are lengths.

        The last one is the size of a head, which onnxruntime-genai leaves variable. A number in the cache is the length
        of the sliding window, which transformers keeps there.
        """
        cache = {}
        for name in self._cached:
            first, *lengths = self._graph.inputs[name] or (None,)
            if not lengths:
                cache[name] = np.array(self._window, np.int64)
            else:
                sizes = [size or 0 for size in lengths[:-1]]
                cache[name] = np.zeros([first or batch, *sizes, lengths[-1] or self._head_size], np.float32)
        return cache


def language_config(folder: Path) -> dict[str, Any]:
    """The part of config.json about the language model; empty if the folder has no such file."""
    if not (folder / CONFIG).is_file():
        return {}
    config = read_json_object(folder / CONFIG)
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _number(config: Mapping[str, Any], key: str) -> int:
    """A number in config.json; 0 if there is none."""
    value = config.get(key)
    return value if isinstance(value, int) else 0


def _after(name: str) -> str | None:
    """The output that continues a cached input; None for an input that is not cached."""
    return next((after + name.removeprefix(before) for before, after in CACHED if name.startswith(before)), None)


def _sizes(shape: list[int | str | None]) -> Sizes:
    """The sizes of a tensor in ONNX Runtime, where variable ones have names."""
    return tuple(size if isinstance(size, int) else None for size in shape)


def _partial(shape: Any) -> Sizes:
    """The sizes of a tensor in OpenVINO."""
    return tuple(None if size.is_dynamic else size.get_length() for size in shape)
