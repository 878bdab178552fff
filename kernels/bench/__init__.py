"""Measurements of the kernels, one section per module; `scripts/gpu_suite.py` runs them.  Not installed with llmq.

A section is a function `measure(plan, session)`: it takes sizes from a `Plan` and passes each case to the session,
which writes its result, or its error, to disk immediately.
"""
