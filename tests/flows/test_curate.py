"""Stage curate: what is kept, what is left out, what is quarantined; every expectation worked out by hand."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from flows import curate
from flows.curate import CurateOptions, Unreadable, key, normalise, pieces
from models.job import Job, build_options

PAIR = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
# buckets worked out with `printf %s NAME | sha256sum`: the first 8 hexadecimal digits modulo 100
TRAIN, HELDOUT, TUNE = "g1", "g9", "g12"


def bucket_by_hand(group: str) -> int:
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:4], "big") % 100


def write(root: Path, files: dict[str, bytes | list[dict[str, Any]]]) -> None:
    """Files below data/, rows as JSON lines; the kinds that are not named get one plain training row."""
    plain: dict[str, list[dict[str, Any]]] = {
        "pretrain/plain.jsonl": [{"text": "plain text", "group": TRAIN}],
        "sft/plain.jsonl": [{"messages": PAIR, "group": TRAIN}],
        "prompts/plain.jsonl": [{"prompt": "plain prompt", "group": TRAIN}],
    }
    kinds = {name.split("/")[0] for name in files}
    for name, rows in {**{n: r for n, r in plain.items() if n.split("/")[0] not in kinds}, **files}.items():
        path = root / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rows if isinstance(rows, bytes) else b"".join(json.dumps(r).encode() + b"\n" for r in rows))


def run(root: Path, **options: int) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """The stage's figures and the rows of each file it wrote."""
    output = root / "artifacts" / "curate"
    output.mkdir(parents=True)
    figures = curate.run(Job("curate", root, ("data",), output, root / "work", {"curate": options}))
    files = {p.stem: [json.loads(line) for line in p.read_text("utf-8").splitlines()] for p in output.glob("*.jsonl")}
    return figures, files


def test_the_groups_of_these_tests_fall_on_the_sides_they_are_named_for() -> None:
    assert bucket_by_hand(HELDOUT) < 10 <= bucket_by_hand(TUNE) < 15 <= bucket_by_hand(TRAIN)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  two   spaces\t here ", "two spaces here"),
        ("e\u0301", "\u00e9"),  # NFC
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("bell\x07 and \u200bzero width\ufeff", "bell and zero width"),
        ("one\n\n\n\ntwo \n", "one\n\ntwo"),
        ("\u3000全角 空格", "全角 空格"),
        ("👩\u200d👧 stays a family", "👩\u200d👧 stays a family"),
    ],
)
def test_normalise(text: str, clean: str) -> None:
    assert normalise(text) == clean


@pytest.mark.parametrize("text", ["a\0b", "a\ufffdb", "a\ud800b"])
def test_normalise_refuses_signs_of_a_wrong_encoding(text: str) -> None:
    with pytest.raises(Unreadable):
        normalise(text)


def test_key_ignores_case_space_and_punctuation_in_any_script() -> None:
    assert key("How are you?") == key("how  ARE you") == key("HOW-ARE_YOU")
    assert key("你好，世界！") == key("你好 世界")
    assert key("?!") != key("...")  # nothing but punctuation: compared as it is
    assert key("how are you") != key("how are they")


def test_pieces_cut_at_line_ends_then_spaces_then_anywhere() -> None:
    assert list(pieces("aaaa\nbbb cc\ndd", 8)) == ["aaaa", "bbb cc", "dd"]
    assert list(pieces("aaa bbbbb", 6)) == ["aaa", "bbbbb"]
    assert list(pieces("abcdefg", 3)) == ["abc", "def", "g"]


def test_split_by_group_ids_and_sources(tmp_path: Path) -> None:
    rows = [{"text": f"text of {group}", "group": group, "source": "mine"} for group in (TRAIN, HELDOUT, TUNE)]
    prompts = [{"prompt": f"prompt of {group}", "group": group} for group in (TRAIN, HELDOUT, TUNE)]
    write(tmp_path, {"pretrain/a.jsonl": rows, "prompts/a.jsonl": prompts})
    figures, files = run(tmp_path)
    identifier = hashlib.sha256(b"text of g1").hexdigest()[:16]
    assert files["pretrain.train"] == [{"id": identifier, "text": "text of g1", "source": "mine"}]
    assert [row["text"] for row in files["pretrain.heldout"]] == [
        "text of g9"
    ]  # g12 is kept for tuning, seen by nobody
    for name, group in (("train", TRAIN), ("report", HELDOUT), ("tune", TUNE)):
        messages = [row["messages"] for row in files[f"prompts.{name}"]]
        assert messages == [[{"role": "user", "content": f"prompt of {group}"}]]
    assert (figures["pretrain.train"], figures["pretrain.heldout"], figures["quarantined"]) == (1, 1, 0)


