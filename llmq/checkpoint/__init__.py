"""Checkpoints on disk: locate them, read one tensor at a time, and write so that no crash costs a finished block.

    safetensors_files.py  one safetensors file: header, one tensor, many tensors streamed into a new file
    index.py      which file holds which tensor
    reader.py    `Checkpoint`, a model folder
    hub.py       the folder of a model, downloaded from the Hub if necessary
    atomic.py    write a file completely or not at all
    staging.py   the finished blocks of a run in progress
    shards.py    write tensors as the shards of a model
    writer.py    `Writer`, the output folder of a run

This file imports nothing; the modules import torch.
"""

PROVENANCE_FILE = "llmq.json"
PAGE_FILES = ("report.html", "report.json", "layers.csv")  # made from llmq.json, for people and their scripts
