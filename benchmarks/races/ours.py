"""Our side of a race: the stage bodies as they are, timed through what they report; the engine for generation.

python -m benchmarks.races.ours WORK SIZE WORKSPACE OUTPUT
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.races import work
from benchmarks.races.meter import Meter
from models.allocator import keep_large_blocks
from models.job import Job

FAR = 10**9  # no checkpoint before the last step


class Clock:
    """Takes a stage's events: starts the meter at the event of step `first`, stops it at the last."""

    def __init__(self, meter: Meter, first: int) -> None:
        self.meter, self.first = meter, first
        self.rows: list[Mapping[str, float]] = []

    def __call__(self, event: Mapping[str, Any]) -> None:
        if event["event"] != "metrics":
            return
        if event["step"] == self.first:
            self.meter.start()
        elif event["step"] == event["total"]:
            self.meter.stop()
        if event["step"] > self.first:
            self.rows.append(event["metrics"])


def stage(name: str, root: Path, meter: Meter, first: int, params: Mapping[str, Any]) -> Clock:
    """Run a stage's body on the workspace; `first` steps are warm-up."""
    import importlib

    clock = Clock(meter, first)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        job = Job(name, root, ("artifacts",), out / "out", out / "work", {"seed": 1, **params}, emit=clock)
        job.output.mkdir()
        importlib.import_module(f"models.{name}").run(job)
    return clock


def training(name: str, batch: int, **options: Any) -> Callable[[str, Path, Meter], None]:
    """A training stage of `batch` rows a step; its work is counted in `count`."""

    def run(size: str, root: Path, meter: Meter) -> None:
        amounts = work.AMOUNTS[size]
        total = amounts.warmup + amounts.steps
        shape = work.SHAPES[size].huggingface()
        model = {k: v for k, v in shape.items() if k != "vocab_size"}
        section = {"batch_size": batch, "checkpoint_every": FAR, "log_every": amounts.warmup, "warmup_steps": 0}
        section |= {"steps": total} if name != "reward" else {}
        stage(name, root, meter, amounts.warmup, {"model": model, name: section | options})

    return run


def pretrain(size: str, root: Path, meter: Meter) -> None:
    """Tokens through pretraining."""
    training("pretrain", work.PRETRAIN_BATCH)(size, root, meter)
    meter.write(work=work.AMOUNTS[size].steps * work.PRETRAIN_BATCH * work.SHAPES[size].context)


def sft(size: str, root: Path, meter: Meter, batch: int = work.SFT_BATCH) -> None:
    """Tokens of the conversations that the measured steps saw."""
    from models.training import batches

    training("sft", batch)(size, root, meter)
    amounts = work.AMOUNTS[size]
    chats = work.read_json(root / "race.json")["conversations"]
    measured = batches(len(chats), batch, 1, amounts.warmup, amounts.warmup + amounts.steps)
    seen = [chats[i] for _, chosen in measured for i in chosen]
    lengths = [len(ids) for ids, _ in seen]
    flops = 3 * work.SHAPES[size].forward(lengths, sum(len(ids) - prompt for ids, prompt in seen))
    meter.write(work=sum(lengths), flops=flops)


def sft_packed(size: str, root: Path, meter: Meter) -> None:
    """As sft, with about as many tokens a step as 8 packed rows have."""
    sft(size, root, meter, work.PACKED_BATCH)


def reward(size: str, root: Path, meter: Meter) -> None:
    """Pairs through the reward model's training."""
    from models.training import batches

    amounts = work.AMOUNTS[size]
    pairs = work.read_json(root / "race.json")["pairs"]
    rows = (amounts.warmup + amounts.steps) * work.REWARD_BATCH
    training("reward", work.REWARD_BATCH, epochs=1, thumb_weight=0.0)(size, first_pairs(root, rows), meter)
    measured = batches(rows, work.REWARD_BATCH, 1, amounts.warmup, amounts.warmup + amounts.steps)
    seen = [pairs[i] for _, chosen in measured for i in chosen]
    shape = work.SHAPES[size]
    flops = 3 * sum(pair_flops(shape, *map(len, triple)) for triple in seen)
    meter.write(work=len(seen), flops=flops)


def first_pairs(root: Path, count: int) -> Path:
    """Keep the snapshot's first pairs, so that an epoch is what is to be measured."""
    path = root / "artifacts" / "snapshot" / "opinions.train.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[: 2 * count]), encoding="utf-8")
    return root


