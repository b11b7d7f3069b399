"""The messages of a conversation: the text of each, and which of them are counted.

`content` is text or a list of text parts. `weight`, `train`, `training` and `loss` say whether an
assistant's message is counted; templates do not see them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ast_sparse.data.sources.text_files import shown
from ast_sparse.errors import UserError

Message = dict[str, Any]

_WEIGHTS = ("weight", "train", "training", "loss")  # as OpenAI, axolotl and ms-swift call it
_REFUSED_WEIGHTS = ("train_detail", "training_detail")
_REASONING = ("reasoning_content", "reasoning", "thinking")


def read_messages(value: Any, column: str, where: str) -> tuple[list[Message], list[bool]]:
    """Check messages and remove the weights from them.

    Args:
        value: what the column has.
        where: the row, for messages.

    Returns:
        The messages without keys that are null, and for each whether it is counted.

    Raises:
        UserError: not a list of messages, content that is not text, or a weight that is neither 0 nor 1.
    """
    is_chat = isinstance(value, list) and value
    if not is_chat or not all(isinstance(each, Mapping) and isinstance(each.get("role"), str) for each in value):
        raise UserError(
            f"{where}: `{column}` is {shown(value)}, not a list of messages with `role` and `content`. Leave the row "
            "out."
        )
    messages = [{key: item for key, item in each.items() if item is not None} for each in value]
    counted = []
    for index, message in enumerate(messages):
        place = f"{where}: message {index} ({message['role']})"
        if not message.get("tool_calls"):
            message.pop("tool_calls", None)
        _check_content(message, place)
        counted.append(_is_counted(message, place))
    return messages, counted


def _check_content(message: Message, place: str) -> None:
    content = message.get("content")
    if content is None:
        says_else = any(message.get(key) for key in ("tool_calls", "function_call", *_REASONING))
        if message["role"] != "assistant" or not says_else:
            raise UserError(f"{place} has no `content`. Give it text, or leave the row out.")
    elif isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                what = f"a part of type {kind!r}" if kind and kind != "text" else f"the part {shown(part)}"
                raise UserError(
                    f"{place} has {what} in its `content`, but only text is trained on: "
                    '{"type": "text", "text": "..."}. Leave the row out.'
                )
    elif not isinstance(content, str):
        raise UserError(f"{place} has `content` {shown(content)}, which is not text. Leave the row out.")


def _is_counted(message: Message, place: str) -> bool:
    is_assistant = message["role"] == "assistant"
    is_counted = is_assistant
    for field in _REFUSED_WEIGHTS:
        if message.get(field):
            raise UserError(f"{place} has `{field}`: parts of a message cannot be weighted. Use `weight` 0 or 1.")
    for field in _WEIGHTS:
        value = message.pop(field, None)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise UserError(f"{place} has `{field}` {shown(value)}. A message counts or does not: use 0 or 1.")
        if value and not is_assistant:
            raise UserError(
                f"{place} has `{field}` {shown(value)}, but only what the assistant says is counted. Remove it."
            )
        is_counted = is_counted and bool(value)
    return is_counted


def text_of(message: Message) -> str:
    """What a message says, its parts joined without anything between them."""
    return "".join(_parts(message))


def with_more(message: Message, text: str) -> Message:
    """The message with more text at its end, in the same form."""
    content = message.get("content", "")
    return {**message, "content": content + (text if isinstance(content, str) else [{"type": "text", "text": text}])}


def _parts(message: Message) -> list[str]:
    content = message.get("content", "")
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def written_forms(messages: list[Message]) -> Iterator[list[Message]]:
    """The messages in the forms that templates read, first as they are given.

    Contents stay as they are or become one text, empty if there is none. Arguments of tool calls stay as they are or
    become objects or JSON strings.
    """
    contents: list[Callable[[Message], Message]] = [lambda message: message]
    if not all(isinstance(message.get("content"), str) for message in messages):
        contents.append(lambda message: {**message, "content": text_of(message)})
    arguments: list[Callable[[Any], Any]] = [lambda value: value]
    if any(True for message in messages for _ in _arguments(message)):
        arguments += [_as_object, _as_json]
    for argument in arguments:
        for content in contents:
            yield [_with_arguments(content(message), argument) for message in messages]


def is_joined(text: str, messages: list[Message]) -> bool:
    """Whether the text has what each list of parts says, joined without anything between them."""
    return all(text_of(each).strip() in text for each in messages if isinstance(each.get("content"), list))


def fault_of(text: str, messages: list[Message]) -> str | None:
    """What the template writes wrongly for these messages, None if it writes them correctly."""

    def writes(piece: str) -> bool:
        return text.count(piece) > sum(text_of(message).count(piece) for message in messages)

    for index, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list) and content:
            is_read = all(part.strip() in text for part in _parts(message))
            if not is_read or writes(str(content)) or writes(json.dumps(content, ensure_ascii=False)):
                return f"the list of parts of message {index} as it is, not their text"
        for value in _arguments(message):
            if isinstance(value, str) and any(writes(json.dumps(value, ensure_ascii=ascii)) for ascii in (True, False)):
                return f"the `arguments` of a tool call of message {index} as a string in a string"
            is_python = isinstance(value, Mapping | list) and str(value) != json.dumps(value, ensure_ascii=False)
            if is_python and writes(str(value)):
                return f"the `arguments` of a tool call of message {index} as Python, not as JSON"
    return None


def missing(message: Message, turn: str, is_last: bool) -> str | None:
    """The field of an assistant's message whose text its rendered turn lacks, None if it has all of it.

    White space at both ends does not matter. From a turn that the user answers the template may leave out the thoughts:
    what comes before `</think>`, and the reasoning fields.

    Args:
        is_last: no user message follows.
    """
    content = text_of(message)
    if not all(part.strip() in turn for part in _parts(message)):
        before, mark, answer = content.rpartition("</think>")
        thought = before.replace("<think>", "").strip()
        if not mark or answer.strip() not in turn or (is_last and thought not in turn):
            return "content"
    for field in _REASONING:
        reasoning = message.get(field)
        if is_last and isinstance(reasoning, str) and reasoning.strip() not in turn:
            return field
    for name in _called(message):
        if name not in turn:
            return "tool_calls"
    return None


def _calls(message: Message) -> Iterator[Any]:
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else []:
        if isinstance(call, Mapping):
            yield call.get("function", call)
    if "function_call" in message:
        yield message["function_call"]


def _called(message: Message) -> Iterator[str]:
    for call in _calls(message):
        if isinstance(call, Mapping) and isinstance(call.get("name"), str):
            yield call["name"]


def _arguments(message: Message) -> Iterator[Any]:
    for call in _calls(message):
        if isinstance(call, Mapping) and "arguments" in call:
            yield call["arguments"]


def _with_arguments(message: Message, change: Callable[[Any], Any]) -> Message:
    def changed(call: Any) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": changed(call["function"])}
        return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call

    found = dict(message)
    if isinstance(message.get("tool_calls"), list):
        found["tool_calls"] = [changed(call) for call in message["tool_calls"]]
    if "function_call" in message:
        found["function_call"] = changed(message["function_call"])
    return found


def _as_object(value: Any) -> Any:
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
    return found if isinstance(found, dict) else value


def _as_json(value: Any) -> Any:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
