"""`llmq verify --run`, `llmq bench` and `llmq generate` with llama.cpp and MLX, in separate processes."""

import importlib.util
from pathlib import Path

import pytest

import llmq
from llmq.engines.agreement import compare
from llmq.engines.llama_cpp_writer import LlamaCppWriter
from llmq.engines.processes import LLAMA_CPP, MLX, Engine
from llmq.engines.sampling import Sampling
from llmq.engines.speed import Workload, measure

BUNDLED = Path(__file__).resolve().parents[2] / "eval" / "models" / "tiny-python-llama"

pytestmark = pytest.mark.interop


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "out"
    llmq.quantize(str(BUNDLED), out, method="rtn", device="cpu", group_size=64, format="gguf,mlx")
    return out


@pytest.mark.parametrize(("engine", "largest"), [(LLAMA_CPP, 0.3), (MLX, 1e-3)], ids=["llama.cpp", "mlx"])
def test_the_process_of_an_engine_agrees_and_is_measured(engine: Engine, largest: float, quantized: Path) -> None:
    if importlib.util.find_spec(engine.module) is None:
        pytest.skip(f"needs the package {engine.package}, which scripts/test.sh installs in a separate environment")
    model = quantized / {"llama.cpp": "gguf", "mlx": "mlx"}[engine.name]
    result = compare(model, engine, device="cpu")
    assert result.largest < largest and result.same_top > 0.98 and result.tokenized
    [measured] = measure([(str(model), engine)], Workload(16, 4, 2), device="cpu")
    assert measured.prefill.median > 0 and measured.decode.smallest <= measured.decode.largest


def test_llama_cpp_continues_a_text(quantized: Path) -> None:
    pytest.importorskip("xllamacpp", reason="needs the package xllamacpp")
    writer = LlamaCppWriter(next((quantized / "gguf").glob("*.gguf")), "cpu")
    sampling = Sampling(max_tokens=8, temperature=0.0)
    text = "".join(writer.write("def f(x):\n", sampling))
    assert text and writer.speed.tokens == 8 and not writer.has_template
    assert "".join(writer.write("def f(x):\n", sampling)) == text
    pieces = writer.write("def f(x):\n", Sampling(max_tokens=400, temperature=0.0))
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]  # a generator; the reader leaves
