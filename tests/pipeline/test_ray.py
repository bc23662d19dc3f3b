"""Two workers of a local Ray cluster give the rows of one run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from memento_pipeline.run.convert import Exit
from memento_pipeline.run.ray_convert import convert_on_ray
from memento_pipeline.stages.summarize import SummarizeOptions
from memento_pipeline.store.folder import Store
from scenes import options, result_of, run, serving, write_traces

TRACES = 16


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'memento-sgl[ray]'")
    pytest.importorskip("ray.data", reason="Ray Data is not installed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.timeout(300)
def test_two_workers_equal_one_run(cluster: Any, tmp_path: Path) -> None:
    assert cluster.cluster_resources()["CPU"] == 2
    traces = write_traces(tmp_path / "traces.jsonl", TRACES)
    gate = SummarizeOptions(gate_mean=0, gate_least=0)
    with serving() as server:
        wanted = options(tmp_path / "ray", traces, server.url, summarize=gate)
        assert convert_on_ray(wanted, 2) == [Exit.OK, Exit.OK]
        calls = server.calls["all"]
        assert convert_on_ray(wanted, 2) == [Exit.OK, Exit.OK]
        assert server.calls["all"] == calls, "resuming asked again"
        run(options(tmp_path / "one", traces, server.url, summarize=gate))
        assert server.calls["all"] == 2 * calls
    assert result_of(tmp_path / "ray") == result_of(tmp_path / "one")
    for part in ("1-of-2", "2-of-2"):
        with Store(tmp_path / "ray" / "shards" / part, create=False) as store:
            assert 0 < store.counts()["ok"] < TRACES
