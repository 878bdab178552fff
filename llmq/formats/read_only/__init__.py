"""Formats that llmq reads and does not write: each file ends with a `Readable`."""
