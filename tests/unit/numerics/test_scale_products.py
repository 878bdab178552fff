"""Scales that kernels for fp8 inputs hold without rounding them again, compared with what vLLM does when it loads."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmq import run_plan
from llmq.config import QuantConfig
from llmq.job import Job
from llmq.methods import METHODS
from llmq.numerics import affine_grid, scale_products
from llmq.numerics.affine_grid import Products
from llmq.numerics.scheme import Scheme, WeightScheme
from llmq.setting_fields import merged
from tests.runs import quantize, tensors_of

SCHEME = WeightScheme(4, 32)


def weight(N: int = 16, K: int = 256, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(N, K, generator=draw) * torch.rand(N, K // 32, generator=draw).exp().repeat_interleave(32, 1)


def error(w: torch.Tensor, grid: affine_grid.Grid) -> float:
    return float((grid.quantized(grid.encode(w)).dequantize() - w).square().sum())


@given(seed=st.integers(0, 10**6), size=st.integers(-4, 8), searched=st.booleans())
def test_an_engine_computes_with_the_scales_of_the_file(seed: int, size: int, searched: bool) -> None:
    w, fit = weight(seed=seed) * 2.0**size, affine_grid.fit_searched if searched else affine_grid.fit_minmax
    scales = fit(w, SCHEME, Products(torch.bfloat16)).scales
    assert scales.dtype == torch.bfloat16
    assert torch.equal(scale_products.as_loaded(scales), scales.float())


def test_free_scales_are_changed_and_products_cost_less_than_that() -> None:
    w, values = weight(64), (torch.bfloat16, Products(torch.bfloat16))
    free, products = (affine_grid.fit_searched(w, SCHEME, dtype) for dtype in values)
    loaded = scale_products.as_loaded(free.scales)
    assert float((loaded / free.scales.float() - 1).abs().max()) > 0.03
    changed = dataclasses.replace(free.quantized(free.encode(w)), scales=loaded).dequantize()
    assert error(w, free) < error(w, products) < 0.99 * float((changed - w).square().sum())


@pytest.mark.parametrize("size", [-6, -8, -12])
def test_tiny_rows_have_the_smallest_number_of_engines(size: int) -> None:
    scales = affine_grid.fit_searched(weight() * 2.0**size, SCHEME, Products(torch.bfloat16)).scales.float()
    assert float((scale_products.as_loaded(scales) / scales - 1).abs().max()) < 2.0**-8


@pytest.mark.parametrize("size", [-6, -8, -12])
def test_tiny_rows_lose_no_more_than_others(size: int) -> None:
    w, values = weight() * 2.0**size, (torch.bfloat16, Products(torch.bfloat16))
    free, products = (affine_grid.fit_searched(w, SCHEME, dtype) for dtype in values)
    assert error(w, products) < 1.1 * error(w, free)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_run_with_fp8_inputs_writes_such_scales(
    method: str, checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    model, exact = checkpoint("llama", hidden_size=256, intermediate_size=256), {}
    given = {"method": method, "group_size": 128, "overrides": ["q_proj:activations=none"]}  # k and v share its input
    for activations in ("fp8", "none"):
        quantize(model, tmp_path / activations, text, activations=activations, **given)
        tensors = tensors_of(tmp_path / activations)
        scaled = [name for name in tensors if name.endswith(".weight_scale") and "q_proj" not in name]
        scales = [tensors[name] for name in scaled]
        exact[activations] = [torch.equal(scale_products.as_loaded(one), one.float()) for one in scales]
    assert len(exact["fp8"]) > 2 and all(exact["fp8"]) and not any(exact["none"])


def test_products_are_kept_in_float32_where_float16_cannot_hold_them(
    checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    model, layer = (
        checkpoint("llama", hidden_size=256, intermediate_size=256, dtype="float16"),
        "model.layers.1.mlp.up_proj",
    )
    folder = shutil.copytree(model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{layer}.weight"] *= 2e-4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantize(folder, tmp_path / "out", text, method="rtn", group_size=128, activations="fp8")
    scales = tensors_of(tmp_path / "out")[f"{layer}.weight_scale"]
    assert scales.dtype == torch.float32
    assert torch.equal(scale_products.as_loaded(scales), scales)


def test_tuning_does_not_change_the_scales(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = str(checkpoint("llama", hidden_size=256, intermediate_size=256))
    for method, noted in (("best", True), ("fast", False)):
        settings = merged(QuantConfig(), {"method": method, "activations": "fp8"})
        assert (run_plan.FIXED_SCALES in Job(model, tmp_path / "out", settings, device="cpu").plan.notes) == noted
    fixed = METHODS["best"].with_fixed_scales()
    assert fixed.tuning is not None and fixed.tuning.scales == 0 and fixed.tuning.rounding > 0
    assert METHODS["rtn"].with_fixed_scales() == METHODS["rtn"]
    refitted = dataclasses.replace(METHODS["fast"], refinements=("descent", "refit"))
    assert refitted.with_fixed_scales() == METHODS["fast"]
    assert not Scheme(WeightScheme(4)).scales_are_products
