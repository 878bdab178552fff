"""Run the first commands of the tutorial in a terminal of 100 columns, and write docs/FIRST_RUN.json and pictures.

    python scripts/first_run.py FOLDER --python PYTHON

FOLDER is new; PYTHON is that of an environment with llmq, by default the running one. The pictures are what the
terminal shows while `llmq quantize` runs, and at its end. The commands use one thread. Needs the packages `pyte` and
`rich` (dependency group `docs`).
"""

import argparse
import fcntl
import io
import json
import os
import pty
import re
import select
import shlex
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pyte
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
RECORD, PICTURES = ROOT / "docs" / "FIRST_RUN.json", ROOT / "docs" / "pictures"
TUTORIAL = ROOT / "docs" / "TUTORIAL.md"
COLUMNS, LINES = 100, 120
RUNNING = re.compile(r"\b[23]/4 blocks")  # the picture of the bar shows the second or third block


def commands() -> list[str]:
    """The commands of the tutorial that run on the bundled model."""
    blocks = re.findall(r"<!-- runs -->\n```console\n(.*?)^```", TUTORIAL.read_text("utf-8"), flags=re.S | re.M)
    return re.findall(r"^\$ (.+)$", "".join(blocks), flags=re.M)


def run(command: str, folder: Path, python: Path) -> tuple[dict[str, object], Text, Text | None]:
    """Time, CPU time and output of a command, its last screen, and a screen while blocks are quantized."""
    words = shlex.split(command)
    program = [str(python), "-m", *words] if words[0] == "llmq" else [str(python), *words[1:]]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "OMP_NUM_THREADS": "1"}
    screen = pyte.Screen(COLUMNS, LINES)
    stream, running = pyte.ByteStream(screen), None
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    start, before = time.monotonic(), os.times()
    process = subprocess.Popen(program, cwd=folder, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    first = None
    while data := output(ours):
        first = first or time.monotonic() - start
        stream.feed(data)
        if running is None and RUNNING.search("\n".join(screen.display)):
            running = drawn(screen)
    code, after = process.wait(), os.times()
    if code:
        raise SystemExit(f"{command} ended with exit code {code}:\n" + "\n".join(screen.display).rstrip())
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    figures = {"command": command, "first_line_seconds": round(first or 0.0, 1),
               "seconds": round(time.monotonic() - start, 1), "cpu_seconds": round(cpu, 1)}  # fmt: skip
    return figures, drawn(screen), running


def output(terminal: int) -> bytes:
    """The next piece of output; empty when the program has closed the terminal."""
    select.select([terminal], [], [])
    try:
        return os.read(terminal, 65536)
    except OSError as error:  # Linux reports the end of a pseudo-terminal as an error
        if error.errno != 5:
            raise
        return b""


def drawn(screen: pyte.Screen) -> Text:
    """The screen as text with colours, without the empty lines at its end."""
    lines = []
    for row in range(screen.lines):
        line = Text()
        for column in range(screen.columns):
            cell = screen.buffer[row][column]
            colour = "" if cell.fg == "default" else f"#{cell.fg}" if len(cell.fg) == 6 and cell.fg.isalnum() else ""
            named = {"brown": "yellow"}.get(cell.fg, cell.fg)
            if not colour and named in ("red", "green", "yellow", "blue", "magenta", "cyan", "white", "black"):
                colour = named
            line.append(cell.data, style=" ".join(filter(None, ("bold" if cell.bold else "", colour))))
        line.rstrip()
        lines.append(line)
    while lines and not lines[-1].plain:
        lines.pop()
    return Text("\n").join(lines)


def save_picture(screens: Sequence[Text], name: str, title: str) -> None:
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    for screen in screens:
        console.print(screen, soft_wrap=True)
    PICTURES.mkdir(exist_ok=True)
    lines = console.export_svg(title=title, unique_id=name).splitlines()
    (PICTURES / f"{name}.svg").write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", type=Path, default=Path(sys.executable))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    for name in ("eval", "scripts"):
        (arguments.folder / name).symlink_to(ROOT / name)
    steps = []
    for command in commands():
        figures, last, running = run(command, arguments.folder, arguments.python)
        steps.append({**figures, "output": last.plain.splitlines()})
        name = command.split()[1]
        if command.startswith("llmq"):
            save_picture([Text(f"$ {command}"), last], name, f"llmq {name}")
        if running is not None:
            save_picture([running], f"{name}-running", f"llmq {name}, running")
        print(f"{figures['seconds']} s: {command}", file=sys.stderr)
        record = {
            "date": datetime.now(UTC).date().isoformat(),
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1),
            "steps": steps,
        }
        RECORD.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
