"""How the questions of tasks are put to a model: as plain text, or through the chat template of its tokenizer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ast_sparse.errors import UserError, one_line

_PROBE = "instruction7"
_DEFAULT = "default"  # what transformers calls the template that is used if none is named


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """The options of the LM Evaluation Harness of the same names.

    Attributes:
        apply_chat_template: whether questions go through the chat template of the tokenizer; its name, if the
            tokenizer has several.
        fewshot_as_multiturn: whether examples are turns of the conversation; None: if there is a chat template. False:
            they are part of the question.
        system_instruction: goes before each question, before what the task itself says; with a chat template it is
            the system message.

    Raises:
        UserError: turns without a chat template, or an empty name or instruction.
    """

    apply_chat_template: bool | str = False
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None

    def __post_init__(self) -> None:
        if self.fewshot_as_multiturn and self.apply_chat_template is False:
            raise UserError(
                "--fewshot-as-multiturn needs --apply-chat-template: examples are turns only in a conversation. Add "
                "it, or leave out --fewshot-as-multiturn."
            )
        if self.apply_chat_template == "":
            raise UserError("--apply-chat-template has an empty name. Name a template, or leave the name out.")
        if self.system_instruction is not None and not self.system_instruction.strip():
            raise UserError("--system-instruction has no text. Fill or remove it.")

    @property
    def multiturn(self) -> bool:
        """Whether examples are turns."""
        return self.apply_chat_template is not False and self.fewshot_as_multiturn is not False

    @property
    def name(self) -> str | None:
        """The name of the template; None without one."""
        if isinstance(self.apply_chat_template, str):
            return self.apply_chat_template
        return _DEFAULT if self.apply_chat_template else None

    def template(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """The chat template that is applied; None without one.

        Raises:
            UserError: the tokenizer does not have it, or it refuses a system message that was asked for.
        """
        if self.name is None:
            return None
        own: Any = tokenizer.chat_template
        templates = own if isinstance(own, dict) else {} if own is None else {_DEFAULT: own}
        if not templates:
            raise UserError(
                "--apply-chat-template: the tokenizer has no chat template. Leave the option out, or name a "
                "--tokenizer that has one."
            )
        if self.name not in templates:
            given = f" {self.name}" if isinstance(self.apply_chat_template, str) else ""
            raise UserError(
                f"--apply-chat-template{given}: the tokenizer has no such chat template, only {', '.join(templates)}. "
                "Name one of them; if this is a MODEL, name models before the option."
            )
        template = str(templates[self.name])
        if self.system_instruction is not None and (fault := self.drops_system(tokenizer, template)):
            raise UserError(
                f"--system-instruction: the chat template {fault}. Leave the option out, or put the text into the "
                "questions of the task."
            )
        return template

    @staticmethod
    def drops_system(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
        """How the template fails to show a system message, which the harness then leaves out; None if it shows it."""
        messages = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "?"}]
        try:
            text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except Exception as error:  # whatever the code of a template raises
            return f"takes no system message ({one_line(error, end='open')})"
        return None if _PROBE in str(text) else "leaves system messages out"

    def described(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """The format in words, for tables; different prompts get different words. None for plain text."""
        parts = []
        if (template := self.template(tokenizer)) is not None:
            parts.append(f"chat template {self.name} ({hashlib.sha256(template.encode()).hexdigest()[:8]})")
            parts += [] if self.multiturn else ["few-shot in one turn"]
        if self.system_instruction is not None:
            digest = hashlib.sha256(self.system_instruction.encode()).hexdigest()[:8]
            parts.append(f"system instruction ({digest})")
        return ", ".join(parts) or None
