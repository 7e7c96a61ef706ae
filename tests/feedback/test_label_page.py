"""The labelling page in a real chromium: ranked by keys, drag, buttons; ties, skipping, gold, Chinese, phone, injections."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from injections import INJECTIONS, harmless
from playwright.sync_api import expect

from feedback import labelling
from feedback.tables import AssignmentRow, FeedbackRow

pytestmark = pytest.mark.browser
PROMPT = "What is a good way to start learning to cook?"
ANSWERS = (
    "Start with three dishes that you like to eat, and cook each of them until it works without the recipe:\n\n"
    "1. an omelette,\n2. a soup of vegetables,\n3. a roast chicken.\n\nEach teaches a **technique** that a hundred others need.",
    "Cooking is a wonderful hobby! There are many ways to learn it, and every way is good in its own way. You could read "
    "books, watch videos, or ask somebody. The most important thing is to have fun and to never give up. Good luck!",
    "Buy a good knife and learn to cut an onion.",
    "I am sorry, but I cannot help with that.",
)


@pytest.fixture(scope="module")
def service(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A service without a model, which needs none here; every second task is gold."""
    folder = tmp_path_factory.mktemp("label")
    server = serve(f"sqlite:///{folder}/feedback.db", folder / "models", {"THUMBWHEEL_GOLD_RATE": "0.5"})
    yield server
    server.close()


@pytest.fixture
def make_task(service: Any, answer_into: Callable[..., Any]) -> Iterator[Callable[..., list[str]]]:
    """Make a task of texts; returns the answers' ids. Tasks that are left are closed after the test."""
    answer = answer_into(service.store)

    def make(prompt: str, texts: Any = ANSWERS, **options: Any) -> list[str]:
        ids = [answer(prompt, text, id=os.urandom(12).hex()) for text in texts]
        with service.store.write() as connection:
            labelling.make(connection, ids, **options)
        return ids

    yield make
    with service.store.write() as connection:
        connection.execute(
            sa.update(labelling.task).values(closed_at=sa.func.coalesce(labelling.task.c.closed_at, sa.func.now()))
        )


def groups(page: Any) -> list[list[str]]:
    """The answers' texts by rank, as the page shows them."""
    found: list[list[str]] = page.evaluate(
        "[...document.querySelectorAll('.rank')].map(r => [...r.querySelectorAll('.answer .text')].map(t => t.textContent))"
    )
    return found


def card(page: Any, start: str) -> Any:
    """The card whose text begins so."""
    return page.locator(".answer").filter(has=page.locator(".text", has_text=re.compile("^" + re.escape(start))))


def newest(service: Any) -> Any:
    """The newest ranking, and what was shown: texts by position."""
    with service.store.read() as connection:
        row = connection.execute(sa.select(FeedbackRow).order_by(FeedbackRow.last_seq.desc())).mappings().first()
    assert row is not None and row["kind"] == "ranking"
    return row


def wait_for(page: Any, text: str) -> None:
    page.locator("#state", has_text=text).wait_for()


def test_ranked_by_keys_alone_and_what_is_kept_is_what_was_shown(
    visit: Any, service: Any, make_task: Callable[..., list[str]]
) -> None:
    ids = make_task(PROMPT, ["apple", "berry", "cherry", "date"])
    page = visit(f"{service.url}/label")
    card(page, "apple").wait_for()
    shown = [group[0] for group in groups(page)]
    assert sorted(shown) == ["apple", "berry", "cherry", "date"] and page.locator("#submit").is_disabled()
    for _ in range(40):  # by Tab to the answer on the first place
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('.answer')"):
            break
    first, second, third, fourth = shown
    assert page.evaluate("document.activeElement.querySelector('.text').textContent") == first
    page.keyboard.press("ArrowUp")
    assert "at the top already" in page.locator("#said").inner_text()
    page.keyboard.press("ArrowDown")
    assert groups(page) == [[second], [first], [third], [fourth]]
    page.keyboard.press("4")
    assert groups(page) == [[second], [third], [fourth], [first]]
    page.keyboard.press("=")
    tied = groups(page)
    assert [sorted(group) for group in tied] == [[second], [third], sorted([fourth, first])]
    said = page.locator("#said").inner_text()
    assert re.fullmatch(r"Answer A ties with D at rank 3 of 3\.", said)
    page.keyboard.press("ArrowUp")
    assert groups(page) == [[second], [third], [first], [fourth]]
    page.keyboard.press("=")
    assert page.evaluate("document.activeElement.querySelector('.text').textContent") == first
    page.keyboard.press("Control+Enter")
    wait_for(page, "Saved")
    page.locator("#nothing").wait_for()
    row = newest(service)
    texts = dict(zip(ids, ["apple", "berry", "cherry", "date"], strict=True))
    assert {texts[place["completion_id"]]: (place["rank"], place["position"]) for place in row["ranked"]} == {
        second: (1, 1),
        third: (2, 2),
        first: (2, 0),
        fourth: (3, 3),
    }
    assert (row["source"], row["channel"], row["locale"]) == ("human_user", "label", "en")
    assert "ranked 1, skipped 0" in page.locator("#progress").inner_text()
    assert page.complaints == []


