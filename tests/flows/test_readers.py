"""Files of every form and conversations of every format become rows; what is broken is named, and the rows around it live."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from flows import conversations, curate, readers
from flows.readers import Unreadable, source_of
from models.job import Job

ROWS = [{"text": "one"}, {"text": "二"}, {"text": "three,\nwith a line"}]


def read(path: Path) -> list[tuple[int, Any]]:
    """The records of a file; JSON lines parsed."""
    source = source_of(path)
    assert source is not None
    return [(n, json.loads(r) if isinstance(r, bytes) else r) for n, r in source.records()]


def zstd(data: bytes) -> bytes:
    return bytes(pyarrow.compress(data, codec="zstd", asbytes=True))


@pytest.mark.parametrize(
    ("suffix", "compress"), [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)]
)  # fmt: skip
def test_json_lines_plain_and_compressed(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(compress("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()))
    assert read(path) == [(1, ROWS[0]), (2, ROWS[1]), (3, ROWS[2])]


def test_tables_arrow_and_folders_of_datasets(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([*ROWS, {"text": None}])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pyarrow.OSFile(str(tmp_path / "rows.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "folder"))
    expected = list(enumerate(ROWS, 1))
    assert read(tmp_path / "rows.parquet") == read(tmp_path / "rows.arrow") == [*expected, (4, {})]
    assert read(tmp_path / "folder") == expected


def test_text_json_csv_and_tsv(tmp_path: Path) -> None:
    (tmp_path / "whole.txt").write_text("two\nlines", encoding="utf-8")
    (tmp_path / "list.json").write_text(json.dumps([*ROWS, 5]), encoding="utf-8")
    (tmp_path / "t.csv").write_bytes('text,source\none,a\n"three,\nwith a line",\n二,b\n'.encode())
    (tmp_path / "t.tsv").write_bytes(b"text\tsource\na, b\tc\n")
    assert read(tmp_path / "whole.txt") == [(1, {"text": "two\nlines"})]
    (*good, (number, bad)) = read(tmp_path / "list.json")
    assert good == list(enumerate(ROWS, 1)) and number == 4 and isinstance(bad, Unreadable)
    csv_rows = [
        (2, {"text": "one", "source": "a"}),
        (3, {"text": "three,\nwith a line"}),
        (5, {"text": "二", "source": "b"}),
    ]
    assert read(tmp_path / "t.csv") == csv_rows
    assert read(tmp_path / "t.tsv") == [(2, {"text": "a, b", "source": "c"})]


def test_the_rows_before_the_damage_survive(tmp_path: Path) -> None:
    rng = random.Random(0)
    data = b"".join(b'{"text": "%d"}\n' % rng.getrandbits(200) for _ in range(20_000))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(data)[:-100_000])
    *good, (line, problem) = read(tmp_path / "cut.jsonl.gz")
    assert len(good) > 5000 and line == len(good) + 1
    assert isinstance(problem, Unreadable) and "damaged" in problem.reason
    (tmp_path / "t.csv").write_bytes(b"text,b\nfine,1\n\xff\xfe,2\nmore,1,2\nlast,3\n")
    found = read(tmp_path / "t.csv")
    assert [n for n, row in found if isinstance(row, Unreadable)] == [3, 4]
    assert [row for _, row in found if isinstance(row, dict)] == [
        {"text": "fine", "b": "1"},
        {"text": "last", "b": "3"},
    ]


def test_bombs_and_huge_lines_never_stand_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BOMB_BYTES", 4 * 2**20)
    monkeypatch.setattr(readers, "LONGEST_LINE", 2**20)
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wb") as file:
        file.write(b'{"text": "first"}\n')
        for _ in range(64):
            file.write(b" " * (2**18 - 1) + b"\n")
    source = source_of(tmp_path / "bomb.jsonl.gz")
    assert source is not None
    *_, (_, problem) = source.records()
    assert isinstance(problem, Unreadable) and "expands" in problem.reason
    (tmp_path / "long.jsonl").write_bytes(b'{"text": "a"}\n' + b"x" * 3 * 2**20 + b'\n{"text": "b"}')
    (_, first), (line, long), (_, last) = read(tmp_path / "long.jsonl")
    assert (first, last) == ({"text": "a"}, {"text": "b"}) and line == 2 and "a line of 3145728 bytes" in str(long)


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TREE = {
    "prompt": {
        "role": "prompter", "text": "q", "replies": [
            {"role": "assistant", "text": "worse", "rank": 1, "replies": []},
            {"role": "assistant", "text": "a", "rank": 0, "replies": [
                {"role": "prompter", "text": "and?", "replies": [{"role": "assistant", "text": "b", "rank": None}]},
                {"role": "prompter", "text": "why?", "replies": []},
            ]},
        ],
    }
}  # fmt: skip


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [[USER, ANSWER]]),
        ({"instruction": "q", "input": "", "output": "a"}, [[USER, ANSWER]]),
        ({"instruction": "do", "input": "this", "output": "a"}, [[{**USER, "content": "do\n\nthis"}, ANSWER]]),
        ({"prompt": [USER], "completion": [ANSWER], "label": True}, [[USER, ANSWER]]),
        ({"prompt": "q", "completion": "bad", "label": False}, []),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, [[USER, ANSWER]]),
        ({"chosen": [USER, ANSWER], "rejected": [USER, USER]}, [[USER, ANSWER]]),
        ({"question": "q", "answer": "a"}, [[USER, ANSWER]]),
        (TREE, [[USER, ANSWER, {**USER, "content": "and?"}, {**ANSWER, "content": "b"}]]),
    ],
)
def test_conversation_formats(row: dict[str, Any], expected: list[Any]) -> None:
    assert [found["messages"] for found in conversations.rows({**row, "source": "s"}, "sft")] == expected


def test_prompts_and_texts_of_other_formats() -> None:
    def one(row: dict[str, Any], kind: str) -> Any:
        (found,) = conversations.rows(row, kind)
        return found

    assert one({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "prompts") == {
        "prompt": [USER]
    }
    assert one({"instruction": "do", "input": "this", "output": "a"}, "prompts") == {"prompt": "do\n\nthis"}
    assert one({"content": "t", "group": "g"}, "pretrain") == {"text": "t", "group": "g"}
    with pytest.raises(Unreadable, match="from 'bob'"):
        one({"conversations": [{"from": "bob", "value": "q"}]}, "sft")


def test_curate_reads_a_folder_of_all_kinds_of_files(tmp_path: Path) -> None:
    for kind in ("pretrain", "sft", "prompts"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    (tmp_path / "data/pretrain/book.txt").write_text("A text of its own.", encoding="utf-8")
    (tmp_path / "data/sft/gpt.json").write_text(
        json.dumps([{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}])
    )
    (tmp_path / "data/sft/odd.jsonl").write_text('{"nothing": 1}\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"question": "Why?"}]), tmp_path / "data/prompts/q.parquet")
    outside = tmp_path.parent / f"{tmp_path.name}-outside.jsonl"
    outside.write_text('{"prompt": "a secret"}\n')
    (tmp_path / "data/prompts/link.jsonl").symlink_to(outside)
    output = tmp_path / "out"
    output.mkdir()
    job = Job(
        "curate", tmp_path, ("data",), output, tmp_path / "work", {"curate": {"heldout_percent": 0, "tune_percent": 0}}
    )
    curate.run(job)
    files = {p.stem: [json.loads(line) for line in p.read_text("utf-8").splitlines()] for p in output.glob("*.jsonl")}
    assert [row["text"] for row in files["pretrain.train"]] == ["A text of its own."]
    assert [row["messages"][1]["content"] for row in files["sft.train"]] == ["Hello"]
    assert [row["messages"][0]["content"] for row in files["prompts.train"]] == ["Why?"]
    named = {(row["file"], row["line"]): row["reason"] for row in files["quarantine"]}
    assert named == {
        ("data/sft/odd.jsonl", 1): 'field "messages" is missing',
        ("data/prompts/link.jsonl", 0): "a link that leads out of the workspace",
    }


def test_no_mutation_of_a_file_crashes_or_hangs(tmp_path: Path) -> None:
    rng = random.Random(5)
    plain = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS * 5)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS * 5), tmp_path / "seed.parquet")
    seeds = {
        "a.jsonl": plain,
        "a.jsonl.gz": gzip.compress(plain),
        "a.jsonl.zst": zstd(plain),
        "a.jsonl.xz": lzma.compress(plain),
        "a.csv": b"text,source\n" + b'"one, two",b\n' * 10,
        "a.json": json.dumps(ROWS).encode(),
        "a.parquet": (tmp_path / "seed.parquet").read_bytes(),
        "a.txt": "一二三".encode(),
    }
    for turn in range(1000):
        name = rng.choice(sorted(seeds))
        data = bytearray(seeds[name])
        for _ in range(rng.randint(1, 8)):
            place = rng.randrange(len(data))
            action = rng.randrange(4)
            if action == 0:
                data[place] = rng.randrange(256)
            elif action == 1:
                del data[place : place + rng.randint(1, 40)]
            elif action == 2:
                data[place:place] = rng.choice([b"\0", b"\xff\xfe", b"\n", b'"', b"[" * 2000, b"\xf0\x9f"])
            else:
                del data[place:]
            data = data or bytearray(b"\0")
        path = tmp_path / f"{turn}-{name}"
        path.write_bytes(bytes(data))
        source = source_of(path)
        assert source is not None
        for number, record in source.records():
            assert number >= 0 and isinstance(record, bytes | dict | Unreadable)
            if isinstance(record, Unreadable):
                assert record.reason and record.remedy
            else:
                try:
                    row = curate.parse(record, "pretrain") if isinstance(record, bytes) else record
                    list(curate.understood(row, "pretrain"))
                except Unreadable as problem:
                    assert problem.reason and problem.remedy
        path.unlink()
