"""A person starts the flow from Prefect's page, with changed parameters, in a real browser."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from test_deployments import api, runs_of

from flows import servers, settings

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.slow, pytest.mark.browser]
# no talk with anybody but our own servers
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture
def page() -> Iterator[Page]:
    """A page of a real Chromium."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium is installed (apt-get install chromium): the browser tests do NOT run here")
    from playwright.sync_api import sync_playwright

    arguments = [*QUIET, "--no-sandbox"] if os.geteuid() == 0 else QUIET
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        page = browser.new_page(viewport={"width": 1360, "height": 900})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def field(page: Page, name: str) -> Any:
    """The input of a parameter in Prefect's form, found by its label."""
    label = f"//span[contains(@class, 'schema-form-property__label') and starts-with(normalize-space(), '{name} ')]"
    box = "/ancestor::div[contains(concat(' ', @class, ' '), ' schema-form-property ')][1]"
    return page.locator(f"xpath={label}{box}//input").first


def test_the_flow_is_started_with_changed_parameters(wheel: Path, page: Page) -> None:
    (deployment,) = api(wheel, "/deployments/filter", {"deployments": {"name": {"any_": ["align"]}}})
    page.goto(f"{servers.read(wheel)['prefect'].url}/deployments/deployment/{deployment['id']}")
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run").click()
    field(page, "seed").fill("7")
    field(page, "iterations").fill("3")
    page.get_by_role("button", name="Submit").click()
    page.wait_for_url(lambda url: "/run?" not in url and not url.endswith("/run"))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        runs = runs_of(wheel, "align")
        if runs and runs[0]["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED"):
            break
        time.sleep(0.5)
    assert len(runs) == 1
    given = settings.merge({}, runs[0]["parameters"]["overrides"])
    assert (given["seed"], given["ppo"]["iterations"]) == (7, 3)
    # checked and written down, so that the record and the run agree
    params = settings.load(wheel)
    assert (params.seed, params.ppo.iterations) == (7, 3)
    # this workspace has no data, and the run says so where a person looks
    assert runs[0]["state"]["type"] == "FAILED"
    assert "data.folder is nowhere, and there is no such folder" in runs[0]["state"]["message"]
    # the report of the run, reached from the run's page
    page.goto(f"{servers.read(wheel)['prefect'].url}/runs/flow-run/{runs[0]['id']}")
    page.get_by_text("Artifacts", exact=True).last.click()
    page.get_by_text("align-report").first.click()
    page.get_by_text("no stage was reached").first.wait_for()


@pytest.mark.skipif(not os.environ.get("THUMBWHEEL_SCREENSHOTS"), reason="THUMBWHEEL_SCREENSHOTS names no folder")
def test_pictures_of_prefect_and_mlflow(request: pytest.FixtureRequest, page: Page) -> None:
    """Of this checkout's own servers where they run (after `make up`), else of the tests'."""
    folder = Path(os.environ["THUMBWHEEL_SCREENSHOTS"])
    folder.mkdir(parents=True, exist_ok=True)
    checkout = Path(__file__).parents[2]
    running = servers.read(checkout)
    ours = all(name in running and running[name].alive for name in servers.CORE)
    take_pictures(checkout if ours else request.getfixturevalue("wheel"), page, folder)
    assert (folder / "prefect.png").stat().st_size > 10_000
    assert (folder / "mlflow.png").stat().st_size > 10_000


def take_pictures(root: Path, page: Page, folder: Path) -> None:
    """prefect.png: the newest run of align, task by task. mlflow.png: the runs of the experiment."""
    prefect, mlflow = servers.read(root)["prefect"].url, servers.read(root)["mlflow"].url
    body = {"flows": {"name": {"any_": ["align"]}}, "sort": "START_TIME_DESC", "limit": 1}
    (run,) = api(root, "/flow_runs/filter", body)
    page.goto(f"{prefect}/runs/flow-run/{run['id']}")
    page.get_by_text(run["name"]).first.wait_for()
    page.wait_for_timeout(4000)  # the timeline is drawn after the text
    page.screenshot(path=folder / "prefect.png")
    query = {"experiment_name": "thumbwheel"}
    found = httpx.get(f"{mlflow}/api/2.0/mlflow/experiments/get-by-name", params=query, trust_env=False, timeout=30)
    experiment = found.json()["experiment"]["experiment_id"]
    page.goto(f"{mlflow}/#/experiments/{experiment}/runs?workflowType=machine_learning")
    page.get_by_text("align").first.wait_for()
    close = page.get_by_role("button", name="Close", exact=True)  # of the assistant beside it
    if close.count():
        close.first.click()
    page.wait_for_timeout(3000)
    page.screenshot(path=folder / "mlflow.png")
