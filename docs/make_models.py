"""Write the tables of models and of attention backends that a launch goes by into docs/models.md
and docs/scale.md: `python docs/make_models.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from memento_sgl.serve.models import backends_table, layouts_table

DOCS = Path(__file__).parent
BEGIN, END = "<!-- table: written by docs/make_models.py -->\n", "<!-- end of table -->\n"
PAGES: dict[Path, Callable[[], str]] = {
    DOCS / "models.md": layouts_table,
    DOCS / "scale.md": backends_table,
}


def with_table(page: Path, text: str) -> str:
    """The page's text with its table made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}{PAGES[page]()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_table(page, page.read_text(encoding="utf-8")), encoding="utf-8")
