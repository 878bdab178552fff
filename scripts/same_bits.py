"""Print which operations give other bits with another number of threads, or for a row with another number of rows.

    python scripts/same_bits.py

The results depend on the processor and on torch's libraries; docs/RELIABILITY.md states those of one machine.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SIZES = (64, 256, 1024)
ROWS = (1024, 512, 100, 7)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in SIZES:
        X, W = (torch.randn(rows, size, generator=generator) for rows in (2048, size))
        H = (X.T @ X / len(X)).double()
        upper = torch.linalg.cholesky(H).T
        identity = torch.eye(size, dtype=torch.float64)
        operations: dict[str, Callable[[], Tensor]] = {
            "matrix product": lambda X=X, W=W: X @ W.T,
            "matrix product in bfloat16": lambda X=X, W=W: X.bfloat16() @ W.bfloat16().T,
            "second moment": lambda X=X, W=W: torch.addmm(W, X.T, X),
            "sums of columns": lambda X=X: X.square().sum(0),
            "sum of all values": lambda X=X: X.sum(),
            "Cholesky factor in float64": lambda H=H: torch.linalg.cholesky(H),
            "triangular solve in float64": lambda U=upper, E=identity: torch.linalg.solve_triangular(U, E, upper=True),
        }
        for name, operation in operations.items():
            print(f"{size}: {name}: {'same' if same_for_threads(operation) else 'OTHER'} bits with 1 and 2 threads")
        for rows in ROWS:
            parts = torch.cat([part @ W.T for part in X.split(rows)])
            print(f"{size}: matrix product of {rows} rows: {'same' if parts.equal(X @ W.T) else 'OTHER'} bits per row")


def same_for_threads(operation: Callable[[], Tensor]) -> bool:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(operation())
    torch.set_num_threads(1)
    return results[0].equal(results[1])


if __name__ == "__main__":
    main()
