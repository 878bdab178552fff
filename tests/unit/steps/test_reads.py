"""How often a run reads the float model, and computes its last hidden states: what takes hours on a large model."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmq.checkpoint.reader import Checkpoint
from llmq.methods import METHODS, Method, Tuning
from llmq.model.passes.streams import Stream, Text
from llmq.report.events import Event
from llmq.steps.end_to_end import session
from tests import runs
from tests.builders import skeleton_of
from tests.passes import stream_over

Checkpoints = Callable[..., Path]
BALANCED = dataclasses.replace(
    METHODS["balanced"], tuning=Tuning(steps=3, scales=1e-3, rounding=1e-3, tokens=96), validation=0.25
)


class Reads:
    """How often each tensor was read from a model's folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[str] = Counter()
        tensor = Checkpoint.tensor

        def counted(checkpoint: Checkpoint, name: str) -> Tensor:
            if checkpoint.folder == folder:
                self.counts[name] += 1
            return tensor(checkpoint, name)

        monkeypatch.setattr(Checkpoint, "tensor", counted)

    def of_blocks(self) -> list[int]:
        counts = [count for name, count in self.counts.items() if ".layers." in name]
        assert len(counts) == 3 * 9, "of three blocks with seven matrices and two norms"
        return counts


def run(model: Path, out: Path, text: Path, method: Method, on_event: Callable[[Event], None] = lambda _: None) -> Any:
    return runs.job(model, out, text, stages=method, samples=8).run(on_event)


def test_reads_per_block_of_a_method_with_all_passes(
    checkpoint: Checkpoints, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of the float model, its text, forward and backward for Fisher information, to quantize, and tuning."""
    model = checkpoint("llama")
    reads = Reads(model, monkeypatch)
    run(model, tmp_path / "out", text, BALANCED)
    assert set(reads.of_blocks()) <= {5, 6}


def test_a_method_of_one_pass_reads_each_block_twice(
    checkpoint: Checkpoints, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for the check that the float model works, and once to quantize; and once to write text."""
    model = checkpoint("llama")
    for method in ("gptq", "awq", "fast"):
        reads = Reads(model, monkeypatch)
        run(model, tmp_path / method, text, METHODS[method])
        assert set(reads.of_blocks()) == {2 + METHODS[method].written}, method
        monkeypatch.undo()


@pytest.mark.parametrize(("transforms", "alphas", "copies"), [((), (), 1), ((), (1.0,), 2), (("awq",), (1.0,), 3)])
def test_memory_for_hidden_states_is_counted_once(
    checkpoint: Checkpoints,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    transforms: tuple[str, ...],
    alphas: tuple[float, ...],
    copies: int,
) -> None:
    """A transform keeps the inputs and the outputs of the float stream at the same time."""
    free, prepared = 1 << 34, []
    monkeypatch.setattr("llmq.memory.spare", lambda device: free)
    monkeypatch.setattr("llmq.pipeline.quantize_model", lambda run, save: prepared.append(run))
    monkeypatch.setattr("llmq.export.verdict.record", lambda *_: None)  # of a model that was not written
    run(checkpoint("llama"), tmp_path / "out", text, Method("gptq", transforms=transforms, alphas=alphas))
    streams = prepared[0].streams
    states = stream_over(skeleton_of(checkpoint("llama")), streams.text.tokens).call(range(streams.text.sequences))
    assert streams.memory == free - copies * states.hidden.nbytes


def float_states(model: Path, text: Text) -> Tensor:
    """(S, T, D) the float model's last hidden states of all sequences."""
    skeleton = skeleton_of(model)
    stream = stream_over(skeleton, text.tokens)
    for block in skeleton.blocks:
        block.load()
        stream.past(block)
    return stream.last(range(text.sequences))


@pytest.mark.parametrize(("transforms", "written"), [((), 0), (("awq",), 0), ((), 1)])
def test_last_states_of_the_float_stream_are_the_teacher(
    checkpoint: Checkpoints,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    transforms: tuple[str, ...],
    written: int,
) -> None:
    """So the float model is run on no text a second time, also not on text that it wrote itself."""
    teacher: dict[str, Any] = {}
    steps, through = session.Session.run_steps, session.run_through

    def note_states(self: session.Session) -> None:
        teacher["text"] = self._text
        teacher["states"] = self._teacher.last(range(self._text.sequences)).clone()
        steps(self)

    def require_ready(*arguments: Any, **options: Any) -> Stream:
        assert "ready" in options, "the blocks that are tuned are run, and not those of the checkpoint"
        return through(*arguments, **options)

    monkeypatch.setattr(session.Session, "run_steps", note_states)
    monkeypatch.setattr(session, "run_through", require_ready)
    method = dataclasses.replace(BALANCED, transforms=transforms, given=1.0, written=written)
    run(checkpoint("llama"), tmp_path / "out", text, method)
    assert teacher["text"].sequences == 8 * (1 + written)
    expected = float_states(checkpoint("llama"), teacher["text"])
    torch.testing.assert_close(teacher["states"], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_each_stream_passes_each_block_once(
    checkpoint: Checkpoints, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody needs what the last block puts out where nothing is tuned.

    The check that the float model works takes one more sequence, and all blocks.
    """
    passed: Counter[int] = Counter()
    write = Stream.write

    def counted(self: Stream, sequences: Sequence[int], output: Tensor) -> None:
        passed[self.position] += len(sequences)
        write(self, sequences, output)

    monkeypatch.setattr(Stream, "write", counted)
    run(checkpoint("llama"), tmp_path / "out", text, dataclasses.replace(METHODS["fast"], validation=0.25))
    assert passed == {0: 2 * 8 + 1, 1: 2 * 8 + 1, 2: 1}
