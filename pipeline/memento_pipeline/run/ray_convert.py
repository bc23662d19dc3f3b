"""`convert` on a Ray cluster: Ray Data hands out shards, each worker runs one in its own folder.

A shard is resumable by itself, so Ray may move or repeat it when a worker dies: what was paid is in
the shard's store. The folders must be on a file system that all workers see. Limits and the budget
hold for each worker by itself.

    pip install "memento-sgl[ray]"
    memento convert traces.jsonl --out work --model NAME --base-url URL --ray 16
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from memento_pipeline.run.convert import Exit, run_stages
from memento_pipeline.run.merge import merge
from memento_pipeline.run.run_options import RunOptions, Shard
from memento_pipeline.store.folder import Store
from memento_pipeline.text.tokens import load_counter
from memento_sgl.errors import ConfigError, PipelineError


def convert_on_ray(options: RunOptions, shards: int, *, retry_failed: bool = False) -> list[Exit]:
    """Run all shards on the cluster that RAY_ADDRESS names (else on this machine) and merge them.

    Returns:
        How each shard ended. Shards that stopped early are merged as far as they came.

    Raises:
        ConfigError: Ray is not installed.
        PipelineError: a shard could not run at all.
    """
    try:
        import ray.data
    except ImportError:
        raise ConfigError('--ray needs Ray Data: pip install "memento-sgl[ray]"') from None
    jobs: list[dict[str, Any]] = []
    for index in range(shards):
        folder = (options.out / "shards" / f"{index + 1}-of-{shards}").resolve()
        inputs = tuple(path.resolve() for path in options.inputs)
        update = {"shard": Shard(index, shards), "out": folder, "inputs": inputs}
        own = options.model_copy(update=update)
        jobs.append({"options": own.model_dump_json(), "retry_failed": retry_failed})
    done = (
        ray.data.from_items(jobs, override_num_blocks=shards).map(run_shard, num_cpus=1).take_all()
    )
    errors = [row["error"] for row in done if row["error"]]
    if errors:
        raise PipelineError(f"{len(errors)} of {shards} shards did not run: {errors[0]}")
    merge(options.out, [Path(json.loads(job["options"])["out"]) for job in jobs])
    return [Exit(row["exit"]) for row in done]


def run_shard(job: dict[str, Any]) -> dict[str, Any]:
    """One worker's part."""
    options = RunOptions.model_validate_json(job["options"])
    try:
        settings = options.settings(load_counter(options.tokenizer).name)
        with Store(options.out, settings) as store:
            if job["retry_failed"]:
                store.retry_failed()
            outcome = run_stages(options, store, display=False)
    except PipelineError as error:
        return {"exit": int(Exit.ERROR), "error": str(error)}
    return {"exit": int(outcome.exit), "error": ""}
