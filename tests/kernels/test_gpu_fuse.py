"""On a GPU: layers that share an input are captured in a CUDA graph, and replayed, as one product."""

import pytest
import torch
from torch import Tensor, nn

from llmq.numerics.scheme import WeightScheme
from llmq.runtime.fused_linear import FusedLinear, fuse_rows
from llmq.runtime.packed_linear import PackedLinear
from tests.weights import random_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

K, ROWS = 1024, (512, 128, 128)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [PackedLinear(random_weight(WeightScheme(4, 128), N, K, seed=N + i), None) for i, N in enumerate(ROWS)]
        self.q, self.k, self.v = layers

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


@pytest.fixture
def fused() -> Attention:
    model = Attention().cuda()
    fuse_rows(model, ("q", "k", "v"))
    assert isinstance(model.q, FusedLinear)
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 16])
def test_captured_graph_equals_eager_run(fused: Attention, rows: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, K, device="cuda", dtype=dtype)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            fused(x)  # compiles, and queries the device, which is not allowed during a capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = fused(x)
        for seed in range(3):
            torch.manual_seed(seed)
            x.copy_(torch.randn_like(x))
            y.fill_(float("nan"))
            graph.replay()
            assert torch.equal(y, fused(x))
