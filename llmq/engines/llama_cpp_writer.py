"""Text from a .gguf file, which llama.cpp runs in this process."""

import importlib.util
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import Queue
from typing import Any

from llmq.engines.sampling import Message, Sampling, Speed
from llmq.errors import BackendError, LlmqError

MODULE = "xllamacpp"
CONTEXT = 4096  # tokens; llama.cpp allocates the cache for all of them at the start


class LlamaCppWriter:
    """A .gguf file, run by llama.cpp in this process."""

    def __init__(self, file: Path, device: str) -> None:
        if importlib.util.find_spec(MODULE) is None:
            raise BackendError(
                f"{file} needs llama.cpp, and its package is not installed",
                hint="pip install xllamacpp (measuring and converting the file needs no package)",
            )
        from llmq.engines.children.on_llama_cpp import Engine
        from llmq.gguf.container import Container

        self.has_template = Container(file).value("tokenizer.chat_template") is not None
        self._server = Engine(str(file), {"device": _llama_device(device), "context": CONTEXT}).server
        self.speed = Speed()

    def write(self, prompt: str | Sequence[Message], sampling: Sampling) -> Iterator[str]:
        """See `Writer`."""
        names = {"repetition_penalty": "repeat_penalty"}
        given = {names.get(name, name): value for name, value in sampling.given().items()}
        request = {**given, "max_tokens": sampling.max_tokens, "seed": sampling.seed, "stream": True}
        pieces: Queue[Any] = Queue()
        stopped, times = threading.Event(), [time.monotonic()]

        def take(chunk: Any) -> bool:
            for part in chunk if isinstance(chunk, list) else [chunk]:
                pieces.put(part)
            return stopped.is_set()

        def generate() -> None:
            try:
                if isinstance(prompt, str):
                    self._server.handle_completions({**request, "prompt": prompt}, take)
                else:
                    messages = [dict(message) for message in prompt]
                    self._server.handle_chat_completions({**request, "messages": messages}, take)
                pieces.put(None)
            except BaseException as error:  # raised again by the thread that reads
                pieces.put(error)

        threading.Thread(target=generate, daemon=True).start()
        try:
            while (piece := pieces.get()) is not None:
                if text := _text(piece):
                    times.append(time.monotonic())
                    yield text
                self.speed = _speed(piece) or Speed.of(times)
        finally:
            stopped.set()


def _text(piece: Any) -> str:
    """The text in a chunk of llama.cpp's server; raises what it failed with."""
    if isinstance(piece, BaseException):
        raise piece
    if "error" in piece:
        raise LlmqError(f"llama.cpp: {piece['error'].get('message', piece['error'])}", hint="give a shorter text")
    choices = piece.get("choices") or [{}]
    text = choices[0].get("text") or (choices[0].get("delta") or {}).get("content")
    return text or ""


def _llama_device(device: str) -> str:
    return "cpu" if device == "cpu" else "auto"


def _speed(chunk: Any) -> Speed | None:
    """The speed in the last chunk; other chunks have none, and may hold several tokens."""
    if "timings" not in chunk:
        return None
    timings = chunk["timings"]
    first = timings["prompt_ms"] / 1000
    return Speed(timings["predicted_n"], first, first + timings["predicted_ms"] / 1000)
