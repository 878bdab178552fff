"""What lm-eval would print while it runs: its bars become events, and its log and that of git are not shown."""

import io
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from llmq.report.events import OnEvent, Progress

RUNNING = "Running"  # the bars of the model itself begin like this; others are those of a few seconds


@contextmanager
def as_events(stage: str, on_event: OnEvent) -> Iterator[None]:
    """Inside, the bars of lm-eval are progress of this stage: two bars would overwrite each other."""
    import lm_eval.evaluator
    from tqdm import tqdm

    begin = tqdm.__init__

    def unseen(bar: Any, *given: Any, **named: Any) -> None:
        begin(bar, *given, **{**named, "file": io.StringIO()})

    def display(bar: Any, *_: Any, **__: Any) -> None:
        if bar.total and str(bar.desc).startswith(RUNNING):
            on_event(Progress(stage, bar.n, bar.total, "requests"))

    log = logging.getLogger("lm_eval")
    level = log.level
    with ExitStack() as restored:
        restored.enter_context(_replaced(tqdm, "__init__", unseen))
        restored.enter_context(_replaced(tqdm, "display", display))
        if hasattr(lm_eval.evaluator, "get_git_commit_hash"):  # not in every version
            restored.enter_context(_replaced(lm_eval.evaluator, "get_git_commit_hash", lambda: None))
        restored.callback(log.setLevel, level)
        log.setLevel(logging.ERROR)
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """`owner.name` is `value` inside."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
