"""Judges that a team brings: its own function, a reward model, or a language model behind a URL with the team's rubric.

Each is shown pairs of answers and says which is better; every pair is shown in both orders (pairwise.py).
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from flows.pairwise import Orders, Verdict

Kind = Literal["callable", "reward", "openai"]
Messages = list[dict[str, str]]
KEY = "THUMBWHEEL_JUDGE_KEY"


@dataclass(frozen=True)
class JudgeSpec:
    """One entry of `judge.judges` in params.yaml.

    kind: callable, target is `module:function` of your own code, taken as trusted; reward, target is a reward model's folder;
    openai, target is the address of a server of OpenAI's chat completions (…/v1), with `model` and `rubric`, a file with your
    criteria. prompts: so many of the judge's, 0 for all. The key is read from the environment (THUMBWHEEL_JUDGE_KEY).
    """

    name: str
    kind: Kind
    target: str
    model: str = ""
    rubric: str = ""
    prompts: int = 0
    timeout: float = 60.0
    retries: int = 2
    concurrency: int = 8
    max_tokens: int = 512

    def __post_init__(self) -> None:
        if not self.name or self.name == "words":
            raise ValueError("a judge needs a name; words is the built-in one's")
        if self.kind not in get_args(Kind):
            raise ValueError(f"judge {self.name}: kind is one of {', '.join(get_args(Kind))}, not {self.kind}")
        if self.kind == "callable" and self.target.count(":") != 1:
            raise ValueError(f"judge {self.name}: target is module:function, not {self.target}")
        if self.kind == "openai":
            address = urlsplit(self.target)
            if address.scheme not in ("http", "https") or not address.hostname or address.username or address.password:
                raise ValueError(
                    f"judge {self.name}: target is an address such as http://127.0.0.1:8000/v1, without a key"
                )
            if not self.model or not self.rubric:
                raise ValueError(f"judge {self.name}: a judge by URL needs model and rubric, a file with your criteria")
        if self.prompts < 0 or self.retries < 0 or min(self.concurrency, self.max_tokens) < 1 or self.timeout <= 0:
            raise ValueError(
                f"judge {self.name}: prompts, retries, timeout, concurrency and max_tokens count something"
            )


@dataclass(frozen=True)
class Pair:
    """What was asked, and two answers to it."""

    messages: Messages
    candidate: str
    other: str


@dataclass
class Tally:
    """What a judge said (one entry a pair), and what it cost."""

    orders: list[Orders]
    cost: dict[str, Any] = field(default_factory=dict)


def ask(spec: JudgeSpec, pairs: Sequence[Pair], root: Path, device: str = "cpu") -> Tally:
    """Have all pairs judged, in both orders. Raises ValueError or FileNotFoundError for a judge that cannot begin."""
    if spec.kind == "callable":
        return by_callable(spec, pairs, root)
    if spec.kind == "reward":
        return by_reward_model(spec, pairs, root, device)
    from flows.openai_judge import by_url

    return by_url(spec, pairs, root)


def by_callable(spec: JudgeSpec, pairs: Sequence[Pair], root: Path) -> Tally:
    """The team's function(messages, first, second) -> "first", "second" or "tie"; what it raises stops the stage."""
    function = load_callable(spec, root)

    def said(messages: Messages, first: str, second: str) -> Verdict:
        verdict = function([dict(m) for m in messages], first, second)
        if verdict not in get_args(Verdict):
            raise ValueError(
                f"judge {spec.name}: {spec.target} must return first, second or tie, it returned {verdict!r}"
            )
        found: Verdict = verdict
        return found

    orders = [Orders(said(p.messages, p.candidate, p.other), said(p.messages, p.other, p.candidate)) for p in pairs]
    return Tally(orders, {"calls": 2 * len(pairs)})


def load_callable(spec: JudgeSpec, root: Path) -> Callable[..., Any]:
    """The function that the target names, from the workspace's root or what is installed. Raises ValueError."""
    module, _, name = spec.target.partition(":")
    if str(root) not in sys.path:
        sys.path.append(str(root))
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"params.yaml: judge.judges: {spec.name}: {spec.target} cannot be imported: {error}"
        ) from error
    if not callable(function):
        raise ValueError(f"params.yaml: judge.judges: {spec.name}: {spec.target} is no function")
    found: Callable[..., Any] = function
    return found


def by_reward_model(spec: JudgeSpec, pairs: Sequence[Pair], root: Path, device: str) -> Tally:
    """The answer with the higher reward is the better one; it is read alone, so that no position can matter.

    A pair that does not fit the reward model's context gets no verdict.
    """
    from models.checkpoint import model_hash
    from models.reward import load_reward_model, score
    from models.tokenizer import Tokenizer

    folder = root / spec.target
    model, tokenizer = load_reward_model(folder, device), Tokenizer.load(folder)
    room = model.trunk.config.context_length
    prompts = [tokenizer.encode_chat(pair.messages) for pair in pairs]
    sides = [[[*tokenizer.encode(text), tokenizer.stop_id] for text in (p.candidate, p.other)] for p in pairs]
    fit = [
        i
        for i, (prompt, both) in enumerate(zip(prompts, sides, strict=True))
        if len(prompt) + max(map(len, both)) <= room
    ]
    asked = [prompts[i] for i in fit]
    rewards = [score(model, asked, [sides[i][side] for i in fit]) for side in (0, 1)] if fit else [[], []]
    orders = [Orders(None, None)] * len(pairs)
    for i, candidate, other in zip(fit, *rewards, strict=True):
        orders[i] = Orders(*(("tie", "tie") if candidate == other else _both(candidate > other)))
    return Tally(orders, {"calls": 2 * len(fit), "model_hash": model_hash(folder)})


def _both(candidate_wins: bool) -> tuple[Verdict, Verdict]:
    return ("first", "second") if candidate_wins else ("second", "first")


def read_rubric(spec: JudgeSpec, root: Path) -> tuple[str, str]:
    """(a rubric's text, its sha256). Raises ValueError for one that is empty, FileNotFoundError."""
    path = root / spec.rubric
    if not path.is_file():
        raise FileNotFoundError(f"params.yaml: judge.judges: {spec.name}: there is no rubric {spec.rubric}")
    text = path.read_text(encoding="utf-8").strip()
    if not text:
        raise ValueError(f"{spec.rubric} is empty: write down what makes an answer the better one")
    return text, hashlib.sha256(text.encode()).hexdigest()
