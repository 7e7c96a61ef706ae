"""A migrated store on both databases, answers to have opinions about, and a real service with a real tiny model."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from parrot import ParrotServer

from feedback import completions, keys
from feedback.completions import Completion
from feedback.engine import DecoderEngine
from feedback.service import create_app
from feedback.store import Store

Answer = Callable[..., str]
LAUNCH = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


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


@pytest.fixture
def api(store: Store, database_url: str, tmp_path: Path) -> Iterator[TestClient]:
    """The service in this process on `store`'s database, for what needs no model to answer."""
    app = create_app(database_url, tmp_path / "models", DecoderEngine(), secret=b"a key for the tests")
    with TestClient(app, base_url="http://localhost") as client:
        yield client


def make_model(models: Path, seed: int) -> str:
    """Write a tiny model with random weights to models/<hash>; returns the hash."""
    import torch

    from models.checkpoint import model_hash, save_model
    from models.config import ModelConfig
    from models.tokenizer import Tokenizer
    from models.transformer import Transformer

    torch.manual_seed(seed)
    tokenizer = Tokenizer.train(["hello there, how are you?", "I am fine, thank you.", "你好"] * 20, 300)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=96,
    )
    model = Transformer(config)
    with torch.no_grad():
        model.embedding.weight.mul_(0.1)  # tied to the output: at full size the model says one token for ever
    folder = models / f"draft-{seed}"
    save_model(model, folder, tokenizer)
    name = model_hash(folder)
    folder.rename(models / name)
    return name


@pytest.fixture(scope="session")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """(folder with one folder a model, the hashes of two random tiny models)."""
    root = tmp_path_factory.mktemp("workspace") / "models"
    root.mkdir()
    return root, make_model(root, 1), make_model(root, 2)


class Server:
    """A real service in a process of its own, and a client of it."""

    def __init__(self, database_url: str, models: Path, env: dict[str, str] | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.models = models
        command = [sys.executable, "-m", "feedback.service", "--port", str(port), "--database-url", database_url]
        command += ["--models-root", str(models), "--width", "8"]
        self.process = subprocess.Popen(command, env={**os.environ, **(env or {})})
        self.client = httpx.Client(base_url=self.url, timeout=60)
        self.store = Store(database_url)
        self.wait_for("/healthz")

    def wait_for(self, path: str, model_hash: str | None = None) -> None:
        """Until `path` answers 200 (with that model, if given)."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "the service ended"
            try:
                response = self.client.get(path)
                if response.status_code == 200 and model_hash in (None, response.json().get("model_hash")):
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise TimeoutError(f"{self.url}{path} did not become ready")

    def crown(self, model_hash: str) -> None:
        """Promote a model, and wait until the service answers with it."""
        reigning = self.store.champion()
        self.store.promote(
            model_hash=model_hash,
            model_path=str(self.models / model_hash),
            figures={},
            reason="a test",
            expected_champion=reigning.model_hash if reigning else None,
        )
        self.wait_for("/readyz", model_hash)

    def chat(self, text: str = "hello", headers: dict[str, str] | None = None, **body: object) -> httpx.Response:
        """POST /v1/chat/completions."""
        messages = [{"role": "user", "content": text}]
        return self.client.post("/v1/chat/completions", json={"messages": messages, **body}, headers=headers)

    def close(self) -> None:
        """End it."""
        self.client.close()
        self.store.close()
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="session")
def serve() -> type[Server]:
    """To start a service of the test's own; close it."""
    return Server


@pytest.fixture(scope="module")
def server(two_models: tuple[Path, str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service on SQLite that answers with the first model."""
    models, first, _ = two_models
    server = Server(f"sqlite:///{tmp_path_factory.mktemp('service')}/feedback.db", models)
    server.crown(first)
    yield server
    server.close()


@pytest.fixture(scope="module")
def parrot_with(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[dict[str, str]], Server]]:
    """Start a service on SQLite with settings, before a server that says again what it was told (parrot.py): for pages."""
    upstream, servers = ParrotServer(), []

    def start(env: dict[str, str]) -> Server:
        url = f"sqlite:///{tmp_path_factory.mktemp('parrot')}/feedback.db"
        if "THUMBWHEEL_REQUIRE_KEYS" in env:
            store = Store(url)
            store.migrate()
            with store.write() as connection:
                keys.create(connection, "the one without which it does not start", ["admin"], "command:test")
            store.close()
        folder = tmp_path_factory.mktemp("models")
        servers.append(Server(url, folder, {"THUMBWHEEL_ENGINE_URL": upstream.url, **env}))
        servers[-1].wait_for("/readyz")
        return servers[-1]

    yield start
    for server in servers:
        server.close()
    upstream.close()


@pytest.fixture(scope="module")
def parrot(parrot_with: Callable[[dict[str, str]], Server]) -> Server:
    """A service that says again what it was told, and asks nobody for a key."""
    return parrot_with({})


@pytest.fixture(scope="module")  # not the session: as long as it runs, asyncio.run fails in this thread
def browser() -> Iterator[Any]:
    """A chromium of the system."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("chromium is not installed (apt-get install chromium): the pages are NOT tested here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(LAUNCH))
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open a URL as somebody new, with options of a browser's context (viewport, locale, java_script_enabled, cookies…).
    Whatever the page asked for, and complained about or said in a dialog, stands in page.requested and page.complaints.

    Wait for locators: wait_for_function polls with eval, which the pages' policy forbids, and passes only if it need not wait.
    """
    contexts = []

    def open_page(url: str, *, cookies: list[Any] | None = None, **options: Any) -> Any:
        context = browser.new_context(**{"locale": "en-US", **options})
        contexts.append(context)
        if cookies:
            context.add_cookies(cookies)
        page = context.new_page()
        page.requested, page.complaints = [], []
        page.on("request", lambda request: page.requested.append(request.url))
        page.on("console", lambda line: line.type in ("error", "warning") and page.complaints.append(line.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (page.complaints.append(dialog.message), dialog.dismiss()))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
