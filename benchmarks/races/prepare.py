"""The workspace that both sides of a race read: random weights in Hugging Face folders, and token ids by fixed seeds.

    python -m benchmarks.races.prepare SIZE FOLDER STOP_PROBABILITY

Ours reads artifacts/ as the stages left it, the peers read the same models and race.json: conversations as
[ids, length of the prompt], pairs as [prompt, better, worse], prompts for generation and for PPO.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers.models import WordLevel

from benchmarks.races import work
from models.checkpoint import save_model
from models.config import ModelConfig
from models.corpus import Sequences
from models.layout import dense_layout
from models.reward import RewardModel, save_reward_model
from models.tokenizer import SPECIAL, Tokenizer
from models.transformer import Transformer

CONVERSATIONS, PAIRS = 512, 192
MEAN_LENGTH, SPREAD = 84, 0.85  # of a log-normal's mean and sigma: padding to the longest of 8 wastes over half
COMMON = 0.2  # what all embeddings have in their first place; see stop_with


def main() -> int:
    """Write the workspace."""
    size, folder, stop = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    shape = work.SHAPES[size]
    tokenizer = words(shape.vocabulary)
    draw = np.random.default_rng(1)

    def ids(count: int) -> list[int]:
        return [int(i) for i in draw.integers(len(SPECIAL), shape.vocabulary, count)]

    config = ModelConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.ffn,
        max_position_embeddings=shape.context,
        vocab_size=shape.vocabulary,
    )
    artifacts = folder / "artifacts"
    for name in ("tokenize", "snapshot", "pretrain", "sft", "reward", "written"):
        (artifacts / name).mkdir(parents=True, exist_ok=True)
    for nobody in ("written/sft.npz", "snapshot/prompts.npz"):  # people wrote nothing and asked nothing
        Sequences.none().save(artifacts / nobody)
    tokenizer.save(artifacts / "tokenize" / "tokenizer")
    model = Transformer(config).initialize(torch.Generator().manual_seed(1))
    save_model(model, artifacts / "pretrain" / "model", tokenizer)
    reward = RewardModel(model).initialize(torch.Generator().manual_seed(2))
    save_reward_model(reward, artifacts / "reward" / "model", tokenizer, "")
    reached = stop_with(model, tokenizer, stop)
    save_model(model, artifacts / "sft" / "model", tokenizer)

    stream = np.array(ids(shape.context * 400), dtype=np.uint16)
    np.save(artifacts / "tokenize" / "pretrain.train.npy", stream)
    np.save(artifacts / "tokenize" / "pretrain.heldout.npy", stream[: 2 * shape.context + 1])
    chats = [(ids(n), n // 3) for n in lengths(draw, CONVERSATIONS, shape.context).tolist()]
    write_sequences(artifacts / "tokenize" / "sft.train.npz", chats)
    write_sequences(artifacts / "tokenize" / "sft.heldout.npz", chats[:8])
    prompts = [ids(int(n)) for n in draw.integers(8, 65, work.PPO_BATCH)]
    write_sequences(artifacts / "tokenize" / "prompts.train.npz", [(p, len(p)) for p in prompts])
    pairs = [[ids(n) for n in triple] for triple in lengths(draw, 3 * PAIRS, 80).reshape(PAIRS, 3).tolist()]
    for split, chosen in (("train", pairs), ("heldout", pairs[:8])):
        rows = [opinion(p, a, v) for p, better, worse in chosen for a, v in ((better, 1), (worse, -1))]
        (artifacts / "snapshot" / f"opinions.{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    race = {
        "conversations": chats,
        "pairs": pairs,
        "stream": stream.tolist(),
        "prompts": [ids(work.PROMPT) for _ in range(work.GENERATION_PROMPTS)],
        "ppo_prompts": prompts,
        "stop_id": tokenizer.stop_id,
        "pad_id": tokenizer.special["<|pad|>"],
        "stop_probability": reached,
    }
    (folder / "race.json").write_text(json.dumps(race), encoding="utf-8")
    return 0


def words(vocabulary: int) -> Tokenizer:
    """A tokenizer of that many words, the chat template's special tokens first; races hand over ids, never text."""
    names = [*SPECIAL, *(f"w{i}" for i in range(vocabulary - len(SPECIAL)))]
    inner = tokenizers.Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[-1]))
    inner.add_special_tokens(list(SPECIAL))
    return Tokenizer(inner)


def lengths(draw: np.random.Generator, count: int, longest: int) -> np.ndarray:
    """Log-normal lengths in tokens, 8 to `longest`."""
    mean = min(MEAN_LENGTH, longest / 2)
    drawn = draw.lognormal(math.log(mean) - SPREAD**2 / 2, SPREAD, count)
    return np.clip(drawn, 8, longest).astype(int)


@torch.no_grad()
def stop_with(model: Transformer, tokenizer: Tokenizer, probability: float) -> float:
    """Change the weights so that the stop token is sampled with this probability at every step, other special tokens
    almost never (under 1e-6); returns the mean probability reached.

    All embeddings get the same number in their first place. It stands out in the residual stream, so the last hidden
    state has about the same first place everywhere; the tied output layer turns that into an equal shift of all
    logits, which softmax does not see, but for the tokens whose own first place is another.
    """
    weight = model.head_weight
    weight[:, 0] = COMMON
    for name in SPECIAL:
        weight[tokenizer.special[name], 0] = -3 * COMMON
    rows = torch.randint(len(SPECIAL), len(weight), (8 * 64,), generator=torch.Generator().manual_seed(3))
    hidden = model(rows, dense_layout(8, 64))
    stop = tokenizer.stop_id
    reached = 0.0
    low, high = 0.0, 10 * COMMON
    for _ in range(30 if probability else 0):
        weight[stop, 0] = (low + high) / 2
        reached = float(torch.softmax(model.logits(hidden), -1)[:, stop].mean())
        low, high = ((low + high) / 2, high) if reached < probability else (low, (low + high) / 2)
    return reached


def write_sequences(path: Path, rows: list[tuple[list[int], int]]) -> None:
    """Rows of ids, the first `prompt` of each outside the loss."""
    tokens = np.array([i for ids, _ in rows for i in ids], dtype=np.uint16)
    learned = np.array([at >= prompt for ids, prompt in rows for at in range(len(ids))])
    offsets = np.cumsum([0, *(len(ids) for ids, _ in rows)])
    Sequences(tokens, learned, offsets).save(path)


def opinion(prompt: list[int], answer: list[int], value: int) -> str:
    """One line of a snapshot: a thumb."""
    return json.dumps({"kind": "thumb", "prompt_ids": prompt, "response_ids": answer, "value": value}) + "\n"


if __name__ == "__main__":
    sys.exit(main())
