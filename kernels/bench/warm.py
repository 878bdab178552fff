"""Compile the kernels of a section in advance, in several processes.

Triton compiles on one core and caches compiled kernels on disk, where the measuring process finds them.

    python -m bench.warm --plan full --what w4a16 --worker 3 --workers 12
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from bench import checks, competitors
from bench.plan import PLANS, TUNED_ROWS, Campaign, Plan
from bench.session import Result, Session, first_line
from bench.weights import random_packed
from llmq_kernels.w4a16 import configs, gpu, tune

MOST_WORKERS = 12
KINDS = ("checks", "tune", "w4a16")
TRITON_CONTENDERS = ("naive_triton", "dequantize")
Task = tuple[str, Callable[[], object]]


def compile_ahead(plan: Plan, what: str, session: Session, seconds: float) -> Result:
    """Run the tasks of `what` in parallel processes; the result lists the tasks that failed."""
    workers = max(1, min(MOST_WORKERS, (os.cpu_count() or 2) - 2))
    start = time.monotonic()
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.warm", "--plan", plan.name, "--what", what,
             "--worker", str(worker), "--workers", str(workers)],
            stdout=subprocess.PIPE, text=True,
        )
        for worker in range(workers)
    ]  # fmt: skip
    failed: list[str] = []
    for process in running:
        try:
            output, _ = process.communicate(timeout=max(0.1, start + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            failed.append("a worker did not end in time")
        failed += output.splitlines()
        session.report(f"compiled ahead by {1 + running.index(process)} of {workers} processes")
    taken = time.monotonic() - start
    return {"workers": workers, "failed": failed, "summary": f"{taken:.0f} s, {len(failed)} failed"}


def tasks(plan: Plan, what: str) -> Iterator[Task]:
    """Calls that launch each kernel of a section once, as (name, call)."""
    device = torch.device(plan.device)
    if what == "checks":
        yield from checks.cases(plan, device, repeats=0)
        return
    if what == "tune":
        yield from candidates(plan, device)
        return
    seen: set[object] = set()
    for campaign in plan.campaigns:
        kind = (campaign.dtype, campaign.group)
        for N, K in campaign.layers.values():
            for M in campaign.rows:
                about = (N, K, M, *kind, campaign.asymmetric)
                if about not in seen:
                    seen.add(about)
                    yield f"{about}", partial(one_product, *about, device)
        N, K = next(iter(campaign.layers.values()))
        for name in TRITON_CONTENDERS:
            if (name, *kind, campaign.rows) not in seen:
                seen.add((name, *kind, campaign.rows))
                yield f"{name} {kind}", partial(contender, name, N, K, campaign.rows, *kind, device)


def candidates(plan: Plan, device: torch.device) -> Iterator[Task]:
    """One launch of each kernel that a search for tile sizes tries first."""
    campaign, machine = plan.campaigns[0], gpu.machine_of(device)
    for N, K in campaign.layers.values():
        for M in TUNED_ROWS:
            start = machine.table.config(M, N, K)
            for config in dict.fromkeys(replace(start, **change) for change in ({}, *tune.seeds(start, M))):
                yield f"{N} x {K}, {M} rows, {config}", partial(candidate, N, K, M, campaign, config, device)


def candidate(N: int, K: int, M: int, campaign: Campaign, config: configs.Config, device: torch.device) -> None:
    """One configuration, once."""
    kind = getattr(torch, campaign.dtype)
    packed = random_packed(
        N, K, group=campaign.group, dtype=kind, asymmetric=campaign.asymmetric, copies=1, device=device
    )
    weight, out = packed.weight(0), torch.empty(M, N, dtype=kind, device=device)
    plan = gpu.plan(config, gpu.machine_of(device), gpu.Product.of(M, weight, None))
    gpu.run_fused(plan, torch.randn(M, K, device=device).to(kind), weight, None, out)


def one_product(N: int, K: int, M: int, dtype: str, group: int, asymmetric: bool, device: torch.device) -> None:
    """The op, once."""
    kind = getattr(torch, dtype)
    packed = random_packed(N, K, group=group, dtype=kind, asymmetric=asymmetric, copies=1, device=device)
    competitors.ours(packed).multiply(0, torch.randn(M, K, dtype=kind, device=device))


def contender(name: str, N: int, K: int, rows: tuple[int, ...], dtype: str, group: int, device: torch.device) -> None:
    """A contender that Triton compiles, once for few rows and once for many."""
    kind = getattr(torch, dtype)
    packed = random_packed(N, K, group=group, dtype=kind, asymmetric=True, copies=1, device=device)
    prepared = competitors.ALL[name](packed, kind, 1)
    for M in (min(rows), max(M for M in rows if M <= prepared.most_rows)):
        prepared.multiply(0, torch.randn(M, K, dtype=kind, device=device))


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.warm", description=__doc__)
    parser.add_argument("--plan", choices=PLANS, required=True)
    parser.add_argument("--what", choices=KINDS, required=True)
    parser.add_argument("--worker", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    arguments = parser.parse_args()
    for number, (name, call) in enumerate(tasks(PLANS[arguments.plan], arguments.what)):
        if number % arguments.workers != arguments.worker:
            continue
        try:
            call()
        except Exception as error:  # the section will raise it again, and record it
            print(f"{name}: {first_line(error)}", flush=True)


if __name__ == "__main__":
    main()
