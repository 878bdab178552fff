"""`python -m llmq`: the same as the script `llmq`, for an installed llmq or from the root of a checkout."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels"

if (KERNELS / "llmq_kernels" / "__init__.py").is_file():
    # A checkout: its kernels come before installed ones. `-m` puts the root on the path; it is removed, because
    # transformers would take the bare folder kernels/ for the package of that name.
    sys.path[:] = [str(KERNELS), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]

from llmq.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
