"""llama.cpp behind a few functions, through the library in the wheel xllamacpp (which needs no compiler).

Its parameters are structures passed by value, whose fields change between versions.  The defaults are sufficient, so
the structures are opaque bytes that one function fills and another one reads.  A buffer longer than the structure works
like the structure if it is the last argument.

For a comparison in float32, three fields of a context are set.  Their places follow from the default values around
them, and the log of llama.cpp says whether it has taken them.
"""

import ctypes
import importlib.util
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest


class Parameters(ctypes.Structure):
    """A structure of at most this many bytes, with unknown fields."""

    _fields_ = (("bytes", ctypes.c_uint64 * 128),)


class Batch(ctypes.Structure):
    """struct llama_batch."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    )


POINTER, INT, TEXT, YES = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p, ctypes.c_bool
IDS = ctypes.POINTER(ctypes.c_int32)
LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
FUNCTIONS = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (LOG, POINTER)),
    "llama_model_default_params": (Parameters, ()),
    "llama_context_default_params": (Parameters, ()),
    "llama_model_load_from_file": (POINTER, (TEXT, Parameters)),
    "llama_init_from_model": (POINTER, (POINTER, Parameters)),
    "llama_model_get_vocab": (POINTER, (POINTER,)),
    "llama_vocab_n_tokens": (INT, (POINTER,)),
    "llama_tokenize": (INT, (POINTER, TEXT, INT, IDS, INT, YES, YES)),
    "llama_batch_get_one": (Batch, (IDS, INT)),
    "llama_decode": (INT, (POINTER, Batch)),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), (POINTER, INT)),
    "llama_set_n_threads": (None, (POINTER, INT, INT)),
    "llama_free": (None, (POINTER,)),
    "llama_model_free": (None, (POINTER,)),
}


def library() -> ctypes.CDLL:
    """The library of llama.cpp; skips the test if it is not installed."""
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp")
    spec = importlib.util.find_spec("xllamacpp.xllamacpp")
    assert spec is not None and spec.origin is not None
    llama = ctypes.CDLL(spec.origin)
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(llama, name)
        function.restype, function.argtypes = result, arguments
    return llama


def in_float32(file: Path, copy: Path) -> None:
    """Copy a GGUF file with all float tensors in F32: then llama.cpp does not round inputs of products, either."""
    import gguf

    reader = gguf.GGUFReader(file)
    halves, floats = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32
    infos, data = b"", b""
    for tensor in reader.tensors:
        name, sizes = tensor.name.encode(), tensor.shape.tolist()
        kind = floats if tensor.tensor_type == halves else tensor.tensor_type
        infos += struct.pack(f"<Q{len(name)}sI", len(name), name, len(sizes))
        infos += struct.pack(f"<{len(sizes)}QIQ", *sizes, kind, len(data))
        values = tensor.data.astype(np.float32) if tensor.tensor_type == halves else tensor.data
        data += _padded(values.tobytes(), reader.alignment)
    header = file.read_bytes()[: reader.tensors[0].field.offset]
    copy.write_bytes(_padded(header + infos, reader.alignment) + data)


def _padded(content: bytes, alignment: int) -> bytes:
    return content + b"\0" * (-len(content) % alignment)


def _set_exact(parameters: Parameters) -> None:
    """Set type_k, type_v and flash_attn_type.

    The types are the first two neighbours with the value F16 (1) after the pointers, which are null;
    flash_attn_type is the last of four enumerations with the value "not specified" or "automatic" (-1).
    """
    fields = (ctypes.c_int32 * 64).from_buffer(parameters)
    values = list(fields)
    flash = next(place for place in range(60) if values[place : place + 4] == [-1] * 4) + 3
    types = next(place for place in range(flash, 60) if values[place : place + 2] == [1, 1])
    fields[flash] = fields[types] = fields[types + 1] = 0


class LlamaCpp:
    """A model opened by llama.cpp; if it refuses the file, its log is in the assertion message.

    exact  keys and values in float32 and no flash attention, which computes in float16 on a CPU
    """

    def __init__(self, path: Path, *, exact: bool = False) -> None:
        messages: list[bytes] = []
        self._llama, self._messages, self._exact = library(), messages, exact
        # kept alive, because llama.cpp holds a pointer to it
        self._log = LOG(lambda level, text, _: messages.append(text) if level >= 2 else None)
        self._llama.llama_log_set(self._log, None)
        self._llama.llama_backend_init()
        self._model = self._llama.llama_model_load_from_file(
            str(path).encode(), self._llama.llama_model_default_params()
        )
        assert self._model, f"llama.cpp refuses {path}: {b''.join(messages[-6:]).decode()}"
        self._vocab = self._llama.llama_model_get_vocab(self._model)

    def close(self) -> None:
        self._llama.llama_model_free(self._model)

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text, with the tokens that are put in front of it."""
        stored, ids = text.encode(), (ctypes.c_int32 * (2 * len(text) + 16))()
        count = self._llama.llama_tokenize(self._vocab, stored, len(stored), ids, len(ids), True, True)
        assert count >= 0
        return list(ids[:count])

    def log_probabilities(self, tokens: Sequence[int]) -> np.ndarray:
        """(T, V) float64 log-probabilities of the next token after each of the tokens."""
        context = self._context()
        rows = [self._next(context, token) for token in tokens]
        self._llama.llama_free(context)
        return np.stack(rows)

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """The ids of the continuation by greedy decoding."""
        context = self._context()
        for token in tokens:
            scores = self._next(context, token)
        generated = []
        for _ in range(count):
            generated.append(int(scores.argmax()))
            scores = self._next(context, generated[-1])
        self._llama.llama_free(context)
        return generated

    def _context(self) -> int:
        parameters = self._llama.llama_context_default_params()
        if self._exact:
            _set_exact(parameters)
        self._messages.clear()
        context = self._llama.llama_init_from_model(self._model, parameters)
        assert context, "llama.cpp cannot make a context"
        log = b"".join(b"".join(self._messages).split())
        assert not self._exact or (b"flash_attn=disabled" in log and b"K(f32)" in log and b"(f16)" not in log)
        self._llama.llama_set_n_threads(context, 1, 1)  # its threads wait for each other in busy loops
        return int(context)

    def _next(self, context: int, token: int) -> np.ndarray:
        """(V,) float64 log-probabilities after one more token."""
        ids = (ctypes.c_int32 * 1)(token)
        assert self._llama.llama_decode(context, self._llama.llama_batch_get_one(ids, 1)) == 0
        logits = self._llama.llama_get_logits_ith(context, -1)
        scores = np.ctypeslib.as_array(logits, (self._llama.llama_vocab_n_tokens(self._vocab),)).astype(np.float64)
        scores -= scores.max()
        return scores - np.log(np.exp(scores).sum())
