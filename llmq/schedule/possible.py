"""Refuse a job that cannot work, with the numbers, before any text or weight is read.

Only what no economy can avoid is compared with all the memory that there is: a job with little free memory becomes
slower and still works (`llmq/memory.py`).
"""

from pathlib import Path

from llmq import memory
from llmq.checkpoint.output_folder import require_space
from llmq.checkpoint.staging import Staging
from llmq.errors import BackendError
from llmq.run_plan import Plan

HESSIAN_BYTES = 12  # per entry at least: the sum in float32 and its factor in float64


def require(plan: Plan, out: Path, *, copies: int, before: int = 0) -> None:
    """Raise BackendError if the memory is too small for the largest block, StorageError if the disk is for the model.

    copies  how many times the weights are on disk at the end
    before  bytes that other runs of the same command will write first
    """
    needed, total = least_memory(plan), memory.total(plan.device)
    if needed > total:
        raise BackendError(
            f"the embedding and the largest block need at least {needed / 1e9:.1f} GB of memory, but "
            f"{plan.device} has {total / 1e9:.1f} GB",
            hint="use a device with more memory" + (", such as --device cpu" if plan.device.type == "cuda" else ""),
        )
    require_space(out, before + copies * plan.expected_bytes, present=Staging(out).nbytes())


def least_memory(plan: Plan) -> int:
    """Bytes of the embedding, of the largest block, and of the statistics of its widest layer."""
    blocks = plan.skeleton.blocks
    itemsize = next(plan.skeleton.model.parameters()).itemsize
    block = max(sum(p.numel() for p in block.module.parameters()) for block in blocks) * itemsize
    if not plan.stages.needs_calibration:
        return block
    embedding = plan.skeleton.model.get_input_embeddings().get_parameter("weight")  # type: ignore[operator]
    widest = max(layer.in_features for layer in plan.layers.values())
    return int(embedding.numel() * itemsize + block + HESSIAN_BYTES * widest**2)
