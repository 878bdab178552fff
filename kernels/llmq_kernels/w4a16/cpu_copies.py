"""The size of the second copy of a weight that a layer keeps on a CPU, without making it.

`small_batches.py` and `int8_inputs.py` make these copies where they are faster; where they are not, a layer has none.
"""

from llmq_kernels.w4a16 import int4pack, int8pack

INT8, BFLOAT16, FLOAT32 = 1, 2, 4  # bytes


def nbytes(
    bits: int, rows: int, in_features: int, columns_per_group: int, *, symmetric: bool, inputs: str | None = None
) -> int:
    """Bytes at most for a weight (rows, in_features); `inputs` is the dtype of quantized inputs, or None for floats."""
    groups = -(-in_features // columns_per_group)
    if inputs is not None:
        even = groups == 1 or groups * columns_per_group == in_features
        return rows * (in_features * INT8 + groups * FLOAT32) if inputs == "int8" and symmetric and even else 0
    if bits == 4:
        group = int4pack.group_of(in_features, columns_per_group, single=groups == 1)
        if rows % int4pack.ROWS_OF_LAYOUT or group is None:
            return 0
        return rows * in_features // 2 + rows * in_features // group * 2 * BFLOAT16
    if bits == 8 and symmetric and groups == 1 and in_features % int8pack.COLUMNS == 0:
        return rows * (in_features * INT8 + BFLOAT16)
    return 0
