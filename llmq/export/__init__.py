"""Convert between formats without quantizing again, and write the finished folders of a run."""
