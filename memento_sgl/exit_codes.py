"""How a command of the command line ends."""

from __future__ import annotations

from collections.abc import Callable

from memento_sgl.errors import MementoError, StoppedError, StoreError


def as_exit_code(work: Callable[[], int], interrupted: str) -> int:
    """Run a command; an error for the user, or Ctrl-C, becomes one line on standard error.

    Args:
        work: returns the exit code of its success.
        interrupted: what to do after Ctrl-C.

    Returns:
        2 for a mistake of the user, 5 for a run that stopped early, 6 for a folder or file in use,
        damaged or made with other settings, 130 after Ctrl-C, 1 for the rest.
    """
    try:
        return work()
    except KeyboardInterrupt:
        _say(f"interrupted: {interrupted}")
        return 130
    except MementoError as error:
        _say(str(error), "error: ")
        if isinstance(error, (StoppedError, StoreError)):
            return 5 if isinstance(error, StoppedError) else 6
        return 2 if isinstance(error, ValueError) else 1


def _say(text: str, before: str = "") -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text.assemble((before, "red"), text), soft_wrap=True)
