"""`llmq.evaluate`: what `llmq eval` measures, as values."""

from collections.abc import Sequence
from pathlib import Path

from llmq.evaluation import WIKITEXT
from llmq.evaluation.activations import AS_DECLARED
from llmq.evaluation.measure import measure_many
from llmq.evaluation.results import Measurement
from llmq.report.events import OnEvent, ignore


def evaluate(
    model: str | Path,
    *,
    against: str | Path | None = None,
    text: str | Path | Sequence[str | Path] = WIKITEXT,
    seqlen: int | None = None,
    windows: int | None = None,
    activations: str = AS_DECLARED,
    calibration: Sequence[str] = (),
    floors: bool = False,
    trajectories: int = 0,
    engine: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> Measurement:
    """Measure the perplexity of a model on texts; with `against`, also its distance from this original.

        llmq.evaluate("out", against="Qwen/Qwen3-8B", text="held-out.txt").model.kl_mean

    The arguments are the options of `llmq eval --help`, by the same names. Models are read block by block, so they need
    not fit into memory. Raises the errors of `llmq.errors`.
    """
    [measured] = measure_many(
        against, [model], text, seqlen=seqlen, limit=windows, device=device, remote_code=trust_remote_code,
        activations=activations, calibration=calibration, floors=floors, trajectories=trajectories, engine=engine,
        on_event=on_event,
    )  # fmt: skip
    return measured
