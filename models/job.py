"""What a stage body is given: its inputs, where to write, its options, and one way out for progress and metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from models.ranks import Ranks

Options = TypeVar("Options")
Emit = Callable[[dict[str, Any]], None]


def build_options(section: str, values: Mapping[str, Any], cls: type[Options]) -> Options:
    """Make the dataclass `cls` from one section of params.yaml.

    Raises ValueError that names `params.yaml: section.key` for an unknown or missing key, or a value that `cls` refuses.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ValueError(f"params.yaml: {section}.{key} is not known; known are {', '.join(sorted(fields))}")
    for name, f in fields.items():
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ValueError(f"params.yaml: {section}.{name} is missing")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"params.yaml: {section}: {error}") from error


@dataclass(frozen=True)
class Job:
    """One run of one stage.

    stage: its name in dvc.yaml; root: the workspace; deps: the paths that dvc.yaml declares, relative to root;
    output: a new folder that becomes artifacts/<stage>/ when the body has ended; work: a folder that outlives a kill,
    for checkpoints; params: the sections of params.yaml that dvc.yaml declares; device: "cpu" or "cuda";
    threads: torch's thread count (it changes the last bits); emit: takes event dicts; ranks: this process among those that
    train together.
    """

    stage: str
    root: Path
    deps: tuple[str, ...]
    output: Path
    work: Path
    params: Mapping[str, Any]
    device: str = "cpu"
    threads: int = 1
    emit: Emit = field(default=lambda event: None)
    ranks: Ranks = field(default_factory=Ranks)

    def input(self, path: str) -> Path:
        """The path of a declared dep. Raises KeyError when dvc.yaml does not declare it, FileNotFoundError when absent."""
        if not any(path == dep or path.startswith(dep + "/") for dep in self.deps):
            raise KeyError(f"dvc.yaml: stage {self.stage} reads {path} but does not declare it under deps")
        found = self.root / path
        if not found.exists():
            raise FileNotFoundError(f"{path} is missing: run the stage that makes it first")
        return found

    def options(self, section: str, cls: type[Options]) -> Options:
        """The section as the dataclass `cls`; see build_options."""
        return build_options(section, self.params.get(section, {}), cls)

    @property
    def seed(self) -> int:
        """The seed of the run (params.yaml: seed)."""
        return int(self.params["seed"])

    def log(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Report that `step` of `total` steps is done, with its metrics."""
        self.emit({"event": "metrics", "step": step, "total": total, "metrics": dict(metrics)})

    def estimate(self, seconds: float, memory: int) -> None:
        """Report how many seconds the steps will take at most, and how many bytes of memory."""
        self.emit({"event": "estimate", "seconds": round(seconds, 1), "memory": memory})

    def resumed(self, step: int, curve: Sequence[Mapping[str, float]]) -> None:
        """Report that the work goes on from a checkpoint taken after `step` steps, and the curve so far (`step` in each row)."""
        self.emit({"event": "resumed", "step": step, "curve": list(curve)})
