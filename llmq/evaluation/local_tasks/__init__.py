"""Small tasks for lm-eval that need no network: their questions are in this folder.

`scripts/local_tasks.py` writes the questions. lm-eval finds the tasks by their files TASK.yaml, and calls `rows`.
"""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
NAMES = tuple(sorted(file.stem for file in FOLDER.glob("*.yaml")))


def questions(name: str) -> list[dict[str, Any]]:
    """The questions of a task: `question`, `choices` and `answer`, the place of the right choice."""
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def rows(name: str, **_: Any) -> dict[str, Any]:
    """The data of a task as lm-eval takes it: a split `test`."""
    from datasets import Dataset

    return {"test": Dataset.from_list(questions(name))}
