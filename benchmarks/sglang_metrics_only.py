"""`sglang.launch_server` with memento, but with none of this project's metrics and traces.

For comparison: what SGLang's own metrics cost. SGLang's child processes import this file again.
"""

from __future__ import annotations

import runpy

from memento_sgl import runtime

runtime.observers_of = lambda *_: None

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
