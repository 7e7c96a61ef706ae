"""How long the dashboard takes with many opinions: fills an empty database, then looks at 7, 30, 90 and again 90 days.

python -m benchmarks.dashboard sqlite:////tmp/big.db [--opinions 1000000]
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

import sqlalchemy as sa

from feedback.dashboard import Dashboard
from feedback.store import Store
from feedback.tables import CompletionRow, EventRow, FeedbackRow, table_of

DAYS, MODELS, RATERS, CHUNK = 90, 12, 20_000, 20_000
Row = dict[str, Any]


def rows(opinions: int) -> Iterator[tuple[Row, Row]]:
    """Answers with one opinion each, evenly over DAYS days."""
    rng, start = random.Random(1), datetime.now(UTC) - timedelta(days=DAYS)
    ids = list(range(40))
    for n in range(opinions):
        at, took = start + timedelta(days=DAYS * n / opinions), rng.uniform(100, 3000)
        answer = {
            "id": f"chatcmpl-{n:032x}",
            "conversation": f"c{n}",
            "turn": 0,
            "subject": f"{rng.randrange(RATERS):032x}",
            "request_sha256": "0" * 64,
            "request_messages": [{"role": "user", "content": "How are you today?"}],
            "sampling": {"temperature": 1.0},
            "response": "Fine, thank you, and you?",
            "prompt_token_ids": ids,
            "response_token_ids": ids,
            "response_logprobs": ids,
            "prompt_tokens": 40,
            "completion_tokens": 40,
            "status": "error" if rng.random() < 0.01 else "complete",
            "model_hash": f"{n * MODELS // opinions:064x}",
            "model_alias": "champion",
            "first_token_ms": took / 10,
            "total_ms": took,
            "locale": "en",
            "created_at": at,
            "finished_at": at,
        }
        yield (
            answer,
            {
                "id": n + 1,
                "completion_id": answer["id"],
                "subject": answer["subject"],
                "kind": "thumb",
                "other": "",
                "value": 1 if rng.random() < 0.6 else -1,
                "strength": 1.0,
                "ranked": [],
                "reasons": [],
                "comment": "",
                "correction": "",
                "source": "human_user" if n % 3 else "simulated",
                "channel": "page",
                "locale": "en",
                "revision": 1,
                "retracted": n % 50 == 0,
                "trust": 1.0,
                "moderation": "accepted" if n % 1000 else "quarantined",
                "moderation_reason": "",
                "last_seq": n + 1,
                "created_at": at,
                "updated_at": at,
            },
        )


def fill(store: Store, opinions: int) -> None:
    """Write them, and the last event of their log."""
    source = rows(opinions)
    while chunk := list(islice(source, CHUNK)):
        with store.write() as connection:
            connection.execute(sa.insert(table_of(CompletionRow)), [answer for answer, _ in chunk])
            connection.execute(sa.insert(table_of(FeedbackRow)), [opinion for _, opinion in chunk])
    event = {
        "seq": opinions,
        "feedback_id": opinions,
        "subject": "x",
        "op": "create",
        "payload": {},
        "payload_sha256": "x",
    }
    with store.write() as connection:
        connection.execute(sa.insert(table_of(EventRow)), {**event, "created_at": datetime.now(UTC)})
    with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="How long the dashboard takes with many opinions.")
    parser.add_argument("url", help="of an empty database")
    parser.add_argument("--opinions", type=int, default=1_000_000)
    options = parser.parse_args()
    store = Store(options.url)
    store.migrate()
    fill(store, options.opinions)
    desk = Dashboard(store)
    for days in (7, 30, 90, 90):
        began = time.perf_counter()
        seen = desk.view(days, "all")
        print(f"{store.dialect}: {days} days, {seen.opinions:,} opinions: {time.perf_counter() - began:.3f} s")
    store.close()


if __name__ == "__main__":
    main()
