"""Which server to start for a model, and with which flags: by the rules of `llmq verify`, for the GPUs at hand.

llmq is not a server. It chooses among vLLM, SGLang and transformers, or llama.cpp for a .gguf file, in this
order: the first one that is installed and loads the model.
"""

import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmq.errors import ConfigError, QualityError, listed
from llmq.verify.engines import Verdict

SHARE = 0.9  # of a GPU's memory, which vLLM and SGLang take
SPACE = 1.25  # weights with room for activations, and keys and values of some requests
BF16 = (8, 0)  # compute capability from which bfloat16 runs
WITH_LLMQ = "import llmq; llmq.enable_transformers(); from transformers.cli.transformers import main; main()"
SERVING = ("fastapi", "uvicorn")  # the modules of transformers[serving]


@dataclass(frozen=True)
class Machine:
    """The GPUs: how many, bytes of the smallest one, and its compute capability."""

    gpus: int = 0
    memory: int = 0
    capability: tuple[int, int] = (0, 0)

    @classmethod
    def here(cls) -> "Machine":
        import torch

        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        if not devices:
            return cls()
        smallest = min(devices, key=lambda device: device.total_memory)
        return cls(len(devices), smallest.total_memory, (smallest.major, smallest.minor))


@dataclass(frozen=True)
class Request:
    """A model to serve, and what the user asked for; None leaves the choice to llmq or to the server.

    nbytes   of its weights
    context  the most tokens of a request with its answer
    more     flags for the server, passed on unchanged
    """

    model: Path
    nbytes: int
    gpus: int | None = None
    context: int | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    remote_code: bool = False
    more: tuple[str, ...] = ()


@dataclass(frozen=True)
class Server:
    """A server: its name on the command line and in verdicts, how it is installed, and how it is called.

    program  looked up on PATH; None for a module of this Python
    """

    name: str
    engine: str
    program: str | None
    package: str
    arguments: Callable[[Request, Machine, int], list[str]]

    def is_installed(self) -> bool:
        if self.program is None:
            return all(importlib.util.find_spec(module) is not None for module in SERVING)
        return shutil.which(self.program) is not None


@dataclass(frozen=True)
class Launch:
    """The chosen server, its command line, whether it is installed, and why other servers were not chosen."""

    server: Server
    command: tuple[str, ...]
    installed: bool
    notes: tuple[str, ...] = field(default=())


def _vllm(request: Request, machine: Machine, gpus: int) -> list[str]:
    old = 0 < machine.gpus and machine.capability < BF16
    return [
        "vllm", "serve", str(request.model),
        "--tensor-parallel-size", str(gpus),
        "--max-model-len", str(request.context or "auto"),  # auto: the longest one that fits
        "--dtype", "half" if old else "auto",
        *_address(request), *_flag("--trust-remote-code", request.remote_code),
    ]  # fmt: skip


def _sglang(request: Request, machine: Machine, gpus: int) -> list[str]:
    old = 0 < machine.gpus and machine.capability < BF16
    context = ["--context-length", str(request.context)] if request.context else []
    return [
        "sglang", "serve", "--model-path", str(request.model), "--tp-size", str(gpus), *context,
        "--dtype", "half" if old else "auto", *_address(request), *_flag("--trust-remote-code", request.remote_code),
    ]  # fmt: skip


def _transformers(request: Request, machine: Machine, gpus: int) -> list[str]:
    return [
        sys.executable, "-c", WITH_LLMQ, "serve", str(request.model), "--dtype", "auto", *_address(request),
        *_flag("--trust-remote-code", request.remote_code),
    ]  # fmt: skip


def _llama_cpp(request: Request, machine: Machine, gpus: int) -> list[str]:
    layers = ["-ngl", "99"] if machine.gpus else []
    return ["llama-server", "-m", str(request.model), "-c", str(request.context or 0), *layers, *_address(request)]


def _address(request: Request) -> list[str]:
    return ["--host", request.host, "--port", str(request.port)]


def _flag(name: str, given: bool) -> list[str]:
    return [name] if given else []


SERVERS = (
    Server("vllm", "vLLM", "vllm", "pip install vllm", _vllm),
    Server("sglang", "SGLang", "sglang", "pip install sglang", _sglang),
    Server("transformers", "transformers", None, "pip install 'transformers[serving]'", _transformers),
    Server("llama.cpp", "llama.cpp", "llama-server", "see https://github.com/ggml-org/llama.cpp", _llama_cpp),
)
NAMES = tuple(server.name for server in SERVERS)


def choose(request: Request, verdicts: Iterable[Verdict], machine: Machine, wanted: str | None = None) -> Launch:
    """The server to start. If none that loads the model is installed, it is the first one that would.

    wanted  the name of a server; None for the first one that works

    Raises QualityError if the rules refuse the model for all servers, or for the wanted one; ConfigError for a number
    of GPUs that they do not allow.
    """
    by_engine = {verdict.engine: verdict for verdict in verdicts}
    if wanted is not None and wanted not in NAMES:
        raise ConfigError(f"server is {wanted!r}, expected one of {listed(NAMES)}", hint="check the spelling")
    notes, loading = [], []
    for server in _candidates(request, wanted):
        if by_engine[server.engine].loads is False:
            notes.append(f"{server.engine} does not load it: {_reason(by_engine[server.engine])}")
        else:
            loading.append(server)
    if not loading:
        message = f"no server loads {request.model}: {'; '.join(notes)}"
        raise QualityError(message, hint="see llmq verify, and llmq convert for other formats")
    installed = [server for server in loading if server.is_installed()]
    server = (installed or loading)[0]
    notes += [f"{other.engine} is not installed" for other in loading[: loading.index(server)]]
    gpus = _parallel(request, machine, by_engine[server.engine])
    command = (*server.arguments(request, machine, gpus), *request.more)
    if installed:
        command = (shutil.which(command[0]) or command[0], *command[1:])
    return Launch(server, command, bool(installed), tuple(notes))


def _candidates(request: Request, wanted: str | None) -> list[Server]:
    is_gguf = request.model.suffix == ".gguf"
    if wanted is not None:
        return [server for server in SERVERS if server.name == wanted]
    return [server for server in SERVERS if (server.name == "llama.cpp") == is_gguf]


def _reason(verdict: Verdict) -> str:
    return next((finding.text for finding in verdict.findings if finding.in_the_way), "see llmq verify")


def _parallel(request: Request, machine: Machine, verdict: Verdict) -> int:
    """The number of GPUs: the smallest one that the rules allow and whose memory holds the model, or the largest."""
    allowed: Sequence[int] = verdict.gpus or (1,)  # a verdict that is unknown names none
    if request.gpus is not None:
        if request.gpus not in allowed:
            raise ConfigError(
                f"{verdict.engine} cannot split the model over {request.gpus} GPUs, only over {listed(allowed)}",
                hint="see llmq verify for the reason, or use pipeline parallelism",
            )
        return request.gpus
    here = [size for size in allowed if size <= max(1, machine.gpus)] or [min(allowed)]
    room = SHARE * machine.memory
    return next((size for size in here if SPACE * request.nbytes <= size * room), here[-1])
