"""Two answers side by side on the chat page, in a real chromium: random places, blind, kept as they were shown."""

from __future__ import annotations

from typing import Any

import pytest
from chatting import ask, wait_for_state
from injections import INJECTIONS, harmless

pytestmark = pytest.mark.browser


def compare(page: Any) -> tuple[str, str]:
    """Ask for another answer; the texts on the left and on the right."""
    page.locator(".again:visible").click()
    page.locator(".choose:enabled").first.wait_for()
    return page.locator(".left .text").inner_text(), page.locator(".right .text").inner_text()


def newest(server: Any) -> Any:
    """The newest event about comparisons."""
    return [event for event in server.store.events(0, 100_000) if event.payload["kind"] == "comparison"][-1]


def test_places_are_random_and_the_api_gets_what_was_shown(visit: Any, parrot: Any) -> None:
    page = visit(parrot.url)
    seen = set()
    for _ in range(20):
        first = ask(page, "answer N times: go").locator(".text").inner_text()
        left, right = compare(page)
        rival = right if left == first else left
        assert first in (left, right) and rival != first
        choice = "Left is better" if len(seen) % 2 else "Right is better"
        page.get_by_role("button", name=choice).click()
        page.locator(".compare .state.saved").wait_for()
        said = newest(parrot).payload
        answers = {id: parrot.store.completion(id) for id in (said["completion_id"], said["other"])}
        texts = {id: row.response for id, row in answers.items()}
        assert sorted(texts.values()) == sorted((left, right))
        chosen = said["completion_id"] if said["value"] == 1 else said["other"]
        assert texts[chosen] == (left if choice.startswith("Left") else right)
        # position: where the answer of completion_id stood, 0 is left
        assert said["position"] == (0 if texts[said["completion_id"]] == left else 1)
        parents = {row.response: row.parent for row in answers.values()}
        assert parents[first] is None and texts[parents[rival]] == first
        assert (said["source"], said["channel"], said["locale"], said["strength"]) == ("human_user", "page", "en", 1.0)
        seen.add(left == first)
        page.get_by_role("button", name="New chat").click()
        if len(seen) == 2:
            break
    assert seen == {True, False}  # 1 in 500,000 that a fair coin falls so that this fails
    assert page.complaints == []


def test_it_is_blind_until_one_is_chosen_and_the_conversation_goes_on_with_it(visit: Any, parrot: Any) -> None:
    page = visit(parrot.url)
    first = ask(page, "answer N times: tell me").locator(".text").inner_text()
    left, right = compare(page)
    rival, side = (right, "Right") if left == first else (left, "Left")
    model = parrot.client.get("/v1/models").json()["data"][0]["model_hash"]
    assert model[:12] not in page.locator("#log").inner_html()
    page.get_by_role("button", name=f"{side} is better").click()
    page.locator(".compare .state.saved").wait_for()
    assert page.locator(".compare .version:visible").count() == 2
    page.get_by_label("Clearly better").check()
    page.locator(".compare .state.saved").wait_for()
    assert newest(parrot).payload["strength"] == 2.0
    page.reload()  # it is still there
    assert page.locator(".compare .chosen .text").inner_text() == rival
    answer = ask(page, "and then?")
    assert page.locator(".theirs .text").first.inner_text() == rival
    id = answer.evaluate("element => element.answer.turn.completion")
    told = [message["content"] for message in parrot.store.completion(id).request_messages]
    assert told == ["answer N times: tell me", rival, "and then?"]
    page.locator(".theirs").first.locator(".up").click()
    wait_for_state(page.locator(".theirs").first, "Saved")
    rated = parrot.store.completion(parrot.store.events(0, 100_000)[-1].payload["completion_id"])
    assert rated.response == rival
    assert page.complaints == []


def test_undo_skip_and_stop(visit: Any, parrot: Any) -> None:
    page = visit(parrot.url)
    first = ask(page, "answer N times: again").locator(".text").inner_text()
    compare(page)
    page.get_by_role("button", name="About equal").click()
    page.locator(".compare .state.saved").wait_for()
    page.locator(".compare").get_by_role("button", name="Undo").click()
    wait_for_state(page.locator(".compare"), "Taken back")
    assert newest(parrot).payload["retracted"]
    before = len(parrot.store.events(0, 100_000))
    page.get_by_role("button", name="Skip").click()
    assert page.locator(".theirs .text").inner_text() == first
    ask(page, "slowly " + "word " * 60)
    page.locator(".again:visible").click()
    page.locator(".compare .right .text p, .compare .left .text p").nth(1).wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped").wait_for()
    assert page.locator(".compare").count() == 0 and page.locator(".tools:visible").count() == 2
    assert len(parrot.store.events(0, 100_000)) == before
    page.reload()
    assert page.locator(".compare").count() == 0 and page.locator(".theirs").count() == 2
    assert page.complaints == []


def test_a_comparison_that_did_not_arrive_is_said_not_to_and_tried_again(visit: Any, parrot: Any) -> None:
    page = visit(parrot.url)
    ask(page, "answer N times: lost")
    compare(page)
    keys = []

    def lose(route: Any) -> None:
        keys.append(route.request.headers["idempotency-key"])
        if len(keys) <= 3:
            route.fulfill(status=503, json={"error": {"message": "no"}})
        else:
            route.continue_()

    page.route("**/v1/comparisons", lose)
    page.get_by_role("button", name="Left is better").click()
    wait_for_state(page.locator(".compare"), "Not saved.")
    assert page.locator(".compare .version:visible").count() == 0
    page.locator(".compare").get_by_role("button", name="Try again").click()
    page.locator(".compare .state.saved").wait_for()
    assert len(set(keys)) == 1 and len(keys) == 4


def test_nothing_in_two_answers_runs(visit: Any, parrot: Any) -> None:
    page = visit(parrot.url)
    ask(page, "answer N times: " + "\n\n".join(INJECTIONS))
    compare(page)
    harmless(page, parrot.url)
