"""Run quantized models: packed linear layers, and loading checkpoints into transformers models."""

ONNXRUNTIME, OPENVINO = "onnxruntime", "openvino"
ONNX_ENGINES = (ONNXRUNTIME, OPENVINO)  # that run an ONNX model
LLAMA_CPP = "llama.cpp"  # that runs a .gguf file
