"""What every training stage shares: its common options, checkpoints that survive a kill, the resume, and the curve."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from models.distributed import gather, load_module, wait
from models.gpu import GpuMeter
from models.job import Job
from models.memory import rehearse

KEEP = 2  # checkpoints kept: should the newest be damaged, the one before it serves


class Checkpoints:
    """Numbered checkpoints in a stage's work folder, each with the sha256 of its bytes in its name.

    A checkpoint holds everything that the next step needs, so that a run that was killed and resumed ends with the
    same bits as one that was not (same device kind, torch and thread count). Random numbers are drawn from streams
    keyed by seed and step (see stream), so that no generator's state needs keeping.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write under a temporary name, fsync, rename; then remove older ones. Raises OSError (disk full) that says what is
        needed and where: the checkpoints before it stay."""
        buffer = io.BytesIO()
        torch.save({"step": step, **state}, buffer)
        data = buffer.getbuffer()
        name = f"step-{step:08d}-{hashlib.sha256(data).hexdigest()[:16]}.pt"
        draft = self.folder / (name + ".draft")
        try:
            with draft.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            draft.rename(self.folder / name)
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise OSError(
                error.errno,
                f"{error.strerror}: the checkpoint of step {step} needs {len(data) / 1e6:.1f} MB in {self.folder}; make "
                "room and start again, then it goes on from the checkpoint before",
            ) from error
        for old in self._files()[:-KEEP]:
            old.unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """The newest whole checkpoint, or None. A damaged one is removed and the one before it is taken."""
        for path in reversed(self._files()):
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest()[:16] == path.stem.rsplit("-", 1)[1]:
                state: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True)
                return state
            path.unlink()
        return None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.pt"))


def stream(seed: int, *key: int | str) -> np.random.Generator:
    """A random stream of its own for (seed, key…), the same wherever and whenever it is asked for."""
    digest = hashlib.sha256(json.dumps([seed, *key]).encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "little")))


def torch_generator(seed: int, *key: int | str) -> torch.Generator:
    """As stream, for torch's own draws (initial weights)."""
    return torch.Generator().manual_seed(int(stream(seed, *key).integers(2**62)))


@dataclass(frozen=True)
class TrainingOptions:
    """What the sections of params.yaml of all training stages hold: the optimizer's settings, and when to report and save."""

    learning_rate: float = 1e-3
    warmup_steps: int = 0
    clip_norm: float = 1.0
    checkpoint_every: int = 100
    log_every: int = 10

    def __post_init__(self) -> None:
        self.at_least_one("checkpoint_every", "log_every")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, not {self.learning_rate}")

    def not_negative(self, *names: str) -> None:
        """Raise ValueError for an option among `names` that is below 0."""
        for name in names:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative: {getattr(self, name)}")

    def at_least_one(self, *names: str) -> None:
        """Raise ValueError for an option among `names` that is below 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


class Stateful(Protocol):
    """A module or an optimizer."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


