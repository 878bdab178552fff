"""The files next to the weights: tokenizer, chat template, generation settings, licence, card."""

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
REWRITTEN = {"config.json", "quantize_config.json", "llmq.json"}


def companion_files(folder: Path) -> list[Path]:
    """The files that are copied unchanged from the original: everything except weights and configuration."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and path.suffix not in WEIGHT_SUFFIXES
        and not path.name.endswith(".index.json")
        and path.name not in REWRITTEN
    )
