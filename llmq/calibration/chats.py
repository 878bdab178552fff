"""Chats: the two ways in which datasets store them, and their text as the model gets it in serving.

A chat is a list of messages, `{"role", "content"}` (the column is usually called `messages`) or `{"from", "value"}`
(`conversations`). The chat template of the tokenizer turns it into a text that already contains the special tokens, so
none are added when it is tokenized. A tokenizer without a template belongs to a base model: the contents of the
messages are then joined with blank lines.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}  # to chat templates


@dataclass(frozen=True)
class Chat:
    """Messages as (role, content) in their order."""

    messages: tuple[tuple[str, str], ...]

    @property
    def contents(self) -> str:
        """The contents of the messages, without the roles."""
        return "\n\n".join(content for _, content in self.messages if content.strip())

    def rendered(self, tokenizer: Any) -> str:
        """The text by the chat template of the tokenizer; a template may raise an exception of any type."""
        messages = [{"role": role, "content": content} for role, content in self.messages]
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
        return text


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer came with a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def parse_chat(value: Any) -> Chat | None:
    """Parse the value of a row or a column as a chat; None if it is not a chat."""
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
    """The text of a message; of several parts, those with text are joined."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) and "text" in part for part in content):
        return "".join(str(part["text"]) for part in content)
    return None
