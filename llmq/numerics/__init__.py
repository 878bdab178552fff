"""The data types that all parts of llmq share: schemes, grids, quantized tensors, statistics of inputs."""