def drag(page: Any, start: str, target: str, part: float) -> None:
    """Drag an answer by its grip to a part of another's height."""
    card(page, start).scroll_into_view_if_needed()
    grip = card(page, start).locator(".grip").bounding_box()
    page.mouse.move(grip["x"] + grip["width"] / 2, grip["y"] + grip["height"] / 2)
    page.mouse.down()
    box = card(page, target).locator("xpath=ancestor::li").bounding_box()
    page.mouse.move(grip["x"] + 8, (grip["y"] + box["y"]) / 2, steps=3)
    box = card(page, target).locator("xpath=ancestor::li").bounding_box()
    page.mouse.move(grip["x"] + 8, box["y"] + box["height"] * part, steps=5)
    page.mouse.up()


def test_ranked_by_drag_with_ties_comment_and_expert(
    visit: Any, service: Any, make_task: Callable[..., list[str]]
) -> None:
    ids = make_task(PROMPT)
    page = visit(f"{service.url}/label", viewport={"width": 1280, "height": 900})
    card(page, "Buy").wait_for()
    page.locator(".guide", has_text="Longer is not better").wait_for()
    for number, start in enumerate(("Start", "Buy", "Cooking", "I am")):  # the wished order, by the places above
        current = [group[0][:4] for group in groups(page)]
        if current[number] != start[:4]:
            texts = [text for text in ANSWERS if text[:4] == current[number]]
            drag(page, start, texts[0][:4], 0.1)
    assert [group[0][:4] for group in groups(page)] == ["Star", "Buy ", "Cook", "I am"]
    drag(page, "I am", "Cooking", 0.5)
    assert [[text[:4] for text in group] for group in groups(page)][:2] == [["Star"], ["Buy "]]
    assert len(groups(page)) == 3 and page.locator(".rank.tied").count() == 1
    page.locator("#comment").fill("two of them say nothing")
    page.locator("#expert").check()
    page.mouse.move(5, 5)
    page.evaluate("scrollTo(0, 0); document.activeElement.blur()")
    if folder := os.environ.get("THUMBWHEEL_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / "label.png")
    page.locator("#submit").click()
    wait_for(page, "Saved")
    row = newest(service)
    assert [(place["completion_id"], place["rank"]) for place in row["ranked"][:2]] == [(ids[0], 1), (ids[2], 2)]
    assert {(place["completion_id"], place["rank"]) for place in row["ranked"][2:]} == {(ids[1], 3), (ids[3], 3)}
    assert (row["comment"], row["source"]) == ("two of them say nothing", "human_expert")
    harmless(page, service.url)


def test_skip_with_a_reason_and_the_order_that_is_right_already(
    visit: Any, service: Any, make_task: Callable[..., list[str]]
) -> None:
    make_task("first", ["one", "two"])
    page = visit(f"{service.url}/label")
    card(page, "one").wait_for()
    page.get_by_role("button", name="Skip").click()
    page.get_by_role("button", name="Cancel").click()
    assert card(page, "one").is_visible()
    page.get_by_role("button", name="Skip").click()
    page.get_by_label("It holds somebody's private data").check()
    page.get_by_role("dialog").get_by_role("button", name="Skip").click()
    wait_for(page, "Skipped")
    page.locator("#nothing").wait_for()
    with service.store.read() as connection:
        rows = connection.execute(sa.select(AssignmentRow.reason).where(AssignmentRow.state == "skipped")).scalars()
        assert "private" in list(rows)
    make_task("second", ["three", "four"])
    page.get_by_role("button", name="Look again").click()
    card(page, "three").wait_for()
    shown = groups(page)
    assert page.locator("#submit").is_disabled()
    page.get_by_label("The order is right as it stands").check()
    kept: list[str] = []
    page.route("**/ranking", lambda route: (kept.append(route.request.headers["idempotency-key"]), route.abort()))
    page.locator("#submit").click()
    page.get_by_role("alert").filter(has_text="Not saved.").wait_for()
    assert len(set(kept)) == 1 and groups(page) == shown  # tried again under one key, and nothing is lost
    page.unroute("**/ranking")
    page.route("**/ranking", lambda route: (kept.append(route.request.headers["idempotency-key"]), route.continue_()))
    page.locator("#submit").click()
    wait_for(page, "Saved")
    assert len(set(kept)) == 1


def test_a_gold_task_looks_exactly_like_another(visit: Any, service: Any, make_task: Callable[..., list[str]]) -> None:
    for n in range(20):  # at a share of a half, one kind alone comes once in a million tests
        make_task(f"plain {n}", ["same", "other"])
        make_task(f"plain {n}", ["same", "other"], name=f"gold {n}", expected=[[0], [1]])
    told: list[Any] = []
    page = visit("about:blank")
    page.on("response", lambda response: response.url.endswith("/next") and told.append(response))
    page.goto(f"{service.url}/label")
    looks: dict[bool, str] = {}
    answers: dict[bool, list[str]] = {}
    while len(looks) < 2:
        card(page, "same").wait_for()
        progress = page.locator("#progress").inner_text()
        with service.store.read() as connection:
            task = labelling.get(connection, told[-1].json()["task"]["id"])
        html = page.locator("main").inner_html()
        assert task.id not in html and not any(id in html for id in task.answers)
        looks[task.gold] = re.sub(r'plain \d+|same|other|Saved|class="state[^"]*"', "", html.replace(progress, ""))
        answers[task.gold] = re.findall(r'"(\w+)":', told[-1].text())
        assert "gold" not in told[-1].text() and "expected" not in told[-1].text()
        page.get_by_label("The order is right as it stands").check()
        page.locator("#submit").click()
        expect(page.locator("#progress")).not_to_have_text(progress)
    assert looks[True] == looks[False] and answers[True] == answers[False]


def test_on_a_phone_in_chinese_by_touch_and_by_buttons(
    visit: Any, service: Any, make_task: Callable[..., list[str]]
) -> None:
    make_task("怎样开始学做饭？", ["先学三道菜。", "买一把好刀。", "我不知道。"])
    options = {"viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True, "locale": "zh-CN"}
    page = visit(f"{service.url}/label", **options)
    card(page, "我不知道").wait_for()
    assert (
        page.get_by_role("button", name="提交排序").is_visible() and page.locator("html").get_attribute("lang") == "zh"
    )
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator(".guide").is_hidden()
    page.get_by_text("标注指南").tap()
    assert "更长不等于更好" in page.locator(".guide").inner_text()
    page.get_by_text("标注指南").tap()
    while groups(page)[-1] != ["我不知道。"]:
        card(page, "我不知道").locator(".down").tap()
    top, below = groups(page)[0][0], groups(page)[1][0]
    card(page, below).locator(".tie").tap()
    assert [sorted(group) for group in groups(page)] == [sorted([top, below]), ["我不知道。"]]
    touch_drag(page, "我不知道", top)
    assert groups(page)[0] == ["我不知道。"]
    page.get_by_role("button", name="提交排序").click()
    wait_for(page, "已保存")
    assert newest(service)["locale"] == "zh"
    harmless(page, service.url)


def touch_drag(page: Any, start: str, target: str) -> None:
    """Drag with a finger to just above the top of another's rank."""
    card(page, start).locator(".grip").evaluate("grip => grip.scrollIntoView({ block: 'center' })")
    box = card(page, start).locator(".grip").bounding_box()
    goal = card(page, target).locator("xpath=ancestor::li").bounding_box()
    session = page.context.new_cdp_session(page)
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def touch(kind: str, *points: tuple[float, float]) -> None:
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y} for x, y in points]})

    touch("touchStart", (x, y))
    for step in range(1, 6):
        touch("touchMove", (x, y + (goal["y"] + 3 - y) * step / 5))
    touch("touchEnd")
    session.detach()


def test_nothing_that_people_or_models_write_runs(
    visit: Any, service: Any, make_task: Callable[..., list[str]]
) -> None:
    for start in range(0, len(INJECTIONS), 9):
        texts = list(INJECTIONS[start : start + 9])
        if len(texts) == 1:
            texts.append("another")
        make_task("\n".join(texts), texts)
    page = visit(f"{service.url}/label")
    for _ in range(-(-len(INJECTIONS) // 9)):
        page.locator(".answer").first.wait_for()
        before = page.locator("#progress").inner_text()
        page.locator(".answer").first.locator(".down").click()
        page.locator("#comment").fill(INJECTIONS[0])
        harmless(page, service.url)
        page.locator("#submit").click()
        expect(page.locator("#progress")).not_to_have_text(before)
    page.locator("#nothing").wait_for()
    harmless(page, service.url)
