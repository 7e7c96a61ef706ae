"""The pages without scripts in a real chromium, one's own data, and what all pages have: words, contrast, names and roles."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from chatting import ask, wait_for_state
from injections import INJECTIONS, harmless

from feedback import chat_page, page

browser_test = pytest.mark.browser
WORDS = sorted((page.FOLDER / "words").glob("*.json"))


def newest(server: Any) -> Any:
    """The newest event of the log."""
    return server.store.events(0, 100_000)[-1]


@browser_test
def test_ask_go_on_rate_and_take_back_without_scripts(visit: Any, parrot: Any) -> None:
    tab = visit(parrot.url, java_script_enabled=False)
    assert not tab.get_by_role("button", name="New chat").is_visible()  # what needs scripts is not offered
    tab.locator("noscript p").wait_for()
    tab.get_by_role("button", name="How was your day?").click()
    tab.get_by_label("Write a message").fill("line one\nline two")
    tab.get_by_role("button", name="Send").click()
    assert tab.locator(".theirs .text").all_inner_texts() == ["How was your day?", "line one\nline two"]
    answer = tab.locator(".theirs").nth(1)
    answer.get_by_role("button", name="Good answer").click()
    said = newest(parrot)
    row = parrot.store.completion(said.payload["completion_id"])
    assert row.subject == said.subject and row.turn == 2
    assert [message["content"] for message in row.request_messages] == ["How was your day?"] * 2 + [
        "line one\nline two"
    ]
    assert (said.op, said.payload["value"], said.payload["channel"]) == ("create", 1, "page")
    assert answer.locator(".up").get_attribute("aria-pressed") == "true"
    answer.get_by_label("Helpful").check()
    answer.get_by_label("Anything else? (optional)").fill("thanks")
    answer.get_by_role("button", name="Save").click()
    assert answer.get_by_label("Helpful").is_checked()
    payload = newest(parrot).payload
    assert (payload["value"], payload["reasons"], payload["comment"]) == (1, ["helpful"], "thanks")
    answer.get_by_role("button", name="Bad answer").click()
    assert (newest(parrot).payload["value"], newest(parrot).payload["reasons"]) == (-1, [])
    answer.get_by_role("button", name="Undo").click()
    assert newest(parrot).payload["retracted"] and answer.locator(".down").get_attribute("aria-pressed") == "false"
    assert tab.complaints == []


@browser_test
def test_nothing_runs_on_the_page_of_forms(visit: Any, parrot: Any) -> None:
    tab = visit(f"{parrot.url}/plain")  # with scripts on: they would run if they could
    for start in range(0, len(INJECTIONS), 12):
        attack = "\n".join(INJECTIONS[start : start + 12]).strip()
        tab.locator("#text").fill(attack)
        tab.get_by_role("button", name="Send").click()
        assert tab.locator(".theirs .text").last.text_content() == attack
    tab.locator(".down").last.click()
    tab.locator(".comment").fill("\n".join(INJECTIONS))
    tab.locator(".why").get_by_role("button", name="Save").click()
    assert tab.locator(".comment").input_value() == "\n".join(INJECTIONS).strip()
    harmless(tab, parrot.url)


@browser_test
def test_ones_own_data_is_shown_downloaded_and_withdrawn_without_scripts(visit: Any, parrot: Any) -> None:
    other = visit(parrot.url)
    ask(other, "somebody else's question")
    mine = visit(parrot.url)
    answer = ask(mine, "my question")
    answer.locator(".down").click()
    answer.get_by_role("button", name="Off topic").click()
    wait_for_state(answer, "Saved")
    tab = visit(f"{parrot.url}/you", java_script_enabled=False, cookies=mine.context.cookies())
    figures = tab.locator(".figures .card").all_inner_texts()
    assert [text.split() for text in figures] == [["1", "answers"], ["1", "thumbs"]]
    tab.get_by_text("my question").first.click()
    tab.get_by_text("Off topic").wait_for()
    assert "somebody else" not in tab.content()
    with tab.expect_download() as download:
        tab.get_by_role("link", name="Download as JSON").click()
    data = json.loads(Path(download.value.path()).read_text())
    assert [row["response"] for row in data["completions"]] == ["my question"]
    assert [row["reasons"] for row in data["feedback"]] == [["off_topic"]]
    tab.get_by_role("button", name="Withdraw everything").click()
    assert tab.url.endswith("/you") and tab.locator(".figures .card").count() == 2  # the box is not ticked
    tab.get_by_label("I want all of it to be erased").check()
    tab.get_by_role("button", name="Withdraw everything").click()
    tab.get_by_text("Everything was withdrawn.").wait_for()
    tab.get_by_text("Nothing is kept of you.").wait_for()
    tab.goto(f"{parrot.url}/you")  # only then does it say so
    assert tab.get_by_text("Everything was withdrawn.").count() == 0
    row = parrot.store.completion(data["completions"][0]["id"])
    assert (row.status, row.response, row.request_messages) == ("erased", "", [])
    other.reload()
    assert other.locator(".theirs").count() == 1
    mine.goto(f"{parrot.url}/you")
    mine.get_by_label("I want all of it to be erased").check()
    mine.get_by_role("button", name="Withdraw everything").click()
    mine.get_by_text("Everything was withdrawn.").wait_for()
    mine.wait_for_load_state()  # the page's script, which forgets the conversation, has run
    mine.goto(parrot.url)
    assert mine.locator(".turn").count() == 0  # nor does the tab keep it
    assert mine.complaints == []


@browser_test
def test_a_visitor_rates_with_the_answers_own_tokens_and_who_may_only_ask_sees_no_thumbs(
    visit: Any, parrot_with: Any
) -> None:
    server = parrot_with({"THUMBWHEEL_REQUIRE_KEYS": "1", "THUMBWHEEL_VISITOR_SCOPES": "chat rate"})
    tab = visit(server.url)
    answer = ask(tab, "answer N times: hello")
    answer.locator(".up").click()
    wait_for_state(answer, "Saved")
    answer.locator(".again").click()
    tab.locator(".choose:enabled").first.wait_for()
    tab.get_by_role("button", name="Left is better").click()
    tab.locator(".compare .state.saved").wait_for()
    plain = visit(server.url, java_script_enabled=False)
    plain.locator("#text").fill("hello")
    plain.locator("#send").click()
    plain.locator(".up").click()
    assert plain.locator(".up").get_attribute("aria-pressed") == "true"
    kinds = [(event.op, event.payload["kind"]) for event in server.store.events()]
    assert kinds == [("create", "thumb"), ("create", "comparison"), ("create", "thumb")]
    server = parrot_with({"THUMBWHEEL_REQUIRE_KEYS": "1", "THUMBWHEEL_VISITOR_SCOPES": "chat"})
    tab = visit(server.url)
    assert tab.get_by_role("navigation").get_by_role("link").all_inner_texts() == ["Chat"]
    tab.locator("#text").fill("hello")
    tab.keyboard.press("Enter")
    tab.locator(".theirs .version", has_text=re.compile(".")).wait_for()
    assert not tab.locator(".up").is_visible()
    tab.goto(f"{server.url}/you")
    assert tab.url == f"{server.url}/"
    assert tab.complaints == []


def form_of(client: httpx.Client, path: str) -> dict[str, str]:
    """The hidden fields that a page's form carries."""
    return {"csrf_token": re.findall(r'name="csrf_token" value="(\w+)"', client.get(path).text)[0]}


