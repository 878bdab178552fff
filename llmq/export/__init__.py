"""Convert between formats without quantizing again, and write the finished folders of a run."""

FLOAT = "float"  # of `llmq convert --to`: no format of quantized weights, but what they stand for
FLOAT_DTYPES = ("float32", "bfloat16", "float16")
ONNX = "onnx"  # of `llmq convert --to`: a graph of the whole model
ACTIVATIONS = ("none", "int8")  # how the graph rounds the inputs of quantized layers
