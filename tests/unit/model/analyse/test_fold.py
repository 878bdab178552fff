"""Folding: what makes an input is found, the block's function stays, and what would change it is taken back."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llmq.methods import METHODS
from llmq.model.analyse import fold, input_groups
from llmq.model.analyse.fold import FoldSite
from llmq.model.analyse.input_groups import InputGroup
from llmq.model.build.block import Block
from llmq.model.passes.streams import Streams
from llmq.numerics.block_diagonal import scaling
from llmq.numerics.scheme import WeightScheme
from llmq.steps.transforms import BlockTransforms, Observed
from tests.builders import skeleton_in_memory, skeleton_of, tokens
from tests.passes import Stack, plans_of, run_without_output, streams_over

Checkpoints = Callable[..., Path]

# A folding rounds a handful of times where the block rounded once: some 5 * 2**-24 in each product, and sums that
# cancel make that larger.  A hundredth of what the proof lets pass is far above it, and far below any mistake.
UNCHANGED = fold.OUTPUT_TOLERANCE / 100

# name -> for the weights of a group, the module that makes their input, and the offset of its weight
SITES = {
    "llama": {
        "q_proj k_proj v_proj": ("input_layernorm", 0.0),
        "o_proj": ("self_attn.v_proj", 0.0),
        "gate_proj up_proj": ("post_attention_layernorm", 0.0),
        "down_proj": ("mlp.up_proj", 0.0),
    },
    "gemma3": {  # norms multiply by 1 + weight
        "q_proj k_proj v_proj": ("input_layernorm", 1.0),
        "o_proj": ("self_attn.v_proj", 0.0),
        "gate_proj up_proj": ("pre_feedforward_layernorm", 1.0),
        "down_proj": ("mlp.up_proj", 0.0),
    },
    "stablelm": {  # LayerNorm with a bias, one for attention and MLP
        "q_proj k_proj v_proj gate_proj up_proj": ("input_layernorm", 0.0),
        "o_proj": ("self_attn.v_proj", 0.0),
        "down_proj": ("mlp.up_proj", 0.0),
    },
    "neox": {  # a GELU lies in front of dense_4h_to_h, and v is in one weight with q and k
        "query_key_value": ("input_layernorm", 0.0),
        "dense_h_to_4h": ("post_attention_layernorm", 0.0),
    },
}


class Loaded:
    """A block with weights, what it is called with, and its input groups by the names of their weights."""

    def __init__(self, folder: Path, index: int = 1) -> None:
        self.skeleton = skeleton_of(folder)
        self.block = self.skeleton.blocks[index]
        self.block.load()
        self.call = self.skeleton.record(index, tokens(2, 24))
        self.groups = input_groups.input_groups(self.block, self.call)

    def sites(self) -> dict[str, FoldSite]:
        sites = fold.discover(self.block, self.groups, self.call)
        return {short_name(site.group): site for site in sites}

    def output(self) -> Tensor:
        return self.block.run(self.call)


def short_name(group: InputGroup) -> str:
    return " ".join(path.rpartition(".")[2] for path in group.names)


def scales_for(site: FoldSite, *, seed: int = 0) -> Tensor:
    """Random scales (K,) from 1/8 to 8, alike where columns share their source, 1 where none was seen."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.rand(int(site.source.max()) + 1, generator=generator)
    return torch.where(site.source >= 0, 64 ** channels[site.source.clamp(min=0)] / 8, 1.0)


def parameters_of(block: Block) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in block.module.named_parameters()}


@pytest.mark.parametrize("name", SITES)
def test_the_producer_of_each_input_is_found(checkpoint: Checkpoints, name: str) -> None:
    sites = Loaded(checkpoint(name)).sites()
    assert {group: (site.producer, site.offset) for group, site in sites.items()} == SITES[name]


