"""Read many damaged inputs with every reader, and record how many were read, refused, or failed.

    python scripts/fuzz.py [--inputs N] [--seed S] [--seconds T] [--readers NAME …] [--record FILE]

The inputs are those of tests/fuzz. `--record` keeps the counts in a file, from which scripts/docs.py makes a table in
docs/HOSTILE_INPUT.md. A later call with the same file and seed continues after the inputs that are counted there, and
first repeats those that failed: an input that passes now is counted as mended.

The next turn of `TURN` inputs is that of the reader with the least CPU time so far. Each turn is a fork of this
process, so an input that ends the process counts as a failure of its turn. Memory is measured for one input of
`TRACED_EVERY`, because this takes four times as long.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for the tests
sys.path.insert(1, str(ROOT / "kernels"))

import torch  # noqa: E402

from tests import builders  # noqa: E402
from tests.fuzz import inputs  # noqa: E402
from tests.fuzz.attempts import Outcomes  # noqa: E402

TURN, TRACED_EVERY = 2000, 16
MEMORY = Path("/dev/shm")  # files of inputs are written there if it exists

Numbers = range | list[int]


class Fuzzer:
    """The readers, their undamaged inputs, and the counts so far."""

    def __init__(self, seed: int, folder: Path, record: Path | None) -> None:
        self._seed, self._folder, self._record = seed, folder, record
        (folder / "inputs").mkdir()
        (folder / "originals").mkdir()
        config = builders.CONFIGS["llama"](**inputs.SIZES)
        model = builders.save_model(folder / "model", builders.causal_model(config, dtype="float32"))
        self._originals = inputs.Originals(model, folder / "originals")
        known = json.loads(record.read_text()) if record and record.exists() else {}
        if known.get("seed", seed) != seed:
            raise SystemExit(f"{record} has the counts of seed {known['seed']}, expected {seed}")
        empty = {"seconds": 0.0, "inputs": 0, "read": 0, "refused": 0, "mended": 0, "failures": {}}
        self.counts: dict[str, Any] = {
            name: {**empty, **known.get("readers", {}).get(name, {})} for name in inputs.READERS
        }

    def repeat(self, reader: str) -> None:
        """Read the inputs again that failed earlier."""
        counts = self.counts[reader]
        failed = sorted(number for numbers in counts["failures"].values() for number in numbers)
        if failed:
            again = self._outcomes(reader, failed)
            counts["failures"] = again.failures
            counts["mended"] += len(failed) - sum(map(len, again.failures.values()))
            self.save()

    def turn(self, reader: str, limit: int) -> None:
        """Read the next inputs, at most until `limit` inputs are read in all."""
        counts = self.counts[reader]
        numbers, before = range(counts["inputs"], min(limit, counts["inputs"] + TURN)), os.times()
        outcomes = self._outcomes(reader, numbers)
        counts["seconds"] += os.times().children_user - before.children_user
        counts["inputs"] = numbers.stop
        counts["read"] += outcomes.read
        counts["refused"] += outcomes.refused
        for cause, failed in outcomes.failures.items():
            counts["failures"].setdefault(cause, []).extend(failed)
            print(f"{reader}: {cause}: {failed[:5]}", flush=True)
        self.save()

    def _outcomes(self, reader: str, numbers: Numbers) -> Outcomes:
        """Read inputs in a fork."""
        file = self._folder / "outcomes.json"
        file.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            outcomes = Outcomes()
            folder = self._folder / "inputs"
            inputs.attempt_all(
                numbers, outcomes, reader, self._seed, self._originals, folder, traced_every=TRACED_EVERY
            )
            file.write_text(json.dumps(vars(outcomes)))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            return Outcomes(failures={f"the process ended with {status}": list(numbers)})
        return Outcomes(**json.loads(file.read_text()))

    def save(self) -> None:
        if self._record:
            self._record.write_text(json.dumps({"seed": self._seed, "readers": self.counts}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="inputs per reader; default: 100000")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no turn after this time; default: 3600")
    parser.add_argument("--readers", nargs="*", choices=list(inputs.READERS), default=list(inputs.READERS))
    parser.add_argument("--record", type=Path, help="a JSON file for the counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        fuzzer = Fuzzer(options.seed, Path(folder), options.record)
        for reader in options.readers:
            fuzzer.repeat(reader)
        while time.monotonic() - start < options.seconds:
            left = [reader for reader in options.readers if fuzzer.counts[reader]["inputs"] < options.inputs]
            if not left:
                break
            fuzzer.turn(min(left, key=lambda reader: fuzzer.counts[reader]["seconds"]), options.inputs)
    for reader, counts in fuzzer.counts.items():
        print(f"{reader}: {json.dumps(counts)}")
    sys.exit(any(counts["failures"] for counts in fuzzer.counts.values()))


if __name__ == "__main__":
    main()
