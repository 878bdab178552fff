"""`without_tf32` turns TF32 off inside, `with_tf32` on, and both restore the setting of the process afterwards."""

import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"

CHOICES = {
    "nothing": "pass",
    "the older switch": "matmul.allow_tf32 = True",
    "a precision for all": "torch.set_float32_matmul_precision('high')",
    "the newer switch": "matmul.fp32_precision = 'tf32'",
}
PROGRAM = """
import sys
sys.path.insert(0, {path!r})
import torch
from llmq_kernels.full_precision import with_tf32, without_tf32
matmul = torch.backends.cuda.matmul
newer = hasattr(matmul, "fp32_precision")  # from torch 2.9 on
if newer or "fp32" not in {choice!r}:
    {choice}
    read = lambda: matmul.fp32_precision if newer else matmul.allow_tf32
    before = read()
    for fails, context, inside in ((False, without_tf32, ("ieee", False)), (True, without_tf32, ("ieee", False)),
                                   (False, with_tf32, ("tf32", True)), (True, with_tf32, ("tf32", True))):
        try:
            with context():
                assert read() in inside
                assert not fails
        except AssertionError:
            assert fails
        assert read() == before
    if "fp32" not in {choice!r}:  # torch refuses the older question after the newer answer
        assert matmul.allow_tf32 == ({choice!r} != "pass")
"""


@pytest.mark.parametrize("choice", CHOICES)
def test_the_setting_of_the_process_is_restored(choice: str) -> None:
    """In a separate process, because torch remembers which of its switches was used."""
    program = PROGRAM.format(path=str(KERNELS), choice=CHOICES[choice])
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_entry_points_do_not_import_triton() -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(KERNELS)!r})\n"
        "import llmq_kernels.gptq_block, llmq_kernels.gram\n"
        "from llmq_kernels.gptq_block import reference\n"
        "from llmq_kernels.gram import reference\n"
        "assert 'torch' not in sys.modules\n"
        "import llmq_kernels.gptq_block.op, llmq_kernels.gram.op\n"
        "assert not {'triton', 'llmq'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
