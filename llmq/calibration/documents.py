"""Documents of a text source: each is a text or a chat."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmq.calibration.chats import Chat, parse_chat
from llmq.errors import CalibrationError

COLUMNS = ("text", "content", "messages", "conversations", "completion", "question")  # first match is read

Document = str | Chat


@dataclass(frozen=True)
class Contents:
    """The documents of a source, including blank ones.

    continuous  whether the documents are consecutive pieces of one text, and joining them with blank lines restores it
    """

    documents: list[Document]
    continuous: bool = False


def documents_of(rows: Sequence[Any], where: str, column: str | None) -> list[Document]:
    """Return the document of each row: the row itself, or its column.

    `where` names the rows in error messages; without a `column` the first of `COLUMNS` that a row has is used.
    """
    documents: list[Document] = []
    for number, row in enumerate(rows):
        value = row
        if isinstance(row, dict):
            key = column or next((name for name in COLUMNS if name in row), None)
            value = row.get(key) if key else None
        document = value if isinstance(value, str) else parse_chat(value)
        if document is None:
            content = f"the columns {', '.join(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
            expected = column or " or ".join(COLUMNS)
            raise CalibrationError(
                f"row {number} of {where} holds {content}, expected a text or the column {expected}",
                hint="a column holds a text, or a chat: a list of messages with role and content, or from and value",
            )
        documents.append(document)
    return documents


def is_blank(document: Document) -> bool:
    return not (document.contents if isinstance(document, Chat) else document).strip()


def texts_only(documents: Sequence[Document], source: str) -> list[str]:
    """Return the documents of `source` as texts; raises CalibrationError for chats."""
    texts = [document for document in documents if isinstance(document, str)]
    if len(texts) < len(documents):
        raise CalibrationError(
            f"{source} holds chats, expected texts", hint="chats are for calibration only; select a column of texts"
        )
    return texts
