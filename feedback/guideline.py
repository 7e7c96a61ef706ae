"""The labelling guideline beside the answers: the team's markdown file, or ours; as HTML that holds no HTML of theirs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

OURS = Path(__file__).parent / "pages"
LIMIT = 200_000  # bytes of a file


def guideline(team: Path | None, lang: str) -> str:
    """The guideline in a language; the team's is in the one in which they wrote it. A changed file shows at once.

    Raises ValueError, naming the setting, for a file that cannot be read.
    """
    path = team or OURS / f"guideline.{lang}.md"
    try:
        stat = path.stat()
        if stat.st_size > LIMIT:
            raise ValueError(f"THUMBWHEEL_GUIDELINE: {path} has {stat.st_size} bytes; at most {LIMIT} are shown")
        return rendered(path, stat.st_mtime_ns)
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"THUMBWHEEL_GUIDELINE: {path} cannot be read as UTF-8 text: {problem}") from problem


@cache
def parser() -> Any:
    """Markdown without HTML and pictures, with links to http and https alone."""
    from markdown_it import MarkdownIt  # here, because nothing else of the service needs it

    found = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    found.validateLink = lambda url: url.lower().startswith(("http://", "https://"))  # type: ignore[method-assign]

    def link_open(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
        tokens[index].attrSet("rel", "noopener noreferrer nofollow")
        tokens[index].attrSet("target", "_blank")
        return str(self.renderToken(tokens, index, options, env))

    found.add_render_rule("link_open", link_open)
    return found


@cache
def rendered(path: Path, changed: int) -> str:
    """The file as HTML; changed: when it was, so that it is read again when it is another."""
    return str(parser().render(path.read_text(encoding="utf-8")))
