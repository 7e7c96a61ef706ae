"""The stage: the one mechanism everything hangs on.

dvc.yaml says what a stage reads and makes; run_stage looks whether that is up to date, else opens (or reopens) the MLflow
run of the stage's fingerprint, runs its body, moves the outputs into place, and has DVC record them. A body that was killed
goes on from its work folder, .thumbwheel/work/<stage>/<fingerprint>/. Under `dvc repro`, whose command for every stage is
`thumbwheel stage NAME`, looking, restoring and recording are DVC's own, and only the middle part runs.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows import files, pipeline
from flows.child import CODE, TRAINING, run_child
from flows.environment import environment
from flows.machine import Machine, machine, use_threads
from flows.pipeline import Look
from flows.progress import Progress
from flows.workspace import hold, writer
from models.job import Job

Emit = Callable[[dict[str, Any]], None]
log = logging.getLogger("thumbwheel.stage")


class StageError(RuntimeError):
    """A stage cannot run or its body failed; the message says where and what to do."""


@dataclass(frozen=True)
class Body:
    """Where a stage's code stands: `module` has run(job); with `command`, it runs in a child process instead, or, when
    `shared`, in as many as the machine says."""

    module: str
    command: tuple[str, ...] = ()
    shared: bool = False


STAGES: dict[str, Body] = {
    "curate": Body("flows.curate"),
    "validate": Body("flows.validate"),
    "tokenize": Body("flows.tokenize"),
    "pretrain": Body("models.pretrain", TRAINING, shared=True),
    "written": Body("flows.written"),
    "sft": Body("models.sft", TRAINING, shared=True),
    "snapshot": Body("flows.snapshot"),
    "reward": Body("models.reward", TRAINING, shared=True),
    "ppo": Body("models.ppo", TRAINING, shared=True),
    "dpo": Body("models.dpo", TRAINING, shared=True),
    "kto": Body("models.kto", TRAINING, shared=True),
    "judge": Body("flows.judge"),
}
VERSIONED = ("sft", *pipeline.METHODS)  # whose models answer people, so MLflow's registry lists them


@dataclass(frozen=True)
class StageResult:
    """How a stage went. how: "unchanged" | "restored" | "ran"; outs, deps: path -> md5; seconds: in all;
    figures: what the body returned (numbers only, when it did not run now); run_id: the MLflow run that made the outputs.
    """

    name: str
    how: str
    fingerprint: str
    outs: dict[str, str]
    deps: dict[str, str]
    seconds: float
    figures: dict[str, Any] = field(default_factory=dict)
    run_id: str | None = None


def run_stage(
    name: str,
    *,
    root: Path | None = None,
    parent_run_id: str | None = None,
    flow_run_id: str | None = None,
    emit: Emit | None = None,
    force: bool = False,
    stages: Mapping[str, Body] = STAGES,
) -> StageResult:
    """Bring stage `name` up to date and return how that went.

    root: the workspace (THUMBWHEEL_ROOT, else the current folder); parent_run_id: the MLflow run of the flow;
    emit: takes the body's events, after .thumbwheel/progress.jsonl. Raises StageError, PipelineError (a missing dep),
    ChildError (a training process failed), WorkspaceBusyError, and whatever an in-process body raises.
    """
    if name not in stages:
        raise StageError(f"there is no stage {name}; there are {', '.join(stages)}")
    where = environment(root)
    events = _events(Progress(where.root, name, flow_run_id), emit)
    started = time.monotonic()

    def tell(state: str) -> None:
        events({"event": "stage", "state": state, "seconds": round(time.monotonic() - started, 3)})

    with writer(where.root, f"stage {name}"):
        tell("started")
        try:
            result = _bring_up_to_date(name, where.root, parent_run_id, flow_run_id, events, force, stages)
        except BaseException:
            tell("failed")
            raise
        tell("finished" if result.how == "ran" else result.how)
    return StageResult(**{**vars(result), "seconds": round(time.monotonic() - started, 3)})


def _bring_up_to_date(
    name: str,
    root: Path,
    parent: str | None,
    flow_run: str | None,
    emit: Emit,
    force: bool,
    stages: Mapping[str, Body],
) -> StageResult:
    from flows.record import Records

    seen = pipeline.look(root, name, force=force)
    here, records = _machine(root), Records(root)
    fingerprint = fingerprint_of(seen, here)
    if seen.how == "run":
        outs, figures, run_id = _run(seen, root, here, records, parent, flow_run, emit, stages[name], commit=True)
        result = StageResult(name, "ran", fingerprint, outs, seen.deps, 0.0, figures, run_id)
    else:
        result = _linked(seen, root, fingerprint, records)
    if parent:
        records.link_stage(parent, name, result.how, result.run_id)
    return result


def _linked(seen: Look, root: Path, fingerprint: str, records: Any) -> StageResult:
    """The result of a stage that did not run now, with the run that made its outputs, if MLflow knows it."""
    from flows.record import StageRun, final_figures

    found = records.find(seen.name, fingerprint, seen.hashes)
    if found is not None and found.info.status != "FINISHED":
        # its process died between recording the outputs and closing the run
        StageRun(records, found.info.run_id).outputs(seen.hashes)
        records.close(found.info.run_id, "FINISHED")
        files.remove(work_folder(root, seen.name, fingerprint))
    figures: dict[str, Any] = dict(final_figures(found)) if found is not None else {}
    run_id = found.info.run_id if found is not None else None
    return StageResult(seen.name, seen.how, fingerprint, seen.hashes, seen.deps, 0.0, figures, run_id)


def _run(
    seen: Look,
    root: Path,
    here: Machine,
    records: Any,
    parent: str | None,
    flow_run: str | None,
    emit: Emit,
    body: Body,
    *,
    commit: bool,
) -> tuple[dict[str, str], dict[str, Any], str]:
    """Open the record, run the body, move its outputs into place, have them recorded, close."""
    from flows.lineage import BATCHES, LEARNERS, learned_batches, spell
    from flows.record import FLOW_RUN, PARAMS, as_json, code_revision

    _check_code(root, seen)
    fingerprint = fingerprint_of(seen, here)
    work = work_folder(root, seen.name, fingerprint)
    lock = hold(work.parent / f"{fingerprint}.lock")
    try:
        work.mkdir(parents=True, exist_ok=True)
        tags = {f"dvc.dep.{path}": md5 for path, md5 in seen.deps.items()}
        tags |= {f"machine.{key}": value for key, value in here.tags().items()}
        tags |= {"code.revision": code_revision(root), PARAMS: as_json(seen.params)}
        tags |= {FLOW_RUN: flow_run} if flow_run else {}
        with records.stage(seen.name, fingerprint, parent, seen.params, tags) as run:
            run.inputs(seen.data)

            def sink(event: dict[str, Any]) -> None:
                if event["event"] == "metrics":
                    run.metrics(event["step"], event["metrics"])
                elif event["event"] == "estimate":
                    minutes, memory = event["seconds"] / 60, event["memory"] / 1e9
                    log.info("%s takes at most %.1f minutes and %.1f GB of memory", seen.name, minutes, memory)
                elif event["event"] == "resumed":
                    run.curve(event.pop("curve"))  # a killed process may have had no time to send its last points
                emit(event)

            figures = _run_body(seen, root, here, work, lock, sink, body)
            run.figures(figures)
            _move_outputs(seen, root, work / "output")
            outs = pipeline.commit(root, seen) if commit else pipeline.hash_outs(root, seen.name)
            run.outputs(outs)
            if seen.name in LEARNERS:
                tags[BATCHES] = spell(learned_batches(root, seen, records))
                run.tags({BATCHES: tags[BATCHES]})
            tags |= {"thumbwheel.flow": parent} if parent else {}
            _register(seen, root, records, run.run_id, outs, tags)
        files.remove(work)
    finally:
        os.close(lock)
    (work.parent / f"{fingerprint}.lock").unlink(missing_ok=True)
    return outs, figures, run.run_id


def _run_body(seen: Look, root: Path, here: Machine, work: Path, lock: int, emit: Emit, body: Body) -> dict[str, Any]:
    output = work / "output"
    files.remove(output)  # of a run that was killed while it wrote or moved them; the body makes them again
    output.mkdir()
    if body.command:
        spec = {
            "stage": seen.name,
            "root": str(root),
            "deps": list(seen.deps),
            "output": str(output),
            "work": str(work),
            "params": seen.params,
            "device": here.device,
            "threads": here.threads,
            "world_size": here.world_size if body.shared else 1,
        }
        log_path = root / ".thumbwheel" / "logs" / f"{seen.name}.log"
        return run_child(spec, command=body.command, work=work, log=log_path, emit=emit, lock=lock)
    if any(path.startswith("models/") and path != "models/job.py" for path in seen.deps):
        use_threads(here.threads)
    job = Job(seen.name, root, tuple(seen.deps), output, work, seen.params, here.device, here.threads, emit)
    return dict(importlib.import_module(body.module).run(job))


def _move_outputs(seen: Look, root: Path, output: Path) -> None:
    """Rename what the body wrote to the declared outs. Raises StageError for a missing or an undeclared one."""
    folder = Path("artifacts") / seen.name
    parts = {out: output / Path(out).relative_to(folder) for out in seen.outs}
    for out, part in parts.items():
        if not part.exists():
            raise StageError(f"stage {seen.name} did not make {out}, which dvc.yaml declares")
    if output not in parts.values():
        extra = sorted({p.name for p in output.iterdir()} - {p.relative_to(output).parts[0] for p in parts.values()})
        if extra:
            raise StageError(f"stage {seen.name} made {folder / extra[0]}, which dvc.yaml does not declare")
    for out, part in parts.items():
        files.move(part, root / out)


def _register(seen: Look, root: Path, records: Any, run_id: str, outs: dict[str, str], tags: Mapping[str, str]) -> None:
    """List a model that answers people; its version says what it was made from, and in which flow run."""
    folder = root / "artifacts" / seen.name / "model"
    weights = folder / "model.safetensors"
    if seen.name in VERSIONED and weights.exists():
        with weights.open("rb") as file:
            model_hash = hashlib.file_digest(file, "sha256").hexdigest()
        origin = {key: value for key, value in tags.items() if not key.startswith("dvc.dep.") or key[8:] in seen.data}
        records.register(run_id, seen.name, folder, model_hash, outs[f"artifacts/{seen.name}/model"], origin)
        records.set_alias("candidate", model_hash)


# ---------------------------------------------------------------- identity


def fingerprint_of(seen: Look, here: Machine) -> str:
    """The identity of a run: stage, hashes of data and code, params, and what changes bits. 16 hex digits."""
    from flows.record import as_json

    identity = {"stage": seen.name, "deps": seen.deps, "params": seen.params, **here.bits()}
    return hashlib.sha256(as_json(identity).encode()).hexdigest()[:16]


def work_folder(root: Path, name: str, fingerprint: str) -> Path:
    """Where a run keeps its checkpoints; it outlives a kill and goes when the run has ended well."""
    return root / ".thumbwheel" / "work" / name / fingerprint


def _machine(root: Path) -> Machine:
    where = environment(root)
    return machine(root, threads=where.threads, device=where.device, world_size=where.processes)


def _check_code(root: Path, seen: Look) -> None:
    """The source files that dvc.yaml names in this workspace must be the ones that this process runs."""
    if root == CODE:
        return
    for path in seen.deps:
        running = CODE / path
        if path.endswith(".py") and running.exists() and running.read_bytes() != (root / path).read_bytes():
            raise StageError(
                f"{root / path} is not what runs here ({running}): start thumbwheel from {root}'s own code"
            )


def _events(progress: Progress, emit: Emit | None) -> Emit:
    def both(event: dict[str, Any]) -> None:
        progress(event)
        if emit is not None:
            emit(event)

    return both


# ---------------------------------------------------------------- `thumbwheel stage NAME`


def main(name: str, *, stages: Mapping[str, Body] = STAGES) -> int:
    """Run one stage in the current workspace; under `dvc repro`, its middle part only. Returns the exit status."""
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, _terminate)  # so that the child is ended and the record closed
    where = environment()
    if os.environ.get("DVC_STAGE", "").split(":")[-1] != pipeline.entry(name):
        result = run_stage(name, root=where.root, stages=stages)
        print(f"{name}: {result.how} in {result.seconds:.1f} s")
        return 0
    from flows.record import Records

    with writer(where.root, f"dvc repro {name}"):
        seen = pipeline.look(where.root, name, restore=False)
        events = _events(Progress(where.root, name, None), None)
        records = Records(where.root)
        records.close_zombies()
        _run(seen, where.root, _machine(where.root), records, None, None, events, stages[name], commit=False)
    return 0


def _terminate(signum: int, frame: Any) -> None:
    raise SystemExit(128 + signum)
