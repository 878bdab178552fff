"""Write tensors from many files as the shards of one model, with an index from tensor to shard.

A model that fits into one shard is `model.safetensors`; a larger one is `model-00001-of-0000n.safetensors` … and
`model.safetensors.index.json` = {"metadata": {"total_size": bytes}, "weight_map": {tensor: file}}.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from llmq.checkpoint.atomic import write_text
from llmq.checkpoint.index import INDEX, SINGLE
from llmq.checkpoint.safetensors_files import Part, concatenate
from llmq.errors import CheckpointError

SHARD_BYTES = 5 * 10**9


def write_shards(folder: Path, parts: Sequence[Part], shard_bytes: int = SHARD_BYTES) -> list[str]:
    """Write tensors, in order, as shards of at most `shard_bytes`; a larger tensor gets a separate shard.

    Returns the names of the written files. Raises StorageError if a file cannot be written, CheckpointError if a part
    cannot be read or a name occurs twice.
    """
    _refuse_duplicates(parts)
    shards = split(parts, shard_bytes)
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        concatenate(folder / name, shard)
    if len(shards) == 1:
        return names
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for _, tensor, _ in shard}
    index = {"metadata": {"total_size": sum(info.nbytes for _, _, info in parts)}, "weight_map": weight_map}
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return [*names, INDEX]


def split(parts: Sequence[Part], shard_bytes: int) -> list[list[Part]]:
    """Split tensors, in order, into shards of at most `shard_bytes`."""
    shards: list[list[Part]] = [[]]
    filled = 0
    for part in parts:
        nbytes = part[2].nbytes
        if shards[-1] and filled + nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(part)
        filled += nbytes
    return shards


def _refuse_duplicates(parts: Sequence[Part]) -> None:
    seen: dict[str, Path] = {}
    for file, name, _ in parts:
        if name in seen:
            raise CheckpointError(f"tensor {name} occurs twice, in {seen[name]} and in {file}")
        seen[name] = file
