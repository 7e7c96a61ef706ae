"""The wheel turning by itself: ten turns of 200 opinions each, with a rater whose taste stays the same.

    python -m benchmarks.wheel

In a workspace of its own (a copy of the checkout under --workdir, with everything that `make up` starts) the SFT model is
trained and crowned. Then, turn by turn, a simulated rater gives opinions over HTTP on the answers of the model that serves,
to training prompts that no turn had before; the bell rings, retraining starts by itself, and the next turn rates what serves
then. Writes its section of docs/evidence.md and a picture. A turn that is done is kept: started again, it goes on with the
next. Exits 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import evidence
from benchmarks.evidence import CHECKOUT, Bar, shown, table
from benchmarks.workspace import Workspace
from flows import settings
from flows.figures import Interval, paired_bootstrap
from flows.files import write_text
from flows.gate import GateOptions

TITLE = "## Turns of the wheel"
PICTURE = "images/wheel_turns.png"
# Every candidate begins at the SFT model: what moves from turn to turn is what is known of the rater. A first reward model
# learns from 200 opinions, so it reads them more often than the demo's, which has 4,300; PPO's KL was seen to stand from its
# third iteration on, so 12 do.
CHANGES = {"rater.enabled": False, "snapshot.heldout_percent": 10, "reward.epochs": 3, "ppo.iterations": 12}
RESAMPLES = 10_000
TURN_SECONDS = 3600.0


@dataclass(frozen=True)
class Turn:
    """One turn. number: 0 is the SFT model before any opinion; asked: thumbs up and down that it gave to the champion before;
    promoted: whether its candidate serves now; champion: figures of what serves now; thumbs: the judge's of each prompt of
    the report; reward: metrics of the reward model; seconds: from the last opinion to the batch consumed, and of the turn.
    """

    number: int
    asked: tuple[int, int]
    promoted: bool
    reasons: list[str]
    candidate_rate: float
    champion: dict[str, Any]
    sft: dict[str, Any]
    thumbs: dict[str, bool]
    second: dict[str, bool]
    reward: dict[str, float]
    seconds: dict[str, float]

    def kept(self, figure: str) -> float:
        """The champion's figure over the SFT model's."""
        return float(self.champion[figure]) / float(self.sft[figure])


# ---------------------------------------------------------------- running


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wheel", description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--opinions", type=int, default=200)
    parser.add_argument("--workdir", type=Path, default=CHECKOUT / ".thumbwheel" / "turns")
    parser.add_argument("--output", type=Path, default=CHECKOUT / "docs" / "evidence.md")
    parser.add_argument("--preset", default="", help="another preset than params.yaml as it stands")
    arguments = parser.parse_args()
    turns = run(arguments.workdir.resolve(), arguments.turns, arguments.opinions, arguments.preset)
    draw(turns, arguments.output.parent / PICTURE)
    code = json.loads((arguments.workdir / "start.json").read_text(encoding="utf-8"))["revision"]
    text = section(turns, arguments.opinions, code)
    write_text(arguments.output, with_section(arguments.output.read_text(encoding="utf-8"), text))
    missed = [bar.name for bar in bars(turns) if not bar.holds]
    print(f"{arguments.output}: " + (f"missed: {'; '.join(missed)}" if missed else "all bars hold"))
    return 1 if missed else 0


def run(workdir: Path, turns: int, opinions: int, preset: str) -> list[Turn]:
    """All turns, those that were done before from their files. Raises RuntimeError when the loop does not turn."""
    changes = {**CHANGES, "bell.opinions": opinions}
    if not (workdir / "start.json").exists():
        write_text(workdir / "start.json", json.dumps({"revision": evidence.revision()}))
    workspace = Workspace(workdir / "workspace", workdir / "cache", preset, changes)
    kept = [workdir / "results" / f"turn-{number:02}.json" for number in range(1, turns + 1)]
    if not all(path.exists() for path in kept):
        workspace.command("up")
        try:
            begin(workspace)
            for number, path in enumerate(kept, start=1):
                if not path.exists():
                    done = turn(workspace, number, opinions)
                    write_text(path, json.dumps(done, indent=1))
                    serving = done["report"]["candidate" if done["promoted"] else "champion_before"]
                    print(f"turn {number}: {serving['thumbs_up_rate']:.3f}, {done['seconds']}", flush=True)
        finally:
            workspace.command("down")
    found = [json.loads(path.read_text(encoding="utf-8")) for path in kept]
    return [start_of(found[0]), *(read_turn(number, each) for number, each in enumerate(found, start=1))]


def begin(workspace: Workspace) -> None:
    """Train the SFT model and crown it, unless something serves."""
    with workspace.store() as store:
        if store.champion() is not None:
            return
    ended = workspace.ended(workspace.start_flow("align"), TURN_SECONDS)
    if ended["state_type"] != "COMPLETED":
        raise RuntimeError(f"align in {workspace.root} ended as {ended['state_type']}: {ended['state']['message']}")


def turn(workspace: Workspace, number: int, opinions: int) -> dict[str, Any]:
    """Rate what serves, wait for the retraining that follows, and return what came of it."""
    params, root, started = settings.load(workspace.root), workspace.root, time.monotonic()
    asked = [0, 0]
    if len(workspace.batches()) < number:
        fresh = workspace.prompts(params.seed)
        share = len(fresh) // 10
        tally = workspace.rate(fresh[(number - 1) % 10 * share :][:share], opinions, params.rater, params.data.language)
        asked = [tally.up, tally.down]
    rated = time.monotonic()
    workspace.consumed(number, TURN_SECONDS)
    ended = time.monotonic()
    report = json.loads((root / "artifacts/judge/report.json").read_text(encoding="utf-8"))
    answers = [json.loads(line) for line in (root / "artifacts/judge/answers.jsonl").open(encoding="utf-8")]
    with workspace.store() as store:
        champion = store.champion()
        assert champion is not None
        promoted = champion.model_hash == report["candidate"]["model_hash"]
    return {
        "asked": asked,
        "promoted": promoted,
        "report": report,
        "reward": json.loads((root / "artifacts/reward/metrics.json").read_text(encoding="utf-8")),
        "thumbs": {role: {a["id"]: a[role]["thumb"] for a in answers} for role in ROLES},
        "second": {role: {a["id"]: a[role]["second"] for a in answers} for role in ROLES},
        "seconds": {
            "rating": round(rated - started, 1),
            "retraining": round(ended - rated, 1),
            "turn": round(ended - started, 1),
        },
    }


ROLES = ("sft", "champion_before", "candidate")


def read_turn(number: int, kept: Mapping[str, Any]) -> Turn:
    """A turn from what `turn` returned."""
    role = "candidate" if kept["promoted"] else "champion_before"
    return serving(number, kept, role, tuple(kept["asked"]), kept["promoted"])


def start_of(first: Mapping[str, Any]) -> Turn:
    """Turn 0: the SFT model, as the first judgement measured it."""
    return serving(0, first, "sft", (0, 0), False)


def serving(number: int, kept: Mapping[str, Any], role: str, asked: Any, promoted: bool) -> Turn:
    """A turn after which the model in `role` serves."""
    report = kept["report"]
    return Turn(
        number=number,
        asked=asked,
        promoted=promoted,
        reasons=list(report["gate"]["reasons"]),
        candidate_rate=float(report["candidate"]["thumbs_up_rate"]),
        champion=report[role],
        sft=report["sft"],
        thumbs=kept["thumbs"][role],
        second=kept["second"][role],
        reward=kept["reward"],
        seconds=kept["seconds"],
    )


# ---------------------------------------------------------------- the bars


def outcomes(turns: Sequence[Turn], judge: str = "thumbs") -> np.ndarray:
    """One judge's outcomes of what served after each turn: [turns, prompts], the same prompts in every row."""
    prompts = sorted(getattr(turns[0], judge))
    return np.array([[getattr(t, judge)[p] for p in prompts] for t in turns], dtype=np.float64)


