"""Inputs are rounded in every pass that runs a block, whatever it runs the block for; and never for the float model."""

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
from llmq.model.passes import forward as walk
from llmq.model.passes.backward import Chain
from llmq.model.passes.hidden_states import Stream
from llmq.numerics.affine_grid import fit_minmax
from llmq.numerics.fake_quantize import int8_per_token
from llmq.numerics.scheme import InputScheme, WeightScheme
from llmq.runtime.open_skeleton import open_skeleton
from llmq.steps import token_weights
from llmq.steps.block_tuning import BlockProblem
from tests import builders, mixtures
from tests.builders import skeleton_of, tokens

Checkpoints = Callable[..., Path]
INT8 = InputScheme("int8", "dynamic")
GRID = WeightScheme(8, 16)
LENGTH = 24
HELD, REPEATED = 1 << 40, 0  # bytes that may be held


def rounded(folder: Path) -> Skeleton:
    """A model all of whose linear layers get inputs in int8."""
    walked = skeleton_of(folder)
    walked.quantize_inputs({path: INT8 for block in walked.blocks for path in block.linears})
    return walked


def on_grid(x: Tensor) -> bool:
    """Whether each token (…, K) lies on at most 256 evenly spaced values; no random token of 32 values does."""
    rows = x.detach().reshape(-1, x.shape[-1]).double()
    largest = rows.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    errors = [(rows / (largest / code) - (rows / (largest / code)).round()).abs().amax(-1) for code in (127, 128)]
    return bool((torch.minimum(*errors) < 1e-2).all())


Seen = dict[str, list[tuple[bool, bool]]]
"""Path of a linear layer -> call by call, whether its inputs were on the grid, and whether they were to be."""


@contextmanager
def seen(walked: Skeleton) -> Iterator[Seen]:
    """What every linear layer is fed while open."""
    found: Seen = {}

    def hook(path: str, block: Block) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: found.setdefault(path, []).append((on_grid(args[0]), block.inputs.active))

    handles = [
        linear.register_forward_pre_hook(hook(path, block))
        for block in walked.blocks
        for path, linear in block.linears.items()
    ]
    yield found
    for handle in handles:
        handle.remove()


def evaluate(walked: Skeleton) -> None:
    Streamed(walked).run(tokens(3, LENGTH))


def weigh_tokens(walked: Skeleton) -> None:
    token_weights.measure(walked, tokens(3, LENGTH), seed=1)


def measure_sensitivity(walked: Skeleton) -> None:
    linears = {path: linear for block in walked.blocks for path, linear in block.linears.items()}
    layers = {
        path: Layer(path, linear.weight.numel(), 32 * linear.weight.numel(), (Candidate(WeightScheme(3, 16), 1),))
        for path, linear in linears.items()
    }
    steps = sensitivity.measure(
        walked, tokens(4, LENGTH), Question(layers, ("coarse",), "rtn", Options(scales="minmax")), batch=2, judged=1
    )
    assert len(list(steps)) == len(walked.blocks)


def there_and_back(walked: Skeleton) -> None:
    paths = [path for block in walked.blocks for path in block.linears]
    chain = Chain(walked, walk.loaded(walked), tokens(2, LENGTH), paths)
    for _, block in chain.backward(torch.ones_like(chain.hidden)):
        assert all(linear.weight.grad is not None for linear in block.linears.values())


def take_statistics(walked: Skeleton) -> None:
    stream = Stream(walked, tokens(3, LENGTH), 2, HELD)
    for block in walked.blocks:
        block.load()
        groups = input_groups(block, stream.sample(LENGTH))
        flow = stream.flow(block, groups)
        assert len(list(flow.statistics())) == len(groups)
        stream.advance(block, flow.outputs)


def tune_blocks(walked: Skeleton) -> None:
    stream = Stream(walked, tokens(4, LENGTH), 2, HELD, originals=True, held_out=1)
    for block in walked.blocks:
        block.load()
        stream.enter(block)
        flow = stream.flow(block, input_groups(block, stream.sample(LENGTH)))
        weights = {}
        for group, _ in flow.statistics():
            for path in group.names:
                grid = fit_minmax(block.weight(path), GRID, torch.float16)
                weights[path] = grid.quantized(grid.encode(block.weight(path)))
        stream.know_originals(block, flow.original_outputs)
        problem = BlockProblem(walked, stream, block, LENGTH)
        problem.put(weights)
        assert all(slope.any() for slope in problem.gradients(0).values())
        problem.held_out_loss()
        stream.advance(block)


