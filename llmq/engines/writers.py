"""Open the writer of a model: llama.cpp for a .gguf file, and transformers with packed layers for all others."""

from llmq.checkpoint import hub
from llmq.checkpoint.index import gguf_file
from llmq.engines.llama_cpp_writer import LlamaCppWriter
from llmq.engines.sampling import Writer
from llmq.engines.torch_writer import TransformersWriter


def open_writer(path: str, *, device: str = "auto", remote_code: bool = False) -> Writer:
    """Load a folder, a Hub id or a .gguf file. Raises BackendError if a .gguf file or an ONNX model needs a package."""
    folder = hub.locate(path, remote_code=remote_code)
    file = gguf_file(folder)
    return LlamaCppWriter(file, device) if file is not None else TransformersWriter(folder, device, remote_code)
