"""The feedback service: answers over HTTP with the reigning model, and keeps what people think of the answers.

    python -m feedback.service --host 127.0.0.1 --port 8000 --database-url URL --models-root DIR --threads 1

2xx means committed. It listens on loopback only: keys for strangers do not exist yet. Handlers stand in chat.py (answers),
votes.py (thumbs) and page.py (the chat page); this file holds them together.
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
from starlette.middleware.trustedhost import TrustedHostMiddleware

from feedback import chat, errors, page, votes
from feedback.champion import Crown
from feedback.engine import DecoderEngine, Engine
from feedback.identity import Identity, read_secret
from feedback.store import Store
from feedback.writer import Writer

LOOPBACK_NAMES = ["localhost", "127.0.0.1", "[::1]", "::1"]


@dataclass
class Service:
    """What the handlers share; stands at app.state.service."""

    store: Store
    writer: Writer
    engine: Engine
    crown: Crown
    identity: Identity
    keys: chat.KeyLocks = field(default_factory=chat.KeyLocks)
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)


def create_app(database_url: str, models_root: Path, engine: Engine, *, secret: bytes | None = None) -> FastAPI:
    """The application. secret: the signing key; without one it is read from, or made in, the folder above models_root.

    Starting it migrates the database; stopping it ends `engine`.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        identity = Identity(secret or read_secret(models_root.parent))
        store = Store(database_url)
        await asyncio.to_thread(store.migrate)
        writer = Writer(store)
        crown = Crown(store, engine, models_root)
        service = app.state.service = Service(store, writer, engine, crown, identity)
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

    app = FastAPI(title="thumbwheel", version="0.1.0", lifespan=lifespan, docs_url=None, redoc_url=None)
    # a page of another site must not reach us through a name that it makes point here
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK_NAMES)
    errors.install(app)
    app.include_router(chat.router)
    app.include_router(votes.router)
    app.include_router(page.router)
    add_health(app)
    return app


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


def check_loopback(host: str) -> None:
    """Raises ValueError for an address that others can reach."""
    try:
        inside = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        inside = False
    if not inside:
        raise ValueError(
            f"--host {host}: the feedback service has no keys yet, so whoever can reach it can speak as anybody. "
            "It listens on loopback only: use --host 127.0.0.1, and a tunnel (ssh -L) to reach it from elsewhere"
        )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m feedback.service", description="Answers, and keeps opinions.")
    parser.add_argument("--host", default="127.0.0.1", help="a loopback address")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--database-url", default="sqlite:///.thumbwheel/feedback.db")
    parser.add_argument("--models-root", type=Path, default=Path(".thumbwheel/models"), help="one folder a model")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads in the worker")
    parser.add_argument("--width", type=int, default=64, help="answers decoded side by side")
    args = parser.parse_args()
    try:
        check_loopback(args.host)
        Store(args.database_url).close()
    except ValueError as error:
        parser.error(str(error))
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    engine = DecoderEngine(threads=args.threads, width=args.width)
    app = create_app(args.database_url, args.models_root, engine)
    uvicorn.run(
        app,
        host=args.host,
        port=args.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=75,  # longer than clients keep a connection, so that none is closed under a request
    )


if __name__ == "__main__":
    main()
