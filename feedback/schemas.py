"""What comes in over HTTP, checked: OpenAI's chat request and opinions. What we do not do is refused, never ignored."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, field_validator, model_validator

from feedback.comparisons import compared, ranked

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
Channel = Annotated[str, Field(pattern=r"^[a-z0-9_.-]{1,16}$")]
Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


def sensible_time(moment: datetime) -> datetime:
    """Raises ValueError for a moment that no clock of a client shows; the first and last of a calendar have no UTC."""
    if not 2000 <= moment.year < 2200:
        raise ValueError("a time between the years 2000 and 2200 is expected")
    return moment


Moment = Annotated[AwareDatetime, AfterValidator(sensible_time)]
Source = Literal["human_user", "human_expert", "simulated", "llm_judge"]


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
    logprobs: bool | None = None
    top_logprobs: int | None = None
    user: Short | None = None
    metadata: dict[str, Any] | None = None
    conversation: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    parent: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    # accepted with the one value that says what we do anyway
    n: Literal[1] | None = None
    store: bool | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None

    @field_validator("frequency_penalty", "presence_penalty", mode="before")
    @classmethod
    def whole(cls, value: Any) -> Any:
        """0.0 is 0."""
        return 0 if isinstance(value, float) and value == 0 else value

    @field_validator("top_logprobs")
    @classmethod
    def chosen_only(cls, value: int | None) -> int | None:
        """We tell how likely the chosen token was, not the others."""
        if value:
            raise ValueError("must be 0: only the log-probability of the chosen token is told (logprobs: true)")
        return value

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


class Said(BaseModel):
    """What opinions of all kinds may say. reasons are codes, never translated text; client_time: when it was said there."""

    model_config = ConfigDict(extra="forbid")
    source: Source = "human_user"
    reasons: Annotated[list[Code], Field(max_length=16)] = []
    comment: Annotated[Text, Field(max_length=10_000)] = ""
    channel: Channel = "api"
    locale: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{0,16}$")] = ""
    user: Short | None = None
    client_time: Moment | None = None

    def stated(self) -> dict[str, Any]:
        """The fields of a Vote."""
        return self.model_dump(exclude={"user"})

    def body(self) -> dict[str, Any]:
        """What two deliveries of one request must have in common."""
        return self.model_dump(mode="json", exclude={"client_time"} if self.client_time is None else None)


class Thumb(Said):
    """1: good, -1: bad, 0: neither."""

    value: Literal[-1, 0, 1]


class Edit(Said):
    """A better answer of one's own."""

    correction: Annotated[Text, Field(min_length=1, max_length=20_000)]

    def stated(self) -> dict[str, Any]:
        """The correction is the better one."""
        return {**super().stated(), "value": 1}


class Comment(Said):
    """Words alone: nothing is learned from them."""

    comment: Annotated[Text, Field(min_length=1, max_length=10_000)]


class Expert(Said):
    """The judgement of somebody who knows the subject: models are measured by it, none learns from it."""

    value: Literal[-1, 0, 1]
    source: Literal["human_expert"] = "human_expert"
    correction: Annotated[Text, Field(max_length=20_000)] = ""


class ThumbOf(Thumb):
    """A thumb, for POST /v1/feedback."""

    kind: Literal["thumb"]
    completion_id: Id


class EditOf(Edit):
    """A better answer, for POST /v1/feedback."""

    kind: Literal["edit"]
    completion_id: Id


class CommentOf(Comment):
    """A comment, for POST /v1/feedback."""

    kind: Literal["comment"]
    completion_id: Id


class ExpertOf(Expert):
    """An expert's judgement, for POST /v1/feedback."""

    kind: Literal["expert"]
    completion_id: Id


Opinion = Annotated[ThumbOf | EditOf | CommentOf | ExpertOf, Field(discriminator="kind")]


