"""From the scores of all tokens to the figures of each text, and of all texts together."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from llmq.evaluation.bootstrap import Bootstrap
from llmq.evaluation.floors import Variation
from llmq.evaluation.overlap import CalibrationText, Grams
from llmq.evaluation.results import Documents, Figures, Floor
from llmq.evaluation.runs import Run
from llmq.evaluation.scoring import Scores
from llmq.evaluation.summary import summary, summary_of_original
from llmq.evaluation.texts import EvaluationText


class Tables:
    """Makes the figures of any number of models on the same texts, with the same draws of documents."""

    def __init__(self, texts: Sequence[EvaluationText]) -> None:
        self._texts = texts
        self._draws = [Bootstrap([text.documents]) for text in texts]
        self._all_draws = Bootstrap([text.documents for text in texts])

    def figures(
        self, scores: Scores, calibration: CalibrationText | None = None, grams: Grams | None = None
    ) -> tuple[tuple[Figures, ...], Figures]:
        """The figures of each text, and of all together, from the scores of all sequences.

        `calibration` and `grams` are the text that the model was calibrated on, if they are known.
        """
        overlaps = [_overlap(text, calibration, grams) for text in self._texts]
        figures, start = [], 0
        for text, bootstrap, overlap in zip(self._texts, self._draws, overlaps, strict=True):
            part = scores[start : start + len(text.windows)]
            start += len(text.windows)
            figures.append(
                Figures(
                    text=text.name,
                    windows=len(text.windows),
                    model=summary(part, bootstrap),
                    original=summary_of_original(part, bootstrap),
                    source=text.source,
                    documents=_documents(text, part, bootstrap),
                    overlap=overlap,
                )
            )
        total = Figures(
            text=self._texts[0].name if len(self._texts) == 1 else f"{len(self._texts)} texts",
            windows=start,
            model=summary(scores, self._all_draws),
            original=summary_of_original(scores, self._all_draws),
            overlap=self._joint_overlap(overlaps),
        )
        return tuple(figures), total

    def floor(self, variation: Variation, run: Run) -> Floor:
        """The figures of the original, run in another way."""
        texts, total = self.figures(run.scores)
        alone = tuple(replace(figures, documents=None) for figures in texts)
        return Floor(variation.name, alone, total, run.trajectories)

    def _joint_overlap(self, overlaps: Sequence[float | None]) -> float | None:
        """The overlap of all texts together: they have sequences of the same length, so it is a weighted mean."""
        sizes = [len(text.windows) for text in self._texts]
        known = [overlap * size for overlap, size in zip(overlaps, sizes, strict=True) if overlap is not None]
        return sum(known) / sum(sizes) if len(known) == len(sizes) else None


def _overlap(text: EvaluationText, calibration: CalibrationText | None, grams: Grams | None) -> float | None:
    if grams is None or calibration is None or calibration.tokens is None:
        return None
    return grams.share(text.windows)


def _documents(text: EvaluationText, scores: Scores, bootstrap: Bootstrap) -> Documents:
    if scores.comparison is None:
        _, tokens = bootstrap.sums(torch.zeros(text.windows.shape))
        return Documents(text.unit, tuple(tokens.long().tolist()))
    totals, tokens = bootstrap.sums(scores.comparison.divergence)
    return Documents(text.unit, tuple(tokens.long().tolist()), tuple((totals / tokens).tolist()))
