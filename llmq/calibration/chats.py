"""Chats: how datasets store them, and their text as the model gets it in serving.

A chat is a list of messages, `{"role", "content"}` (the column is usually called `messages`) or `{"from", "value"}`
(`conversations`), or one list per key, as Arrow stores them. All keys of a message reach the chat template of the
tokenizer, so that tool calls and the tools of the row are in the text. Two rules are those of transformers and of
serving engines: a key whose value is null is missing, and the arguments of a tool call are an object, not its JSON.

The text of a template already contains the special tokens, so none are added when it is tokenized. A tokenizer without
a template belongs to a base model: the contents of the messages are then joined with blank lines.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmq.errors import CalibrationError

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}  # to chat templates
KEYS = (("role", "content"), ("from", "value"))

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Chat:
    """Messages in their order, as JSON values; `content`, if a message has one, is a text.

    tools      the tools that the model may call, as JSON schemas
    left_out   number of parts of messages that are not text, such as images
    """

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()
    left_out: int = 0

    @property
    def contents(self) -> str:
        """The contents of the messages, without the roles."""
        texts = (message.get("content", "") for message in self.messages)
        return "\n\n".join(text for text in texts if text.strip())

    def rendered(self, tokenizer: Any) -> str:
        """The text by the chat template of the tokenizer; a template may raise an exception of any type."""
        messages = [_with_parsed_arguments(message) for message in self.messages]
        options = {"tools": list(self.tools)} if self.tools else {}  # not every tokenizer knows the option
        try:
            text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception:  # many templates need a content, or arguments as text
            plain = [{"content": "", **message} for message in self.messages]
            if plain == messages:
                raise
            text = tokenizer.apply_chat_template(plain, tokenize=False, **options)
        return text


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer came with a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def from_json(value: Any) -> Any:
    """The value of a JSON text; anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def is_chat(value: Any) -> bool:
    """Whether the value of a row or a column is a list of messages; they may still be invalid."""
    items = _items(value)
    return bool(items) and all(isinstance(item, Mapping) and any(role in item for role, _ in KEYS) for item in items)


def parse_chat(value: Any, tools: Any = None) -> Chat:
    """Parse the value of a row or a column, and the tools of the row; raises CalibrationError with the reason."""
    items = _items(value)
    if not items:
        raise CalibrationError(f"holds {_shown(value)}, expected a text or a list of messages")
    parsed = [_message(item) for item in items]
    messages = tuple(message for message, _ in parsed)
    chat = Chat(messages, tuple(_listed(tools, "tools")), sum(left_out for _, left_out in parsed))
    if not chat.contents and not any("tool_calls" in message for message in messages):
        raise CalibrationError("holds messages without text")
    return chat


def _items(value: Any) -> Sequence[Any]:
    """The messages of a list, or of a list for each key (Arrow's form of a list of objects)."""
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    return value if isinstance(value, Sequence) and not isinstance(value, str) else ()


def _message(item: Any) -> tuple[Message, int]:
    """The message as a template expects it, and the number of its parts that were left out."""
    if isinstance(item, Mapping):
        present = {key: value for key, value in item.items() if value is not None}
        for role_key, content_key in KEYS:
            role = present.pop(role_key, None)
            if isinstance(role, str):
                content, left_out = _text(present.pop(content_key, None))
                calls = _listed(present.pop("tool_calls", None), "tool_calls")
                known = {"role": ROLES.get(role, role), "content": content, "tool_calls": calls or None}
                return {**{key: value for key, value in known.items() if value is not None}, **present}, left_out
    raise CalibrationError(f"holds the message {_shown(item)}, expected role and content")


def _text(content: Any) -> tuple[str | None, int]:
    """The text of a message, None without content; of several parts, those with text are joined, others counted."""
    if content is None or isinstance(content, str):
        return content, 0
    if isinstance(content, list) and all(isinstance(part, str | Mapping) for part in content):
        texts = [part if isinstance(part, str) else part.get("text") for part in content]
        kept = [text for text in texts if isinstance(text, str)]
        return "".join(kept), len(texts) - len(kept)
    raise CalibrationError(f"holds a message whose content is {_shown(content)}, expected a text or a list of parts")


def _listed(value: Any, name: str) -> list[Any]:
    """A list that may be stored as JSON."""
    parsed = from_json(value)
    if parsed is None or parsed == "":
        return []
    if not isinstance(parsed, list):
        raise CalibrationError(f"holds {name} {_shown(value)}, expected a list")
    return parsed


def _with_parsed_arguments(message: Message) -> Message:
    """The message; arguments of its tool calls that are JSON of an object become the object."""
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_with_object(call) for call in calls]} if calls else message


def _with_object(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(arguments := from_json(function.get("arguments")), Mapping):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
