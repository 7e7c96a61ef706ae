"""MLflow's records: a run per flow run, a nested run per stage and fingerprint, versions of the model with aliases.

The client is used explicitly, never MLflow's "active run", which is per thread and takes MLFLOW_RUN_ID from the
environment. A stage's run is found by its fingerprint and reopened: the same work never makes a second run.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from flows.environment import environment
from flows.values import flatten

EXPERIMENT = "thumbwheel"
MODEL = "thumbwheel"
FINGERPRINT = "thumbwheel.fingerprint"
PARAMS = "thumbwheel.params"  # what a stage was given, as JSON: MLflow's own params are texts
FLOW_RUN = "prefect.flow_run_id"
OWNER = "thumbwheel.owner"
MODEL_HASH = "thumbwheel.model_hash"
_BATCH = 800  # MLflow takes 1,000 metrics a request
_FLUSH_SECONDS = 2.0
_SMALL_FILE = 4 * 1024 * 1024


# ---------------------------------------------------------------- whose run it is


def owner() -> str:
    """This process for others to look up: host:pid:creation time (a pid alone is given to somebody else one day)."""
    return f"{platform.node()}:{os.getpid()}:{psutil.Process().create_time():.2f}"


def is_gone(tag: str) -> bool:
    """Whether the process named by an owner tag ran on this host and is dead. Another host's is never called dead."""
    host, pid, created = tag.rsplit(":", 2)
    if host != platform.node():
        return False
    try:
        process = psutil.Process(int(pid))
        return abs(process.create_time() - float(created)) > 1 or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def code_revision(root: Path) -> str:
    """The git commit of the workspace, with "-dirty" when tracked files differ; "none" where git does not know it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "none"


# ---------------------------------------------------------------- the records of a workspace


class Records:
    """The MLflow records of the workspace `root`: its running server, or its database itself where none runs."""

    def __init__(self, root: Path, uri: str | None = None) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault(
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"
        )  # two lines for every run that is closed
        import mlflow

        self.root = root
        self.uri = uri or environment(root).mlflow_uri()
        mlflow.set_tracking_uri(self.uri)  # some of MLflow's calls know no other way to be told
        self.client = mlflow.MlflowClient(self.uri)
        self.experiment = self._experiment()

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(EXPERIMENT)
        if found is not None:
            return found.experiment_id
        local = urlsplit(self.uri).hostname in (None, "127.0.0.1", "localhost")
        # a plain folder: readable through the server and, when none runs, without it
        place = (self.root / ".thumbwheel" / "mlflow-artifacts").as_uri() if local else None
        try:
            return self.client.create_experiment(EXPERIMENT, artifact_location=place)
        except MlflowException:  # another process was first
            return self.client.get_experiment_by_name(EXPERIMENT).experiment_id

    def search(self, condition: str) -> Iterator[Any]:
        """All runs that meet a condition of MLflow's."""
        token = None
        while True:
            page = self.client.search_runs([self.experiment], condition, max_results=500, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _search(self, **tags: str) -> list[Any]:
        condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        newest = ["attributes.start_time DESC"]
        return list(self.client.search_runs([self.experiment], condition, max_results=100, order_by=newest))

    # -- flow runs

    def open_flow(self, name: str, flow_run_id: str, params: Mapping[str, Any]) -> str:
        """Open the parent run of a flow run and return its id."""
        tags = {
            FLOW_RUN: flow_run_id,
            "thumbwheel.kind": "flow",
            "code.revision": code_revision(self.root),
            OWNER: owner(),
        }
        run_id = self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id
        self._params(run_id, params)
        return run_id

    def close(self, run_id: str, status: str) -> None:
        """End a run: status FINISHED, FAILED or KILLED."""
        self.client.set_terminated(run_id, status)

    def link_stage(self, parent: str, stage: str, how: str, run_id: str | None) -> None:
        """Note in a flow's run how a stage went and which run made its outputs."""
        self.client.set_tag(parent, f"stage.{stage}", how)
        if run_id:
            self.client.set_tag(parent, f"stage.{stage}.run_id", run_id)

    def close_zombies(self) -> list[str]:
        """End, as KILLED, the runs that a dead process of this host left RUNNING. Returns their ids."""
        left = self.client.search_runs([self.experiment], "attributes.status = 'RUNNING'", max_results=1000)
        gone = [run.info.run_id for run in left if OWNER in run.data.tags and is_gone(run.data.tags[OWNER])]
        for run_id in gone:
            self.client.set_terminated(run_id, "KILLED")
        return gone

    def run_url(self, run_id: str) -> str:
        """The run's page, or its id where no server runs."""
        return f"{self.uri}/#/experiments/{self.experiment}/runs/{run_id}" if "://127" in self.uri else run_id

    # -- stage runs

    def find(self, stage: str, fingerprint: str, outs: Mapping[str, str]) -> Any | None:
        """The run that made a stage's outputs: by fingerprint, else by the outputs' hashes; None where MLflow has none."""
        made = {f"dvc.out.{path}": md5 for path, md5 in outs.items()}
        for tags in ({FINGERPRINT: fingerprint}, {"dvc.stage": stage, **made} if made else {}):
            if tags and (found := self._search(**tags)):
                return found[0]
        return None

    @contextmanager
    def stage(
        self, stage: str, fingerprint: str, parent: str | None, params: Mapping[str, Any], tags: Mapping[str, str]
    ) -> Iterator[StageRun]:
        """The run of this fingerprint, opened or reopened; closed as FINISHED, FAILED, or KILLED at an interruption."""
        marks = {"thumbwheel.kind": "stage", "dvc.stage": stage, FINGERPRINT: fingerprint, OWNER: owner(), **tags}
        if parent:
            marks["mlflow.parentRunId"] = parent
        found = self._search(**{FINGERPRINT: fingerprint})
        if found:
            run_id = found[0].info.run_id
            self.client.update_run(run_id, status="RUNNING")
            for key, value in marks.items():
                self.client.set_tag(run_id, key, value)
        else:
            run_id = self.client.create_run(self.experiment, run_name=stage, tags=marks).info.run_id
        self._params(run_id, params)
        if parent:
            self.link_stage(parent, stage, "running", run_id)
        run, monitor = StageRun(self, run_id), self._monitor(run_id)
        status = "KILLED"
        try:
            yield run
            status = "FINISHED"
        except Exception:
            status = "FAILED"
            raise
        finally:
            monitor.finish()
            run.flush()
            self.client.set_terminated(run_id, status)

    def _monitor(self, run_id: str) -> Any:
        import logging

        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)
        monitor = SystemMetricsMonitor(run_id, sampling_interval=5, resume_logging=True, tracking_uri=self.uri)
        monitor.start()
        return monitor

    def _params(self, run_id: str, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        flat = [Param(key, str(value)) for key, value in flatten(params).items()]
        for start in range(0, len(flat), 100):
            self.client.log_batch(run_id, params=flat[start : start + 100])

    # -- model versions

    def register(
        self, run_id: str, stage: str, folder: Path, model_hash: str, md5: str, origin: Mapping[str, str] | None = None
    ) -> str:
        """The registered version with these weights, made if need be; its bytes stay with DVC. Returns its number.

        origin: more tags, about what it was made from.
        """
        import mlflow
        from mlflow.exceptions import MlflowException

        if (known := self.version(model_hash)) is not None:
            return known
        tags = {MODEL_HASH: model_hash, "dvc.md5": md5, "dvc.stage": stage, "path": str(folder.relative_to(self.root))}
        tags |= origin or {}
        model = mlflow.create_external_model(
            name=stage, source_run_id=run_id, experiment_id=self.experiment, tags=tags, params={"dvc_md5": md5}
        )
        try:
            self.client.create_registered_model(MODEL)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"models:/{model.model_id}"
        made = self.client.create_model_version(MODEL, source, run_id, tags=tags, model_id=model.model_id)
        return str(made.version)

    def find_version(self, model_hash: str) -> Any | None:
        """The registered version with these weights, or None."""
        found = self.client.search_model_versions(f"name = '{MODEL}' and tags.`{MODEL_HASH}` = '{model_hash}'")
        return found[0] if found else None

    def version(self, model_hash: str) -> str | None:
        """The number of the registered version with these weights, or None."""
        found = self.find_version(model_hash)
        return str(found.version) if found is not None else None

    def set_alias(self, alias: str, model_hash: str) -> None:
        """Let `alias` (candidate, challenger, champion) name the version with these weights. LookupError if unknown."""
        if (version := self.version(model_hash)) is None:
            raise LookupError(f"MLflow has no version of model {MODEL} with weights {model_hash[:12]}")
        self.client.set_registered_model_alias(MODEL, alias, version)


class StageRun:
    """An open run of a stage: takes metrics in batches and never the same step twice."""

    def __init__(self, records: Records, run_id: str) -> None:
        self.records, self.run_id = records, run_id
        run = records.client.get_run(run_id)
        # a resumed body repeats, with the same figures, the steps since its last checkpoint
        self._logged: dict[str, int] = {metric.key: metric.step for metric in run.data._metric_objs}
        self._waiting: list[Any] = []
        self._flushed = time.monotonic()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log figures of a step; steps that the run holds already are left out."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        for key, value in values.items():
            if step > self._logged.get(key, -1):
                self._logged[key] = step
                self._waiting.append(Metric(key, float(value), now, step))
        if len(self._waiting) >= _BATCH or time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def curve(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Log the points of a curve, `step` in each row, that the run does not hold yet."""
        for row in rows:
            self.metrics(int(row["step"]), {key: value for key, value in row.items() if key != "step"})

    def flush(self) -> None:
        """Send what waits."""
        while self._waiting:
            batch, self._waiting = self._waiting[:_BATCH], self._waiting[_BATCH:]
            self.records.client.log_batch(self.run_id, metrics=batch)
        self._flushed = time.monotonic()

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        from mlflow.entities import RunTag

        self.records.client.log_batch(self.run_id, tags=[RunTag(key, str(value)) for key, value in values.items()])

    def inputs(self, data: Mapping[str, str]) -> None:
        """Name the data that the stage reads: path -> DVC's md5, which is the dataset's digest."""
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.data.sources import LocalArtifactDatasetSource
        from mlflow.entities import DatasetInput, InputTag

        context = [InputTag("mlflow.data.context", "input")]
        datasets = [
            MetaDataset(LocalArtifactDatasetSource(path), name=path, digest=md5)._to_mlflow_entity()
            for path, md5 in data.items()
        ]
        self.records.client.log_inputs(self.run_id, [DatasetInput(dataset, context) for dataset in datasets])

    def figures(self, values: Mapping[str, Any]) -> None:
        """Log what a body returned: numbers as metrics `final.*`, the rest as one JSON file."""
        numbers = {f"final.{k}": float(v) for k, v in values.items() if isinstance(v, int | float)}
        self.metrics(0, numbers)
        self.records.client.log_dict(self.run_id, dict(values), "figures.json")

    def table(self, path: Path) -> None:
        """A file of JSON lines as one of MLflow's tables, to be compared between runs; once, as MLflow would append to it."""
        name = path.with_suffix(".json").name
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if rows and name not in {each.path for each in self.records.client.list_artifacts(self.run_id)}:
            self.records.client.log_table(self.run_id, {key: [row[key] for row in rows] for key in rows[0]}, name)

    def outputs(self, outs: Mapping[str, str]) -> None:
        """Log what stands in the workspace now: hashes as tags, small json, csv and html files, the curves drawn."""
        self.tags({f"dvc.out.{path}": md5 for path, md5 in outs.items()})
        for path in outs:
            found = self.records.root / path
            if found.name == "model":
                continue  # a version of the registry names it, DVC keeps it
            for file in sorted(found.glob("*")) if found.is_dir() else [found]:
                if file.suffix in (".json", ".csv", ".html") and file.stat().st_size < _SMALL_FILE:
                    self.records.client.log_artifact(self.run_id, str(file))
            if (samples := found / "samples.jsonl").exists():
                self.table(samples)
            if found.name == "curves.csv":
                self.records.client.log_figure(self.run_id, draw_curves(found), "curves.png")


def draw_curves(path: Path) -> Any:
    """One small picture per column of a curves.csv over its column `step`, as a matplotlib figure."""
    import pandas as pd
    from matplotlib.figure import Figure

    table = pd.read_csv(path).set_index("step")
    names = [str(name) for name in table.select_dtypes("number").columns]
    columns = min(3, max(1, len(names)))
    rows = max(1, -(-len(names) // columns))
    figure = Figure(figsize=(4 * columns, 2.6 * rows), layout="constrained")
    for place, name in enumerate(names, start=1):
        axes = figure.add_subplot(rows, columns, place)
        axes.plot(table.index, table[name].interpolate(limit_area="inside"))
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    return figure


def final_figures(run: Any) -> dict[str, float]:
    """The numbers that a stage's body returned, from its run."""
    metrics: dict[str, float] = run.data.metrics
    return {key.removeprefix("final."): value for key, value in metrics.items() if key.startswith("final.")}


def as_json(value: Any) -> str:
    """The one spelling of a JSON value, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
