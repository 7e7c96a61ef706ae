"""Section `training` of params.yaml: low precision keeps weights and losses in fp32, checkpointing and compiling change
nothing, and every mode resumes to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_stages import Killed, make_workspace, run_stage
from torch import Tensor

from models.checkpoint import model_hash
from models.compute import ComputeOptions
from models.layout import packed_layout
from models.losses import cross_entropy, log_probs
from models.optim import Optimizer
from models.reward import RewardModel
from models.tokenizer import Tokenizer
from models.transformer import Transformer

LAYOUT = packed_layout([9, 12, 3])
TOKENS = torch.randint(300, (24,), generator=torch.Generator().manual_seed(1))
ROWS = torch.tensor([1, 4, 5, 8, 11, 15, 20, 23])
SFT: dict[str, Any] = {"steps": 6, "batch_size": 5, "checkpoint_every": 2, "log_every": 1, "learning_rate": 1e-3}


def loss_of(model: Transformer, tokens: Tensor = TOKENS) -> Tensor:
    hidden = model(tokens, LAYOUT, ROWS)
    return cross_entropy(hidden, model.head_weight, (tokens[ROWS] * 7 + 1) % 300, torch.full((8,), 1 / 8))


def gradients(model: Transformer) -> list[Tensor]:
    model.zero_grad()
    loss_of(model).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_in_low_precision_the_loss_is_near_and_the_master_weights_stay_fp32(model: Transformer) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5 if p.dim() > 1 else 1)
    expected, whole = loss_of(model).item(), gradients(model)
    model.compute = ComputeOptions(precision="bf16")
    loss = loss_of(model)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=0.01) and loss.item() != expected
    for low, high in zip(gradients(model), whole, strict=True):
        assert low.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(low.flatten(), high.flatten(), dim=0) > 0.99
    hidden = model(TOKENS, LAYOUT, ROWS)
    assert hidden.dtype == torch.bfloat16
    assert log_probs(hidden, model.head_weight, TOKENS[ROWS]).dtype == torch.float32
    optimizer = Optimizer(model)
    optimizer.step(1e-3, 1.0)
    moments = [v for entry in optimizer.inner.state.values() for v in entry.values() if v.dim()]
    assert {t.dtype for t in [*moments, *model.parameters()]} == {torch.float32}
    judge = RewardModel(model).initialize(torch.Generator().manual_seed(2))
    assert judge.scores(TOKENS, LAYOUT).dtype == torch.float32
    assert model.forward_with_cache(TOKENS, LAYOUT)[1][0][0].dtype == torch.float32, (
        "decoding works in the weights' own"
    )


def test_checkpointed_activations_give_the_same_gradients_from_less_memory(model: Transformer) -> None:
    def kept() -> tuple[int, list[Tensor]]:
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = loss_of(model)
        memory = sum(sizes.values())
        loss.backward()
        return memory, [p.grad for p in model.parameters() if p.grad is not None]

    memory, expected = kept()
    model.compute = ComputeOptions(activation_checkpointing=True)
    less, got = kept()
    assert less < 0.6 * memory
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    "how", [{"precision": "bf16"}, {"activation_checkpointing": True}], ids=["bf16", "checkpointing"]
)
def test_each_way_resumes_to_the_same_bits(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path, how: dict[str, Any]
) -> None:
    make_workspace(tmp_path, model, tokenizer)
    params = {"sft": SFT, "training": how}
    whole, _ = run_stage(tmp_path, "sft", tmp_path / "whole", params)
    with pytest.raises(Killed):
        run_stage(tmp_path, "sft", tmp_path / "again", params, killed_after=3)
    again, events = run_stage(tmp_path, "sft", tmp_path / "again", params)
    assert any(event["event"] == "resumed" for event in events)
    assert model_hash(again / "model") == model_hash(whole / "model")
    plain, _ = run_stage(tmp_path, "sft", tmp_path / "plain", {"sft": SFT})
    assert (model_hash(plain / "model") == model_hash(whole / "model")) == ("precision" not in how)


def losses(events: list[dict[str, Any]]) -> list[float]:
    return [event["metrics"]["loss"] for event in events if event["event"] == "metrics"]


SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
SHAPE |= {"intermediate_size": 48, "max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("how", "micro_batch"),
    [({}, 3), pytest.param({"compile": True}, None, marks=pytest.mark.slow)],
    ids=["micro-batches", "compiled"],
)
def test_pretraining_in_parts_or_compiled_has_the_losses_of_plain_code(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path, how: dict[str, Any], micro_batch: int | None
) -> None:
    make_workspace(tmp_path, model, tokenizer)
    options = {"steps": 4, "batch_size": 4, "log_every": 1, "checkpoint_every": 2, "warmup_steps": 1}
    plain = {"model": SHAPE, "pretrain": options}
    _, expected = run_stage(tmp_path, "pretrain", tmp_path / "plain", plain)
    other = plain | {"training": how, "pretrain": options | {"micro_batch": micro_batch}}
    whole, events = run_stage(tmp_path, "pretrain", tmp_path / "other", other)
    assert losses(events) == pytest.approx(losses(expected), rel=1e-5)
    with pytest.raises(Killed):
        run_stage(tmp_path, "pretrain", tmp_path / "again", other, killed_after=3)
    again, _ = run_stage(tmp_path, "pretrain", tmp_path / "again", other)
    assert model_hash(again / "model") == model_hash(whole / "model")


def test_a_precision_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="precision must be fp32 or bf16, not fp8"):
        ComputeOptions(precision="fp8")  # type: ignore[arg-type]
