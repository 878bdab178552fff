"""The tables of killed runs and of damaged inputs, for scripts/docs.py."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests"
FUZZ = TESTS / "fuzz" / "counts.json"
KILLS = {  # by the options of scripts/kill_runs.py that made them
    "--every": TESTS / "faults" / "kills_at_each_boundary.json",
    "--moments 200": TESTS / "faults" / "kills.json",
}


def kills() -> str:
    """The tables of killed runs in docs/RELIABILITY.md, from the results of scripts/kill_runs.py."""
    tables = []
    for options, file in KILLS.items():
        record = json.loads(file.read_text(encoding="utf-8"))
        tables += [f"`{options} --seed {record['seed']}`:", _table(record["cases"])]
    return "\n\n".join(tables)


def _table(cases: dict[str, Any]) -> str:
    states = ("before the first block", "quantizing", "tuning", "assembling", "moving", "after the end")
    header = ("command", "boundaries", "killed at one", "at a random time", *states, "wrong")
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    total = Counter[int]()
    for name, case in cases.items():
        reached = {**case["reached"], states[0]: case["reached"].get("before the first file", 0)
                   + case["reached"].get(states[0], 0)}  # fmt: skip
        numbers = (case["boundaries"], case["at_boundary"], case["at_random"], *(reached.get(s, 0) for s in states),
                   len(case["failures"]))  # fmt: skip
        total.update({place: number for place, number in enumerate(numbers) if place})
        lines.append(f"| {name} | {' | '.join(map(str, numbers))} |")
    sums = " | ".join(str(total[place]) for place in range(1, len(header) - 1))
    return "\n".join([*lines, f"| all | | {sums} |"])


def fuzz() -> str:
    """The table of damaged inputs in docs/HOSTILE_INPUT.md, from the result of scripts/fuzz.py."""
    record = json.loads(FUZZ.read_text(encoding="utf-8"))
    lines = ["| reader | inputs | read | refused | failed, mended since | failed |", "|" + "---|" * 6]
    for name, counts in record["readers"].items():
        failed = sum(map(len, counts["failures"].values()))
        numbers = (counts["inputs"], counts["read"], counts["refused"], counts["mended"], failed)
        lines.append(f"| {name} | {' | '.join(f'{n:,}' for n in numbers)} |")
    total = sum(counts["inputs"] for counts in record["readers"].values())
    return "\n".join([*lines, "", f"All together: {total:,} inputs, seed {record['seed']}."])
