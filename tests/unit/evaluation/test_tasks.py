"""`llmq eval --tasks`, with a stand-in for lm-eval."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tqdm import tqdm

from llmq.errors import BackendError, CalibrationError, ConfigError
from llmq.evaluation import local_tasks
from llmq.evaluation.tasks import TaskScore, difference
from tests.command_line import llmq

ROOT = Path(__file__).resolve().parents[3]
ANSWERS = {1: [1.0, 1.0, 0.0, 1.0], 2: [1.0, 0.0, 0.0, 1.0]}  # blocks of the model -> whether its answers are right


class TaskManager:
    def __init__(self, include_path: list[str]) -> None:
        assert all(Path(folder).is_dir() for folder in include_path)

    def match_tasks(self, names: list[str]) -> list[str]:
        return [name for name in names if name in ("colours", "absent")]

    def load(self, names: list[str]) -> None:
        if "absent" in names:
            raise ConnectionError("Couldn't reach 'owner/absent' on the Hub (offline)\nmore lines")


class HFLM:
    def __init__(self, pretrained: Any, tokenizer: Any, batch_size: int) -> None:
        self.model = pretrained


def bar() -> tqdm:  # type: ignore[type-arg]
    """A bar as lm-eval shows it."""
    shown = tqdm(range(4), desc="Running requests", mininterval=0)
    for _ in shown:
        pass
    return shown


def simple_evaluate(model: HFLM, tasks: list[str], limit: int | None, **_: Any) -> dict[str, Any]:
    assert not hasattr(model.model.config, "quantization_config")
    bar()
    answers = ANSWERS[model.model.config.num_hidden_layers][:limit]
    figures = {"alias": "colours", "acc,none": sum(answers) / len(answers), "acc_stderr,none": 0.25}
    samples = [{"acc": answer, "filter": "none"} for answer in answers]
    return {"results": {"colours": figures}, "samples": {"colours": samples}}


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> None:
    package, tasks, models, huggingface = (ModuleType(name) for name in ("lm_eval", "tasks", "models", "huggingface"))
    package.evaluator = evaluator = ModuleType("evaluator")  # type: ignore[attr-defined]
    evaluator.get_git_commit_hash = str  # type: ignore[attr-defined]
    package.simple_evaluate, tasks.TaskManager, huggingface.HFLM = simple_evaluate, TaskManager, HFLM  # type: ignore[attr-defined]
    stand_ins = {"lm_eval": package, "lm_eval.evaluator": evaluator, "lm_eval.tasks": tasks, "lm_eval.models": models}
    for name, module in {**stand_ins, "lm_eval.models.huggingface": huggingface}.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("harness")
def test_scores_stand_beside_those_of_the_original(checkpoint: Callable[..., Path]) -> None:
    model, original = checkpoint("llama", num_hidden_layers=2), checkpoint("llama", num_hidden_layers=1)
    done = llmq("eval", model, "--against", original, "--tasks", "colours")
    assert done.exit_code == 0
    assert "it/s" not in done.stderr and "requests" in done.stderr  # the bar of lm-eval is part of ours
    assert "0.7500 ± 0.2500" in done.stdout and "-0.2500 ± 0.2500" in done.stdout
    scores = json.loads(llmq("eval", model, "--tasks", "colours", "--task-limit", "2", "--json").stdout)["tasks"]
    assert scores[str(model)] == [{"task": "colours", "metric": "acc", "value": 0.5, "error": 0.25, "questions": 2}]


@pytest.mark.usefixtures("harness")
def test_unknown_tasks_and_data_that_is_not_there_are_errors(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = checkpoint("llama", num_hidden_layers=2)
    unknown = llmq("eval", model, "--tasks", "colors")
    assert unknown.exit_code == ConfigError.exit_code and "no task 'colors'" in unknown.stderr
    offline = llmq("eval", model, "--tasks", "absent")
    assert offline.exit_code == CalibrationError.exit_code
    assert "Couldn't reach 'owner/absent'" in offline.stderr and "--task-folder" in offline.stderr
    no_folder = llmq("eval", model, "--tasks", "colours", "--task-folder", tmp_path / "nothing")
    assert no_folder.exit_code == ConfigError.exit_code


def test_without_lm_eval_the_extra_is_named(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = llmq("eval", checkpoint("llama", num_hidden_layers=2), "--tasks", "colours")
    assert done.exit_code == BackendError.exit_code and "llmq-quantize[tasks]" in done.stderr
    mixed = llmq("eval", "model", "--tasks", "colours", "--max-kl", "0.1")
    assert mixed.exit_code == ConfigError.exit_code


def test_the_error_of_a_difference_is_taken_over_the_questions() -> None:
    ours, theirs = (TaskScore("t", "acc", sum(own) / 4, 0.25, tuple(own)) for own in (ANSWERS[2], ANSWERS[1]))
    assert difference(ours, theirs) == (-0.25, 0.25)
    assert difference(ours, TaskScore("t", "acc", 0.5, 0.1)) == (0.0, None)


def test_the_tasks_of_the_package_are_complete() -> None:
    assert len(local_tasks.NAMES) == 4
    for name in local_tasks.NAMES:
        description = (local_tasks.FOLDER / f"{name}.yaml").read_text("utf-8")
        assert f"task: {name}\n" in description and f"name: {name}}}" in description
        asked = local_tasks.questions(name)
        assert len(asked) >= 40 and len({question["question"] for question in asked}) > len(asked) / 3
        for question in asked:
            assert 0 <= question["answer"] < len(question["choices"]) == len(set(question["choices"]))


def test_the_script_makes_the_questions() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "local_tasks.py"))
    for name, text in script["files"]().items():
        assert (local_tasks.FOLDER / name).read_text("utf-8") == text


def test_lm_eval_gets_the_questions() -> None:
    rows = local_tasks.rows("llmq_sums", version=1)["test"]
    assert len(rows) == 100 and set(rows[0]) == {"question", "choices", "answer"}
