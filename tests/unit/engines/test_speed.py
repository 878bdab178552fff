"""`llmq bench`, with a stand-in for the processes of the engines."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmq.engines import speed
from llmq.engines.processes import LLAMA_CPP, LLMQ, MLX, ONNX, VLLM, Engine
from llmq.engines.speed import engines_for
from llmq.errors import ConfigError
from tests.command_line import llmq


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("llama", num_hidden_layers=2)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any], str | None]]:
    """What the engines were asked; MLX is twice as fast."""
    requests: list[tuple[str, dict[str, Any], str | None]] = []

    def ask(engine: Engine, request: dict[str, Any], python: str | None) -> dict[str, Any]:
        requests.append((engine.name, request, python))
        factor = 2 if engine == MLX else 1
        seconds = [(0.5 * scale / factor, 1.0 * scale / factor) for scale in (1.0, 2.0, 0.5)]
        return {"version": engine.name, "seconds": seconds, "host_bytes": 10**8, "device_bytes": None}

    monkeypatch.setattr(speed, "ask", ask)
    return requests


def test_medians_ranges_and_ratios(model: Path, asked: list[Any], tmp_path: Path) -> None:
    arguments = ("bench", model, "--engine", "llmq", "--engine", "mlx", "--engine-python", "mlx=/there/python")
    size = ("--prompt-tokens", "50", "--new-tokens", "11", "--repeats", "3")
    done = llmq(*arguments, *size, "--json")
    first, second = json.loads(done.stdout)["results"]
    assert first["prefill"] == {"median": 100.0, "smallest": 50.0, "largest": 200.0}
    assert first["decode"] == {"median": 10.0, "smallest": 5.0, "largest": 20.0}
    assert second["decode"]["median"] == 20.0
    assert [(name, python) for name, _, python in asked] == [("llmq", None), ("mlx", "/there/python")]
    assert all(len(request["prompt"]) == 50 and request["repeats"] == 3 for _, request, _ in asked)
    table = llmq(*arguments, *size, "--plot", tmp_path / "speed.svg").stdout
    assert "2.00×" in table and "10.0 [5.0, 20.0]" in table
    assert (tmp_path / "speed.svg").stat().st_size > 1000


def test_the_original_comes_first(model: Path, asked: list[Any], checkpoint: Callable[..., Path]) -> None:
    original = checkpoint("llama", num_hidden_layers=1)
    assert llmq("bench", model, "--against", original, "--prompt-tokens", "20").exit_code == 0
    assert [request["model"] for _, request, _ in asked] == [str(original), str(model)]


def test_engines_for_kinds_of_files(model: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert engines_for(str(tmp_path), []) == engines_for(str(tmp_path), [VLLM]) == [LLAMA_CPP]
    (tmp_path / "onnx").mkdir()
    for name in ("model.onnx", "config.json"):
        (tmp_path / "onnx" / name).touch()
    assert engines_for(str(tmp_path / "onnx"), []) == engines_for(str(tmp_path / "onnx"), [VLLM]) == [ONNX[0]]
    assert engines_for(str(tmp_path / "onnx"), [LLMQ, ONNX[1]]) == [ONNX[1]]
    assert engines_for(str(model), []) == engines_for(str(model), [*ONNX]) == [LLMQ]
    assert engines_for(str(model), [VLLM, LLAMA_CPP, MLX]) == [VLLM, MLX]


@pytest.mark.parametrize(
    "flags",
    [("--engine", "tensorrt"), ("--engine-python", "vllm"), ("--engine-python", "x=y"), ("--prompt-tokens", "100000"),
     ("--plot", "speed.xyz")],
)  # fmt: skip
def test_bad_requests_are_refused(flags: tuple[str, ...], model: Path, asked: list[Any]) -> None:
    done = llmq("bench", model, *flags)
    assert done.exit_code == ConfigError.exit_code and not asked
