"""Many questions at once: an early end loses nothing that is finished, and begins nothing more."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from memento_frontend.answers_file import AnswersFile, Item
from memento_frontend.asking import Asking

ITEMS = [Item(str(number), "x", {}) for number in range(20)]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_the_first_error_ends_the_run_when_no_thread_works_any_more(
    tmp_path: Path, kind: type[BaseException]
) -> None:
    begun: list[str] = []
    ended: list[str] = []
    aborted = threading.Event()
    waiting = threading.Barrier(4)

    with AnswersFile(tmp_path / "out.jsonl", {}) as answers:
        asking = Asking("questions", answers, len(ITEMS), progress=False)

        def one(item: Item) -> None:
            begun.append(item.id)
            waiting.wait(10)
            if item.id == "2":
                raise kind("broken")
            assert aborted.wait(10)
            assert asking.stopping.is_set()
            answers.add(item, error="aborted")
            ended.append(item.id)

        with pytest.raises(kind, match="broken"):
            asking.all(one, ITEMS, 4, aborted.set)
        assert sorted(begun) == ["0", "1", "2", "3"]
        assert sorted(ended) == ["0", "1", "3"]
        assert (asking.done, asking.total) == (3, 20)


def test_all_are_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with AnswersFile(tmp_path / "out.jsonl", {}) as answers:
        asking = Asking("questions", answers, len(ITEMS), progress=True)
        asking.all(lambda item: answers.add(item, error="none"), ITEMS, 3)
        assert asking.done == 20
    assert "20/20" in capsys.readouterr().err
