"""A small share of each drill of the feedback service: real processes, killed; a disk that is really full."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import feedback_drills, reliability_page
from benchmarks.drills import systems
from benchmarks.drills.load import figures
from benchmarks.drills.services import percentile, seed_answers
from benchmarks.drills.writers import Acknowledged, Ledger, audit
from feedback.store import Store, Vote

DRILLS = {drill.name: drill for drill in feedback_drills.DRILLS}
TIMES = {"p99", "rate", "seconds"}  # what a busy machine may miss; the full drills say whether it holds


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that PostgreSQL's user may reach."""
    made = Path(tempfile.mkdtemp(prefix="thumbwheel-drill-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize(
    ("name", "kind"),
    [  # what is left out here runs with --quick: each start of a service costs two seconds, with a model five
        *(("kill", "postgresql"), ("deliveries", "sqlite"), ("batches", "sqlite"), ("disk", "sqlite")),
        *(("requests", "sqlite"), ("startup", "sqlite")),
    ],
)
def test_a_small_share_keeps_the_promise(name: str, kind: str, folder: Path) -> None:
    record = feedback_drills.perform(DRILLS[name], kind, DRILLS[name].quick, folder / name)
    assert set(record["missed"]) <= TIMES, json.dumps(record, indent=1)
    assert reliability_page.SHOWN[name](record)  # and the page can tell it


def test_the_audit_finds_what_was_lost_doubled_and_torn(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/feedback.db"
    ids = [id for group in seed_answers(url, 3) for id in group]
    store, ledger = Store(url), Ledger()
    for i, id in enumerate(ids):
        event, _ = store.vote(Vote(id, "somebody", value=1, comment=f"write {i}"))
        ledger.acknowledged.append(Acknowledged(event.seq, id, "thumb", 1, f"write {i}"))
    found = audit(url, ledger)
    assert (found.lost, found.doubled, found.behind, found.torn, found.events) == (0, 0, 0, 0, 3)
    store.vote(Vote(ids[0], "another", value=1, comment="write 0"))  # the same write by another name: twice there
    with store.write() as connection:
        connection.exec_driver_sql("UPDATE feedback SET value = -1 WHERE id = 2")  # its event says 1
        connection.exec_driver_sql("DELETE FROM feedback_event WHERE seq = 3")
    store.close()
    found = audit(url, ledger)
    assert (found.lost, found.doubled, found.behind, found.torn) == (1, 1, 1, 1)


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.99, 0.999)] == [50, 99, 100]
    assert percentile([3.0, 1.0], 0.5) == 1
    told = figures([0.001] * 99 + [2.0], Counter({"201": 100}), 10.0)
    assert (told["p50_ms"], told["p99_ms"], told["max_ms"], told["per_second"]) == (1, 1, 2000, 10)


def test_the_page_tells_the_newest_record_and_what_was_missed() -> None:
    common = {
        "drill": "rollback",
        "time": "2026-11-24T10:00:00+00:00",
        "load_before": 0.5,
        "seconds": 9,
        "machine": "m",
    }
    old = {**common, "database": "sqlite", "rollbacks": 5, "slowest_seconds": 31.0, "missed": ["seconds"]}
    new = {**old, "slowest_seconds": 0.5, "missed": []}
    broken = {**common, "database": "postgresql", "missed": ["ran"], "error": "OSError: initdb"}
    text = reliability_page.page(reliability_page.newest(map(json.dumps, (old, new, broken))))
    assert "5 rollbacks, the slowest took **0.5 s** | yes |" in text and "31" not in text
    assert "| OSError: initdb | no: ran |" in text


def test_the_page_sets_peers_beside_it_and_claims_nothing_of_what_was_not_measured() -> None:
    system = {
        "version": "1",
        "median_per_second": 300.0,
        "p50_ms": 12.5,
        "p99_ms": 40.0,
        "statuses": {"201": 900, "broken": 4},
        "kills": 3,
        "acknowledged_under_kills": 600,
        "lost": 0,
        "copies": {"plain": {"answers": [201, 200, 200], "rows": 1}, "with its key": None},
    }
    slow = {
        **system,
        "median_per_second": 20.0,
        "statuses": {"200": 60, "500": 2},
        "own_client": system | {"per_second": 9.5},
    }
    record = {
        "drill": "peers",
        "database": "sqlite",
        "time": "2026-11-24T10:00:00+00:00",
        "load_before": 0.5,
        "seconds": 9,
        "machine": "m",
        "amounts": [3, 10.0, 3],
        "writers": 4,
        "missed": [],
        "systems": {"thumbwheel": system, "MLflow": slow},
        "absent": {"Label Studio": "it ended"},
    }
    text = reliability_page.page({("peers", "sqlite"): record})
    assert (
        "| sqlite | thumbwheel 1 | **300** | 1.00 | 12.5 | 40 | kills: 3, 600 acknowledged under them, 0 lost |" in text
    )
    assert "| **20**, 2 × 500 | 15.00 |" in text and "plain, rows made: 1; with its key: it has none" in text
    assert "Label Studio on sqlite: not measured, it ended." in text and "| 9.5/s, p99 40 ms |" in text
    failed = {**record, "error": "OSError: no", "missed": ["ran"]}
    assert "Beside others" not in reliability_page.page({("peers", "sqlite"): failed})


def test_what_thumbs_say_is_found_in_any_row() -> None:
    assert systems.spoken([f'{{"a": "{systems.words(17)}"}}', systems.words(12345)]) == [
        systems.words(17),
        systems.words(12345),
    ]
