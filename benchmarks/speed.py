"""Races: ours and a peer on the same model shape, data and hardware, in turns, a fresh process each.

    python -m benchmarks.speed                      # every row at 1m, five pairs each
    python -m benchmarks.speed sft ppo --size 10m --pairs 3

The metric is work per CPU second (user and system, one torch thread) of the measured section, after a warm-up: on a
shared machine CPU seconds say what wall time does not. Each row prints the median of the pairs' ratios and their
spread, the peak memory of both, and how far ours is from what the machine can do, and adds one JSON line to
.thumbwheel/benchmarks.jsonl; `python -m benchmarks.speed_page` writes docs/benchmarks.md from those lines. Exits 1 when a
row is under its bar.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers import CHECKOUT, python_of
from benchmarks.races import work

OUTPUT = CHECKOUT / ".thumbwheel" / "benchmarks.jsonl"


@dataclass(frozen=True)
class Row:
    """One race. ours and peer: (module, work) under benchmarks.races; environment: the peer's; unit: of the work;
    stop: the probability that an answer ends at a step; must and aim: the ratio asked for and hoped for, by size."""

    name: str
    title: str
    peer_title: str
    ours: str
    peer: tuple[str, str]
    environment: str
    unit: str
    stop: float = 0.0
    must: tuple[tuple[str, float], ...] = ()
    aim: tuple[tuple[str, float], ...] = ()


def bar(small: float, large: float, large_size: str = "10m") -> tuple[tuple[str, float], ...]:
    """A bar for both sizes."""
    return (("1m", small), (large_size, large))


TRAINERS, NEWEST = "trl_trainers", "trl-1.16"
SFT, PACKED = "SFT, skewed lengths", "SFT, about 2,000 tokens a step"
PADDED_PEER, PACKED_PEER = "TRL 1.16 SFTTrainer, padded", "TRL 1.16 SFTTrainer, packing bfd"
KEPT = ", gradient checkpointing off"
ENDS = work.STOP_PROBABILITY
ROWS = (
    Row(
        *("pretrain", "pretraining step, context 256", "transformers 5.23 Trainer"),
        *("pretrain", (TRAINERS, "pretrain"), NEWEST, "tokens"),
        must=bar(1.6, 1.15),
        aim=bar(2.1, 1.3),
    ),
    Row(
        *("sft", SFT, PADDED_PEER, "sft", (TRAINERS, "sft"), NEWEST, "tokens"),
        must=bar(5, 3.2),
        aim=bar(8, 4.5),
    ),
    Row("sft-kept", SFT, PADDED_PEER + KEPT, "sft", (TRAINERS, "sft_kept"), NEWEST, "tokens"),
    Row(
        *("sft-packed", PACKED, PACKED_PEER, "sft_packed", (TRAINERS, "sft_packed"), NEWEST, "tokens"),
        must=bar(3.6, 2.1),
        aim=bar(5, 2.7),
    ),
    Row("sft-packed-kept", PACKED, PACKED_PEER + KEPT, "sft_packed", (TRAINERS, "sft_packed_kept"), NEWEST, "tokens"),
    Row(
        *("reward", "reward model", "TRL 1.16 RewardTrainer", "reward", (TRAINERS, "reward"), NEWEST, "pairs"),
        must=bar(2.5, 2.4),
        aim=bar(3.5, 3),
    ),
    Row(
        "reward-kept",
        "reward model",
        "TRL 1.16 RewardTrainer" + KEPT,
        "reward",
        (TRAINERS, "reward_kept"),
        NEWEST,
        "pairs",
    ),
    Row(
        *("generate", "generation, 256 prompts through 64 slots", "transformers 5.23 generate, batches of 64"),
        *("generate", ("transformers_generate", "generate"), NEWEST, "tokens", ENDS),
        must=bar(4.3, 2.1),
        aim=bar(6, 2.5),
    ),
    Row(
        *("generate-one", "generation, batch 1, width 1", "transformers 5.23 generate"),
        *("generate_one", ("transformers_generate", "generate_one"), NEWEST, "tokens"),
        must=bar(4, 1.3, "135m"),
        aim=bar(5, 2, "135m"),
    ),
    Row(
        *("ppo", "PPO iteration, own critic", "TRL 1.12 experimental PPO"),
        *("ppo", ("trl_ppo", "ppo"), "trl-1.12", "episodes", ENDS),
        must=bar(2.7, 1.9),
        aim=bar(4.5, 2.7),
    ),
    Row(
        *("ppo-kept", "PPO iteration, own critic", "TRL 1.12 experimental PPO" + KEPT),
        *("ppo", ("trl_ppo", "ppo_kept"), "trl-1.12", "episodes", ENDS),
    ),
    Row(
        *(
            "ppo-full",
            "PPO iteration, shared critic, every answer full length",
            "TRL 0.11.4 PPOTrainer.step, value head on the policy",
        ),
        *("ppo_shared", ("trl_ppo_step", "ppo"), "trl-0.11", "episodes"),
        must=bar(2.3, 1.6),
        aim=bar(3, 2),
    ),
)


def environment() -> dict[str, str]:
    """What every run is started with: one thread, no hub."""
    fixed = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **fixed, "PYTHONPATH": str(CHECKOUT)}


def run(python: Path | str, module: str, *arguments: str | Path) -> dict[str, Any]:
    """Run a module of benchmarks.races in a process of its own; what it wrote. Raises RuntimeError with its last lines."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command = [str(python), "-m", f"benchmarks.races.{module}", *map(str, arguments), str(output)]
        done = subprocess.run(command, cwd=CHECKOUT, env=environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        found: dict[str, Any] = work.read_json(output)
        return found


@contextmanager
def workspace(size: str, stop: float) -> Iterator[Path]:
    """A folder that both sides read, made anew: `stop` is the probability that an answer ends at a step."""
    with tempfile.TemporaryDirectory(prefix="race-") as folder:
        command = [sys.executable, "-m", "benchmarks.races.prepare", size, folder, str(stop)]
        subprocess.run(command, cwd=CHECKOUT, env=environment(), check=True)
        yield Path(folder)


def race(row: Row, size: str, pairs: int) -> dict[str, Any]:
    """Run a row: ours, peer, ours, peer, … Returns its record."""
    peer = python_of(row.environment)
    limits = run(sys.executable, "limits", 4 * work.SHAPES[size].weights)
    ours, theirs = [], []
    with workspace(size, row.stop) as folder:
        for _ in range(pairs):
            ours.append(run(sys.executable, "ours", row.ours, size, folder))
            theirs.append(run(peer, row.peer[0], row.peer[1], size, folder))
    return {
        "row": row.name,
        "size": size,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "revision": revision(),
        "unit": row.unit,
        **compared(ours, theirs),
        **asked(row, size),
        **distance(row, size, ours, limits),
        "machine": machine() | limits,
        "ours_runs": ours,
        "peer_runs": theirs,
    }


def compared(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of both sides' work per CPU second and peak memory, and of the pairs' ratios with their ends."""
    rates = [[r["work"] / r["cpu_seconds"] for r in runs] for runs in (ours, theirs)]
    ratios = [a / b for a, b in zip(*rates, strict=True)]
    memory = [statistics.median(r["peak_mb"] for r in runs) for runs in (ours, theirs)]
    return {
        "pairs": len(ratios),
        "ours": statistics.median(rates[0]),
        "peer": statistics.median(rates[1]),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "ours_mb": memory[0],
        "peer_mb": memory[1],
        "memory_ratio": memory[1] / memory[0],
    }


def asked(row: Row, size: str) -> dict[str, float | None]:
    """The row's bars at this size."""
    return {"must": dict(row.must).get(size), "aim": dict(row.aim).get(size)}


def distance(row: Row, size: str, ours: Sequence[dict[str, Any]], limits: dict[str, float]) -> dict[str, Any]:
    """What the machine could do at most in the row's unit, and the share of it that ours reached.

    Training and scoring: the operations that the work needs at least, at the matrix product's peak. Decoding at batch 1:
    the weights' bytes once a token, at their bandwidth.
    """
    shape = work.SHAPES[size]
    shares = []
    for r in ours:
        if "bytes" in r:
            least = r["bytes"] / limits["gbs"] / 1e9
        else:
            least = needed(row, shape, r) / limits["gflops"] / 1e9
        shares.append(least / r["cpu_seconds"])
    share = statistics.median(shares)
    rate = statistics.median(r["work"] / r["cpu_seconds"] for r in ours)
    return {"limit": rate / share, "share_of_limit": share}


def needed(row: Row, shape: work.Shape, result: dict[str, Any]) -> float:
    """Floating-point operations that a run's work takes at least."""
    if "flops" in result:
        return float(result["flops"])
    windows = result["work"] // shape.context
    return 3 * shape.forward([shape.context] * windows, result["work"])


def machine() -> dict[str, Any]:
    """The processor and the number of its cores."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = " ".join(line for line in lines if line.startswith("flags")).split()
    wide = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if name in flags]
    return {"processor": names[0] if names else "unknown", "cores": os.cpu_count(), "vectors": wide}


def revision() -> str:
    """The checkout's commit."""
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False).stdout.strip()


def line(record: dict[str, Any]) -> str:
    """What a row prints."""
    bars = "" if record["must"] is None else f", must {record['must']:g}, aim {record['aim']:g}"
    return (
        f"{record['row']} {record['size']}: {record['ratio']:.2f}x ({record['ratio_low']:.2f}-{record['ratio_high']:.2f}"
        f", {record['pairs']} pairs{bars}); {record['ours']:,.1f} against {record['peer']:,.1f} {record['unit']}/cpu-s; "
        f"{record['ours_mb']:,.0f} against {record['peer_mb']:,.0f} MB ({record['memory_ratio']:.2f}x less); "
        f"{record['share_of_limit']:.0%} of {record['limit']:,.0f} {record['unit']}/cpu-s at most"
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(row.name for row in ROWS))
    parser.add_argument("--size", choices=list(work.SHAPES), default="1m")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    known = {row.name: row for row in ROWS}
    if unknown := [name for name in arguments.rows if name not in known]:
        parser.error(f"{', '.join(unknown)}: no such row; rows are {', '.join(known)}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    missed = False
    for name in arguments.rows or known:
        record = race(known[name], arguments.size, arguments.pairs)
        print(line(record), flush=True)
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        missed |= record["must"] is not None and record["ratio"] < record["must"]
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
