"""The chat page in a real chromium: ask, thumb up, toggle, take back, reload; nothing that a user writes runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from injections import INJECTIONS, harmless

from feedback.page import language

pytestmark = pytest.mark.browser


@pytest.fixture
def page(visit: Any, server: Any) -> Any:
    """The chat page, open."""
    return visit(server.url, viewport={"width": 1100, "height": 820})


def ask(page: Any, text: str) -> Any:
    """Ask by keyboard; returns the answer's element when it is complete."""
    before = page.locator(".thumbs:visible").count()
    page.get_by_label("Write a message").fill(text)
    page.keyboard.press("Enter")
    page.locator(".thumbs:visible").nth(before).wait_for()
    return page.locator(".theirs").nth(before)


def pressed(answer: Any) -> list[str]:
    """aria-pressed of 👍 and of 👎."""
    return [answer.locator(name).get_attribute("aria-pressed") for name in (".up", ".down")]


def wait_for_state(answer: Any, text: str) -> None:
    """Until the line beside the thumbs says `text`."""
    answer.locator(".state", has_text=text).wait_for()


def test_ask_thumb_up_toggle_take_back_and_reload(page: Any, server: Any) -> None:
    before = len(server.store.events())
    answer = ask(page, "hello there")
    assert pressed(answer) == ["false", "false"]
    answer.get_by_role("button", name="Good answer").click()
    wait_for_state(answer, "Saved")
    assert pressed(answer) == ["true", "false"]
    answer.get_by_role("button", name="Bad answer").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('.down').getAttribute('aria-pressed') === 'true'")
    wait_for_state(answer, "Saved")
    page.reload()
    answer = page.locator(".theirs").first
    page.wait_for_function("document.querySelector('.down').getAttribute('aria-pressed') === 'true'")
    assert page.locator(".mine .text").first.inner_text() == "hello there"
    answer.get_by_role("button", name="Bad answer").click()
    wait_for_state(answer, "Taken back")
    assert pressed(answer) == ["false", "false"]
    events = server.store.events()[before:]
    assert [(e.op, e.payload["value"], e.payload["source"]) for e in events] == [
        ("create", 1, "human_user"),
        ("revise", -1, "human_user"),
        ("retract", -1, "human_user"),
    ]
    row = server.store.completion(events[0].payload["completion_id"])
    assert row.subject == events[0].subject  # the asker's cookie is the rater's
    assert page.complaints == []
    assert all(url.startswith(server.url) for url in page.requested)


def test_it_says_saved_only_after_the_server_did_and_tries_again_with_the_same_key(page: Any, server: Any) -> None:
    answer = ask(page, "hello")
    keys: list[str] = []
    held = []

    def lose(route: Any) -> None:
        keys.append(route.request.headers["idempotency-key"])
        if len(keys) <= 3:
            route.abort()
        else:
            held.append(answer.locator(".state").inner_text())
            route.continue_()

    page.route("**/thumb", lose)
    answer.get_by_role("button", name="Good answer").click()
    wait_for_state(answer, "Not saved.")
    answer.get_by_role("button", name="Try again").click()
    wait_for_state(answer, "Saved")
    assert len(keys) == 4 and len(set(keys)) == 1
    assert held == ["Saving…"]


def test_nothing_that_a_user_or_a_model_writes_runs(visit: Any, parrot: Any) -> None:
    page = visit(parrot.url)
    for start in range(0, len(INJECTIONS), 12):
        page.get_by_role("button", name="New chat").click()
        for place, attack in enumerate(INJECTIONS[start : start + 12]):
            ask(page, attack)
            assert page.locator(".mine .text").nth(place).text_content() == attack.strip()
        harmless(page, parrot.url)
        page.reload()
        page.locator(".theirs").nth(place).wait_for()
        assert page.locator(".mine .text").nth(place).text_content() == attack.strip()
        harmless(page, parrot.url)
    blocked = page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
        " document.body.append(s); return window.ran === undefined }"
    )
    assert blocked  # and if something did get in, the policy would not let it run


def test_long_conversations_go_on(page: Any) -> None:
    for n in range(5):
        ask(page, f"question number {n} with some more words in it")
    page.get_by_text("reads only the last part").wait_for()