def test_the_sources_of_grouped_heads_repeat(checkpoint: Checkpoints) -> None:
    sites = Loaded(checkpoint("llama")).sites()  # 4 query heads of 8, 2 value heads
    first, second = list(range(8)), list(range(8, 16))
    assert sites["o_proj"].source.tolist() == [*first, *first, *second, *second]
    for group, channels in (("q_proj k_proj v_proj", 32), ("gate_proj up_proj", 32), ("down_proj", 64)):
        assert sites[group].source.tolist() == list(range(channels))


def test_discovery_changes_no_parameter(checkpoint: Checkpoints) -> None:
    loaded = Loaded(checkpoint("gemma3"))
    before = parameters_of(loaded.block)
    loaded.sites()
    assert all(torch.equal(before[name], now) for name, now in parameters_of(loaded.block).items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SITES)
def test_folding_keeps_the_function_and_undoing_is_exact(checkpoint: Checkpoints, name: str, dtype: str) -> None:
    loaded = Loaded(checkpoint(name, dtype=dtype))
    before, parameters = loaded.output(), parameters_of(loaded.block)
    for site in loaded.sites().values():
        undo, _ = fold.apply(loaded.block, site, scaling(scales_for(site)))
        changed = {name for name, now in parameters_of(loaded.block).items() if not torch.equal(parameters[name], now)}
        consumers = {f"{path.removeprefix(loaded.block.path)[1:]}.weight" for path in site.group.names}
        assert changed - {f"{site.producer}.bias"} == consumers | {f"{site.producer}.weight"}
        assert fold.moved(loaded.call.hidden, before, loaded.output()) < UNCHANGED
        undo()
        assert all(torch.equal(parameters[name], now) for name, now in parameters_of(loaded.block).items())


@pytest.mark.parametrize("name", ["llama", "gemma3", "stablelm"])
def test_all_foldings_together_keep_the_function(checkpoint: Checkpoints, name: str) -> None:
    loaded = Loaded(checkpoint(name))
    before = loaded.output()
    for site in loaded.sites().values():
        fold.apply(loaded.block, site, scaling(scales_for(site)))
    assert fold.moved(loaded.call.hidden, before, loaded.output()) < UNCHANGED


@pytest.mark.parametrize("name", ["llama", "gemma3", "stablelm"])
def test_a_folded_norm_keeps_its_function_in_stored_bits(checkpoint: Checkpoints, name: str) -> None:
    loaded = Loaded(checkpoint(name, dtype="bfloat16"))
    site = next(iter(loaded.sites().values()))
    norm = loaded.block.module.get_submodule(site.producer)
    old = norm.get_parameter("weight") + site.offset
    old = old.detach().clone()
    asked = scales_for(site)
    _, folded = fold.apply(loaded.block, site, scaling(asked))
    stored = loaded.block.stored_parameters()[f"{loaded.block.path}.{site.producer}.weight"]
    assert stored.dtype == torch.bfloat16
    # What the file holds times what went into the columns: one division and one product away from what it was.
    torch.testing.assert_close((stored.float() + site.offset) * folded.flatten(), old, rtol=2 * 2**-24, atol=0)
    # 8 significant bits of the weight, of which adding 1 to it may cancel some.
    room = 2**-8 * stored.float().abs() / (stored.float() + site.offset).abs()
    assert bool(((folded.flatten() / asked - 1).abs() <= room + 2**-22).all())


def test_dead_columns_have_no_source_and_are_kept(checkpoint: Checkpoints) -> None:
    loaded = Loaded(checkpoint("llama"))
    norm = loaded.block.module.get_submodule("input_layernorm").get_parameter("weight")
    norm.data[5] = 0
    before, parameters = loaded.output(), parameters_of(loaded.block)
    site = loaded.sites()["q_proj k_proj v_proj"]
    assert site.source.tolist() == [-1 if channel == 5 else channel for channel in range(32)]
    _, folded = fold.apply(loaded.block, site, scaling(scales_for(site)))
    assert folded[5] == 1 and norm[5] == 0
    for path in site.group.names:
        name = f"{path.removeprefix(loaded.block.path)[1:]}.weight"
        assert torch.equal(loaded.block.linears[path].weight[:, 5], parameters[name][:, 5])
    assert fold.moved(loaded.call.hidden, before, loaded.output()) < UNCHANGED


