"""Stage tokenize: train the tokenizer on the training text, or take the base's; text, chats and prompts become token arrays."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.base import BaseOptions, open_base
from models.corpus import conversations, prompts, text_stream
from models.job import Job
from models.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenizeOptions:
    """Section `tokenize` of params.yaml. Lengths in tokens; longer rows are left out and counted."""

    vocab_size: int = 1280
    max_conversation: int = 96
    max_prompt: int = 48
    training_characters: int = 1_500_000

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_conversation", "max_prompt", "training_characters"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a curated jsonl file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def run(job: Job) -> dict[str, Any]:
    """The stage body: artifacts/curate → tokenizer/, pretrain.*.npy, sft.*.npz, prompts.train.npz, stats.json."""
    options = job.options("tokenize", TokenizeOptions)
    folder, out = job.input("artifacts/curate"), job.output
    job.input("artifacts/validate")  # nothing is tokenized before the gate has passed
    texts = {
        split: [row["text"] for row in read_rows(folder / f"pretrain.{split}.jsonl")] for split in ("train", "heldout")
    }
    chats = {
        split: [row["messages"] for row in read_rows(folder / f"sft.{split}.jsonl")] for split in ("train", "heldout")
    }

    sample, room = [], options.training_characters
    for text in [*texts["train"], *(message["content"] for chat in chats["train"] for message in chat)]:
        if room <= 0:
            break
        sample.append(text)
        room -= len(text)
    base = job.options("model", BaseOptions)
    if base.base:
        tokenizer = Tokenizer.load(open_base(job.root, base))
    else:
        tokenizer = Tokenizer.train(sample, options.vocab_size)
    tokenizer.save(out / "tokenizer")
    job.log(1, 4, {"tokenizer/vocabulary": tokenizer.vocab_size})

    stats: dict[str, Any] = {"vocab_size": tokenizer.vocab_size}
    for split, documents in texts.items():
        stream = text_stream(tokenizer, documents)
        np.save(out / f"pretrain.{split}.npy", stream)
        stats[f"pretrain_{split}_tokens"] = len(stream)
        stats[f"pretrain_{split}_bytes"] = sum(len(text.encode()) for text in documents)
    job.log(2, 4, {"tokens/pretrain": stats["pretrain_train_tokens"]})
    for split, rows in chats.items():
        sequences, dropped = conversations(tokenizer, rows, options.max_conversation)
        sequences.save(out / f"sft.{split}.npz")
        stats |= {
            f"sft_{split}_conversations": len(sequences),
            f"sft_{split}_tokens": len(sequences.tokens),
            f"sft_{split}_too_long": dropped,
        }
    job.log(3, 4, {"tokens/sft": stats["sft_train_tokens"]})
    asked = [row["messages"] for row in read_rows(folder / "prompts.train.jsonl")]
    sequences, dropped = prompts(tokenizer, asked, options.max_prompt)
    sequences.save(out / "prompts.train.npz")
    stats |= {"prompts_train": len(sequences), "prompts_train_too_long": dropped}
    (out / "stats.json").write_text(json.dumps(stats, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    job.log(4, 4, {"prompts/train": len(sequences)})
    return stats
