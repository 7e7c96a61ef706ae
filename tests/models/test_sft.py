"""SFT: what is in the loss, how it is normalised, and that conversations laid end to end do not see each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_stages import make_workspace, run_stage

from models.checkpoint import load_model
from models.corpus import Sequences, conversations
from models.layout import dense_layout
from models.sft import SFTOptions, answer_loss, collate, learned_tokens, micro_batches, sft_loss
from models.tokenizer import Tokenizer
from models.transformer import Transformer

CHATS = [
    [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "I am fine, thank you!"}],
    [{"role": "user", "content": "how are you?"}, {"role": "assistant", "content": "fine"}],
    [{"role": "user", "content": "what do you like to eat"}, {"role": "assistant", "content": "you"}],
    [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hello there"},
        {"role": "user", "content": "how?"},
        {"role": "assistant", "content": "thank you!"},
    ],
]


@pytest.fixture
def data(tokenizer: Tokenizer) -> Sequences:
    return conversations(tokenizer, CHATS, 48)[0]


def losses_alone(model: Transformer, tokenizer: Tokenizer) -> list[list[torch.Tensor]]:
    """−log p of every learned token of each conversation by itself, from the tokenizer's own mask and torch's softmax."""
    out = []
    for chat in CHATS:
        pairs = tokenizer.encode_chat_with_mask(chat)
        ids = torch.tensor([id for id, _ in pairs])
        logp = torch.log_softmax(model.logits(model(ids[:-1], dense_layout(1, len(ids) - 1))), -1)
        out.append([-logp[at - 1, ids[at]] for at in range(1, len(ids)) if pairs[at][1]])
    return out


def test_the_loss_is_on_the_assistants_tokens_and_its_stop_token(data: Sequences, tokenizer: Tokenizer) -> None:
    """Bugs of others: the prompt in the loss, the first answer token or the stop token out of it."""
    batch = collate(data, [3], "cpu")
    words = [tokenizer.encode(CHATS[3][i]["content"]) for i in (1, 3)]
    assert batch.targets.tolist() == [*words[0], tokenizer.stop_id, *words[1], tokenizer.stop_id]
    assert torch.equal(batch.tokens[batch.rows][0], torch.tensor(tokenizer.special["<|assistant|>"]))
    for row, target in zip(batch.rows.tolist(), batch.targets.tolist(), strict=True):
        assert data[3][row + 1] == target


def test_packed_conversations_have_the_loss_and_gradient_of_single_ones(
    model: Transformer, data: Sequences, tokenizer: Tokenizer
) -> None:
    alone = [loss for losses in losses_alone(model, tokenizer) for loss in losses]
    expected = torch.stack(alone).mean()
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss = sft_loss(model, collate(data, range(4), "cpu"), len(alone))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-5, rtol=1e-3)


def test_a_conversation_does_not_see_the_one_before_it(model: Transformer, data: Sequences) -> None:
    """Other words in the first leave every number of the second as it was, and its gradient does not reach them."""
    tokens = data.tokens.copy()
    batch = collate(data, [1, 3], "cpu")
    hidden = model(batch.tokens, batch.layout)
    tokens[data.offsets[1] : data.offsets[2]] = 99
    other = collate(replace(data, tokens=tokens), [1, 3], "cpu")
    length = int(data.offsets[2] - data.offsets[1]) - 1
    assert other.tokens[:length].tolist() == [99] * length
    assert torch.equal(model(other.tokens, other.layout)[length:], hidden[length:])
    hidden[length:].square().sum().backward()
    unseen = set(batch.tokens[:length].tolist()) - set(batch.tokens[length:].tolist())
    assert unseen and not model.embedding.weight.grad[sorted(unseen)].any()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_add_up_to_the_batch_though_their_answers_differ_in_length(
    model: Transformer, data: Sequences, size: int
) -> None:
    """Bug of others: a mean of each micro-batch's own mean weighs tokens of short answers more."""
    count = learned_tokens(data, range(4))
    whole = collate(data, range(4), "cpu")
    assert count == len(whole.targets)
    sft_loss(model, whole, count).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    cut = [batch for batch, _ in micro_batches(data, range(4), size, "cpu")]
    assert len(cut) == -(-4 // size)
    assert len({len(batch.targets) for batch in cut}) > 1
    for batch in cut:
        sft_loss(model, batch, count).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-6, rtol=1e-4)


def test_heldout_loss_is_a_mean_over_tokens(model: Transformer, data: Sequences, tokenizer: Tokenizer) -> None:
    alone = losses_alone(model, tokenizer)
    mean = torch.stack([loss for losses in alone for loss in losses]).mean()
    assert answer_loss(model, data, "cpu") == pytest.approx(mean.item(), rel=1e-5)
    first = torch.stack([*alone[0], *alone[1]]).mean()
    assert answer_loss(model, data, "cpu", limit=2) == pytest.approx(first.item(), rel=1e-5)


def test_a_step_in_micro_batches_trains_as_a_whole_one(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    make_workspace(tmp_path, model, tokenizer)
    options = {"steps": 4, "batch_size": 6, "log_every": 1, "learning_rate": 1e-4}
    runs = [
        run_stage(tmp_path, "sft", tmp_path / str(size), {"sft": options | {"micro_batch": size}})[0]
        for size in (None, 2)
    ]
    one, other = (load_model(run / "model") for run in runs)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    rows = [np.loadtxt(run / "curves.csv", delimiter=",", skiprows=1) for run in runs]
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-3)
    silent = [chat[:1] for chat in CHATS]
    conversations(tokenizer, silent, 48)[0].save(tmp_path / "artifacts/tokenize/sft.heldout.npz")
    with pytest.raises(ValueError, match="no message has the role assistant"):
        run_stage(tmp_path, "sft", tmp_path / "silent", {"sft": options})
    with pytest.raises(ValueError, match="micro_batch must be at least 1, not 0"):
        SFTOptions(micro_batch=0)


def test_own_answers_of_people_join_the_conversations_as_often_as_they_weigh(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    make_workspace(tmp_path, model, tokenizer)
    curated, options = tmp_path / "artifacts/tokenize/sft.train.npz", {"steps": 4, "batch_size": 6}

    def weights(name: str, **more: int) -> bytes:
        out, _ = run_stage(tmp_path, "sft", tmp_path / name, {"sft": options | more})
        return (out / "model/model.safetensors").read_bytes()

    nothing = weights("nothing", written_weight=2)
    own, _ = conversations(tokenizer, CHATS[:2], 48)
    own.save(tmp_path / "artifacts/written/sft.npz")
    ignored, twice = weights("ignored", written_weight=0), weights("twice", written_weight=2)
    Sequences.none().save(tmp_path / "artifacts/written/sft.npz")
    all_of = [Sequences.load(curated), own, own]
    offsets = np.cumsum([0, *(length for part in all_of for length in np.diff(part.offsets))])
    tokens, masks = (np.concatenate([getattr(part, name) for part in all_of]) for name in ("tokens", "learned"))
    Sequences(tokens, masks, offsets).save(curated)
    assert ignored == nothing != twice == weights("curated so")
