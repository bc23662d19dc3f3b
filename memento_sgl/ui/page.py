"""The page as one text, and the headers it is sent with."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from typing import NamedTuple

from markupsafe import Markup

from memento_sgl.offline.view.html import embedded, render_page, verbatim
from memento_sgl.offline.view.page import page_of

SCRIPTS = ("view_chart.js", "ui_parser.js", "ui_story.js", "ui_link.js", "ui_chat.js", "ui.js")
"""In the order in which they need each other."""
TITLE, DATA = "@title@", "@data@"
"""Where the page puts what it knows into the page of `memento view` when a chat is shared."""


class Page(NamedTuple):
    html: str
    headers: dict[str, str]


@cache
def page() -> Page:
    """The page; the same for every server."""
    style = verbatim("ui.css")
    script = Markup("\n").join(verbatim(name) for name in SCRIPTS)
    shared = page_of(title=TITLE, about="saved from the page at /memento", data=Markup(DATA))
    html = render_page("ui.html", style=style, script=script, shared=embedded(shared))
    return Page(html, {"Content-Security-Policy": _policy(style, script)} | HEADERS)


HEADERS = {
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def _policy(style: str, script: str) -> str:
    """Only this page's own script runs, whatever a model writes; nothing leaves for elsewhere."""
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hash(script)}",
            f"style-src {_hash(style)}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


def _hash(text: str) -> str:
    # A browser hashes all that stands between the tags: the template's two newlines too.
    digest = hashlib.sha256(f"\n{text}\n".encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
