"""Run models on sequences of tokens, alone or compared with an original, and collect the scores of all tokens.

The original runs once, however many models are compared with it: its last hidden states are kept. If they do not fit
into memory, the sequences are split into parts. In addition to the original, one model at a time is in memory.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from llmq import memory
from llmq.errors import UnsupportedModelError
from llmq.evaluation.scoring import Scores, score
from llmq.evaluation.streaming import Source, Streamed, windows_together
from llmq.evaluation.trajectories import Trajectories, compared
from llmq.report.events import SCORING, OnEvent, Planned, Progress, evaluating, ignore

Logits = Iterator[tuple[Tensor, Tensor]]  # batches (B, T) int64 of sequences, and their logits (B, T, V)
SPARE_PART = 0.8  # of the free memory, for a whole model that generates text; the rest is for activations


@dataclass(frozen=True)
class Prompts:
    """Beginnings of texts (P, T) int64 that all models continue, and the tokens that end a text."""

    tokens: Tensor
    ends: frozenset[int]


@dataclass(frozen=True)
class Run:
    """A model's scores on all sequences, notes for the user, and its continuations of the prompts, if there are any.

    activations  how the inputs of its linear layers were quantized, in words
    """

    scores: Scores
    notes: tuple[str, ...]
    activations: str = "none"
    trajectories: Trajectories | None = None


def planned(first: Source, names: Sequence[str]) -> Planned:
    """The stages of running models of the same size as `first`: their blocks, and the scores of all tokens."""
    blocks, scores = first.work if isinstance(first, Streamed) else (0.0, 1.0)
    return Planned({**{evaluating(name): blocks for name in names if blocks}, SCORING: scores * len(names)})


@dataclass
class _Scored:
    """Reports how many sequences were scored, of all models together."""

    total: int
    on_event: OnEvent
    done: int = 0

    def add(self, sequences: int) -> None:
        self.done += sequences
        self.on_event(Progress(SCORING, self.done, self.total, "sequences"))


def run_alone(source: Source, windows: Tensor, on_event: OnEvent = ignore) -> Run:
    """Run a model without an original on `windows` (S, T) int64."""
    parts, notes = _parts(windows, source.windows_at_once(windows.shape[1], sides=1))
    scores: list[Scores] = []
    together = windows_together(windows.shape[1], source.vocabulary)
    scored = _Scored(len(windows), on_event)
    for number, part in enumerate(parts):
        source.run(part, number, len(parts))
        for tokens, logits in source.logits(together):
            scores.append(score(logits, tokens))
            scored.add(len(tokens))
    own_notes = tuple(note for note in (source.note, *notes) if note)
    return Run(Scores.joined(scores), own_notes, source.activations)


def run_compared(
    original: Source,
    models: Sequence[Callable[[], Source]],
    windows: Tensor,
    prompts: Prompts | None = None,
    on_event: OnEvent = ignore,
) -> list[Run]:
    """Run each model, and the original once, on `windows` (S, T) int64; `models` open them.

    Every model runs on a part of the sequences, then on the next part, so that the original runs once per part.
    """
    parts, notes = _parts(windows, original.windows_at_once(windows.shape[1], sides=2))
    expected, refusal = _continued(original, prompts)
    common = dict.fromkeys(note for note in (original.note, *notes, refusal) if note)
    scores: list[list[Scores]] = [[] for _ in models]
    notes_by_model = [dict(common) for _ in models]
    activations = ["none"] * len(models)
    trajectories: list[Trajectories | None] = [None] * len(models)
    scored = _Scored(len(windows) * len(models), on_event)
    for number, part in enumerate(parts):
        original.run(part, number, len(parts))
        for index, opened in enumerate(models):
            with memory.only_new_garbage():
                model = opened()
                require_vocabulary(model, original.vocabulary)
                model.run(part, number, len(parts))
                for own in _scores(model, part, original):
                    scores[index].append(own)
                    scored.add(len(own.loss))
                if number == 0 and expected is not None:
                    written, refusal = _continued(model, prompts)
                    trajectories[index] = None if written is None else compared(written, expected)
                    notes_by_model[index].update(dict.fromkeys(filter(None, [refusal])))
                notes_by_model[index].update(dict.fromkeys(filter(None, [model.note])))
                activations[index] = model.activations
                del model
                gc.collect()  # before the next one is opened: modules and their hooks are reference cycles
    return [
        Run(Scores.joined(batches), tuple(own), inputs, same)
        for batches, own, inputs, same in zip(scores, notes_by_model, activations, trajectories, strict=True)
    ]


def require_vocabulary(model: Source, expected: int) -> None:
    """Raise UnsupportedModelError for a model with another number of tokens."""
    if model.vocabulary != expected:
        raise UnsupportedModelError(
            f"the models have vocabularies of {model.vocabulary} and {expected} tokens, expected the same",
            hint="compare models that were made from the same model",
        )


def _continued(model: Source, prompts: Prompts | None) -> tuple[Tensor | None, str | None]:
    """The continuations of the prompts; None if there are no prompts, or with a note if the model does not fit."""
    if prompts is None:
        return None, None
    free = memory.spare(model.device)
    if model.whole_bytes > SPARE_PART * free:
        return None, (
            f"trajectories were not compared: a whole model needs {model.whole_bytes / 1e9:.1f} GB of memory, "
            f"{free / 1e9:.1f} GB are free"
        )
    return model.continue_greedily(prompts.tokens, prompts.ends), None


def _scores(model: Source, windows: Tensor, original: Source) -> Iterator[Scores]:
    """The scores of each batch; both models were run on the same sequences before."""
    together = windows_together(windows.shape[1], model.vocabulary)
    for (tokens, predicted), (_, expected) in _aligned(model.logits(together), original.logits(together)):
        yield score(predicted, tokens, expected)


def _aligned(first: Logits, second: Logits) -> Iterator[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """Pairs of batches of the same sequences, where the batches of the two models may have different sizes."""
    (a, a_logits), (b, b_logits) = next(first), next(second)
    while True:
        size = min(len(a), len(b))
        yield (a[:size], a_logits[:size]), (b[:size], b_logits[:size])
        a, a_logits, b, b_logits = a[size:], a_logits[size:], b[size:], b_logits[size:]
        if len(a) == 0:
            a, a_logits = next(first, (a, a_logits))
        if len(b) == 0:
            b, b_logits = next(second, (b, b_logits))
        if len(a) == 0 or len(b) == 0:
            return


def _parts(windows: Tensor, at_once: int | None) -> tuple[Sequence[Tensor], list[str]]:
    """Split the sequences into parts whose hidden states fit into memory, and return notes for the user."""
    if at_once is None or at_once >= len(windows):
        return [windows], []
    parts = windows.split(at_once)
    return parts, [
        f"the hidden states of {len(windows)} sequences do not fit into memory together, so all blocks were read "
        f"{len(parts)} times"
    ]
