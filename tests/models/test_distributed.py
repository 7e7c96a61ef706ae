"""Two processes through torchrun, gloo and FSDP2: the losses of one process, and checkpoints that go both ways."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from models.corpus import text_stream
from models.tokenizer import Tokenizer

STEPS = 6
PARAMS: dict[str, Any] = {
    "seed": 1,
    "model": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 48, "max_position_embeddings": 32,
    },
    "pretrain": {"steps": STEPS, "batch_size": 4, "warmup_steps": 2, "checkpoint_every": 3, "log_every": 1},
}  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("distributed")
    texts = [f"the {a} {b} likes the {b} {a}" for a in ("red", "old", "big") for b in ("cat", "dog", "man")] * 10
    tokenizer = Tokenizer.train(texts, 290)
    tokenizer.save(root / "artifacts/tokenize/tokenizer")
    for split in ("train", "heldout"):
        np.save(root / f"artifacts/tokenize/pretrain.{split}.npy", text_stream(tokenizer, texts))
    return root


def run(root: Path, work: Path, processes: int) -> Path:
    """Pretrain in `work`, from a checkpoint there if there is one; returns the output folder."""
    shutil.rmtree(work / "output", ignore_errors=True)
    work.mkdir(exist_ok=True)
    spec = {
        "stage": "pretrain", "root": str(root), "deps": ["artifacts/tokenize"], "output": str(work / "output"),
        "work": str(work), "params": PARAMS, "device": "cpu", "threads": 1,
    }  # fmt: skip
    (work / "spec.json").write_text(json.dumps(spec))
    command = ["-m", "models.run", str(work / "spec.json"), "--metrics-fd", "1"]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [*torchrun, *command]
    result = subprocess.run(
        [sys.executable, *command],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    events = [json.loads(line)["event"] for line in result.stdout.splitlines()]
    assert [event for event in events if event != "alive"][-1] == "done"  # the beat may go on while Python shuts down
    return work / "output"


def losses(output: Path) -> list[float]:
    with (output / "curves.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def works(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The finished work folder of one process and of two."""
    folder = tmp_path_factory.mktemp("works")
    for processes in (1, 2):
        run(workspace, folder / str(processes), processes)
    return {processes: folder / str(processes) for processes in (1, 2)}


def test_two_processes_have_the_losses_of_one(works: dict[int, Path]) -> None:
    assert losses(works[2] / "output") == pytest.approx(losses(works[1] / "output"), rel=1e-5)
    one, two = (load_file(works[n] / "output/model/model.safetensors") for n in (1, 2))
    for name, tensor in one.items():
        assert tensor.shape == two[name].shape
        assert float((tensor - two[name]).abs().max()) < 2e-4, name


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_checkpoint_of_one_number_of_processes_serves_another(
    workspace: Path, works: dict[int, Path], tmp_path: Path, before: int, after: int
) -> None:
    work = tmp_path / "changed"
    shutil.copytree(works[before], work)
    newest = sorted((work / "checkpoints").glob("*.pt"))[-1]
    newest.unlink()  # what is left was saved after 3 of 6 steps
    expected = losses(works[before] / "output")
    assert losses(run(workspace, work, after)) == pytest.approx(expected, rel=1e-5)
