"""Which backend is chosen; a missing or broken Triton gives one warning and never stops a run.

Each case is a separate process, because choices are made once per process; a broken Triton is a fake package of that
name earlier on the path.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
NO_GPU = not torch.cuda.is_available()

CHOOSE = """
import torch
from llmq_kernels import backend
for _ in range(3):
    for device in {devices}:
        choice = backend.choose(torch.device(device))
        print(device, choice.name, choice.reason, sep="|")
"""


def choices(*devices: str, backend: str | None = None, path: Path = KERNELS) -> tuple[list[list[str]], list[str]]:
    """[device, name, reason] of each of three rounds, and the first line of every warning."""
    environment = {name: value for name, value in os.environ.items() if name not in ("LLMQ_BACKEND", "PYTHONWARNINGS")}
    environment["PYTHONPATH"] = os.pathsep.join([str(path), str(KERNELS)])
    if backend is not None:
        environment["LLMQ_BACKEND"] = backend
    program = CHOOSE.format(devices=devices)
    command = [sys.executable, "-W", "always", "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    warned = [line.partition("KernelWarning: ")[2] for line in done.stderr.splitlines() if "KernelWarning: " in line]
    return [line.split("|") for line in done.stdout.splitlines()], warned


def fake_triton(folder: Path, source: str) -> Path:
    (folder / "triton").mkdir(parents=True)
    (folder / "triton" / "__init__.py").write_text(source)
    (folder / "triton" / "language.py").write_text("constexpr = int\n")
    return folder


@pytest.mark.parametrize("backend", [None, "", "torch"])
def test_cpu_uses_torch_without_warning(backend: str | None) -> None:
    chosen, warned = choices("cpu", backend=backend)
    reason = "LLMQ_BACKEND=torch" if backend == "torch" else "Triton kernels need a CUDA device, this is cpu"
    assert chosen == [["cpu", "torch", reason]] * 3
    assert warned == []


def test_triton_requested_on_cpu_warns_and_uses_torch() -> None:
    chosen, warned = choices("cpu", backend="triton")
    assert [name for _, name, _ in chosen] == ["torch"] * 3
    assert warned == ["LLMQ_BACKEND=triton: Triton kernels need a CUDA device, this is cpu; torch is used"]


def test_unknown_backend_warns_once_for_all_devices() -> None:
    chosen, warned = choices("cpu", "meta", backend="tritton")
    assert {name for _, name, _ in chosen} == {"torch"}
    assert warned == ["LLMQ_BACKEND='tritton' is not one of auto, triton, torch; auto is used"]


BROKEN = {
    "missing": (
        "raise ModuleNotFoundError(\"No module named 'triton'\")",
        "ModuleNotFoundError: No module named 'triton'",
    ),
    "import": (
        "raise ImportError('libsomething.so.1 is missing\\nand more')",
        "ImportError: libsomething.so.1 is missing",
    ),
    "without a message": ("raise OSError", "OSError: no message"),
    "of another kind": ("jit = None", "TypeError: 'NoneType' object is not callable"),
}


@pytest.mark.parametrize(("source", "problem"), BROKEN.values(), ids=BROKEN)
def test_broken_triton_warns_and_uses_torch(source: str, problem: str, tmp_path: Path) -> None:
    chosen, warned = choices("cuda:0", "cuda:1", "cpu", path=fake_triton(tmp_path, source))
    assert chosen[:2] == [["cuda:0", "torch", problem], ["cuda:1", "torch", problem]]
    assert chosen == chosen[:3] * 3
    assert warned == [f"Triton does not work here, the slower torch backend is used: {problem}"]


@pytest.mark.skipif(not NO_GPU, reason="needs a machine without a GPU")
def test_missing_device_warns_and_uses_torch() -> None:
    chosen, warned = choices("cuda:0")
    assert [name for _, name, _ in chosen] == ["torch"] * 3
    assert len(warned) == 1


def test_torch_backend_does_not_import_triton(tmp_path: Path) -> None:
    chosen, warned = choices("cuda:0", backend="torch", path=fake_triton(tmp_path, "raise ImportError('broken')"))
    assert chosen == [["cuda:0", "torch", "LLMQ_BACKEND=torch"]] * 3
    assert warned == []


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU, reason="needs a CUDA device")
def test_working_triton_is_tested_once_and_chosen() -> None:
    chosen, warned = choices("cuda:0")
    assert [name for _, name, _ in chosen] == ["triton"] * 3
    assert warned == []


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU, reason="needs a CUDA device")
def test_failing_launch_warns_and_uses_torch(tmp_path: Path) -> None:
    source = (
        "class jit:\n"
        "    def __init__(self, function): pass\n"
        "    def __getitem__(self, grid): raise RuntimeError('no compiler was found')\n"
    )
    chosen, warned = choices("cuda:0", path=fake_triton(tmp_path, source))
    assert [name for _, name, _ in chosen] == ["torch"] * 3
    assert warned == [
        "Triton does not work here, the slower torch backend is used: RuntimeError: no compiler was found"
    ]