def trend(rates: np.ndarray) -> Interval:
    """The least-squares slope of the rate, a turn, with its bootstrap interval over prompts; rates: [turns, prompts]."""
    number = np.arange(len(rates)) - (len(rates) - 1) / 2
    slopes = number @ rates / (number @ number)  # of each prompt; the mean's slope is their mean
    return paired_bootstrap(slopes, np.zeros_like(slopes), resamples=RESAMPLES)


def bars(turns: Sequence[Turn]) -> list[Bar]:
    """Every bar, over the turns after which something had been learned: turn 0 only is what they are compared with."""
    limits, after = GateOptions(), turns[1:]
    thumbs = outcomes(after)
    slope, second = trend(thumbs), trend(outcomes(after, "second"))
    gain = paired_bootstrap(thumbs[-1], thumbs[0], resamples=RESAMPLES)
    worst = {
        name: pick(turn_figure(t, name) for t in after)
        for name, pick in (
            ("most_common_share", max),
            ("kl_per_answer", max),
            ("distinct_answers", min),
        )
    }
    relevance, ended = min(t.kept("relevance") for t in after), min(t.kept("ended_share") for t in after)
    perplexity = max(t.kept("perplexity") for t in after)
    return [
        Bar("trend of the thumbs-up rate a turn: 95 % interval above zero", shown(slope), slope.low > 0),
        Bar("last turn above the first", shown(gain), gain.value > 0),
        Bar("trend of the second judge's rate a turn: 95 % interval above zero", shown(second), second.low > 0),
        Bar(
            "most common answer at most 5 % at every turn",
            f"{worst['most_common_share']:.3f} at most",
            worst["most_common_share"] <= limits.max_most_common,
        ),
        Bar(
            "distinct answers at least 90 % at every turn",
            f"{worst['distinct_answers']:.3f} at least",
            worst["distinct_answers"] >= limits.min_distinct,
        ),
        Bar(
            "relevance keeps at least half at every turn",
            f"{relevance:.2f} at least",
            relevance >= limits.min_relevance_kept,
        ),
        Bar(
            "answers that end at least 75 % of the SFT model's share at every turn",
            f"{ended:.2f} at least",
            ended >= limits.min_ended_kept,
        ),
        Bar(
            "held-out perplexity at most 1.10 times at every turn",
            f"{perplexity:.3f} at most",
            perplexity <= limits.max_perplexity_ratio,
        ),
        Bar(
            "KL under 15 nats an answer at every turn",
            f"{worst['kl_per_answer']:.2f} at most",
            worst["kl_per_answer"] < limits.max_kl,
        ),
    ]


