"""From a thumb to every model that it taught, and from a model to its thumbs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.erasure import TAG
from flows.lineage import BATCHES, read, versions
from flows.values import read_document

if TYPE_CHECKING:
    from rich.console import RenderableType

    from feedback.store import Store
    from flows.record import Records

VERSION = re.compile(r"v([0-9]{1,9})")
HASH = re.compile(r"[0-9a-f]{8,64}")


class UnknownName(LookupError):
    """Nothing is called so: the message says what can be asked for."""


def trace(root: Path, store: Store, records: Records, name: str) -> dict[str, Any]:
    """What is known of an answer (its id), an opinion (its number), or a model (v and its version's number, or 8 or more
    digits of its weights' hash). {"opinions": […]} or {"model": {…}}, plain values. Raises UnknownName.
    """
    from feedback import whereabouts

    if (version := find_version(records, name)) is not None:
        return {"model": of_model(store, version)}
    with store.read() as connection:
        found = whereabouts.find(connection, name)
    if not found:
        raise UnknownName(
            f"there is no opinion about {name!r}, and no model: give the id of an answer, the number of an opinion, v and the "
            "number of a model's version, or the first 8 or more digits of its hash"
        )
    models = [Learned.of(version) for version in versions(records)]
    models += [Learned.of_run(run) for run in records.search(f"tags.`{BATCHES}` != ''")]
    percent = int(read_document(root / "params.yaml").get("snapshot", {}).get("heldout_percent", 0))
    return {"opinions": [of_opinion(opinion, models, percent) for opinion in found]}


def find_version(records: Records, name: str) -> Any | None:
    """The version of the model that `name` means, or None. Raises UnknownName when a hash begins like several."""
    from flows.record import MODEL_HASH

    number = VERSION.fullmatch(name)
    if number is None and not HASH.fullmatch(name):
        return None
    found = [
        version
        for version in versions(records)
        if (str(version.version) == number[1] if number else version.tags.get(MODEL_HASH, "").startswith(name))
    ]
    if len(found) > 1:
        raise UnknownName(f"{name} is the beginning of {len(found)} models' hashes: give more of it")
    return found[0] if found else None


@dataclass(frozen=True)
class Learned:
    """A version of the model, or any stage's run, with the batches that it learned from. A run has no version and no hash."""

    version: str
    stage: str
    model_hash: str
    run: str
    flow_run: str
    batches: frozenset[int]
    erasures: str

    @classmethod
    def of(cls, version: Any) -> Learned:
        """Of MLflow's entry."""
        from flows.record import FLOW_RUN, MODEL_HASH

        tags = version.tags
        about = (tags.get("dvc.stage", ""), tags.get(MODEL_HASH, ""), version.run_id, tags.get(FLOW_RUN, ""))
        return cls(str(version.version), *about, frozenset(read(tags.get(BATCHES, ""))), tags.get(TAG, ""))

    @classmethod
    def of_run(cls, run: Any) -> Learned:
        """Of a run of MLflow's."""
        from flows.record import FLOW_RUN

        tags = run.data.tags
        about = (tags.get("dvc.stage", ""), "", run.info.run_id, tags.get(FLOW_RUN, ""))
        return cls("", *about, frozenset(read(tags[BATCHES])), tags.get(TAG, ""))

    def plain(self) -> dict[str, Any]:
        """For a table or JSON."""
        names = ("version", "stage", "model_hash", "run", "flow_run")
        return {**{name: getattr(self, name) for name in names}, "erasures": sorted(read(self.erasures))}


def of_opinion(opinion: Any, models: list[Learned], heldout_percent: int) -> dict[str, Any]:
    """An opinion, the batches it is in, and the models that learned from it.

    A model did so when a batch of its own had accepted the opinion, and it stood at the end of the model's last batch; SFT
    learns from people's own answers alone. An opinion on a prompt that is held out (by today's snapshot.heldout_percent) was
    used to measure, not to learn; of an erased prompt nobody can say.
    """
    from feedback.snapshot import bucket

    ends = {place.batch_id: place.last_seq for place in opinion.places}
    accepted = {place.batch_id for place in opinion.places if place.accepted}

    def learned(model: Learned) -> bool:
        if model.stage in ("written", "sft") and opinion.kind != "edit":
            return False
        known = [ends[id] for id in model.batches if id in ends]
        return bool(accepted & model.batches) and opinion.stood_at(max(known))

    return {
        "id": opinion.id,
        "answer": opinion.completion_id,
        "kind": opinion.kind,
        "value": opinion.value,
        "source": opinion.source,
        "state": "retracted" if opinion.retracted and opinion.moderation != "erased" else opinion.moderation,
        "said_at": opinion.said_at.isoformat(),
        "answered_by": opinion.model_hash,
        "held_out": bucket(opinion.messages) < heldout_percent if opinion.messages else None,
        "batches": [plain(place) for place in opinion.places],
        "models": [model.plain() for model in models if model.version and learned(model)],
        "runs": [{"run": run.run, "stage": run.stage} for run in models if not run.version and learned(run)],
    }


def plain(place: Any) -> dict[str, Any]:
    """A batch in which an opinion is."""
    values = vars(place)
    return {key: value.isoformat() if isinstance(value, datetime) else value for key, value in values.items()}


def of_model(store: Store, version: Any) -> dict[str, Any]:
    """A version of the model: what it was made from, and its batches with what people said in them."""
    from feedback import whereabouts

    model = Learned.of(version)
    with store.read() as connection:
        batches = whereabouts.counts(connection, model.batches)
    return {
        **model.plain(),
        "flow": version.tags.get("thumbwheel.flow", ""),
        "code_revision": version.tags.get("code.revision", ""),
        "inputs": {key[8:]: md5 for key, md5 in sorted(version.tags.items()) if key.startswith("dvc.dep.")},
        "output": version.tags.get("dvc.md5", ""),
        "aliases": sorted(version.aliases),
        "batches": [{"id": id, **batches[id]} if id in batches else {"id": id} for id in sorted(model.batches)],
    }


# ---------------------------------------------------------------- for people


def pictures(found: dict[str, Any]) -> list[RenderableType]:
    """Rich tables of what trace returned."""
    if "model" in found:
        return model_tables(found["model"])
    return [table for opinion in found["opinions"] for table in opinion_tables(opinion)]


def grid(title: str, *columns: str) -> Any:
    """An empty table."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def opinion_tables(opinion: dict[str, Any]) -> list[RenderableType]:
    """Its batches, and the models that learned from it."""
    said = f"{opinion['kind']} {opinion['value']:+d}" if opinion["state"] != "erased" else opinion["kind"]
    held = {True: ", on a prompt that is held out: it measured, and taught nobody", False: "", None: ""}
    title = f"opinion {opinion['id']} ({said}, {opinion['state']}) on {opinion['answer']}{held[opinion['held_out']]}"
    batches = grid(title, "batch", "there", "snapshot", "consumed by MLflow run")
    for place in opinion["batches"]:
        there = "accepted" if place["accepted"] else place["reason"]
        sha256, run = place["snapshot_sha256"] or "-", place["mlflow_run_id"] or "-"
        batches.add_row(str(place["batch_id"]), there, sha256[:12], run)
    models = grid(
        "models that learned from it", "version", "stage", "hash", "MLflow run", "Prefect flow run", "erasures"
    )
    for model in opinion["models"]:
        names = ("version", "stage", "model_hash", "run", "flow_run")
        cells = [model[name][:12] if name == "model_hash" else model[name] or "-" for name in names]
        models.add_row(*cells, ",".join(map(str, model["erasures"])) or "-")
    runs = grid("MLflow runs that learned from it", "stage", "run")
    for run in opinion["runs"]:
        runs.add_row(run["stage"], run["run"])
    return [batches, models, runs]


def model_tables(model: dict[str, Any]) -> list[RenderableType]:
    """Where it comes from, and its batches."""
    origin = grid(f"model v{model['version']} ({model['stage']})", "what", "which")
    rows = [("hash of the weights", model["model_hash"]), ("aliases", ", ".join(model["aliases"]) or "-")]
    rows += [("MLflow run", model["run"]), ("Prefect flow run", model["flow_run"] or "-")]
    rows += [("code revision", model["code_revision"] or "-"), ("output in DVC", model["output"])]
    rows += [(f"input {path}", md5) for path, md5 in model["inputs"].items()]
    if model["erasures"]:
        rows.append(("opinions were erased since", "erasure " + ", ".join(map(str, model["erasures"]))))
    for row in rows:
        origin.add_row(*row)
    batches = grid("batches that it learned from", "batch", "accepted", "said", "left out", "erased")
    for batch in model["batches"]:
        if "accepted" not in batch:
            batches.add_row(str(batch["id"]), "not in this feedback database", "", "", "")
            continue
        said, out = (", ".join(f"{n} {what}" for what, n in batch[key].items()) or "-" for key in ("said", "excluded"))
        batches.add_row(str(batch["id"]), str(batch["accepted"]), said, out, str(batch["erased"]))
    return [origin, batches]
