"""Draw the arrows of `tests/arrows.py` into docs/structure.md: `python docs/make_structure.py`."""

from __future__ import annotations

import sys
from pathlib import Path

PAGE = Path(__file__).parent / "structure.md"
BEGIN, END = "<!-- arrows: drawn by docs/make_structure.py -->\n", "<!-- end of arrows -->\n"
sys.path.insert(0, str(PAGE.parents[1] / "tests"))

from arrows import ARROWS  # noqa: E402


def direct(table: dict[str, set[str]], place: str) -> set[str]:
    """The places that `place` uses and no other that it uses does: the rest follows."""
    uses = table[place]
    return {one for one in uses if not any(one in table.get(other, set()) for other in uses)}


def drawn() -> str:
    """Two Mermaid graphs: A uses B. Arrows that follow from others are left out."""
    parts = []
    for package, table in ARROWS.items():
        lines = [
            f"    {place} --> {one}" for place in table for one in sorted(direct(table, place))
        ]
        parts.append(
            "\n".join(
                ["```mermaid", "graph TD", f"    subgraph {package}", *lines, "    end", "```"]
            )
        )
    return "\n\n".join(parts) + "\n"


def with_drawing(page: str) -> str:
    """The page with its drawing made anew."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}{drawn()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(with_drawing(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
