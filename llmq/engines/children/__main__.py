"""`python children ENGINE ANSWER`: answer the request on stdin, as the process of an engine.

    {"task": "score", "model": PATH, "options": {…}, "root": PATH, "texts": [text], "prompts": [ids], "top": count}
    {"task": "time", "model": PATH, "options": {…}, "root": PATH, "prompt": ids, "new_tokens": count, "repeats": count}

`root` is the folder of llmq, for a process of the same Python; otherwise null. The answer goes to a file, because
engines write to stdout and stderr themselves.
"""

import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any


def peak_bytes() -> int:
    """The most main memory that this process has used."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def score(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    return {
        "tokens": [engine.tokenize(text) for text in request["texts"]],
        "scores": [
            [sorted(row.items()) for row in engine.top(tokens, request["top"])] for tokens in request["prompts"]
        ],
    }


def measure(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    run = (request["prompt"], request["new_tokens"])
    engine.seconds(*run)  # warm-up
    seconds = [engine.seconds(*run) for _ in range(request["repeats"])]
    return {"seconds": seconds, "host_bytes": peak_bytes(), "device_bytes": engine.device_bytes()}


def import_llmq(root: str) -> None:
    """Import llmq from the folder `root`, which does not stay on the path: a checkout has other folders in it."""
    sys.path.insert(0, root)
    importlib.import_module("llmq")
    sys.path.remove(root)


def answer(name: str, request: dict[str, Any]) -> dict[str, Any]:
    if request["root"] is not None:
        import_llmq(request["root"])
    try:
        module = importlib.import_module("on_" + name)
        engine = module.Engine(request["model"], request["options"])
    except ModuleNotFoundError as error:
        traceback.print_exc()
        return {"missing": error.name}
    work = {"score": score, "time": measure}[request["task"]]
    return {"version": engine.version, **work(engine, request)}


def main() -> None:
    name, path = sys.argv[1:]
    Path(path).write_text(json.dumps(answer(name, json.load(sys.stdin))), encoding="utf-8")


if __name__ == "__main__":
    main()
