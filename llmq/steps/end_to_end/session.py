"""Tune the quantized values and scales of all blocks together, towards the predictions of the float model.

    float blocks ──► last hidden states of every sequence ──► head ──► p ─┐
    committed blocks ─► forward ─► head ─► p̂ ─► KL(p ‖ p̂), gradient ◄─────┘
         ▲                                          │
         └── codes, scales ◄── backward, block by block       once per step, on `tokens` tokens

It runs when all blocks are committed, and changes a second version of them (`checkpoint/tuned_version.py`). The
committed blocks stay valid until the second version is adopted as a whole, so a run may be interrupted at any point,
and the same command continues and produces the same bits. The last hidden states of the float model are those with
which the float stream left the last block. `memory_plan.py` decides whether there is text and memory enough, and what
is kept in memory; where things are kept changes no bit.

The guard: at regular steps the loss is computed on validation sequences. The blocks with the lowest loss are adopted;
if these are the committed blocks, nothing is. The sequences of a step are drawn without repetition from the other
sequences, in an order that depends only on the seed and the step.

Not here: the maths of one weight (algorithms/kl_tuning.py), the passes through the model (model/passes/).
"""

import math
import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llmq.algorithms.kl_tuning import Rates, drawn
from llmq.methods import Tuning
from llmq.model.build.block import Block
from llmq.model.passes.backward import Tape, backward
from llmq.model.passes.forward import run_through
from llmq.model.passes.hidden_states import Storage
from llmq.model.passes.streams import Text
from llmq.report.record import TuningReport, TuningStep
from llmq.steps.end_to_end import memory_plan
from llmq.steps.end_to_end.tuned_blocks import TunedBlocks, committed, moving
from llmq.steps.kl_loss import kl_loss
from llmq.steps.run import Run

VALIDATIONS = 8  # how often the validation loss is computed, in addition to the first time
SAVED_EVERY = 60.0  # seconds, and at least SAVED_SHARE times the duration of saving
SAVED_SHARE = 20
UNTOUCHED: Mapping[str, Any] = {"step": 0, "best": None, "moved": 0.0, "history": (), "seconds": 0.0}


def tune_end_to_end(run: Run) -> None:
    """Tune the committed blocks if the method does so; emits an event for each step and for the result."""
    if run.method.tuning is None:
        return
    done = run.writer.revision.adopted
    if done is not None:  # an interrupted run has finished tuning
        run.on_event(TuningReport.from_dict(done["report"]))
        return
    if not any(map(moving, committed(run))):  # all weights are stored on grids that they already lay on
        return
    assert run.streams is not None, "tuning needs text"
    left_out = memory_plan.left_out(run, run.streams.text, run.method.tuning)
    if left_out and run.writer.revision.progress is None:  # a run that has begun to tune continues
        run.on_event(TuningReport(0, 0, (), notes=(left_out,)))
        return
    session = Session(run, run.method.tuning)
    try:
        session.run_steps()
        run.on_event(session.adopt())
    finally:
        session.free()


class Session:
    """End-to-end tuning, started new or resumed from the saved state of an interrupted run."""

    def __init__(self, run: Run, tuning: Tuning) -> None:
        self._began = time.monotonic()
        assert run.streams is not None and run.streams.floats is not None, "tuning needs text and the float stream"
        self._run, self._tuning, self._calls = run, tuning, run.streams.recorded
        self._teacher = run.streams.floats  # it has passed all blocks
        text = run.streams.text
        batch = min(text.fitted, max(1, tuning.tokens // text.length))
        self._text = Text(text.tokens, batch, text.validation)
        run.streams.quantized.clear()
        progress = run.writer.revision.progress or UNTOUCHED
        self._plan = memory_plan.choose(run, self._text)
        self._rates = Rates(tuning.rounding, tuning.scales)
        run.writer.revision.begin()
        self._storage = Storage(run.skeleton.device, self._plan.states, run.writer.revision.folder)
        self._blocks = TunedBlocks(run, in_memory=self._plan.packed_in_memory)

        self._step: int = progress["step"]
        self._best: int | None = progress["best"]  # the step before which the blocks were best
        self._moved: float = progress["moved"]
        self._history = {int(step): float(loss) for step, loss in progress["history"]}
        self._earlier: float = progress["seconds"]

    def run_steps(self) -> None:
        """Run all remaining steps."""
        if self._history:
            self._blocks.resume(self._step)
        else:
            self._blocks.start(self._rates)
        loss, last = None, self._tuning.steps
        last_save, duration = time.monotonic(), 0.0
        while True:
            due = self._step % max(1, last // VALIDATIONS) == 0 or self._step == last
            self._run.on_event(TuningStep(self._step, last, loss, self._validate() if due else None))
            if self._step == last or not math.isfinite(loss or 0.0):
                return
            if time.monotonic() - last_save >= max(SAVED_EVERY, SAVED_SHARE * duration):
                began = time.monotonic()
                self._save()
                last_save, duration = time.monotonic(), time.monotonic() - began
            loss = self._descend()
            self._step += 1

    def adopt(self) -> TuningReport:
        """Replace the committed blocks by the best tuned blocks, if they are better."""
        report = TuningReport(
            steps=self._step,
            best=self._best or 0,
            history=tuple(self._history.items()),
            moved=self._moved,
            seconds=self._seconds(),
            notes=self._plan.notes,
        )
        self._run.writer.revision.adopt({"best": self._best, "report": report.to_dict()}, self._indices())
        return report

    def free(self) -> None:
        """Free all memory."""
        self._blocks.free()

    def _descend(self) -> float:
        """One step; returns the loss before the update."""
        skeleton, rates = self._run.skeleton, self._rates.at(self._step, self._tuning.steps)
        chosen = drawn(self._step, self._text.batch, self._text.fitted, self._run.seed)
        text = Text(self._text.of(chosen), len(chosen))
        storage = Storage(skeleton.device)
        tape = Tape(skeleton, text, self._calls, storage, weights=self._blocks.paths, seen=True)
        [hidden] = tape.forward(self._blocks.ready)
        loss, gradient = kl_loss(skeleton, text.tokens, self._teacher.last(chosen), hidden)
        del hidden

        def update(block: Block, _: range, __: Tensor) -> None:
            self._blocks.update(block, rates, self._step)

        backward(skeleton, tape, [gradient], update, ready=self._blocks.ready)
        return loss

    def _validate(self) -> float:
        """The loss on validation text; writes the blocks if it is the lowest so far."""
        if self._step in self._history:  # computed before the run was interrupted
            return self._history[self._step]
        loss = self._validation_loss()
        if self._history and loss < min(self._history.values()):
            moved = self._blocks.write_blocks(self._step)
            if self._best is not None:
                self._run.writer.revision.drop_blocks(self._indices(), self._best)
            self._best, self._moved = self._step, moved
        self._history[self._step] = loss
        return loss

    def _validation_loss(self) -> float:
        skeleton, start = self._run.skeleton, self._text.fitted
        text = Text(self._text.tokens[start:], self._text.batch)
        passed = run_through(skeleton, text, self._storage, self._calls, ready=self._blocks.ready)
        total = 0.0
        for batch in text.batches():
            expected = self._teacher.last(range(start + batch.start, start + batch.stop))
            mean, _ = kl_loss(skeleton, text.of(batch), expected, passed.last(batch))
            total += mean * len(batch)
        passed.clear()
        return total / text.sequences

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

    def _indices(self) -> range:
        return range(len(self._run.skeleton.blocks))

    def _seconds(self) -> float:
        return self._earlier + time.monotonic() - self._began
