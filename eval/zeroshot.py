"""Run tasks of lm-eval on models loaded by llmq: accuracy in addition to the divergence of `llmq eval`.

    pip install "lm-eval[hf]"
    python eval/zeroshot.py MODEL… --tasks hellaswag,arc_easy [--limit 200] [--include-path FOLDER] [--json]

MODEL is a folder or a Hub id, quantized or not. Tasks come with lm-eval, their data from the Hub. Without a network,
describe your own task: FOLDER holds `colours.yaml` and its data,

    task: colours
    dataset_path: json
    dataset_kwargs: {data_files: {test: /path/to/colours.jsonl}}
    output_type: multiple_choice
    test_split: test
    doc_to_text: "{{question}}"
    doc_to_choice: "{{choices}}"
    doc_to_target: answer
    metric_list: [{metric: acc}, {metric: acc_norm}]

where a line of colours.jsonl is `{"question": "The sky is", "choices": ["blue", "square"], "answer": 0}`; then

    python eval/zeroshot.py out/ --tasks colours --include-path FOLDER

Accuracy on a few hundred questions has a standard error of several per cent, and quantization changes it by less: the
results show whether a model is broken, but not which of two models is better.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import llmq
from llmq.cli.terminal import print_error, print_json, print_table, quiet_transformers
from llmq.errors import BackendError, ConfigError, LlmqError

NEEDED = 'pip install "lm-eval[hf]"'

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("models", nargs="+", metavar="MODEL")
parser.add_argument("--tasks", required=True, help="names of tasks, separated by commas")
parser.add_argument("--limit", type=int, help="maximum number of questions per task")
parser.add_argument("--include-path", help="a folder with your own task descriptions")
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--device", default="auto")
parser.add_argument("--json", action="store_true")


def harness() -> tuple[Any, Any, Any]:
    """The runner, the model wrapper and the task table of lm-eval; raises BackendError if it is not installed."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise BackendError(f"lm-eval cannot be imported: {error}", hint=NEEDED) from error
    return simple_evaluate, HFLM, TaskManager


def results_of(path: str, arguments: argparse.Namespace, tasks: list[str]) -> dict[str, dict[str, Any]]:
    """The results of lm-eval for each task: `metric,filter` and `metric_stderr,filter` to numbers."""
    simple_evaluate, HFLM, TaskManager = harness()
    manager = TaskManager(include_path=arguments.include_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ConfigError(
            f"lm-eval has no task {unknown[0]!r}", hint="see its list, or give your own with --include-path"
        )
    model, tokenizer = llmq.load(path, device=arguments.device)
    if hasattr(model.config, "quantization_config"):
        del (
            model.config.quantization_config
        )  # otherwise lm-eval requires the package that transformers uses for this format
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=arguments.batch_size)
    output = simple_evaluate(model=wrapped, tasks=tasks, limit=arguments.limit, task_manager=manager)
    results: dict[str, dict[str, Any]] = output["results"]
    return results


def rows(results: dict[str, dict[str, dict[str, Any]]]) -> Iterator[tuple[str, ...]]:
    """Yield (model, task, metric, value, standard error) for every metric of every task."""
    for path, tasks in results.items():
        for task, figures in tasks.items():
            for name, value in figures.items():
                metric, _, filtered = name.partition(",")
                if not filtered or metric.endswith("_stderr"):
                    continue
                error = figures.get(f"{metric}_stderr,{filtered}")
                spread = f"{error:.4f}" if isinstance(error, float) else "-"
                yield path, task, metric, f"{value:.4f}", spread


if __name__ == "__main__":
    given = parser.parse_args()
    quiet_transformers()
    try:
        measured = {path: results_of(path, given, given.tasks.split(",")) for path in given.models}
    except LlmqError as problem:
        print_error(problem)
        sys.exit(problem.exit_code)
    if given.json:
        print_json(measured)
    else:
        print_table("", ("model", "task", "metric", "value", "standard error"), rows(measured))
