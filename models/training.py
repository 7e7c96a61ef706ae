"""What every training stage shares: checkpoints that survive a kill, the resume, curves and the model card."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.job import Job

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
        """Write under a temporary name, fsync, rename; then remove older ones. Raises OSError (disk full): nothing is lost."""
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
        except OSError:
            draft.unlink(missing_ok=True)
            raise
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


class Curves:
    """The training curve: one row a logged step, in the checkpoint too, written as curves.csv and reported to the caller."""

    def __init__(self, job: Job, total: int) -> None:
        self.job, self.total = job, total
        self.rows: list[dict[str, float]] = []

    def log(self, step: int, metrics: Mapping[str, float], timing: Mapping[str, float] | None = None) -> None:
        """metrics go to the file and the caller; timing (differs from run to run) to the caller alone."""
        self.rows.append({"step": float(step), **metrics})
        self.job.log(step, self.total, {**metrics, **(timing or {})})

    def write(self, path: Path) -> None:
        """curves.csv with `step` first."""
        names = ["step", *sorted({key for row in self.rows for key in row} - {"step"})]
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            for row in self.rows:
                writer.writerow({k: int(v) if k == "step" else f"{v:.6g}" for k, v in row.items()})


def finish(job: Job, curves: Curves, metrics: Mapping[str, float]) -> None:
    """Write curves.csv and metrics.json into the stage's output."""
    curves.write(job.output / "curves.csv")
    text = json.dumps(dict(sorted(metrics.items())), indent=2)
    (job.output / "metrics.json").write_text(text + "\n", encoding="utf-8")


def batches(count: int, size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The indices 0..count-1 in a shuffled order of their own for each epoch, cut into batches; the last may be short."""
    order = stream(seed, "order", epoch).permutation(count)
    return [order[i : i + size] for i in range(0, count, size)]
