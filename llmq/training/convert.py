"""`llmq.convert_qat`: the files of a model that was trained on its grids."""

import dataclasses
from pathlib import Path
from typing import Any

from torch import distributed

from llmq._version import __version__
from llmq.checkpoint.writer import Writer
from llmq.export.verdict import unmeasured
from llmq.training import rewritten
from llmq.training.prepare import origin_of

WHY = "it was trained after it was quantized; measure it with llmq eval"


def convert_qat(model: Any, out: str | Path, *, overwrite: bool = False) -> Path:
    """Write a model of `llmq.prepare_qat`, trained or not, into the folder `out`, and return the folder.

        llmq.convert_qat(trainer.model, "trained")

    The files are those of the quantized model that the training started from, in the same format, with other values.
    The model may be wrapped by accelerate or torch (DistributedDataParallel); of several processes the first writes.
    Raises the errors of `llmq.errors`.
    """
    from accelerate.utils import extract_model_from_parallel

    model, folder = extract_model_from_parallel(model), Path(out)
    if distributed.is_available() and distributed.is_initialized() and distributed.get_rank() != 0:
        return folder
    origin = origin_of(model)
    start = origin.folder
    identity = {"llmq": __version__, "convert_qat": str(start)}
    writer = Writer.open(folder, identity=identity, overwrite=overwrite, needed_bytes=0)
    try:
        moved = rewritten.commit(writer, model)
        with writer.finishing() as final:
            rewritten.assemble(writer, final, model)
            changes = {
                "request": "", "verdict": dataclasses.asdict(unmeasured(WHY)),
                "training": {"start": str(start), "moved": moved, "llmq": __version__},
            }  # fmt: skip
            note = f"trained after it was quantized: {moved:.1%} of the quantized values changed"
            rewritten.record(final, start, changes, [note, *origin.notes])
    except BaseException:
        writer.abandon()
        raise
    return folder
