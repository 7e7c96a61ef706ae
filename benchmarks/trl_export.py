"""Does what the service exports train in TRL unchanged? A real service, real opinions over HTTP, TRL's own trainers.

    python -m benchmarks.trl_export

A service process with a tiny random model answers 16 questions twice; each answer gets a thumb, each pair is compared, some
answers are corrected. Its six exports (three views, jsonl and parquet) then go, as they were downloaded, through a step each of
TRL's KTOTrainer, DPOTrainer, RewardTrainer and SFTTrainer, in TRL's own environment (benchmarks/peers.py), on the same model,
which transformers reads from our folder. Exit status 1: one of them did not train.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from benchmarks.peers import CHECKOUT, python_of
from feedback.export import VIEWS
from feedback.store import Store

PEER = "trl-1.16"
FORMATS = ("jsonl", "parquet")
QUESTIONS = [f"how are you, number {n}?" for n in range(16)]


def make_model(folder: Path) -> str:
    """Write a tiny model with random weights to folder/<hash>; returns the hash."""
    import torch

    from models.checkpoint import model_hash, save_model
    from models.config import ModelConfig
    from models.tokenizer import Tokenizer
    from models.transformer import Transformer

    tokenizer = Tokenizer.train(["hello there, how are you?", "I am fine, thank you, number 0123456789."] * 20, 300)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=96,
    )
    model = Transformer(config).initialize(torch.Generator().manual_seed(1))
    save_model(model, folder / "draft", tokenizer)
    name = model_hash(folder / "draft")
    (folder / "draft").rename(folder / name)
    return name


@contextmanager
def service(folder: Path) -> Iterator[tuple[httpx.Client, Path]]:
    """A service on an empty SQLite database, and the folder of the model that answers."""
    models = folder / "models"
    models.mkdir()
    name = make_model(models)
    database = f"sqlite:///{folder}/feedback.db"
    store = Store(database)
    store.migrate()
    path = str(models / name)
    store.promote(model_hash=name, model_path=path, figures={}, reason="a benchmark", expected_champion=None)
    store.close()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "feedback.service", "--port", str(port), "--database-url", database]
    process = subprocess.Popen([*command, "--models-root", str(models)], cwd=CHECKOUT)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            wait_for(client, process)
            yield client, models / name
    finally:
        process.terminate()
        process.wait(20)


def wait_for(client: httpx.Client, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Until the service answers with a model. Raises RuntimeError when it ended or took too long."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        try:
            if client.get("/readyz").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"the service did not become ready (exit status {process.poll()})")


def opine(client: httpx.Client) -> None:
    """Ask, and say what a person would: a thumb on each answer, which of two was better, a better answer now and then."""
    for number, question in enumerate(QUESTIONS):
        body = {"messages": [{"role": "user", "content": question}], "max_tokens": 8, "temperature": 1.0}
        answers = [client.post("/v1/chat/completions", json=body).raise_for_status().json() for _ in range(2)]
        ids = [answer["id"] for answer in answers]
        for place, id in enumerate(ids):
            client.put(f"/v1/feedback/{id}/thumb", json={"value": 1 if place else -1}).raise_for_status()
        client.post("/v1/comparisons", json={"completion_ids": ids, "chosen": ids[1]}).raise_for_status()
        if number % 2:
            body = {"correction": "I am fine, thank you."}
            client.put(f"/v1/feedback/{ids[0]}/edit", json=body).raise_for_status()


def main() -> int:
    """Make the exports, and have TRL train on them."""
    python = python_of(PEER)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with service(folder) as (client, model):
            opine(client)
            for view in VIEWS:
                for form in FORMATS:
                    answer = client.get("/v1/export", params={"view": view, "format": form}).raise_for_status()
                    (folder / f"{view}.{form}").write_bytes(answer.content)
        command = [str(python), "-m", "benchmarks.races.trl_export", str(folder), str(model)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(CHECKOUT)}
        return subprocess.run(command, cwd=CHECKOUT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
