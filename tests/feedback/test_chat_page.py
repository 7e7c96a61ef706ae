"""The chat page in a real chromium: ask, thumb up, toggle, take back, reload; nothing that a user writes runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from chatting import ask, pressed, wait_for_state
from injections import INJECTIONS, harmless

from feedback import keys
from feedback.page import language

pytestmark = pytest.mark.browser


@pytest.fixture
def page(visit: Any, server: Any) -> Any:
    """The chat page, open."""
    return visit(server.url, viewport={"width": 1100, "height": 820})


def test_ask_thumb_up_toggle_take_back_and_reload(page: Any, server: Any) -> None:
    before = len(server.store.events())
    answer = ask(page, "hello there")
    assert pressed(answer) == ["false", "false"]
    answer.get_by_role("button", name="Good answer").click()
    wait_for_state(answer, "Saved")
    assert pressed(answer) == ["true", "false"]
    answer.get_by_role("button", name="Bad answer").focus()
    page.keyboard.press("Enter")
    page.locator('.down[aria-pressed="true"]').first.wait_for()
    wait_for_state(answer, "Saved")
    page.reload()
    answer = page.locator(".theirs").first
    page.locator('.down[aria-pressed="true"]').first.wait_for()
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
            held.append(answer.locator(".tools .state").inner_text())
            route.continue_()

    page.route("**/thumb", lose)
    answer.get_by_role("button", name="Good answer").click()
    wait_for_state(answer, "Not saved.")
    answer.get_by_role("button", name="Try again").click()
    wait_for_state(answer, "Saved")
    assert len(keys) == 4 and len(set(keys)) == 1
    assert held == ["Saving…"]


def newest(server: Any, kind: str = "thumb") -> Any:
    """The newest event about opinions of a kind."""
    return [event for event in server.store.events(0, 100_000) if event.payload["kind"] == kind][-1]


def test_undo_takes_the_vote_back_and_what_was_never_kept_needs_no_taking_back(visit: Any, parrot: Any) -> None:
    page = visit(parrot.url)
    answer = ask(page, "hello")
    assert not answer.get_by_role("button", name="Undo").is_visible()
    answer.locator(".down").click()
    wait_for_state(answer, "Saved")
    answer.get_by_role("button", name="Undo").click()
    wait_for_state(answer, "Taken back")
    assert pressed(answer) == ["false", "false"] and not answer.get_by_role("button", name="Undo").is_visible()
    event = newest(parrot)
    assert (event.op, event.payload["value"], event.payload["retracted"]) == ("retract", -1, True)
    page.route("**/thumb", lambda route: route.abort())
    answer = ask(page, "hello again")
    answer.locator(".up").click()
    wait_for_state(answer, "Not saved.")
    page.unroute("**/thumb")
    answer.get_by_role("button", name="Undo").click()
    wait_for_state(answer, "Taken back")
    assert newest(parrot).seq == event.seq


def test_reasons_and_a_comment_keep_the_thumb_and_are_codes_in_every_language(visit: Any, parrot: Any) -> None:
    page = visit(parrot.url, locale="zh-CN")
    answer = ask(page, "你好")
    answer.locator(".up").click()
    wait_for_state(answer, "已保存")
    answer.get_by_role("button", name="有帮助").click()
    answer.get_by_placeholder("还想说点什么").fill("  <b>不错</b>  ")
    answer.get_by_role("button", name="写得好").click()
    wait_for_state(answer, "已保存")
    answer.get_by_role("button", name="保存").click()
    wait_for_state(answer, "已保存")
    chips = answer.get_by_role("group", name="好在哪里？").get_by_role("button")
    assert [chip.get_attribute("aria-pressed") for chip in chips.all()] == ["false", "true", "false", "true", "false"]
    said = newest(parrot).payload
    assert (said["value"], said["reasons"], said["comment"]) == (1, ["helpful", "well_written"], "<b>不错</b>")
    assert (said["source"], said["channel"], said["locale"], said["revision"]) == ("human_user", "page", "zh", 4)
    answer.get_by_role("button", name="写得好").click()
    page.reload()
    answer = page.locator(".theirs")
    answer.get_by_role("button", name="为什么？").click()
    assert answer.get_by_placeholder("还想说点什么").input_value() == "<b>不错</b>"
    assert newest(parrot).payload["reasons"] == ["helpful"]
    answer.locator(".down").click()
    wait_for_state(answer, "已保存")
    said = newest(parrot).payload
    assert (said["value"], said["reasons"], said["comment"]) == (-1, [], "<b>不错</b>")  # other reasons than before
    answer.get_by_role("button", name="有错误").wait_for()
    harmless(page, parrot.url)


def test_a_vote_that_arrives_while_the_page_is_reloaded_is_shown_afterwards(visit: Any, parrot: Any) -> None:
    page = visit(parrot.url)
    answer = ask(page, "hello")
    page.route("**/thumb", lambda route: (route.fetch(), page.unroute("**/thumb")))  # it arrives, the page never hears
    answer.locator(".up").click()
    page.wait_for_timeout(300)
    page.reload()
    page.locator('.up[aria-pressed="true"]').first.wait_for()


def test_a_better_answer_is_kept_changed_and_taken_back(visit: Any, parrot: Any) -> None:
    page = visit(parrot.url)
    answer = ask(page, "what is 2 + 2?")
    answer.get_by_role("button", name="Write a better answer").click()
    text = answer.get_by_label("Write the answer that you would have liked.")
    assert text.input_value() == "what is 2 + 2?"  # begins with the model's
    text.fill("4")
    answer.locator(".write").get_by_role("button", name="Save").click()
    kept = answer.get_by_role("region", name="Your better answer")
    kept.get_by_text("4", exact=True).wait_for()
    answer.locator(".edit-state.saved").wait_for()
    page.reload()
    answer = page.locator(".theirs")
    answer.get_by_role("button", name="Change").click()
    answer.locator(".correction").fill("four")
    answer.locator(".write").get_by_role("button", name="Save").click()
    answer.locator(".edit-state.saved").wait_for()
    said = newest(parrot, "edit").payload
    assert (said["correction"], said["value"], said["revision"]) == ("four", 1, 2)
    answer.get_by_role("button", name="Take back").click()
    answer.locator(".edit-state", has_text="Taken back").wait_for()
    assert newest(parrot, "edit").op == "retract" and not answer.locator(".kept").is_visible()
    assert page.complaints == []


def test_answers_are_shown_with_the_markdown_that_they_use(visit: Any, parrot: Any) -> None:
    page = visit(parrot.url)
    lines = [
        "A *little* `code`",
        "in two lines",
        "",
        "# Title",
        "- one **bold _x_**",
        "- two",
        "3. three",
        "```js",
        "a < b",
        "",
    ]
    answer = ask(
        page, "\n".join([*lines, "**not bold** in code", "```", "> quoted", "2 * 3 * 4 and [a](https://a.example)"])
    )
    assert answer.locator(".text").inner_html() == (
        "<p>A <em>little</em> <code>code</code>\nin two lines</p><h3>Title</h3>"
        "<ul><li>one <strong>bold _x_</strong></li><li>two</li></ul>"
        '<ol start="3"><li>three</li></ol><pre tabindex="0"><code>a &lt; b\n\n**not bold** in code</code></pre>'
        "<blockquote>quoted</blockquote><p>2 * 3 * 4 and [a](https://a.example)</p>"
    )


def test_the_keyboard_alone_does_everything(visit: Any, parrot: Any) -> None:
    page = visit(parrot.url)
    first = ask(page, "first")
    ask(page, "answer N times: second")
    page.keyboard.press("Escape")  # from the message to the newest answer
    page.keyboard.press("k")
    assert first.evaluate("element => element === document.activeElement")
    page.keyboard.press("u")
    wait_for_state(first, "Saved")
    assert pressed(first) == ["true", "false"]
    page.keyboard.press("d")
    page.locator('.down[aria-pressed="true"]').first.wait_for()
    page.keyboard.press("z")
    wait_for_state(first, "Taken back")
    page.keyboard.press("e")
    page.keyboard.type("u is only a letter here")
    page.keyboard.press("Escape")
    assert pressed(first) == ["false", "false"]
    page.keyboard.press("j")
    page.keyboard.press("r")
    page.locator(".choose:enabled").first.wait_for()
    page.keyboard.press("3")
    page.locator(".compare .state.saved").wait_for()
    assert newest(parrot, "comparison").payload["value"] == 0
    page.keyboard.press("?")
    page.get_by_role("dialog", name="Keyboard shortcuts").get_by_label("Shortcuts are on").uncheck()
    page.keyboard.press("Escape")
    page.keyboard.press("n")
    assert page.locator(".mine").count() == 2  # switched off
    page.reload()
    page.locator("#help").click()
    page.get_by_label("Shortcuts are on").check()
    page.get_by_role("button", name="Close").click()
    page.locator("#main").focus()
    page.keyboard.press("n")
    assert page.locator(".mine").count() == 0 and page.locator("#text").evaluate(
        "box => box === document.activeElement"
    )
    assert page.complaints == []


def test_nothing_that_a_user_or_a_model_writes_runs(visit: Any, parrot: Any) -> None:
    page = visit(parrot.url)
    for start in range(0, len(INJECTIONS), 8):
        attack = "\n\n".join(INJECTIONS[start : start + 8]).strip()
        answer = ask(page, attack)
        assert page.locator(".mine .text").last.text_content() == attack
    answer.locator(".down").click()
    answer.locator(".comment").fill("\n".join(INJECTIONS))
    answer.locator(".why").get_by_role("button", name="Save").click()
    answer.locator(".better").click()
    answer.locator(".correction").fill("\n".join(INJECTIONS))
    answer.locator(".write").get_by_role("button", name="Save").click()
    answer.locator(".edit-state.saved").wait_for()
    wait_for_state(answer, "Saved")
    harmless(page, parrot.url)
    page.reload()
    page.locator(".theirs").last.wait_for()
    assert page.locator(".mine .text").last.text_content() == attack
    assert page.locator(".correction-text").last.text_content() == "\n".join(INJECTIONS).strip()
    harmless(page, parrot.url)
    page.goto(f"{parrot.url}/you")
    for opened in page.locator("details").all():
        opened.locator("summary").click()
    harmless(page, parrot.url)


def test_no_answer_becomes_anything_but_text_in_the_few_elements_of_markdown(visit: Any, parrot: Any) -> None:
    page = visit(parrot.url)
    made = page.evaluate(
        """async (attacks) => {
          const { showMarkdown } = await import("/assets/markdown.js");
          return attacks.map((attack) => {
            const place = document.body.appendChild(document.createElement("div"));
            showMarkdown(place, attack);
            return [[...place.querySelectorAll("*")].map((one) => one.localName), place.textContent];
          });
        }""",
        list(INJECTIONS),
    )
    for attack, (names, text) in zip(INJECTIONS, made, strict=True):
        assert set(names) <= {"p", "h3", "ul", "ol", "li", "strong", "em", "code", "pre", "blockquote"}, attack
        if "`" not in attack and "**" not in attack and "\n" not in attack:
            assert text == attack
    harmless(page, parrot.url)
    blocked = page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
        " document.body.append(s); return window.ran === undefined }"
    )
    assert blocked  # and if something did get in, the policy would not let it run


def test_a_reason_that_is_no_code_is_not_taken(parrot: Any) -> None:
    id = parrot.chat("hello").json()["id"]
    for attack in INJECTIONS:
        said = {"value": 1, "reasons": [attack]}
        assert parrot.client.put(f"/v1/feedback/{id}/thumb", json=said).status_code == 422, attack


def test_long_conversations_go_on(page: Any) -> None:
    for n in range(5):
        ask(page, f"question number {n} with some more words in it")
    page.get_by_text("reads only the last part").wait_for()


@pytest.mark.parametrize("width", [360, 430])
def test_it_fits_a_telephone_and_speaks_chinese(visit: Any, parrot: Any, width: int) -> None:
    page = visit(parrot.url, locale="zh-CN", viewport={"width": width, "height": 700}, has_touch=True)
    page.get_by_placeholder("写点什么").fill("answer N times: 你好，" + "很长的一行" * 20 + "x" * 200)
    page.get_by_role("button", name="发送").click()
    page.get_by_role("button", name="回答得好", exact=True).tap()
    page.locator(".state", has_text="已保存").wait_for()
    fits = "document.documentElement.scrollWidth <= window.innerWidth && main.scrollWidth <= main.clientWidth"
    assert page.evaluate(fits)
    page.get_by_role("button", name="换一个回答").tap()
    page.locator(".choose:enabled").first.wait_for()
    assert page.evaluate(fits)
    left, right = (f"document.querySelector('.{name}').getBoundingClientRect()" for name in ("left", "right"))
    assert page.evaluate(f"{left}.bottom <= {right}.top")  # one below the other
    page.get_by_role("link", name="English").tap()
    page.get_by_role("button", name="Left is better").wait_for()
    assert page.evaluate("document.documentElement.lang") == "en"
    page.get_by_role("link", name="Your data").tap()
    page.get_by_role("heading", name="Your data").wait_for()  # English, as was chosen
    page.wait_for_load_state()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.skipif(not os.environ.get("THUMBWHEEL_SCREENSHOTS"), reason="THUMBWHEEL_SCREENSHOTS names no folder")
def test_pictures_for_the_documentation(visit: Any, server: Any) -> None:
    """Of this checkout's own chat service where it runs (after `make up`), else of the tests' random model."""
    folder = Path(os.environ["THUMBWHEEL_SCREENSHOTS"])
    folder.mkdir(parents=True, exist_ok=True)
    running, url = Path(__file__).parents[2] / ".thumbwheel" / "servers.json", server.url
    if running.exists() and (service := json.loads(running.read_text()).get("service")):
        url = service["url"]
    page = visit(url, viewport={"width": 1100, "height": 820}, reduced_motion="reduce")
    for text, thumb, reasons in (
        ("Do you like music?", "Bad answer", []),
        ("Name three fruits, as a list.", "Good answer", ["Helpful", "Well written"]),
    ):
        answer = ask(page, text)
        answer.get_by_role("button", name=thumb).click()
        for reason in reasons:
            answer.get_by_role("button", name=reason).click()
        wait_for_state(answer, "Saved")
    page.mouse.move(0, 0)
    page.screenshot(path=str(folder / "chat.png"))
    page.get_by_role("button", name="New chat").click()
    ask(page, "What should I cook tonight?").locator(".again").click()
    page.locator(".choose:enabled").first.wait_for()
    page.screenshot(path=str(folder / "compare.png"))
    telephone = {"viewport": {"width": 390, "height": 780}, "color_scheme": "dark", "locale": "zh-CN"}
    page = visit(url, **telephone, reduced_motion="reduce")
    answer = ask(page, "What is the capital of France?")
    answer.get_by_role("button", name="回答得好", exact=True).click()
    wait_for_state(answer, "已保存")
    page.screenshot(path=str(folder / "telephone.png"))


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


def test_sign_in_with_a_key_then_ask_and_rate_without_javascript_for_the_form(visit: Any, parrot_with: Any) -> None:
    server = parrot_with({"THUMBWHEEL_REQUIRE_KEYS": "1"})
    with server.store.write() as connection:
        _, secret = keys.create(connection, "ann", ["chat", "rate"], "command:test")
    form = visit(server.url, java_script_enabled=False)
    assert form.url.endswith("/signin")
    form.get_by_label("API key").fill("tw_wrong")
    form.get_by_role("button", name="Sign in").click()
    assert form.get_by_role("alert").is_visible()
    form.get_by_label("API key").fill(secret)
    form.get_by_role("button", name="Sign in").click()
    assert form.url == f"{server.url}/"
    page = visit(server.url, cookies=form.context.cookies())
    answer = ask(page, "hello there")
    answer.locator(".up").click()
    wait_for_state(answer, "Saved")
    assert server.store.count_opinions() == 1
    form.goto(f"{server.url}/signin?lang=zh")
    form.get_by_role("button", name="退出").click()
    assert form.url.endswith("/signin")
