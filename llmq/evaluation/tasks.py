"""Tasks of lm-eval: the accuracy of models, question by question, so that two models can be compared.

lm-eval describes the tasks, and the Hub holds their data. The tasks in `local_tasks/` need no network, and a folder may
describe own tasks: it holds `colours.yaml` and its data,

    task: colours
    dataset_path: json
    dataset_kwargs: {data_files: {test: /path/to/colours.jsonl}}
    output_type: multiple_choice
    test_split: test
    doc_to_text: "{{question}}"
    doc_to_choice: "{{choices}}"
    doc_to_target: answer
    metric_list: [{metric: acc}, {metric: acc_norm}]

where a line of colours.jsonl is `{"question": "The sky is", "choices": ["blue", "square"], "answer": 0}`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmq.errors import BackendError, CalibrationError, ConfigError
from llmq.evaluation import local_tasks
from llmq.evaluation.lm_eval_output import as_events
from llmq.report.events import OnEvent, Planned, ignore

NEEDED = "pip install 'llmq-quantize[tasks]'"


@dataclass(frozen=True)
class TaskScore:
    """A metric of a model on a task.

    error      the standard error of `value`; None if lm-eval gives none
    questions  the metric on each question, in the order of the task; empty if it is not a number per question
    """

    task: str
    metric: str
    value: float
    error: float | None
    questions: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "questions": len(self.questions)}


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are run.

    folder      own task descriptions
    limit       the most questions per task
    batch_size  questions that run together
    """

    tasks: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None
    batch_size: int = 8


def run_tasks(
    models: Sequence[str],
    options: TaskOptions,
    *,
    device: str = "auto",
    remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> dict[str, list[TaskScore]]:
    """The scores of each model, which is loaded as a whole, one after the other.

    Raises BackendError without lm-eval, ConfigError for an unknown task, CalibrationError for data that is not there.
    """
    harness = _Harness(options)
    stages = {model: f"tasks on {model}" for model in models}
    on_event(Planned(dict.fromkeys(stages.values(), 1.0)))
    scores = {}
    for model, stage in stages.items():
        with as_events(stage, on_event):
            scores[model] = list(harness.scores(model, device, remote_code=remote_code))
    return scores


def difference(score: TaskScore, original: TaskScore) -> tuple[float, float | None]:
    """score - original, and its standard error over the questions, which both have answered; None if unknown.

    It is smaller than that of the scores, because most questions are answered alike.
    """
    gap, count = score.value - original.value, len(score.questions)
    if count < 2 or count != len(original.questions):
        return gap, None
    gaps = [ours - theirs for ours, theirs in zip(score.questions, original.questions, strict=True)]
    mean = sum(gaps) / count
    return gap, math.sqrt(sum((value - mean) ** 2 for value in gaps) / (count - 1) / count)


class _Harness:
    """lm-eval, with the data of the tasks loaded."""

    def __init__(self, options: TaskOptions) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise BackendError(f"lm-eval cannot be imported: {error}", hint=NEEDED) from error
        if options.folder is not None and not options.folder.is_dir():
            raise ConfigError(f"{options.folder} is not a folder", hint="give the folder that holds TASK.yaml")
        folders = [local_tasks.FOLDER, *([options.folder] if options.folder is not None else [])]
        self._options, self._manager = options, TaskManager(include_path=[str(folder) for folder in folders])
        for task in options.tasks:
            if not self._manager.match_tasks([task]):
                hint = "see `lm_eval ls tasks` for all names, or give your own with --task-folder"
                raise ConfigError(f"lm-eval has no task {task!r}", hint=hint)
        with _data_errors(), as_events("questions", ignore):
            self._manager.load(list(options.tasks))  # before a model is loaded

    def scores(self, model: str, device: str, *, remote_code: bool) -> Iterator[TaskScore]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        from llmq.runtime.load import load

        loaded, tokenizer = load(model, device=device, trust_remote_code=remote_code)
        if hasattr(loaded.config, "quantization_config"):
            # lm-eval would require the package that transformers uses for this format
            del loaded.config.quantization_config
        wrapped = HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=self._options.batch_size)
        with _data_errors():
            output = simple_evaluate(
                model=wrapped, tasks=list(self._options.tasks), limit=self._options.limit, task_manager=self._manager,
                log_samples=True,
            )  # fmt: skip
        samples: Mapping[str, Any] = output.get("samples") or {}
        for task, figures in output["results"].items():
            yield from _scores(task, figures, samples.get(task, ()))


def _scores(task: str, figures: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Iterator[TaskScore]:
    """From `metric,filter` and `metric_stderr,filter` to scores."""
    for name, value in figures.items():
        metric, _, filtered = name.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, float | int):
            continue
        error = figures.get(f"{metric}_stderr,{filtered}")
        own = [sample.get(metric) for sample in samples if sample.get("filter", filtered) == filtered]
        numbers = tuple(float(answer) for answer in own if isinstance(answer, float | int))
        complete = numbers if len(numbers) == len(own) else ()
        yield TaskScore(task, metric, float(value), float(error) if isinstance(error, float | int) else None, complete)


@contextmanager
def _data_errors() -> Iterator[None]:
    """Errors of the Hub and of files, as errors of llmq."""
    try:
        yield
    except OSError as error:  # also the errors of datasets and huggingface_hub for what is not there
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        own = ", ".join(local_tasks.NAMES)
        hint = f"tasks of lm-eval load their data from the Hub; without it, run {own}, or others with --task-folder"
        raise CalibrationError(f"the data of the tasks cannot be read: {first}", hint=hint) from error
