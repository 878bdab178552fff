"""The model that a run quantizes: a folder or Hub id, a model in memory, or a float .gguf file, always as a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmq.checkpoint import in_memory
from llmq.checkpoint.in_memory import Savable, date_by_contents
from llmq.checkpoint.index import GGUF, gguf_file
from llmq.checkpoint.lock import emptied
from llmq.errors import ConfigError
from llmq.export.from_gguf import GgufSource


@contextmanager
def opened(
    model: str | Path | Savable, tokenizer: Any, out: str | Path | None, *, processes: int = 1
) -> Iterator[tuple[str | Path, str]]:
    """A model as a folder or Hub id, and its name.

    A model in memory and a .gguf file are written next to `out`, and deleted at the end. Raises ConfigError for
    anything else than a path, an id, or a float model of transformers with its tokenizer; UnsupportedModelError for a
    file that does not describe its model sufficiently.
    """
    file = gguf_file(Path(model)) if isinstance(model, str | Path) else None
    if file is None or not file.is_file():
        with in_memory.opened(model, tokenizer, out) as source:
            yield source
        return
    if out is None:
        raise ConfigError("a .gguf file needs an output folder", hint=f"for example llmq quantize {file} out")
    if processes > 1:
        raise ConfigError(f"{file} is read by one process, found {processes}", hint="run it without torchrun")
    out = Path(out).resolve()  # `.` has no name
    with emptied(out.with_name(f".{out.name}-unpacked")) as between:
        folder = between / file.name.removesuffix(GGUF)
        GgufSource(file, None, floats=True).unpack(folder)
        date_by_contents(folder)
        yield folder, str(model)
