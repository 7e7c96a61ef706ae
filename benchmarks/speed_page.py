"""The page of figures: `python -m benchmarks.speed_page` writes docs/benchmarks.md from what benchmarks.speed measured.

Of each row and size the newest record counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import overhead
from benchmarks.peers import CHECKOUT, PINS
from benchmarks.races import work
from benchmarks.speed import OUTPUT, ROWS, Row
from flows.files import write_text

Record = Mapping[str, Any]
MEMORY_ROWS = ("sft", "sft-packed", "ppo", "ppo-full")
MEMORY_BARS = {"1m": 1.5, "10m": 1.3}  # times less than the peer; twice less is the aim

HEAD = """# Benchmarks

Written by `python -m benchmarks.speed_page` from what `python -m benchmarks.speed` measured; every figure here was measured.

Ours and a peer do the same work on the same machine in turns (ours, peer, ours, peer, …), each run a fresh process with one
torch thread. A rate is work per CPU second, user and system of the whole process, between the end of the warm-up and the
end of the last step: on a machine that others use too, CPU seconds say what wall time does not. Busy neighbours still cost
cache and memory bandwidth, so trust the ratios of pairs before the rates. The ratio is the median of the pairs' ratios,
with the lowest and the highest. Bars are ratios: what the project asks of itself, and what it aims at. They were set by
measurements on another processor (AVX-512, 160 GFLOP/s a thread)."""

SAME = """## What is alike and what is not

- **Models**: Llama-style decoders with random weights and tied embeddings. {shapes}. Both sides of a row read the same
  folder (pretraining starts from random weights of its own). fp32.
- **Data**: token ids by fixed seeds. Conversations have log-normal lengths, {conversations} tokens on average, and fill 44 %
  of a batch of 8 padded to its longest; the last two thirds of each are in the loss. Real tokens are counted, never pads.
- **Stopping**: random weights do not end an answer. Where answers may end early, the weights are changed so that the stop
  token has probability {stop:.0%} at every step, for both sides by the same weights (`benchmarks/races/prepare.py`);
  elsewhere it is never sampled.
- **Defaults**: the peers run as they document, so TRL computes activations twice (gradient checkpointing is its default).
  The rows that say "gradient checkpointing off" show how much of the gain that alone would give TRL's users; they have no
  bar. The one default not kept is bf16: both sides compute in fp32 (without bf16 units a CPU is several times slower in it).
- **Allocator**: our stages ask glibc's malloc to keep large blocks (`models/allocator.py`), as every run of ours does; the
  peers run with malloc's defaults. A user of theirs could set the same.
- **Optimizer**: AdamW on both sides. Ours clips the gradient's norm in every stage, as transformers' Trainer and TRL's SFT
  and reward trainers do; TRL's PPO does not.
- **Generation**: sampling at temperature 1 without filters; ours also returns the log-probability of each token.
- **PPO**: batch {batch}, prompts of 8 to 64 tokens, up to {new} new ones, {epochs} epochs of {minibatches} minibatches,
  policy, reference, reward model and critic of one size, learning rate {rate:g} so that answers keep their length. TRL 1.12
  and ours step once a minibatch. Beside TRL 0.11.4, whose critic is a head on the policy, ours runs with
  `ppo.critic: shared`, which is the same.
- **Peak memory** is the process's greatest resident size from start to the end of the measured part, libraries included."""

LIMITS = """## Limits

A limit is what the machine could do at most, measured beside each row: for training, scoring and generation through many
slots the operations that the work needs at least (2 a weight and real token forward, 4 more backward, causal attention,
the output layer only where a token is predicted, a pair's prompt once) at the speed of a large matrix product; for batch
1 the bytes of all weights once a token, at the bandwidth of a matrix-vector product over as many bytes."""


def newest(lines: Iterable[str]) -> dict[tuple[str, str], Record]:
    """The last record of each row and size."""
    found: dict[tuple[str, str], Record] = {}
    for line in lines:
        record = json.loads(line)
        found[record["row"], record["size"]] = record
    return found


def page(records: Mapping[tuple[str, str], Record]) -> str:
    """docs/benchmarks.md."""
    parts = [HEAD, "## Machine", machines(records.values())]
    for size in work.SHAPES:
        rows = [(row, records[row.name, size]) for row in ROWS if (row.name, size) in records]
        if rows:
            parts += [f"## {size.upper()} parameters", races(rows)]
    parts += ["## Memory", memory(records), LIMITS, same()]
    return "\n\n".join(parts) + "\n"