def turn_figure(turn: Turn, name: str) -> float:
    """A figure of the champion after a turn."""
    return float(turn.champion[name])


# ---------------------------------------------------------------- the page


def with_section(page: str, text: str) -> str:
    """The page with this section in its old place, or before the first of the sections that others put at its end."""
    from benchmarks.preferences import TITLE as NEXT

    before, _, rest = page.partition(TITLE)
    if rest:
        _, heading, behind = rest.partition("\n## ")
        behind = f"## {behind}" if heading else ""
    else:
        before, heading, behind = page.partition(NEXT)
        behind = heading + behind
    return "\n\n".join(filter(None, (before.strip(), text.strip(), behind.strip()))) + "\n"


def kept(page: str) -> str:
    """The section as the page has it, "" where it has none."""
    _, title, rest = page.partition(TITLE)
    return title + rest.split("\n## ")[0]


def section(turns: Sequence[Turn], opinions: int, code: str) -> str:
    """The section of docs/evidence.md."""
    after = turns[1:]
    promoted = sum(t.promoted for t in after)
    minutes = sum(t.seconds["turn"] for t in after) / 60
    return "\n\n".join(
        [
            TITLE,
            f"Written by `python -m benchmarks.wheel --turns {len(after)} --opinions {opinions}` at revision {code[:12]}"
            f"{' with local changes' if code.endswith('-dirty') else ''}. Nobody touched it: in every turn {opinions} "
            "simulated opinions on the answers of the model that served (each to another training prompt) came over HTTP, the "
            "bell rang, and a reward model, a PPO candidate, the judgement and, where the gate opened, the promotion followed. "
            "Every candidate starts from the SFT model and is held near it; what grows is what is known of the rater. "
            f"{promoted} of {len(after)} candidates were promoted. A candidate that is better, but not beyond chance on these "
            f"prompts, does not serve. All turns together took {minutes:.0f} minutes beside other work.",
            f"![Thumbs-up rate, second judge, relevance and perplexity over the turns]({PICTURE})",
            table(
                ["bar", "seen", "holds"],
                [[bar.name, bar.seen, "yes" if bar.holds else "**no**"] for bar in bars(turns)],
            ),
            "What serves after each turn, on the report's prompts, that nobody trained on and nobody rated. Turn 0 is the SFT "
            "model. The trend is that of turns 1 to the last; its interval resamples prompts.",
            table(
                [
                    *("turn", "thumbs up", "second judge", "candidate", "gate", "relevance", "perplexity"),
                    *("KL", "most common", "distinct", "reward model", "rated up", "seconds"),
                ],
                [row(t) for t in turns],
            ),
        ]
    )


