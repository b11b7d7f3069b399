"""A tokenizer's chat template: a conversation as text, and the stretches of it that the assistant says.

A template that asks for today's date gets `DATE`, so that the same conversation gives the same tokens every day. If the
template marks the assistant's turns with `{% generation %}`, the marks are used. Otherwise turns are found by prefixes:
turn i is what rendering the messages up to it adds to rendering those before it with the generation prompt, without
white space at its end. When more messages follow, a template may leave out the thought (`<think>`) of a turn and the
EOS that ended the conversation. One that writes earlier turns differently in any other way is refused. If the
generation prompt opens something that the turn lacks (`<think>`), the turn begins where the two differ.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from os.path import commonprefix
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ast_sparse.data.sources.text_files import shown
from ast_sparse.data.tokens.messages import Message, fault_of, is_joined, missing, text_of, with_more, written_forms
from ast_sparse.errors import UserError, one_line

DATE = datetime.datetime(2024, 7, 26)  # the date that Llama 3's templates fall back to

Spans = list[tuple[int, int]]  # of characters

_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
_THOUGHT = re.compile(r"\A\s*<think>.*?</think>\n*", re.DOTALL)
_EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\s*\Z")
_RANDOM = re.compile(r"\|\s*random\b|\blipsum\s*\(")
_DIRECTIVES = "aAbBcdDefFGhHIjmMprRSTuUVwWxXyYZz"
_TOOL_ROLES = {"tool", "function", "ipython", "observation", "tool_response"}  # templates rewrite what tools say
_PROBE = "qzxjprobe"
REFUSALS = (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


def template_text(tokenizer: PreTrainedTokenizerBase, tools: Any = None) -> str:
    """The template for these tools, with the date fixed.

    Raises:
        UserError: it uses random numbers.
    """
    text = tokenizer.get_chat_template(tools=tools)
    if _RANDOM.search(text):
        raise UserError(
            f"The chat template of `{tokenizer.name_or_path}` uses random numbers (`random` or `lipsum`), so tokens "
            "would differ from run to run. Remove that from its chat_template.jinja."
        )
    return _fixed_date() + text if "strftime_now" in text else text


@cache
def _fixed_date() -> str:
    """A macro that hides `strftime_now`: functions cannot be passed to a template."""
    pairs = [("%" + flag + key, DATE.strftime("%" + key)) for key in _DIRECTIVES for flag in ("-", "#", "")]
    pairs = [(key, value.lstrip("0") or "0" if key[1] in "-#" else value) for key, value in pairs]
    replaced = "".join(f" | replace({key!r}, {value!r})" for key, value in [*pairs, ("%%", "%")])
    return "{% macro strftime_now(format) %}{{ format" + replaced + " }}{% endmacro %}\n"


@dataclass(kw_only=True)
class Chat:
    """How one row is rendered: its tools and its template settings.

    Attributes:
        where: the row, for messages.
        settings: further template variables, `chat_template_kwargs`.
    """

    tokenizer: PreTrainedTokenizerBase
    where: str
    tools: Any = None
    settings: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def template(self) -> str:
        return template_text(self.tokenizer, self.tools)

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        return self._rendered(messages, add_generation_prompt, False)[0]

    def _rendered(self, messages: list[Message], add_generation_prompt: bool, with_marks: bool) -> tuple[str, Spans]:
        rendered: Any = render_jinja_template(
            conversations=[messages],
            tools=self.tools,
            chat_template=self.template,
            return_assistant_tokens_mask=with_marks,
            add_generation_prompt=add_generation_prompt,
            **{**self.tokenizer.special_tokens_map, **self.settings},
        )
        texts, marks = rendered
        return texts[0], list(marks[0]) if with_marks else []

    def settle(self, messages: list[Message]) -> list[Message]:
        """The messages in the form that the template writes correctly."""
        errors: list[Exception] = []
        others = []
        for form in written_forms(messages):
            try:
                text = self.render(form)
                fault = fault_of(text, form)
            except REFUSALS as error:
                errors.append(error)
                continue
            if fault:
                way = "Give text that it can write, or leave the row out."
                errors.append(UserError(f"{self.where}: the chat template writes {fault}. {way}"))
            elif is_joined(text, messages):
                return form
            else:
                others.append(form)
        if others:
            return others[0]
        raise errors[0]

    def check_read(self, text: str, messages: list[Message]) -> None:
        """Raise UserError if the template drops what the user or the system says."""
        for index, message in enumerate(messages):
            said = text_of(message).strip()
            if message["role"] in ("assistant", *_TOOL_ROLES) or said in text:
                continue
            probe = with_more(message, f" {_PROBE}")
            try:
                is_read = _PROBE in self.render([*messages[:index], probe, *messages[index + 1 :]]).lower()
            except REFUSALS:
                is_read = True
            if not is_read:
                raise UserError(
                    f"{self.where}: the chat template drops what message {index} says, of role "
                    f"{shown(message['role'])}. Give it a role that the template knows, or leave the row out."
                )

    def turns(self, messages: list[Message], counted: Sequence[bool]) -> tuple[str, Spans]:
        """The conversation as text, and the stretches that are counted."""
        if _GENERATION.search(self.template):
            return self._marked(messages, counted)
        text, spans = self.render(messages), []
        for index in (index for index, is_counted in enumerate(counted) if is_counted):
            if not index:
                raise UserError(
                    f"{self.where}: the conversation begins with the assistant. Put what it answers before it."
                )
            turn = self.render(messages[: index + 1])
            begin, end = self._stretch(text, turn, self._begin(turn, messages, index))
            spans.append((begin, end))
            self.check_said(messages, index, text[begin:end])
        return text, spans

    def _stretch(self, text: str, turn: str, begin: int) -> tuple[int, int]:
        """Where a turn that begins at `begin` is in the whole text, which may leave out its thought."""
        if not text.startswith(turn):
            begin = len(_EMPTY_THOUGHT.sub("", turn[:begin]))  # the generation prompt may have one
            turn = turn[:begin] + _THOUGHT.sub("", turn[begin:]).rstrip()
            ended = turn.removesuffix(self.tokenizer.eos_token or "").rstrip()
            if ended.endswith(tuple(self.tokenizer.added_tokens_encoder)) and not text.startswith(turn):
                turn = ended  # the turn has its own end token before the EOS
            self._check_prefix(text, turn)
        return begin, len(turn.rstrip())

    def _begin(self, turn: str, messages: list[Message], index: int) -> int:
        """The index of the character at which the assistant's words begin in its turn."""
        prompt = self.render(messages[:index], add_generation_prompt=True)
        if turn.startswith(prompt):
            return len(prompt)
        before = self.render(messages[:index])
        self._check_prefix(turn, before)
        # the assistant's words may begin like what the prompt opens (`<tool_call>`, `<think>`); the probe does not
        other = self.render([*messages[:index], {"role": "assistant", "content": _PROBE}])
        begin = len(commonprefix([prompt, turn, other]).rstrip("<"))  # noqa: RUF071 - `<think>` is not half `</think>`
        said = text_of(messages[index]).strip()
        if begin > len(before) or (said and turn[begin:].lstrip().startswith(said)):
            return begin
        raise UserError(
            f"{self.where}: the chat template's generation prompt ends in {shown(prompt[-40:])}, and the assistant's "
            "turn does not begin with it, so where it begins cannot be found. Mark the turns with {% generation %} in "
            "the template, or give `prompt` and `completion` as text."
        )

    def completion(
        self, prompt: list[Message], completion: list[Message], counted: Sequence[bool]
    ) -> tuple[str, Spans]:
        """The same for a prompt and its completion, all of which is counted."""
        messages = prompt + completion
        text = self.render(messages)
        begin = self._begin(text, messages, len(prompt))
        spoken = [
            is_counted
            for is_counted, message in zip(counted, completion, strict=True)
            if message["role"] == "assistant"
        ]
        if spoken and not any(spoken):
            return text, []
        if not all(spoken):
            raise UserError(
                f"{self.where}: some messages of `completion` have weight 0 and some do not. Give `messages`, or "
                "one message as `completion`."
            )
        for index, message in enumerate(messages):
            if index >= len(prompt) and message["role"] == "assistant":
                self.check_said(messages, index, text[begin:])
        return text, [(begin, len(text.rstrip()))]

    def _marked(self, messages: list[Message], counted: Sequence[bool]) -> tuple[str, Spans]:
        text, spans = self._rendered(messages, False, True)
        assistants = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        said = "\n".join(text[begin:end] for begin, end in spans) if len(spans) >= len(assistants) else text
        for index in assistants:
            if counted[index] and spans:
                self.check_said(messages, index, text)
                if missing(messages[index], said, self._is_last(messages, index)):
                    raise UserError(
                        f"{self.where}: what the {{% generation %}} marks of the chat template enclose is not what the "
                        f"assistant says in message {index}. Marks inside a macro are misplaced: move them out of it."
                    )
        if all(counted[index] for index in assistants):
            return text, spans
        # the spans of a message are those that it adds to the messages before it
        before = [self._rendered(messages[:index], False, True)[1] if index else [] for index in range(len(messages))]
        ends = [*map(len, before), len(spans)]
        others = [index for index in range(len(messages)) if index not in assistants]
        if any(part != spans[: len(part)] for part in before) or any(ends[at] != ends[at + 1] for at in others):
            raise UserError(
                f"{self.where}: the chat template marks earlier turns differently when more follow, so `weight` cannot "
                "be kept. Leave the row out."
            )
        return text, [span for index in assistants if counted[index] for span in spans[ends[index] : ends[index + 1]]]

    def check_said(self, messages: list[Message], index: int, turn: str) -> None:
        """Raise UserError unless the turn has what the assistant says."""
        if lost := missing(messages[index], turn, self._is_last(messages, index)):
            raise UserError(
                f"{self.where}: the chat template drops or rewrites `{lost}` of message {index}, which the assistant "
                "says. Use a template that writes it, or leave the row out."
            )

    @staticmethod
    def _is_last(messages: list[Message], index: int) -> bool:
        """Whether no user message follows."""
        return not any(message["role"] == "user" for message in messages[index + 1 :])

    def _check_prefix(self, text: str, before: str) -> None:
        if not text.startswith(before):
            raise UserError(
                f"{self.where}: the chat template writes earlier turns differently when more follow, so what the "
                "assistant says cannot be found. Mark its turns with {% generation %} in the template, or give "
                "`prompt` and `completion` as text."
            )


def refusal(where: str, error: BaseException) -> UserError:
    """A template's error in one line."""
    reason = one_line(error, 300, end="stop")
    if isinstance(error, TemplateSyntaxError):
        return UserError(f"{where}: the chat template cannot be read: {reason} Correct chat_template.jinja.")
    return UserError(f"{where}: the chat template refuses it: {reason} Leave the row out.")
