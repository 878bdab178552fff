"""Documents of a text source: each is a text or a chat.

One odd row never ends a run. A row that holds neither is left out, and its name and the reason are kept; only if more
than a tenth of the rows are like that, the source is refused.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmq.calibration.chats import Chat, from_json, is_chat, parse_chat
from llmq.errors import CalibrationError

# The first one that is not null is read.
CHATS = ("messages", "conversations", "conversation")
COLUMNS = ("text", "content", *CHATS, "completion", "question")
MOST_UNUSABLE = 0.1  # of the rows
BYTE_ORDER_MARK = "\ufeff"

# The name of a row, such as "row 3" or "line 4", and its value, or the error why there is none.
Row = tuple[str, Any | CalibrationError]


@dataclass(frozen=True)
class Tokens:
    """Token ids that are not tokenized again."""

    ids: tuple[int, ...]


Content = str | Chat | Tokens


@dataclass(frozen=True)
class Document:
    """A text, a chat or token ids, and the name of its row, for messages."""

    content: Content
    row: str


@dataclass(frozen=True)
class Contents:
    """The documents of a source, including blank ones.

    unusable  the names of rows that hold no document, and the reasons
    text      the continuous text of which the documents are consecutive pieces; None if they are independent
    """

    documents: list[Document]
    unusable: Mapping[str, str] = field(default_factory=dict)
    text: str | None = None

    def notes(self, source: str) -> tuple[str, ...]:
        """What a user should know about the rows of `source`."""
        if not self.unusable:
            return ()
        rows = len(self.documents) + len(self.unusable)
        return (f"{source}: {len(self.unusable)} of {rows} {left_out_like(*next(iter(self.unusable.items())))}",)


def numbered(values: Iterable[Any]) -> Iterator[Row]:
    """The rows of a table: "row 0", "row 1", …"""
    return ((f"row {number}", value) for number, value in enumerate(values))


def contents_of(rows: Iterable[Row], where: str, column: str | None) -> Contents:
    """The documents of rows: the row itself, or its column, by default the first of `COLUMNS`.

    `where` names the source in messages.  Raises CalibrationError if too many rows are unusable.
    """
    documents: list[Document] = []
    unusable: dict[str, str] = {}
    for name, value in rows:
        try:
            documents.append(Document(_content(value, column), name))
        except CalibrationError as error:
            unusable[name] = str(error)
        except RecursionError:
            unusable[name] = "is nested too deeply"
    count = len(documents) + len(unusable)
    if len(unusable) > MOST_UNUSABLE * count:
        name, reason = next(iter(unusable.items()))
        raise CalibrationError(
            f"{len(unusable)} of {count} rows of {where} cannot be used: {name} {reason}",
            hint="a column holds a text, or a chat: a list of messages with role and content, or from and value",
        )
    return Contents(documents, unusable)


def left_out_like(row: str, reason: str) -> str:
    """The end of a note about unusable rows, of which `row` is the first one."""
    return f"rows hold neither a text nor a chat and were left out, for example {row}, which {reason}"


def column_of(row: Mapping[str, Any], column: str | None) -> str | None:
    """The column that is read; None if the row has none of them."""
    names = [name for name in ((column,) if column else COLUMNS) if name in row]
    return next((name for name in names if row[name] is not None), names[0] if names else None)


def arrow_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of an Arrow table without the keys that Arrow added inside: all structs of a column have the same keys."""
    return {key: _without_nulls(value) for key, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def digest(content: Content) -> bytes:
    """The SHA-256 of a document, to recognize duplicates."""
    if isinstance(content, Tokens):
        text = json.dumps(content.ids)
    else:
        text = content if isinstance(content, str) else json.dumps([content.messages, content.tools], default=str)
    return hashlib.sha256(text.encode()).digest()


def is_blank(document: Document) -> bool:
    return isinstance(document.content, str) and not document.content.strip()


def texts_only(documents: Sequence[Document], source: str) -> list[str]:
    """Return the documents of `source` as texts; raises CalibrationError for chats."""
    texts = [document.content for document in documents if isinstance(document.content, str)]
    if len(texts) < len(documents):
        raise CalibrationError(
            f"{source} holds chats, expected texts", hint="chats are for calibration only; select a column of texts"
        )
    return texts


def _content(row: Any, column: str | None) -> Content:
    """The text or the chat of a row; raises CalibrationError with the reason."""
    if isinstance(row, CalibrationError):
        raise row
    if isinstance(row, Tokens):
        return row
    value, tools = row, None
    if isinstance(row, Mapping):
        name = column_of(row, column)
        if name is None:
            expected = column or " or ".join(COLUMNS)
            raise CalibrationError(
                f"holds the columns {', '.join(map(str, row))}, expected a text or the column {expected}"
            )
        value, tools = row[name], row.get("tools")
        if name in CHATS and is_chat(parsed := from_json(value)):  # some tables hold chats as JSON
            value = parsed
    if value is None:
        raise CalibrationError("holds null, expected a text")
    if isinstance(value, str):
        return _encodable(value.removeprefix(BYTE_ORDER_MARK))
    if not isinstance(value, list | tuple | Mapping):
        raise CalibrationError(f"holds the {type(value).__name__} {value!r:.40}, expected a text or a list of messages")
    chat = parse_chat(value, tools)
    _encodable(json.dumps([chat.messages, chat.tools], ensure_ascii=False, default=str))
    return chat


def _encodable(text: str) -> str:
    """The text; raises CalibrationError for half of a surrogate pair, which JSON can hold and no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"holds half of a surrogate pair, U+{ord(text[error.start]):04X}, which is not a character"
        ) from None
    return text
