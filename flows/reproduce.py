"""From a run to its bytes: a training stage run again from its inputs' hashes, and whether the weights are the same.

It happens in a workspace of its own, with neither work folder nor run cache: .thumbwheel/reproduce/, gone afterwards. The inputs
come from DVC's cache here or from a remote, by hash; the code is what the run recorded, by hash too; parameters, thread count and
device are the run's. The same weights are promised for the same kind of CPU or GPU and the same torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import files
from flows.child import CODE, run_child
from flows.erasure import REPRODUCTIONS, TAG
from flows.machine import machine
from flows.stage import STAGES, Body
from flows.values import yaml
from flows.workspace import hold, writer

if TYPE_CHECKING:
    from flows.record import Records

KIND = "reproduction"


class NotReproducible(RuntimeError):
    """The run cannot be made again here; the message says why and, where there is one, the remedy."""


@dataclass(frozen=True)
class Verdict:
    """Whether the weights came out the same. expected, got: DVC's hash of the model's folder, recorded and now.

    promised: whether they had to, or else what differs between this machine and the run's; run_id: of the reproduction.
    """

    stage: str
    same: bool
    expected: str
    got: str
    differences: tuple[str, ...]
    run_id: str

    @property
    def promised(self) -> bool:
        """Whether machine and torch are those of the run."""
        return not self.differences


def reproduce(root: Path, records: Records, run_id: str, *, stages: Mapping[str, Body] = STAGES) -> Verdict:
    """Run the stage of an MLflow run again and compare; the reproduction is a run of its own, tagged `thumbwheel.reproduces`.

    Raises NotReproducible, WorkspaceBusyError, and ChildError when training fails.
    """
    told = Recorded.read(records, run_id, stages)
    with writer(root, f"reproduce {run_id}"):
        files.remove(root / REPRODUCTIONS)  # of one that was killed
        place = root / REPRODUCTIONS / run_id
        place.mkdir(parents=True)
        try:
            code = code_of(told, place)
            fetch(root, place, told.data)
            link_base(root, place, told.params)
            return run(root, records, told, place, code, stages[told.stage])
        finally:
            files.remove(root / REPRODUCTIONS)
            if (CODE / ".git").exists():
                git(CODE, "worktree", "prune")


@dataclass(frozen=True)
class Recorded:
    """What a run says of itself. data, code: path -> md5 of its inputs; expected: of the model's folder that it made."""

    run_id: str
    stage: str
    data: dict[str, str]
    code: dict[str, str]
    params: dict[str, Any]
    expected: str
    revision: str
    machine: dict[str, str]

    @property
    def out(self) -> str:
        """The model's folder."""
        return f"artifacts/{self.stage}/model"

    @classmethod
    def read(cls, records: Records, run_id: str, stages: Mapping[str, Body]) -> Recorded:
        """From MLflow. Raises NotReproducible."""
        from mlflow.exceptions import MlflowException

        from flows.record import PARAMS

        try:
            found = records.client.get_run(run_id)
        except MlflowException as error:
            raise NotReproducible(f"MLflow at {records.uri} knows no run {run_id}") from error
        tags = found.data.tags
        stage = tags.get("dvc.stage", "")
        if stage not in stages or not stages[stage].command:
            what = f"stage {stage}" if stage else "no stage"
            raise NotReproducible(f"run {run_id} is of {what}: only training stages are run again; name one of those")
        if tags.get(TAG):
            raise NotReproducible(
                f"opinions that run {run_id} learned from were erased since (erasure {tags[TAG]}), because a person asked for "
                "it: its weights cannot be made again"
            )
        expected = tags.get(f"dvc.out.artifacts/{stage}/model", "")
        if found.info.status != "FINISHED" or not expected:
            raise NotReproducible(
                f"run {run_id} did not end well ({found.info.status}): there are no weights to compare with"
            )
        if PARAMS not in tags:
            raise NotReproducible(f"run {run_id} is of an older version, which did not record its parameters whole")
        deps = {key.removeprefix("dvc.dep."): md5 for key, md5 in tags.items() if key.startswith("dvc.dep.")}
        return cls(
            run_id,
            stage,
            {path: md5 for path, md5 in deps.items() if not path.endswith(".py")},
            {path: md5 for path, md5 in deps.items() if path.endswith(".py")},
            json.loads(tags[PARAMS]),
            expected,
            tags.get("code.revision", "none"),
            {key.removeprefix("machine."): value for key, value in tags.items() if key.startswith("machine.")},
        )


# ---------------------------------------------------------------- code


def code_of(told: Recorded, place: Path) -> Path:
    """The folder with the code of the run: this checkout where its files are the same, else a git worktree of its revision.

    Raises NotReproducible that names the files which differ and what is missing.
    """
    if not (changed := differing(told.code, CODE)):
        return CODE
    what = (
        f"the code of stage {told.stage} is another here ({', '.join(changed[:3])}{', …' if len(changed) > 3 else ''})"
    )
    revision, worktree = told.revision, place / "code"
    if revision == "none" or revision.endswith("-dirty"):
        raise NotReproducible(f"{what}, and the run's was never committed (code revision {revision})")
    if git(CODE, "worktree", "add", "--detach", str(worktree), revision).returncode:
        raise NotReproducible(f"{what}, and git has no revision {revision[:12]} here: fetch it, then try again")
    if changed := differing(told.code, worktree):
        raise NotReproducible(
            f"revision {revision[:12]} does not hold the code that the run recorded: {', '.join(changed)}"
        )
    return worktree


