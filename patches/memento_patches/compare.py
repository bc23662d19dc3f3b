"""What changed between two installed SGLangs, as far as this package depends on it.

    python -m memento_patches.compare OLD NEW [--diff]

OLD and NEW are environments or their site-packages; neither is imported. `docs/upgrade.md` says
what to do with the answer.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from memento_patches.ledger import LEDGER, RELIED, Relied, Seam
from memento_patches.source import Function, find, namesakes, site_of, versions
from memento_sgl.errors import PatchError

State = Literal["same", "changed", "gone", "new"]
MOST_NAMESAKES = 3


class Change(NamedTuple):
    """What became of one function of SGLang.

    Attributes:
        about: the hook that wraps it, or what is relied upon.
        elsewhere: functions of the same name, of one that is gone.
    """

    target: str
    about: str
    state: State
    added: int
    removed: int
    diff: list[str]
    elsewhere: list[str]


def compare(old: Path, new: Path) -> list[Change]:
    """Every function of the ledger in two site-packages folders, in the ledger's order."""
    about = {seam.target: f"wrapped by {seam.hook}" for seam in LEDGER}
    about |= {relied.target: relied.what for relied in RELIED}
    return [_compare(old, new, target, text) for target, text in about.items()]


def _compare(old: Path, new: Path, target: str, about: str) -> Change:
    before, after = find(old, target), find(new, target)
    if before is not None and after is not None:
        diff = _diff(before, after)
        state: State = "changed" if diff else "same"
    else:
        diff = []
        state = "gone" if after is None else "new"
    added = sum(line.startswith("+") for line in diff[2:])
    removed = sum(line.startswith("-") for line in diff[2:])
    elsewhere = list(namesakes(new, target))[:MOST_NAMESAKES] if after is None else []
    return Change(target, about, state, added, removed, diff, elsewhere)


def _diff(before: Function, after: Function) -> list[str]:
    names = (f"{before.path}:{before.line}", f"{after.path}:{after.line}")
    lines = (before.text.splitlines(), after.text.splitlines())
    return list(difflib.unified_diff(*lines, *names, lineterm=""))


def pins(old: Path, new: Path) -> Iterator[str]:
    """Packages around SGLang whose version differs, as lines of text."""
    was, now = versions(old), versions(new)
    for name in dict.fromkeys([*was, *now]):
        if was.get(name) != now.get(name):
            yield f"{name}: {was.get(name, '-')} -> {now.get(name, '-')}"


def report(changes: Sequence[Change], *, diffs: bool = False) -> Iterator[str]:
    """A comparison as lines of text; the last one counts."""
    for change in changes:
        if change.state == "same":
            continue
        size = f" (+{change.added} -{change.removed})" if change.state == "changed" else ""
        yield f"{change.state:<8} {change.target}{size}: {change.about}"
        yield from (f"         now perhaps {where}" for where in change.elsewhere)
        if diffs:
            yield from (f"         {line}" for line in change.diff)
    counts = Counter(change.state for change in changes)
    states = ", ".join(f"{counts[state]} {state}" for state in get_args(State))
    yield f"{len(changes)} functions: {states}"


def outlook(site: Path) -> str:
    """How far an installed SGLang is from the one that this release is made for."""
    entries: list[Seam | Relied] = [*LEDGER, *RELIED]
    found = [(find(site, entry.target), entry.fingerprint) for entry in entries]
    same = sum(function is not None and function.fingerprint == mark for function, mark in found)
    gone = sum(function is None for function, _ in found)
    return (
        f"of {len(found)} functions that this release depends on, {same} are the same there, "
        f"{len(found) - same - gone} changed and {gone} missing"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """0: nothing that this package depends on has changed."""
    parser = argparse.ArgumentParser(prog="python -m memento_patches.compare", description=__doc__)
    parser.add_argument("old", type=Path, help="environment or site-packages folder")
    parser.add_argument("new", type=Path, help="another one")
    parser.add_argument("--diff", action="store_true", help="print how each function changed")
    given = parser.parse_args(arguments)
    try:
        old, new = site_of(given.old), site_of(given.new)
    except PatchError as error:
        parser.error(str(error))
    changes = compare(old, new)
    for line in (*pins(old, new), *report(changes, diffs=given.diff)):
        print(line)
    return int(any(change.state != "same" for change in changes))


if __name__ == "__main__":
    sys.exit(main())
