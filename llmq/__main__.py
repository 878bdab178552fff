"""`python -m llmq`: the same as the script `llmq`, from an install or from the root of a checkout."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels"

if (KERNELS / "llmq_kernels" / "__init__.py").is_file():
    # A checkout: its own kernels come before any installed ones, and its root, which `-m` puts on the path, goes
    # away, so that the bare folder kernels/ cannot pose as the package of that name that transformers looks for.
    sys.path[:] = [str(KERNELS), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]

from llmq.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
