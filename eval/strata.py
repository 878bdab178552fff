"""The texts for SmolLM2: six strata for evaluation, and text for calibration and for fine-tuning.

Every stratum is a .jsonl file of documents, so that `llmq eval` and `llmq quantize` read it. No document of a stratum
is used for calibration or fine-tuning:

    wikitext   articles of the WikiText-2 test set
    c4         documents of the web crawl C4: the last fifth of the file
    code       files of Python's standard library that `scripts/stdlib_text.py` holds out
    chat       dialogues of the package chatterbot-corpus, in the chat template of the model
    stories    TinyStories
    technical  documentation and licences of programs

**C4 is split by documents**, one per line, in the order of the file: the first three fifths are `calibration.jsonl`,
the next fifth is `tuning.jsonl` (fine-tuning of the float model), the last fifth is the stratum. A document that also
occurs in an earlier part is dropped.

**Documents are shuffled** with a fixed seed, and each gives at most `EXCERPT` characters from its middle. So a stratum
of few sequences still contains many documents. Strata have the same number of sequences, which the evaluation limits.
"""

import json
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
from stdlib_text import documents  # noqa: E402

Messages = list[dict[str, str]]
STRATA = ("wikitext", "c4", "code", "chat", "stories", "technical")
CALIBRATION, TUNING = "calibration.jsonl", "tuning.jsonl"
EXCERPT = 2_000  # characters of a document in a stratum: about 500 tokens
CHARACTERS = 100_000  # of a stratum: at least 32 sequences of 512 tokens
C4_FIFTHS = {CALIBRATION: (0, 3), TUNING: (3, 4), "c4": (4, 5)}
SEED = 0
WIKITEXT_TITLE = re.compile(r"^ = [^=].*[^=] = $", re.MULTILINE)
CHATS = "chatterbot-corpus==1.3.3"


def write_strata(data: Path, wikitext: Path, render: Callable[[Messages], str], out: Path) -> dict[str, Path]:
    """Write all texts to the folder `out`, and return their files by name.

    data      the folder with the texts that are not part of this repository (eval/README.md)
    wikitext  the raw text of the test set
    render    the text of a chat in the template of the model
    """
    web = split_c4((data / "exllamav3_c4.utf8").read_text(encoding="utf-8"))
    stories = (data / "tinystories.eval.jsonl").read_text(encoding="utf-8").splitlines()
    technical = (data / "exllamav3_technical.utf8").read_text(encoding="utf-8")
    sources = {
        "wikitext": articles(wikitext.read_text(encoding="utf-8")),
        "c4": web["c4"],
        "code": documents(held_out=True),
        "chat": [render(messages) for messages in dialogues()],
        "stories": [json.loads(line)["text"] for line in stories],
        "technical": pieces(technical),
    }
    out.mkdir(parents=True, exist_ok=True)
    written = {name: _write(out / f"{name}.jsonl", stratum(sources[name], name)) for name in STRATA}
    return written | {name: _write(out / name, web[name]) for name in (CALIBRATION, TUNING)}


def split_c4(text: str) -> dict[str, list[str]]:
    """The documents, one per line, of each part in `C4_FIFTHS`; a document belongs to the first part that has it."""
    lines = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    bounds = {name: (len(lines) * first // 5, len(lines) * last // 5) for name, (first, last) in C4_FIFTHS.items()}
    return {name: lines[start:stop] for name, (start, stop) in bounds.items()}


def articles(text: str) -> list[str]:
    """The articles of the raw WikiText file, each with its title."""
    starts = [match.start() for match in WIKITEXT_TITLE.finditer(text)]
    return [text[start:stop].strip() for start, stop in zip(starts, [*starts[1:], len(text)], strict=True)]


def pieces(text: str) -> list[str]:
    """A continuous text as documents of about `EXCERPT` characters, cut at the ends of paragraphs."""
    parts, gathered = [], ""
    for paragraph in text.split("\n\n"):
        gathered += paragraph + "\n\n"
        if len(gathered) >= EXCERPT:
            parts.append(gathered.strip())
            gathered = ""
    return [*parts, gathered.strip()] if gathered.strip() else parts


def dialogues() -> list[Messages]:
    """The English dialogues of chatterbot-corpus, downloaded by pip; user and assistant speak in turns."""
    import yaml

    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(download(CHATS, Path(folder))) as wheel:
        names = sorted(name for name in wheel.namelist() if re.search(r"/english/\w+\.yml$", name))
        conversations = [chat for name in names for chat in yaml.safe_load(wheel.read(name))["conversations"]]
    return [
        [{"role": ("user", "assistant")[turn % 2], "content": str(said).strip()} for turn, said in enumerate(chat)]
        for chat in conversations
        if len(chat) > 1
    ]


def download(requirement: str, folder: Path) -> Path:
    """The wheel of a package, pinned as NAME==VERSION, without its dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {requirement} cannot be downloaded: {done.stderr.strip()[-300:]}")
    return next(folder.glob("*.whl"))


def stratum(texts: Iterable[str], name: str) -> list[str]:
    """Excerpts of the documents in random order, without duplicates, up to `CHARACTERS` altogether."""
    excerpts = list(dict.fromkeys(excerpt(text.strip()) for text in texts if text.strip()))
    random.Random(SEED).shuffle(excerpts)
    total = 0
    for count, text in enumerate(excerpts, start=1):
        total += len(text)
        if total >= CHARACTERS:
            return excerpts[:count]
    raise SystemExit(f"error: the stratum {name} has {total} characters, expected at least {CHARACTERS}")


def excerpt(text: str) -> str:
    """At most `EXCERPT` characters from the middle of a document, from the beginning of a line or word."""
    if len(text) <= EXCERPT:
        return text
    middle = text[(len(text) - EXCERPT) // 2 :][:EXCERPT]
    start = middle.find("\n") if "\n" in middle[: EXCERPT // 4] else middle.find(" ")
    return middle[start + 1 :].strip("\n")


def shared_grams(left: Iterable[Sequence[int]], right: Iterable[Sequence[int]], size: int = 13) -> float:
    """The share of the token sequences of length `size` in `left` that also occur in `right`."""
    others = {tuple(ids[start : start + size]) for ids in right for start in range(len(ids) - size + 1)}
    grams = {tuple(ids[start : start + size]) for ids in left for start in range(len(ids) - size + 1)}
    return len(grams & others) / max(1, len(grams))


def overlaps(files: Mapping[str, Path], tokenize: Callable[[str], list[int]]) -> dict[str, float]:
    """For each stratum, the share of its 13-grams that also occur in the text for calibration or fine-tuning."""
    read = {name: [tokenize(text) for text in texts_of(file)] for name, file in files.items()}
    fitted = read[CALIBRATION] + read[TUNING]
    return {name: shared_grams(read[name], fitted) for name in STRATA}


def texts_of(file: Path) -> list[str]:
    """The documents of a file that `write_strata` has written."""
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").split("\n") if line]


def _write(file: Path, texts: Iterable[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file
