"""A conversation in the terminal: remembered, streamed whole, reproducible, and clear about what cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from models.chat import Chat, ChatOptions, open_chat
from models.checkpoint import save_model
from models.rollout import generate
from models.tokenizer import Tokenizer
from models.training import stream
from models.transformer import Transformer

OPTIONS = ChatOptions(max_new_tokens=6, temperature=1.0, seed=3)


def test_an_answer_is_what_the_sampler_gives_for_the_conversation_so_far(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    chat = Chat(model, tokenizer, OPTIONS)
    first = "".join(chat.answer("hello"))
    second = "".join(chat.answer("how are you?"))
    said = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "how are you?"},
    ]
    for turn, (messages, text) in enumerate([(said[:1], first), (said, second)]):
        seed = int(stream(3, "chat", turn).integers(2**62))
        (expected,) = generate(
            model,
            [tokenizer.encode_chat(messages)],
            stop_id=tokenizer.stop_ids,
            max_new_tokens=6,
            seeds=[seed],
            width=1,
        )
        assert text == tokenizer.decode(expected.ids)


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(model: Transformer, tokenizer: Tokenizer) -> None:
    chat = Chat(model, tokenizer, ChatOptions(max_new_tokens=6, temperature=1.0, system="be kind"))
    for _ in range(6):
        "".join(chat.answer("hello there"))
    assert chat.forgotten >= 2 and chat.forgotten % 2 == 0
    assert chat.messages[0] == {"role": "system", "content": "be kind"}
    assert chat.messages[1]["role"] == "user"
    assert len(chat.messages) + chat.forgotten == 1 + 2 * 6


def test_an_answer_that_nobody_reads_on_ends_and_stays_said(model: Transformer, tokenizer: Tokenizer) -> None:
    chat = Chat(model, tokenizer, OPTIONS)
    answer = chat.answer("hello")
    piece = next(answer)
    answer.close()
    assert not chat.engine.busy
    assert chat.messages[-1] == {"role": "assistant", "content": piece}
    assert "".join(chat.answer("hello"))


def test_a_message_longer_than_the_context_is_refused_and_the_conversation_goes_on(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    chat = Chat(model, tokenizer, OPTIONS)
    with pytest.raises(ValueError, match=r"the message has \d+ tokens; the model reads at most 47"):
        list(chat.answer("hello there " * 40))
    assert chat.messages == []
    "".join(chat.answer("hello"))
    assert len(chat.messages) == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"max_new_tokens": 0}, "max_new_tokens must be at least 1"), ({"top_p": 0.0}, "top_p 0.0 must be above 0")],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatOptions(**wrong)  # type: ignore[arg-type]


def test_a_model_without_a_chat_template_says_what_to_do(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_model(model, tmp_path / "model", tokenizer)
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template, so this model only completes: use --complete"):
        open_chat(tmp_path / "model", OPTIONS)
    chat = open_chat(tmp_path / "model", ChatOptions(max_new_tokens=4, complete=True))
    assert "".join(chat.answer("hello there"))
    assert chat.messages == []


def test_the_command_talks_line_by_line(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_model(model, tmp_path / "model", tokenizer)
    command = [
        sys.executable,
        "-m",
        "flows.cli",
        "chat",
        str(tmp_path / "model"),
        "--max-new-tokens",
        "6",
        "--seed",
        "3",
    ]
    said = "hello\n/reset\nhello\n" + "x" * 200 + "\n/exit\nnever read\n"
    done = subprocess.run(command, input=said, capture_output=True, text=True, check=True)
    chat = open_chat(tmp_path / "model", ChatOptions(max_new_tokens=6, seed=3))
    answers = "".join(chat.answer("hello"))
    chat.reset()
    answers += "\n" + "".join(chat.answer("hello"))
    assert done.stdout == answers + "\n\n"
    assert "the message has" in done.stderr