class Training:
    """Where a training stage stands: what learns, the steps done, the curve, and checkpoints of all that.

    `parts` are the modules and optimizers by the name that they have in a checkpoint; `numbers` is what else the next step
    needs. A resumed stage starts at `first` and reports the curve until there once more, so that whoever keeps it misses no
    step that the killed process had no time to pass on.
    """

    def __init__(self, job: Job, options: TrainingOptions, steps: int, parts: Mapping[str, Stateful]) -> None:
        self.job, self.options, self.steps, self.parts = job, options, steps, parts
        self.first, self.skipped = 0, 0
        self.numbers: dict[str, float] = {}
        self.rows: list[dict[str, float]] = []
        self.timing: list[dict[str, float]] = []
        self.meter, self.flops = GpuMeter(job.device), 0.0
        self.checkpoints = Checkpoints(job.work / "checkpoints")
        state = self._load()
        if state is not None:
            for name, part in parts.items():
                if isinstance(part, nn.Module):
                    load_module(part, state[name])
                else:
                    part.load_state_dict(state[name])
            self.first, self.skipped, self.numbers = state["step"], state["skipped"], state["numbers"]
            self.rows, self.timing = state["rows"], state["timing"]
            job.resumed(self.first, [row | more for row, more in zip(self.rows, self.timing, strict=True)])

    def _load(self) -> dict[str, Any] | None:
        """The newest whole checkpoint. The first process looks before the others: it removes a damaged one."""
        if not self.job.ranks.first:
            wait()
        state = self.checkpoints.load()
        if self.job.ranks.first:
            wait()
        return state

    def rehearse(self, module: nn.Module, loss: Callable[[], Tensor], what: str, remedy: str, parts: int = 1) -> None:
        """Try the largest batch once (models.memory.rehearse) and report how long the stage will take at most, and its memory.

        parts: how many such a step has. To the peak come Adam's two moments, and on the CPU a checkpoint, which stands in
        memory before it is written. Raises MemoryError.
        """
        tried = rehearse(module, loss, what, remedy)
        learned = sum(p.numel() for p in module.parameters() if p.requires_grad)
        memory = tried.memory + 8 * learned // self.job.ranks.size + (12 * learned if self.job.device == "cpu" else 0)
        self.job.estimate((self.steps - self.first) * parts * tried.seconds, memory)

    def fullest(self, sizes: Sequence[int], batch: int, part: int | None) -> tuple[list[int], int]:
        """What of a step is in memory at once where that is most, largest last, and how many such parts a step has at most.

        sizes: of all elements, from which `batches` draws `batch` at a time; part: elements at a time (of each process), None
        for all of a step's.
        """
        together = part * self.job.ranks.size if part else batch
        drawn = batches(len(sizes), batch, self.job.seed, 0, self.steps)
        steps = (sorted(chosen, key=sizes.__getitem__)[-together:] for _, chosen in drawn)
        return max(steps, key=lambda found: sum(sizes[i] for i in found)), math.ceil(min(batch, len(sizes)) / together)

    def logs(self, done: int) -> bool:
        """Whether the step that makes `done` steps is one that the curve shows."""
        return done % self.options.log_every == 0 or done == self.steps

    def computed(self, flops: float) -> None:
        """Count what the steps of all processes needed (ModelConfig.training_flops), for the GPU's utilisation."""
        self.flops += flops

    def log(self, done: int, metrics: Mapping[str, float], timing: Mapping[str, float]) -> None:
        """Put a point on the curve. `timing` differs from run to run: it is reported but not written to curves.csv.

        On a GPU it gets the GPU's figures since the point before (models.gpu).
        """
        self.rows.append({"step": done, **metrics})
        timing = {**timing, **self.meter.read(self.flops / self.job.ranks.size)}
        self.flops = 0.0
        self.timing.append(timing)
        self.job.log(done, self.steps, {**metrics, **timing})

    def checkpoint(self, done: int) -> None:
        """Save a checkpoint after step `done` when one is due."""
        if done % self.options.checkpoint_every == 0 or done == self.steps:
            state = {name: gather(part.state_dict()) for name, part in self.parts.items()}
            records = {"skipped": self.skipped, "numbers": self.numbers, "rows": self.rows, "timing": self.timing}
            if self.job.ranks.first:
                self.checkpoints.save(done, state | records)

    def finish(self, metrics: Mapping[str, float]) -> None:
        """Write curves.csv and metrics.json into the stage's output."""
        write_curves(self.job.output, self.rows)
        write_metrics(self.job.output, metrics)


def write_curves(output: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """curves.csv of rows with `step`, which comes first."""
    names = ["step", *sorted({key for row in rows for key in row} - {"step"})]
    with (output / "curves.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: v if k == "step" else f"{v:.6g}" for k, v in row.items()})


def write_metrics(output: Path, metrics: Mapping[str, float]) -> None:
    """metrics.json, sorted."""
    text = json.dumps(dict(sorted(metrics.items())), indent=2)
    (output / "metrics.json").write_text(text + "\n", encoding="utf-8")


def batches(count: int, size: int, seed: int, first: int, steps: int) -> Iterator[tuple[int, list[int]]]:
    """Steps first..steps-1, each with the indices of its batch.

    Every one of 0..count-1 comes once an epoch, in a shuffled order of that epoch's own; an epoch's last batch may be short.
    """
    per_epoch = math.ceil(count / size)
    for step in range(first, steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0 or step == first:
            order = stream(seed, "order", epoch).permutation(count)
        yield step, order[place * size : (place + 1) * size].tolist()
