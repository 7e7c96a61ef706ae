"""How a person uses the chat page, for its tests."""

from __future__ import annotations

from typing import Any


def ask(page: Any, text: str) -> Any:
    """Ask by keyboard; returns the answer's element when it is complete."""
    before = page.locator(".mine").count()
    page.locator("#text").fill(text)
    page.keyboard.press("Enter")
    answer = page.locator(".theirs").nth(before)
    answer.locator(".tools").wait_for()
    return answer


def pressed(answer: Any) -> list[str]:
    """aria-pressed of 👍 and of 👎."""
    return [answer.locator(name).get_attribute("aria-pressed") for name in (".up", ".down")]


def wait_for_state(answer: Any, text: str) -> None:
    """Until the line beside the thumbs, or below a comparison, says `text`."""
    answer.locator(".state", has_text=text).first.wait_for()
