"""Chat templates of Hugging Face folders: a conversation to text, in jinja2's sandbox and by transformers' rules.

Those rules: blocks eat the line break behind and the blanks before them, `tojson` leaves HTML characters alone, and
templates may use raise_exception, strftime_now, break and continue, and {% generation %} around what the assistant says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Messages = Sequence[Mapping[str, str]]
# characters for private use: around what {% generation %} encloses, and where the tokenizer is to cut the text
BEGIN, CLOSE, BREAK = "\ue0f0", "\ue0f1", "\ue0f2"


class _Generation(Extension):
    """The block {% generation %} … {% endgeneration %}: its text between BEGIN and CLOSE."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{BEGIN}{caller()}{CLOSE}"


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """A compiled template with the special tokens that it may name (bos_token, eos_token, …).

    Raises ValueError for a template that is no jinja.
    """

    def __init__(self, source: str, specials: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {
            "raise_exception": _refuse,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is no jinja template: {error}") from error
        self.source, self.specials = source, dict(specials)

    def _render(self, messages: Messages, add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.specials,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """The conversation's text. Raises ValueError with the template's own words when it refuses."""
        return self._render(messages, add_generation_prompt).replace(BEGIN, "").replace(CLOSE, "")

    def render_with_starts(self, messages: Messages) -> tuple[str, list[int]]:
        """The conversation's text, and where in it what the assistant says begins, for each of its messages.

        With {% generation %} that is where the block begins; else where the text ends that asks for this answer.
        Raises ValueError when neither tells.
        """
        marked = self._render(messages, False)
        asked = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if BEGIN in marked:
            places = [i for i, character in enumerate(marked) if character == BEGIN]
            starts = [i - 2 * n for n, i in enumerate(places)]  # before the n-th BEGIN stand n pairs
        else:
            prefixes = [self.render(messages[:i], add_generation_prompt=True) for i in asked]
            starts = [len(prefix) for prefix in prefixes if marked.startswith(prefix)]
        if len(starts) != len(asked):
            raise ValueError(
                "the chat template does not tell which words are the assistant's: put {% generation %} and "
                "{% endgeneration %} around them in chat_template.jinja"
            )
        return marked.replace(BEGIN, "").replace(CLOSE, ""), starts