def machines(records: Iterable[Record]) -> str:
    """Where and when it was measured."""
    seen = {}
    for record in records:
        m = record["machine"]
        key = f"{m['processor']}, {m['cores']} cores, {', '.join(m['vectors'])}"
        seen.setdefault(key, []).append((m["gflops"], record["date"]))
    lines = []
    for key, found in seen.items():
        speeds, dates = zip(*found, strict=True)
        when = " to ".join(sorted({min(dates), max(dates)}))
        lines.append(
            f"{key}; {min(speeds):.0f} to {max(speeds):.0f} GFLOP/s in a 2048³ fp32 product, one thread; {when}."
        )
    pins = "; ".join(", ".join(p for p in pinned if not p.startswith("numpy")) for pinned in PINS.values())
    return "\n".join([*lines, "", f"Peers, each in an environment of its own (`python -m benchmarks.peers`): {pins}."])


def races(rows: Sequence[tuple[Row, Record]]) -> str:
    """The table of one size."""
    heads = ["work", "peer", "ours", "peer's", "ratio (spread, pairs)", "must", "aim", "of the limit", "command"]
    lines = []
    for row, r in rows:
        unit = f"{r['unit']}/CPU-s"
        size = "" if r["size"] == "1m" else f" --size {r['size']}"
        met = "" if r["must"] is None or r["ratio"] >= r["must"] else ", missed"
        lines.append(
            [
                row.title,
                row.peer_title,
                f"{rate(r['ours'])} {unit}",
                rate(r["peer"]),
                f"**{r['ratio']:.2f}×** ({r['ratio_low']:.2f} to {r['ratio_high']:.2f}, {r['pairs']})",
                "–" if r["must"] is None else f"{r['must']:g}×{met}",
                "–" if r["aim"] is None else f"{r['aim']:g}×",
                f"{r['share_of_limit']:.0%} of {rate(r['limit'])}",
                f"`python -m benchmarks.speed {row.name}{size} --pairs {r['pairs']}`",
            ]
        )
    return table(heads, lines)


def memory(records: Mapping[tuple[str, str], Record]) -> str:
    """Peak memory of the rows that have a bar for it, from the same runs."""
    lines = []
    for row in ROWS:
        for size, bar in MEMORY_BARS.items():
            r = records.get((row.name, size))
            if r is None or row.name not in MEMORY_ROWS:
                continue
            met = "" if r["memory_ratio"] >= bar else ", missed"
            figures = [f"{r['ours_mb']:,.0f} MB", f"{r['peer_mb']:,.0f} MB", f"**{r['memory_ratio']:.2f}×** less"]
            lines.append([row.title, row.peer_title, size.upper(), *figures, f"{bar:g}×{met}", "2×"])
    return table(["work", "peer", "size", "ours", "peer's", "ratio", "must", "aim"], lines)


def same() -> str:
    """What is alike and what is not, with the figures in force."""
    shapes = "; ".join(
        f"{name.upper()}: {s.layers} layers of width {s.hidden}, {s.heads} heads over {s.kv_heads}, "
        f"feed-forward {s.ffn}, vocabulary {s.vocabulary:,}"
        for name, s in work.SHAPES.items()
    )
    return SAME.format(
        shapes=shapes,
        conversations=80,
        stop=work.STOP_PROBABILITY,
        batch=work.PPO_BATCH,
        new=work.PPO_NEW,
        epochs=work.PPO_EPOCHS,
        minibatches=work.PPO_MINIBATCHES,
        rate=work.PPO_RATE,
    )


def rate(value: float) -> str:
    """A rate with three or four digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed_page", description=__doc__.split("\n")[0])
    parser.add_argument("--input", type=Path, default=OUTPUT)
    parser.add_argument("--output", type=Path, default=CHECKOUT / "docs" / "benchmarks.md")
    arguments = parser.parse_args()
    with arguments.input.open(encoding="utf-8") as file:
        text = page(newest(file))
    if arguments.output.exists():
        text = overhead.with_section(text, overhead.kept(arguments.output.read_text(encoding="utf-8")))
    write_text(arguments.output, text)
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
