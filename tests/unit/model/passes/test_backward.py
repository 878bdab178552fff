"""Gradients block by block are those of the whole model under autograd; keeping graphs changes no bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmq.memory import HOST
from llmq.model.build.block import Block
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes import backward as backward_pass
from llmq.model.passes.backward import Tape, backward, differentiable
from llmq.model.passes.forward import run_through
from llmq.model.passes.hidden_states import Place, Storage
from llmq.model.passes.recorded_calls import RecordedCalls
from llmq.model.passes.streams import Text
from llmq.steps import kl_loss as loss
from tests.builders import CONFIGS, WINDOW, skeleton_of, tokens
from tests.passes import CPU_MEMORY

Checkpoints = Callable[..., Path]
LENGTH = 3 * WINDOW  # longer than the window of a sliding layer
# Float32 sums of a few hundred terms in another order; relative to the largest entry of what is compared.
TOLERANCE = 1e-4


def tape_of(skeleton: Skeleton, text: Text, storage: Storage = CPU_MEMORY) -> Tape:
    paths = [path for block in skeleton.blocks for path in block.linears]
    return Tape(skeleton, text, RecordedCalls(skeleton), storage, weights=paths)


def slopes(skeleton: Skeleton, text: Text, outputs: list[Tensor]) -> list[Tensor]:
    """The gradient of the summed `score` of all batches in what the last block put out for each."""
    gradients = []
    for batch, hidden in zip(text.batches(), outputs, strict=True):
        leaf = hidden.detach().requires_grad_(True)
        gradients += torch.autograd.grad(score(skeleton.logits(text.of(batch), leaf)), leaf)
    return gradients


def score(logits: Tensor) -> Tensor:
    """Some loss."""
    return (logits * torch.linspace(-1, 1, logits.shape[-1])).tanh().square().mean()


def gradients_of(
    skeleton: Skeleton, text: Text, storage: Storage = CPU_MEMORY
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What the last block puts out, and the summed gradient of each linear layer's weight, by its path."""
    tape = tape_of(skeleton, text, storage)
    outputs = tape.forward()
    gradients: dict[str, Tensor] = {}
    order: list[tuple[int, range]] = []

    def visit(block: Block, batch: range, __: Tensor) -> None:
        order.append((block.index, batch))
        assert not any(linear.weight.requires_grad for linear in block.linears.values())
        for path, linear in block.linears.items():
            assert linear.weight.grad is not None
            gradients[path] = gradients.get(path, 0) + linear.weight.grad

    backward(skeleton, tape, slopes(skeleton, text, outputs), visit)
    assert order == [(block.index, batch) for block in reversed(skeleton.blocks) for batch in text.batches()]
    assert all(parameter.grad is None for parameter in skeleton.model.parameters())
    assert not tape._inputs
    return outputs, gradients


def whole(folder: Path, paths: list[str], ids: Tensor) -> dict[str, Tensor]:
    """The same from transformers' own model and autograd."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    score(model(input_ids=ids, use_cache=False).logits).backward()
    return {path: model.get_parameter(f"{path}.weight").grad for path in paths}


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_those_of_the_whole_model(checkpoint: Checkpoints, name: str) -> None:
    folder, ids = checkpoint(name), tokens(2, LENGTH)
    _, gradients = gradients_of(skeleton_of(folder), Text(ids, 2))
    expected = whole(folder, list(gradients), ids)
    for path, gradient in gradients.items():
        assert (gradient - expected[path]).abs().max() <= TOLERANCE * expected[path].abs().max(), path
        assert gradient.abs().max() > 0


def test_states_in_files_give_the_same_gradients(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder, text = checkpoint("llama"), Text(tokens(5, LENGTH), 2)
    files = Storage(HOST, Place.FILE, tmp_path / "states")
    (outputs, memory), (other, disk) = (gradients_of(skeleton_of(folder), text, place) for place in (CPU_MEMORY, files))
    assert all(torch.equal(a, b) for a, b in zip(outputs, other, strict=True))
    assert all(torch.equal(memory[path], disk[path]) for path in memory)
    assert [file.name for file in (tmp_path / "states").iterdir()] == ["tape-3"], "the others are behind"


def test_a_visitor_gets_the_gradient_of_the_inputs(checkpoint: Checkpoints) -> None:
    """That of a block's input is that of the output of the block before it."""
    folder, text = checkpoint("llama"), Text(tokens(2, LENGTH), 1)
    skeleton = skeleton_of(folder)
    tape = tape_of(skeleton, text)
    gradients = slopes(skeleton, text, tape.forward())
    by_block: dict[int, list[Tensor]] = {}
    backward(skeleton, tape, gradients, lambda block, _, slope: by_block.setdefault(block.index, []).append(slope))

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, arguments: arguments[0].retain_grad() or inputs.append(arguments[0]))
    model.model.embed_tokens.weight.requires_grad_(True)
    for batch in text.batches():
        inputs.clear()
        score(model(input_ids=text.of(batch), use_cache=False).logits).backward()
        for index, hidden in enumerate(inputs):
            assert hidden.grad is not None
            difference = (by_block[index][batch.start] - hidden.grad).abs().max()
            assert difference <= TOLERANCE * hidden.grad.abs().max()


