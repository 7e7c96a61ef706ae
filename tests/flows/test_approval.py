"""A person's approval: asked for once, answered by Prefect's form (through its API here), carried out with who and why."""

from __future__ import annotations

import copy
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from good_report import GOOD
from test_deployments import runs_of

from feedback.store import Store
from flows import approval, servers
from flows.approval import ApprovalOptions
from models.checkpoint import model_hash, save_model
from models.config import ModelConfig
from models.tokenizer import Tokenizer
from models.transformer import Transformer


def make_model(root: Path, seed: int) -> str:
    """A tiny model in the workspace's folder of models; its hash."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer.train(["hello there"], 300)
    draft = root / f"draft-{seed}"
    save_model(Transformer(ModelConfig(8, 1, 2, 2, 8, 32, vocab_size=tokenizer.vocab_size)), draft, tokenizer)
    hash = model_hash(draft)
    (root / ".thumbwheel/models").mkdir(exist_ok=True)
    draft.rename(root / ".thumbwheel/models" / hash)
    return hash


def report(candidate: str, champion: str) -> dict[str, Any]:
    """A report that the gate likes."""
    found = copy.deepcopy(GOOD)
    found["candidate"] |= {"model_hash": candidate, "thumbs_up_rate": 0.8}
    found["champion_before"] |= {"model_hash": champion, "thumbs_up_rate": 0.5}
    found["comparisons"]["champion_before"]["win_rate"] = 0.65
    return found


def until(root: Path, state: str, number: int = -1) -> dict[str, Any]:
    """The run of `approve`, once it is in that state."""
    deadline, seen = time.monotonic() + 240, []
    while time.monotonic() < deadline:
        try:
            seen = runs_of(root, "approve")
        except httpx.HTTPError:  # the server is starting again
            seen = []
        if seen and seen[number]["state_type"] == state:
            return seen[number]
        time.sleep(0.5)
    raise TimeoutError(f"not {state}: {[(run['name'], run['state']) for run in seen]}")


def resume(root: Path, run: dict[str, Any], **said: str) -> dict[str, Any]:
    """Fill in the form."""
    url = f"{servers.read(root)['prefect'].url}/api/flow_runs/{run['id']}/resume"
    answer = httpx.post(url, json={"run_input": said}, trust_env=False, timeout=60)
    answer.raise_for_status()
    return dict(answer.json())


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("THUMBWHEEL_DRILLS"),
    reason="THUMBWHEEL_DRILLS asks for it: on a busy machine the runner takes minutes to come back after Prefect's kill",
)
def test_a_person_approves_after_a_restart_of_prefect(wheel: Path) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    store = Store(servers.database_url(wheel))
    store.migrate()
    reigning = store.champion()
    first = reigning.model_hash if reigning else make_model(wheel, 1)
    if reigning is None:
        store.promote(model_hash=first, model_path="", figures={}, reason="a test", expected_champion=None)
    second = make_model(wheel, 2)
    with temporary_settings({PREFECT_API_URL: f"{servers.read(wheel)['prefect'].url}/api"}):
        for _ in range(2):  # a second look asks nobody again
            question = approval.ask(wheel, report(second, first), ["it is better"], hours=1.0)
    assert question.text == "waits for approval" and [q.candidate for q in approval.waiting(wheel)] == [second]

    until(wheel, "PAUSED")
    os.kill(servers.read(wheel)["prefect"].pid, signal.SIGKILL)
    servers.start(wheel)
    run = until(wheel, "PAUSED")
    assert len(runs_of(wheel, "approve")) == 1
    refused = resume(wheel, run, decision="perhaps")
    assert refused["status"] == "REJECT"  # the form's own choices, checked by the server
    assert store.champion().model_hash == first  # type: ignore[union-attr]

    resume(wheel, run, decision="promote", by="Ann", comment="reads well")
    done = until(wheel, "COMPLETED")
    assert (done["state_name"], done["state"]["message"]) == ("Promoted", "promote by Ann: reads well")
    row = store.champion()
    assert row is not None and (row.model_hash, row.from_hash) == (second, first)
    assert row.reason == "it is better; a person said promote by Ann: reads well"
    assert (row.figures["approval"]["by"], row.figures["approval"]["comment"]) == ("Ann", "reads well")
    assert approval.waiting(wheel) == []
    store.close()


def test_the_form_tells_champion_from_candidate() -> None:
    text = approval.form(approval.Question("b" * 64, report("b" * 64, "a" * 64), ["it is better"], ""))
    assert "| thumbs up | 0.500 | 0.800 |" in text and "- it is better" in text


@pytest.mark.parametrize("change", [{"mode": "perhaps"}, {"hours": 0.0}, {"hours": float("nan")}])
def test_impossible_options_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        ApprovalOptions(**change)
