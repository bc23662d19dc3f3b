"""`python -m memento_sgl.serve.launch`: SGLang's server launcher, started by `memento serve`.

Ctrl-C ends a server at once, in one line, whatever it is doing. The signal is blocked in all
processes (SGLang's own would print a traceback each), and one thread waits for it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from multiprocessing import resource_tracker
from typing import Any

from memento_sgl.environment import warnings_of_children

INTERRUPTED = 130


def block_interrupts() -> None:
    """Keep Ctrl-C from this process and its children; a program started by exec inherits it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _end_on_interrupt() -> None:
    signal.sigwait({signal.SIGINT})
    _stopped()


def _stopped() -> None:
    print("memento: stopped", file=sys.stderr, flush=True)
    end(INTERRUPTED)


def end(code: int) -> None:
    """End all processes of the server, this one last and before it can complain about the rest."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        try:
            if not any("resource_tracker" in part for part in child.cmdline()):
                child.kill()  # the tracker gives shared memory back when we are gone
        except psutil.NoSuchProcess:
            continue
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _arguments(given: list[str]) -> list[str]:
    from memento_sgl.environment import has_accelerator

    if "--device" in given or has_accelerator():
        return given
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # several times faster for small models
    return [*given, "--device", "cpu"]


def _without_usage(_parser: argparse.ArgumentParser, _file: Any = None) -> None:
    """SGLang's usage is 450 lines: the error behind it would not be seen."""


def main() -> None:
    signal.signal(signal.SIGINT, lambda *_: _stopped())
    # Not later: its start takes the block away. It outlives us and frees what we leave behind; its
    # warning about that is not for the user.
    with warnings_of_children("ignore::UserWarning:multiprocessing.resource_tracker"):
        resource_tracker.ensure_running()
    block_interrupts()
    threading.Thread(target=_end_on_interrupt, daemon=True).start()
    arguments = _arguments(sys.argv[1:])
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    argparse.ArgumentParser.print_usage = _without_usage  # type: ignore[assignment]
    server_args = prepare_server_args(arguments)

    from sglang.launch_server import run_server

    code = 1
    try:
        run_server(server_args)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    end(code)


if __name__ == "__main__":
    main()
