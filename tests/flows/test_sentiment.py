"""The word-list judges, by texts whose score is known."""

from __future__ import annotations

import subprocess
import sys

import pytest

from flows.sentiment import second_opinion, thumb


@pytest.mark.parametrize(
    ("text", "up"),
    [("I love it, that is great!", True), ("I hate it.", False), ("The table has four legs.", False), ("", False)],
)
def test_vader_gives_the_english_thumb(text: str, up: bool) -> None:
    assert thumb(text) is up


@pytest.mark.parametrize(("text", "up"), [("这本书很好，我很喜欢", True), ("太差了", False), ("", False), (" ", False)])
def test_snownlp_gives_the_chinese_thumb(text: str, up: bool) -> None:
    assert thumb(text, "zh") is up


def test_a_language_without_a_judge_is_refused() -> None:
    with pytest.raises(ValueError, match="'fr'"):
        thumb("bonjour", "fr")


def test_textblob_reads_no_chinese() -> None:
    assert second_opinion("很好", "zh") is None


def test_the_second_judge_is_textblob_without_its_imports() -> None:
    """Our way first, then the official one; equal answers, and ours leaves no module."""
    program = """
import sys
from flows.sentiment import _textblob_polarity, second_opinion
texts = ["I love it", "It is not good.", "terrible!", "Yeah.", "", "So very nice to see you :)", "half past two"]
ours = [_textblob_polarity()(t)[0] for t in texts]
assert [second_opinion(t) for t in texts] == [p > 0 for p in ours]
assert not any(m.split(".")[0] in ("textblob", "nltk", "sklearn") for m in sys.modules)
from textblob import TextBlob
assert ours == [TextBlob(t).sentiment.polarity for t in texts], ours
assert ours[0] > 0 > ours[1] and ours[2] < 0 == ours[3]
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
