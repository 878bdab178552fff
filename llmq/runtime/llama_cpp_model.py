"""The logits of a .gguf file as llama.cpp computes them, through the library in the package xllamacpp.

Its server gives probabilities of one position per request.  So the functions of llama.h are called directly, with all
positions of a sequence in one batch.  Parameters are structures that are passed by value, whose later fields change
between versions: they are opaque bytes here, that one function fills and another one reads.  A longer buffer works like
the structure where it is the last argument.  Only the first two fields of a context, n_ctx and n_batch, are set, and
llama.cpp is asked afterwards whether it has taken them.
"""

import collections
import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmq.errors import BackendError, FormatError

MODULE, LIBRARY = "xllamacpp", "xllamacpp.xllamacpp"
LOGGED, WARNINGS = 6, 3  # messages that an error shows, of this level and above
_messages: collections.deque[str] = collections.deque(maxlen=LOGGED)


class _Parameters(ctypes.Structure):
    """A structure with unknown fields, of at most this many bytes."""

    _fields_ = (("fields", ctypes.c_uint32 * 256),)


class _Batch(ctypes.Structure):
    """struct llama_batch; null: positions in order, all in one sequence."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        *((name, ctypes.c_void_p) for name in ("embd", "pos", "n_seq_id", "seq_id")),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _POINTER)
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_LOG, _POINTER)),
    "llama_model_default_params": (_Parameters, ()),
    "llama_context_default_params": (_Parameters, ()),
    "llama_model_load_from_file": (_POINTER, (ctypes.c_char_p, _Parameters)),
    "llama_init_from_model": (_POINTER, (_POINTER, _Parameters)),
    "llama_model_get_vocab": (_POINTER, (_POINTER,)),
    "llama_vocab_n_tokens": (_INT, (_POINTER,)),
    "llama_model_n_ctx_train": (_INT, (_POINTER,)),
    "llama_n_ctx": (ctypes.c_uint32, (_POINTER,)),
    "llama_n_batch": (ctypes.c_uint32, (_POINTER,)),
    "llama_get_memory": (_POINTER, (_POINTER,)),
    "llama_memory_clear": (None, (_POINTER, ctypes.c_bool)),
    "llama_set_n_threads": (None, (_POINTER, _INT, _INT)),
    "llama_decode": (_INT, (_POINTER, _Batch)),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), (_POINTER, _INT)),
    "llama_free": (None, (_POINTER,)),
}


class LlamaCppModel:
    """A .gguf file opened by llama.cpp, on the CPU, until the process ends.

    Raises BackendError if llama.cpp is not installed, FormatError if it refuses the file.
    """

    def __init__(self, file: Path) -> None:
        self.file, self._llama = file, _library()
        self._context: int | None = None
        self._model: int | None = None
        _messages.clear()
        self._llama.llama_log_set(_LOGGER, None)  # each time, because another user of the library may have ended it
        self._llama.llama_backend_init()
        parameters = self._llama.llama_model_default_params()
        self._model = self._llama.llama_model_load_from_file(str(file).encode(), parameters)
        if not self._model:
            raise FormatError(f"llama.cpp refuses {file}: {' '.join(_messages)}")
        self.vocabulary = int(self._llama.llama_vocab_n_tokens(self._llama.llama_model_get_vocab(self._model)))
        self.max_tokens = int(self._llama.llama_model_n_ctx_train(self._model))

    def logits(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """(T, V) after each of the tokens (T,) of one sequence."""
        context = self._context_of(len(tokens))
        self._llama.llama_memory_clear(self._llama.llama_get_memory(context), True)
        ids = np.ascontiguousarray(tokens, dtype=np.int32)
        wanted = np.ones(len(ids), dtype=np.int8)
        batch = _Batch(len(ids), ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)))
        batch.logits = wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        if self._llama.llama_decode(context, batch):
            raise BackendError(f"llama.cpp failed on {self.file}: {' '.join(_messages)}")
        rows = (self._llama.llama_get_logits_ith(context, place) for place in range(len(ids)))
        return np.stack([np.ctypeslib.as_array(row, (self.vocabulary,)).copy() for row in rows])

    def _free_context(self) -> None:
        if self._context:
            self._llama.llama_free(self._context)
        self._context = None

    def _context_of(self, length: int) -> int:
        """A context for sequences of this length; the last one if it is long enough."""
        if self._context and self._llama.llama_n_ctx(self._context) >= length:
            return self._context
        self._free_context()
        parameters = self._llama.llama_context_default_params()
        parameters.fields[0] = parameters.fields[1] = max(length, 512)
        context = self._llama.llama_init_from_model(self._model, parameters)
        if not context or min(self._llama.llama_n_ctx(context), self._llama.llama_n_batch(context)) < length:
            raise BackendError(
                f"llama.cpp has no context of {length} tokens for {self.file}: {' '.join(_messages)}",
                hint="try a shorter --seqlen",
            )
        self._llama.llama_set_n_threads(context, *[torch.get_num_threads()] * 2)
        self._context = int(context)
        return self._context


def _keep(level: int, text: bytes, _: Any) -> None:
    if level >= WARNINGS:
        _messages.append(text.decode(errors="replace").strip())


_LOGGER = _LOG(_keep)  # llama.cpp holds a pointer to it, so it lives as long as the module


def version() -> str:
    """The version of the package, as a note names it."""
    import xllamacpp

    return f"llama.cpp, {MODULE} {xllamacpp.__version__}"


@functools.cache
def _library() -> ctypes.CDLL:
    """The library, with the types of the functions that are called."""
    if importlib.util.find_spec(MODULE) is None:
        raise BackendError("llama.cpp is not installed", hint=f"pip install {MODULE}")
    import xllamacpp  # noqa: F401  (loads the libraries that it needs)

    spec = importlib.util.find_spec(LIBRARY)
    if spec is None or spec.origin is None:
        raise BackendError(f"the package {MODULE} has no library {LIBRARY}", hint="another version of it may have")
    library = ctypes.CDLL(spec.origin)
    for name, (result, arguments) in _FUNCTIONS.items():
        if not hasattr(library, name):
            raise BackendError(f"the library of {MODULE} has no function {name}", hint="another version of it may have")
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