def test_duplicates_and_leaks_are_left_out_and_counted(tmp_path: Path) -> None:
    def ask(content: str, group: str, answer: str = "yes") -> dict[str, Any]:
        return {
            "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
            "group": group,
        }

    texts = [
        {"text": "said in a chat\nand answered", "group": TRAIN},
        {"text": "said in a chat \nand  answered", "group": TRAIN},  # the same once normalised
        {"text": "Said in a chat, and answered!", "group": HELDOUT},  # known to training by its key
        {"text": "fresh", "group": HELDOUT},
    ]
    sft = [ask("Where?", TRAIN), ask("where", HELDOUT, "no"), ask("Why?", HELDOUT), ask("And answered", HELDOUT)]
    prompts = [
        {"prompt": "Who goes there", "group": TRAIN},
        {"prompt": "who goes there?", "group": HELDOUT},  # in prompts.train
        {"prompt": "WHERE", "group": HELDOUT},  # in sft.train
        {"prompt": "Said in a chat.", "group": HELDOUT},  # a line of pretraining text
        {"prompt": "tuned with this", "group": TUNE},
        {"prompt": "Tuned with this", "group": HELDOUT},  # in prompts.tune
        {"prompt": "Quite new", "group": HELDOUT},
    ]
    write(tmp_path, {"pretrain/a.jsonl": texts, "sft/a.jsonl": sft, "prompts/a.jsonl": prompts})
    _, files = run(tmp_path)
    assert [len(files["pretrain.train"]), [r["text"] for r in files["pretrain.heldout"]]] == [1, ["fresh"]]
    assert [row["messages"][0]["content"] for row in files["sft.heldout"]] == ["Why?"]
    assert [row["messages"][0]["content"] for row in files["prompts.report"]] == ["Quite new"]
    steps = json.loads((tmp_path / "artifacts/curate/summary.json").read_text())["steps"]
    assert steps["pretrain"]["left_out_duplicates"] == 1
    assert steps["pretrain"]["left_out_known_heldout"] == 1
    assert steps["sft"]["left_out_known_heldout"] == 2
    assert steps["prompts"]["left_out_known_heldout"] == 4


BROKEN = [
    ("sft", b'{"messages": [', "bad JSON"),
    ("sft", b'{"text": "x"}', 'field "messages" is missing'),
    ("sft", b"[1]", "not an object but a list"),
    ("sft", b"", "empty line"),
    ("sft", b'{"messages": []}', '"messages" is not a list with messages'),
    ("sft", b'{"messages": [{"role": "user"}]}', 'message 1 lacks "role" or "content"'),
    ("sft", b'{"messages": [{"role": "bot", "content": "x"}]}', "message 1 has the role 'bot'"),
    ("sft", b'{"messages": [{"role": "assistant", "content": "x"}]}', "an assistant turn comes first"),
    ("sft", b'{"messages": [{"role": "user", "content": "x"}]}', "the last message is not by the assistant"),
    ("sft", b'{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}', "do not alternate"),
    ("sft", b'{"messages": [{"role": "user", "content": 5}]}', "message 1 is not text but int"),
    ("prompts", b'{"prompt": " \\u200b "}', '"prompt" is empty'),
    ("prompts", b'{"prompt": null}', '"prompt" is not text but NoneType'),
    ("pretrain", "你好".encode("gb18030"), "not UTF-8 (byte 1 of the line)"),
    ("pretrain", b'{"text": "a\\u0000b"}', "NUL"),
    ("pretrain", b'{"text": "a\\ud800b"}', "surrogate"),
    ("pretrain", b'{"text": ["a"]}', '"text" is not text but list'),
    ("pretrain", b'{"text": "a", "group": 7}', 'field "group" is not text'),
    ("pretrain", b"[" * 100_000, "bad JSON"),
]