def row(t: Turn) -> list[str]:
    """A turn's row."""
    figures = t.champion
    health = [
        f"{figures['relevance']:.2f} ({t.kept('relevance'):.0%})",
        f"{figures['perplexity']:.1f} (× {t.kept('perplexity'):.2f})",
        f"{figures['kl_per_answer']:.2f}",
        f"{figures['most_common_share']:.3f}",
        f"{figures['distinct_answers']:.3f}",
    ]
    rates = [
        f"**{figures['thumbs_up_rate']:.3f}** [{figures['thumbs_up_rate_low']:.3f}, {figures['thumbs_up_rate_high']:.3f}]",
        f"{figures['second_judge_rate']:.3f}",
    ]
    if t.number == 0:
        return ["0", *rates, "–", "–", *health, "–", "–", "–"]
    decided = "promote" if t.promoted else "keep"
    accuracy = f"{t.reward['accuracy']:.3f} of {int(t.reward['heldout'])}"
    rated = f"{t.asked[0] / max(1, sum(t.asked)):.3f}"
    return [
        *(str(t.number), *rates, f"{t.candidate_rate:.3f}", decided),
        *(*health, accuracy, rated, f"{t.seconds['turn']:.0f}"),
    ]


def draw(turns: Sequence[Turn], path: Path) -> None:
    """The figures over the turns, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    numbers = [t.number for t in turns]
    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for name, label, colour in (
        ("thumbs_up_rate", "thumbs up", "tab:green"),
        ("second_judge_rate", "second judge", "tab:blue"),
    ):
        values = [t.champion[name] for t in turns]
        low, high = ([t.champion[f"{name}_{end}"] for t in turns] for end in ("low", "high"))
        panels[0].plot(numbers, values, marker="o", label=label, color=colour)
        panels[0].fill_between(numbers, low, high, alpha=0.15, color=colour)
    kept = [(t.number, t.candidate_rate) for t in turns[1:] if not t.promoted]
    panels[0].scatter(*zip(*kept, strict=True) if kept else ([], []), marker="x", color="grey", label="not promoted")
    panels[0].set_title("rate, 95 % intervals")
    panels[0].legend(fontsize=8)
    for panel, name, limit in ((panels[1], "relevance", 0.5), (panels[2], "perplexity", 1.1)):
        panel.plot(numbers, [t.kept(name) for t in turns], marker="o", color="tab:purple")
        panel.axhline(limit, color="tab:red", linestyle="--", linewidth=1, label=f"bar: {limit}")
        panel.set_ylim(0, 1.25)
        panel.set_title(f"{name} over the SFT model's")
        panel.legend(fontsize=8)
    for panel in panels:
        panel.set_xlabel("turn")
        panel.set_xticks(numbers)
        panel.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
