"""GGUF, the file format of llama.cpp: one file with weights in blocks, hyper-parameters and tokenizer.

    container.py      a GGUF file: its keys and its tensors
    reader.py         a file as a checkpoint with Hugging Face names, block by block
    writer.py         writes a file from tensors and the Hugging Face folder of the model
    architectures.py  the models whose files llmq can write; metadata.py their keys, tokenizer.py their vocabulary
    names.py          the names of tensors, and the order of rows
    export.py         converts a quantized checkpoint to a file, without a second quantization
    recipes.py        which block type each weight gets in a run with a native GGUF grid
    from_run.py       assembles the file of such a run

The names of tensors and keys and the container come from the package `gguf`, which llama.cpp's authors publish.  The
arithmetic of blocks is in `formats/codecs/gguf_blocks.py` and `gguf_k_quants.py`.
"""
