"""Runs the steps of a Dockerfile in a bare Debian root, where no Docker runs. Needs chroot.

    debootstrap --variant=minbase bookworm ROOT
    python docker/check_root.py docker/cpu.Dockerfile ROOT [--bind /etc/pip.conf ...]

Each command is printed before it runs; the first that fails ends the check with its exit code.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*-output", ".*_cache")
STEP = re.compile(r"^(RUN|COPY|CMD|ENTRYPOINT) (.*)$", re.MULTILINE)


def steps(dockerfile: Path) -> Iterator[tuple[str, str]]:
    """Instructions that do something, with what stands behind them."""
    yield from STEP.findall(dockerfile.read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("root", type=Path)
    parser.add_argument("--bind", action="append", default=[], help="of this machine, read only")
    given = parser.parse_args()
    mounted = []
    try:
        for path in ("/dev", "/proc", "/etc/resolv.conf", *given.bind):
            place = given.root / path.lstrip("/")
            if Path(path).is_dir():
                place.mkdir(parents=True, exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.touch()
            # Packages in the root write to what is bound there, certificates for one.
            subprocess.run(["mount", "-o", "bind,ro", path, place], check=True)
            mounted.append(place)
        for kind, text in steps(given.dockerfile):
            print(f"{kind} {text}", flush=True)
            if kind == "COPY":
                shutil.copytree(
                    SOURCE, given.root / text.split()[1].lstrip("/"), ignore=LEFT_OUT,
                    dirs_exist_ok=True,
                )  # fmt: skip
            elif kind == "RUN":
                code = subprocess.run(["chroot", given.root, "/bin/sh", "-c", text]).returncode
                if code:
                    return code
    finally:
        for place in reversed(mounted):
            subprocess.run(["umount", place], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
