"""What DVC knows of a stage: whether it is up to date, what it read, how its outputs are kept (dvc.yaml, dvc.lock, cache).

DVC's Python API with three rules that its own commands follow inside: a Repo object is opened per call, never shared; one
call at a time in a process; and its lock, which DVC waits for only 3 seconds, is asked for again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

Method = Literal["ppo", "dpo", "kto"]  # what may follow the snapshot; dvc.yaml's `policy` is the one of align.method
METHODS: tuple[str, ...] = get_args(Method)
WRITTEN_BY_FLOWS = ("written.manifest.json", "feedback.manifest.json", "champion.json")
_GROUP = "policy"
_LOCK_SECONDS = 600.0
_mutex = threading.RLock()
Result = TypeVar("Result")


class PipelineError(RuntimeError):
    """dvc.yaml, or what it names, is not as a stage needs it. The message names the stage, the path and the remedy."""


@dataclass(frozen=True)
class Look:
    """A stage as DVC sees it before it runs.

    how: "unchanged" | "restored" (outputs came from the run cache) | "run"; deps: path -> md5 of data and code;
    params: the declared sections of params.yaml; outs: declared output paths; hashes: out path -> md5 where known.
    """

    name: str
    how: str
    deps: dict[str, str]
    params: dict[str, Any]
    outs: tuple[str, ...]
    hashes: dict[str, str] = field(default_factory=dict)
    saved: Any = None

    @property
    def data(self) -> dict[str, str]:
        """The deps that are not code."""
        return {path: md5 for path, md5 in self.deps.items() if not path.endswith(".py")}

    @property
    def code(self) -> dict[str, str]:
        """The deps that are source files."""
        return {path: md5 for path, md5 in self.deps.items() if path.endswith(".py")}


def look(root: Path, name: str, *, force: bool = False, restore: bool = True) -> Look:
    """Look at stage `name`; outputs that the run cache holds for exactly these inputs are put back.

    force: run it in any case; restore=False: neither compare nor restore (DVC itself did). Raises PipelineError for a stage
    or a dep that does not exist.
    """

    def work() -> Look:
        with _stage(root, name) as (repo, stage), repo.scm_context():
            _check_deps(stage)
            if restore and not force:
                if not stage.changed():
                    return _describe(stage, "unchanged")
                if _restore(repo, stage):
                    return _record(repo, stage, "restored")
            # only now: hashes saved before a restore make DVC restore the outputs of the former run
            stage.save_deps()
            return _describe(stage, "run")

    return _locked(work)


def commit(root: Path, seen: Look) -> dict[str, str]:
    """Record the outputs of a run that began as `seen`: dvc.lock, cache and run cache. Returns path -> md5 of the outs.

    The deps are recorded as they were when the run began: DVC's own commit would record a source file edited meanwhile as
    the one that ran. Raises PipelineError when data changed meanwhile, because then nobody knows which was read.
    """

    def work() -> dict[str, str]:
        with _stage(root, seen.name) as (repo, stage), repo.scm_context():
            stage.save_deps()
            now = _describe(stage, "run")
            for path, md5 in seen.data.items():
                if now.deps.get(path) != md5:
                    raise PipelineError(f"{path} changed while stage {seen.name} was reading it: run the stage again")
            for dep, (hash_info, meta) in zip(stage.deps, seen.saved, strict=True):
                dep.hash_info, dep.meta = hash_info, meta
            return _record(repo, stage, "run").hashes

    return _locked(work)


def hash_outs(root: Path, name: str) -> dict[str, str]:
    """path -> md5 of the outputs as they stand, without recording them."""

    def work() -> dict[str, str]:
        with _stage(root, name) as (_, stage):
            stage.save_outs()
            return _hashes(stage.outs)

    return _locked(work)


def entry(name: str) -> str:
    """The name of a stage in dvc.yaml and to DVC's commands: a method's is an entry of a group (policy@ppo)."""
    return f"{_GROUP}@{name}" if name in METHODS else name


def plain_name(name: str) -> str:
    """The inverse of entry."""
    return name.removeprefix(f"{_GROUP}@")


@contextmanager
def _stage(root: Path, name: str) -> Iterator[tuple[Any, Any]]:
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.WARNING)  # it announces every write of dvc.lock
    with Repo(str(root)) as repo, repo.lock:
        try:
            stage = repo.stage.load_one(path=str(root / "dvc.yaml"), name=entry(name))
        except DvcException as error:
            if name in METHODS:
                raise PipelineError(
                    f"stage {name} is not what align.method in params.yaml chooses: "
                    f"`thumbwheel config --set align.method={name} --write` does"
                ) from error
            raise PipelineError(f"dvc.yaml: {error}") from error
        yield repo, stage


def _locked(work: Callable[[], Result]) -> Result:
    from dvc.lock import LockError

    end = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            with _mutex:
                return work()
        except LockError:
            if time.monotonic() > end:
                raise
            time.sleep(0.25)


def _check_deps(stage: Any) -> None:
    for dep in stage.deps:
        if not dep.exists:
            maker = (
                "a flow (align, retrain) writes it"
                if dep.def_path in WRITTEN_BY_FLOWS
                else "run the stage that makes it first"
            )
            raise PipelineError(f"stage {plain_name(stage.name)} needs {dep.def_path}, which is missing: {maker}")


def _restore(repo: Any, stage: Any) -> bool:
    from dvc.stage.cache import RunCacheNotFoundError

    try:
        repo.stage_cache.restore(stage)
    except RunCacheNotFoundError:
        return False
    return True


def _record(repo: Any, stage: Any, how: str) -> Look:
    """Hash the outputs, keep them in the cache, write dvc.lock. The deps' hashes are the ones that `stage` holds."""
    stage.save_outs()
    stage.md5 = stage.compute_md5()
    repo.stage_cache.save(stage)
    stage.commit()
    stage.dump(update_pipeline=False)
    return _describe(stage, how)


def _describe(stage: Any, how: str) -> Look:
    from dvc.dependency.param import ParamsDependency

    params: dict[str, Any] = {}
    deps: dict[str, str] = {}
    for dep in stage.deps:
        if isinstance(dep, ParamsDependency):
            params |= _nested(dep.read_params(flatten=False))
        else:
            deps[dep.def_path] = str(dep.hash_info.value)
    saved = [(dep.hash_info, getattr(dep, "meta", None)) for dep in stage.deps]
    outs = tuple(out.def_path for out in stage.outs)
    return Look(plain_name(stage.name), how, deps, params, outs, _hashes(stage.outs), saved)


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """Sections as plain dicts, dotted names ("ppo.seed") unfolded."""
    from flows.values import merge

    return merge({}, values)


def _hashes(outs: Any) -> dict[str, str]:
    return {out.def_path: out.hash_info.value for out in outs if out.hash_info}
