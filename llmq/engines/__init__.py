"""Programs that run a finished model: chat with it, check what an engine computes, measure its speed, and serve it.

writers.py        text from a model as it appears: transformers with llmq's kernels, or llama.cpp
conversation.py   the turns of a chat
processes.py      engines in separate processes, also in another Python environment
children/         what runs in these processes; imports nothing of llmq
prompts.py        the texts with which engines are compared and measured
agreement.py      log-probabilities of an engine compared with those of llmq
speed.py          tokens per second and memory of engines
serving.py        which server to start, and with which flags
"""