def test_it_fits_a_telephone_and_speaks_chinese(browser: Any, server: Any) -> None:
    context = browser.new_context(locale="zh-CN", viewport={"width": 375, "height": 700})
    page = context.new_page()
    page.goto(server.url)
    page.get_by_placeholder("写点什么").fill("你好")
    page.get_by_role("button", name="发送").click()
    page.get_by_role("button", name="回答得好").click()
    page.locator(".state", has_text="已保存").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.get_by_role("link", name="English").click()
    page.get_by_role("button", name="Good answer").wait_for()
    assert page.evaluate("document.documentElement.lang") == "en"
    context.close()


@pytest.mark.skipif(not os.environ.get("THUMBWHEEL_SCREENSHOTS"), reason="THUMBWHEEL_SCREENSHOTS names no folder")
def test_pictures_for_the_documentation(page: Any) -> None:
    """Of this checkout's own chat service where it runs (after `make up`), else of the tests' random model."""
    folder = os.environ["THUMBWHEEL_SCREENSHOTS"]
    running = Path(__file__).parents[2] / ".thumbwheel" / "servers.json"
    if running.exists() and (service := json.loads(running.read_text()).get("service")):
        page.goto(service["url"])
    for text, thumb in (("Do you like music?", "Good answer"), ("What did you do today?", "Bad answer")):
        answer = ask(page, text)
        answer.get_by_role("button", name=thumb).click()
        wait_for_state(answer, "Saved")
    Path(folder).mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(Path(folder) / "chat.png"))


def test_the_language_follows_what_is_asked_and_accepted() -> None:
    assert language("zh", "en", "en") == "zh"
    assert language(None, "zh", "en") == "zh" and language("xx", "yy", "zh") == "zh"
    assert language(None, None, "zh-CN,zh;q=0.9,en;q=0.8") == "zh"
    assert language(None, None, "fr, zh;q=0.2, en;q=0.7") == "en"
    assert language(None, None, "") == "en" and language(None, None, "zh;q=x") == "en"


def test_the_page_has_a_strict_policy_and_its_cookie_cannot_be_read_by_scripts(server: Any) -> None:
    response = httpx.get(server.url)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    cookie = response.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=lax" in cookie and "secure" not in cookie
    assert httpx.get(server.url + "/assets/../service.py").status_code == 404
    for name in ("chat.html", "words", "words/chat.json", "words%2fchat.json"):
        assert httpx.get(f"{server.url}/assets/{name}").status_code == 404


def test_sign_in_with_a_key_then_ask_and_rate_without_javascript_for_the_form(
    browser: Any, serve: Any, two_models: Any, tmp_path: Path
) -> None:
    from feedback import keys
    from feedback.store import Store

    url = f"sqlite:///{tmp_path}/feedback.db"
    store = Store(url)
    store.migrate()
    with store.write() as connection:
        _, secret = keys.create(connection, "ann", ["chat", "rate"], "command:test")
    store.close()
    models, first, _ = two_models
    server = serve(url, models, {"THUMBWHEEL_REQUIRE_KEYS": "1"})
    try:
        server.crown(first)
        plain = browser.new_context(java_script_enabled=False, locale="en-US")
        form = plain.new_page()
        form.goto(server.url)
        assert form.url.endswith("/signin")
        form.get_by_label("API key").fill("tw_wrong")
        form.get_by_role("button", name="Sign in").click()
        assert form.get_by_role("alert").is_visible()
        form.get_by_label("API key").fill(secret)
        form.get_by_role("button", name="Sign in").click()
        assert form.url == f"{server.url}/"
        context = browser.new_context(locale="en-US")
        context.add_cookies(plain.cookies())
        page = context.new_page()
        page.goto(server.url)
        answer = ask(page, "hello there")
        answer.locator(".up").click()
        wait_for_state(answer, "saved")
        assert server.store.count_opinions() == 1
        form.goto(f"{server.url}/signin?lang=zh")
        form.get_by_role("button", name="退出").click()
        assert form.url.endswith("/signin")
        plain.close()
        context.close()
    finally:
        server.close()
