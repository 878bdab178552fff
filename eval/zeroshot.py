"""Tasks of lm-eval on models as llmq loads them: accuracy where `llmq eval` has divergence.

    pip install "lm-eval[hf]"
    python eval/zeroshot.py MODEL… --tasks hellaswag,arc_easy [--limit 200] [--include-path FOLDER] [--json]

MODEL is a folder or a Hub id, quantized or not.  Tasks come with lm-eval and their data from the Hub.  Without a
network, describe one of your own: FOLDER holds `colours.yaml` and the data that it names,

    task: colours
    dataset_path: json
    dataset_kwargs: {data_files: {test: /where/it/lies/colours.jsonl}}
    output_type: multiple_choice
    test_split: test
    doc_to_text: "{{question}}"
    doc_to_choice: "{{choices}}"
    doc_to_target: answer
    metric_list: [{metric: acc}, {metric: acc_norm}]

where a line of colours.jsonl is `{"question": "The sky is", "choices": ["blue", "square"], "answer": 0}`; then

    python eval/zeroshot.py out/ --tasks colours --include-path FOLDER

Accuracy on some hundred questions has a standard error of several per cent, and quantization moves it by less: the
figures say whether a model is broken, hardly which of two is better.
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
parser.add_argument("--tasks", required=True, help="names, with commas between them")
parser.add_argument("--limit", type=int, help="questions of each task")
parser.add_argument("--include-path", help="a folder with task descriptions of your own")
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--device", default="auto")
parser.add_argument("--json", action="store_true")


def harness() -> tuple[Any, Any, Any]:
    """lm-eval's runner, its model wrapper and its table of tasks; raises BackendError where it is not installed."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise BackendError(f"lm-eval cannot be imported: {error}", hint=NEEDED) from error
    return simple_evaluate, HFLM, TaskManager


def results_of(path: str, arguments: argparse.Namespace, tasks: list[str]) -> dict[str, dict[str, Any]]:
    """What lm-eval finds for each task: `metric,filter` and `metric_stderr,filter` to figures."""
    simple_evaluate, HFLM, TaskManager = harness()
    manager = TaskManager(include_path=arguments.include_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ConfigError(
            f"lm-eval knows no task {unknown[0]!r}", hint="see its list, or give your own with --include-path"
        )
    model, tokenizer = llmq.load(path, device=arguments.device)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # lm-eval would ask for the package that transformers reads it with
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=arguments.batch_size)
    found = simple_evaluate(model=wrapped, tasks=tasks, limit=arguments.limit, task_manager=manager)
    results: dict[str, dict[str, Any]] = found["results"]
    return results


def rows(found: dict[str, dict[str, dict[str, Any]]]) -> Iterator[tuple[str, ...]]:
    """(model, task, metric, figure, standard error) for every metric of every task."""
    for path, tasks in found.items():
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
        print_table("", ("model", "task", "metric", "figure", "standard error"), rows(measured))
