"""Tune the codes and scales of all blocks together, against the predictions of the float model.

    float blocks ──► last hidden states of every window ──► head ──► p ─┐
    committed blocks ─► forward ─► head ─► p̂ ─► KL(p ‖ p̂), gradient ◄───┘
         ▲                                          │
         └── codes, scales ◄── backward, block by block       once a step, on `tokens` tokens

It runs when all blocks are committed, and works on a revision of them (`checkpoint/tuned_version.py`): these stay valid
until one is adopted as a whole.  So a run may end at any point, and the same command continues to the same bits.  The
float model is needed once, for its hidden states; what is held in memory and what on the disk depends on what is free
(`places.py`), and changes no bit either.

The guard: every so often the loss is taken on held-out windows.  The blocks that were best there are adopted; if those
are the ones that tuning began with, nothing is.  The windows of a step are drawn without repetition from the others,
in an order that depends on the seed and the step alone.

Not here: the maths of one weight (algorithms/kl_tuning.py), the way through the model (model/passes/backward.py).
"""

import math
import time
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from llmq.algorithms.kl_tuning import Rates, drawn
from llmq.calibration import Author
from llmq.errors import CalibrationError
from llmq.methods import Method, Tuning
from llmq.model.passes import forward as walk
from llmq.model.passes.backward import Chain
from llmq.model.passes.stored_states import StoredWindows
from llmq.report.record import TuningReport, TuningStep
from llmq.steps.end_to_end import memory_plan
from llmq.steps.end_to_end.memory_plan import disk_bytes
from llmq.steps.end_to_end.tuned_blocks import TunedBlocks
from llmq.steps.kl_loss import divergence
from llmq.steps.run import Run

__all__ = ["Session", "disk_bytes", "drawn", "held_out", "text", "tune"]

JUDGED = 8  # times that the held-out windows are looked at, beside the first
SAVED_EVERY = 60.0  # seconds, and never less than SAVED_SHARE times as long as it takes
SAVED_SHARE = 20
UNTOUCHED: Mapping[str, Any] = {"step": 0, "best": None, "moved": 0.0, "history": (), "seconds": 0.0}


def held_out(method: Method, windows: Tensor) -> int:
    """How many of the windows (S, T), the last ones, tuning is judged by; raises CalibrationError for too few."""
    if len(windows) < 2:
        raise CalibrationError(
            "the text makes one window, and tuning takes two or more: to tune on, and to judge by",
            hint="give more text, a shorter --seqlen, or a method that does not tune",
        )
    return min(len(windows) - 1, max(1, math.ceil(method.held_out * len(windows))))


def text(method: Method, windows: Tensor, author: Author, seed: int) -> Tensor:
    """(S', T) int64: what to tune on and, at the end, to judge by: `windows` (S, T), in front of them the model's own.

    Raises CalibrationError for too few.
    """
    held_out(method, windows)
    assert method.tuning is not None
    written = author.write(method.tuning.written * len(windows), windows.shape[1], seed)
    return torch.cat([written, windows])


def tune(run: Run, windows: Tensor, judged: int, seed: int) -> Generator[TuningStep, None, TuningReport]:
    """Tune the committed blocks on `windows` (S, T) int64 as `run.method.tuning` says; yields each step.

    The last `judged` of the windows are not tuned on; by them the blocks are judged.
    """
    done = run.writer.revision.adopted
    if done is not None:  # an earlier run got this far
        return TuningReport.from_dict(done["report"])
    assert run.method.tuning is not None
    session = Session(run, run.method.tuning, windows, judged, seed)
    try:
        yield from session.steps()
        return session.adopt()
    finally:
        session.free()


