"""The dashboard's figures on both databases, beside what was counted by hand; and the page in a real chromium."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import weeks
from fastapi.testclient import TestClient
from injections import INJECTIONS, harmless
from weeks import answered, batched, crowned, days_ago, said

from feedback import charts, daily, promotions
from feedback.charts import Bar
from feedback.dashboard import Dashboard, middle
from feedback.store import Store
from models.intervals import Interval

A, B = "a" * 64, "b" * 64


def known_days(store: Store) -> None:
    """Two models, seven opinions and one taken back, of which five thumbs stand."""
    with store.write() as connection:
        crowned(connection, days_ago(6), A, "the first", {})
        old = [answered(connection, days_ago(5), A, total_ms=100.0 * n, first_token_ms=10.0 * n) for n in range(1, 4)]
        answered(connection, days_ago(5), A, status="error")
        for id, rater, value in zip(old, ("ann", "bob", "ann"), (1, 1, -1), strict=True):
            said(connection, days_ago(5), id, rater, value=value)
        said(connection, days_ago(5), old[2], "bob", kind="edit", value=1, correction="better")
        batched(connection, days_ago(5, 13), "a1" * 16)
        crowned(connection, days_ago(3), B, "gain above 0", {"win_rate": 0.6})
        new = [answered(connection, days_ago(2), B) for _ in range(3)]
        said(connection, days_ago(2), new[0], "robot", value=1, source="simulated")
        said(connection, days_ago(2), new[1], "carl", value=-1)
        gone = said(connection, days_ago(2), new[2], "carl", value=1)
        said(connection, days_ago(2), new[2], "carl", value=1, retracted=True)
        doubtful = said(connection, days_ago(2), new[2], "dora", value=1)
        assert gone != doubtful
        row = promotions.rollback(connection, "people were right")
        weeks.back_to(connection, row.id, days_ago(1))
    store.moderate(doubtful, "quarantined", "outlier")


def test_the_figures_are_those_counted_by_hand(api: TestClient, store: Store) -> None:
    known_days(store)
    seen = api.get("/v1/dashboard?days=7").json()
    assert (seen["opinions"], seen["answers"], seen["errors"], seen["raters"]) == (7, 7, 1, 5)
    assert (seen["thumbs"]["up"], seen["thumbs"]["down"]) == (3, 2)
    # Wilson 1927 for 3 of 5, z = 1.96: (.6 + .38415) / 1.76829 ± 1.96 √(.048 + .038415) / 1.76829
    assert seen["thumbs"]["share"] == pytest.approx({"value": 0.6, "low": 0.2307, "high": 0.8824}, abs=1e-4)
    assert [day["day"] for day in seen["daily"]] == [days_ago(n).date().isoformat() for n in range(6, -1, -1)]
    five, two = seen["daily"][1], seen["daily"][4]
    assert five["opinions"] == {"up": 2, "down": 1, "compared": 0, "written": 1, "other": 0}
    assert (five["answers"], five["errors"], five["promoted"]) == (4, 1, [])
    assert two["opinions"] == {"up": 2, "down": 1, "compared": 0, "written": 0, "other": 0}
    assert (two["thumbs"]["up"], two["thumbs"]["down"]) == (1, 1)  # the one in quarantine does not count
    assert [day["promoted"] for day in seen["daily"]] == [[A], [], [], [B], [], [A], []]
    assert seen["daily"][6]["thumbs"]["share"] is None
    first, second = seen["versions"]
    assert (first["model_hash"], first["champion"], first["answers"], first["errors"]) == (A, True, 4, 1)
    assert (first["thumbs"]["up"], first["thumbs"]["down"], first["first"]) == (2, 1, five["day"])
    assert [reign["action"] for reign in first["reigns"]] == ["promote", "rollback"]
    assert (second["model_hash"], second["champion"], second["thumbs"]["down"]) == (B, False, 1)
    (reign,) = second["reigns"]
    assert (reign["figures"], reign["lost_by"], reign["lost_because"]) == (
        {"win_rate": 0.6},
        "rollback",
        "people were right",
    )
    (batch,) = seen["batches"]
    assert (batch["accepted"], batch["excluded"], batch["mlflow_run_id"]) == (4, {}, "a1" * 16)
    waiting = seen["waiting"]
    assert (waiting["for_batch"], waiting["quarantined"], waiting["pending"], waiting["open_batches"]) == (2, 1, 0, 0)
    # of 100, 200, 300 ms: the second of three, and the third
    assert (seen["latency"]["answers"], seen["latency"]["total"]) == (6, [200.0, 300.0])
    assert seen["latency"]["first_token"] == [20.0, 30.0]
    assert seen["agreement"]["thumbs"]["alpha"] is None


def test_the_filters_choose_days_and_whose_opinions(api: TestClient, store: Store) -> None:
    known_days(store)
    people = api.get("/v1/dashboard?days=7&source=people").json()
    assert (people["opinions"], people["thumbs"]["up"], people["thumbs"]["down"], people["raters"]) == (6, 2, 2, 4)
    simulated = api.get("/v1/dashboard?days=7&source=simulated").json()
    assert (simulated["opinions"], simulated["thumbs"]["up"], simulated["answers"]) == (1, 1, 7)
    assert (
        len(api.get("/v1/dashboard").json()["daily"]) == 30
        and len(api.get("/v1/dashboard?days=90").json()["daily"]) == 90
    )
    for wrong in ("days=8", "days=x", "source=nobody"):
        assert api.get(f"/v1/dashboard?{wrong}").status_code == 422
        assert api.get(f"/dashboard?{wrong}").status_code == 200  # a page does not quarrel


def test_what_changes_after_a_look_is_counted_anew(store: Store) -> None:
    with store.write() as connection:
        ids = [answered(connection, days_ago(n)) for n in (20, 20, 10)]
        numbers = [said(connection, days_ago(n), id, "ann", value=1) for n, id in zip((20, 19, 10), ids, strict=True)]
    desk = Dashboard(store)

    def thumbs() -> tuple[int, int]:
        seen = desk.view(30, "all")
        return seen.thumbs.up, seen.thumbs.down

    assert thumbs() == (3, 0)
    kept = dict(desk.daily.days)
    with store.write() as connection:
        said(connection, days_ago(20), ids[0], "ann", value=-1)
    assert thumbs() == (2, 1)
    again = {day for day, counted in desk.daily.days.items() if counted is not kept[day]}
    assert again == {days_ago(n).date() for n in (0, 1, 20)}  # the others were not looked at
    store.moderate(numbers[1], "rejected", "spam")
    assert thumbs() == (1, 1)
    with store.write() as connection:  # said today of an answer of long ago
        late = answered(connection, days_ago(25))
        said(connection, days_ago(0, 0), late, "bob", value=1)
    assert thumbs() == (2, 1) and desk.view(30, "all").answers == 4
    store.erase("ann")
    assert thumbs() == (1, 0)


def test_after_more_changes_than_are_looked_at_all_days_are_counted_anew(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store.write() as connection:
        ids = [answered(connection, days_ago(9)) for _ in range(4)]
        said(connection, days_ago(9), ids[0], "ann", value=1)
    desk = Dashboard(store)
    assert desk.view(30, "all").thumbs.up == 1
    monkeypatch.setattr(daily, "MOST_CHANGES", 2)
    monkeypatch.setattr(daily, "CHANGED", daily.CHANGED.limit(2))
    with store.write() as connection:
        for id in ids[1:]:
            said(connection, days_ago(9), id, "ann", value=1)
    assert desk.view(30, "all").thumbs.up == 4


def test_a_day_goes_from_midnight_to_midnight_utc(store: Store) -> None:
    moment = timedelta(microseconds=1)
    with store.write() as connection:
        id = answered(connection, days_ago(3, 0))
        for rater, at in (("a", days_ago(3, 0) - moment), ("b", days_ago(3, 0)), ("c", days_ago(2, 0) - moment)):
            said(connection, at, id, rater, value=1)
    counted = {day.day: day.thumbs.up for day in Dashboard(store).view(7, "all").daily if day.thumbs.up}
    assert counted == {days_ago(4).date(): 1, days_ago(3).date(): 2}


def test_an_empty_database_has_a_dashboard(api: TestClient) -> None:
    seen = api.get("/v1/dashboard").json()
    assert seen["opinions"] == seen["answers"] == 0 and seen["versions"] == seen["batches"] == []
    assert seen["latency"] == {"answers": 0, "first_token": None, "total": None}
    assert "No batch has been closed yet." in api.get("/dashboard").text


def test_what_waits_is_in_the_metrics(api: TestClient, store: Store) -> None:
    known_days(store)
    with store.write() as connection:
        batched(connection, days_ago(1), None)
    told = dict(line.rsplit(" ", 1) for line in api.get("/metrics").text.splitlines() if line.startswith("thumbwheel_"))
    assert (told["thumbwheel_opinions_waiting"], told["thumbwheel_opinions_quarantined"]) == ("0.0", "1.0")
    assert told["thumbwheel_batches_open"] == "1.0" and told["thumbwheel_opinions_waiting_age_seconds"] == "0.0"
    age = (datetime.now(UTC) - days_ago(1)).total_seconds()
    assert float(told["thumbwheel_batches_open_age_seconds"]) == pytest.approx(age, abs=60)


def test_percentiles_by_nearest_rank() -> None:
    assert middle([None, 3.0, 1.0, 2.0, None]) == (2.0, 3.0)
    assert middle([float(n) for n in range(1, 101)]) == (50.0, 95.0)
    assert middle([None]) is None


def test_geometry_of_the_charts() -> None:
    chart = charts.stacked([{"up": 3, "down": 1}, {"up": 0, "down": 0}])
    assert (chart.columns, chart.top) == (2, 4)
    assert chart.bars == [Bar(0, "up", 25.0, 75.0), Bar(0, "down", 0.0, 25.0)]
    assert [charts.round_up(n) for n in (0, 1, 2, 3, 5, 11, 40, 41, 101)] == [2, 2, 2, 4, 6, 20, 40, 60, 200]
    band = charts.banded([Interval(0.5, 0.25, 0.75), Interval(1.0, 0.5, 1.0), None, Interval(0.0, 0.0, 0.5)])
    assert band.lines == ["0.5,50 1.5,0", "3.5,100"]
    assert band.bands == ["0.5,25 1.5,0 1.5,50 0.5,75", "3.2,50 3.8,50 3.8,100 3.2,100"]
    assert band.dots == [(0.5, 50.0), (1.5, 0.0), (3.5, 100.0)]
    days = [datetime(2026, 1, 1, tzinfo=UTC).date() + timedelta(days=n) for n in range(30)]
    assert charts.labels(days) == [days[0], days[7], days[14], days[22], days[29]]
    assert charts.labels(days[:3]) == days[:3]


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def desk(parrot_with: Any) -> Any:
    """A service whose database has the days counted by hand."""
    server = parrot_with({})
    known_days(server.store)
    return server


@pytest.mark.browser
def test_the_page_shows_the_known_figures_without_scripts(visit: Any, desk: Any) -> None:
    tab = visit(f"{desk.url}/dashboard?days=7", java_script_enabled=False)
    figures = [text.split("\n") for text in tab.locator(".figures .card").all_inner_texts()]
    assert figures[0] == ["7", "opinions"] and figures[1] == ["60.0 %", "share of up", "23.1 % – 88.2 %"]
    assert figures[2] == ["5", "raters", "in 7 days"] and figures[3] == ["7", "answers", "14.3 % errors"]
    assert figures[4] == ["200 ms", "median answer", "p95 300 ms, first token 20 ms"]
    assert figures[5][:2] == ["2", "wait for a batch"] and figures[6][:2] == ["1", "in quarantine"]
    bars = tab.get_by_role("img", name="Opinions a day").locator("rect:not(.column)")
    assert bars.count() == 5  # up, down, written; up, down
    titles = tab.get_by_role("img", name="Opinions a day").locator("title").all_text_contents()
    assert titles[1] == f"{days_ago(5).date()}: Up 2, Down 1, Written 1" and titles[0].endswith(": 0")
    assert tab.get_by_role("img", name="Share of up a day").locator(".mark").count() == 3
    tab.get_by_text("The same as a table").click()
    row = tab.locator("#by-day tbody tr", has_text=days_ago(5).date().isoformat())
    assert row.locator("td").all_inner_texts() == ["2", "1", "0", "1", "0", "66.7 % (20.8 % – 93.9 %)", "4", "1"]
    version = tab.locator("#versions tbody tr").nth(1)
    assert version.locator("th code").inner_text() == "b" * 12
    assert "rolled back" in version.inner_text() and "people were right" in version.inner_text()
    version.get_by_text("Figures").click()
    assert version.locator("dl").inner_text().split() == ["win_rate", "0.6"]
    batch = tab.locator("#batches tbody tr").inner_text()
    assert "4 / 0" in batch and "a1" * 16 in batch and "learned from" in batch
    tab.get_by_role("link", name="People").click()
    assert tab.locator(".figures .figure").first.inner_text() == "6"
    assert tab.get_by_role("link", name="People").get_attribute("aria-current") == "true"
    assert tab.get_by_role("link", name="7 days").get_attribute("aria-current") == "true"
    assert tab.complaints == [] and all(url.startswith(desk.url) for url in tab.requested)


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_of_the_page_is_wider_than_a_phone(visit: Any, desk: Any, width: int) -> None:
    for path in ("/dashboard?days=90", "/dashboard?days=7&lang=zh"):
        tab = visit(f"{desk.url}{path}", viewport={"width": width, "height": 740}, color_scheme="dark")
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert tab.complaints == []
    assert tab.locator("h1").inner_text() == "仪表盘" and tab.get_by_text("每日好评率").first.is_visible()


@pytest.mark.browser
def test_reasons_and_names_of_models_cannot_run_on_the_page(visit: Any, parrot_with: Any) -> None:
    server = parrot_with({})
    with server.store.write() as connection:
        for number, attack in enumerate(INJECTIONS):
            name = attack.replace("\0", "")[:60] + str(number)
            crowned(connection, days_ago(number % 6), name, attack, {attack: attack})
            said(connection, days_ago(number % 6), answered(connection, days_ago(number % 6), name), "x", value=1)
    tab = visit(f"{server.url}/dashboard?days=7")
    shown = tab.locator("#versions tbody small").all_text_contents()
    assert all(any(attack in text for text in shown) for attack in INJECTIONS)
    harmless(tab, server.url)


@pytest.mark.browser
@pytest.mark.skipif(not os.environ.get("THUMBWHEEL_SCREENSHOTS"), reason="THUMBWHEEL_SCREENSHOTS names no folder")
def test_pictures_of_dashboard_and_moderation(visit: Any, parrot_with: Any) -> None:
    """Of some weeks that nobody lived (weeks.py)."""
    folder = Path(os.environ["THUMBWHEEL_SCREENSHOTS"])
    folder.mkdir(parents=True, exist_ok=True)
    server = parrot_with({})
    weeks.fill(server.store)
    for name, height in (("dashboard", 1000), ("moderation", 860)):
        tab = visit(f"{server.url}/{name}", viewport={"width": 1100, "height": height}, reduced_motion="reduce")
        tab.screenshot(path=str(folder / f"{name}.png"))
