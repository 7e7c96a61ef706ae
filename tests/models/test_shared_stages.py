"""SFT, reward model, PPO, DPO and KTO in two processes (gloo, FSDP2): one process's losses, and checkpoints that go both ways."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_stages import make_workspace, run_stage

from models.config import ModelConfig
from models.tokenizer import Tokenizer
from models.transformer import Transformer

COMMON = {"checkpoint_every": 2, "log_every": 1, "warmup_steps": 1}
PPO = COMMON | {  # answers of up to 5 tokens, 3 at a time in each process: their text is promised per width
    "iterations": 6, "batch_size": 6, "minibatches": 2, "epochs": 1, "max_new_tokens": 5, "rollout_width": 3,
    "ptx_conversations": 3, "learning_rate": 1e-3, "critic_learning_rate": 1e-3,
}  # fmt: skip
PREFERENCE = COMMON | {"epochs": 2, "batch_size": 5, "samples": 4, "max_new_tokens": 4, "ptx_conversations": 3}
LORA = {"rank": 2, "alpha": 4.0}
STAGES: dict[str, tuple[str, dict[str, Any]]] = {  # 24 conversations in batches of 5: the last of an epoch has 4
    "sft": ("sft", {"sft": COMMON | {"steps": 6, "batch_size": 5, "learning_rate": 1e-3}}),
    "sft in parts": ("sft", {"sft": COMMON | {"steps": 6, "batch_size": 5, "micro_batch": 1}}),
    "sft bf16": ("sft", {"sft": COMMON | {"steps": 6, "batch_size": 5}, "training": {"precision": "bf16"}}),
    "sft lora": ("sft", {"sft": COMMON | {"steps": 6, "batch_size": 5}, "lora": LORA}),
    "reward": ("reward", {"reward": COMMON | {"epochs": 2, "batch_size": 5, "margin": 0.1, "centering_coefficient": 0.01}}),
    "reward low-rank": ("reward", {"reward": COMMON | {"epochs": 2, "batch_size": 5}, "lora": LORA}),
    "reward in parts": ("reward", {"reward": COMMON | {"epochs": 2, "batch_size": 5, "micro_batch": 1}}),
    "ppo": ("ppo", {"ppo": PPO | {"kl_target": 2.0, "kl_horizon": 40, "ema_decay": 0.7, "whiten_rewards": True}}),
    "ppo shared critic": ("ppo", {"ppo": PPO | {"critic": "shared", "rollout_correction": 1.5}}),
    "ppo lora in parts": ("ppo", {"ppo": PPO | {"micro_batch": 1, "missing_eos_penalty": -1.0}, "lora": LORA}),
    "dpo": ("dpo", {"dpo": PREFERENCE}),
    "dpo in parts": ("dpo", {"dpo": PREFERENCE | {"micro_batch": 1, "ptx_conversations": 1, "ptx_batch_size": 1}}),
    "dpo lora": ("dpo", {"dpo": PREFERENCE, "lora": LORA}),
    "kto": ("kto", {"kto": PREFERENCE}),
    "kto in parts": ("kto", {"kto": PREFERENCE | {"micro_batch": 1, "ptx_coefficient": 0.0}}),
}  # fmt: skip

pytestmark = pytest.mark.slow


def in_two_processes(root: Path, jobs: list[tuple[str, Path]]) -> None:
    """Run the jobs (a name in STAGES, and its work folder) one after the other under torchrun."""
    listed = [(STAGES[name][0], str(where), STAGES[name][1]) for name, where in jobs]
    (root / "jobs.json").write_text(json.dumps(listed))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parents[1]), str(here)])
    result = subprocess.run(
        [sys.executable, *command, str(here / "drive_ranks.py"), str(root / "jobs.json"), str(root)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-6000:]


def curve(where: Path) -> list[dict[str, float]]:
    with (where / "output/curves.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def rounding(name: str) -> float:
    """How far figures of a stage may be apart for the order of its sums."""
    return 0.02 if "bf16" in name else 2e-5


def same_curve(one: Path, other: Path) -> None:
    near = rounding(one.name if one.name in STAGES else other.name)
    for row, expected in zip(curve(one), curve(other), strict=True):
        if row["step"] == 1:  # where the policy is the reference yet, rounding decides whether a ratio is above 0
            row.pop("rewards/accuracy", None)
            expected.pop("rewards/accuracy", None)
        assert row == pytest.approx(expected, rel=near, abs=near)


@pytest.fixture(scope="module")
def done(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with each stage's work in one/NAME and two/NAME, and in changed/NAME what two processes made of the
    checkpoint that one had saved two steps before its last."""
    root = tmp_path_factory.mktemp("shared")
    config = ModelConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=48,
        max_position_embeddings=48, vocab_size=300,
    )  # fmt: skip
    make_workspace(root, Transformer(config).initialize(torch.Generator().manual_seed(0)), tokenizer)
    for name, (stage, params) in STAGES.items():
        run_stage(root, stage, root / "one" / name, params)
        unfinished(root / "one" / name, root / "changed" / name)
    in_two_processes(root, [(name, root / folder / name) for folder in ("two", "changed") for name in STAGES])
    return root


def unfinished(work: Path, copy: Path) -> None:
    """A copy of a finished work folder whose newest checkpoint is gone."""
    shutil.copytree(work, copy)
    shutil.rmtree(copy / "output")
    sorted((copy / "checkpoints").glob("*.pt"))[-1].unlink()


@pytest.mark.parametrize("name", STAGES)
def test_two_processes_have_the_losses_and_weights_of_one(done: Path, name: str) -> None:
    same_curve(done / "two" / name, done / "one" / name)
    folders = [done / n / name / "output" for n in ("one", "two")]
    files = sorted(path.relative_to(folders[0]) for path in folders[0].rglob("*.safetensors"))
    assert len(files) == 1 + ("lora" in name)
    for file in files:
        one, two = (load_file(folder / file) for folder in folders)
        for key, tensor in one.items():
            torch.testing.assert_close(two[key], tensor, atol=10 * rounding(name), rtol=1e-3)
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in folders)
    assert two == pytest.approx(one, rel=1e-3 + rounding(name), abs=1e-3 + rounding(name))


@pytest.mark.parametrize("name", STAGES)
def test_checkpoints_go_from_one_number_of_processes_to_another(done: Path, tmp_path: Path, name: str) -> None:
    same_curve(done / "changed" / name, done / "one" / name)
    unfinished(done / "two" / name, tmp_path / "work")
    stage, params = STAGES[name]
    _, events = run_stage(done, stage, tmp_path / "work", params)
    (resumed,) = [event["step"] for event in events if event["event"] == "resumed"]
    assert resumed == len(curve(done / "two" / name)) - 2
    same_curve(tmp_path / "work", done / "one" / name)
