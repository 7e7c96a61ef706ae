"""What comes in over HTTP, checked: OpenAI's chat request and a thumb. What we do not do is refused, never ignored."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

# NUL cannot be stored by PostgreSQL, half a surrogate pair not by anybody
UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def storable(text: str) -> str:
    """Raises ValueError when a text holds characters that no database keeps."""
    if UNSTORABLE.search(text):
        raise ValueError("NUL characters and lone surrogates cannot be stored; remove them")
    return text


Text = Annotated[str, AfterValidator(storable)]
Short = Annotated[str, Field(max_length=255), AfterValidator(storable)]
Code = Annotated[str, Field(pattern=r"^[a-z0-9_.-]{1,64}$")]


class TextPart(BaseModel):
    """A part of a message; other kinds (images, sound) are refused."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, Field(max_length=100_000)] | list[TextPart]
    name: Short | None = None

    def plain(self) -> dict[str, str]:
        """As the tokenizer reads it."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class StreamOptions(BaseModel):
    """OpenAI's stream_options."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(BaseModel):
    """POST /v1/chat/completions. Extensions of ours: conversation, parent (the answer that this one is another try of)."""

    model_config = ConfigDict(extra="forbid")
    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    model: Short | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=100_000)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=100_000)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Text | list[Text] | None = None
    user: Short | None = None
    metadata: dict[str, Any] | None = None
    conversation: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    parent: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    # accepted with the one value that says what we do anyway
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    store: bool | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None

    @field_validator("frequency_penalty", "presence_penalty", mode="before")
    @classmethod
    def whole(cls, value: Any) -> Any:
        """0.0 is 0."""
        return 0 if isinstance(value, float) and value == 0 else value

    @field_validator("stop")
    @classmethod
    def few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        """OpenAI's limit of four, none of them empty."""
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > 4 or any(not 1 <= len(stop) <= 1000 for stop in stops):
            raise ValueError("at most 4 stop strings of 1 to 1000 characters")
        return value

    @model_validator(mode="after")
    def last_is_not_the_assistant(self) -> ChatRequest:
        """An answer answers somebody."""
        if self.messages[-1].role == "assistant":
            raise ValueError("messages: the last message must not be the assistant's")
        return self

    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def limit(self) -> int | None:
        """The most tokens to answer with, if given."""
        return self.max_completion_tokens or self.max_tokens


class Thumb(BaseModel):
    """PUT /v1/feedback/{completion_id}/thumb. reasons are codes, never translated text."""

    model_config = ConfigDict(extra="forbid")
    value: Literal[-1, 0, 1]
    source: Literal["human_user", "human_expert", "simulated", "llm_judge"] = "human_user"
    reasons: Annotated[list[Code], Field(max_length=16)] = []
    comment: Annotated[Text, Field(max_length=10_000)] = ""
    channel: Code = "api"
    locale: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{0,16}$")] = ""
    user: Short | None = None
