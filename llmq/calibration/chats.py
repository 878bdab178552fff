"""Chats: the two ways in which data sets store them, and what the model is fed when it serves one.

A chat is a list of messages, `{"role", "content"}` (the column is usually called `messages`) or `{"from", "value"}`
(`conversations`).  The tokenizer's template turns it into a text that has its special tokens already, so none is added
when that is tokenized.  A tokenizer without a template is a base model's, for which a chat is a text like any other:
the contents, a blank line between them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}  # what templates call them


@dataclass(frozen=True)
class Chat:
    """Messages as (role, content) in their order."""

    messages: tuple[tuple[str, str], ...]

    @property
    def contents(self) -> str:
        """What was said, without who said it."""
        return "\n\n".join(content for _, content in self.messages if content.strip())

    def rendered(self, tokenizer: Any) -> str:
        """The text by the tokenizer's own template; a template may refuse a chat with an exception of any type."""
        messages = [{"role": role, "content": content} for role, content in self.messages]
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
        return text


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer came with a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def parse_chat(value: Any) -> Chat | None:
    """The chat that a row or a column holds; None where it holds something else."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        return None
    messages = [_message(item) for item in value]
    return None if None in messages else Chat(tuple(message for message in messages if message is not None))


def _message(item: Any) -> tuple[str, str] | None:
    if not isinstance(item, Mapping):
        return None
    for role_key, content_key in (("role", "content"), ("from", "value")):
        role, content = item.get(role_key), _text(item.get(content_key))
        if isinstance(role, str) and content is not None:
            return ROLES.get(role, role), content
    return None


def _text(content: Any) -> str | None:
    """A message's text; it may come in parts, of which those of type text are read."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) and "text" in part for part in content):
        return "".join(str(part["text"]) for part in content)
    return None
