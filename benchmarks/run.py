"""All CPU benchmarks, one after the other: `make bench`."""

from __future__ import annotations

from benchmarks import convert, eviction, masks, observe, overhead, segment, serve, split

if __name__ == "__main__":
    for module in (split, segment, convert, eviction, masks, observe, serve, overhead):
        print(f"\n== {module.__name__}")
        module.main()
