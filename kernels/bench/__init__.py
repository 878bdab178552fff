"""Measurements of the kernels, one section a module; `scripts/gpu_suite.py` runs them.  Not installed with llmq.

A section is a function `measure(plan, session)`: it takes sizes from a `Plan` and hands each case to the session,
which records its result, or its error, on disk at once.
"""
