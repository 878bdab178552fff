"""Compile Triton kernels for any GPU, and read the result: registers, spills, instructions.

`ptxas` and `cuobjdump` are part of Triton's wheel.  Tests run with Triton's interpreter, which replaces `triton.jit` at
import, so compiling happens in worker processes without it: this file is its own worker (`python ahead_of_time.py`
reads jobs as JSON, one per line, and prints one line per job).
"""

import collections
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

WORKERS = 2
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    """One kernel with everything that a launch determines.

    kernel      "module:function"
    signature   argument -> Triton type ("*bf16", "*i16", "i32"), in the kernel's order, constants left out
    constants   constexpr argument -> value
    aligned     arguments that a launch would find divisible by 16
    """

    kernel: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    arch: int
    num_warps: int = 4
    num_stages: int = 3
    aligned: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiled:
    """The result of a compilation; `error` is Triton's message if it failed.  `stack` > 0 bytes are spills."""

    registers: int = 0
    stack: int = 0
    shared: int = 0
    instructions: Mapping[str, int] = field(default_factory=dict)
    error: str | None = None


def compile_all(jobs: Sequence[Job]) -> list[Compiled]:
    """Compile every job, in their order, in two processes."""
    shares = [list(range(start, len(jobs), WORKERS)) for start in range(min(WORKERS, len(jobs)))]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    workers = []
    for share in shares:
        lines = "\n".join(json.dumps(asdict(jobs[index])) for index in share)
        with tempfile.TemporaryFile("w+") as source:  # the worker has a separate handle
            source.write(lines)
            source.seek(0)
            command = [sys.executable, __file__]
            workers.append(subprocess.Popen(command, stdin=source, stdout=subprocess.PIPE, env=environment, text=True))
    results: dict[int, Compiled] = {}
    for share, worker in zip(shares, workers, strict=True):
        output, _ = worker.communicate()
        answers = [Compiled(**json.loads(line)) for line in output.splitlines()]
        if len(answers) != len(share):
            raise RuntimeError(f"a compiling process ended early, with exit code {worker.returncode}")
        results |= dict(zip(share, answers, strict=True))
    return [results[index] for index in range(len(jobs))]


def _compile(job: Job) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = job.kernel.split(":")
    function = getattr(importlib.import_module(module), name)
    order = function.arg_names
    signature = {argument: job.signature.get(argument, "constexpr") for argument in order}
    attributes = {(order.index(argument),): [["tt.divisibility", 16]] for argument in job.aligned}
    source = ASTSource(fn=function, signature=signature, constexprs=dict(job.constants), attrs=attributes)
    fixed = {"num_warps": job.num_warps, "num_stages": job.num_stages, "enable_fp_fusion": True}
    options = {**fixed, **job.options}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=options)
    except Exception as error:  # every stage of the compiler raises other errors
        return Compiled(error=f"{type(error).__name__}: {error}")
    return _read(compiled.asm["cubin"], compiled.metadata.shared)


def _read(cubin: bytes, shared: int) -> Compiled:
    """Registers, stack and instruction counts, by NVIDIA's own disassembler."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True)
        code = subprocess.run([cuobjdump, "-sass", file.name], capture_output=True, text=True, check=True)
    usage_line = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    if usage_line is None:
        return Compiled(error=f"no resource usage in {usage.stdout + usage.stderr!r}")
    mnemonics = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)", code.stdout, re.MULTILINE)
    return Compiled(int(usage_line[1]), int(usage_line[2]), shared, dict(collections.Counter(mnemonics)))


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(asdict(_compile(Job(**json.loads(line))))), flush=True)
