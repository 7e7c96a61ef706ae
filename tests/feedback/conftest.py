"""A migrated store on both databases, and answers to have opinions about."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

from feedback import completions
from feedback.completions import Completion
from feedback.store import Store

Answer = Callable[..., str]


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    """An empty store on SQLite and on PostgreSQL."""
    store = Store(database_url)
    store.migrate()
    yield store
    store.close()


def make_answers(store: Store) -> Answer:
    """A function that writes a complete answer and returns its id."""
    counter = itertools.count()

    def answer(
        prompt: str = "hello",
        response: str = "hi",
        model_hash: str = "a" * 64,
        *,
        id: str = "",
        status: str = "complete",
    ) -> str:
        values = Completion(
            id=id or f"chatcmpl-test-{next(counter)}",
            subject="asker",
            request_sha256="0" * 64,
            request_messages=[{"role": "user", "content": prompt}],
            sampling={"temperature": 1.0},
            model_hash=model_hash,
            prompt_token_ids=[1, *prompt.encode()],
            response=response,
            response_token_ids=[*response.encode(), 2],
            response_logprobs=[-0.5] * (len(response) + 1),
            status=status,
            finish_reason="stop",
        )
        with store.write() as connection:
            completions.insert(connection, values)
        return values.id

    return answer


@pytest.fixture
def answer(store: Store) -> Answer:
    """Write an answer into `store`."""
    return make_answers(store)


@pytest.fixture
def answer_into() -> Callable[[Store], Answer]:
    """Write answers into a store of the test's own."""
    return make_answers