def pair_flops(shape: work.Shape, prompt: int, better: int, worse: int) -> float:
    """A forward pass over a pair at least: its prompt once, each answer attending to the prompt and itself."""
    alone = shape.forward([prompt], 0)
    return alone + sum(shape.forward([prompt + answer], 0) - alone for answer in (better, worse))


def generate(size: str, root: Path, meter: Meter) -> None:
    """New tokens: all prompts through the slots."""
    from models.checkpoint import load_model
    from models.rollout import generate

    race = work.read_json(root / "race.json")
    model = load_model(root / "artifacts" / "sft" / "model")
    settings = {"stop_id": race["stop_id"], "width": work.WIDTH}
    generate(model, race["prompts"][:64], max_new_tokens=8, seeds=range(64), **settings)
    meter.start()
    answers = generate(model, race["prompts"], max_new_tokens=work.NEW, seeds=range(len(race["prompts"])), **settings)
    meter.stop()
    lengths = [work.PROMPT + len(a.ids) for a in answers]
    flops = work.SHAPES[size].forward(lengths, sum(len(a.ids) for a in answers))
    meter.write(work=sum(len(a.ids) for a in answers), flops=flops)


def generate_one(size: str, root: Path, meter: Meter) -> None:
    """New tokens: one prompt after the other, at width 1."""
    from models.checkpoint import load_model
    from models.rollout import generate

    race = work.read_json(root / "race.json")
    model = load_model(root / "artifacts" / "sft" / "model")
    prompts = race["prompts"][: work.AMOUNTS[size].prompts]
    settings = {"stop_id": race["stop_id"], "width": 1}
    generate(model, prompts[:1], max_new_tokens=8, seeds=[1], **settings)
    meter.start()
    made = 0
    for prompt in prompts:
        made += len(generate(model, [prompt], max_new_tokens=work.NEW, seeds=[2], **settings)[0].ids)
    meter.stop()
    meter.write(work=made, bytes=4 * work.SHAPES[size].weights * made)


def ppo(size: str, root: Path, meter: Meter, critic: str = "own") -> None:
    """Episodes through whole PPO iterations, the first one warm-up."""
    iterations = work.AMOUNTS[size].iterations
    options = {
        "iterations": 1 + iterations,
        "batch_size": work.PPO_BATCH,
        "minibatches": work.PPO_MINIBATCHES,
        "epochs": work.PPO_EPOCHS,
        "max_new_tokens": work.PPO_NEW,
        "temperature": 1.0,
        "learning_rate": work.PPO_RATE,
        "critic_learning_rate": work.PPO_RATE,
        "kl_coefficient": work.KL,
        "reward": "score",
        "critic": critic,
        "ptx_coefficient": 0.0,
        "checkpoint_every": FAR,
        "log_every": 1,
    }
    rows = stage("ppo", root, meter, 1, {"ppo": options}).rows
    prompts = [len(ids) for ids in work.read_json(root / "race.json")["ppo_prompts"]]
    answer = sum(row["answer/tokens"] for row in rows) / len(rows)
    meter.write(
        work=iterations * work.PPO_BATCH,
        answer_tokens=answer,
        rollout_share=sum(row["rollout_share"] for row in rows) / len(rows),
        flops=iterations * ppo_flops(work.SHAPES[size], prompts, answer, critic),
    )


def ppo_shared(size: str, root: Path, meter: Meter) -> None:
    """As ppo, with a head on the policy as the critic."""
    ppo(size, root, meter, "shared")


def ppo_flops(shape: work.Shape, prompts: Sequence[int], answer: float, critic: str) -> float:
    """An iteration at least: the rollout, the reference, reward model and critic, and epochs of policy and critic. A head on
    the policy costs nothing."""
    lengths = [n + answer for n in prompts]
    policy, headless = shape.forward(lengths, answer * len(prompts)), shape.forward(lengths, 0)
    own = headless if critic == "own" else 0.0
    return 2 * policy + headless + own + work.PPO_EPOCHS * 3 * (policy + own)


WORKS = {
    "pretrain": pretrain,
    "sft": sft,
    "sft_packed": sft_packed,
    "reward": reward,
    "generate": generate,
    "generate_one": generate_one,
    "ppo": ppo,
    "ppo_shared": ppo_shared,
}


def main() -> int:
    """Run one work and write what was measured."""
    name, size, root, output = sys.argv[1:]
    keep_large_blocks()
    import torch

    torch.set_num_threads(1)
    WORKS[name](size, Path(root), Meter(output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
