"""Tokens per second and memory of engines: each runs in a separate process, after a warm-up, several times.

Ratios compare figures of one run of `llmq bench`, because the speed of a machine changes from hour to hour.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmq.checkpoint import hub
from llmq.checkpoint.index import gguf_file, is_onnx, read_json_object
from llmq.engines.processes import LLAMA_CPP, LLMQ, ONNX, Engine, ask
from llmq.engines.prompts import long_prompt
from llmq.errors import ConfigError
from llmq.gguf.reader import described
from llmq.report.events import OnEvent, Progress, ignore
from llmq.runtime.load import choose_device, load_tokenizer


@dataclass(frozen=True)
class Figure:
    """The median of several measurements, the smallest and the largest."""

    median: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Measured:
    """The speed of a model in an engine.

    prefill       tokens of the prompt per second, until the first new token
    decode        new tokens per second after that
    host_bytes    the most main memory of the process
    device_bytes  the most memory allocated on the GPU; None if the engine does not tell
    """

    model: str
    engine: str
    prefill: Figure
    decode: Figure
    host_bytes: int
    device_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Workload:
    """One request: tokens of the prompt, new tokens, and how often it is measured after a warm-up."""

    prompt_tokens: int = 512
    new_tokens: int = 64
    repeats: int = 5

    def __post_init__(self) -> None:
        if self.new_tokens < 2:
            raise ConfigError(
                f"--new-tokens is {self.new_tokens}, expected at least 2", hint="the first one belongs to the prompt"
            )


def measure(
    pairs: Sequence[tuple[str, Engine]],
    workload: Workload,
    *,
    pythons: Mapping[str, str] | None = None,
    device: str = "auto",
    gpus: int = 1,
    remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> list[Measured]:
    """Measure each model in its engine, one after the other.

    pythons  engine -> the Python of its environment; other engines run in this one

    Raises BackendError if an engine is not installed or fails.
    """
    results, place = [], str(choose_device(device))
    paths = {model: _located(model, remote_code=remote_code) for model, _ in pairs}
    for position, (model, engine) in enumerate(pairs):
        on_event(Progress(f"measuring {model} in {engine.name}", position, len(pairs), "models"))
        path = paths[model]
        prompt = _prompt(model, path, workload, remote_code=remote_code)
        options = {
            "device": place, "dtype": "auto", "context": workload.prompt_tokens + workload.new_tokens + 16, "top": 1,
            "gpus": gpus, "eager": False, "remote_code": remote_code, "llmq": False,
        }  # fmt: skip
        request = {
            "task": "time", "model": str(path), "options": options, "prompt": prompt,
            "new_tokens": workload.new_tokens, "repeats": workload.repeats,
        }  # fmt: skip
        answer = ask(engine, request, (pythons or {}).get(engine.name))
        results.append(_measured(model, answer, workload))
    on_event(Progress("measuring", len(pairs), len(pairs), "models"))
    return results


def engines_for(model: str, wanted: Sequence[Engine], *, remote_code: bool = False) -> list[Engine]:
    """Those of the wanted engines that run a model of this kind; if there are none, its usual one.

    That is llama.cpp for a .gguf file, ONNX Runtime for an ONNX model, and for all others transformers, with llmq's
    layers where they are packed.
    """
    path = _located(model, remote_code=remote_code)
    if path.suffix == ".gguf":
        return [LLAMA_CPP]
    if is_onnx(path):
        return [engine for engine in wanted if engine in ONNX] or [ONNX[0]]
    return [engine for engine in wanted if engine not in (LLAMA_CPP, *ONNX)] or [LLMQ]


def _prompt(model: str, path: Path, workload: Workload, *, remote_code: bool) -> list[int]:
    """The tokens of the prompt; raises ConfigError if it does not fit into the model's context with the answer."""
    with described(path) as folder:
        config = read_json_object(folder / "config.json")
        tokenizer = load_tokenizer(folder, remote_code=remote_code)
    inner = config.get("text_config")
    room = (inner if isinstance(inner, dict) else config).get("max_position_embeddings")
    length = workload.prompt_tokens + workload.new_tokens
    if isinstance(room, int) and length > room:
        message = f"the prompt and the new tokens are {length} tokens, and the context of {model} is {room}"
        raise ConfigError(message, hint="lower --prompt-tokens")
    return long_prompt(tokenizer, workload.prompt_tokens)


def _located(model: str, *, remote_code: bool) -> Path:
    folder = hub.locate(model, remote_code=remote_code)
    return gguf_file(folder) or folder


def _measured(model: str, answer: Mapping[str, Any], workload: Workload) -> Measured:
    return Measured(
        model=model,
        engine=answer["version"],
        prefill=Figure.of([workload.prompt_tokens / first for first, _ in answer["seconds"]]),
        decode=Figure.of([(workload.new_tokens - 1) / others for _, others in answer["seconds"]]),
        host_bytes=answer["host_bytes"],
        device_bytes=answer["device_bytes"],
    )
