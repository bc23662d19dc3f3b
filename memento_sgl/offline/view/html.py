"""HTML pages that are complete in themselves: templates in, one text without network out."""

from __future__ import annotations

import json
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from memento_sgl.templates import template


def render_page(template_name: str, /, **values: Any) -> str:
    """The page of a template of this project; values are escaped, `Markup` is not."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template(template_name)).render(**values)


def embedded(value: Any) -> Markup:
    """JSON that is safe inside a script element: no `<`, so no tag or comment can open or end."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def verbatim(name: str) -> Markup:
    """A style or script of this project, as it is."""
    return Markup(template(name))
