"""The files around the weights: tokenizer, chat template, generation settings, licence, card."""

from pathlib import Path

WEIGHT_SUFFIXES = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".onnx",
    ".msgpack",
    ".h5",
    ".pkl",
    ".pickle",
}
WRITTEN_ANEW = {"config.json", "quantize_config.json", "llmq.json"}


def companion_files(folder: Path) -> list[Path]:
    """What is copied byte for byte from the original: every plain file of the folder that is not about the weights."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and path.suffix not in WEIGHT_SUFFIXES
        and not path.name.endswith(".index.json")
        and path.name not in WRITTEN_ANEW
    )
