"""Child servers do not outlive the program that started them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil

PROGRAM = """
import sys
from pathlib import Path
from memento_sgl.demo.server import running_server

with running_server([sys.executable, "-c", "import time; time.sleep(600)"], Path(sys.argv[1])):
    pass
"""


def test_sigterm_takes_the_server_along(tmp_path: Path) -> None:
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "log")])
    children: list[psutil.Process] = []
    try:
        while not children:
            assert program.poll() is None, "the program ended before it started its server"
            time.sleep(0.05)
            children = psutil.Process(program.pid).children()
        program.terminate()
        assert program.wait(30) == 128 + 15
        assert not psutil.wait_procs(children, timeout=10)[1]
    finally:
        program.kill()
        for child in children:
            if child.is_running():
                child.kill()
