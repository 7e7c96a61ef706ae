"""Files as people have them → records: JSON lines, JSON, text, CSV, parquet, Arrow, folders of Hugging Face's datasets;
plain or compressed by gzip, bzip2, xz or Zstandard.

A stream, never a whole file in memory; what cannot be read is an Unreadable that says where and what to do, and the records
around it survive.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
LONGEST_LINE = 16 * 1024 * 1024  # bytes of a line, a text file or a JSON document
# a compressed file that becomes this many times larger, and larger than that, is taken for an attack
BOMB_RATIO, BOMB_BYTES = 200, 256 * 1024 * 1024
BLOCK = 256 * 1024
ROWS = 1000  # of a table, in memory at a time


class Unreadable(ValueError):
    """A row or file that cannot be used. `reason` says what is wrong with it, `remedy` what to do."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}: {remedy}")
        self.reason, self.remedy = reason, remedy


@dataclass(frozen=True)
class Source:
    """A file, or a folder of Hugging Face's datasets, that can be read. form: one of FORMS."""

    path: Path
    form: str
    compression: str | None = None

    def records(self) -> Iterator[tuple[int, Any]]:
        """(line or row number from 1, record); 0 where a file as a whole is unreadable.

        A record is the bytes of a JSON line, a row with its fields, or an Unreadable. Raises OSError when the file is gone.
        """
        last = 0
        try:
            for number, record in FORMS[self.form](self):
                last = number
                yield number, record
        except Unreadable as problem:
            yield last + 1 if last else 0, problem
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as problem:  # on damaged bytes each decoder raises errors of its own kind
            reason = f"the file is damaged after {last} rows ({problem})" if last else f"cannot be read ({problem})"
            yield last + 1 if last else 0, Unreadable(reason, "get the file again from its source")

    def open(self) -> IO[bytes]:
        """The file's bytes, decompressed."""
        if self.compression is None:
            return self.path.open("rb")
        import bz2
        import gzip
        import lzma

        openers: dict[str, Callable[[Path], Any]] = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}
        if self.compression in openers:
            return Guarded(openers[self.compression](self.path), self.path)  # type: ignore[return-value]
        import pyarrow

        return Guarded(pyarrow.input_stream(str(self.path), compression="zstd"), self.path)  # type: ignore[return-value]


class Guarded:
    """A decompressed stream that refuses to become absurdly larger than its file."""

    def __init__(self, stream: Any, path: Path) -> None:
        self.stream, self.size, self.given = stream, max(1, path.stat().st_size), 0

    def read(self, number: int) -> bytes:
        """At most `number` bytes. Raises Unreadable."""
        found = bytes(self.stream.read(number))
        self.given += len(found)
        if self.given > BOMB_BYTES and self.given > BOMB_RATIO * self.size:
            raise Unreadable(
                f"it expands to more than {BOMB_RATIO} times its size", "decompress it yourself if you trust it"
            )
        return found

    def __enter__(self) -> Guarded:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()


def source_of(path: Path) -> Source | None:
    """How to read what stands at `path`; None when nobody here can."""
    if path.is_dir():
        return Source(path, "datasets") if (path / "state.json").is_file() else None
    if not path.is_file():
        return None
    compression = COMPRESSIONS.get(path.suffix.lower())
    suffix = (path.with_suffix("") if compression else path).suffix.lower()
    form = SUFFIXES.get(suffix)
    if form in ("parquet", "arrow") and compression:
        return None  # these compress inside
    return Source(path, form, compression) if form else None


# ---------------------------------------------------------------- forms


def json_lines(source: Source) -> Iterator[tuple[int, Any]]:
    """One JSON object a line, as bytes: the caller says what a line must hold."""
    with source.open() as stream:
        yield from lines(stream)


def lines(stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """The lines of a stream without their ends; one longer than LONGEST_LINE is an Unreadable and never in memory whole."""
    number, size = 1, 0
    parts: list[bytes] = []
    while block := stream.read(BLOCK):
        *ended, rest = block.split(b"\n")
        for piece in ended:
            size += len(piece)
            yield number, joined(parts, piece, size)
            number, parts, size = number + 1, [], 0
        size += len(rest)
        if size <= LONGEST_LINE:
            parts.append(rest)
        else:
            parts.clear()
    if size:
        yield number, joined(parts, b"", size)


def joined(parts: list[bytes], piece: bytes, size: int) -> bytes | Unreadable:
    """A line from its pieces."""
    if size > LONGEST_LINE:
        return Unreadable(f"a line of {size} bytes (at most {LONGEST_LINE})", "cut it into several rows")
    return b"".join([*parts, piece]).rstrip(b"\r")


def text_file(source: Source) -> Iterator[tuple[int, Any]]:
    """A file that is one text."""
    yield 1, {"text": utf8(content(source))}


def json_document(source: Source) -> Iterator[tuple[int, Any]]:
    """A file with a list of objects, or one object."""
    try:
        found = json.loads(utf8(content(source)))
    except (ValueError, RecursionError) as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f"bad JSON ({error})", "write a list of objects, or one object a line as .jsonl") from None
    rows = found if isinstance(found, list) else [found]
    for number, row in enumerate(rows, 1):
        kind = type(row).__name__
        yield number, row if isinstance(row, dict) else Unreadable(f"not an object but a {kind}", "write objects")


