"""The products that an estimate counts, compared with those that torch counts in a real run: equal, stage by stage."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from llmq import cost
from llmq.config import QuantConfig
from llmq.cost import solver
from llmq.cost.workload import Group
from llmq.methods import METHODS, Method, Tuning
from tests import builders, runs

SEQUENCES, LENGTH, GROUP = 6, 24, 16
MACHINE = cost.Machine("cpu", dict.fromkeys(cost.Kind, 1.0), 1 << 40, 1 << 40, 0)
PRODUCTS = {**flop_registry, torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}  # torch does not list addmm_
TUNED = Tuning(steps=11, scales=1e-3, rounding=1e-3, tokens=2 * LENGTH)
WITH_STAGES: dict[str, Method] = {
    "rtn": METHODS["rtn"],
    "gptq": METHODS["gptq"],
    "fast": METHODS["fast"],
    "refit": replace(METHODS["fast"], refinements=("descent", "refit")),
    "no validation": replace(METHODS["fast"], validation=0.0),
    "token weights": replace(METHODS["gptq"], token_weights=True),
    "block tuning": replace(METHODS["fast"], block_tuning=TUNED),
    "end to end": replace(METHODS["gptq"], validation=0.1, tuning=TUNED),
    "scales only": replace(METHODS["gptq"], validation=0.1, tuning=replace(TUNED, rounding=0.0)),
}


class Products(TorchDispatchMode):
    """Sums torch's FLOP counts of all products, like `FlopCounterMode`, whose hooks a suspended forward would break."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func._overloadpacket in PRODUCTS:
            self.flops += PRODUCTS[func._overloadpacket](*args, **(kwargs or {}), out_val=output)
        return output


def counted_by_torch(run: Callable[[], object]) -> int:
    """FLOP of a run; attention runs as two products, because torch does not count those of its fused attention."""
    with sdpa_kernel(SDPBackend.MATH), Products() as products:
        run()
    return products.flops


def not_counted_by_torch(outline: cost.Outline, method: Method) -> float:
    """FLOP of factorizations and systems of equations, which are no products."""
    flops = 0.0
    for block in outline.blocks:
        for numbers in block.groups:
            K, N = block.layers[numbers[0]].in_features, sum(block.layers[n].out_features for n in numbers)
            flops += K**3 / 3 + K**3  # narrower than a strip
            flops += 2 / 3 * N * (K / GROUP) ** 3 * ("refit" in method.refinements)
    return flops


@pytest.mark.parametrize("name", WITH_STAGES)
def test_a_run_has_the_estimated_products(
    checkpoint: Callable[..., Path], text: Path, tmp_path: Path, name: str
) -> None:
    model, method = checkpoint("llama", num_hidden_layers=2), WITH_STAGES[name]
    settings = {"group_size": GROUP, "scales": "searched", "samples": SEQUENCES, "seqlen": LENGTH}
    job = runs.job(model, tmp_path / "out", text, stages=method, **settings)
    outline = cost.observe(cost.skeleton_of(model), LENGTH)
    estimate = cost.estimate(
        outline, job.plan.settings, MACHINE, layers=job.plan.layers, stages=method, stored=torch.float32
    )
    counted = counted_by_torch(job.run)
    expected = estimate.work.flops - not_counted_by_torch(outline, method) * method.needs_calibration
    print(name, counted, expected, counted - expected)
    for s in estimate.stages: print("   ", s.name, s.work.flops)
    assert counted == pytest.approx(expected, rel=1e-9)
