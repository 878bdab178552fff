"""Checkpoints on disk: found, read one tensor at a time, and written so that no crash costs a finished block.

    safetensors_files.py  one safetensors file: header, one tensor, many tensors streamed into a new file
    index.py      which file of a folder holds which tensor
    reader.py    `Checkpoint`, a model folder as the rest of llmq sees it
    hub.py       a folder or a Hub id -> a folder
    atomic.py    files that appear whole or not at all
    staging.py   the finished blocks of a run that is not over
    shards.py    tensors that lie in many files -> the shards of one model
    writer.py    `Writer`, the output folder of a run

Importing this package imports nothing; its modules need torch.
"""

PROVENANCE_FILE = "llmq.json"
