"""The W4A16 product compared with all alternatives, over rows, layers, dtypes and group sizes.

Before a case is timed, it is compared with float64, with the output in memory that held NaN, and must give the same
bits again.  Contenders are timed in turn in the same loop (`timing.py`).
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from bench import competitors, warm
from bench.competitors import Prepared
from bench.environment import l2_bytes
from bench.plan import Campaign, Plan
from bench.session import Result, Session, first_line
from bench.timing import Contender, interleaved
from bench.weights import TOLERANCES, Packed, copies_for, exact_product, poison, random_packed, relative_error
from llmq_kernels.w4a16 import counters, gpu

OURS = "llmq"
OTHERS_TOLERANCE = 2e-2  # relative error up to which a contender computes the same function
EXPECTED_SECONDS = 6.0  # of the slowest case, including compilation
COMPILE_SHARE = 0.35  # of the time, at most: what is not compiled ahead is compiled by its case
FEW_ROWS = 64  # where a call takes microseconds
CACHE_OF_A_CPU = 1 << 12


def measure(plan: Plan, session: Session) -> None:
    """Cases: compile, MODEL layer dtype gGROUP[ sym] M=rows."""
    if plan.device == "cuda":
        limit = COMPILE_SHARE * session.seconds_left
        session.run("compile", partial(warm.compile_ahead, plan, "w4a16", session, limit))
    for campaign in plan.campaigns:
        for layer, (N, K) in campaign.layers.items():
            label = f"{campaign.model} {layer} {campaign.dtype} g{campaign.group}"
            label += "" if campaign.asymmetric else " sym"
            cases = {f"{label} M={M}": M for M in campaign.rows}
            run_layer(plan, session, campaign, layer, N, K, cases)


def run_layer(
    plan: Plan, session: Session, campaign: Campaign, layer: str, N: int, K: int, cases: Mapping[str, int]
) -> None:
    """Every number of rows with one weight, which is made once, by the first case."""
    made: list[tuple[Packed, dict[str, Prepared], dict[str, str]]] = []

    def case(M: int) -> Result:
        if not made:
            made.append(prepare(plan, campaign, N, K))
        packed, contenders, missing = made[0]
        about: Result = {"model": campaign.model, "layer": layer, "N": N, "K": K, "M": M, "dtype": campaign.dtype}
        about |= {"group": campaign.group, "asymmetric": campaign.asymmetric, "tiles": tiles(M, N, K, plan.device)}
        return about | run_case(plan, packed, contenders, missing, M, getattr(torch, campaign.dtype))

    for name, M in cases.items():
        session.run(name, partial(case, M), needs=EXPECTED_SECONDS if plan.device == "cuda" else 0.0)


def tiles(M: int, N: int, K: int, device: str) -> Result:
    """How our kernel runs this shape: its configuration, the splits of K, and whether it is fused or cuBLAS."""
    machine = gpu.machine_of(torch.device(device))
    config = machine.table.config(M, N, K)
    splits = config.splits(M, N, K, machine.processors)
    return {**asdict(config), "splits": splits, "fused": M <= machine.table.crossover}


def prepare(plan: Plan, campaign: Campaign, N: int, K: int) -> tuple[Packed, dict[str, Prepared], dict[str, str]]:
    """The weight, every contender that can run it, and why the others cannot."""
    device, dtype = torch.device(plan.device), getattr(torch, campaign.dtype)
    cache = plan.caches * l2_bytes(device) or CACHE_OF_A_CPU
    packed = random_packed(
        N, K, group=campaign.group, dtype=dtype, asymmetric=campaign.asymmetric, device=device,
        copies=copies_for(N * K // 2, cache),
    )  # fmt: skip
    contenders = {OURS: competitors.ours(packed)}
    missing = {}
    for name, maker in competitors.ALL.items():
        try:
            contenders[name] = maker(packed, dtype, cache)
        except Exception as error:  # packages fail in many ways; ours is measured anyway
            missing[name] = first_line(error)
    return packed, contenders, missing


def run_case(
    plan: Plan, packed: Packed, contenders: dict[str, Prepared], missing: dict[str, str], M: int, dtype: torch.dtype
) -> Result:
    """Errors, then times, of every contender with M rows."""
    device = packed.words.device
    x = torch.randn(M, packed.in_features, dtype=dtype, device=device)
    exact = exact_product(x, packed)
    errors, same_bits = own_error(x, contenders[OURS], exact)
    right: dict[str, Contender] = {OURS: Contender(lambda i: contenders[OURS].multiply(i, x), packed.copies)}
    others_errors, unavailable = {}, dict(missing)
    for name, prepared in contenders.items():
        if name == OURS:
            continue
        reason = f"left out above {prepared.most_rows} rows" if M > prepared.most_rows else None
        if reason is None and prepared.exact:
            others_errors[name], reason = others_error(x, prepared, exact)
        if reason is None:
            right[name] = Contender(partial(_on, prepared, x), prepared.copies)
        else:
            unavailable[name] = reason
    forget_counters()
    spreads, failed = interleaved(
        right, calls=plan.calls if M <= FEW_ROWS else plan.calls // 2 or 1, replays=plan.replays, device=device
    )
    if OURS not in spreads:
        raise RuntimeError(f"could not be timed: {failed[OURS]}")
    times = {name: spread.microseconds() for name, spread in spreads.items()}
    nbytes = packed.nbytes + (x.numel() + exact.numel()) * x.element_size()
    tolerance = TOLERANCES[dtype]
    wrong = not errors <= tolerance or not same_bits
    return {
        "error": errors, "tolerance": tolerance, "same_bits": same_bits, "wrong": wrong,
        "others_errors": others_errors, "microseconds": times, "unavailable": unavailable | failed, "bytes": nbytes,
        "gigabytes_per_second": nbytes / spreads[OURS].median / 1e9, "summary": summarize(times, errors, wrong),
    }  # fmt: skip


def own_error(x: Tensor, prepared: Prepared, exact: Tensor) -> tuple[float, bool]:
    """The error of our product in memory that held NaN, and whether a second run gives the same bits."""
    poison(exact.shape, x.dtype, x.device)
    first = prepared.multiply(0, x)
    poison(exact.shape, x.dtype, x.device)
    again = prepared.multiply(0, x)
    return relative_error(first, exact), torch.equal(first, again)


def others_error(x: Tensor, prepared: Prepared, exact: Tensor) -> tuple[float, str | None]:
    """The error of a contender, and the reason not to time it: it cannot run or computes something else."""
    try:
        error = relative_error(prepared.multiply(0, x), exact)
    except Exception as failure:
        return float("inf"), first_line(failure)
    return error, None if error <= OTHERS_TOLERANCE else f"wrong by {error:.1e}"


def forget_counters() -> None:
    """Start with new counters for split sums: captured launches keep theirs, and thousands are captured."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    counters._banks.clear()


def summarize(times: Mapping[str, Mapping[str, float]], error: float, wrong: bool) -> str:
    """A line for the terminal."""
    own = times[OURS]["median"]
    ratios = [f"{name} {times[name]['median'] / own:.2f}x" for name in times if name != OURS]
    return f"{own:.1f} µs, error {error:.1e}{' WRONG' if wrong else ''}; times of ours: {', '.join(ratios)}"


def _on(prepared: Prepared, x: Tensor, i: int) -> Tensor:
    return prepared.multiply(i, x)
