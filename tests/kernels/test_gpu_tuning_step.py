"""The kernel of a tuning step compiled, on a GPU: equal to the path in torch, with the same bits in every run."""

import pytest
import torch

from llmq.algorithms import fused_step, kl_tuning
from llmq_kernels.tuning_step import op
from tests.kernels.test_tuning_step import RATES, Case, make_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(case: Case) -> Case:
    v, mean, square = (part.cuda() for part in case.moments)
    return Case(case.origin.to(torch.device("cuda")), case.gradient.cuda(), (v, mean, square))


@pytest.mark.parametrize("group", [32, 128, "channel"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_steps_equal_those_in_torch(monkeypatch: pytest.MonkeyPatch, symmetric: bool, group: int | str) -> None:
    case = on_gpu(make_case(200, 2176, group=group, symmetric=symmetric))
    if not fused_step.takes(case.origin):
        pytest.skip("Triton does not run here")
    states = [kl_tuning.start(case.origin, None, RATES) for _ in range(2)]
    for fused, state in zip((True, False), states, strict=True):
        monkeypatch.setattr(op, "runs_on", lambda device, fused=fused: fused)
        for step in range(5):
            kl_tuning.update(state, case.gradient * (step + 1), RATES, step)
    for part in ("rounding", "scales"):
        ours, in_torch = (getattr(state, part).value for state in states)
        torch.testing.assert_close(ours, in_torch, rtol=0, atol=1e-5)


def test_a_step_gives_the_same_bits_every_time() -> None:
    case = on_gpu(make_case(333, 512, group=128))
    if not fused_step.takes(case.origin):
        pytest.skip("Triton does not run here")
    results = []
    for _ in range(20):
        now, values = fused_step.advance(case.origin, case.copy(), case.gradient.to(torch.bfloat16), 2.0, 0.05, 1)
        assert torch.equal(values, now.dequantize().to(torch.bfloat16))
        results.append(now.codes)
    assert all(torch.equal(results[0], other) for other in results)
