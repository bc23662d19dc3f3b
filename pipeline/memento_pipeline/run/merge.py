"""Bringing the folders of several machines together."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from memento_pipeline.run.run_options import RunOptions, Shard
from memento_pipeline.store.folder import Store
from memento_sgl.errors import StoreError

INSERTS = {
    # What was unfinished or failed at an earlier merge may be done now, never the reverse.
    "traces": "INSERT INTO traces VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
    "digest = excluded.digest, trace = excluded.trace, status = excluded.status, "
    "reason = excluded.reason "
    "WHERE excluded.status IS NOT NULL OR excluded.digest <> traces.digest",
    "results": "INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?)",
    "answers": "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    "rejected": "INSERT OR REPLACE INTO rejected VALUES (?, ?, ?, ?, ?)",
}

# Rows that were edited after an earlier merge: nothing made of the old text may stay.
FORGET_EDITED = (
    "DELETE FROM results WHERE trace_id = (SELECT id FROM traces WHERE id = ? AND digest <> ?)"
)


def merge(out: Path, folders: Sequence[Path]) -> dict[str, int]:
    """Copy what the shards hold into one folder; may be repeated when they have got further.

    Returns:
        Traces by status, as `Store.counts`.

    Raises:
        StoreError: the shards do not belong together, or one is missing.
    """
    shards: list[Store] = []
    try:
        for folder in folders:
            shards.append(Store(folder, create=False))
        with Store(out, _common_settings(shards)) as target:
            for shard in shards:
                target.write_now(partial(_copy, path=shard.path))
            if (options := shards[0].noted("options")) is not None:
                whole = {"out": out, "shard": Shard(0, 1)}
                resumed = RunOptions.model_validate_json(options).model_copy(update=whole)
                target.note("options", resumed.model_dump_json())
            return target.counts()
    finally:
        for shard in shards:
            shard.close()


def _common_settings(shards: Sequence[Store]) -> dict[str, dict[str, Any]]:
    """The settings of all shards together, which then are those of an undivided run."""
    settings = [shard.settings for shard in shards]
    found: dict[int, Path] = {}
    counts: set[int] = set()
    for shard, own in zip(shards, settings, strict=True):
        index, count = Shard.parse(str(own.get("split", {}).get("shard", "1/1")))
        counts.add(count)
        if index in found:
            raise StoreError(f"{found[index]} and {shard.folder} are both shard {index + 1}")
        found[index] = shard.folder
        own.setdefault("split", {})["shard"] = str(Shard(0, 1))
        if own != settings[0]:
            raise StoreError(f"{shards[0].folder} and {shard.folder} were made with other settings")
    if counts != {len(found)}:
        raise StoreError(
            f"{len(found)} folders were given, of runs divided by {sorted(counts)}: give all "
            "shards of one run"
        )
    return settings[0]


def _copy(db: sqlite3.Connection, path: Path) -> None:
    """All rows of one shard, in the one transaction that the caller opened."""
    source = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
    try:
        db.executemany(FORGET_EDITED, source.execute("SELECT id, digest FROM traces"))
        for table, insert in INSERTS.items():
            db.executemany(insert, source.execute(f"SELECT * FROM {table}"))
    finally:
        source.close()
