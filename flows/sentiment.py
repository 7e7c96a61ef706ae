"""The judges that are word lists: VADER (English) and SnowNLP (Chinese) give the simulated thumbs, TextBlob looks on.

The simulated rater uses `thumb` alone. `second_opinion` never rates anything that a model learns from; it is there to
notice when a gain in thumbs is only a gain in VADER's favourite words.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

LANGUAGES = ("en", "zh")
VADER_POSITIVE = 0.05  # the threshold that VADER's authors give for "positive"
SNOWNLP_POSITIVE = 0.6  # SnowNLP gives .5 to what it does not know

_textblob_import = threading.Lock()


def thumb(text: str, language: str = "en") -> bool:
    """Whether the simulated rater gives a thumb up. Raises ValueError for a language without a judge."""
    if language == "en":
        return float(_vader().polarity_scores(text)["compound"]) >= VADER_POSITIVE
    if language == "zh":
        return bool(text.strip()) and float(_snownlp()(text)) > SNOWNLP_POSITIVE
    raise ValueError(f"data.language is {language!r}: the simulated rater knows {', '.join(LANGUAGES)}")


def second_opinion(text: str, language: str = "en") -> bool | None:
    """Whether TextBlob finds the text positive (polarity > 0); None in Chinese, which TextBlob cannot read."""
    if language != "en":
        return None
    polarity, _subjectivity = _textblob_polarity()(text)
    return float(polarity) > 0


@lru_cache(maxsize=1)
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


@lru_cache(maxsize=1)
def _snownlp() -> Callable[[str], float]:
    from snownlp import sentiment

    return sentiment.classify


@lru_cache(maxsize=1)
def _textblob_polarity() -> Callable[[str], tuple[float, float]]:
    """TextBlob's lexicon analyser, the function behind TextBlob(text).sentiment.

    `import textblob` pulls in nltk, scipy and scikit-learn (5 s, half a minute from a cold disk), none of which the
    analyser uses. So its module is loaded under an empty stand-in for the package, which is taken away again.
    """
    with _textblob_import:
        if "textblob" in sys.modules:
            return importlib.import_module("textblob.en").sentiment
        spec = importlib.util.find_spec("textblob")
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError("textblob is not installed: run `make install`")
        package = ModuleType("textblob")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["textblob"] = package
        try:
            return importlib.import_module("textblob.en").sentiment
        finally:
            for name in [n for n in sys.modules if n == "textblob" or n.startswith("textblob.")]:
                del sys.modules[name]
