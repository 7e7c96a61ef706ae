"""The evidence: the whole main job on several seeds, every one reported, in docs/evidence.md.

    python -m benchmarks.evidence --seeds 1 2 3 4 5

Each seed runs `thumbwheel demo` in a workspace of its own (a copy of the checkout under --workdir), so nothing of the
checkout's own records is touched. The workspaces share one DVC cache: the data stages, equal for all seeds, run once. A
seed that is done is kept, as long as data, parameters and code are what they were. Exits 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import preferences
from flows import code_deps, settings
from flows.figures import Interval, pooled_paired_bootstrap
from flows.files import write_text
from flows.pipeline import METHODS

CHECKOUT = Path(__file__).resolve().parents[1]
PREFIXES = ("THUMBWHEEL_", "PREFECT_", "MLFLOW_", "DVC_")
KEPT = {"report": "artifacts/judge/report.json", "reward": "artifacts/reward/metrics.json"}
ANSWERS = "artifacts/judge/answers.jsonl"


@dataclass(frozen=True)
class Result:
    """What one seed came to. report: of the judge; reward: metrics of the reward model; thumbs and second: the two
    judges' (candidate's, SFT model's) outcomes prompt by prompt; wall_seconds: of the whole main job."""

    seed: int
    report: dict[str, Any]
    reward: dict[str, float]
    thumbs: tuple[list[bool], list[bool]]
    second: tuple[list[bool], list[bool]]
    wall_seconds: float

    @property
    def against_sft(self) -> dict[str, Any]:
        """The candidate compared with the SFT model."""
        found: dict[str, Any] = self.report["comparisons"]["sft"]
        return found

    @property
    def candidate(self) -> dict[str, Any]:
        """The candidate's figures."""
        found: dict[str, Any] = self.report["candidate"]
        return found


# ---------------------------------------------------------------- running


def main() -> int:
    """The command line."""
    from benchmarks import wheel  # which builds on this module

    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--workdir", type=Path, default=CHECKOUT / ".thumbwheel" / "evidence")
    parser.add_argument("--output", type=Path, default=CHECKOUT / "docs" / "evidence.md")
    parser.add_argument("--preset", default="", help="another preset than params.yaml as it stands")
    arguments = parser.parse_args()
    results = [run_seed(seed, arguments.workdir.resolve(), arguments.preset) for seed in arguments.seeds]
    text = preferences.with_section(document(results, revision()), preferences.PAGE)
    if arguments.output.exists():
        text = wheel.with_section(text, wheel.kept(arguments.output.read_text(encoding="utf-8")))
    write_text(arguments.output, text)
    missed = [bar.name for bar in bars(results) if not bar.holds]
    print(f"{arguments.output}: " + (f"missed: {'; '.join(missed)}" if missed else "all bars hold"))
    return 1 if missed else 0


def run_seed(seed: int, workdir: Path, preset: str = "") -> Result:
    """The result of one seed, from an earlier run of the same code, data and parameters where there is one.

    Raises RuntimeError, naming the log, when the main job fails; run it again and it goes on from its checkpoints.
    """
    root, kept = workdir / f"seed-{seed}", workdir / "results" / f"seed-{seed}"
    prepare(root, workdir / "cache", seed, preset)
    stamp = identity(root)
    if (kept / "stamp.json").exists():
        before = json.loads((kept / "stamp.json").read_text(encoding="utf-8"))
        if before["identity"] == stamp:
            print(f"seed {seed}: done before")
            return read_result(seed, kept, before["seconds"])
    print(f"seed {seed}: running in {root}", flush=True)
    started = time.monotonic()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(PREFIXES)}
    log = workdir / f"seed-{seed}.log"
    with log.open("wb") as file:
        command = [str(Path(sys.executable).with_name("thumbwheel")), "demo"]
        status = subprocess.run(command, cwd=root, env=environment, stdout=file, stderr=file, check=False).returncode
    if status:
        raise RuntimeError(f"seed {seed}: `thumbwheel demo` in {root} ended with {status}, see {log}")
    seconds = round(time.monotonic() - started, 1)
    keep(root, kept, {"identity": stamp, "seconds": seconds})
    return read_result(seed, kept, seconds)


