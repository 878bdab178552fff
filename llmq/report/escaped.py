r"""Text of checkpoints for people: names, templates and messages come from strangers.

A terminal obeys control characters: they can move the cursor over earlier lines, or write to the clipboard. Markdown
and HTML have marks that change what a page shows, or run programs.
"""

import html
import re

# C0 without tab and newline, DEL, C1, line separators, characters that reorder text, and halves of surrogate pairs
CONTROL = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
_UNSAFE = re.compile(CONTROL)


def printable(text: str) -> str:
    """`text` with every control character except tabs and newlines as an escape, such as `\\x1b`."""
    return _UNSAFE.sub(escape, text)


def escape(match: "re.Match[str]") -> str:
    """The escape of a control character."""
    return match[0].encode("unicode_escape").decode("ascii")


def markdown_code(text: object) -> str:
    """A text as code in Markdown, on one line, also inside of a table."""
    line = " ".join(printable(str(text)).split()).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest or not line else ""
    return f"{fence}{space}{line}{space}{fence}"


def markdown_text(text: object) -> str:
    """A text for Markdown, on one line, without marks and HTML."""
    return re.sub(r"([\\`*_\[\]<>|#~&$])", r"\\\1", " ".join(printable(str(text)).split()))


def html_text(text: object) -> str:
    """A text for HTML."""
    return html.escape(printable(str(text)))
