"""Prompts and completions, plain or conversational: checks, text, and the prompt that two conversations share."""

import re
from collections.abc import Sequence
from typing import Any

from tieback.data.errors import fault
from tieback.data.files import json_type

Message = dict[str, str]
TextOrMessages = str | list[Message]

ROLES = ("system", "user", "assistant", "tool")

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}


def as_messages(prompt: TextOrMessages) -> list[Message]:
    """Return a conversation as it is, and plain text as one user message."""
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


def last_text(value: TextOrMessages) -> str:
    """Return plain text as it is, and of a conversation the text of its last message."""
    return value if isinstance(value, str) else value[-1]["content"]


def check_text(value: Any, where: str, column: str) -> str:
    """Return `value` if it is text that is not blank.

    Raises:
        DataError: it is not.
    """
    if not isinstance(value, str):
        raise fault(where, f"text is wanted, not {json_type(value)}.", column)
    if not value.strip():
        raise fault(where, "the text is empty.", column)
    return value


def check_messages(value: Any, where: str, column: str, *, may_be_blank: bool = False) -> list[Message]:
    """Return a list of messages with `role` and `content` alone.

    Args:
        value: what stands in the row.
        where: file and row, for the message.
        column: its column, for the message.
        may_be_blank: accept blank contents.

    Raises:
        DataError: it is no list of messages, a role is unknown or a content is not text.
    """
    if not isinstance(value, list):
        raise fault(where, f"a list of messages is wanted, not {json_type(value)}.", column)
    if not value:
        raise fault(where, "the list of messages is empty.", column)
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise fault(where, f"message {number} must be an object with `role` and `content`.", column)
        if message["role"] not in ROLES:
            raise fault(
                where,
                f"message {number} has the unknown role {message['role']!r}; roles are {', '.join(ROLES)}.",
                column,
            )
        if not isinstance(message["content"], str):
            raise fault(
                where,
                f"the content of message {number} must be text, not {json_type(message['content'])}.",
                column,
            )
        if not may_be_blank and not message["content"].strip():
            raise fault(where, f"message {number} ({message['role']}) is empty.", column)
        messages.append({"role": message["role"], "content": message["content"]})
    return messages


def check_prompt(value: Any, where: str, column: str = "prompt") -> TextOrMessages:
    """Return a prompt: text, or messages of which the last is not the assistant's.

    Raises:
        DataError: it is neither, or empty.
    """
    if not isinstance(value, list):
        return check_text(value, where, column)
    messages = check_messages(value, where, column)
    if messages[-1]["role"] not in ("user", "tool"):
        raise fault(where, f"the last message must be the user's, not the {messages[-1]['role']}'s.", column)
    return messages


def check_completion(
    value: Any, where: str, column: str, *, conversational: bool, may_be_blank: bool = False
) -> TextOrMessages:
    """Return a completion of the prompt's format: text, or messages that begin and end with the assistant's.

    Raises:
        DataError: it is of another format or empty.
    """
    if not isinstance(value, str | list):
        raise fault(where, f"text or a list of messages is wanted, not {json_type(value)}.", column)
    if conversational != isinstance(value, list):
        formats = ("a conversation", "plain text")
        first, second = formats if conversational else formats[::-1]
        raise fault(
            where, f"the prompt is {first} and this column {second}; both must be of one format.", column
        )
    if isinstance(value, str):
        return value if may_be_blank else check_text(value, where, column)
    messages = check_messages(value, where, column, may_be_blank=may_be_blank)
    for place, message in (("first", messages[0]), ("last", messages[-1])):
        if message["role"] != "assistant":
            raise fault(
                where, f"its {place} message must be the assistant's, not the {message['role']}'s.", column
            )
    return messages


def is_blank(completion: TextOrMessages) -> bool:
    """Whether a completion, or its last message, holds no text."""
    return not last_text(completion).strip()


def is_transcript(value: Any) -> bool:
    """Whether `value` is an Anthropic-style transcript: text of turns that begin `\\n\\nHuman:`, `\\n\\nAssistant:`."""
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def parse_transcript(text: str) -> list[Message]:
    """Turn an Anthropic-style transcript into messages; neighbouring turns of one speaker become one message."""
    pieces = _TURN.split(text.strip())
    messages: list[Message] = []
    for speaker, content in zip(pieces[1::2], pieces[2::2], strict=True):
        role = _TRANSCRIPT_ROLES[speaker]
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{content.strip()}".strip()
        else:
            messages.append({"role": role, "content": content.strip()})
    return messages


def shared_prompt(chosen: Sequence[Message], rejected: Sequence[Message]) -> list[Message]:
    """Messages that two conversations begin with alike, cut so that both go on with the assistant's answer.

    Empty where they share none. (TRL's `extract_prompt` does not cut: its prompt may end in an answer.)
    """
    count = 0
    for first, second in zip(chosen, rejected, strict=False):
        if first != second:
            break
        count += 1
    while count and chosen[count - 1]["role"] not in ("user", "tool"):
        count -= 1
    return list(chosen[:count])
