"""`python -m memento_sgl.launch`: SGLang's server launcher, started by `memento serve`."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    server_args = prepare_server_args(sys.argv[1:])

    from sglang.launch_server import run_server

    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
