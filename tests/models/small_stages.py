"""A workspace with tiny random models and token arrays, and training stages run in this process on it."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models import dpo, kto, ppo, pretrain, reward, sft
from models.checkpoint import save_model
from models.corpus import Sequences, conversations, prompts, text_stream
from models.job import Job
from models.ranks import Ranks
from models.reward import RewardModel, save_reward_model
from models.tokenizer import Tokenizer
from models.transformer import Transformer

BODIES = {
    "pretrain": pretrain.run, "sft": sft.run, "reward": reward.run, "ppo": ppo.run, "dpo": dpo.run, "kto": kto.run,
}  # fmt: skip
WORDS = ["hello", "there", "how", "are", "you", "I", "am", "fine", "thank", "what", "do", "like", "to", "eat"]


class Killed(BaseException):
    """Stands for SIGKILL in a stage that runs in the test's own process."""


def make_workspace(root: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    """What the training stages read. The pretrained model and the SFT model are `model`."""
    rng = random.Random(0)

    def sentence(count: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(count))

    for stage in ("pretrain", "sft"):
        save_model(model, root / "artifacts" / stage / "model", tokenizer)
    judge = RewardModel(model).initialize(torch.Generator().manual_seed(7))
    save_reward_model(judge, root / "artifacts/reward/model", tokenizer, "card")
    chats = [
        [{"role": "user", "content": sentence(2)}, {"role": "assistant", "content": sentence(rng.randrange(1, 5))}]
        for _ in range(24)
    ]
    out = root / "artifacts/tokenize"
    out.mkdir(parents=True)
    tokenizer.save(out / "tokenizer")
    text = text_stream(tokenizer, [sentence(20) for _ in range(20)])
    for split in ("train", "heldout"):
        np.save(out / f"pretrain.{split}.npy", text)
    for split, rows in (("train", chats), ("heldout", chats[:6])):
        conversations(tokenizer, rows, 48)[0].save(out / f"sft.{split}.npz")
    prompts(tokenizer, [chat[:1] for chat in chats], 24)[0].save(out / "prompts.train.npz")
    nothing_written(root)
    make_snapshot(root, rng)


def nothing_written(root: Path) -> None:
    """What SFT and PPO read of people's own words where nobody wrote any."""
    for place in ("written/sft.npz", "snapshot/prompts.npz"):
        (root / "artifacts" / place).parent.mkdir(parents=True, exist_ok=True)
        Sequences.none().save(root / "artifacts" / place)


def make_snapshot(root: Path, rng: random.Random) -> None:
    """Opinions of answers of random tokens: prompts with one to three thumbs, comparisons and rankings."""

    def ids(longest: int) -> list[int]:
        return [rng.randrange(20, 250) for _ in range(rng.randint(1, longest))]

    folder = root / "artifacts/snapshot"
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 13), ("heldout", 5)):
        rows: list[dict[str, Any]] = []
        for n in range(count):
            prompt, kind = ids(9), ("thumb", "comparison", "ranking")[n % 3]
            ranked = [{"response_ids": ids(9), "rank": rank} for rank in range(3)]
            if kind == "thumb":
                rows += [{"response_ids": ids(9), "value": v} for v in (1, -1, rng.choice((1, -1)))[: 1 + n % 4]]
            else:
                rows.append(
                    {"chosen_ids": ids(9), "rejected_ids": ids(8)} if kind == "comparison" else {"answers": ranked}
                )
            rows = [{"kind": kind, "prompt_ids": prompt, **row} if "kind" not in row else row for row in rows]
        (folder / f"opinions.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_stage(
    root: Path,
    stage: str,
    where: Path,
    params: Mapping[str, Any],
    killed_after: int | None = None,
    ranks: Ranks = Ranks(),
) -> tuple[Path, list[dict[str, Any]]]:
    """Run a stage with `where` as its work folder and output; returns the output and the events.

    With killed_after it ends by Killed once so many steps are reported.
    """
    events: list[dict[str, Any]] = []

    def emit(event: dict[str, Any]) -> None:
        events.append(json.loads(json.dumps(event)))
        if killed_after is not None and event.get("step") == killed_after:
            raise Killed

    made = ("pretrain", "sft", "reward", "tokenize", "snapshot", "written")
    deps = tuple(f"artifacts/{name}" for name in made)
    output = where / "output"
    output.mkdir(parents=True, exist_ok=True)
    BODIES[stage](Job(stage, root, deps, output, where, {"seed": 3, **params}, emit=emit, ranks=ranks))
    return output, events