def test_hooks_see_gradients_of_outputs(checkpoint: Checkpoints) -> None:
    """Of layers whose weights ask for none, in blocks that run a second time."""
    folder, text = checkpoint("llama"), Text(tokens(2, LENGTH), 2)
    skeleton = skeleton_of(folder)
    of_outputs: dict[str, Tensor] = {}
    tape = Tape(skeleton, text, RecordedCalls(skeleton), CPU_MEMORY)
    gradients = slopes(skeleton, text, tape.forward())
    handles = [hooked(p, linear, of_outputs) for block in skeleton.blocks for p, linear in block.linears.items()]

    def visit(block: Block, _: range, __: Tensor) -> None:
        assert all(linear.weight.grad is None for linear in block.linears.values())

    backward(skeleton, tape, gradients, visit)
    for handle in handles:
        handle.remove()

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected: dict[str, Tensor] = {}
    for path in of_outputs:
        hooked(path, model.get_submodule(path), expected)
    score(model(input_ids=text.tokens, use_cache=False).logits).backward()
    assert len(of_outputs) == sum(len(block.linears) for block in skeleton.blocks)
    for path, of_output in of_outputs.items():
        assert (of_output - expected[path]).abs().max() <= TOLERANCE * expected[path].abs().max(), path


def test_known_tokens_are_recorded_by_the_first_block(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of tuning takes tokens that were compared before: nothing but their embedding is recorded."""
    skeleton, text = skeleton_of(checkpoint("llama")), Text(tokens(2, LENGTH), 2)
    calls = RecordedCalls(skeleton)
    before = Tape(skeleton, text, calls, CPU_MEMORY).forward()
    recorded: list[int] = []
    record = skeleton.record
    monkeypatch.setattr(skeleton, "record", lambda index, ids: recorded.append(index) or record(index, ids))
    monkeypatch.delattr(Skeleton, "record_all")
    after = Tape(skeleton, text, calls, CPU_MEMORY, seen=True).forward()
    assert recorded == [0] and torch.equal(before[0], after[0])


def hooked(path: str, linear: nn.Module, into: dict[str, Tensor]) -> torch.utils.hooks.RemovableHandle:
    """Put the gradient of the layer's output into `into`."""

    def watch(_: nn.Module, __: object, output: Tensor) -> None:
        output.register_hook(lambda gradient: into.__setitem__(path, gradient))

    return linear.register_forward_hook(watch)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("place", [Place.HOST, Place.FILE])
def test_running_a_text_through_gives_the_models_logits(
    checkpoint: Checkpoints, tmp_path: Path, name: str, place: Place
) -> None:
    """Hidden states of sequences, read in another order, give the model's logits; also a part at a time."""
    folder, ids = checkpoint(name), tokens(5, LENGTH)
    skeleton = skeleton_of(folder)
    passed = run_through(skeleton, Text(ids, 2), Storage(HOST, place, tmp_path / "states"))
    order = [3, 0, 4]
    with torch.no_grad():
        logits = skeleton.logits(ids[order], passed.last(order))
        part = skeleton.logits(ids[3:4, 5:9], passed.last([3])[..., 5:9, :])
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=ids).logits
    assert (logits - expected[order]).abs().max() <= TOLERANCE * expected.abs().max()
    assert (part - expected[3:4, 5:9]).abs().max() <= TOLERANCE * expected.abs().max()
    assert (tmp_path / "states").exists() == (place is Place.FILE)
    passed.clear()
    assert not list(tmp_path.glob("states/*"))


