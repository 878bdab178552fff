"""A model in an ONNX file, run by ONNX Runtime on a CPU.

The graph is one that `llmq convert --to onnx` writes: tokens, positions, and keys and values of earlier tokens go in;
logits, and keys and values of all tokens come out.
"""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmq.checkpoint.index import ONNX_FILE, read_json_object
from llmq.checkpoint.output_folder import CONFIG
from llmq.errors import BackendError, FormatError

PACKAGE = "onnxruntime"
BEFORE, AFTER = "input.", "output."  # prefixes of a cached tensor before and after a run
LOGITS = "logits"
ERRORS_ONLY = 3  # severity in the log of ONNX Runtime

Arrays = Mapping[str, NDArray[Any]]


def is_installed() -> bool:
    """Whether this Python has ONNX Runtime."""
    return importlib.util.find_spec(PACKAGE) is not None


class OnnxModel:
    """A graph in ONNX Runtime.

    engine      name and version
    vocabulary  the number of tokens
    """

    def __init__(self, folder: Path) -> None:
        """Raises BackendError if ONNX Runtime is not installed, FormatError if it cannot run the file."""
        if not is_installed():
            raise BackendError(f"{folder} needs {PACKAGE}, which is not installed", hint=f"pip install {PACKAGE}")
        import onnxruntime

        self.engine = f"{PACKAGE} {onnxruntime.__version__}"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        if threads := os.environ.get("OMP_NUM_THREADS"):  # it counts all cores of the machine otherwise
            options.intra_op_num_threads = int(threads)
        try:
            self._session = onnxruntime.InferenceSession(
                str(folder / ONNX_FILE), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime has one class for each kind of error
            raise FormatError(
                f"{self.engine} cannot open {folder / ONNX_FILE}: {error}", hint="convert the model again"
            ) from error
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._refuse_unknown(folder)
        self.vocabulary = int(self._session.get_outputs()[self._outputs.index(LOGITS)].shape[-1])
        self._window = _sliding_window(folder)

    def _refuse_unknown(self, folder: Path) -> None:
        known = {"input_ids", "position_ids", "attention_mask"}
        unknown = [name for name in self._inputs if name not in known and not name.startswith(BEFORE)]
        if unknown or LOGITS not in self._outputs:
            what = f"the input {unknown[0]}" if unknown else f"no output {LOGITS}"
            raise FormatError(
                f"{folder / ONNX_FILE} has {what}, expected a graph of llmq convert --to onnx",
                hint="convert the model with llmq",
            )

    def run(self, tokens: NDArray[np.int64], past: Arrays | None = None, start: int = 0) -> tuple[Any, Arrays]:
        """Logits (B, T, V) float32 of tokens (B, T), and the cache for tokens that follow them.

        past   the cache after `start` earlier tokens; None if there are none
        """
        B, T = tokens.shape
        feed: dict[str, NDArray[Any]] = {"input_ids": tokens}
        if "position_ids" in self._inputs:
            feed["position_ids"] = np.broadcast_to(np.arange(start, start + T), (B, T)).copy()
        if "attention_mask" in self._inputs:
            feed["attention_mask"] = np.ones((B, start + T), np.int64)
        feed |= self._empty(B) if past is None else past
        outputs = dict(zip(self._outputs, self._session.run(None, feed), strict=True))
        cache = {name: outputs[AFTER + name.removeprefix(BEFORE)] for name in self._inputs if name.startswith(BEFORE)}
        return outputs[LOGITS], cache

    def _empty(self, batch: int) -> dict[str, NDArray[Any]]:
        """The cache before any token: the first of its sizes is the batch, other variable sizes are lengths.

        A number in the cache is the length of the sliding window, which transformers keeps there.
        """
        cache = {}
        for name, value in self._inputs.items():
            if name.startswith(BEFORE) and value.shape:
                sizes = [0 if isinstance(size, str) else size for size in value.shape[1:]]
                cache[name] = np.zeros([batch, *sizes], np.float32)
            elif name.startswith(BEFORE):
                cache[name] = np.array(self._window, np.int64)
        return cache


def _sliding_window(folder: Path) -> int:
    """The number of tokens in config.json that layers with a sliding window attend to; 0 if there is none."""
    config = read_json_object(folder / CONFIG)
    inner = config.get("text_config")
    window = (inner if isinstance(inner, dict) else config).get("sliding_window")
    return window if isinstance(window, int) else 0
