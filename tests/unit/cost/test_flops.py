"""The products that an estimate counts are those of a real run, and the files have the estimated size."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from llmq import cost
from llmq.calibration import SelfAuthor
from llmq.checkpoint.reader import Checkpoint
from llmq.cost import solver
from llmq.methods import METHODS, Method, Tuning
from tests import runs

SEQUENCES, LENGTH, GROUP = 10, 24, 16  # at least two tokens per input, so that nothing is compared with rtn
MACHINE = cost.Machine("cpu", dict.fromkeys(cost.Kind, 1.0), 1 << 40, 1 << 40, 0)
PRODUCTS = {**flop_registry, torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}  # torch does not list addmm_
TUNING = Tuning(steps=11, scales=1e-3, rounding=1e-3, tokens=2 * LENGTH)
WEIGHTED = Method("gptq", token_weights=True, block_tuning=replace(TUNING, fisher=True), validation=0.1)
# Few stages each, so that a difference shows which stage is counted wrongly.
WITH_HEAD = "target, descent, refit"
CASES: dict[str, Method] = {
    "rtn": METHODS["rtn"],
    "gptq": METHODS["gptq"],
    WITH_HEAD: replace(METHODS["fast"], refinements=("descent", "refit")),
    "Fisher information and block tuning": WEIGHTED,
    "written text and end-to-end tuning": replace(METHODS["gptq"], tuning=replace(TUNING, steps=3), written=1),
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


def without_products(outline: cost.Outline, method: Method, *, head: bool) -> float:
    """FLOP of factorizations and systems of equations, which torch does not count; K is narrower than a strip."""
    if not method.needs_calibration:
        return 0.0
    groups = [[block.layers[n] for n in numbers] for block in outline.blocks for numbers in block.groups]
    shapes = [(sum(layer.out_features for layer in group), group[0].in_features) for group in groups]
    shapes += [(outline.vocabulary, outline.width)] * head
    refits = "refit" in method.refinements
    return sum(K**3 / 3 + K**3 + 2 / 3 * N * (K / GROUP) ** 3 * refits for N, K in shapes)


def unwritten(_: SelfAuthor, windows: int, seqlen: int, __: int, *, or_nothing: bool) -> Tensor:
    """Tokens in the place of text that the model generates."""
    return torch.ones(windows, seqlen, dtype=torch.int64)


@pytest.mark.parametrize("name", CASES)
def test_a_run_has_the_estimated_products_and_files(
    checkpoint: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(SelfAuthor, "write", unwritten)  # not counted here: its attention sees only earlier tokens
    model, method = checkpoint("llama", num_hidden_layers=2), CASES[name]
    settings = {"group_size": GROUP, "scales": "searched", "samples": SEQUENCES, "seqlen": LENGTH}
    settings |= {"quantize_head": name == WITH_HEAD}
    job = runs.job(model, tmp_path / "out", text, stages=method, **settings)
    outline = cost.observe(cost.skeleton_of(model), LENGTH)
    estimate = cost.estimate(
        outline, job.plan.settings, MACHINE, layers=job.plan.layers, stages=method, stored=torch.float32
    )
    counted = counted_by_torch(job.run)
    elsewhere = without_products(outline, method, head=name == WITH_HEAD) + sum(
        stage.work.flops for stage in estimate.stages if stage.name == "self-written text"
    )
    assert counted == pytest.approx(estimate.work.flops - elsewhere, rel=1e-9)
    assert Checkpoint.open(tmp_path / "out").nbytes == estimate.file_bytes


@pytest.mark.parametrize("K", [100, 128, 300])
def test_later_columns_are_updated_after_each_block(K: int) -> None:
    N, expected = 7, 0
    for start in range(0, K, solver.BLOCK):
        stop = min(start + solver.BLOCK, K)
        expected += 2 * N * (stop - start) * (K - stop)
    assert solver.trailing_products(N, K) == expected
