"""Parts of the training loop: trackers, and the gradients of a whole model with the loss of the loop."""

from pathlib import Path

import pytest
import torch
from accelerate import tracking
from accelerate.utils import LoggerType
from torch import Tensor

import llmq
from llmq.errors import ConfigError
from llmq.training.loop import _Divergence, require_tracker
from tests import builders

STEP = 0.02


def test_gradients_of_a_model_are_those_of_its_kl_divergence(tmp_path: Path) -> None:
    """Scales are float32 here, so nothing is rounded between θ, the norms and the loss."""
    original = builders.causal_model(builders.llama(num_hidden_layers=1))
    folder = builders.save_model(tmp_path / "model", original)
    settings = {"method": "rtn", "bits": 3, "group_size": 16, "validate": 0}
    model = llmq.prepare_qat(folder, tmp_path / "start", **settings)  # type: ignore[arg-type]
    tokens = builders.tokens(2, 12)
    with torch.no_grad():
        target = original(input_ids=tokens).logits

    def loss() -> Tensor:
        divergence: Tensor = _Divergence.apply(model(input_ids=tokens).logits, target)
        return divergence

    loss().backward()
    for name, index in (
        ("model.layers.0.self_attn.v_proj.stretch", (3, 1)),
        ("model.layers.0.mlp.down_proj.stretch", (5, 2)),
        ("model.layers.0.input_layernorm.weight", (7,)),
        ("model.norm.weight", (20,)),
    ):
        parameter = model.get_parameter(name)
        before, sides = float(parameter.detach()[index]), list[float]()
        with torch.no_grad():
            for sign in (1, -1):
                parameter[index] = before + sign * STEP
                sides.append(float(loss()))
            parameter[index] = before
        assert float(parameter.grad[index]) == pytest.approx((sides[0] - sides[1]) / (2 * STEP), rel=0.02, abs=2e-5)


def test_tracker_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    require_tracker("tensorboard")
    with pytest.raises(ConfigError, match="not installed") as caught:
        require_tracker("wandb")
    assert caught.value.hint == "pip install wandb"
    with pytest.raises(ConfigError, match="unknown tracker"):
        require_tracker("paper")