def prepare(root: Path, cache: Path, seed: int, preset: str = "") -> None:
    """Bring the workspace of a seed in line with the checkout; what its stages made stays."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=CHECKOUT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        source, target = CHECKOUT / name, root / name
        if source.is_file() and not (target.exists() and target.read_bytes() == source.read_bytes()):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    if (CHECKOUT / "data").is_dir() and not (root / "data").exists():
        shutil.copytree(CHECKOUT / "data", root / "data")
    # a copy is no git repository; its stages may come from what another seed's made
    write_text(root / ".dvc" / "config.local", f"[core]\n    no_scm = true\n[cache]\n    dir = {cache}\n")
    if preset:
        settings.set_params(root, settings.preset(preset))
    settings.set_params(root, {"seed": seed})


def identity(root: Path) -> str:
    """A hash of what decides the figures: parameters, the data's hash, the stages and their source files."""
    others = {method for method in METHODS if method != settings.load(root).align.method}
    code = {path for stage, paths in code_deps.declared(root).items() if stage not in others for path in paths}
    names = sorted({"params.yaml", "data.dvc", "dvc.yaml", "flows/rater.py", *code})
    hashes = [
        (name, hashlib.sha256((root / name).read_bytes()).hexdigest()) for name in names if (root / name).exists()
    ]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def keep(root: Path, kept: Path, stamp: Mapping[str, Any]) -> None:
    """Copy a seed's figures out of its workspace; the stamp goes last, because it says that the rest is whole."""
    for name, path in KEPT.items():
        write_text(kept / f"{name}.json", (root / path).read_text(encoding="utf-8"))
    write_text(kept / "answers.jsonl", (root / ANSWERS).read_text(encoding="utf-8"))
    write_text(kept / "stamp.json", json.dumps(stamp))


def read_result(seed: int, kept: Path, seconds: float) -> Result:
    """A seed's result from what `keep` wrote."""
    rows = [json.loads(line) for line in (kept / "answers.jsonl").read_text(encoding="utf-8").splitlines()]

    def outcomes(judge: str) -> tuple[list[bool], list[bool]]:
        return [bool(row["candidate"][judge]) for row in rows], [bool(row["sft"][judge]) for row in rows]

    report, reward = (json.loads((kept / f"{name}.json").read_text(encoding="utf-8")) for name in ("report", "reward"))
    return Result(seed, report, reward, outcomes("thumb"), outcomes("second"), seconds)


def revision() -> str:
    """The checkout's commit."""
    from flows.record import code_revision

    return code_revision(CHECKOUT)


# ---------------------------------------------------------------- the bars


@dataclass(frozen=True)
class Bar:
    """One promise: its name, what was seen, and whether it holds."""

    name: str
    seen: str
    holds: bool


def pooled(results: Sequence[Result], pairs: Callable[[Result], tuple[list[bool], list[bool]]]) -> Interval:
    """The mean gain over seeds; its interval resamples seeds, and prompts within each."""
    return pooled_paired_bootstrap([pairs(result) for result in results], resamples=10_000, seed=0)


def bars(results: Sequence[Result]) -> list[Bar]:
    """Every bar over all seeds given; one seed's miss is the bar's."""
    thumbs, second = pooled(results, lambda r: r.thumbs), pooled(results, lambda r: r.second)
    gains = [r.against_sft["thumbs_up_gain"] for r in results]

    def most(name: str, key: str, limit: float) -> Bar:
        worst = max(r.candidate[key] for r in results)
        return Bar(name, f"{worst:.3f} at most", worst <= limit)

    ratios = [r.against_sft["perplexity_ratio"] for r in results]
    kept = [kept_relevance(r) for r in results]
    ended = [r.candidate["ended_share"] / r.report["sft"]["ended_share"] for r in results]
    distinct, kl = (
        min(r.candidate["distinct_answers"] for r in results),
        max(r.candidate["kl_per_answer"] for r in results),
    )
    prompts, rated = min(r.report["prompts"] for r in results), min(int(r.reward["heldout"]) for r in results)
    lead = min(r.reward["accuracy_low"] - r.reward["majority"] for r in results)
    return [
        Bar("mean gain in thumbs-up rate: 95 % interval above 0.20", shown(thumbs), thumbs.low > 0.20),
        Bar("worst seed gains at least 0.10", f"{min(gains):+.3f}", min(gains) >= 0.10),
        Bar("second judge gains at least 0.05 on average", shown(second), second.value >= 0.05),
        most("most common answer at most 5 %", "most_common_share", 0.05),
        Bar("distinct answers at least 90 %", f"{distinct:.3f} at least", distinct >= 0.90),
        Bar("relevance keeps at least half", f"{min(kept):.2f} at least", min(kept) >= 0.5),
        Bar(
            "answers that end at least 75 % of the SFT model's share", f"{min(ended):.2f} at least", min(ended) >= 0.75
        ),
        Bar("held-out perplexity at most 1.10 times", f"{max(ratios):.3f} at most", max(ratios) <= 1.10),
        Bar("KL under 15 nats an answer", f"{kl:.2f} at most", kl < 15),
        Bar("judged on at least 300 prompts", str(prompts), prompts >= 300),
        Bar("reward model: at least 1,000 held-out rated answers", f"{rated:,}", rated >= 1000),
        Bar("reward model: accuracy's interval above the majority class", f"{lead:+.3f} at least", lead > 0),
    ]


