"""Programs for the Python of an engine, which may have no llmq: each file imports its engine and nothing of llmq.

`__main__.py` reads a request as JSON from stdin, and writes the answer to a file. Each `on_*.py` has a class `Engine`
with the same methods:

    version                     name and version
    tokenize(text)              the ids of a text, with the special tokens in front of it
    top(tokens, count)          after each token, the `count` most likely next tokens with their log-probabilities
    seconds(prompt, new)        the time until the first new token, and the time for all others
    device_bytes()              the most memory that was allocated on a GPU; None if unknown
"""
