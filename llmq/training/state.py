"""The last checkpoint of an interrupted training, in the staging folder of its output.

    training/
        step-00050/    what accelerate saves: parameters, the optimizer, the schedule, random states
        last.json      the number of steps, the losses so far, and the checksums of these files

A checkpoint counts when `last.json`, which is replaced atomically, names it. One that does not match its checksums is
not used, and the training starts again.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from llmq.checkpoint.atomic import storing
from llmq.checkpoint.sealed import read_sealed, write_sealed
from llmq.report.training import Losses
from llmq.verification.integrity import checksum

LAST = "last.json"


class States:
    """The checkpoints in `folder`; all processes use the same one, the first writes `last.json`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.notes: tuple[str, ...] = ()  # for the user, about the checkpoint that was restored or not

    def restore(self, accelerator: Any) -> tuple[int, list[Losses]]:
        """Load the last checkpoint into what accelerate has prepared; the steps that are done, and their losses."""
        last = read_sealed(self._folder / LAST)
        if last is None:
            return 0, []
        if _checksums(self._place(last["steps"])) != last["checksums"]:
            self.notes = ("the checkpoint of an earlier run was damaged on the disk; the training started again",)
            return 0, []
        self.notes = (f"continued after step {last['steps']}, which an earlier run had finished",)
        accelerator.load_state(str(self._place(last["steps"])))
        return last["steps"], [Losses(**entry) for entry in last["history"]]

    def save(self, accelerator: Any, steps: int, history: list[Losses]) -> None:
        """Save a checkpoint after this number of steps, and delete the one before it."""
        place = self._place(steps)
        with storing(self._folder):
            if accelerator.is_main_process:
                shutil.rmtree(place, ignore_errors=True)  # of a process that was killed
                place.mkdir(parents=True)
            accelerator.wait_for_everyone()
            accelerator.save_state(str(place))
            accelerator.wait_for_everyone()
            if not accelerator.is_main_process:
                return
            losses = [dataclasses.asdict(entry) for entry in history]
            write_sealed(self._folder / LAST, {"steps": steps, "history": losses, "checksums": _checksums(place)})
            for other in self._folder.glob("step-*"):
                if other != place:
                    shutil.rmtree(other)

    def _place(self, steps: int) -> Path:
        return self._folder / f"step-{steps:05d}"


def _checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a checkpoint; empty if there is none."""
    return {file.name: checksum(file) for file in sorted(folder.glob("*")) if file.is_file()}
