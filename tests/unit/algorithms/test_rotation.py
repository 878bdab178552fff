"""Rotations: the matrix, where a block allows one, that its function stays, and who decides whether it is kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from llmq import pipeline
from llmq.algorithms import Options, rotation, rtn
from llmq.config import QuantConfig
from llmq.methods import METHODS, Method
from llmq.model.analyse import fold, input_groups
from llmq.model.analyse.fold import FoldSite
from llmq.model.build.block import Block
from llmq.model.passes.hidden_states import Stream
from llmq.numerics.block_diagonal import columns, inverse, repeated, rows, scaling
from llmq.numerics.input_stats import InputStats
from llmq.numerics.layer_plan import LayerPlan
from llmq.numerics.scheme import Scheme, WeightScheme
from llmq.report.record import StageGain
from llmq.settings import config_to, merged
from tests.builders import skeleton_of, tokens

Checkpoints = Callable[..., Path]
EPSILON = 2.0**-24
SIZES = [1, 2, 8, 16, 128, 3, 12, 80]


# ---- the matrix


@pytest.mark.parametrize("size", SIZES)
def test_the_matrix_is_orthogonal_and_the_seed_decides_it(size: int) -> None:
    R = rotation.orthogonal(size, seed=1)
    np.testing.assert_allclose((R.double() @ R.double().T).numpy(), np.eye(size), atol=size * 4 * EPSILON)
    assert torch.equal(R, rotation.orthogonal(size, seed=1))
    assert size == 1 or not torch.equal(R, rotation.orthogonal(size, seed=2))


@pytest.mark.parametrize("size", [2, 8, 128])
def test_for_a_power_of_two_all_entries_are_equally_large(size: int) -> None:
    R = rotation.orthogonal(size, seed=0)
    torch.testing.assert_close(R.abs(), torch.full((size, size), size**-0.5), rtol=4 * EPSILON, atol=0)


def test_sylvesters_matrix_counts_common_bits() -> None:
    expected = [[(-1.0) ** (i & j).bit_count() for j in range(16)] for i in range(16)]
    assert rotation.hadamard(16).tolist() == expected


def test_a_loud_channel_is_spread_over_its_head() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(400, 32, generator=generator)
    X[:, 5] *= 50
    turned = X @ rotation.orthogonal(32, 0)  # rows are Rᵀ x
    assert float(X.abs().mean(0).max() / X.abs().mean()) > 15
    assert float(turned.abs().mean(0).max() / turned.abs().mean()) < 1.5


def test_where_nothing_may_be_mixed_nothing_is_rotated() -> None:
    stats, unasked = InputStats(8, torch.device("cpu")), cast(Any, None)
    assert rotation.basis(stats, torch.arange(8), lambda: 1, unasked) is None
    found = rotation.basis(stats, torch.arange(8), lambda: 4, unasked)
    assert found is not None and torch.equal(found, torch.stack([rotation.orthogonal(4, rotation.SEED)] * 2))


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
def test_products_with_a_basis_are_those_with_the_whole_matrix(name: str) -> None:
    A, generator = BASES[name], torch.Generator().manual_seed(0)
    W, bias = torch.randn(5, 8, generator=generator), torch.randn(8, generator=generator)
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}  # sums of 8 products in float32
    torch.testing.assert_close(columns(W, A).double(), W.double() @ dense(A), **close)
    torch.testing.assert_close(rows(A, W.T).double(), dense(A) @ W.T.double(), **close)
    torch.testing.assert_close(rows(A, bias).double(), dense(A) @ bias.double(), **close)
    torch.testing.assert_close(dense(inverse(A)) @ dense(A), torch.eye(8, dtype=torch.float64), **close)


@pytest.mark.parametrize("name", BASES)
def test_statistics_in_a_basis_are_those_of_inputs_in_it(name: str) -> None:
    A, generator = BASES[name], torch.Generator().manual_seed(0)
    X, moved = torch.randn(2, 50, 8, generator=generator)
    back = dense(inverse(A)).float()
    before, after = InputStats(8, torch.device("cpu")), InputStats(8, torch.device("cpu"))
    for running, into in ((before, torch.eye(8)), (after, back)):
        for half in (running, running.hold_out()):
            half.update(moved @ into.T, X @ into.T, torch.arange(50))
    found = before.in_basis(A)
    assert found.held_out is not None and after.held_out is not None and found.tokens == 50
    for each, expected in ((found, after), (found.held_out, after.held_out)):
        for moment in ("hessian", "cross") if each is found else ("hessian", "cross", "drift"):
            torch.testing.assert_close(getattr(each, moment), getattr(expected, moment), rtol=1e-4, atol=1e-3)


# ---- where a block allows it


class Loaded:
    """A block with weights and what it is called with."""

    def __init__(self, folder: Path) -> None:
        walked = skeleton_of(folder)
        self.block = walked.blocks[1]
        self.block.load()
        self.call = walked.record(1, tokens(2, 24))
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
    "heads of their own": ("llama", {"num_key_value_heads": 4}, 8),
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
def test_a_gates_product_and_a_norm_mix_nothing(checkpoint: Checkpoints, consumer: str) -> None:
    loaded = Loaded(checkpoint("llama"))
    assert loaded.width(loaded.site(consumer)) == 1


def test_dead_columns_are_not_mixed(checkpoint: Checkpoints) -> None:
    loaded = Loaded(checkpoint("llama"))
    site = loaded.site("o_proj")
    source = torch.where(site.source == 3, -1, site.source)
    assert loaded.width(FoldSite(site.group, site.producer, site.offset, source)) == 1


@pytest.mark.parametrize("case", HEADS)
def test_a_rotation_keeps_the_function_and_is_undone_exactly(checkpoint: Checkpoints, case: str) -> None:
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
    """The first block after the pipeline's step for rotations, and how it was before.

    loud  what the first channel of each head is multiplied by, in W_v and in W_o
    """

    def __init__(self, folder: Path, loud: tuple[float, float], *, held_out: int = 2, left: str = "none") -> None:
        walked = skeleton_of(folder)
        self.block = walked.blocks[0]
        plans = {
            path: LayerPlan(
                path, m.out_features, m.in_features, Scheme(None if path.endswith(left) else WeightScheme(4, 16))
            )
            for path, m in self.block.linears.items()
        }
        self.stream = Stream(walked, tokens(6, 24), batch=2, held_out=held_out)
        nothing = cast(Any, None)
        method = Method(rounding="rtn", transforms=("rotation",))
        run = pipeline.Run(walked, self.stream, plans, method, Options(), nothing, nothing, nothing)
        self.block.load()
        value, output = (self.block.module.get_parameter(f"self_attn.{side}_proj.weight").data for side in "vo")
        value[::8] *= loud[0]
        output[:, ::8] *= loud[1]
        self.before = parameters_of(self.block)
        self.observed = input_groups.statistics(
            self.block, pipeline.group_weights(run, self.block), self.stream.fitted_calls()
        )
        self.told = list(pipeline.transform(run, "rotation", self.block, self.observed))

    @property
    def changed(self) -> set[str]:
        now = parameters_of(self.block)
        return {name for name, was in self.before.items() if not torch.equal(was, now[name])}


SIDES = {"self_attn.v_proj.weight", "self_attn.o_proj.weight"}


@pytest.mark.parametrize(("loud", "wins"), [(HELPS, True), (HARMS, False)])
def test_a_rotation_is_kept_where_it_wins_and_undone_where_not(
    checkpoint: Checkpoints, loud: tuple[float, float], wins: bool
) -> None:
    found = Rewritten(checkpoint("llama"), loud)
    (gain,) = found.told
    assert isinstance(gain, StageGain)
    assert (gain.stage, gain.kept, gain.after < gain.before) == ("rotation", wins, wins)
    assert found.changed == (SIDES if wins else set())  # undone bit for bit


def test_what_is_said_to_be_won_is_the_error_on_held_out_text(checkpoint: Checkpoints) -> None:
    """Both sides rounded to the nearest by hand, in front of the rotation and behind it."""
    found = Rewritten(checkpoint("llama"), HELPS)
    (gain,) = found.told
    assert isinstance(gain, StageGain)
    call, losses = found.stream.call_on([4, 5]), []
    rotated = parameters_of(found.block)
    for weights in (found.before, rotated):
        put(found.block, weights)
        exact = found.block.run(call)
        sides = {side: rtn.round_weight(weights[side], None, WeightScheme(4, 16), Options()) for side in SIDES}
        put(found.block, weights | {side: each.quantized.dequantize() for side, each in sides.items()})
        losses.append(float((found.block.run(call) - exact).double().square().sum()) / 48)
    assert (gain.before, gain.after) == pytest.approx(losses, rel=1e-3)


def test_the_statistics_are_those_of_the_rotated_block(checkpoint: Checkpoints) -> None:
    found = Rewritten(checkpoint("llama"), HELPS)
    assert found.changed
    fresh = input_groups.statistics(found.block, list(found.observed), found.stream.fitted_calls())
    for group, stats in found.observed.items():
        torch.testing.assert_close(stats.second_moment(), fresh[group].second_moment(), rtol=1e-4, atol=1e-4)


def test_without_held_out_text_the_calibration_text_decides_and_no_gain_is_claimed(checkpoint: Checkpoints) -> None:
    found = [Rewritten(checkpoint("llama"), loud, held_out=0) for loud in (HELPS, HARMS)]
    assert [each.told for each in found] == [[], []]
    assert [each.changed for each in found] == [SIDES, set()]


@pytest.mark.parametrize("left", ["v_proj", "o_proj"])
def test_a_layer_that_is_to_stay_is_not_rotated(checkpoint: Checkpoints, left: str) -> None:
    found = Rewritten(checkpoint("llama"), HELPS, left=left)
    assert not found.changed and not any(isinstance(told, StageGain) for told in found.told)


def test_what_a_stage_says_is_legal_is_proved_all_the_same(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the width found wrongly, the MLP's inputs would be mixed, and heads with each other."""
    monkeypatch.setattr(fold, "mixing_width", lambda block, site, probe: 16 if "proj" in site.producer else 1)
    found = Rewritten(checkpoint("llama", num_key_value_heads=4), HELPS)
    told = [each for each in found.told if isinstance(each, str)]
    assert any("down_proj: rotation was undone, it changed" in note for note in told)
    assert any("o_proj: rotation was undone, it changed" in note for note in told)
    assert not found.changed and not any(isinstance(each, StageGain) for each in found.told)


# ---- who asks


@pytest.mark.parametrize("method", METHODS)
def test_any_method_can_rotate_and_then_holds_text_out(method: str) -> None:
    plain, stages = METHODS[method], QuantConfig(method=method, rotate=True).stages
    assert stages.transforms == ("rotation", *plain.transforms)
    assert stages.held_out == (plain.held_out or 0.1) and stages.needs_calibration
    assert QuantConfig(method=method).stages == plain


def test_the_setting_survives_toml_and_merging() -> None:
    asked = merged(QuantConfig(), {"rotate": True})
    assert asked.rotate and QuantConfig.model_validate(config_to(asked)) == asked
    assert merged(asked, {"rotate": None}).rotate
