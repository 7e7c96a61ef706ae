"""The screen: what people write and ask goes through it before anything learns from it.

It is the data gate for rows that did not come from data/: the rules of curate and validate, and the held-out prompts. The
stages written and snapshot use it; what it refuses stands in their quarantine.jsonl with the reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from feedback.written import Rules
from flows.curate import CurateOptions, Kind, Messages, dump, key, messages_of
from flows.tokenize import read_rows
from flows.validate import ValidateOptions
from models.job import Job

FIGURES = ("prompts.report", "prompts.tune", "sft.heldout")  # files of artifacts/curate that nothing may learn from


class Screen:
    """What passes: conversations by the rules of curate and validate, and prompts on which no figure is taken."""

    def __init__(self, curated: Path, curate: CurateOptions, validate: ValidateOptions) -> None:
        """curated: artifacts/curate, whose held-out files name the prompts."""
        self.validate = validate
        self.split = Kind("prompts", curate)
        self.known = {
            key(text) for name in FIGURES for row in read_rows(curated / f"{name}.jsonl") for text in asked(row)
        }

    def clean(self, messages: Messages) -> Messages:
        """The messages, normalised as curate does. Raises ValueError that says what is wrong with them."""
        clean = messages_of(messages, messages[-1]["role"])
        least, most = self.validate.min_chars, self.validate.max_chars_message
        for n, message in enumerate(clean, 1):
            if not least <= len(message["content"]) <= most:
                raise ValueError(f"message {n} has {len(message['content'])} characters, not {least} to {most}")
        return clean

    def held(self, messages: Messages) -> bool:
        """Whether a prompt falls into a share of the fixed hash that curate keeps for figures, or asks what is asked there."""
        try:
            prompt = self.clean(messages)
        except ValueError:
            return True
        return self.split.side(dump(prompt)) != "train" or any(key(text) in self.known for text in asked(prompt))


def asked(row: Any) -> list[str]:
    """What the user says in a row or in messages."""
    messages = row["messages"] if isinstance(row, dict) else row
    return [message["content"] for message in messages if message["role"] == "user"]


def rules(job: Job) -> Rules:
    """The rules of a stage that declares artifacts/curate and the sections curate and validate."""
    curate, validate = job.options("curate", CurateOptions), job.options("validate", ValidateOptions)
    screen = Screen(job.input("artifacts/curate"), curate, validate)
    return Rules(screen.clean, screen.held)
