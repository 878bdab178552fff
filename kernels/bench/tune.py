"""Tile sizes for this GPU: `llmq_kernels.w4a16.tune` within the remaining time, on the layers of 8B.

The first candidates of every search are compiled in parallel; further ones, one after the other, as long as there is
time.  The table is written to the folder of the results, and the suite uses it for the sections that follow.
"""

import io
from contextlib import redirect_stderr
from functools import partial

import torch

from bench import warm
from bench.plan import TUNED_ROWS, Plan
from bench.session import Result, Session
from llmq_kernels.w4a16 import tune

COMPILE_SHARE = 0.45  # of the time
SHARE = 0.85  # of the time, since a search that has begun is finished
FILE = "w4a16-tuned.json"


def measure(plan: Plan, session: Session) -> None:
    """Cases: compile, tune."""
    if plan.device == "cuda":
        limit = COMPILE_SHARE * session.seconds_left
        session.run("compile", partial(warm.compile_ahead, plan, "tune", session, limit))
    session.run("tune", partial(tuned, plan, session))


def tuned(plan: Plan, session: Session) -> Result:
    """The table as text, with the name of its file."""
    if plan.device != "cuda":
        return {"summary": "left out: tile sizes are measured on a GPU"}
    campaign = plan.campaigns[0]
    shapes = [f"{N}x{K}" for N, K in campaign.layers.values()]
    dtype = getattr(torch, campaign.dtype)
    with redirect_stderr(_Progress(session)):
        text = tune.run(shapes, TUNED_ROWS, campaign.group, dtype, SHARE * session.seconds_left / 60)
    summary = f"{len(shapes)} shapes, {len(TUNED_ROWS)} numbers of rows each, in {FILE}"
    return {"file": FILE, "text": text, "summary": summary}


class _Progress(io.TextIOBase):
    """Passes the output of the search on as lines of progress."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def write(self, text: str) -> int:
        for line in filter(None, map(str.strip, text.splitlines())):
            self._session.report(line[:150])
        return len(text)
