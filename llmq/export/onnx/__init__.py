"""`llmq convert --to onnx`: a whole quantized model as an ONNX graph that holds llmq's codes.

    folder.py        the conversion: from a quantized checkpoint to a folder, checked
    graph.py         transformers' exporter traces the float model; its exported graph gets the quantized weights
    products.py      which columns of a product are which quantized weights, by value
    matmul_nbits.py  the arrays of one node, and back

Nothing here is written per model: transformers traces any architecture, and weights are found by their values.
"""
