"""compressed-tensors for quantized inputs, with one byte per code at any number of bits.  See `compressed_tensors.py`.

The format defines two ways to store weights of 4 bits with int8 inputs, and the kernels of vLLM differ: those for CPUs
read bytes (seen with vLLM 0.32), those for GPUs packed words, which compressed-tensors has here.  A file of bytes is
twice as large.
"""

import dataclasses
from functools import partial

from llmq.formats import compressed_tensors
from llmq.formats.base import QuantizedInputs
from llmq.formats.codecs import ct_groups

NAME = "int-quantized"

LAYOUT = dataclasses.replace(
    compressed_tensors.LAYOUT,
    name=NAME,
    with_inputs=QuantizedInputs(
        refusal=ct_groups.refusal,
        pack=partial(compressed_tensors.pack_with_inputs, as_bytes=True),
        scale=ct_groups.stored_scale,
        quantization_config=partial(ct_groups.quantization_config, as_bytes=True),
    ),
    quant_methods=(),  # such a checkpoint is read as compressed-tensors: its config.json names the packing
    implied_by=(),
    own_keys=(),
)
