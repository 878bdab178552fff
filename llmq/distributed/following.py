"""`FollowingWriter`: the writer of a rank that writes nothing, because the first rank writes for all."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llmq.checkpoint.staging import Staging
from llmq.checkpoint.writer import Writer
from llmq.distributed.ranks import Ranks


class FollowingWriter(Writer):
    """Knows which blocks the first rank has committed. Blocks are read by `Run.committed`.

    scratch  a folder for hidden states of this rank that do not fit into memory
    """

    def __init__(self, committed: Collection[int], scratch: Path) -> None:
        self._committed = set(committed)
        self._pending = None
        self._scratch = scratch

    @property
    def activations(self) -> Path:
        return self._scratch

    def commit(self, index: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        self._committed.add(index)

    def follow(self, committed: Collection[int]) -> None:
        """Take over which blocks the first rank has committed."""
        self._committed = set(committed)

    def abandon(self) -> bool:
        return bool(self._committed)


def agree_on_blocks(ranks: Ranks, writer: Writer) -> None:
    """Before another attempt: the ranks may have been interrupted before and after the end of a block."""
    committed = ranks.first(lambda: writer.committed)
    if isinstance(writer, FollowingWriter):
        writer.follow(committed)


def shared_writer(ranks: Ranks, out: Path, make: Callable[[], Writer]) -> Writer:
    """The writer of this rank for the output folder `out`: that of the first rank is made by `make`."""
    if ranks.is_first:
        writer = make()
        ranks.first(lambda: writer.committed)
        return writer
    return FollowingWriter(ranks.first(list[int]), Staging(out).activations / str(ranks.rank))