class Session:
    """One run of tuning, from where an earlier one was saved."""

    def __init__(self, run: Run, tuning: Tuning, windows: Tensor, judged: int, seed: int) -> None:
        self._began = time.monotonic()
        self._run, self._tuning, self._windows, self._seed = run, tuning, windows, seed
        self._rates = Rates(tuning.rounding, tuning.scales)
        self._fitted = len(windows) - judged  # the first ones
        self._batch = min(self._fitted, max(1, tuning.tokens // windows.shape[1]))
        self._places = memory_plan.choose(run, windows, self._batch, self._rates)
        run.writer.revision.begin()
        self._teacher = self._store("teacher")
        self._blocks = TunedBlocks(run, resident=self._places.resident)

        progress = run.writer.revision.progress or UNTOUCHED
        self._step: int = progress["step"]
        self._best: int | None = progress["best"]  # the step in front of which the blocks were best
        self._moved: float = progress["moved"]
        self._history = {int(step): float(loss) for step, loss in progress["history"]}
        self._earlier: float = progress["seconds"]

    def steps(self) -> Iterator[TuningStep]:
        """Take all steps that are left."""
        with self._run.skeleton.float_inputs():
            self._run_through(walk.loaded(self._run.skeleton), self._windows, self._teacher)
        if self._history:
            self._blocks.resume(self._step)
        else:
            self._blocks.start(self._rates)
        loss, last = None, self._tuning.steps
        saved, took = time.monotonic(), 0.0
        while True:
            judged = self._judge() if self._step % max(1, last // JUDGED) == 0 or self._step == last else None
            yield TuningStep(self._step, last, loss, judged)
            if self._step == last or not math.isfinite(loss or 0.0):
                return
            if time.monotonic() - saved >= max(SAVED_EVERY, SAVED_SHARE * took):
                began = time.monotonic()
                self._save()
                saved, took = time.monotonic(), time.monotonic() - began
            loss = self._descend()
            self._step += 1

    def adopt(self) -> TuningReport:
        """Put the best blocks in the place of the committed ones, if they are better."""
        report = TuningReport(
            steps=self._step,
            best=self._best or 0,
            history=tuple(self._history.items()),
            moved=self._moved,
            seconds=self._seconds(),
            notes=self._notes(),
        )
        self._run.writer.revision.adopt({"best": self._best, "report": report.to_dict()}, self._indices())
        return report

    def free(self) -> None:
        """Give all memory back."""
        self._blocks.free()

    def _descend(self) -> float:
        """One step; returns the loss that it began with."""
        skeleton, rates = self._run.skeleton, self._rates.at(self._step, self._tuning.steps)
        chosen = drawn(self._step, self._batch, self._fitted, self._seed)
        tokens = self._windows[chosen]
        forward = Chain(skeleton, self._blocks.ready, tokens, self._blocks.paths, keep=self._places.graphs)
        expected = self._teacher.read(chosen).to(skeleton.device)
        loss, gradient = divergence(skeleton, tokens, expected, forward.hidden)
        for index, block in forward.backward(gradient):
            self._blocks.update(index, block, rates, self._step)
        return loss

    def _judge(self) -> float:
        """The loss on held-out windows, if it is not known; writes the blocks where it is the lowest so far."""
        if self._step in self._history:  # before the run was interrupted
            return self._history[self._step]
        loss = self._held_out_loss()
        if self._history and loss < min(self._history.values()):
            moved = self._blocks.write_blocks(self._step)
            if self._best is not None:
                self._run.writer.revision.drop_blocks(self._indices(), self._best)
            self._best, self._moved = self._step, moved
        self._history[self._step] = loss
        return loss

    def _held_out_loss(self) -> float:
        skeleton, windows, states = self._run.skeleton, self._windows[self._fitted :], self._store("judged")
        self._run_through(self._blocks.ready, windows, states)
        total = 0.0
        for chosen in torch.arange(len(windows)).split(self._batch):
            expected, hidden = self._teacher.read((chosen + self._fitted).tolist()), states.read(chosen.tolist())
            mean, _ = divergence(skeleton, windows[chosen], expected.to(skeleton.device), hidden.to(skeleton.device))
            total += mean * len(chosen)
        return total / len(windows)

    def _save(self) -> None:
        self._blocks.write_states(self._step)
        record = {
            "step": self._step,
            "best": self._best,
            "moved": self._moved,
            "history": list(self._history.items()),
            "seconds": self._seconds(),
        }
        names = [name for names in self._blocks.names for name in names.values()]
        self._run.writer.revision.save(record, names, self._indices())

    def _store(self, name: str) -> StoredWindows:
        """For the hidden states of windows."""
        return StoredWindows(None if self._places.teacher else self._run.writer.revision.folder / name)

    def _run_through(self, ready: walk.Ready, windows: Tensor, states: StoredWindows) -> None:
        """Leave in `states` what the last block puts out for `windows` (S, T)."""
        numbers = [chosen.tolist() for chosen in torch.arange(len(windows)).split(self._batch)]
        walk.through_blocks(
            self._run.skeleton,
            ready,
            windows.split(self._batch),
            lambda batch: states.read(numbers[batch]),
            lambda batch, hidden: states.write(numbers[batch], hidden),
        )

    def _indices(self) -> range:
        return range(len(self._run.skeleton.blocks))

    def _seconds(self) -> float:
        return self._earlier + time.monotonic() - self._began

    def _notes(self) -> tuple[str, ...]:
        if self._places.resident:
            return ()
        return ("the model and what is tuned of it did not fit into memory, so each step read and wrote it",)
