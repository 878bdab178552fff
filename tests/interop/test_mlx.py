"""mlx-lm loads the folders that llmq writes, with the same weights, and predicts the same tokens."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llmq

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        importlib.util.find_spec("mlx_lm") is None or importlib.util.find_spec("mlx") is None,
        reason="needs the packages mlx and mlx-lm, which scripts/test.sh installs in a separate environment",
    ),
]
BUNDLED = Path(__file__).resolve().parents[2] / "eval" / "models"
TOKENS = np.random.default_rng(0).integers(1, 2000, 24).tolist()
EXACT = 1e-4  # nats; both compute in float32, and sum in another order
GRIDS: list[dict[str, Any]] = [
    {"format": "mlx", "bits": 2, "group_size": 32},
    {"format": "mlx", "bits": 3, "group_size": 64},
    {"format": "mlx", "bits": 4, "group_size": 128},
    {"format": "mlx", "bits": 5, "group_size": 64},
    {"format": "mlx", "bits": 6, "group_size": 32, "symmetric": False},
    {
        "format": "mlx",
        "bits": 4,
        "group_size": 64,
        "symmetric": False,
        "overrides": ["*down_proj:bits=8,group_size=32"],
    },
    {"format": "awq", "bits": 4, "group_size": 64},
]


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """(T, V) float64."""
    return torch.from_numpy(logits.astype(np.float64)).log_softmax(-1).numpy()


@pytest.mark.parametrize("settings", GRIDS, ids=str)
def test_mlx_predictions_match_llmq(settings: dict[str, Any], tmp_path: Path) -> None:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    llmq.quantize(str(BUNDLED / "tiny-python-llama"), tmp_path / "out", method="rtn", device="cpu", **settings)
    ours, _ = llmq.load(tmp_path / "out", device="cpu")
    theirs, _ = load_model(tmp_path / "out")
    theirs.set_dtype(mx.float32)  # scales and offsets, too
    with torch.no_grad():
        expected = log_probabilities(ours(input_ids=torch.tensor([TOKENS])).logits[0].numpy())
    weights = dict(llmq.dequantize(tmp_path / "out"))
    modules = dict(theirs.named_modules())
    if settings["format"] == "mlx":
        for name, weight in weights.items():
            module = modules[name.removesuffix(".weight")]
            decoded = mx.dequantize(
                module.weight, module.scales, module.biases, group_size=module.group_size, bits=module.bits
            )
            assert np.array_equal(np.array(decoded), weight.numpy()), name
    predicted = log_probabilities(np.array(theirs(mx.array([TOKENS])))[0])
    assert np.abs(predicted - expected).max() < EXACT


def test_mlx_generates(tmp_path: Path) -> None:
    import mlx.core as mx
    import mlx_lm

    mx.set_default_device(mx.cpu)
    llmq.quantize(
        str(BUNDLED / "tiny-python-llama"), tmp_path / "out", method="rtn", device="cpu", format="mlx", group_size=64
    )
    model, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    assert mlx_lm.generate(model, tokenizer, prompt="def add(a, b):", max_tokens=8)