def content(source: Source) -> bytes:
    """All bytes of a file that is one thing."""
    found = bytearray()
    with source.open() as stream:
        while block := stream.read(BLOCK):
            found += block
            if len(found) > LONGEST_LINE:
                remedy = "cut it into several files, or write one object a line as .jsonl"
                raise Unreadable(f"larger than {LONGEST_LINE} bytes", remedy)
    return bytes(found)


def utf8(data: bytes, whole: str = "file") -> str:
    """Text of the bytes of a `whole`. Raises Unreadable."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        remedy = "save the file as UTF-8, such as with `iconv -f GB18030 -t UTF-8`, naming the encoding it has now"
        raise Unreadable(f"not UTF-8 (byte {error.start + 1} of the {whole})", remedy) from None


def table_text(source: Source) -> Iterator[tuple[int, Any]]:
    """CSV, or TSV by its name, with a header; the number is that of the row's first line."""
    name = source.path.name.lower()
    csv.field_size_limit(LONGEST_LINE)
    bad: set[int] = set()

    def texts(stream: IO[bytes]) -> Iterator[str]:
        for number, line in lines(stream):
            if isinstance(line, Unreadable):
                bad.add(number)
                yield "\n"
                continue
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8") + "\n"
            except UnicodeDecodeError:
                bad.add(number)
                yield line.decode("utf-8", "replace") + "\n"

    with source.open() as stream:
        reader = csv.reader(texts(stream), delimiter="\t" if ".tsv" in name else ",")
        try:
            names = next(reader, [])
            if not names or len(set(names)) < len(names):
                raise Unreadable("the first line does not name each column once", "write a header")
            before = reader.line_num
            for cells in reader:
                first, before = before + 1, reader.line_num
                if bad.intersection(range(first, before + 1)):
                    yield first, Unreadable("not UTF-8, or too long", "save the file as UTF-8")
                elif len(cells) != len(names):
                    if cells:
                        why = f"{len(cells)} cells where the header names {len(names)}"
                        yield first, Unreadable(why, "quote cells that hold commas or line ends")
                else:
                    yield first, {name: cell for name, cell in zip(names, cells, strict=True) if cell != ""}
        except csv.Error as error:
            raise Unreadable(f"not a CSV file from here on ({error})", "quote cells that hold quotes") from None


def parquet(source: Source) -> Iterator[tuple[int, Any]]:
    """The rows of a parquet file."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(source.path) as file:
        yield from rows_of(file.iter_batches(batch_size=ROWS), 0)


def arrow(source: Source) -> Iterator[tuple[int, Any]]:
    """The rows of an Arrow file, of the stream or of the file kind."""
    yield from rows_of(arrow_batches(source.path), 0)


def arrow_batches(path: Path) -> Iterator[Any]:
    """The record batches of an Arrow file."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        try:
            yield from pyarrow.ipc.open_stream(file)
        except pyarrow.ArrowInvalid:
            file.seek(0)
            reader = pyarrow.ipc.open_file(file)
            for place in range(reader.num_record_batches):
                yield reader.get_batch(place)


def datasets_folder(source: Source) -> Iterator[tuple[int, Any]]:
    """The rows of a folder that `datasets.Dataset.save_to_disk` wrote, in its files' order."""
    state = json.loads((source.path / "state.json").read_text(encoding="utf-8"))
    done = 0
    for entry in state["_data_files"]:
        path = source.path / Path(entry["filename"]).name
        for number, row in rows_of(arrow_batches(path), done):
            yield number, row
            done = number


def rows_of(batches: Iterator[Any], done: int) -> Iterator[tuple[int, Any]]:
    """Rows of record batches, numbered from done + 1; fields that are null are left out."""
    number = done
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS):
            for row in batch.slice(start, ROWS).to_pylist():
                number += 1
                yield number, {name: value for name, value in row.items() if value is not None}


FORMS: dict[str, Callable[[Source], Iterator[tuple[int, Any]]]] = {
    "jsonl": json_lines,
    "json": json_document,
    "text": text_file,
    "csv": table_text,
    "parquet": parquet,
    "arrow": arrow,
    "datasets": datasets_folder,
}
SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".txt": "text",
    ".md": "text",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
