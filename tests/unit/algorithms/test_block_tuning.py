"""Block tuning: its start, the weights that it keeps, and the gradients of the block's loss."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmq.algorithms import block_tuning
from llmq.algorithms.kl_tuning import Rates
from llmq.formats.codecs import gguf_blocks
from llmq.formats.gguf import pack_blocks
from llmq.methods import Method, Tuning
from llmq.model.passes.replay import Replay
from llmq.numerics.affine_grid import fit_minmax, fit_searched
from llmq.numerics.quantized_tensor import QuantizedTensor, with_zeros
from llmq.numerics.scheme import WeightScheme
from llmq.steps import block_tuning as block_tuning_step
from llmq.steps.block_tuning import BlockProblem
from tests.builders import WINDOW, skeleton_of, tokens
from tests.passes import streams_over
from tests.runs import quantize, tensors_of

Checkpoints = Callable[..., Path]
SCHEME = WeightScheme(bits=4, group_size=16, symmetric=False)
LENGTH = 3 * WINDOW
RATES = Rates(rounding=0.05, scales=0.002)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nearest(weight: Tensor) -> QuantizedTensor:
    grid = fit_minmax(weight, SCHEME, torch.float16)
    return grid.quantized(grid.encode(weight))


class TwoLayers:
    """‖V (W x)₊ - y‖² for two weights; `losses` replaces the validation losses, one by one."""

    def __init__(self, losses: list[float] | None = None) -> None:
        self.weights = {"W": random(12, 32, seed=1), "V": random(6, 16, seed=2)}
        mix = random(6, 32, seed=5)  # correlated inputs, so that different codes give similar outputs
        self.inputs, self.judging = (random(200, 6, seed=seed) @ mix for seed in (3, 4))
        self.current: dict[str, Tensor] = {}
        self.losses = losses

    def put(self, name: str, weight: Tensor) -> None:
        self.current[name] = weight

    def has(self, weights: Mapping[str, QuantizedTensor]) -> bool:
        return all(torch.equal(self.current[name], weight.dequantize()) for name, weight in weights.items())

    def loss(self, inputs: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        def output(by_name: Mapping[str, Tensor]) -> Tensor:
            hidden = torch.nn.functional.pad(inputs @ by_name["W"].T, (0, 4)).relu()
            return hidden @ by_name["V"].T

        return (output(weights) - output(self.weights)).square().sum(1).mean()

    def gradients(self, step: int) -> dict[str, Tensor]:
        leaves = {name: weight.detach().requires_grad_(True) for name, weight in self.current.items()}
        slopes = torch.autograd.grad(self.loss(self.inputs, leaves), list(leaves.values()))
        return dict(zip(leaves, slopes, strict=True))

    def validation_loss(self) -> float:
        if self.losses is not None:
            return self.losses.pop(0)
        return self.loss(self.judging, self.current).item()


class OneLayer(TwoLayers):
    """‖(Ŵ - W) x‖² for one weight, of which one group of 32 columns is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = {"W": random(12, 256, seed=1)}
        self.weights["W"][:, 32:64] = 0
        self.inputs, self.judging = (random(200, 6, seed=seed) @ random(6, 256, seed=5) for seed in (3, 4))

    def loss(self, inputs: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        return (inputs @ (weights["W"] - self.weights["W"]).T).square().sum(1).mean()


@pytest.mark.parametrize("kind", ["iq4_nl", "iq4_xs", "q2_k", "q3_k", "q4_k"])
def test_grids_of_gguf_are_tuned(kind: str) -> None:
    problem = OneLayer()
    (name, weight), scheme = next(iter(problem.weights.items())), WeightScheme.of_blocks(kind)
    grid = fit_searched(weight, scheme, torch.float16)
    given = {name: with_zeros(grid.quantized(grid.encode(weight)), weight)}
    result = block_tuning.tune(given, problem.weights, problem, Rates(rounding=0.05, scales=0.002), 20)
    assert result.step > 0 and result.after < 0.9 * result.before
    tuned = result.weights[name]
    assert not torch.equal(tuned.codes, given[name].codes)
    assert torch.equal(tuned.dequantize()[:, 32:64], torch.zeros(12, 32)) or kind == "q3_k"
    packed = gguf_blocks.decode(kind.upper(), pack_blocks(tuned))
    assert torch.equal(torch.from_numpy(packed), tuned.dequantize())


def same(a: Mapping[str, QuantizedTensor], b: Mapping[str, QuantizedTensor]) -> bool:
    return all(torch.equal(a[n].codes, b[n].codes) and torch.equal(a[n].scales, b[n].scales) for n in a)


def tuned(problem: TwoLayers, steps: int) -> tuple[dict[str, QuantizedTensor], block_tuning.Tuned]:
    given = {name: nearest(weight) for name, weight in problem.weights.items()}
    return given, block_tuning.tune(given, problem.weights, problem, RATES, steps)


def test_zero_steps_keep_the_given_codes() -> None:
    problem = TwoLayers()
    given, best = tuned(problem, 0)
    assert same(best.weights, given) and problem.has(given) and best.step == 0 and best.after == best.before


def test_both_weights_move_and_the_validation_loss_falls() -> None:
    problem = TwoLayers()
    given, best = tuned(problem, 60)
    assert best.after < 0.8 * best.before
    assert best.before == pytest.approx(problem.loss(problem.judging, {n: q.dequantize() for n, q in given.items()}))
    assert best.after == pytest.approx(problem.validation_loss())  # the problem ends with the returned weights
    assert problem.has(best.weights)
    assert all(not torch.equal(best.weights[name].codes, given[name].codes) for name in given)


def test_steps_that_do_not_help_are_undone() -> None:
    problem = TwoLayers([1.0, 1.0, 1.2, 1.1, 1.0, 3.0])
    given, best = tuned(problem, 10)
    assert problem.losses == [] and best.step == 0 and same(best.weights, given) and problem.has(given)


def test_the_best_step_is_kept() -> None:
    at_best = TwoLayers([1.0, 0.9, 0.8, 0.9, 0.9, 0.85])
    _, best = tuned(at_best, 10)
    assert (best.step, best.after) == (4, 0.8)
    early = TwoLayers([1.0, 0.9, 0.8, float("nan")])  # and no step is taken after a loss of NaN
    assert same(tuned(early, 10)[1].weights, best.weights)
    other = TwoLayers([1.0, 0.9, 0.9, 0.9, 0.9, 0.8])
    assert not same(tuned(other, 10)[1].weights, best.weights)


def test_gradients_in_float16_do_not_vanish_beside_a_large_loss() -> None:
    class Half(TwoLayers):
        def gradients(self, step: int) -> dict[str, Tensor]:
            return {name: gradient.half() for name, gradient in super().gradients(step).items()}

    problem, judged = Half(), 1e10
    problem.losses = [judged, *(judged - step for step in range(1, 10))]
    weights, result = tuned(problem, 10)
    assert result.step == 10 and not same(weights, result.weights)


def test_a_block_without_loss_is_not_tuned() -> None:
    problem = TwoLayers([0.0])
    given, best = tuned(problem, 10)
    assert same(best.weights, given) and problem.losses == []


@pytest.mark.parametrize("index", [1, 2])
def test_gradients_equal_those_of_the_whole_model(checkpoint: Checkpoints, index: int) -> None:
    """Compared with the model of transformers: block `index` of three and all blocks before it are quantized."""
    folder, windows = checkpoint("llama"), tokens(5, LENGTH)
    skeleton = skeleton_of(folder)
    streams = streams_over(skeleton, windows, floats=True, validation=2)
    for block in skeleton.blocks[:index]:
        block.load()
        streams.enter(block)
        for path in block.linears:
            block.set_weight(path, nearest(block.weight(path)).dequantize())
        streams.past(block)
    block = skeleton.blocks[index]
    block.load()
    streams.enter(block)
    streams.run_floats(block)
    problem = BlockProblem(skeleton, streams, block, block.linears, tokens=3 * LENGTH)
    for path in block.linears:
        problem.put(path, nearest(block.weight(path)).dequantize())

    original, moved = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for _ in range(2))
    for rounded in skeleton.blocks[: index + 1]:
        for path in rounded.linears:
            weight = moved.get_submodule(path).weight
            weight.data.copy_(nearest(weight.detach()).dequantize())

    outputs: list[Tensor] = []
    for model in (moved, original):
        model.get_submodule(block.path).register_forward_hook(lambda _, __, output: outputs.append(output))

    def loss(rows: slice) -> Tensor:
        outputs.clear()
        for model in (moved, original):
            model(input_ids=windows[rows], use_cache=False)
        return (outputs[0] - outputs[1]).square().sum() / len(windows[rows])

    loss(slice(0, 3)).backward()
    gradients = problem.gradients(0)
    assert gradients.keys() == block.linears.keys()
    for path, gradient in gradients.items():
        expected = moved.get_submodule(path).weight.grad
        assert (gradient - expected).abs().max() <= 1e-3 * expected.abs().max() > 0, path
    assert problem.validation_loss() == pytest.approx(loss(slice(3, 5)).item(), rel=1e-4)
    assert not any(parameter.requires_grad for parameter in block.module.parameters())