def test_forms_of_other_sites_other_peoples_answers_and_nonsense_are_refused(parrot: Any) -> None:
    with httpx.Client(base_url=parrot.url) as ann, httpx.Client(base_url=parrot.url) as bob:
        fields, theirs = form_of(ann, "/"), form_of(bob, "/")
        assert ann.post("/plain", data={"question": "hello"}).status_code == 403  # no token
        assert ann.post("/plain", data={**theirs, "question": "hello"}).status_code == 403  # another session's
        location = ann.post("/plain", data={**fields, "question": "my secret"}).headers["location"]
        shown = ann.get(location.split("#")[0]).text
        assert "my secret" in shown
        assert "my secret" not in bob.get(location.split("#")[0]).text  # who knows the name reads nothing
        found = re.findall(r'name="(completion_id|token|conversation)" value="([^"]+)"', shown)
        thumb = {**fields, **dict(found), "value": "1"}
        assert bob.post("/plain/thumb", data={**thumb, **theirs, "token": "1.x.y"}).status_code == 403
        before = parrot.store.events(0, 100_000)[-1].seq
        for wrong in ({"value": "2"}, {"completion_id": "<script>"}, {"comment": "x" * 10_001}, {"comment": "\0"}):
            assert ann.post("/plain/thumb", data={**thumb, **wrong}).status_code == 422, wrong
        assert parrot.store.events(0, 100_000)[-1].seq == before
        assert ann.post("/you/withdraw", data=fields).status_code == 422
        too_long = ann.post("/plain", data={**fields, "question": "x" * 100_001})
        assert too_long.status_code == 422 and 'role="alert"' in too_long.text
        assert (
            ann.post("/plain/thumb", data=thumb).headers["location"]
            == f"/plain?conversation={thumb['conversation']}#" + (thumb["completion_id"])
        )
        assert ann.post("/plain", data={**fields, "question": " "}).headers["location"] == "/plain?conversation="
        evil = ann.post("/plain", data={**fields, "question": "", "conversation": "x\r\nSet-Cookie: a=b"})
        assert evil.headers["location"] == "/plain?conversation="