PASSES = [evaluate, weigh_tokens, measure_sensitivity, there_and_back, take_statistics, tune_blocks]


@pytest.mark.parametrize("run", PASSES)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_every_pass_sees_rounded_inputs(checkpoint: Checkpoints, name: str, run: Callable[[Skeleton], None]) -> None:
    """And the float model, where a pass runs it beside, does not."""
    walked = rounded(checkpoint(name))
    with seen(walked) as found:
        run(walked)
    assert found.keys() == {path for block in walked.blocks for path in block.linears}
    assert all(was == wanted for calls in found.values() for was, wanted in calls)
    assert all(any(wanted for _, wanted in calls) for calls in found.values())
    plain = skeleton_of(checkpoint(name))
    with seen(plain) as found:
        run(plain)
    assert found and not any(was for calls in found.values() for was, _ in calls)


def test_rounding_comes_before_hooks_that_were_there_first(checkpoint: Checkpoints) -> None:
    walked = skeleton_of(checkpoint("llama"))
    with seen(walked) as found:
        walked.quantize_inputs({path: INT8 for block in walked.blocks for path in block.linears})
        evaluate(walked)
    assert all(was for calls in found.values() for was, _ in calls)


def test_only_the_layers_that_are_named_and_only_until_the_next_call(checkpoint: Checkpoints) -> None:
    walked = skeleton_of(checkpoint("llama"))
    down = [path for block in walked.blocks for path in block.linears if path.endswith("down_proj")]
    walked.quantize_inputs(dict.fromkeys(down, INT8))
    with seen(walked) as found:
        evaluate(walked)
    assert {path for path, calls in found.items() if calls[0][0]} == set(down)
    walked.quantize_inputs({})
    with seen(walked) as found:
        evaluate(walked)
    assert not any(was for calls in found.values() for was, _ in calls)


