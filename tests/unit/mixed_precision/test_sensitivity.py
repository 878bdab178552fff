"""The sensitivity of each layer, compared with the whole model in transformers with one weight replaced."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmq import memory
from llmq.algorithms import Options
from llmq.errors import CalibrationError
from llmq.mixed_precision import sensitivity
from llmq.mixed_precision.sensitivity import Candidate, Layer, Question
from llmq.model.analyse.input_groups import InputGroup
from llmq.numerics.scheme import WeightScheme
from llmq.report.events import Event, Progress
from llmq.report.sensitivity import Sensitivity, Unit
from tests import builders

SCHEMES = (WeightScheme(3, 16), WeightScheme(4, "channel", symmetric=False))
BITS = (3 + 16 / 16, 4 + 16 / 32)
WINDOWS = builders.tokens(6, 16)


@pytest.fixture
def folder(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("llama", num_hidden_layers=2)


def measured(folder: Path, windows: Tensor = WINDOWS, rounding: str = "rtn", **how: Any) -> Sensitivity:
    skeleton = builders.skeleton_of(folder)
    layers = {
        path: Layer(path, linear.weight.numel(), 32 * linear.weight.numel(), tuple(
            Candidate(scheme, int(bits * linear.weight.numel())) for scheme, bits in zip(SCHEMES, BITS, strict=True)
        ))
        for block in skeleton.blocks for path, linear in block.linears.items()
    }  # fmt: skip
    question = Question(layers, ("coarse", "fine"), rounding, Options(scales="minmax"))
    return sensitivity.measure(skeleton, windows, question, batch=2, **{"judged": 2, **how})


def rounded(weight: Tensor, scheme: WeightScheme) -> Tensor:
    """Min-max rounding, spelled out."""
    groups = weight.reshape(len(weight), -1, scheme.columns_per_group(weight.shape[1]))
    if scheme.symmetric:
        scale = groups.abs().amax(-1, keepdim=True) * (2 / (2**scheme.bits - 1))  # its last bit decides at the ends
        zero = torch.full_like(scale, 2 ** (scheme.bits - 1))
    else:
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / (2**scheme.bits - 1)
        zero = torch.round(-low / scale)
    codes = torch.clamp(torch.round(groups / scale + zero), 0, 2**scheme.bits - 1)
    return ((codes - zero) * scale).reshape(weight.shape)


@torch.no_grad()
def divergence(folder: Path, names: tuple[str, ...], scheme: WeightScheme, windows: Tensor) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = model(input_ids=windows).logits.log_softmax(-1)
    for name in names:
        linear = model.get_submodule(name)
        linear.weight.copy_(rounded(linear.weight, scheme))
    after = model(input_ids=windows).logits.log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())


def test_every_unit_and_grid_equals_the_whole_models(folder: Path) -> None:
    measurement = measured(folder)
    assert measurement.windows == 2 and measurement.tokens == 32
    for unit in measurement.units:
        for effect, scheme in zip(unit.effects, SCHEMES, strict=True):
            expected = divergence(folder, unit.names, scheme, WINDOWS[-2:])
            # Log-probabilities are about 10 in size and carry 2**-24 of that; the KL is a sum of their differences.
            assert effect.measured and effect.kl == pytest.approx(expected, rel=1e-3, abs=2e-6)


def test_each_measured_block_is_an_event(folder: Path) -> None:
    events: list[Event] = []
    measured(folder, on_event=events.append)
    assert events == [Progress("layers measured", done, 2, share=share) for done, share in ((1, 1 / 3), (2, 1.0))]


def test_layers_that_share_an_input_are_one_unit(folder: Path) -> None:
    labels = [unit.label for unit in measured(folder).units if unit.block == "model.layers.1"]
    assert labels == ["self_attn: q_proj, k_proj, v_proj", "self_attn: o_proj", "mlp: gate_proj, up_proj",
                      "mlp: down_proj"]  # fmt: skip


def test_only_the_coarsest_grid_is_run_with_many_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = measured(folder)
    monkeypatch.setattr(sensitivity, "MEASURED_BLOCKS", 1)
    scaled = measured(folder)
    assert scaled == measured(folder, exact=False)
    for unit, full in zip(scaled.units, every.units, strict=True):
        coarse, fine = unit.effects
        assert coarse == full.effects[0] and not fine.measured
        assert fine.kl == pytest.approx(coarse.kl * full.effects[1].error / full.effects[0].error)


def test_the_error_is_that_of_the_outputs(folder: Path) -> None:
    """E = mean over the fitted tokens of ‖(W - Ŵ)x‖², for the first layer of the model, whose input is easily had."""
    unit = measured(folder).units[0]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(WINDOWS[:4]))
        changes = [(w - rounded(w, SCHEMES[0])) for w in (model.get_submodule(name).weight for name in unit.names)]
        expected = sum(float((x @ change.T).square().sum(-1).mean()) for change in changes)
    assert unit.effects[0].error == pytest.approx(expected, rel=1e-4)


def test_gptq_is_fitted_on_inputs_of_the_float_model(folder: Path) -> None:
    nearest, compensated = (measured(folder, builders.tokens(40, 16), rounding) for rounding in ("rtn", "gptq"))
    for a, b in zip(nearest.units, compensated.units, strict=True):
        assert b.effects[0].error <= a.effects[0].error * (1 + 1e-5)


def test_sequences_that_do_not_fit_are_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = builders.skeleton_of(folder)
    variants = 2 * sum(len(block.linears) for block in skeleton.blocks)
    window = 16 * 32 * 4 * (variants + 1)
    blocks = 3 * max(block.float_bytes for block in skeleton.blocks)
    monkeypatch.setattr(memory, "spare", lambda device: 2 * (blocks + window))
    measurement = measured(folder)
    assert measurement.windows == 1 and re.search("measured on 1 .* instead of 2", measurement.notes[0])
    monkeypatch.setattr(memory, "spare", lambda device: 2 * (blocks + window) - 2)
    with pytest.raises(CalibrationError, match="do not fit into memory"):
        measured(folder)


def test_one_sequence_both_fits_and_measures(folder: Path) -> None:
    measurement = measured(folder, WINDOWS[:1])
    assert measurement.windows == 1 and re.search("one .* of text", measurement.notes[0])


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4), "down": nn.Linear(4, 4)}) for _ in range(3))
        self.alone = nn.ModuleList([nn.Linear(4, 4)])
        self.router = nn.Linear(4, 3)


def test_modules_of_one_list_form_a_unit() -> None:
    class Stub:
        path, module = "m.0", Experts()

    names = [f"m.0.experts.{e}.{part}" for e in range(3) for part in ("up", "down")] + ["m.0.alone.0", "m.0.router"]
    units = sensitivity.units_of(Stub(), [InputGroup((name,), 4) for name in names])  # type: ignore[arg-type]
    assert [[group.names[0] for group in unit] for unit in units] == [names[:6], ["m.0.alone.0"], ["m.0.router"]]


def test_labels_are_short() -> None:
    assert Unit("m.0", ("m.0.attention.wo",), 1, 1, ()).label == "attention: wo"
    assert Unit("m.0", ("m.0.q", "m.0.k"), 1, 1, ()).label == "q, k"
    assert Unit("m.0", tuple(f"m.0.experts.{e}.up" for e in range(9)), 1, 1, ()).label == "experts: 0.up … 8.up"
