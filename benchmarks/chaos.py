"""The chaos drill: training of each kind is killed again and again, and has to end with the bits of an undisturbed run.

    python -m benchmarks.chaos --kills 50

Every kind of training (models.run.STAGES) runs twice on data that the project's own stages make: once left alone, once
killed by SIGKILL at random moments, started again each time. Once a kill also tears the newest checkpoint in half, and
once the disk is full when a checkpoint is due. Prints one JSON line; a logbook tells every restart with its cause.
Exits 1 when a bar is missed: see `missed`.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.small_disk import fill, small_disk
from flows import curate, ingest, settings, tokenize
from flows.values import yaml
from models.checkpoint import load_model, model_hash
from models.corpus import Sequences
from models.job import Job
from models.rollout import generate
from models.run import STAGES
from models.tokenizer import Tokenizer
from models.training import stream

CHECKOUT = Path(__file__).resolve().parents[1]
GOODPUT = 0.80
STARTING = 0.15  # the share of kills that come before the first step, while the process starts
DISK_BYTES = 64 << 20
# the preset micro, with checkpoints as often against the steps as a long run has them; every step is reported
OFTEN = {"checkpoint_every": 5, "log_every": 1}
PARAMS: dict[str, Any] = {
    "data": {"max_chats": 400},
    "pretrain": {"steps": 120, **OFTEN},
    "sft": {"steps": 120, **OFTEN},
    "reward": {"epochs": 2, "batch_size": 4, **OFTEN},
    "ppo": {"iterations": 60, "max_new_tokens": 12, "checkpoint_every": 2, "log_every": 1},
    "dpo": {"epochs": 4, "batch_size": 4, **OFTEN},
    "kto": {"epochs": 2, "batch_size": 8, **OFTEN},
}
RATED = {"train": 240, "heldout": 24}  # prompts with two rated answers each


# ---------------------------------------------------------------- what is trained on


class Drill:
    """A workspace under `folder`: data, the undisturbed runs in artifacts/, the disturbed ones in disturbed/."""

    def __init__(self, folder: Path, seed: int, changes: Mapping[str, Any]) -> None:
        self.root, self.seed = folder, seed
        values = settings.merge(settings.Params().plain(), settings.preset("micro"))
        values = settings.merge(settings.merge(values, PARAMS), changes)
        self.params = settings.check(settings.merge(values, {"seed": seed})).plain()

    def make_data(self) -> None:
        """ingest, curate and tokenize, as the flow runs them but for the data gate."""
        ingest.make_data(self.root, ingest.IngestOptions(**self.params["data"]))
        for name in ("validate", "written"):
            (self.root / "artifacts" / name).mkdir(parents=True, exist_ok=True)
        Sequences.none().save(self.root / "artifacts/written/sft.npz")  # people wrote nothing
        for module in (curate, tokenize):
            stage = module.__name__.split(".")[-1]
            output = self.root / "artifacts" / stage
            output.mkdir(parents=True)
            deps, params = self.declared(stage)
            module.run(Job(stage, self.root, deps, output, self.root / "work" / stage, params))

    def declared(self, stage: str) -> tuple[tuple[str, ...], dict[str, Any]]:
        """The data that a stage reads and its parameters, as dvc.yaml has them."""
        stages = yaml().load((CHECKOUT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
        found = stages.get(stage) or stages["policy"]["do"]
        sections = [name.replace("${item}", stage) for name in found["params"]]
        deps = [dep.replace("${data.folder}", "data") for dep in found["deps"] if not dep.endswith(".py")]
        every = settings.flatten(self.params).items()
        chosen = {k: v for k, v in every if any(k == name or k.startswith(f"{name}.") for name in sections)}
        return tuple(deps), settings.merge({}, chosen)

    def rate(self) -> None:
        """Two answers of the SFT model to each of some prompts, and on each a thumb by a coin of the drill's own seed."""
        folder = self.root / "artifacts/sft/model"
        tokenizer, asked = Tokenizer.load(folder), Sequences.load(self.root / "artifacts/tokenize/prompts.train.npz")
        prompts = [asked[i // 2] for i in range(min(2 * sum(RATED.values()), 2 * len(asked)))]
        answers = generate(
            load_model(folder),
            prompts,
            stop_id=tokenizer.stop_id,
            max_new_tokens=12,
            seeds=stream(self.seed, "answers").integers(2**62, size=len(prompts)).tolist(),
        )
        coins = stream(self.seed, "thumbs").choice([1, -1], size=len(prompts)).tolist()
        rows = [
            json.dumps({"kind": "thumb", "prompt_ids": prompt, "response_ids": answer.ids, "value": coin}) + "\n"
            for prompt, answer, coin in zip(prompts, answers, coins, strict=True)
        ]
        snapshot, cut = self.root / "artifacts/snapshot", 2 * RATED["heldout"]
        snapshot.mkdir()
        Sequences.none().save(snapshot / "prompts.npz")  # people asked nothing
        (snapshot / "opinions.heldout.jsonl").write_text("".join(rows[:cut]), encoding="utf-8")
        (snapshot / "opinions.train.jsonl").write_text("".join(rows[cut:]), encoding="utf-8")

    def start(self, kind: str, work: Path) -> Life:
        """Start training of one kind in the work folder `work`, which may hold checkpoints."""
        work.mkdir(parents=True, exist_ok=True)
        deps, params = self.declared(kind)
        spec = {
            "stage": kind,
            "root": str(self.root),
            "deps": deps,
            "output": str(work / "output"),
            "work": str(work),
            "params": params,
            "device": "cpu",
            "threads": 1,
        }
        (work / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        return Life(work)

    def undisturbed(self, kind: str) -> tuple[int, float]:
        """Train to the end without a kill; the number of steps, and the seconds that the process took to its first."""
        work = self.root / "work" / kind
        life = self.start(kind, work)
        if life.run() != 0:
            raise RuntimeError(f"{kind} failed without any disturbance: {life.error}")
        (work / "output").rename(self.root / "artifacts" / kind)
        return life.reached, life.first_step


class Life:
    """One process of models.run: where it began, how far it came, how it ended."""

    def __init__(self, work: Path) -> None:
        self.began, self.reached, self.error = 0, 0, ""
        self.first_step = 0.0  # seconds from its start; 0 as long as it has done none
        self.known = False  # whether it has told where it began
        self.started = time.monotonic()
        self.log = work / "stderr.log"
        readable, writable = os.pipe()
        with self.log.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "models.run", str(work / "spec.json"), "--metrics-fd", str(writable)],
                cwd=CHECKOUT,
                env=os.environ | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=[writable],
            )
        os.close(writable)
        self.events = os.fdopen(readable, encoding="utf-8")

    def run(self, until: int | None = None) -> int | None:
        """Read its progress; None as soon as step `until` is done, else, when it has ended, the exit status."""
        for line in self.events:
            event = json.loads(line) if line.endswith("\n") else {"event": "cut"}
            if event["event"] == "resumed":
                self.began = self.reached = event["step"]
                self.known = True
            elif event["event"] == "metrics":
                self.first_step = self.first_step or time.monotonic() - self.started
                self.reached, self.known = event["step"], True
            elif event["event"] == "error":
                self.error = event["message"]
            if until is not None and self.reached >= until:
                return None
        self.events.close()
        return self.process.wait()

    def kill(self, delay: float, until: int | None = None) -> bool:
        """SIGKILL `delay` seconds after step `until` (after its start when None); whether it came before the end."""
        if until is not None and self.run(until) is not None:
            return False
        timer = threading.Timer(delay, self.process.kill)
        timer.start()
        status = self.run()
        timer.cancel()
        return status == -9


# ---------------------------------------------------------------- the disturbances


@dataclass
class Restart:
    """A line of the logbook: a process that did not come to its end, and from where the next one went on.

    began, reached: None when it was killed before it could tell.
    """

    time: str
    kind: str
    cause: str
    began: int | None
    reached: int | None
    resumed: int = -1

    @property
    def steps_lost(self) -> int:
        """What has to be done again. A process that did no step had nothing to lose."""
        if self.began is None or self.reached is None or self.reached == self.began:
            return 0
        return self.reached - self.resumed


class Disturbed:
    """A kind's disturbed run. steps: of the undisturbed one; interval: between checkpoints; startup: seconds to a step."""

    def __init__(self, drill: Drill, kind: str, steps: int, startup: float, work: Path) -> None:
        self.drill, self.kind, self.steps, self.startup, self.work = drill, kind, steps, startup, work
        self.interval = int(drill.params[kind]["checkpoint_every"])
        self.steps_run = 0
        self.restarts: list[Restart] = []

    def train(self, kills: int, torn: bool, full: bool) -> int:
        """Train to the end, killed on the way; `torn`: by a kill more, that also tears a checkpoint; `full`: the disk of
        `work`, a small one, is full once. Returns how many kills came too late."""
        luck = random.Random(f"{self.drill.seed} {self.kind}")
        starting = sum(luck.random() < STARTING for _ in range(kills))
        last = int(0.9 * self.steps)
        queue = [(luck.randint(1, last), "kill") for _ in range(kills - starting)]
        for cause, wanted in (("torn", torn), ("full", full)):
            queue += [(luck.randint(min(3 * self.interval, last), last), cause)] * wanted
        queue.sort()
        for _ in range(starting):
            queue.insert(luck.randint(0, len(queue)), (0, "starting"))
        for i, (step, cause) in enumerate(queue):
            life = self.drill.start(self.kind, self.work)
            if cause == "starting":
                done, told = life.kill(luck.uniform(0, self.startup)), "SIGKILL while it started"
            elif cause == "full":
                done, told = self._fill_disk(life, step), f"the disk was full: {life.error}"
            else:
                done, told = life.kill(luck.uniform(0, 0.03), step), "SIGKILL"
            if not done and life.process.returncode == 0:
                self._note_resumed(life)
                return sum(cause in ("kill", "starting") for _, cause in queue[i:])
            if not done:
                raise RuntimeError(f"{self.kind} failed by itself: {life.error or life.log.read_text()[-2000:]}")
            self._note_resumed(life)
            if cause == "torn":
                newest = sorted((self.work / "checkpoints").glob("step-*.pt"))[-1]
                os.truncate(newest, newest.stat().st_size // 2)
                told = f"SIGKILL, and {newest.name.rsplit('-', 1)[0]} torn in half"
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            came = (life.began, life.reached) if life.known else (None, None)
            self.restarts.append(Restart(now, self.kind, told, *came))
        life = self.drill.start(self.kind, self.work)
        if life.run() != 0:
            raise RuntimeError(f"{self.kind} did not come to its end: {life.error or life.log.read_text()[-2000:]}")
        self._note_resumed(life)
        return 0

    def _note_resumed(self, life: Life) -> None:
        self.steps_run += life.reached - life.began
        for restart in self.restarts:
            if life.known and restart.resumed < 0:
                restart.resumed = life.began

    def _fill_disk(self, life: Life, step: int) -> bool:
        """Fill the disk once `step` is done, until the process has failed of it; then make room again."""
        ballast, ended = self.work / "ballast", threading.Event()

        def keep_full() -> None:
            while not ended.wait(0.005):  # a checkpoint that was under way may still end and free what is older
                fill(ballast)

        if life.run(step) is not None:
            return False
        filler = threading.Thread(target=keep_full)
        filler.start()
        try:
            status = life.run()
        finally:
            ended.set()
            filler.join()
            ballast.unlink()
        return status == 1 and os.strerror(errno.ENOSPC) in life.error


# ---------------------------------------------------------------- the drill


def run(
    folder: Path, kills: int, seed: int = 1, kinds: Sequence[str] = tuple(STAGES), **changes: Any
) -> dict[str, Any]:
    """Do the drill in `folder`, which must not exist; what it came to. `changes`: other parameters, by section."""
    began = time.monotonic()
    drill, luck = Drill(folder, seed, changes), random.Random(seed)
    torn, full = luck.choice(kinds), luck.choice(kinds)
    drill.make_data()
    ran: dict[str, Disturbed] = {}
    left, carried, refused = kills, 0, ""
    for kind in STAGES:
        if len(ran) == len(kinds):
            break
        if kind == "reward":
            drill.rate()
        steps, startup = drill.undisturbed(kind)
        if kind not in kinds:
            continue
        share = -(-left // (len(kinds) - len(ran)))
        left -= share
        with ExitStack() as stack:
            work = folder / "disturbed" / kind
            if kind == full:
                try:
                    work = stack.enter_context(small_disk(folder / "disk", DISK_BYTES)) / kind
                except OSError as error:
                    refused = str(error)
            ran[kind] = Disturbed(drill, kind, steps, startup, work)
            carried = ran[kind].train(share + carried, kind == torn, kind == full and not refused)
            if kind == full and not refused:
                shutil.copytree(work, folder / "disturbed" / kind)
    result = summary(drill, ran, kills, refused)
    result["seconds"] = round(time.monotonic() - began, 1)
    logbook = folder / "logbook.md"
    logbook.write_text(pages(result, ran), encoding="utf-8")
    return result | {"logbook": str(logbook)}


def summary(drill: Drill, ran: Mapping[str, Disturbed], kills: int, refused: str) -> dict[str, Any]:
    """The JSON line: figures, the models' hashes, and the bars that were missed."""
    restarts = [(restart, each) for each in ran.values() for restart in each.restarts]
    killed = [(r, each) for r, each in restarts if r.cause.startswith("SIGKILL") and "torn" not in r.cause]
    others = {
        name: next(({**asdict(r), "steps_lost": r.steps_lost} for r, _ in restarts if name in r.cause), None)
        for name in ("torn", "full")
    }
    lost = [restart.steps_lost for restart, _ in killed]
    useful, steps_run = sum(each.steps for each in ran.values()), sum(each.steps_run for each in ran.values())
    models: dict[str, Any] = {}
    for kind in ran:
        folders = {"undisturbed": f"artifacts/{kind}", "disturbed": f"disturbed/{kind}/output"}
        models[kind] = {name: weights(drill.root / path) for name, path in folders.items()}
    bars = {
        "kills": len(killed) == kills,
        "steps_lost": all(restart.steps_lost <= each.interval for restart, each in killed),
        "goodput": useful >= GOODPUT * steps_run,
        "equal_bits": all(found["undisturbed"][0] == found["disturbed"][0] for found in models.values()),
        "torn": others["torn"] is not None and others["torn"]["steps_lost"] <= 2 * ran[others["torn"]["kind"]].interval,
        "full": others["full"] is not None and others["full"]["steps_lost"] <= ran[others["full"]["kind"]].interval,
    }
    return {
        "kills": len(killed),
        "kills_by_kind": {kind: sum(each is ran[kind] for _, each in killed) for kind in ran},
        "steps_lost": lost,
        "max_steps_lost": max(lost, default=0),
        "checkpoint_every": {kind: each.interval for kind, each in ran.items()},
        "useful_steps": useful,
        "steps_run": steps_run,
        "goodput": round(useful / steps_run, 4),
        "torn_checkpoint": others["torn"],
        "full_disk": others["full"] or {"refused": refused},
        "models": {
            kind: {name: {"sha256": sha, "path": path} for name, (sha, path) in found.items()}
            for kind, found in models.items()
        },
        "missed": [name for name, holds in bars.items() if not holds],
    }


def weights(folder: Path) -> tuple[str, str]:
    """sha256 and path of a stage's weights."""
    return model_hash(folder / "model"), str(folder / "model/model.safetensors")


def pages(result: Mapping[str, Any], ran: Mapping[str, Disturbed]) -> str:
    """The logbook: every restart, as it came."""
    heads = ("time (UTC)", "training", "began at step", "reached", "cause", "went on from", "steps lost")
    lines = [
        "# Logbook of the chaos drill",
        "",
        f"{result['kills']} kills, goodput {result['goodput']:.3f} ({result['useful_steps']} useful steps of "
        f"{result['steps_run']} run), {result['max_steps_lost']} steps lost at most by a kill.",
        "",
        f"| {' | '.join(heads)} |",
        f"| {' | '.join('---' for _ in heads)} |",
    ]
    for restart in (restart for each in ran.values() for restart in each.restarts):
        cells = [restart.time, restart.kind, restart.began, restart.reached, restart.cause, restart.resumed]
        lines.append(f"| {' | '.join('' if cell is None else str(cell) for cell in [*cells, restart.steps_lost])} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1, help="of the training and of the kills' moments")
    parser.add_argument("--workdir", type=Path, default=CHECKOUT / ".thumbwheel" / "chaos", help="made anew")
    arguments = parser.parse_args()
    if arguments.kills < 1:
        parser.error(f"--kills must be at least 1, not {arguments.kills}")
    folder = arguments.workdir.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    result = run(folder, arguments.kills, arguments.seed)
    print(json.dumps(result))
    return 1 if result["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
