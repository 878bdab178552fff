"""GPTQ's two kernels compiled, on a GPU: equal to the reference, with the same bits in every run."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from llmq_kernels import backend
from llmq_kernels.full_precision import without_tf32
from llmq_kernels.gptq_block import op as block
from llmq_kernels.gptq_block.problem import Problem
from llmq_kernels.gram import op as gram
from llmq_kernels.gram import reference
from tests.kernels.test_gptq_block import Case, assert_equal_but_for_ties, defined, make_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
REPEATS = 20


def on_gpu(case: Case) -> Problem:
    return case.problem("cuda")


@pytest.fixture(params=["triton", "torch"])
def backend_name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(backend.VARIABLE, request.param)
    if backend.choose(torch.device("cuda", 0)).name != request.param:
        pytest.skip(f"the backend {request.param} is not available")
    yield request.param


# ---- rounding


@pytest.mark.parametrize(
    "settings",
    [
        {"N": 200, "K": 512, "group": 128},
        {"N": 1, "K": 129, "group": 16},
        {"N": 37, "K": 300, "group": 32, "bits": 3, "symmetric": True, "shuffled": False},
        {"E": 3, "N": 50, "K": 260, "bits": 2},
        {"N": 64, "K": 256, "group": None, "bits": 8},
    ],
    ids=str,
)
def test_codes_equal_the_reference_except_at_ties(backend_name: str, settings: dict[str, Any]) -> None:
    case = make_case(**settings)
    assert_equal_but_for_ties(case, block.compensate(on_gpu(case)).cpu().numpy())


def test_ties_are_rare(backend_name: str) -> None:
    """Only the first different code of a row counts: later codes of the row depend on it."""
    case = make_case(N=512, K=1024, group=128)
    codes = block.compensate(on_gpu(case)).cpu().numpy()
    rows = int((codes != defined(case)[0]).any(1).sum())
    assert rows / codes.size < 1e-4
    assert_equal_but_for_ties(case, codes)


def test_columns_and_factor_may_have_any_strides(backend_name: str) -> None:
    case = on_gpu(make_case(N=40, K=200))
    columns, upper = (part.mT.contiguous().mT for part in (case.columns, case.upper))
    turned = block.compensate(replace(case, columns=columns, upper=upper))
    expected = block.compensate(case)
    assert (turned != expected).any(1).float().mean() <= 0.1  # cuBLAS adds up in another order: ties


def test_quantization_gives_the_same_bits_every_time(backend_name: str) -> None:
    case = make_case(E=2, N=333, K=400)
    expected = block.compensate(on_gpu(case))
    for _ in range(REPEATS):
        poison = torch.full((1 << 20,), float("nan"), device="cuda")
        del poison  # the content of the scratch memory of the next call
        assert torch.equal(block.compensate(on_gpu(case)), expected)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # an error would leave the mode on for later tests
def test_quantization_does_not_synchronize(backend_name: str) -> None:
    case = on_gpu(make_case(N=40, K=300))
    block.compensate(on_gpu(make_case(N=40, K=300)))  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        block.compensate(case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_quantization_can_be_captured_and_replayed() -> None:
    case = on_gpu(make_case(N=40, K=300))
    columns, work = case.columns.clone(), case.columns
    expected = block.compensate(replace(case, columns=columns.clone()))  # compiles, too
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes = block.compensate(case)
    for _ in range(2):
        work.copy_(columns)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(codes, expected)


@pytest.mark.filterwarnings("ignore:Please use the new API")  # some versions of torch warn about the older switch
def test_tf32_setting_is_ignored_and_restored(backend_name: str) -> None:
    case = make_case(N=64, K=512)
    expected = block.compensate(on_gpu(case))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert torch.equal(block.compensate(on_gpu(case)), expected)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


# ---- the second moment


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("upper_only", [True, False], ids=["upper", "full"])
@pytest.mark.parametrize(("T", "K"), [(1, 16), (300, 272), (4096, 1040), (77, 131)])
def test_second_moment_equals_the_reference(
    backend_name: str, T: int, K: int, upper_only: bool, dtype: torch.dtype
) -> None:
    x = (torch.randn(T, K, generator=torch.Generator().manual_seed(T)) + 0.5).to(dtype)
    total = torch.zeros(K, K, device="cuda")
    if upper_only:
        total.masked_fill_(torch.ones_like(total).tril(-1).bool(), float("nan"))
    for half in x.cuda().split(-(-T // 2)):
        gram.update(total, half, upper_only=upper_only)
    if upper_only:
        gram.mirror(total)
        assert torch.equal(total, total.T)
    X = x.double().numpy()
    expected, magnitude = reference.second_moment(X), reference.second_moment(np.abs(X))
    # Products are exact; a sum of T of them is off by less than T + 2 roundings, even if each of them is truncated.
    assert (np.abs(total.double().cpu().numpy() - expected) <= (T + 2) * 2.0**-23 * magnitude).all()


def test_second_moment_has_the_same_bits_every_time(backend_name: str) -> None:
    x = torch.randn(3000, 1040, device="cuda").to(torch.bfloat16)
    expected = torch.zeros(1040, 1040, device="cuda")
    gram.update(expected, x, upper_only=True)
    for _ in range(REPEATS):
        total = torch.zeros(1040, 1040, device="cuda")
        gram.update(total, x, upper_only=True)
        assert torch.equal(total.triu(), expected.triu())


def test_second_moment_needs_no_second_array(backend_name: str) -> None:
    K = 4 * gram.STRIP
    x, total = torch.randn(64, K, device="cuda").to(torch.bfloat16), torch.zeros(K, K, device="cuda")
    gram.update(total, x, upper_only=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gram.update(total, x, upper_only=True)
    gram.mirror(total)
    assert torch.cuda.max_memory_allocated() - before <= 4 * gram.STRIP * K + (1 << 20)


# ---- both, in llmq


def test_gpu_error_equals_cpu_error(backend_name: str) -> None:
    from llmq.algorithms import Options, gptq, output_error
    from llmq.numerics.input_stats import InputStats
    from llmq.numerics.scheme import WeightScheme

    generator = torch.Generator().manual_seed(0)
    W = torch.randn(48, 400, generator=generator)
    X = (torch.randn(1000, 400, generator=generator) @ torch.randn(400, 400, generator=generator)).to(torch.bfloat16)
    loss = {}
    for device in ("cpu", "cuda"):
        stats = InputStats(400, torch.device(device))
        stats.update(X.to(device))
        for options in (Options(), Options(order="natural", scales="minmax")):
            rounding = gptq.round_weight(W.to(device), stats, WeightScheme(4, 16), options)
            error = output_error(W.to(device), rounding.quantized.dequantize(), stats.second_moment())
            loss[device, options.order] = float(error.sum())
    for order in ("activation", "natural"):
        assert loss["cuda", order] == pytest.approx(loss["cpu", order], rel=0.02)


def test_factorization_holds_one_float64_array() -> None:
    from llmq.algorithms.factor import factorize

    K = 4096
    x = torch.randn(2 * K, K, device="cuda")
    with without_tf32():
        hessian = x.T @ x
    del x
    factorize(hessian, "activation", 0.01)  # workspaces of the libraries
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    factorize(hessian, "activation", 0.01)
    units = (torch.cuda.max_memory_allocated() - before) / (8 * K * K)
    assert units <= 2.2  # one array, half an array for float32, and strips of a quarter or less