def test_a_nan_in_the_output_counts_as_a_change() -> None:
    hidden, before = torch.ones(1, 2, 3), torch.full((1, 2, 3), 3.0)  # the block adds 2
    assert fold.moved(hidden, before, before) == 0
    assert fold.moved(hidden, before, before + 1) == pytest.approx(0.5)
    assert fold.moved(hidden, before, before * float("nan")) == float("inf")


def test_a_large_token_does_not_hide_a_change() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 64, 8, generator=generator)
    added = torch.randn(1, 64, 8, generator=generator)
    hidden[0, 0] *= 1e6  # a sink: compared with it, the change of all other tokens is tiny
    assert fold.moved(hidden, hidden + added, hidden + 1.05 * added) == pytest.approx(0.05, rel=1e-2)


class Normed(nn.Module):
    """A norm and a linear layer; `leak` of the norm's output goes past the linear layer, into the block's output."""

    def __init__(self, leak: float) -> None:
        super().__init__()
        self.norm, self.linear, self.leak = nn.RMSNorm(32), nn.Linear(32, 32, bias=False), leak
        self.norm.weight.data[:2] = 20.0  # large channels, which AWQ will want to scale

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        output: Tensor = hidden + self.linear(normed) + self.leak * normed
        return output


class Transformed:
    """The first block after AWQ, how it was before, and what was observed before and after."""

    def __init__(self, leak: float) -> None:
        torch.manual_seed(0)
        skeleton = skeleton_in_memory(Stack(Normed(leak), Normed(leak), vocabulary=264, width=32))
        self.block: Block = skeleton.blocks[0]
        self.streams: Streams = streams_over(skeleton, tokens(4, 16))
        run = run_without_output(skeleton, self.streams, plans_of(self.block, WeightScheme(3, 16)), METHODS["awq"])
        self.block.load()
        self.before = parameters_of(self.block)
        groups = input_groups.input_groups(self.block, self.streams.quantized.sample(16))
        transforms = BlockTransforms(run, self.streams, self.block, groups)
        self.observed_before: Observed = dict(transforms.observed)
        transforms.apply("awq")
        self.observed, self.notes, self.gains = transforms.observed, transforms.notes, transforms.gains


def test_a_folding_that_changes_the_output_is_undone() -> None:
    result = Transformed(leak=0.5)
    assert all(torch.equal(result.before[name], now) for name, now in parameters_of(result.block).items())
    assert result.observed == result.observed_before  # the same statistics, not equal ones
    (note,) = result.notes
    assert note.startswith("blocks.0.linear: awq") and "undone" in note


def test_a_folding_is_kept_if_nothing_else_uses_the_norm() -> None:
    result = Transformed(leak=0.0)
    assert result.notes == [] and result.gains == []  # no validation text says what it gained
    after = parameters_of(result.block)
    assert not torch.equal(result.before["norm.weight"], after["norm.weight"])
    (group,) = result.observed
    old, new = result.observed_before[group], result.observed[group]
    scales = after["linear.weight"] / result.before["linear.weight"]  # (N, K), the same in every row
    expected = old.second_moment() / (scales[0][:, None] * scales[0][None, :])
    torch.testing.assert_close(new.second_moment(), expected, rtol=1e-5, atol=0)
    fresh = input_groups.statistics(result.block, [group], result.streams.quantized.calls())[group]
    torch.testing.assert_close(new.mean_absolute, fresh.mean_absolute, rtol=1e-5, atol=0)


def test_a_norm_that_gemma3n_uses_twice_is_caught(checkpoint: Checkpoints) -> None:
    loaded = Loaded(checkpoint("gemma3n"))
    before = loaded.output()
    site = next(site for site in loaded.sites().values() if site.producer == "input_layernorm")
    fold.apply(loaded.block, site, scaling(scales_for(site)))
    assert fold.moved(loaded.call.hidden, before, loaded.output()) > 10 * fold.OUTPUT_TOLERANCE