@pytest.mark.parametrize("memory", [HELD, REPEATED])
def test_statistics_are_of_rounded_inputs_and_the_float_stream_is_as_it_was(
    checkpoint: Checkpoints, memory: int
) -> None:
    def passed(walked: Skeleton) -> tuple[dict[str, Tensor], list[Tensor]]:
        block = walked.blocks[0]
        block.load()
        stream = Stream(walked, tokens(4, LENGTH), 2, memory, originals=True)
        stream.enter(block)
        flow = stream.flow(block, input_groups(block, stream.sample(LENGTH)))
        hessians = {group.names[0]: stats.hessian for group, stats in flow.statistics()}
        stream.know_originals(block, flow.original_outputs)
        return hessians, [stream.original_outputs([window]) for window in range(4)]

    folder = checkpoint("llama")
    walked = rounded(folder)
    hessians, originals = passed(walked)
    plain, expected = passed(skeleton_of(folder))
    assert list(hessians) == list(plain), "rounded copies of one input are still one input"
    assert all(torch.equal(a, b) for a, b in zip(originals, expected, strict=True))

    block, fed = walked.blocks[0], {}
    for path in hessians:
        block.linears[path].register_forward_pre_hook(lambda _, args, path=path: fed.update({path: args[0]}))
    block.run(walked.record(0, tokens(4, LENGTH)))
    for path, hessian in hessians.items():
        X = fed[path].reshape(-1, fed[path].shape[-1])
        torch.testing.assert_close(hessian, X.T @ X / len(X), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(hessian, plain[path], rtol=1e-5, atol=1e-6)


def test_how_a_block_is_built_is_found_as_ever(checkpoint: Checkpoints) -> None:
    def sites(walked: Skeleton) -> list[tuple[str, str, list[int], int]]:
        block = walked.blocks[0]
        block.load()
        call = walked.record(0, tokens(2, LENGTH))
        found = fold.discover(block, input_groups(block, call), call)
        widths = [fold.mixing_width(block, site, call) for site in found]
        return [
            (site.group.names[0], site.producer, site.source.tolist(), width)
            for site, width in zip(found, widths, strict=True)
        ]

    folder = checkpoint("llama")
    assert sites(rounded(folder)) == sites(skeleton_of(folder)) != []


def test_a_path_that_is_none(checkpoint: Checkpoints) -> None:
    walked = skeleton_of(checkpoint("llama"))
    with pytest.raises(ConfigError, match="lm_head is not a linear layer of a block") as caught:
        walked.quantize_inputs({"lm_head": INT8})
    assert "paths look like model.layers.0." in caught.value.hint


def test_a_scheme_that_cannot_be_simulated_changes_nothing(checkpoint: Checkpoints) -> None:
    walked = rounded(checkpoint("llama"))
    path = next(iter(walked.blocks[0].linears))
    with pytest.raises(ConfigError, match="fp8 dynamic per token cannot be simulated"):
        walked.quantize_inputs({path: InputScheme("fp8")})
    assert walked.blocks[0].inputs.schemes[path] == INT8


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


def all_rounded(walked: Skeleton) -> Skeleton:
    walked.quantize_inputs({path: INT8 for block in walked.blocks for path in block.linears})
    return walked


@pytest.mark.parametrize("name", ["mixtral", "llama4", "gpt_oss", "qwen3_moe"])
def test_experts_are_fed_rounded_inputs(mixture: Callable[[str], Skeleton], name: str) -> None:
    walked = all_rounded(mixture(name))
    with seen(walked) as found:
        evaluate(walked)
    experts = {path for block in walked.blocks for path in block.linears if block.is_experts(path)}
    assert experts and experts <= found.keys()
    assert all(was for calls in found.values() for was, _ in calls)


@pytest.mark.parametrize("memory", [HELD, REPEATED])
def test_statistics_of_experts_are_of_rounded_inputs(mixture: Callable[[str], Skeleton], memory: int) -> None:
    """Each expert borrows all other tokens of its layer, so its sums are over what all of them would feed it."""
    walked = all_rounded(mixture("mixtral"))
    block = walked.blocks[0]
    block.load()
    stream = Stream(walked, tokens(4, LENGTH), 2, memory, tokens_per_input=1e6)
    flow = stream.flow(block, input_groups(block, stream.sample(LENGTH)))
    hessians = {group.names[0]: stats.hessian for group, stats in flow.statistics()}

    hidden: list[Tensor] = []
    [(path, experts)] = block.experts.items()
    experts.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    block.run(walked.record(0, tokens(4, LENGTH)))
    up, down = (parts[0] for parts in experts.parts)
    for e in range(experts.experts):
        with torch.no_grad():
            inner = experts.inner(e, hidden[0])
        for part, arrived in ((up, hidden[0]), (down, inner)):
            X = int8_per_token(arrived)
            torch.testing.assert_close(hessians[f"{path}.{e}.{part}"], X.T @ X / len(X), rtol=1e-4, atol=1e-5)
            assert not torch.allclose(X.T @ X, arrived.T @ arrived, rtol=1e-5, atol=1e-6)


def test_experts_of_one_layer_have_one_input_scheme(mixture: Callable[[str], Skeleton]) -> None:
    walked = mixture("mixtral")
    block = walked.blocks[0]
    first = next(path for path in block.linears if block.is_experts(path))
    with pytest.raises(ConfigError, match="would have inputs in float and int8 dynamic per token") as caught:
        walked.quantize_inputs({first: INT8})
    assert "give all of them the same" in caught.value.hint


def test_groups_see_what_a_rounded_block_multiplies(checkpoint: Checkpoints) -> None:
    """`statistics`, which transforms are fitted on."""
    walked = rounded(checkpoint("llama"))
    block = walked.blocks[0]
    block.load()
    call = walked.record(0, tokens(2, LENGTH))
    groups = input_groups(block, call)
    q = next(group for group in groups if group.names[0].endswith("q_proj"))
    fed: list[Tensor] = []
    block.linears[q.names[0]].register_forward_pre_hook(lambda _, args: fed.append(args[0]))
    found = statistics(block, groups, [call])[q].hessian
    X = fed[-1].reshape(-1, q.in_features)
    assert on_grid(X)
    torch.testing.assert_close(found, X.T @ X / len(X), rtol=1e-4, atol=1e-5)
