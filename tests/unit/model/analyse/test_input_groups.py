"""Which weights share an input, and what that input looks like: against hooks on the modules, in float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmq.model.analyse import input_groups
from llmq.model.build.block import Block, Call
from llmq.model.build.skeleton import Skeleton
from tests.builders import skeleton_in_memory, skeleton_of, tokens
from tests.passes import Stack, stream_over

Checkpoints = Callable[..., Path]

# Everything that multiplies one and the same tensor, in the order in which it runs.
GROUPS = {
    "llama": ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"],
    "gemma3": ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"],
    "qwen3": ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "stablelm": ["q_proj k_proj v_proj gate_proj up_proj", "o_proj", "down_proj"],
    "neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "falcon": ["query_key_value dense_h_to_4h", "dense", "dense_4h_to_h"],
}


def loaded_block(skeleton: Skeleton, index: int = 0) -> Block:
    block = skeleton.blocks[index]
    block.load()
    return block


@pytest.mark.parametrize("name", GROUPS)
def test_weights_that_share_an_input_form_a_group(checkpoint: Checkpoints, name: str) -> None:
    skeleton = skeleton_of(checkpoint(name))
    block = loaded_block(skeleton)
    groups = input_groups.input_groups(block, skeleton.record(0, tokens(1, 16)))
    assert [" ".join(path.rpartition(".")[2] for path in group.names) for group in groups] == GROUPS[name]
    assert all(block.linears[path].in_features == group.in_features for group in groups for path in group.names)
    assert {path for group in groups for path in group.names} == set(block.linears)


@pytest.mark.parametrize("name", GROUPS)
def test_statistics_are_sums_over_the_inputs_of_each_module(checkpoint: Checkpoints, name: str) -> None:
    skeleton = skeleton_of(checkpoint(name))
    block, ids = loaded_block(skeleton), tokens(5, 24)
    inputs: dict[str, list[Tensor]] = {path: [] for path in block.linears}

    def hook(path: str) -> Callable[..., None]:
        return lambda _, args: inputs[path].append(args[0].double().flatten(0, -2))

    stream = stream_over(skeleton, ids)
    groups = input_groups.input_groups(block, stream.sample(24))
    stats = input_groups.statistics(block, groups, stream.calls())
    handles = [module.register_forward_pre_hook(hook(path)) for path, module in block.linears.items()]
    for call in stream.calls():
        block.run(call)
    for handle in handles:
        handle.remove()

    for group in groups:
        for path in group.names:
            X = torch.cat(inputs[path])  # (T, K) float64
            T = ids.numel()
            assert stats[group].tokens == len(X) == T
            # A sum of T rounded products in float32 is off by T ε of the sum of their sizes at most.
            bound = T * torch.finfo(torch.float32).eps
            sizes = X.abs().T @ X.abs() / T
            assert bool(((stats[group].second_moment().double() - X.T @ X / T).abs() <= bound * sizes).all())
            assert bool(
                ((stats[group].mean_absolute.double() - X.abs().mean(0)).abs() <= bound * X.abs().mean(0)).all()
            )
            assert torch.equal(stats[group].mean_square, stats[group].second_moment().diagonal())


class Odd(nn.Module):
    """`never` does not run; `twice` runs on two inputs, one of them that of `first`; `alike` gets a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.never, self.first, self.twice, self.alike, self.last = (nn.Linear(8, 8) for _ in range(5))

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        mixed = self.first(normed) + self.twice(normed) + self.alike(normed.clone())
        output: Tensor = hidden + self.last(mixed.tanh()) + self.twice(mixed)
        return output


class OddModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(264, 8)
        self.blocks = nn.ModuleList(Odd() for _ in range(2))

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def test_a_weight_is_in_one_group_or_never_runs() -> None:
    skeleton = skeleton_in_memory(OddModel())
    block = loaded_block(skeleton)
    groups = input_groups.input_groups(block, skeleton.record(0, tokens(1, 4)))
    assert [[path.rpartition(".")[2] for path in group.names] for group in groups] == [
        ["first", "twice"],
        ["alike"],
        ["last"],
    ]


def test_inputs_of_a_call_equal_those_of_the_modules(checkpoint: Checkpoints) -> None:
    skeleton = skeleton_of(checkpoint("llama"))
    block, call = loaded_block(skeleton), skeleton.record(0, tokens(2, 8))
    groups = input_groups.input_groups(block, call)
    seen: dict[str, Tensor] = {}
    for path, module in block.linears.items():
        module.register_forward_pre_hook(lambda _, args, path=path: seen.update({path: args[0].clone()}))
    inputs, output = input_groups.inputs_of(block, groups, call)
    assert torch.equal(output, block.run(call))
    assert all(torch.equal(inputs[group], seen[path]) for group in groups for path in group.names)


class ByKeyword(nn.Module):
    """Two layers that are fed one tensor, one of them by keyword; and one that is fed it changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        mixed = self.first(hidden) + self.second(input=hidden)
        hidden.mul_(2)
        output: Tensor = mixed + self.third(hidden)
        return output


def test_keyword_inputs_and_changed_inputs_are_recognized() -> None:
    block = skeleton_in_memory(Stack(ByKeyword())).blocks[0]
    block.load()
    call = Call((torch.randn(1, 4, 8),), {})
    groups = input_groups.input_groups(block, call)
    assert [[path.rpartition(".")[2] for path in group.names] for group in groups] == [["first", "second"], ["third"]]
    stats = input_groups.statistics(block, groups, [call, call])
    assert [stats[group].tokens for group in groups] == [8, 8]
    assert not any(module._forward_pre_hooks for module in block.module.modules())


def test_hooks_are_removed_after_an_error() -> None:
    block = skeleton_in_memory(Stack(ByKeyword())).blocks[0]
    block.load()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        input_groups.input_groups(block, Call((torch.randn(1, 4, 5),), {}))
    assert not any(module._forward_pre_hooks for module in block.module.modules())
    assert block.inputs.active


def test_with_hidden_replaces_only_the_hidden_state() -> None:
    old, new, mask = torch.zeros(1, 2, 3), torch.ones(1, 2, 3), torch.ones(2)
    for call in (Call((old, mask), {"mask": mask}), Call((), {"hidden_states": old, "mask": mask})):
        changed = call.with_hidden(new)
        assert changed.hidden is new and call.hidden is old
        assert changed.kwargs["mask"] is mask and changed.args[1:] == call.args[1:]
