"""What a source of text holds: documents, each a text or a chat."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmq.calibration.chats import Chat, parse_chat
from llmq.errors import CalibrationError

COLUMNS = ("text", "content", "messages", "conversations", "completion", "question")  # the first that a row has

Document = str | Chat


@dataclass(frozen=True)
class Contents:
    """The documents of a source, blank ones included.

    continuous  whether they are consecutive pieces of one text, which is what comes of joining them with blank lines
    """

    documents: list[Document]
    continuous: bool = False


def documents_of(rows: Sequence[Any], where: str, column: str | None) -> list[Document]:
    """The document of each row: the row itself, or its column.

    `where` is what an error calls the rows; without a `column` the first of `COLUMNS` that a row has is used.
    """
    documents: list[Document] = []
    for number, row in enumerate(rows):
        value = row
        if isinstance(row, dict):
            key = column or next((name for name in COLUMNS if name in row), None)
            value = row.get(key) if key else None
        document = value if isinstance(value, str) else parse_chat(value)
        if document is None:
            keys = f"the columns {', '.join(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
            expected = column or " or ".join(COLUMNS)
            raise CalibrationError(
                f"row {number} of {where} holds {keys}, expected a text or the column {expected}",
                hint="a column holds a text, or a chat: a list of messages with role and content, or from and value",
            )
        documents.append(document)
    return documents


def is_blank(document: Document) -> bool:
    return not (document.contents if isinstance(document, Chat) else document).strip()


def texts_only(documents: Sequence[Document], source: str) -> list[str]:
    """The documents of `source`, which must all be texts; raises CalibrationError for chats."""
    texts = [document for document in documents if isinstance(document, str)]
    if len(texts) < len(documents):
        raise CalibrationError(
            f"{source} holds chats, expected texts", hint="chats are read for calibration; name a column of texts"
        )
    return texts
