"""Every pass that runs a block rounds its inputs; the inputs of the float model are never rounded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llmq.algorithms import Options
from llmq.checkpoint.reader import Checkpoint
from llmq.errors import ConfigError
from llmq.evaluation.streaming import Streamed
from llmq.mixed_precision import sensitivity
from llmq.mixed_precision.sensitivity import Candidate, Layer, Question
from llmq.model.analyse import fold
from llmq.model.analyse.input_groups import input_groups, statistics
from llmq.model.build.block import Block
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.backward import Tape, backward
from llmq.model.passes.recorded_calls import RecordedCalls
from llmq.model.passes.sequential import Sequential
from llmq.model.passes.streams import Text
from llmq.numerics.affine_grid import fit_minmax
from llmq.numerics.fake_quantize import rounding_for
from llmq.numerics.scheme import InputScheme, WeightScheme
from llmq.runtime.open_skeleton import open_skeleton
from llmq.steps import fisher_information
from llmq.steps.block_tuning import BlockProblem
from tests import builders, mixtures
from tests.builders import skeleton_of, tokens
from tests.passes import CPU_MEMORY, REMEMBERED, REPEATED, run_block, states_of, streams_over

Checkpoints = Callable[..., Path]
INT8 = InputScheme("int8", "dynamic")
GRID = WeightScheme(8, 16)
LENGTH = 24


def rounded(folder: Path) -> Skeleton:
    """A model all of whose linear layers get inputs in int8."""
    skeleton = skeleton_of(folder)
    skeleton.quantize_inputs({path: INT8 for block in skeleton.blocks for path in block.linears})
    return skeleton


def on_grid(x: Tensor) -> bool:
    """Whether each token (…, K) lies on at most 256 evenly spaced values; no random token of 32 values does."""
    rows = x.detach().reshape(-1, x.shape[-1]).double()
    largest = rows.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    errors = [(rows / (largest / code) - (rows / (largest / code)).round()).abs().amax(-1) for code in (127, 128)]
    return bool((torch.minimum(*errors) < 1e-2).all())


Seen = dict[str, list[tuple[bool, bool]]]
"""Path of a linear layer -> for each call, whether its inputs were on the grid, and whether rounding was active."""


@contextmanager
def seen(skeleton: Skeleton) -> Iterator[Seen]:
    """Record the inputs of every linear layer while open."""
    recorded: Seen = {}

    def hook(path: str, block: Block) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: recorded.setdefault(path, []).append((on_grid(args[0]), block.inputs.active))

    handles = [
        linear.register_forward_pre_hook(hook(path, block))
        for block in skeleton.blocks
        for path, linear in block.linears.items()
    ]
    yield recorded
    for handle in handles:
        handle.remove()


def evaluate(skeleton: Skeleton) -> None:
    Streamed(skeleton).run(tokens(3, LENGTH))


def weigh_tokens(skeleton: Skeleton) -> None:
    fisher_information.measure(skeleton, tokens(3, LENGTH), 1, RecordedCalls(skeleton))


def measure_sensitivity(skeleton: Skeleton) -> None:
    linears = {path: linear for block in skeleton.blocks for path, linear in block.linears.items()}
    layers = {
        path: Layer(path, linear.weight.numel(), 32 * linear.weight.numel(), (Candidate(WeightScheme(3, 16), 1),))
        for path, linear in linears.items()
    }
    question = Question(layers, ("coarse",), "rtn", Options(scales="minmax"))
    assert sensitivity.measure(skeleton, tokens(4, LENGTH), question, batch=2, judged=1).units


def there_and_back(skeleton: Skeleton) -> None:
    paths = [path for block in skeleton.blocks for path in block.linears]
    tape = Tape(skeleton, Text(tokens(2, LENGTH), 2), RecordedCalls(skeleton), CPU_MEMORY, weights=paths)

    def visit(block: Block, _: range, __: Tensor) -> None:
        assert all(linear.weight.grad is not None for linear in block.linears.values())

    backward(skeleton, tape, [torch.ones_like(output) for output in tape.forward()], visit)


def take_statistics(skeleton: Skeleton) -> None:
    streams = streams_over(skeleton, tokens(3, LENGTH))
    for block in skeleton.blocks:
        assert run_block(streams, block)


def tune_blocks(skeleton: Skeleton) -> None:
    streams = streams_over(skeleton, tokens(4, LENGTH), floats=True, validation=1)
    for block in skeleton.blocks:
        block.load()
        streams.enter(block)
        weights = {}
        with Sequential(block, input_groups(block, streams.quantized.sample(LENGTH)), streams) as forwards:
            forwards.run(lambda *_: None)
            forwards.finish(streams.floats)
        for path in block.linears:
            grid = fit_minmax(block.weight(path), GRID, torch.float16)
            weights[path] = grid.quantized(grid.encode(block.weight(path)))
        problem = BlockProblem(skeleton, streams, block, list(weights), LENGTH)
        for path, quantized in weights.items():
            problem.put(path, quantized.dequantize())
        assert all(slope.any() for slope in problem.gradients(0).values())
        problem.validation_loss()
        streams.quantized.run(block)
        streams.advance()


OF_THE_FLOAT_MODEL = (weigh_tokens, measure_sensitivity)  # they measure what an error costs it
PASSES = [evaluate, weigh_tokens, measure_sensitivity, there_and_back, take_statistics, tune_blocks]


@pytest.mark.parametrize("run", PASSES)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_every_pass_sees_rounded_inputs(checkpoint: Checkpoints, name: str, run: Callable[[Skeleton], None]) -> None:
    """The float model, where a pass runs it, gets inputs that are not rounded."""
    skeleton = rounded(checkpoint(name))
    with seen(skeleton) as inputs:
        run(skeleton)
    assert inputs.keys() == {path for block in skeleton.blocks for path in block.linears}
    assert all(was == wanted for calls in inputs.values() for was, wanted in calls)
    assert all(any(wanted for _, wanted in calls) == (run not in OF_THE_FLOAT_MODEL) for calls in inputs.values())
    plain = skeleton_of(checkpoint(name))
    with seen(plain) as inputs:
        run(plain)
    assert inputs and not any(was for calls in inputs.values() for was, _ in calls)


def test_rounding_comes_before_earlier_hooks(checkpoint: Checkpoints) -> None:
    skeleton = skeleton_of(checkpoint("llama"))
    with seen(skeleton) as inputs:
        skeleton.quantize_inputs({path: INT8 for block in skeleton.blocks for path in block.linears})
        evaluate(skeleton)
    assert all(was for calls in inputs.values() for was, _ in calls)


def test_only_named_layers_are_rounded_until_the_next_call(checkpoint: Checkpoints) -> None:
    skeleton = skeleton_of(checkpoint("llama"))
    down = [path for block in skeleton.blocks for path in block.linears if path.endswith("down_proj")]
    skeleton.quantize_inputs(dict.fromkeys(down, INT8))
    with seen(skeleton) as inputs:
        evaluate(skeleton)
    assert {path for path, calls in inputs.items() if calls[0][0]} == set(down)
    skeleton.quantize_inputs({})
    with seen(skeleton) as inputs:
        evaluate(skeleton)
    assert not any(was for calls in inputs.values() for was, _ in calls)


@pytest.mark.parametrize("memory", [REMEMBERED, REPEATED])
def test_statistics_are_of_rounded_inputs(checkpoint: Checkpoints, memory: int) -> None:
    """The float stream equals that of the float model."""

    def passed(skeleton: Skeleton) -> tuple[dict[str, Tensor], list[Tensor]]:
        streams = streams_over(skeleton, tokens(4, LENGTH), memory=memory, floats=True)
        stats = run_block(streams, skeleton.blocks[0], lambda *_: None)
        assert streams.floats is not None
        return {leader: stats[leader].second_moment() for leader in stats}, states_of(streams.floats)

    folder = checkpoint("llama")
    skeleton = rounded(folder)
    moments, originals = passed(skeleton)
    plain, expected = passed(skeleton_of(folder))
    assert list(moments) == list(plain), "rounded copies of one input are still one input"
    assert all(torch.equal(a, b) for a, b in zip(originals, expected, strict=True))

    block, fed = skeleton.blocks[0], {}
    for path in moments:
        block.linears[path].register_forward_pre_hook(lambda _, args, path=path: fed.update({path: args[0]}))
    block.run(skeleton.record(0, tokens(4, LENGTH)))
    for path, moment in moments.items():
        X = fed[path].reshape(-1, fed[path].shape[-1])
        torch.testing.assert_close(moment, X.T @ X / len(X), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(moment, plain[path], rtol=1e-5, atol=1e-6)


def test_rounding_does_not_change_the_fold_sites(checkpoint: Checkpoints) -> None:
    def sites(skeleton: Skeleton) -> list[tuple[str, str, list[int], int]]:
        block = skeleton.blocks[0]
        block.load()
        call = skeleton.record(0, tokens(2, LENGTH))
        fold_sites = fold.discover(block, input_groups(block, call), call)
        widths = [fold.mixing_width(block, site, call) for site in fold_sites]
        return [
            (site.group.names[0], site.producer, site.source.tolist(), width)
            for site, width in zip(fold_sites, widths, strict=True)
        ]

    folder = checkpoint("llama")
    assert sites(rounded(folder)) == sites(skeleton_of(folder)) != []


def test_an_unknown_path_is_refused(checkpoint: Checkpoints) -> None:
    skeleton = skeleton_of(checkpoint("llama"))
    with pytest.raises(ConfigError, match="lm_head is not a linear layer of a block") as caught:
        skeleton.quantize_inputs({"lm_head": INT8})
    assert "paths look like model.layers.0." in caught.value.hint


# ---- experts


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Skeleton]:
    """A skeleton of a tiny mixture of experts."""
    folders: dict[str, Path] = {}

    def open_one(name: str) -> Skeleton:
        if name not in folders:
            model = builders.causal_model(mixtures.CONFIGS[name]())
            folders[name] = builders.save_model(tmp_path_factory.mktemp(name), model)
        return open_skeleton(Checkpoint.open(folders[name]), torch.device("cpu"), torch.float32)

    return open_one


def all_rounded(skeleton: Skeleton) -> Skeleton:
    skeleton.quantize_inputs({path: INT8 for block in skeleton.blocks for path in block.linears})
    return skeleton


@pytest.mark.parametrize("name", ["mixtral", "llama4", "gpt_oss", "qwen3_moe"])
def test_experts_are_fed_rounded_inputs(mixture: Callable[[str], Skeleton], name: str) -> None:
    skeleton = all_rounded(mixture(name))
    with seen(skeleton) as inputs:
        evaluate(skeleton)
    experts = {path for block in skeleton.blocks for path in block.linears if block.is_experts(path)}
    assert experts and experts <= inputs.keys()
    assert all(was for calls in inputs.values() for was, _ in calls)


@pytest.mark.parametrize("memory", [REMEMBERED, REPEATED])
def test_statistics_of_experts_are_of_rounded_inputs(mixture: Callable[[str], Skeleton], memory: int) -> None:
    """Each expert borrows all other tokens of its layer, so its sums are over all tokens."""
    skeleton = all_rounded(mixture("mixtral"))
    block = skeleton.blocks[0]
    streams = streams_over(skeleton, tokens(4, LENGTH), memory=memory, tokens_per_input=1e6)
    stats = run_block(streams, block, lambda *_: None)

    hidden: list[Tensor] = []
    [(path, experts)] = block.experts.items()
    experts.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    block.run(skeleton.record(0, tokens(4, LENGTH)))
    up, down = (parts[0] for parts in experts.parts)
    for e in range(experts.expert_count):
        with torch.no_grad():
            inner = experts.inner(e, hidden[0])
        for part, arrived in ((up, hidden[0]), (down, inner)):
            X = rounding_for(InputScheme("int8", "dynamic"))(arrived)
            moment = stats[f"{path}.{e}.{part}"].second_moment()
            torch.testing.assert_close(moment, X.T @ X / len(X), rtol=1e-4, atol=1e-5)
            assert not torch.allclose(X.T @ X, arrived.T @ arrived, rtol=1e-5, atol=1e-6)


def test_experts_of_one_layer_have_one_input_scheme(mixture: Callable[[str], Skeleton]) -> None:
    skeleton = mixture("mixtral")
    block = skeleton.blocks[0]
    first = next(path for path in block.linears if block.is_experts(path))
    with pytest.raises(ConfigError, match="would have inputs in float and int8 dynamic per token") as caught:
        skeleton.quantize_inputs({first: INT8})
    assert "give all of them the same" in caught.value.hint


def test_group_statistics_are_of_rounded_inputs(checkpoint: Checkpoints) -> None:
    """For `statistics`, which transforms are fitted on."""
    skeleton = rounded(checkpoint("llama"))
    block = skeleton.blocks[0]
    block.load()
    call = skeleton.record(0, tokens(2, LENGTH))
    groups = input_groups(block, call)
    q = next(group for group in groups if group.names[0].endswith("q_proj"))
    fed: list[Tensor] = []
    block.linears[q.names[0]].register_forward_pre_hook(lambda _, args: fed.append(args[0]))
    moment = statistics(block, groups, [call])[q].second_moment()
    X = fed[-1].reshape(-1, q.in_features)
    assert on_grid(X)
    torch.testing.assert_close(moment, X.T @ X / len(X), rtol=1e-4, atol=1e-5)
