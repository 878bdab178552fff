"""The table that the README shows, from the figures in eval/peers/results/.

python eval/peers/readme_table.py
"""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from table import line

ROOT = Path(__file__).resolve().parents[2]
RESULTS, README = ROOT / "eval" / "peers" / "results", ROOT / "README.md"
BEGIN, END = "<!-- readme_table.py begins -->", "<!-- readme_table.py ends -->"
MODELS = ("tiny-python-llama", "tiny-python-qwen3", "babyllama-tok361-pad384")
CONTENDERS = ("llmq rtn-minmax", "llmq rtn", "llmq gptq-paper", "llm-compressor GPTQ", "GPTQModel GPTQ", "llmq gptq",
              "llmq fast", "AutoRound 200", "llmq balanced", "llmq best")  # fmt: skip


def read() -> dict[str, dict[str, Any]]:
    """The results of each model that was measured."""
    files = {name: RESULTS / f"{name}.json" for name in MODELS}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}


def table(results: dict[str, dict[str, Any]], grid: str = "symmetric") -> str:
    """KL at 4 bits, one column a model; means over the draws that were made, their number beside them."""
    lines = [line(["KL to float, 4 bits", *results]), line(["---"] * (len(results) + 1))]
    for name in CONTENDERS:
        cells = []
        for result in results.values():
            found = [row["kl_mean"] for row in result["rows"]
                     if (row["name"], row["asked"]) == (name, grid) and "error" not in row]  # fmt: skip
            cells.append(f"{mean(found):.5f} ({len(found)})" if found else "")
        lines.append(line([name, *cells]))
    perplexity = (f"{result['about']['float_perplexity']:.3f}" for result in results.values())
    return "\n".join([*lines, line(["float perplexity", *perplexity])])


def main() -> None:
    readme = README.read_text(encoding="utf-8")
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{table(read())}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
