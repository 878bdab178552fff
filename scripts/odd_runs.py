"""Quantize tiny models with random configurations, and verify each result: tests/odd_runs.py says how.

    python scripts/odd_runs.py 200                 200 runs, and the counts of what became of them
    python scripts/odd_runs.py 200 --seed 7        other configurations
    python scripts/odd_runs.py --only 42           one configuration again

Exit code 1 if an exception of another kind than the errors of llmq ended one of them, or a model is broken.
"""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]


def main() -> None:
    from tests.odd_runs import FAILED, FINISHED, run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first configuration")
    parser.add_argument("--only", type=int, help="this configuration alone")
    arguments = parser.parse_args()
    numbers = range(arguments.first, arguments.first + arguments.count)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        for number in numbers if arguments.only is None else [arguments.only]:
            result = run(arguments.seed, number, Path(place) / str(number))
            counts[result.outcome] += 1
            told = "" if result.outcome == FINISHED else f"  {result.configuration}"
            print(f"{number}: {result.outcome}: {result.why[:300]}{told}", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    sys.exit(int(counts[FAILED] > 0))


if __name__ == "__main__":
    main()