def test_the_loss_of_parts_equals_the_loss_of_all(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton, ids = skeleton_of(checkpoint("llama")), tokens(3, LENGTH)
    generator = torch.Generator().manual_seed(0)
    expected, hidden = (torch.randn(3, LENGTH, 32, generator=generator) for _ in range(2))
    once, slope = loss.kl_loss(skeleton, ids, expected, hidden)
    leaf = hidden.clone().requires_grad_(True)
    target, predicted = skeleton.logits(ids, expected), skeleton.logits(ids, leaf)
    slow = torch.nn.functional.kl_div(
        predicted.log_softmax(-1).flatten(0, 1), target.log_softmax(-1).flatten(0, 1).detach(),
        reduction="batchmean", log_target=True,
    )  # fmt: skip
    assert once == pytest.approx(slow.item(), rel=1e-5)
    torch.testing.assert_close(slope, torch.autograd.grad(slow, leaf)[0], rtol=1e-3, atol=1e-7)
    for at_once in (2 * LENGTH, LENGTH - 7):  # two windows and one; parts of a window
        monkeypatch.setattr(loss, "LOGITS_AT_ONCE", {"cpu": at_once * skeleton.vocabulary})
        total, gradient = loss.kl_loss(skeleton, ids, expected, hidden)
        assert total == pytest.approx(once, rel=1e-5)
        torch.testing.assert_close(gradient, slope, rtol=1e-3, atol=1e-7)


def test_a_gradient_in_float16_is_not_rounded_to_zero(checkpoint: Checkpoints) -> None:
    folder, ids = checkpoint("llama"), tokens(8, LENGTH)
    generator = torch.Generator().manual_seed(0)
    expected = 100 * torch.randn(8, LENGTH, 32, generator=generator)  # large states have small gradients
    hidden = expected + 3 * torch.randn(8, LENGTH, 32, generator=generator)
    in_half = loss.kl_loss(skeleton_of(folder, dtype=torch.float16), ids, expected.half(), hidden.half())[1].float()
    exact = loss.kl_loss(skeleton_of(folder), ids, expected.half().float(), hidden.half().float())[1]
    assert float((in_half == 0).float().mean()) < 0.1
    assert float(torch.cosine_similarity(in_half.flatten(), exact.flatten(), dim=0)) > 0.9


def test_a_graph_contains_only_named_weights(checkpoint: Checkpoints) -> None:
    skeleton = skeleton_of(checkpoint("llama"))
    block, call = skeleton.blocks[0], skeleton.record(0, tokens(2, LENGTH))
    block.load()
    (weight, *others) = (linear.weight for linear in block.linears.values())
    with torch.no_grad():  # whatever mode the caller is in
        hidden, output = differentiable(block, call, [weight])
    assert torch.equal(output.detach(), block.run(call))
    assert not any(parameter.requires_grad for parameter in [weight, *others])
    weight.requires_grad_(True)  # torch computes gradients only for tensors that require them
    of_hidden, of_weight = torch.autograd.grad(output.square().sum(), [hidden, weight])
    assert of_hidden.abs().max() > 0 and of_weight.abs().max() > 0


def test_gradients_of_weights_do_not_need_that_of_the_input(checkpoint: Checkpoints) -> None:
    skeleton = skeleton_of(checkpoint("llama"))
    block, call = skeleton.blocks[1], skeleton.record(1, tokens(2, LENGTH))
    block.load()
    weights = [linear.weight for linear in block.linears.values()]
    slope = torch.ones_like(call.hidden)
    of_input, *expected = backward_pass.gradients_of(differentiable(block, call, weights), weights, slope)
    graph = differentiable(block, call, weights, of_input=False)
    gradients = backward_pass.gradients_of(graph, weights, slope)
    assert of_input.abs().max() > 0
    assert all(torch.equal(ours, other) for ours, other in zip(gradients, expected, strict=True))
    unused = backward_pass.gradients_of(differentiable(block, call, of_input=False), weights, slope)
    assert not any(gradient.any() for gradient in unused)
