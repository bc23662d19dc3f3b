"""Find the project's jinja templates: shipped inside the package, or in the checkout beside it."""

from __future__ import annotations

from pathlib import Path

_PLACES = (
    Path(__file__).parent / "templates",
    Path(__file__).parent.parent / "templates",
)


def template_path(name: str) -> Path:
    """Path of `name` (with or without `.jinja`).

    Raises:
        FileNotFoundError: no such template; the message lists those that exist.
    """
    file = name if name.endswith(".jinja") else f"{name}.jinja"
    for place in _PLACES:
        if (path := place / file).is_file():
            return path
    known = sorted(path.stem for place in _PLACES for path in place.glob("*.jinja"))
    raise FileNotFoundError(f"no template {name!r}; there are: {', '.join(known)}")


def template(name: str) -> str:
    """Text of a template."""
    return template_path(name).read_text(encoding="utf-8")
