"""Code that several formats share: packing of quantized values, and checks of the settings and tensors of a file."""
