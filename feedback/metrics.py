"""Figures of the running service for Prometheus, at /metrics."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from feedback import dashboard
from feedback.completions import Completion

log = logging.getLogger("thumbwheel")
router = APIRouter(tags=["health"])
# seconds: an opinion takes milliseconds, an answer seconds
SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """What is counted; one set for each application."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        where = ("method", "route")
        self.requests = Counter(
            "thumbwheel_requests", "Requests answered, by status", (*where, "status"), registry=registry
        )
        self.seconds = Histogram(
            "thumbwheel_request_seconds",
            "Seconds until a response was sent whole",
            where,
            registry=registry,
            buckets=SECONDS,
        )
        self.opinions = Counter(
            "thumbwheel_opinions",
            "Opinions committed: created, revised, or replayed (said before)",
            ("kind", "how"),
            registry=registry,
        )
        self.tokens = Counter("thumbwheel_tokens", "Tokens of whole answers", ("part",), registry=registry)

    def answered(self, completion: Completion) -> None:
        """Count a whole answer's tokens."""
        self.tokens.labels("prompt").inc(completion.prompt_tokens or len(completion.prompt_token_ids))
        self.tokens.labels("completion").inc(completion.completion_tokens or len(completion.response_token_ids))

    def watch(self, service: Any) -> None:
        """Gauges that look at the service when they are asked."""
        looks = {
            "thumbwheel_writes_waiting": ("Writes that wait for the database", service.writer.queue.qsize),
            "thumbwheel_answers_streaming": ("Streamed answers under way", lambda: len(service.tasks)),
            "thumbwheel_engine_ready": (
                "1 when a model answers, else 0",
                lambda: float(service.engine.model_hash is not None),
            ),
        }
        for name, (text, look) in looks.items():
            Gauge(name, text, registry=self.registry).set_function(look)
        self.registry.register(Held(service.store))


class Held(Collector):
    """What waits in the database, asked once for each look; nothing while it does not answer, and the log says so."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def describe(self) -> list[GaugeMetricFamily]:
        """The names, without asking the database."""
        return list(gauges(None))

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The figures."""
        try:
            with self.store.read() as connection:
                waiting = dashboard.waiting(connection)
        except SQLAlchemyError as problem:
            log.warning("what waits is not in the metrics: %s", problem)
            return
        yield from gauges(waiting)


def gauges(waiting: dashboard.Waiting | None) -> Iterator[GaugeMetricFamily]:
    """Gauges of what waits; ages are 0 where nothing does."""

    def age(since: datetime | None) -> float:
        return (datetime.now(UTC) - since).total_seconds() if since else 0.0

    rows = {
        "opinions_waiting": (f"Opinions that the next batch may take, up to {dashboard.MOST + 1}", "for_batch"),
        "opinions_waiting_age_seconds": ("Age of the oldest of them", "oldest"),
        "opinions_pending": ("Opinions that a moderator has not looked at", "pending"),
        "opinions_quarantined": ("Opinions in quarantine", "quarantined"),
        "batches_open": ("Batches that no training has learned from", "open_batches"),
        "batches_open_age_seconds": ("Age of the oldest of them", "oldest_open"),
    }
    for name, (text, field) in rows.items():
        value: Any = getattr(waiting, field) if waiting else None
        number = age(value) if field.startswith("oldest") else float(value or 0)
        yield GaugeMetricFamily(f"thumbwheel_{name}", text, value=number)


class Measured:
    """Counts and times every request, by the route that it took: never by its path, which strangers choose."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if route != "none" else "none"
            self.metrics.requests.labels(method, route, status).inc()
            self.metrics.seconds.labels(method, route).observe(time.perf_counter() - started)


@router.get("/metrics", response_class=Response)
async def get_metrics(request: Request) -> Response:
    """Prometheus reads this."""
    registry = request.app.state.service.metrics.registry
    text = await asyncio.to_thread(generate_latest, registry)  # it asks the database
    return Response(text, media_type=CONTENT_TYPE_LATEST)
