"""The page at `/memento`: watch a model think, in the browser. Needs neither torch nor SGLang.

The page is one HTML file that talks to the address it came from. `memento serve` puts it on
SGLang's own HTTP server, `memento ui` on a small server of its own in front of any other.
"""