class Comparison(Said):
    """POST /v1/comparisons. completion_ids in the order in which they were shown; chosen: the better one, null for a tie.

    strength: 1 is as usual, 2 says twice as clearly.
    """

    completion_ids: Annotated[list[Id], Field(min_length=2, max_length=2)]
    chosen: Id | None
    strength: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] = 1.0

    @model_validator(mode="after")
    def sensible(self) -> Comparison:
        """Two answers, and one of them chosen."""
        distinct(self.completion_ids)
        compared(self.completion_ids, self.chosen)
        return self

    def stated(self) -> dict[str, Any]:
        """The fields of a Vote."""
        said = self.model_dump(exclude={"user", "completion_ids", "chosen"})
        return {**said, **compared(self.completion_ids, self.chosen)}


class Ranking(Said):
    """POST /v1/rankings. completion_ids in the order in which they were shown; ranking: groups of equal ones, best first."""

    completion_ids: Annotated[list[Id], Field(min_length=2, max_length=9)]
    ranking: Annotated[list[Annotated[list[Id], Field(min_length=1)]], Field(min_length=1, max_length=9)]

    @model_validator(mode="after")
    def sensible(self) -> Ranking:
        """Each answer in one group."""
        distinct(self.completion_ids)
        ranked(self.completion_ids, self.ranking)
        return self

    def stated(self) -> dict[str, Any]:
        """The fields of a Vote."""
        said = self.model_dump(exclude={"user", "completion_ids", "ranking"})
        return {**said, **ranked(self.completion_ids, self.ranking)}


class NewTask(BaseModel):
    """POST /v1/tasks: answers that people are to rank.

    completion_ids: answers that are there; answers: so many more are asked of the model that serves, of the prompt `messages`,
    or of the one that was asked in the answer `of` (then they are kept as that person's, and go when theirs go). ranking: the
    right order of completion_ids, best first, which makes it a gold task. raters: how many people are to rank it.
    """

    model_config = ConfigDict(extra="forbid")
    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)] | None = None
    of: Id | None = None
    completion_ids: Annotated[list[Id], Field(max_length=9)] = []
    answers: Annotated[int, Field(ge=0, le=9)] = 0
    raters: Annotated[int, Field(ge=1, le=100)] = 1
    ranking: Annotated[list[Annotated[list[Id], Field(min_length=1)]], Field(min_length=2, max_length=9)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    max_tokens: Annotated[int, Field(ge=1, le=100_000)] | None = None
    user: Short | None = None

    @model_validator(mode="after")
    def sensible(self) -> NewTask:
        """2 to 9 answers, of one prompt, and a ranking only of answers that are there."""
        distinct(self.completion_ids)
        if not 2 <= len(self.completion_ids) + self.answers <= 9:
            raise ValueError("completion_ids and answers: 2 to 9 answers together are ranked")
        if self.answers and (self.messages is None) == (self.of is None):
            raise ValueError("answers: give the prompt as messages, or as `of` an answer to it")
        if not self.answers and (self.messages or self.of):
            raise ValueError("messages and of: only where answers are asked for; completion_ids have their prompt")
        if self.ranking is not None:
            if self.answers:
                raise ValueError("ranking: only of completion_ids, not of answers that are not there yet")
            ranked(self.completion_ids, self.ranking)
        return self


class TaskRanking(Said):
    """POST /v1/tasks/{id}/ranking: the answers' numbers, best first, equal ones in a group."""

    ranking: Annotated[list[Annotated[list[int], Field(min_length=1, max_length=9)]], Field(min_length=1, max_length=9)]

    def stated(self) -> dict[str, Any]:
        """The fields of a Vote, but for the answers."""
        return self.model_dump(exclude={"user", "ranking"})


class Skip(BaseModel):
    """POST /v1/tasks/{id}/skip."""

    model_config = ConfigDict(extra="forbid")
    reason: Annotated[Text, Field(max_length=1000)] = ""
    user: Short | None = None


def distinct(ids: list[str]) -> None:
    """Raises ValueError when an answer is named twice."""
    if len(set(ids)) < len(ids):
        raise ValueError("completion_ids: an answer cannot be compared with itself")
