"""Whole runs with GGUF grids: the file holds the quantized weights under the names and types of llama.cpp."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmq
from llmq.config import QuantConfig
from llmq.job import Job
from llmq.methods import Method, Tuning
from tests.runs import stop_in_block, tensors_of

pytest.importorskip("gguf")
from llmq.gguf.reader import Container, Weights
from llmq.setting_fields import merged

Checkpoints = Callable[..., Path]
TUNED = Method(
    rounding="gptq",
    alphas=(1.0,),
    refinements=("descent", "refit"),
    tuning=Tuning(steps=2, scales=1e-3, rounding=1e-2, tokens=96),
    validation=0.25,
)
WINDOWS: dict[str, Any] = {"samples": 8, "seqlen": 48}


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoints) -> Path:
    """Rows of 256, except for down_proj with 288."""
    sizes = {"hidden_size": 256, "intermediate_size": 288, "num_attention_heads": 4, "num_key_value_heads": 2}
    return checkpoint("llama", num_hidden_layers=2, **sizes)


def job(model: Path, out: Path, text: Path, method: Method | None = None, **settings: Any) -> Job:
    asked = merged(QuantConfig(), {"format": "gguf:q4_k_m", "calibration": [text], **WINDOWS, **settings})
    return Job(str(model), out, asked, stages=method, device="cpu")


@pytest.fixture(scope="module")
def finished(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, llmq.Report]:
    out = tmp_path_factory.mktemp("gguf") / "tiny"
    running = job(model, out, text, TUNED)
    return out, running.run()


def test_the_file_has_the_types_of_the_recipe(finished: tuple[Path, llmq.Report]) -> None:
    out, report = finished
    kinds = {name: tensor.kind for name, tensor in Container(out / "tiny.gguf").tensors.items()}
    assert kinds["blk.0.attn_q.weight"] == "Q4_K"
    assert kinds["blk.0.attn_v.weight"] == "Q4_K" and kinds["blk.1.attn_v.weight"] == "Q6_K"
    assert kinds["blk.0.ffn_down.weight"] == "Q5_0" and kinds["blk.1.ffn_down.weight"] == "Q8_0"
    assert kinds["token_embd.weight"] == "Q4_K" and kinds["output.weight"] == "Q6_K"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert not list(out.glob("*.safetensors")) and (out / "llmq.json").is_file()
    assert "model.embed_tokens" not in report.left and "lm_head" not in report.left
    assert any("lm_head.weight is rounded" in note for note in report.notes)


@pytest.mark.parametrize(
    ("recipe", "types"),
    [
        ("q2_k", ["Q2_K", "Q3_K", "Q4_0", "Q6_K"]),
        ("iq4_xs", ["IQ4_XS", "IQ4_XS", "IQ4_NL", "Q6_K"]),
    ],
)
def test_other_grids_run_through_every_stage(
    recipe: str, types: list[str], model: Path, text: Path, tmp_path: Path
) -> None:
    job(model, tmp_path / "tiny", text, TUNED, format=f"gguf:{recipe}").run()
    file, names = tmp_path / "tiny" / "tiny.gguf", ("blk.0.attn_q", "blk.0.attn_v", "blk.0.ffn_down", "output")
    assert [Container(file).tensors[f"{name}.weight"].kind for name in names] == types
    stored = Weights(file, model)
    for name, tensor in tensors_of(model).items():
        error = float((stored.tensor(name).reshape(tensor.shape) - tensor).norm()) / float(tensor.norm())
        assert error < (0.7 if tensor.dim() > 1 else 1e-6), name  # 2 bits; of other weights it is above 1


def test_fallbacks_are_reported(model: Path, tmp_path: Path, text: Path) -> None:
    reasons = {plan.name: plan.reason for plan in job(model, tmp_path / "out", text).plan.layers.values()}
    assert "q5_0 instead of q4_k" in reasons["model.layers.0.mlp.down_proj"]
    assert "q8_0 instead of q6_k" in reasons["model.layers.1.mlp.down_proj"]
    assert sum(map(bool, reasons.values())) == 2


def test_the_weights_of_the_file_are_close_to_the_float_weights(
    finished: tuple[Path, llmq.Report], model: Path
) -> None:
    out, _ = finished
    stored = Weights(out / "tiny.gguf", model)
    for name, tensor in tensors_of(model).items():
        error = float((stored.tensor(name).reshape(tensor.shape) - tensor).norm()) / float(tensor.norm())
        assert error < (0.2 if tensor.dim() > 1 else 1e-6), name


def test_an_interrupted_run_ends_in_the_same_bytes(
    finished: tuple[Path, llmq.Report], model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tiny"
    stop_in_block(job(model, out, text, TUNED), 1)
    blocks = job(model, out, text, TUNED).run().blocks
    assert [block.resumed for block in blocks] == [True, False]
    assert (out / "tiny.gguf").read_bytes() == (finished[0] / "tiny.gguf").read_bytes()
    shutil.rmtree(out)


def test_skipped_layers_are_float_in_the_file(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    skip = ["embed_tokens", "lm_head", "*.down_proj"]
    job(model, out, text, Method(rounding="rtn", needs_calibration=False), skip=skip).run()
    tensors = Container(out / "tiny.gguf").tensors
    floats = {name for name, tensor in tensors.items() if tensor.kind == "F16"}
    assert floats == {"token_embd.weight", "output.weight", "blk.0.ffn_down.weight", "blk.1.ffn_down.weight"}
