"""A batch that does not fit is told before the first step, with its sizes and what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_stages import make_workspace, run_stage
from torch import nn

from models.job import Job
from models.memory import Rehearsal, peak_memory, rehearse
from models.tokenizer import Tokenizer
from models.training import Training, TrainingOptions
from models.transformer import Transformer

HUNGRY = """
import resource, torch
from torch import nn
from models.memory import rehearse
model = nn.Linear(64, 64)
resource.setrlimit(resource.RLIMIT_AS, (3_000_000_000, 3_000_000_000))
rehearse(model, lambda: model(torch.ones(20_000_000, 64)).sum(), "sft: 32 conversations of 9,000 tokens", "lower sft.batch_size")
"""


def test_what_does_not_fit_names_sizes_memory_and_remedy() -> None:
    command = [sys.executable, "-c", HUNGRY]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "MemoryError: sft: 32 conversations of 9,000 tokens with a model of 0.0 M parameters does not fit into the 3.0 GB that "
        "this process may use (its limit on address space): lower sft.batch_size"
    )


def test_a_rehearsal_leaves_weights_and_gradients_as_they_were() -> None:
    model = nn.Linear(8, 8)
    before = model.weight.detach().clone()
    tried = rehearse(model, lambda: model(torch.ones(4, 8)).sum(), "a batch", "none")
    assert model.weight.grad is None and torch.equal(model.weight, before)
    assert tried.seconds > 0 and tried.memory == pytest.approx(peak_memory("cpu"), rel=0.1)


def test_other_errors_stay_what_they_are() -> None:
    model = nn.Linear(8, 8)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        rehearse(model, lambda: model(torch.ones(4, 9)).sum(), "a batch", "none")


def test_the_estimate_counts_moments_and_the_checkpoint_that_stands_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured with a base of 135 M parameters: full SFT took 4.1 GB where rehearsal and moments said 2.8."""
    monkeypatch.setattr("models.training.rehearse", lambda *arguments: Rehearsal(2.0, 1000))
    events: list[dict[str, Any]] = []
    job = Job("sft", tmp_path, (), tmp_path / "output", tmp_path / "work", {"seed": 1}, emit=events.append)
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    Training(job, TrainingOptions(), 10, {}).rehearse(module, lambda: torch.zeros(()), "", "", parts=3)
    # 6 numbers learn: 8 bytes of moments each, and 12 of a checkpoint
    assert events == [{"event": "estimate", "seconds": 60.0, "memory": 1000 + 6 * 20}]


PREFERENCE = {"epochs": 1, "batch_size": 4, "log_every": 1, "samples": 2, "max_new_tokens": 2, "ptx_conversations": 1}


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        (
            "sft",
            {"steps": 2, "batch_size": 4},
            r"^sft: 4 conversations of \d+ .*: set sft.micro_batch below 4 in params.yaml$",
        ),
        (
            "sft",
            {"steps": 2, "batch_size": 4, "micro_batch": 1},
            r"^sft: 1 conversations .*: not even one fits: shorten",
        ),
        (
            "reward",
            {"epochs": 1, "batch_size": 4},
            r"^reward: 4 prompts with \d+ answers .*: set reward.micro_batch below 4",
        ),
        ("dpo", PREFERENCE, r"^dpo: 4 elements of \d+ tokens together with a model of .*: set dpo.micro_batch below 4"),
        ("kto", PREFERENCE | {"micro_batch": 2}, r"^kto: 2 elements of \d+ tokens .*: set kto.micro_batch below 2"),
    ],
)
def test_each_stage_tries_its_fullest_batch_before_the_first_step(
    model: Transformer,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    options: dict[str, Any],
    message: str,
) -> None:
    """What does not fit ends the stage before it has learned or written anything; what fits is told with seconds and bytes,
    and no step has more tokens in memory than that."""
    make_workspace(tmp_path, model, tokenizer)
    forward, tokens = Transformer.forward, list[int]()

    def watched(self: Transformer, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            tokens.append(len(ids))
        return forward(self, ids, *rest)

    def full(self: Transformer, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("tried to allocate memory")
        return forward(self, ids, *rest)

    ptx = {"ptx_coefficient": 0.0} if "samples" in options else {}
    params = {stage: {"log_every": 1, "warmup_steps": 0, **options, **ptx}}
    monkeypatch.setattr(Transformer, "forward", full)
    with pytest.raises(MemoryError, match=message):
        run_stage(tmp_path, stage, tmp_path / "full", params)
    assert not list((tmp_path / "full").rglob("*.pt")) and not list((tmp_path / "full/output").iterdir())
    monkeypatch.setattr(Transformer, "forward", watched)
    _, events = run_stage(tmp_path, stage, tmp_path / "fits", params)
    first, second = events[:2]
    assert (first["event"], second["event"]) == ("estimate", "metrics")
    assert first["seconds"] >= 0 and first["memory"] > 1e6
    assert len(tokens) > 2
    assert tokens[0] >= 0.9 * max(tokens)  # thumbs on answers to one prompt share its tokens, which is not foreseen
