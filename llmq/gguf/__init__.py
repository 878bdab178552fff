"""GGUF, the file format of llama.cpp: one file with weights in blocks, hyper-parameters and tokenizer.

    blocks.py         the block types of 32 weights (Q4_0 …), bytes to numbers and back
    formats/gguf_k_quants.py       those of 256 weights with scales of scales (Q4_K, Q5_K, Q6_K)
    container.py      a file as it lies on disk
    reader.py         a file as a checkpoint under Hugging Face names, block by block
    writer.py         a file from tensors, beside a Hugging Face folder that says what they are
    architectures.py  the models that llmq writes files of; metadata.py their keys, tokenizer.py their vocabulary
    names.py          the names of tensors, and the order of rows
    export.py         a quantized checkpoint as a file, without rounding anything again
    recipes.py        which block type each weight gets in a run with a grid of GGUF's own
    gguf/from_run.py   the file of such a run

Names of tensors and keys, and the container itself, are the package `gguf`'s, which llama.cpp's authors publish; the
arithmetic of blocks is here.
"""