def kept_relevance(result: Result) -> float:
    """The share of the SFT model's relevance that the candidate keeps; 0 where there was none to keep."""
    kept = result.against_sft["relevance_kept"]
    return 0.0 if kept is None else float(kept)


# ---------------------------------------------------------------- the page


def document(results: Sequence[Result], code: str) -> str:
    """docs/evidence.md."""
    seeds = " ".join(str(r.seed) for r in results)
    judges = results[0].report["judges"]
    parts = [
        "# Evidence",
        f"Written by `python -m benchmarks.evidence --seeds {seeds}` at revision {code[:12]}"
        f"{' with local changes' if code.endswith('-dirty') else ''}. All seeds that were run are here.",
        "People are simulated: thumbs are given by a word list (thumb up = "
        f"{judges['thumbs_up']}), and the second judge ({judges['second_judge']}) is another one. So the figures show "
        "that the wheel turns what raters like into a model that they like better, not that people would.",
        "## Bars",
        table(
            ["bar", "seen", "holds"], [[bar.name, bar.seen, "yes" if bar.holds else "**no**"] for bar in bars(results)]
        ),
        "The intervals of the mean gains resample seeds, and prompts within each seed.",
        "## Every seed",
        "SFT model → candidate, on held-out prompts that were used for nothing else. Seconds are of the main job as it "
        "ran, with whatever else the machine did and with what earlier runs had made restored from DVC's cache.",
        table(
            ["seed", "prompts", "thumbs up", "gain", "second judge", "gain", "gate", "seconds"],
            [gains(r) for r in results],
        ),
        "What would tell a gain from a collapse:",
        table(
            [
                *(
                    "seed",
                    "KL, nats an answer",
                    "length, characters",
                    "answers that end",
                    "distinct answers",
                    "most common answer",
                ),
                *("character distinct-4", "relevance, nats an answer", "perplexity"),
            ],
            [health(r) for r in results],
        ),
        "## The reward model",
        "Accuracy on held-out rated answers. The rater is a word list, so a bag of words is a ceiling here, not a floor.",
        table(
            ["seed", "held-out answers", "accuracy", "majority class", "length", "bag of words"],
            [reward(r) for r in results],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def gains(r: Result) -> list[str]:
    """A seed's row of gains."""
    sft = r.report["sft"]
    return [
        str(r.seed),
        str(r.report["prompts"]),
        f"{sft['thumbs_up_rate']:.3f} → {r.candidate['thumbs_up_rate']:.3f}",
        with_ends(r.against_sft, "thumbs_up_gain"),
        f"{sft['second_judge_rate']:.3f} → {r.candidate['second_judge_rate']:.3f}",
        with_ends(r.against_sft, "second_judge_gain"),
        str(r.report["gate"]["decision"]),
        f"{r.wall_seconds:.0f}",
    ]


def health(r: Result) -> list[str]:
    """A seed's row of what a collapse would show in."""
    sft, after = r.report["sft"], r.candidate

    def change(key: str, digits: int = 3) -> str:
        return f"{sft[key]:.{digits}f} → {after[key]:.{digits}f}"

    common = repr(after["most_common_answer"]).replace("|", "\\|")
    return [
        str(r.seed),
        f"{after['kl_per_answer']:.2f}",
        change("length_characters", 1),
        change("ended_share"),
        change("distinct_answers"),
        f"{change('most_common_share')} ({common})",
        change("character_distinct_4"),
        f"{change('relevance', 2)} ({kept_relevance(r):.0%})",
        f"{change('perplexity', 1)} (× {r.against_sft['perplexity_ratio']:.3f})",
    ]


def reward(r: Result) -> list[str]:
    """A seed's row of the reward model."""
    found = r.reward
    interval = f"[{found['accuracy_low']:.3f}, {found['accuracy_high']:.3f}]"
    others = [f"{found[key]:.3f}" for key in ("majority", "length_baseline", "bag_of_words_baseline")]
    return [str(r.seed), f"{int(found['heldout']):,}", f"{found['accuracy']:.3f} {interval}", *others]


def with_ends(figures: Mapping[str, float], name: str) -> str:
    """A signed figure with its interval."""
    return shown(Interval(figures[name], figures[f"{name}_low"], figures[f"{name}_high"]))


def shown(interval: Interval) -> str:
    """A signed figure with its interval."""
    return f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
