"""The service under drill: the real `python -m feedback.service` in a process of its own, and answers to have opinions about."""

from __future__ import annotations

import http.client
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import sqlalchemy as sa

from benchmarks.drills.databases import free_port
from benchmarks.peers import CHECKOUT
from feedback import completions
from feedback.completions import Completion
from feedback.store import Store

PROMPTS = 50  # that the seeded answers are to: answers to one prompt can be compared


class Service:
    """A service on a port that stays the same however often it is killed and started again."""

    def __init__(self, database_url: str, folder: Path, env: Mapping[str, str] | None = None) -> None:
        """folder: for the signing key, the models and what the service logs. Started by start()."""
        folder.mkdir(parents=True, exist_ok=True)
        self.database_url, self.folder, self.port = database_url, folder, free_port()
        self.env = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", **(env or {})}
        self.log = folder / "service.log"

    def start(self) -> None:
        """Start it; `wait` says when it answers."""
        command = [sys.executable, "-m", "feedback.service", "--port", str(self.port), "--width", "8"]
        command += ["--database-url", self.database_url, "--models-root", str(self.folder / "models")]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=self.env, cwd=CHECKOUT, stdout=log, stderr=log)

    def wait(self, path: str = "/healthz", seconds: float = 60.0) -> None:
        """Until `path` answers 200. Raises RuntimeError when the process has ended, TimeoutError."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the service ended: {self.log.read_text(errors='replace')[-2000:]}")
            if self.answers(path):
                return
            time.sleep(0.01)
        raise TimeoutError(f"{path} does not answer 200: see {self.log}")

    def answers(self, path: str) -> bool:
        """Whether `path` answers 200."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """SIGTERM; killed when it takes longer than 20 s."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()


def seed_answers(database_url: str, number: int, model_hash: str = "a" * 64) -> list[list[str]]:
    """Migrate, and write complete answers to PROMPTS prompts; their ids, in a list for each prompt."""
    store = Store(database_url)
    store.migrate()
    ids: list[list[str]] = [[] for _ in range(min(PROMPTS, number))]
    with store.write() as connection:
        for i in range(number):
            place = i % len(ids)
            ids[place].append(f"chatcmpl-drill-{i}")
            completions.insert(connection, answer(ids[place][-1], f"prompt {place}", f"answer {i}", model_hash))
    store.close()
    return ids


def answer(id: str, prompt: str, response: str, model_hash: str) -> Completion:
    """A complete answer."""
    return Completion(
        id=id,
        subject="asker",
        request_sha256="0" * 64,
        request_messages=[{"role": "user", "content": prompt}],
        sampling={"temperature": 1.0},
        model_hash=model_hash,
        prompt_token_ids=[1, *prompt.encode()],
        response=response,
        response_token_ids=[*response.encode(), 2],
        response_logprobs=[-0.5] * (len(response) + 1),
        status="complete",
        finish_reason="stop",
    )


def make_model(models: Path, seed: int) -> str:
    """Write a tiny model with random weights to models/<hash>; the hash."""
    import torch  # here: most drills do without

    from models.checkpoint import model_hash, save_model
    from models.config import ModelConfig
    from models.tokenizer import Tokenizer
    from models.transformer import Transformer

    torch.manual_seed(seed)
    tokenizer = Tokenizer.train(["hello there, how are you?", "I am fine, thank you."] * 20, 300)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = ModelConfig(vocab_size=tokenizer.vocab_size, intermediate_size=64, max_position_embeddings=96, **sizes)
    folder = models / f"draft-{seed}"
    save_model(Transformer(config), folder, tokenizer)
    name = model_hash(folder)
    folder.rename(models / name)
    return name


def promote(store: Store, models: Path, model_hash: str) -> None:
    """Make a model the champion."""
    reigning = store.champion()
    store.promote(
        model_hash=model_hash,
        model_path=str(models / model_hash),
        figures={},
        reason="a drill",
        expected_champion=reigning.model_hash if reigning else None,
    )


def value_of(database_url: str, statement: str) -> int:
    """The one number that a SQL statement gives."""
    engine = sa.create_engine(database_url)
    try:
        with engine.connect() as connection:
            return int(connection.execute(sa.text(statement)).scalar_one())
    finally:
        engine.dispose()


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(len(ordered) * share * 1000) // 1000) - 1)]


def pick_pair(luck: random.Random, ids: Sequence[Sequence[str]]) -> list[str]:
    """Two answers to one prompt."""
    return luck.sample(luck.choice(ids), 2)
