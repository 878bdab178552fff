"""Tile sizes for this GPU: `llmq_kernels.w4a16.tune` within the remaining time, on the layers of 8B.

Runs only on request.  The table is written to the folder of the results; LLMQ_W4A16_CONFIGS may name it.
"""

import io
from contextlib import redirect_stderr
from functools import partial

import torch

from bench.plan import Plan
from bench.session import Result, Session
from llmq_kernels.w4a16 import tune

ROWS = (1, 16, 64, 256)  # each also for fewer rows
SHARE = 0.85  # of the time, since a search that has begun is finished
FILE = "w4a16-tuned.json"


def measure(plan: Plan, session: Session) -> None:
    """Case: tune."""
    session.run("tune", partial(tuned, plan, session))


def tuned(plan: Plan, session: Session) -> Result:
    """The table as text, with the name of its file."""
    if plan.device != "cuda":
        return {"summary": "left out: tile sizes are measured on a GPU"}
    campaign = plan.campaigns[0]
    shapes = [f"{N}x{K}" for N, K in campaign.layers.values()]
    dtype = getattr(torch, campaign.dtype)
    with redirect_stderr(_Progress(session)):
        text = tune.run(shapes, ROWS, campaign.group, dtype, SHARE * session.seconds_left / 60)
    return {"file": FILE, "text": text, "summary": f"{len(shapes)} shapes, {len(ROWS)} numbers of rows each, in {FILE}"}


class _Progress(io.TextIOBase):
    """Passes the output of the search on as lines of progress."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def write(self, text: str) -> int:
        for line in filter(None, map(str.strip, text.splitlines())):
            self._session.report(line[:150])
        return len(text)
