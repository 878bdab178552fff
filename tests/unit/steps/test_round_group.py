"""target → round → refine for weights that share an input, and which refinements are undone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llmq import algorithms
from llmq.algorithms import Options, descent, gptq, output_error, refit
from llmq.algorithms.factor import factorize
from llmq.algorithms.validation_loss import ValidationLoss
from llmq.methods import Method
from llmq.numerics.input_stats import InputStats
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme
from llmq.steps.round_group import Rounded, round_group

K = 32
SCHEME, OTHER = WeightScheme(3, 16), WeightScheme(4, 16)
OPTIONS = Options()
CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def observed(*, originals: bool = True, validation: bool = True) -> InputStats:
    stats = InputStats(K, CPU)
    for seed, running in ((1, stats), *(((2, stats.begin_validation()),) if validation else ())):
        X = random(200, K, seed=seed) @ random(K, K, seed=3)
        running.update(0.9 * X + 0.5 * random(200, K, seed=seed + 9), X if originals else None)
    return stats


def weights() -> dict[str, Tensor]:
    return {"q": random(8, K, seed=4), "left": random(3, K, seed=5), "k": random(4, K, seed=6), "other": random(4, K)}


def rounded(stats: InputStats | None, method: Method) -> dict[str, Rounded]:
    schemes = {"q": SCHEME, "left": None, "k": SCHEME, "other": OTHER}
    return {layer.path: layer for layer in round_group(weights(), schemes, stats, method, OPTIONS)}


def test_a_method_of_one_stage_equals_that_stage() -> None:
    layers = rounded(observed(), Method(rounding="gptq"))
    assert list(layers) == ["q", "k", "other"]
    for path, layer in layers.items():
        alone = gptq.round_weight(weights()[path], observed(), OTHER if path == "other" else SCHEME, OPTIONS)
        assert torch.equal(layer.rounding.quantized.dequantize(), alone.quantized.dequantize())
        assert torch.equal(layer.weight, weights()[path]) and not layer.gains


def test_the_target_is_rounded_instead_of_the_weight() -> None:
    stats = observed()
    plain, with_target = rounded(stats, Method(rounding="gptq")), rounded(stats, Method(rounding="gptq", alphas=(1.0,)))
    H, C = stats.second_moment().double(), stats.cross_moment()
    assert C is not None
    H += 0.01 * H.diagonal().mean() * torch.eye(K)
    for path, layer in with_target.items():
        W = weights()[path]
        target = (W.double() + W.double() @ C.double() @ torch.linalg.inv(H)).float()
        alone = gptq.round_weight(target, stats, layer.rounding.quantized.scheme, OPTIONS)
        assert torch.equal(layer.rounding.quantized.codes, alone.quantized.codes)
        assert torch.equal(layer.weight, W)
        assert [gain.stage for gain in layer.gains] == ["target"] and layer.gains[0].kept
        assert stats.validation is not None
        losses = [
            ValidationLoss(W, stats.validation).of(one[path].rounding.quantized.dequantize())
            for one in (with_target, plain)
        ]
        assert float(losses[0].sum()) < float(losses[1].sum())


def test_the_target_is_left_out_without_float_inputs() -> None:
    layers = rounded(observed(originals=False), Method(rounding="gptq", alphas=(1.0,)))
    plain = rounded(observed(originals=False), Method(rounding="gptq"))
    for path, layer in layers.items():
        assert torch.equal(layer.rounding.quantized.codes, plain[path].rounding.quantized.codes)
        assert layer.rounding.notes[-1].startswith("the target is left out, the float model's inputs are not known")


@pytest.mark.parametrize("validation", [True, False])
def test_refinements_lower_the_loss_of_the_target(validation: bool) -> None:
    stats = observed(validation=validation)
    before = rounded(stats, Method(rounding="rtn", alphas=(1.0,)))
    after = rounded(stats, Method(rounding="rtn", alphas=(1.0,), refinements=("descent", "refit")))
    factor = factorize(stats.second_moment(), OPTIONS.order, OPTIONS.damping)
    assert factor is not None
    H = stats.second_moment()
    H.diagonal().add_(factor.damping * H.diagonal().mean())
    W = weights()["other"]
    assert stats.cross_moment() is not None
    target = W + algorithms.target.step(W, stats.cross_moment(), factor)
    quantized = before["other"].rounding.quantized
    for stage in (descent, refit):
        quantized = stage.refine(target, quantized, H, OPTIONS)  # both are kept here
    refined = after["other"].rounding.quantized
    assert torch.equal(refined.codes, quantized.codes)
    torch.testing.assert_close(refined.scales, quantized.scales, rtol=1e-4, atol=0)
    losses = [
        output_error(target, layers["other"].rounding.quantized.dequantize(), H).sum() for layers in (after, before)
    ]
    assert float(losses[0]) < float(losses[1])
    assert [gain.stage for gain in after["q"].gains] == (["target", "descent", "refit"] if validation else [])


class Spoiler:
    """A refinement that ruins the first weight of the stack and leaves the others better."""

    def refine(self, target: Tensor, quantized: QuantizedTensor, hessian: Tensor, options: Options) -> QuantizedTensor:
        better = descent.refine(target, quantized, hessian, options)
        better.codes[:8] = 7 - better.codes[:8]
        return QuantizedTensor(better.codes, better.scales, better.zeros, better.scheme)


def test_a_refinement_is_undone_for_weights_it_makes_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    def refinement(name: str) -> Any:
        return Spoiler() if name == "spoiler" else descent

    monkeypatch.setattr(algorithms, "refinement", refinement)
    stats = observed()
    plain = rounded(stats, Method(rounding="rtn"))
    spoilt = rounded(stats, Method(rounding="rtn", refinements=("spoiler",)))
    descended = rounded(stats, Method(rounding="rtn", refinements=("descent",)))
    assert torch.equal(spoilt["q"].rounding.quantized.codes, plain["q"].rounding.quantized.codes)
    assert torch.equal(spoilt["k"].rounding.quantized.codes, descended["k"].rounding.quantized.codes)
    assert not torch.equal(spoilt["k"].rounding.quantized.codes, plain["k"].rounding.quantized.codes)
    assert [spoilt[path].gains[0].kept for path in ("q", "k")] == [False, True]
    for path in ("q", "k"):
        (gain,) = spoilt[path].gains
        assert stats.validation is not None
        now = ValidationLoss(weights()[path], stats.validation).of(spoilt[path].rounding.quantized.dequantize()).sum()
        assert float(now) == pytest.approx(gain.after if gain.kept else gain.before, rel=1e-5)


def test_an_unfactorable_hessian_leaves_only_the_rounding() -> None:
    stats = InputStats(K, CPU)
    stats.update(torch.full((4, K), float("inf")), torch.zeros(4, K))
    layers = rounded(stats, Method(rounding="gptq", alphas=(1.0,), refinements=("descent",)))
    assert all("cannot be factored" in layer.rounding.notes[0] for layer in layers.values())
