"""What a local path holds: a model, or something that users take for one, which the error names."""

from pathlib import Path

from llmq.checkpoint.output_folder import CONFIG
from llmq.checkpoint.safetensors_files import reading
from llmq.checkpoint.staging import STAGING
from llmq.errors import CheckpointError, listed

MODEL_FILES = (CONFIG, "*.safetensors", "*.gguf")
SHOWN = 8  # folders in a message


def require_model(path: Path) -> None:
    """Raise CheckpointError for an unfinished run of llmq, and for a folder with one folder per format of a run.

    All other paths are left to the code that reads them, because its errors name what is missing.
    """
    with reading(path):
        if not path.is_dir() or any(entry.is_file() for pattern in MODEL_FILES for entry in path.glob(pattern)):
            return
        if (path / STAGING).exists():
            message = f"{path} holds an unfinished run of llmq, expected a model"
            raise CheckpointError(message, hint="repeat the command that started the run: it continues")
        files = [file for pattern in MODEL_FILES for file in path.glob(f"*/{pattern}")]
    inner = sorted({str(file.parent) for file in files if not file.parent.name.startswith(".")})
    if inner:
        more = f" and {len(inner) - SHOWN} more" if len(inner) > SHOWN else ""
        raise CheckpointError(
            f"{path} is not a model but holds folders of models",
            hint=f"give one of them: {listed(inner[:SHOWN])}{more}",
        )
