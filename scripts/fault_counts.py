"""The tables of killed runs and of damaged inputs, for scripts/docs.py."""

import json
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
KILLS, FUZZ = TESTS / "faults" / "kills.json", TESTS / "fuzz" / "counts.json"


def kills() -> str:
    """The table of killed runs in docs/RELIABILITY.md, from the result of scripts/kill_runs.py."""
    record = json.loads(KILLS.read_text(encoding="utf-8"))
    cases, states = record["cases"], ("before the first block", "quantizing", "tuning", "assembling", "moving",
                                      "after the end")  # fmt: skip
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
    return "\n".join([*lines, f"| all, seed {record['seed']} | | {sums} |"])


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