def test_a_run_keeps_tuned_blocks_that_are_better(checkpoint: Checkpoints, text: Path, tmp_path: Path) -> None:
    plain = Method("rtn", validation=0.25)  # leaves much to do
    moved = dataclasses.replace(plain, block_tuning=Tuning(steps=10, scales=0.0, rounding=0.02, tokens=96))
    still = dataclasses.replace(plain, block_tuning=Tuning(steps=10, scales=0.0, rounding=1e-9, tokens=96))
    reports = {
        name: quantize(checkpoint("llama"), tmp_path / name, text, stages=method, samples=16)
        for name, method in (("plain", plain), ("moved", moved), ("still", still))
    }
    files = {name: tensors_of(tmp_path / name) for name in reports}
    assert all(torch.equal(files["still"][name], tensor) for name, tensor in files["plain"].items())
    assert not any(block.gains for block in reports["plain"].blocks)
    gains = [gain for block in reports["moved"].blocks for gain in block.gains]
    assert any(gain.kept and gain.after < gain.before for gain in gains)
    assert not any(gain.kept for block in reports["still"].blocks for gain in block.gains)
    (summary,) = reports["moved"].stages
    kept = [gain for gain in gains if gain.kept]
    assert (summary.stage, summary.kept, summary.layers) == ("block_tuning", len(kept), 3)
    assert summary.change == pytest.approx(sum(gain.after / gain.before - 1 for gain in kept) / 3)
    assert any(not torch.equal(files["moved"][name], tensor) for name, tensor in files["plain"].items())


def test_block_tuning_frees_remembered_outputs(
    checkpoint: Checkpoints, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tuning needs the memory, and runs the block from its inputs."""
    kept: list[tuple[int, int]] = []
    replays: list[Replay] = []
    enter, tune = Replay.__enter__, block_tuning_step.tune

    def entered(replay: Replay) -> Replay:
        replays.append(replay)
        return enter(replay)

    def tuned(*arguments: Any) -> Any:
        kept.append((len(replays), sum(len(replay._finished) for replay in replays)))
        return tune(*arguments)

    monkeypatch.setattr(Replay, "__enter__", entered)
    monkeypatch.setattr(block_tuning_step, "tune", tuned)
    method = Method("gptq", alphas=(1.0,), validation=0.25, block_tuning=Tuning(2, 0.0, 0.02, 96))
    quantize(checkpoint("llama"), tmp_path / "out", text, stages=method, samples=16)
    assert len(kept) == 3 and all(count and not finished for count, finished in kept)
