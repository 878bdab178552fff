"""Rotations: the matrix, where a block allows one, that its function stays, and who decides whether it is kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from llmq.algorithms import Options, rotation, rtn
from llmq.config import QuantConfig
from llmq.methods import METHODS, Method
from llmq.model.analyse import fold, input_groups
from llmq.model.analyse.fold import FoldSite
from llmq.model.build.block import Block
from llmq.numerics.block_diagonal import columns, inverse, repeated, rows, scaling
from llmq.numerics.input_stats import InputStats
from llmq.numerics.scheme import WeightScheme
from llmq.setting_fields import config_to, merged
from llmq.steps.transforms import BlockTransforms
from tests.builders import skeleton_of, tokens
from tests.passes import plans_of, run_without_output, streams_over

Checkpoints = Callable[..., Path]
EPSILON = 2.0**-24
SIZES = [1, 2, 8, 16, 128, 3, 12, 80]


# ---- the matrix


@pytest.mark.parametrize("size", SIZES)
def test_the_matrix_is_orthogonal_and_drawn_by_its_seed(size: int) -> None:
    R = rotation.orthogonal(size, seed=1)
    np.testing.assert_allclose((R.double() @ R.double().T).numpy(), np.eye(size), atol=size * 4 * EPSILON)
    assert torch.equal(R, rotation.orthogonal(size, seed=1))
    assert size == 1 or not torch.equal(R, rotation.orthogonal(size, seed=2))


@pytest.mark.parametrize("size", [2, 8, 128])
def test_entries_are_equally_large_for_powers_of_two(size: int) -> None:
    R = rotation.orthogonal(size, seed=0)
    torch.testing.assert_close(R.abs(), torch.full((size, size), size**-0.5), rtol=4 * EPSILON, atol=0)


def test_sylvesters_matrix_counts_common_bits() -> None:
    expected = [[(-1.0) ** (i & j).bit_count() for j in range(16)] for i in range(16)]
    assert rotation.hadamard(16).tolist() == expected


def test_a_large_channel_is_spread_over_its_head() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(400, 32, generator=generator)
    X[:, 5] *= 50
    turned = X @ rotation.orthogonal(32, 0)  # rows are Rᵀ x
    assert float(X.abs().mean(0).max() / X.abs().mean()) > 15
    assert float(turned.abs().mean(0).max() / turned.abs().mean()) < 1.5


def test_channels_that_cannot_be_mixed_are_not_rotated() -> None:
    stats, unasked = InputStats(8, torch.device("cpu")), cast(Any, None)
    assert rotation.basis(stats, torch.arange(8), lambda: 1, unasked) is None
    basis = rotation.basis(stats, torch.arange(8), lambda: 4, unasked)
    assert basis is not None and torch.equal(basis, torch.stack([rotation.orthogonal(4, rotation.SEED)] * 2))


# ---- a basis


def dense(basis: Tensor) -> Tensor:
    """A (K, K), with all its zeros, float64."""
    whole: Tensor = torch.block_diag(*basis.double())
    return whole


BASES = {
    "scales": scaling(torch.tensor([0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 0.1, 7.0])),
    "rotation": repeated(rotation.orthogonal(4, 0), 8),
    "any": torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(3)) + 2 * torch.eye(2),
}


@pytest.mark.parametrize("name", BASES)
def test_products_with_a_basis_equal_dense_products(name: str) -> None:
    A, generator = BASES[name], torch.Generator().manual_seed(0)
    W, bias = torch.randn(5, 8, generator=generator), torch.randn(8, generator=generator)
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}  # sums of 8 products in float32
    torch.testing.assert_close(columns(W, A).double(), W.double() @ dense(A), **close)
    torch.testing.assert_close(rows(A, W.T).double(), dense(A) @ W.T.double(), **close)
    torch.testing.assert_close(rows(A, bias).double(), dense(A) @ bias.double(), **close)
    torch.testing.assert_close(dense(inverse(A)) @ dense(A), torch.eye(8, dtype=torch.float64), **close)


@pytest.mark.parametrize("name", BASES)
def test_statistics_in_a_basis_equal_those_of_its_inputs(name: str) -> None:
    A, generator = BASES[name], torch.Generator().manual_seed(0)
    X, moved = torch.randn(2, 50, 8, generator=generator)
    back = dense(inverse(A)).float()
    before, after = InputStats(8, torch.device("cpu")), InputStats(8, torch.device("cpu"))
    for running, into in ((before, torch.eye(8)), (after, back)):
        for half in (running, running.begin_validation()):
            half.update(moved @ into.T, X @ into.T, torch.arange(50))
    converted = before.in_basis(A)
    assert converted.validation is not None and after.validation is not None and converted.tokens == 50
    for stats, expected in ((converted, after), (converted.validation, after.validation)):
        for moment in ("second_moment", "cross_moment", *(() if stats is converted else ("drift_moment",))):
            torch.testing.assert_close(getattr(stats, moment)(), getattr(expected, moment)(), rtol=1e-4, atol=1e-3)


# ---- where a block allows it


class Loaded:
    """A block with weights and what it is called with."""

    def __init__(self, folder: Path) -> None:
        skeleton = skeleton_of(folder)
        self.block = skeleton.blocks[1]
        self.block.load()
        self.call = skeleton.record(1, tokens(2, 24))
        groups = input_groups.input_groups(self.block, self.call)
        self.sites = fold.discover(self.block, groups, self.call)

    def site(self, consumer: str) -> FoldSite:
        (site,) = [site for site in self.sites if site.group.names[0].endswith(consumer)]
        return site

    def width(self, site: FoldSite) -> int:
        return fold.mixing_width(self.block, site, self.call)


def put(block: Block, parameters: dict[str, Tensor]) -> None:
    for name, parameter in block.module.named_parameters():
        parameter.data.copy_(parameters[name])


def parameters_of(block: Block) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in block.module.named_parameters()}


HEADS: dict[str, tuple[str, dict[str, Any], int]] = {
    "grouped heads": ("llama", {}, 8),
    "separate heads": ("llama", {"num_key_value_heads": 4}, 8),
    "one head for all": ("llama", {"num_key_value_heads": 1}, 8),
    "12 channels": ("llama", {"head_dim": 12}, 12),
    "a bias": ("stablelm", {}, 8),
}


@pytest.mark.parametrize("case", HEADS)
def test_the_size_of_heads_is_found(checkpoint: Checkpoints, case: str) -> None:
    name, changes, size = HEADS[case]
    loaded = Loaded(checkpoint(name, **changes))
    before = parameters_of(loaded.block)
    assert loaded.width(loaded.site("o_proj")) == size
    assert all(torch.equal(before[name], now) for name, now in parameters_of(loaded.block).items())


@pytest.mark.parametrize("consumer", ["down_proj", "q_proj", "gate_proj"])
def test_outputs_of_a_gate_or_a_norm_cannot_be_mixed(checkpoint: Checkpoints, consumer: str) -> None:
    loaded = Loaded(checkpoint("llama"))
    assert loaded.width(loaded.site(consumer)) == 1


def test_dead_columns_are_not_mixed(checkpoint: Checkpoints) -> None:
    loaded = Loaded(checkpoint("llama"))
    site = loaded.site("o_proj")
    source = torch.where(site.source == 3, -1, site.source)
    assert loaded.width(FoldSite(site.group, site.producer, site.offset, source)) == 1


@pytest.mark.parametrize("case", HEADS)
def test_a_rotation_keeps_the_function_and_can_be_undone(checkpoint: Checkpoints, case: str) -> None:
    name, changes, size = HEADS[case]
    loaded = Loaded(checkpoint(name, **changes))
    site, parameters, before = loaded.site("o_proj"), parameters_of(loaded.block), loaded.block.run(loaded.call)
    undo, folded = fold.apply(loaded.block, site, repeated(rotation.orthogonal(size, 0), site.group.in_features))
    assert folded.shape == (site.group.in_features // size, size, size)
    after = parameters_of(loaded.block)
    changed = {name for name in after if not torch.equal(after[name], parameters[name])}
    assert changed - {f"{site.producer}.bias"} == {f"{site.producer}.weight", "self_attn.o_proj.weight"}
    assert fold.moved(loaded.call.hidden, before, loaded.block.run(loaded.call)) < fold.OUTPUT_TOLERANCE / 100
    undo()
    assert all(torch.equal(parameters[name], now) for name, now in parameters_of(loaded.block).items())


def test_values_and_outputs_are_rotated_head_by_head(checkpoint: Checkpoints) -> None:
    """By hand: W_v ← Rᵀ W_v of each value head, W_o ← W_o R of each query head."""
    loaded, R = Loaded(checkpoint("stablelm")), rotation.orthogonal(8, 0)
    names = ("v_proj.weight", "v_proj.bias", "o_proj.weight")
    sides = [loaded.block.module.get_parameter(f"self_attn.{name}").data for name in names]
    W_v, b_v, W_o = (side.double() for side in sides)
    fold.apply(loaded.block, loaded.site("o_proj"), repeated(R, 32))
    now_v, now_b, now_o = (side.double() for side in sides)
    for head in range(4):
        own = slice(8 * head, 8 * head + 8)
        torch.testing.assert_close(now_o[:, own], W_o[:, own] @ R.double(), rtol=1e-5, atol=1e-6)
        if head < 2:
            torch.testing.assert_close(now_v[own], R.T.double() @ W_v[own], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(now_b[own], R.T.double() @ b_v[own], rtol=1e-5, atol=1e-6)


# ---- who decides


HELPS = (10.0, 10.0)  # a channel that is loud in W_v and in W_o sets the scale of all others in its group
HARMS = (8.0, 0.25)  # one that W_v makes loud and W_o quiet brings its errors to the others when they are mixed


class Rewritten:
    """The first block after rotations, and how it was before.

    loud        what the first channel of each head is multiplied by, in W_v and in W_o
    validation  how many sequences judge
    kept        the end of the paths of layers that are kept in float
    """

    def __init__(self, folder: Path, loud: tuple[float, float], *, validation: int = 2, kept: str = "none") -> None:
        skeleton = skeleton_of(folder)
        self.block = skeleton.blocks[0]
        self.streams = streams_over(skeleton, tokens(6, 24), validation=validation)
        method = Method(rounding="rtn", transforms=("rotation",))
        run = run_without_output(skeleton, self.streams, plans_of(self.block, WeightScheme(4, 16), kept), method)
        self.block.load()
        value, output = (self.block.module.get_parameter(f"self_attn.{side}_proj.weight").data for side in "vo")
        value[::8] *= loud[0]
        output[:, ::8] *= loud[1]
        self.before = parameters_of(self.block)
        groups = input_groups.input_groups(self.block, self.streams.quantized.sample(24))
        transforms = BlockTransforms(run, self.streams, self.block, groups)
        transforms.apply("rotation")
        self.observed, self.notes, self.gains = transforms.observed, transforms.notes, transforms.gains

    @property
    def changed(self) -> set[str]:
        now = parameters_of(self.block)
        return {name for name, was in self.before.items() if not torch.equal(was, now[name])}


SIDES = {"self_attn.v_proj.weight", "self_attn.o_proj.weight"}


@pytest.mark.parametrize(("loud", "wins"), [(HELPS, True), (HARMS, False)])
def test_a_rotation_is_kept_only_if_it_helps(checkpoint: Checkpoints, loud: tuple[float, float], wins: bool) -> None:
    result = Rewritten(checkpoint("llama"), loud)
    (gain,) = result.gains
    assert (gain.stage, gain.kept, gain.after < gain.before) == ("rotation", wins, wins)
    assert result.changed == (SIDES if wins else set())  # undone bit for bit


def test_reported_gains_are_errors_on_validation_text(checkpoint: Checkpoints) -> None:
    """Both sides rounded to the nearest by hand, in front of the rotation and behind it."""
    result = Rewritten(checkpoint("llama"), HELPS)
    (gain,) = result.gains
    call, losses = result.streams.quantized.call([4, 5]), []
    rotated = parameters_of(result.block)
    for weights in (result.before, rotated):
        put(result.block, weights)
        exact = result.block.run(call)
        sides = {side: rtn.round_weight(weights[side], None, WeightScheme(4, 16), Options()) for side in SIDES}
        rounded = {side: rounding.quantized.dequantize() for side, rounding in sides.items()}
        put(result.block, weights | rounded)
        losses.append(float((result.block.run(call) - exact).double().square().sum()) / 48)
    assert (gain.before, gain.after) == pytest.approx(losses, rel=1e-3)


def test_statistics_are_those_of_the_rotated_block(checkpoint: Checkpoints) -> None:
    result = Rewritten(checkpoint("llama"), HELPS)
    assert result.changed
    fresh = input_groups.statistics(result.block, list(result.observed), result.streams.quantized.fitted_calls())
    for group, stats in result.observed.items():
        torch.testing.assert_close(stats.second_moment(), fresh[group].second_moment(), rtol=1e-4, atol=1e-4)


def test_no_gain_is_reported_without_validation_text(checkpoint: Checkpoints) -> None:
    """The calibration text decides."""
    results = [Rewritten(checkpoint("llama"), loud, validation=0) for loud in (HELPS, HARMS)]
    assert [result.gains for result in results] == [[], []]
    assert [result.changed for result in results] == [SIDES, set()]


@pytest.mark.parametrize("kept", ["v_proj", "o_proj"])
def test_layers_kept_in_float_are_not_rotated(checkpoint: Checkpoints, kept: str) -> None:
    result = Rewritten(checkpoint("llama"), HELPS, kept=kept)
    assert not result.changed and not result.gains


def test_a_rotation_that_changes_the_output_is_undone(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the width found wrongly, the MLP's inputs would be mixed, and heads with each other."""
    monkeypatch.setattr(fold, "mixing_width", lambda block, site, probe: 16 if "proj" in site.producer else 1)
    result = Rewritten(checkpoint("llama", num_key_value_heads=4), HELPS)
    undone = [note for note in result.notes if "undone" in note]
    assert any("down_proj: rotation" in note for note in undone) and any("o_proj: rotation" in note for note in undone)
    assert not result.changed and not result.gains


# ---- who asks


@pytest.mark.parametrize("method", METHODS)
def test_any_method_can_rotate_and_then_validates(method: str) -> None:
    plain, stages = METHODS[method], QuantConfig(method=method, rotate=True).stages
    assert stages.transforms == ("rotation", *plain.transforms)
    assert stages.validation == (plain.validation or 0.1) and stages.needs_calibration
    assert QuantConfig(method=method).stages == plain


def test_the_rotate_setting_is_kept_by_toml_and_merging() -> None:
    asked = merged(QuantConfig(), {"rotate": True})
    assert asked.rotate and QuantConfig.model_validate(config_to(asked)) == asked
    assert merged(asked, {"rotate": None}).rotate