@pytest.mark.parametrize(("kind", "line", "reason"), BROKEN, ids=[f"{k}-{r}" for k, _, r in BROKEN])
def test_an_unreadable_row_is_named_and_the_others_are_kept(
    tmp_path: Path, kind: str, line: bytes, reason: str
) -> None:
    good = {"pretrain": {"text": "a"}, "sft": {"messages": PAIR}, "prompts": {"prompt": "a"}}[kind]
    row = json.dumps({**good, "group": TRAIN}).encode()
    write(tmp_path, {f"{kind}/mine.jsonl": row + b"\n" + line + b"\n" + row.replace(b'"a"', b'"b"') + b"\n"})
    figures, files = run(tmp_path)
    (found,) = files["quarantine"]
    assert (found["file"], found["line"]) == (f"data/{kind}/mine.jsonl", 2)
    assert reason in found["reason"]
    assert found["remedy"]
    assert len(found["text"]) <= 200
    assert figures["quarantined"] == 1
    assert figures[f"{kind}.train"] == (1 if kind == "sft" else 2)  # the two SFT rows are the same


def test_files_that_are_wrong_as_a_whole_are_quarantined_with_line_0(tmp_path: Path) -> None:
    write(tmp_path, {"sft/empty.jsonl": b"", "prompts/table.xlsx": b"a,b\n", "pretrain/none.csv": b"a,a\n"})
    figures, files = run(tmp_path)
    assert [(row["file"], row["line"], row["reason"]) for row in files["quarantine"]] == [
        ("data/pretrain/none.csv", 0, "the first line does not name each column once"),
        ("data/sft/empty.jsonl", 0, "empty file"),
        ("data/prompts/table.xlsx", 0, files["quarantine"][2]["reason"]),
    ]
    assert files["quarantine"][2]["reason"].startswith("not a file that is read (.jsonl, ")
    assert figures["sft.train"] == 0


def test_long_texts_are_cut_on_one_side_and_long_messages_left_out(tmp_path: Path) -> None:
    long = [{"role": "user", "content": "x" * 11}, {"role": "assistant", "content": "y"}]
    write(tmp_path, {"pretrain/a.jsonl": [{"text": "first line\nsecond"}], "sft/a.jsonl": [{"messages": long}]})
    _, files = run(tmp_path, max_chars_text=12, max_chars_message=10)
    assert bucket_by_hand("first line") >= 15  # without a group the first piece decides
    assert sorted(row["text"] for row in files["pretrain.train"]) == ["first line", "second"]
    assert (
        json.loads((tmp_path / "artifacts/curate/summary.json").read_text())["steps"]["sft"]["left_out_too_long"] == 1
    )


def test_a_system_message_may_open_and_windows_files_are_read(tmp_path: Path) -> None:
    row = {"messages": [{"role": "system", "content": "Be kind."}, *PAIR], "group": TRAIN}
    write(tmp_path, {"sft/a.jsonl": b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\r\n"})
    _, files = run(tmp_path)
    assert [m["role"] for m in files["sft.train"][0]["messages"]] == ["system", "user", "assistant"]
    assert files["quarantine"] == []


def test_equal_data_gives_equal_bytes_whatever_the_order_of_rows(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}"} for n in range(60)]
    for name, order in (("one", rows), ("two", rows[::-1])):
        (tmp_path / name).mkdir()
        write(tmp_path / name, {"pretrain/a.jsonl": order})
        run(tmp_path / name)
    for path in sorted((tmp_path / "one/artifacts/curate").iterdir()):
        assert path.read_bytes() == (tmp_path / "two/artifacts/curate" / path.name).read_bytes(), path.name


def test_options_refuse_what_leaves_nothing_to_train_on() -> None:
    with pytest.raises(ValueError, match=r"params.yaml: curate: heldout_percent and tune_percent"):
        build_options("curate", {"heldout_percent": 95, "tune_percent": 5}, CurateOptions)
