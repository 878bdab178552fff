"""vLLM on a CPU reads what llmq writes, and refuses what `llmq verify` says it refuses.

    bash scripts/test_vllm.sh

Weights of 4 bits are multiplied in float32 (`llmq/engines/children/vllm_reference.py`), so what is tested is how vLLM
reads configurations and weights, fuses, splits and packs them again. `eval/vllm.py` measures more models.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import transformers

import llmq
from llmq.engines.agreement import compare
from llmq.engines.processes import VLLM
from llmq.errors import BackendError
from tests import builders

PYTHON = os.environ.get("LLMQ_VLLM_PYTHON")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(PYTHON is None, reason="needs vLLM, see scripts/test_vllm.sh"),
    pytest.mark.filterwarnings("ignore"),
]

SIZES: dict[str, Any] = {
    **builders.GROUPED, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32,
}  # fmt: skip
WITHOUT_HEAD_DIM = {name: value for name, value in SIZES.items() if name != "head_dim"}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**WITHOUT_HEAD_DIM),
    "phi3": lambda: transformers.Phi3Config(**WITHOUT_HEAD_DIM),
    "lfm2": lambda: transformers.Lfm2Config(
        **WITHOUT_HEAD_DIM,
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
        conv_dim=128,
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        builders.save_model(folder / name, builders.causal_model(config()))
    return folder


CALIBRATED: dict[str, Any] = {
    "method": "gptq", "samples": 4, "seqlen": 32,
    "calibration": [list(range(first, first + 64)) for first in range(3, 7)],
}  # fmt: skip


def quantized(model: Path, out: Path, **settings: Any) -> Path:
    options = {"method": "rtn", "group_size": 32, "validate": 0, "progress": False, **settings}
    llmq.quantize(str(model), out, device="cpu", **options)
    return out


@pytest.mark.parametrize(
    ("model", "settings", "dtype", "largest"),
    [
        ("llama", {}, "float32", 1e-4),
        ("llama", {"group_size": 64, "symmetric": False}, "float32", 1e-4),
        ("llama", {"format": "gptq"}, "bfloat16", 1.5),
        ("llama", {"format": "awq", "symmetric": False}, "bfloat16", 1.5),
        ("qwen2", {"group_size": "channel"}, "float32", 1e-4),
        ("phi3", {}, "float32", 1e-4),
        ("lfm2", {}, "float32", 5e-4),
        ("llama", {"preset": "w8a8", "group_size": None}, "bfloat16", 4.0),
        ("llama", {"preset": "w4a8", "format": "int-quantized"}, "bfloat16", 4.0),
        ("llama", {"preset": "nvfp4", "group_size": None, **CALIBRATED}, "float32", 1e-4),
    ],
)
def test_log_probabilities_agree(
    model: str, settings: dict[str, Any], dtype: str, largest: float, models: Path, tmp_path: Path
) -> None:
    out = quantized(models / model, tmp_path / "out", **settings)
    agreement = compare(out, VLLM, python=PYTHON, dtype=dtype, reference=True, device="cpu")
    assert agreement.tokenized and agreement.largest <= largest
    assert agreement.same_top > (0.8 if settings.get("preset") else 0.9), "both round inputs, which differ by then"


def test_two_processes_share_the_layers(models: Path, tmp_path: Path) -> None:
    """Tensor parallelism: vLLM splits packed words, scales and heads between two processes."""
    out = quantized(models / "llama", tmp_path / "out")
    agreement = compare(out, VLLM, python=PYTHON, dtype="float32", reference=True, device="cpu", gpus=2)
    assert agreement.largest <= 1e-4 and agreement.same_top == 1


@pytest.mark.parametrize(
    ("settings", "message"), [({"format": "gptq", "symmetric": False}, "Unsupported quantization config")]
)
def test_what_verify_refuses_is_refused(settings: dict[str, Any], message: str, models: Path, tmp_path: Path) -> None:
    out = quantized(models / "llama", tmp_path / "out", **settings)
    findings = [finding for finding in llmq.verify(out, quick=True).findings if finding.engine == "vLLM"]
    assert any(finding.in_the_way for finding in findings)
    with pytest.raises(BackendError, match=message):
        compare(out, VLLM, python=PYTHON, dtype="bfloat16", device="cpu")
