"""The steps of GPTQ alone, at the sizes of one block, without the rest of the pipeline."""

from functools import partial

import torch

from bench.plan import Llama, Plan
from bench.session import Result, Session
from bench.timing import events
from llmq.algorithms.factor import factorize
from llmq.config import QuantConfig
from llmq.numerics.input_stats import InputStats
from llmq_kernels.gptq_block import op as gptq_block
from llmq_kernels.gptq_block.problem import Problem

REPEATS = 3
TOKENS_PER_BATCH = 32_768  # of `llmq quantize` on a GPU, whose module needs more packages than this one


def measure(plan: Plan, session: Session) -> None:
    """Cases: hessian K=…, factorize K=…, round NAME."""
    device = torch.device(plan.device)
    for K in dict.fromkeys((plan.llama.hidden, plan.llama.intermediate)):
        session.run(f"hessian K={K}", partial(time_hessian, plan, K, device))
        session.run(f"factorize K={K}", partial(time_factorize, K, device))
    for name, (N, K) in input_groups(plan.llama).items():
        session.run(f"round {name}", partial(time_round, N, K, device))


def input_groups(llama: Llama) -> dict[str, tuple[int, int]]:
    """The weights of a block that are quantized together: name -> (N, K)."""
    width = llama.hidden // llama.heads
    return {
        "qkv": (llama.hidden + 2 * llama.key_heads * width, llama.hidden),
        "o": (llama.hidden, llama.hidden),
        "gate_up": (2 * llama.intermediate, llama.hidden),
        "down": (llama.hidden, llama.intermediate),
    }


def time_hessian(plan: Plan, K: int, device: torch.device) -> Result:
    """`InputStats.update` on one batch of activations, compared with a float32 product of the same size."""
    tokens = min(TOKENS_PER_BATCH, plan.windows * plan.tokens)
    x = torch.randn(tokens, K, device=device).to(activation_dtype(device))
    stats, gram = InputStats(K, device), torch.zeros(K, K, device=device)
    ours = events(lambda: stats.update(x), repeats=REPEATS, device=device).median

    def plain() -> None:
        wide = x.float()
        gram.addmm_(wide.T, wide)

    float32 = events(plain, repeats=REPEATS, device=device).median
    x, exact = x.double(), torch.zeros(K, K, dtype=torch.float64, device=device)
    exact.addmm_(x.T, x).div_(len(x))
    error = float((stats.second_moment().double() - exact).norm() / exact.norm())
    result = {"K": K, "tokens": tokens, "step_seconds": ours, "float32_seconds": float32, "error": error}
    result |= {"operations_per_second": 2 * tokens * K * K / ours, "wrong": not error < 1e-4}
    return {**result, "summary": f"{1e3 * ours:.2f} ms for {tokens} tokens, in float32 {1e3 * float32:.2f} ms"}


def time_factorize(K: int, device: torch.device) -> Result:
    """`factorize` on the Hessian of random activations."""
    stats = InputStats(K, device)
    stats.update(torch.randn(2 * K, K, device=device).to(activation_dtype(device)))
    hessian = stats.second_moment()
    seconds = events(lambda: factorize(hessian, "activation", 0.01), repeats=REPEATS - 1, device=device).median
    return {"K": K, "step_seconds": seconds, "summary": f"{1e3 * seconds:.1f} ms"}


def time_round(N: int, K: int, device: torch.device) -> Result:
    """All columns of a weight; and its last block alone, after which there is nothing to update."""
    scheme = QuantConfig().scheme
    width = scheme.columns_per_group(K)
    weight = torch.randn(1, K, N, device=device)
    columns, codes = weight.clone(), torch.empty(1, K, N, dtype=torch.uint8, device=device)
    upper = (torch.randn(1, K, K, device=device) * 1e-3).triu(1) + torch.eye(K, device=device)
    scales = torch.full((1, -(-K // width), N), 0.4, device=device)
    zeros = torch.full_like(scales, scheme.middle)
    group_of = (torch.arange(K, device=device) // width).to(torch.int32)[None]
    blocks = -(-K // gptq_block.BLOCK)

    problem = Problem(columns, upper, scales, zeros, group_of, scheme.levels)

    def every_column() -> None:
        columns.copy_(weight)
        gptq_block.compensate(problem)

    def last_block() -> None:
        gptq_block.quantize_columns(problem, codes, (blocks - 1) * gptq_block.BLOCK, K)

    whole = events(every_column, repeats=REPEATS, device=device).median
    last = events(last_block, repeats=REPEATS, device=device).median
    result = {"N": N, "K": K, "step_seconds": whole, "block_kernel_seconds": blocks * last}
    return {**result, "summary": f"{1e3 * whole:.2f} ms, its {blocks} block kernels {1e3 * blocks * last:.2f} ms"}


def activation_dtype(device: torch.device) -> torch.dtype:
    """bf16; float32 on a CPU, where the suite is only tested."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
