"""GGUF, the file format of llama.cpp: one file with weights in blocks, hyper-parameters and tokenizer.

    container.py      a file as it lies on disk
    reader.py         a file as a checkpoint under Hugging Face names, block by block
    writer.py         a file from tensors, beside a Hugging Face folder that says what they are
    architectures.py  the models that llmq writes files of; metadata.py their keys, tokenizer.py their vocabulary
    names.py          the names of tensors, and the order of rows
    export.py         a quantized checkpoint as a file, without rounding anything again
    recipes.py        which block type each weight gets in a run with a grid of GGUF's own
    from_run.py       the file of such a run

Names of tensors and keys, and the container itself, are the package `gguf`'s, which llama.cpp's authors publish; the
arithmetic of blocks is in `formats/codecs/gguf_blocks.py` and `gguf_k_quants.py`.
"""
