"""Write the tables of kernels/README.md from the result files in kernels/bench/results.

python scripts/kernel_tables.py            write them
python scripts/kernel_tables.py FILE…      show the tables of any result files
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from bench import results, tables  # noqa: E402

README = ROOT / "kernels" / "README.md"
BEGIN, END = "<!-- scripts/kernel_tables.py begins -->", "<!-- scripts/kernel_tables.py ends -->"
NOT_MEASURED = "not measured yet"


def render(folder: Path = results.FOLDER) -> str:
    """The text between the markers: GPUs, then CPUs, each with hardware and date, or "not measured yet"."""
    gpus = [tables.report(results.read(path)) for path in results.gpu_files(folder)]
    cpus = [tables.cpu(json.loads(path.read_text(encoding="utf-8"))) for path in results.cpu_files(folder)]
    return "\n\n".join([*(gpus or [f"### GPU\n\n{NOT_MEASURED}"]), *(cpus or [f"### CPU\n\n{NOT_MEASURED}"])])


def write() -> None:
    readme = README.read_text(encoding="utf-8")
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{render()}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE")
    files = parser.parse_args().files
    for file in files:
        print(tables.report(results.read(file)), end="\n\n")
    if not files:
        write()


if __name__ == "__main__":
    main()
