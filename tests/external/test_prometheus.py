"""The queries of the Grafana dashboard in a real Prometheus (Debian package `prometheus`).

Two targets: one answers with the installed prometheus_client, which chooses the spelling of names
by what the scraper accepts, one always with colons, as its versions before 0.23 did.
"""

from __future__ import annotations

import http.server
import importlib.metadata
import json
import os
import random
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from memento_sgl.demo.server import free_port
from memento_sgl.observe.metrics import METRICS, PREFIX

prometheus_client = pytest.importorskip("prometheus_client")
pytestmark = pytest.mark.external

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana" / "memento.json"
STOCK = {
    "sglang:num_used_tokens": prometheus_client.Gauge,
    "sglang:generation_tokens_total": prometheus_client.Counter,
    "sglang:num_retracted_requests_total": prometheus_client.Counter,
}
KINDS = {
    "counter": prometheus_client.Counter,
    "gauge": prometheus_client.Gauge,
    "histogram": prometheus_client.Histogram,
}


def registry() -> tuple[Any, list[Any]]:
    """Every metric of the project and the stock ones of the dashboard, with their children."""
    found = prometheus_client.CollectorRegistry()
    children = []
    for name, kind in STOCK.items():
        metric = kind(name, "stock", ["model_name"], registry=found)
        children.append(metric.labels(model_name="m"))
    for name, spec in METRICS.items():
        labels = ["model_name", *(spec.label[:1] if spec.label else ())]
        metric = KINDS[spec.kind](PREFIX + name, spec.help, labels, registry=found)
        values = spec.label[1] if spec.label else (None,)
        for value in values:
            own = {spec.label[0]: value} if spec.label else {}
            children.append(metric.labels(model_name="m", **own))
    return found, children


def move(children: list[Any]) -> None:
    for child in children:
        if hasattr(child, "observe"):
            child.observe(random.uniform(0.1, 900))
        else:
            child.inc(random.randint(1, 9))


@contextmanager
def target(registry: Any, *, plain: bool) -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            accept = "" if plain else self.headers.get("Accept", "")
            encode, kind = prometheus_client.exposition.choose_encoder(accept)
            text = encode(registry)
            if plain:
                text = text.replace(b"sglang_", b"sglang:")
                kind = "text/plain; version=0.0.4; charset=utf-8"
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def queries() -> list[str]:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """Address of a Prometheus, and the two targets it scrapes each second."""
    program = shutil.which(os.environ.get("PROMETHEUS", "prometheus"))
    assert program is not None, "apt install prometheus, or name the program in PROMETHEUS"
    folder = tmp_path_factory.mktemp("prometheus")
    found, children = registry()
    with target(found, plain=False) as new, target(found, plain=True) as old:
        instances = [f"127.0.0.1:{new}", f"127.0.0.1:{old}"]
        (folder / "prometheus.yml").write_text(
            json.dumps(
                {
                    "global": {"scrape_interval": "1s"},
                    "scrape_configs": [
                        {"job_name": "sglang", "static_configs": [{"targets": instances}]}
                    ],
                }
            )
        )
        port = free_port()
        server = subprocess.Popen(
            [
                program,
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(60):
                move(children)
                if scrapes(url) >= 6 * len(instances):
                    break
                time.sleep(1)
            else:
                raise AssertionError("Prometheus scraped nothing")
            yield url, instances
        finally:
            server.terminate()
            server.wait()


def scrapes(url: str) -> float:
    try:
        found = ask(url, "sum(count_over_time(up[1h]))")
    except (httpx.HTTPError, KeyError):
        return 0
    return float(found[0]["value"][1]) if found else 0


def ask(url: str, query: str) -> list[dict[str, Any]]:
    answer = httpx.get(f"{url}/api/v1/query", params={"query": query}, timeout=10).json()
    assert answer["status"] == "success", answer
    result: list[dict[str, Any]] = answer["data"]["result"]
    return result


def test_every_query_has_data_from_both(scraped: tuple[str, list[str]]) -> None:
    url, instances = scraped
    names = httpx.get(f"{url}/api/v1/label/__name__/values", timeout=10).json()["data"]
    assert f"{PREFIX}blocks_total" in names
    for instance in instances:
        for query in queries():
            local = query.replace("$__rate_interval", "1m").replace("$model", ".*")
            found = ask(url, local.replace("$instance", re.escape(instance).replace("\\", "\\\\")))
            assert found, (instance, query)
            assert all(item["value"][1] != "NaN" for item in found), (instance, query)


def test_both_spellings_were_scraped(scraped: tuple[str, list[str]]) -> None:
    """Else the test above would not show anything."""
    url, _ = scraped
    spelled = {
        item["metric"]["__name__"]
        for item in ask(url, '{__name__=~"sglang[:_]memento_blocks_total"}')
    }
    expected = {f"{PREFIX}blocks_total"}
    version = tuple(map(int, importlib.metadata.version("prometheus-client").split(".")[:2]))
    if version >= (0, 23):
        expected.add(f"{PREFIX}blocks_total".replace(":", "_"))
    assert spelled == expected
