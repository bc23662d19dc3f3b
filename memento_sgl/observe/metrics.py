"""Prometheus metrics of a scheduler process, beside SGLang's own and with its labels.

`docs/metrics.md` explains each one. SGLang serves them at `/metrics` with `--enable-metrics`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

PREFIX = "sglang:memento_"
TOKENS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

Part = Literal["prompt", "output"]
"""Where a block's memento closed, or an eviction's point stands."""


class Spec(NamedTuple):
    """One metric. `label` is an additional label with its values."""

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    label: tuple[str, tuple[str, ...]] | None = None
    buckets: tuple[float, ...] = ()


_PARTS = ("part", ("prompt", "output"))

METRICS: dict[str, Spec] = {
    "blocks_total": Spec("counter", "Complete blocks, each with its memento.", _PARTS),
    "evictions_total": Spec("counter", "Blocks evicted, each counted once per request.", _PARTS),
    "evicted_tokens_total": Spec("counter", "KV tokens of those blocks.", _PARTS),
    "row_edits_total": Spec(
        "counter",
        "Evictions applied to request rows, those replayed after a retraction included.",
        ("step", ("prefill", "decode")),
    ),
    "voided_steps_total": Spec("counter", "Decode results ignored and done again."),
    "recomputed_tokens_total": Spec("counter", "Memento tokens read again in restart mode."),
    "forced_tokens_total": Spec("counter", "Output tokens that were the only one permitted."),
    "kv_token_steps_total": Spec("counter", "KV tokens summed over steps of finished requests."),
    "saved_kv_token_steps_total": Spec(
        "counter", "What the same requests would have held more without eviction."
    ),
    "pruned_nodes_total": Spec("counter", "Radix nodes that lost their KV to a finished block."),
    "pruned_tokens_total": Spec("counter", "KV tokens of those nodes."),
    "revived_nodes_total": Spec("counter", "Pruned radix nodes that got KV again."),
    "revived_tokens_total": Spec("counter", "KV tokens of those nodes."),
    "resumptions_total": Spec("counter", "Retracted requests that found KV in the radix tree."),
    "resumed_tokens_total": Spec("counter", "Logical tokens that those did not prefill again."),
    "traces_total": Spec(
        "counter", "Trace files by what became of them.", ("outcome", ("written", "lost"))
    ),
    "saved_kv_tokens": Spec("gauge", "Tokens now missing from the rows of decoding requests."),
    "evictions_per_step": Spec(
        "histogram",
        "Rows edited before one decode step; steps without evictions are not observed.",
        buckets=(1, 2, 4, 8, 16, 32, 64, 128),
    ),
    "block_tokens": Spec("histogram", "Tokens of generated blocks.", buckets=TOKENS),
    "summary_tokens": Spec("histogram", "Tokens of generated mementos.", buckets=TOKENS),
    "compression_ratio": Spec(
        "histogram",
        "Tokens of a generated block per token of its memento.",
        buckets=(1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50),
    ),
    "peak_kv_ratio": Spec(
        "histogram",
        "Peak KV tokens of a finished request as a share of what they would have been.",
        buckets=SHARES,
    ),
}


class Metrics:
    """The metrics of one process; each child exists from the start, so that rates begin at 0.

    Args:
        labels: SGLang's labels of this scheduler.
        classes: replacements of prometheus_client's `Counter`, `Gauge` and `Histogram`, by kind.
    """

    def __init__(self, labels: Mapping[str, Any], classes: Mapping[str, Any]) -> None:
        # Not before SGLang has set PROMETHEUS_MULTIPROC_DIR.
        import prometheus_client

        stock = {
            "counter": prometheus_client.Counter,
            "gauge": prometheus_client.Gauge,
            "histogram": prometheus_client.Histogram,
        }
        self._children: dict[tuple[str, str], Any] = {}
        for name, spec in METRICS.items():
            more: dict[str, Any] = {}
            if spec.kind == "gauge":
                more["multiprocess_mode"] = "mostrecent"
            elif spec.kind == "histogram":
                more["buckets"] = spec.buckets
            key, values = spec.label or ("", ("",))
            metric = (classes.get(spec.kind) or stock[spec.kind])(
                name=f"{PREFIX}{name}",
                documentation=spec.help,
                labelnames=[*labels, *([key] if key else [])],
                **more,
            )
            for value in values:
                extra = {key: value} if key else {}
                self._children[name, value] = metric.labels(**labels, **extra)

    def add(self, name: str, amount: float = 1, value: str = "") -> None:
        """Raise a counter; `value` is that of its additional label."""
        if amount:
            self._children[name, value].inc(amount)

    def set(self, name: str, value: float) -> None:
        self._children[name, ""].set(value)

    def observe(self, name: str, value: float) -> None:
        self._children[name, ""].observe(value)
