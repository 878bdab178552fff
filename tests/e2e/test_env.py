"""`llmq env`: the packages and devices, the kernels that they use, and the reason."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from llmq import __version__
from llmq.cli import env
from llmq.runtime import environment
from llmq.runtime.environment import Device, Environment, Tiles
from tests.command_line import environment as variables
from tests.command_line import llmq, llmq_process


def test_env_shows_packages_and_backends() -> None:
    done = llmq("env")
    assert done.exit_code == 0
    for fact in (__version__, metadata.version("transformers"), torch.backends.cpu.get_cpu_capability()):
        assert fact in done.stdout
    assert "Triton kernels need a CUDA device, this is cpu" in done.stdout
    assert "torch's int4 product on CPU" in done.stdout


def test_env_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMQ_BACKEND", "torch")
    done = llmq("env", "--json")
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    assert report["llmq"] == __version__
    assert report["packages"]["torch"] == metadata.version("torch")
    assert report["variables"]["LLMQ_BACKEND"] == "torch"
    assert report["cpu_threads"] == torch.get_num_threads()
    cpu = report["devices"][0]
    assert (cpu["name"], cpu["backend"], cpu["reason"]) == ("cpu", "torch", "LLMQ_BACKEND=torch")
    assert [device["name"] for device in report["devices"][1:]] == [
        f"cuda:{i}" for i in range(torch.cuda.device_count())
    ]


@pytest.mark.parametrize("value", ["triton", "tritton"])
def test_an_unusable_backend_request_gives_a_one_line_warning(value: str) -> None:
    done = llmq_process("env", "--json", LLMQ_BACKEND=value)
    assert done.exit_code == 0
    assert json.loads(done.stdout)["devices"][0]["backend"] == "torch"
    loading, line = done.stderr.splitlines()
    assert loading.startswith("loading")
    assert line.startswith(
        f"warning: LLMQ_BACKEND={value}" if value == "triton" else f"warning: LLMQ_BACKEND={value!r}"
    )


def test_warnings_of_other_packages_are_unchanged() -> None:
    """Python shows the line that raised a warning, which the authors of the package need."""
    program = "import warnings; from llmq import cli; cli.app = lambda: warnings.warn('theirs'); cli.main()"
    done = subprocess.run([sys.executable, "-c", program], env=variables(), capture_output=True, text=True, check=True)
    assert "<string>:1: UserWarning: theirs" in done.stderr


H200 = Device(
    "cuda:0", "NVIDIA H200", "triton", "compute capability 9.0",
    capability="9.0", memory=150_000_000_000, processors=132,
    tiles=Tiles("shipped with llmq", 90, {8: "16 x 64, 4 warps, 4 stages"}, 768),
)  # fmt: skip
OLD = Device("cuda:1", "Tesla T4", "torch", "compute capability 7.5, the kernels need 8.0", capability="7.5")
ODD = Device("cuda:2", "NVIDIA L4", "triton", "compute capability 8.9", tiles="mine.json: not a table")


@pytest.fixture
def with_gpus() -> Environment:
    return Environment("1", "3.12", "Linux", {"torch": "2", "triton": None}, "13.0", "13.0", {}, 1, "AVX2", "-",
                      (H200, OLD, ODD))  # fmt: skip


def test_a_gpu_is_shown_with_its_kernels(with_gpus: Environment, capsys: pytest.CaptureFixture[str]) -> None:
    env.print_environment(with_gpus)
    shown = capsys.readouterr().out
    for fact in (
        "NVIDIA H200", "9.0", "132", "150.00 GB", "compute capability 7.5, the kernels need 8.0", "not installed",
        "W4A16 kernel on cuda:0", "16 x 64, 4 warps, 4 stages", "up to 8 rows", "above 768 rows",
        "W4A16 kernel on cuda:2", "mine.json: not a table",
    ):  # fmt: skip
        assert fact in shown, fact
    assert "W4A16 kernel on cuda:1" not in shown
    assert json.loads(json.dumps(with_gpus.to_dict()))["devices"][0]["tiles"]["crossover"] == 768


@pytest.mark.parametrize("architecture", [80, 86, 89, 90, 100, 120])
def test_every_gpu_architecture_has_a_table(architecture: int) -> None:
    table = environment.tiles(architecture)
    assert isinstance(table, Tiles)
    assert table.source == "shipped with llmq"
    assert table.rows


def test_a_broken_user_table_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.json"
    monkeypatch.setenv("LLMQ_W4A16_CONFIGS", str(file))
    assert "No such file" in str(environment.tiles(90))
    file.write_text("{}")
    assert "mine.json: not a table" in str(environment.tiles(90))
