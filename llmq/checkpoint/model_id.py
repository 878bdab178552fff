"""Ids of models on the Hub, distinguished from paths; without torch, so that a wrong path is an error at once."""

import re

from llmq.errors import CheckpointError

_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def require_id(model: str) -> None:
    """Raise CheckpointError if a path that does not exist is not a Hub id either."""
    if not _ID.fullmatch(model):
        message = f"{model!r} is neither a local path nor a Hub id"
        raise CheckpointError(message, hint="give a folder with a config.json, or an id such as Qwen/Qwen3-0.6B")
