"""Run one section: a process that `scripts/gpu_suite.py` starts, so that a kernel cannot end the suite."""

import argparse
import importlib
import sys
import time
from pathlib import Path

from bench.plan import PLANS
from bench.session import ContextLostError, Session

RESTART = 75  # the exit code that requests a new process


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("section")
    parser.add_argument("--plan", choices=PLANS, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--started", type=float, default=time.time())
    arguments = parser.parse_args()
    session = Session(arguments.section, arguments.records, arguments.seconds, arguments.started)
    section = importlib.import_module(f"bench.{arguments.section}")
    try:
        section.measure(PLANS[arguments.plan], session)
    except ContextLostError as lost:
        session.report(f"{lost}: this process has lost the device")
        return RESTART
    return 0


if __name__ == "__main__":
    sys.exit(main())