def test_every_word_is_there_in_both_languages_and_every_reason_has_one() -> None:
    for path in WORDS:
        words = json.loads(path.read_text(encoding="utf-8"))
        assert words.keys() == {"en", "zh"} and words["en"].keys() == words["zh"].keys(), path.name
        assert all(text.strip() for lang in words.values() for text in lang.values()), path.name
    for codes in chat_page.REASONS.values():
        assert all(f"reason_{code}" in page.words("chat", "zh") for code in codes)


def colours() -> list[dict[str, str]]:
    """The stylesheet's colours in the light and, where they differ, in the dark."""
    css = (page.FOLDER / "site.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", css, re.S)
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in blocks)
    return [light, {**light, **dark}]


def luminance(colour: str) -> float:
    """Relative luminance, by WCAG 2.2."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, by WCAG 2.2."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("palette", colours(), ids=["light", "dark"])
def test_text_has_a_contrast_of_4_5_and_the_edges_of_fields_of_3(palette: dict[str, str]) -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    texts = [(ink, paper) for ink in ("ink", "soft", "link") for paper in ("paper", "card", "tint")]
    texts += [(ink, f"{ink}-tint") for ink in ("good", "bad", "warn")]
    texts += [(ink, paper) for ink in ("good", "bad") for paper in ("paper", "card")] + [("accent-ink", "accent")]
    for ink, paper in texts:
        assert contrast(palette[ink], palette[paper]) >= 4.5, (ink, paper)
    for paper in ("paper", "card"):
        assert contrast(palette["edge"], palette[paper]) >= 3, paper


@browser_test
def test_whatever_can_be_used_has_a_name_and_a_role(visit: Any, parrot: Any) -> None:
    tab = visit(parrot.url)
    answer = ask(tab, "answer N times: hello")
    answer.locator(".up").click()
    wait_for_state(answer, "Saved")
    answer.locator(".better").click()
    names = roles(tab)
    assert {
        ("button", "Good answer"),
        ("button", "Helpful"),
        ("main", ""),
        ("banner", ""),
        ("log", "Conversation"),
    } <= names
    assert {("group", "What do you think of this answer?"), ("navigation", "Pages"), ("link", "Chat")} <= names
    answer.locator(".again").click()
    tab.locator(".choose:enabled").first.wait_for()
    assert {("region", "Which answer is better?"), ("article", "Left answer")} <= roles(tab)
    tab.locator("#help").click()
    assert ("dialog", "Keyboard shortcuts") in roles(tab)
    tab.goto(f"{parrot.url}/you")
    assert ("heading", "Your data") in roles(tab)


def roles(tab: Any) -> set[tuple[str, str]]:
    """(role, name) of everything in chromium's accessibility tree; asserts that whatever can be used has a name."""
    session = tab.context.new_cdp_session(tab)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    found = {(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"]}
    usable = ("button", "link", "textbox", "checkbox", "dialog", "article", "combobox", "radio")
    assert [role for role, name in found if role in usable and not name.strip()] == []
    return found
