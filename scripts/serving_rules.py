"""Write the table of `docs/SERVING.md` from the rules that `llmq verify` checks.

python scripts/serving_rules.py
"""

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from llmq.verify.engines import PARALLEL, TILES  # noqa: E402
from llmq.verify.engines.rules import ENGINES, REFUSES, RULES, SERVERS, SGLANG  # noqa: E402
from llmq.verify.engines.tensor_parallel import FUSED, ROW_PARALLEL  # noqa: E402

PAGE = ROOT / "docs" / "SERVING.md"
BEGIN, END = "<!-- begin: rules -->", "<!-- end: rules -->"


def render() -> str:
    """The rules as a table, and what engines fuse and cut."""
    lines = ["| rule | engines | requirement | otherwise | source |", "|---|---|---|---|---|"]
    lines += [_row(rule.name, rule.engines, rule.asks, rule.outcome, rule.source) for rule in RULES]
    for engines, (name, asks, _, source) in ((SERVERS, PARALLEL), ((SGLANG,), TILES)):
        lines.append(_row(name, engines, asks, f"{REFUSES}, for that number of GPUs", source))
    fused = "; ".join(
        f"`{name}` = {' + '.join(f'`{member}`' for member in members)}" for name, members in FUSED.items()
    )
    rows = ", ".join(f"`{name}`" for name in sorted(ROW_PARALLEL))
    lines += [
        "",
        f"Run as one layer: {fused}; and all experts of a layer. Split between inputs on",
        f"several GPUs: {rows}. All other layers are split between outputs.",
    ]
    return "\n".join(lines)


def _row(name: str, engines: Sequence[str], asks: str, outcome: str, source: str) -> str:
    shown = ", ".join(engine for engine in ENGINES if engine in engines)
    return f"| {' | '.join(cell.replace('|', '/') for cell in (name, shown, asks, outcome, source))} |"


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{render()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
