"""The values that everything passes on: schemes, grids, quantized tensors, statistics of inputs."""
