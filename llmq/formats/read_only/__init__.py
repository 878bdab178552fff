"""Formats that llmq reads but does not write.  Each file ends with a `Readable`."""
