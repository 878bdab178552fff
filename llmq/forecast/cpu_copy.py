"""The memory of the second copy of packed weights that `llmq.load` keeps on a CPU, where that is faster."""

from collections.abc import Mapping

from llmq.config import QuantConfig
from llmq.model.build.skeleton import Skeleton
from llmq.numerics.gguf_types import GGUF, GGUF_GRIDS
from llmq.numerics.layer_plan import LayerPlan
from llmq_kernels.w4a16 import cpu_copies


def nbytes(skeleton: Skeleton, layers: Mapping[str, LayerPlan], settings: QuantConfig) -> int:
    """Bytes of the copies of these layers, by path. Experts have none, and .gguf files run in llama.cpp.

    Layers that are fused have one copy together, of the same size.
    """
    if settings.format == GGUF or settings.format in GGUF_GRIDS:
        return 0
    experts = {path for block in skeleton.blocks for path in block.linears if block.is_experts(path)}
    return sum(_of_layer(layer) for path, layer in layers.items() if path not in experts)


def _of_layer(layer: LayerPlan) -> int:
    grid, inputs = layer.scheme.weights, layer.scheme.inputs
    if grid is None or grid.floats is not None:  # small floats run dequantized
        return 0
    return cpu_copies.nbytes(
        grid.bits, layer.out_features, layer.in_features, grid.columns_per_group(layer.in_features),
        symmetric=grid.symmetric, inputs=None if inputs is None else inputs.dtype,
    )  # fmt: skip