def differing(code: Mapping[str, str], folder: Path) -> list[str]:
    """The source files that are not, in `folder`, what was recorded."""
    return [
        path
        for path, md5 in sorted(code.items())
        if not (folder / path).exists()
        or hashlib.md5((folder / path).read_bytes(), usedforsecurity=False).hexdigest() != md5
    ]


def git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A git command."""
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)


# ---------------------------------------------------------------- inputs


def fetch(root: Path, place: Path, data: Mapping[str, str]) -> None:
    """Put the inputs into the workspace `place`, each from the first that has it: DVC's cache of `root`, then its remotes.

    What is fetched is hashed again. Raises NotReproducible that names what nobody has.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.WARNING)  # it announces a new workspace
    with Repo(str(root)) as source:
        remotes = {name: dict(remote) for name, remote in source.config.get("remote", {}).items()}
        cache = Path(source.cache.local.path).parent.parent
    places: dict[str, dict[str, Any]] = {"thumbwheel-cache": {"url": str(cache)}, **remotes}
    Repo.init(str(place), no_scm=True, force=True).close()
    with Repo(str(place)) as repo, repo.config.edit("local") as config:
        config["remote"] = {name: {**remote, "verify": True} for name, remote in places.items()}
    with Repo(str(place)) as repo:
        for path, md5 in data.items():
            pointer = place / f"{path}.dvc"
            pointer.parent.mkdir(parents=True, exist_ok=True)
            with pointer.open("w", encoding="utf-8") as file:
                yaml().dump({"outs": [{"md5": md5, "hash": "md5", "path": Path(path).name}]}, file)
            for name in places:
                try:
                    repo.pull(targets=[str(pointer)], remote=name)
                except DvcException:
                    continue
                if (place / path).exists():
                    break
            else:
                where = (
                    f"DVC's cache here nor in {', '.join(remotes)}"
                    if remotes
                    else "DVC's cache here, and no remote is set"
                )
                raise NotReproducible(f"input {path} ({md5}) is neither in {where}: `dvc push` it where it was made")


def link_base(root: Path, place: Path, params: Mapping[str, Any]) -> None:
    """Let the workspace see the base model that the run began from. Raises NotReproducible when this one is another."""
    from models.base import base_hash

    section = params.get("model", {})
    if not isinstance(section, Mapping) or not section.get("base"):
        return
    base = root / section["base"]
    if not base.exists() or base_hash(base) != section.get("base_hash"):
        raise NotReproducible(f"{base} is not the base model that the run began from: put that one there")
    link = place / section["base"]
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(base)


# ---------------------------------------------------------------- the run


def run(root: Path, records: Records, told: Recorded, place: Path, code: Path, body: Body) -> Verdict:
    """Train in `place` with the code in `code`, and compare what comes out."""
    from flows.record import OWNER, StageRun, owner

    recorded = told.machine
    try:
        here = machine(
            root,
            threads=int(recorded["threads"]),
            device=recorded["device"],
            world_size=int(recorded.get("world_size", 1)),
        )
    except (RuntimeError, AssertionError) as error:  # torch has no such device
        raise NotReproducible(f"the run was made on {recorded['device']}, which this machine lacks: {error}") from error
    now = here.tags()
    differences = tuple(
        f"{what}: {recorded.get(what, 'unknown')} then, {now[what]} now"
        for what in ("device_name", "torch")
        if recorded.get(what) != now[what]
    )
    tags = {
        "thumbwheel.kind": KIND,
        "thumbwheel.reproduces": told.run_id,
        "code.revision": told.revision,
        OWNER: owner(),
        **{f"machine.{key}": value for key, value in now.items()},
    }
    run_id = records.client.create_run(records.experiment, run_name=f"reproduce {told.stage}", tags=tags).info.run_id
    record, status = StageRun(records, run_id), "KILLED"
    try:
        figures = train(root, told, place, code, body, here, metrics_to(record))
        record.figures(figures)
        got = hash_model(place, told.out)
        record.tags({"thumbwheel.same_weights": str(got == told.expected).lower(), f"reproduced.{told.out}": got})
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        record.flush()
        records.close(run_id, status)
    return Verdict(told.stage, got == told.expected, told.expected, got, differences, run_id)


def metrics_to(record: Any) -> Callable[[dict[str, Any]], None]:
    """Takes a child's events; its metrics go to a run."""

    def emit(event: dict[str, Any]) -> None:
        if event["event"] == "metrics":
            record.metrics(event["step"], event["metrics"])

    return emit


def train(
    root: Path, told: Recorded, place: Path, code: Path, body: Body, here: Any, emit: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """The stage's child process, in an empty work folder; its output becomes artifacts/<stage> of `place`."""
    output, work = place / "output", place / "work"
    for folder in (output, work):
        folder.mkdir()
    spec = {
        "stage": told.stage,
        "root": str(place),
        "deps": [*told.data, *told.code],
        "output": str(output),
        "work": str(work),
        "params": told.params,
        "device": here.device,
        "threads": here.threads,
        "world_size": here.world_size if body.shared else 1,
    }
    log = root / ".thumbwheel" / "logs" / f"reproduce-{told.stage}.log"
    lock = hold(place / "lock")
    try:
        figures = run_child(spec, command=body.command, work=work, log=log, emit=emit, lock=lock, code=code)
    finally:
        os.close(lock)
    files.move(output, place / "artifacts" / told.stage)
    return figures


def hash_model(place: Path, out: str) -> str:
    """DVC's hash of a folder."""
    from dvc.repo import Repo

    with Repo(str(place)) as repo:
        (stage,) = repo.add([str(place / out)])
        return str(stage.outs[0].hash_info.value)
