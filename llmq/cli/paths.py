"""What a command does before torch and transformers are imported, which takes seconds."""

import sys
from pathlib import Path

from llmq.checkpoint.model_id import require_id
from llmq.cli.terminal import messages


def begin(*models: str, quiet: bool = False) -> None:
    """Check the paths of models, and give a sign of life on stderr before the imports. Raises CheckpointError."""
    require_models(*models)
    if not quiet and "transformers" not in sys.modules:
        messages().print("[dim]loading torch and transformers[/]")


def require_models(*models: str) -> None:
    """Raise CheckpointError for a local folder without a model, and for a path that does not exist.

    Everything else is checked when the model is opened, with the same messages.
    """
    for model in models:
        path = Path(model)
        try:
            missing = not path.exists()
            empty = path.is_dir() and not (path / "config.json").exists() and not any(path.glob("*.gguf"))
        except OSError:  # opening the model reports it
            continue
        if missing and (model.count("/") > 1 or model.startswith((".", "/", "~"))):  # not the id of a model on the Hub
            require_id(model)
        elif empty and model:
            from llmq.checkpoint.reader import Checkpoint

            Checkpoint.open(path)
