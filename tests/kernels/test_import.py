"""Imports: ops work without triton, and references without torch."""

import os
import subprocess
import sys
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def run(program: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(KERNELS)}  # a subprocess does not inherit the path of pytest
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_package_imports_no_torch_triton_or_llmq() -> None:
    run("import sys, llmq_kernels, llmq_kernels.w4a16; assert not {'torch', 'triton', 'llmq'} & set(sys.modules)")


def test_the_reference_works_without_torch() -> None:
    run(
        "import sys; sys.modules['torch'] = None\n"  # an import of torch now raises
        "import numpy as np\n"
        "from llmq_kernels.w4a16 import reference\n"
        "from llmq_kernels.w4a16.packed_weight import PackedWeight\n"
        "words = reference.pack(np.full((1, 3), 9, np.uint8), 4)\n"
        "y = reference.linear(np.ones(3), PackedWeight(words, np.full((1, 1), 2.0), None, 4, 3, 128), None)\n"
        "assert y == 6.0 and 'triton' not in sys.modules"
    )


def test_op_imports_no_triton_or_llmq() -> None:
    run("import sys, llmq_kernels.w4a16.op; assert not {'triton', 'llmq'} & set(sys.modules)")
