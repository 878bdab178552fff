"""What a job is expected to do, before it starts: `stages.py` for its progress, `possible.py` whether it can work."""
