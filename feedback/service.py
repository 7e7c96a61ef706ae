"""The feedback service: answers over HTTP with the reigning model, and keeps what people think of the answers.

    python -m feedback.service --host 127.0.0.1 --port 8000 --database-url URL --models-root DIR --threads 1

2xx means committed. On loopback it asks nobody for a key; elsewhere it does, and does not start before there is one
(access.py, settings.py). Handlers stand in chat.py (answers), votes.py (thumbs), moderation.py, page.py (what all pages
share), chat_page.py, you_page.py and signin.py; this file holds them together.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from feedback import (
    chat,
    chat_page,
    dashboard_page,
    downloads,
    errors,
    keys,
    label_page,
    moderation,
    moderation_page,
    page,
    signin,
    tasks,
    votes,
    you_page,
)
from feedback.access import CSRF, TOKEN, Guard
from feedback.champion import Crown, Defaults
from feedback.dashboard import Dashboard
from feedback.engine import DecoderEngine, Engine
from feedback.guideline import guideline
from feedback.identity import Identity, read_secret
from feedback.metrics import Measured, Metrics
from feedback.metrics import router as measured
from feedback.remote import RemoteCrown, RemoteEngine
from feedback.settings import Settings
from feedback.store import Store
from feedback.writer import Writer

LOOPBACK_NAMES = ["localhost", "127.0.0.1", "[::1]", "::1"]


@dataclass
class Service:
    """What the handlers share; stands at app.state.service."""

    store: Store
    writer: Writer
    engine: Engine
    crown: Crown | RemoteCrown
    identity: Identity
    settings: Settings
    metrics: Metrics
    dashboard: Dashboard
    keys: chat.KeyLocks = field(default_factory=chat.KeyLocks)
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)


def create_app(
    database_url: str,
    models_root: Path,
    engine: Engine,
    *,
    secret: bytes | None = None,
    settings: Settings | None = None,
    keys_needed: bool = False,
) -> FastAPI:
    """The application. secret: the signing key; without one it is read from, or made in, the folder above models_root.
    settings: without them the environment's. keys_needed: others than this machine can reach it.

    Starting it migrates the database; stopping it ends `engine`.
    """

    chosen, metrics = settings or Settings(), Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        identity = Identity(secret or read_secret(models_root.parent))
        store = Store(database_url)
        await asyncio.to_thread(store.migrate)
        writer = Writer(store)
        crown: Crown | RemoteCrown
        if isinstance(engine, RemoteEngine):
            crown = RemoteCrown(engine, Defaults(max_tokens=chosen.engine_max_tokens))
        else:
            crown = Crown(store, engine, models_root)
        service = app.state.service = Service(store, writer, engine, crown, identity, chosen, metrics, Dashboard(store))
        metrics.watch(service)
        follower = asyncio.create_task(crown.follow())
        try:
            yield
        finally:
            for task in (follower, *service.tasks):
                task.cancel()
            await asyncio.gather(follower, *service.tasks, return_exceptions=True)
            await engine.close()
            await asyncio.to_thread(writer.close)
            store.close()

    app = FastAPI(
        title="thumbwheel",
        version="0.1.0",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=errors.RESPONSES,
    )
    app.add_middleware(Guard, state=app.state, settings=chosen, keys_needed=keys_needed)
    add_outer_guards(app, chosen, keys_needed)
    app.add_middleware(Measured, metrics=metrics)  # outside of all others: what they refuse is counted too
    errors.install(app)
    app.include_router(chat.router)
    app.include_router(votes.router)
    app.include_router(downloads.router)
    app.include_router(moderation.router)
    app.include_router(tasks.router)
    app.include_router(measured)
    app.include_router(page.router)
    app.include_router(chat_page.router)
    app.include_router(label_page.router)
    app.include_router(you_page.router)
    app.include_router(moderation_page.router)
    app.include_router(dashboard_page.router)
    app.include_router(signin.router)
    add_health(app)
    return app


def add_outer_guards(app: FastAPI, settings: Settings, keys_needed: bool) -> None:
    """Which names we answer to, and which other sites' scripts may call us: with a key or token, never with a cookie."""
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", TOKEN, CSRF],
            expose_headers=["X-Thumbwheel-Model", TOKEN, "X-Request-Id", "Idempotent-Replayed", "Retry-After"],
        )
    # a page of another site must not reach us through a name that it makes point here; where every caller brings a key
    # that page has none, so without a list any name will do
    if settings.public_names or not keys_needed:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK_NAMES, *settings.public_names])


def add_health(app: FastAPI) -> None:
    """GET /healthz: the database answers. GET /readyz: a champion is loaded."""

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        try:
            await asyncio.to_thread(app.state.service.store.ping)
        except SQLAlchemyError as problem:
            return errors.error(503, "database_unavailable", str(problem).splitlines()[0])
        return JSONResponse({"status": "ok"})

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        service: Service = app.state.service
        if service.engine.model_hash is None:
            return errors.error(503, "not_ready", service.crown.problem)
        return JSONResponse({"status": "ok", "model_hash": service.engine.model_hash})


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address to listen on. A name but localhost counts as reachable."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_keys(store: Store, why: str) -> None:
    """Migrates, and raises ValueError when no key works."""
    store.migrate()
    with store.read() as connection:
        if not keys.any_works(connection):
            raise ValueError(
                f"{why}, and no API key works in this database, so nobody could use it. Make one with "
                "`thumbwheel key create --scope chat --scope rate NAME`, or listen on loopback (--host 127.0.0.1) and use "
                "a tunnel (ssh -L) to reach it from elsewhere"
            )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m feedback.service", description="Answers, and keeps opinions.")
    parser.add_argument("--host", default="127.0.0.1", help="beyond loopback every caller needs a key")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--database-url", default="sqlite:///.thumbwheel/feedback.db")
    parser.add_argument("--models-root", type=Path, default=Path(".thumbwheel/models"), help="one folder a model")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads in the worker")
    parser.add_argument("--width", type=int, default=64, help="answers decoded side by side")
    args = parser.parse_args()
    needed = not is_loopback(args.host)
    try:
        settings = Settings()
        if settings.guideline is not None:
            guideline(settings.guideline, "en")
        store = Store(args.database_url)
        if needed or settings.require_keys or settings.public_names:
            check_keys(store, f"--host {args.host}: others can reach it" if needed else "keys are asked for")
        store.close()
        engine: Engine = RemoteEngine(settings) if settings.engine_url else DecoderEngine(args.threads, args.width)
    except ValueError as error:
        parser.error(str(error))
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    app = create_app(args.database_url, args.models_root, engine, settings=settings, keys_needed=needed)
    if needed and not settings.public_names:
        logging.getLogger("thumbwheel").warning("answering to any host name; THUMBWHEEL_PUBLIC_NAMES lists those meant")
    uvicorn.run(
        app,
        host=args.host,
        port=args.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=5,
        # uvicorn would believe X-Forwarded-For from loopback by default, and so any program on this machine
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=list(settings.trusted_proxies),
        timeout_keep_alive=75,  # longer than clients keep a connection, so that none is closed under a request
    )


if __name__ == "__main__":
    main()
