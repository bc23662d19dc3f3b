"""The page's seams, without a server."""

from __future__ import annotations

import argparse
import inspect
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from memento_patches import page, server_args

from memento_sgl.engine import runtime
from memento_sgl.ui.about import load


@pytest.mark.parametrize(("flag", "applied"), [(None, ["page"]), ("true", ["page"]), ("false", [])])
def test_a_flag_leaves_the_page_out(
    monkeypatch: pytest.MonkeyPatch, flag: str | None, applied: list[str]
) -> None:
    roles: list[str] = []
    monkeypatch.setattr(server_args, "install", roles.append)
    monkeypatch.setattr(server_args, "enable", lambda *_: None)
    args = argparse.Namespace(enable_memento=True, memento_page=flag, reasoning_parser=None)
    server_args.from_cli_args(lambda *_: "arguments", object, args)
    assert roles == applied


def test_a_snapshot_carries_more_than_stock_readers_see(monkeypatch: pytest.MonkeyPatch) -> None:
    import msgspec
    from sglang.srt.managers.load_snapshot import (
        LoadSnapshot,
        snapshot_decoder,
        snapshot_encoder,
    )

    monkeypatch.setattr(runtime, "_current", SimpleNamespace(evictions=7))
    requests = [SimpleNamespace(memento=SimpleNamespace(evicted=n)) for n in (30, 0, 12)]
    inquirer = SimpleNamespace(get_running_batch=lambda: SimpleNamespace(reqs=requests))
    stock = LoadSnapshot(dp_rank=1, num_running_reqs=3, num_used_tokens=50, max_total_num_tokens=90)
    own = page.add_to_snapshot(stock, inquirer)
    assert isinstance(own, LoadSnapshot)
    assert own.to_dict({"core"}) == stock.to_dict({"core"})
    payload = snapshot_encoder.encode(own)
    assert snapshot_decoder.decode(payload) == stock
    read = msgspec.msgpack.Decoder(page._snapshot_class()).decode(payload)
    told = load([{name: getattr(read, name) for name in read.__struct_fields__}] * 2)
    assert told == {
        "running": 6,
        "waiting": 0,
        "held": 100,
        "capacity": 180,
        "evictions": 14,
        "missing": 84,
    }


def test_a_rank_without_figures_makes_them_unknown() -> None:
    rank = {field: 1 for field in ("num_running_reqs", "num_waiting_reqs")}
    rank |= {"num_used_tokens": 1, "max_total_num_tokens": 1}
    assert load([rank | {"memento": (1, 2)}, rank])["evictions"] is None


def test_the_key_is_needed_for_all_but_the_page() -> None:
    from sglang.srt.utils.auth import AuthLevel, decide_request_auth

    stock = inspect.unwrap(decide_request_auth)
    asked: dict[str, Any] = {
        "authorization_header": None,
        "api_key": "k",
        "admin_api_key": None,
        "auth_level": AuthLevel.NORMAL,
    }

    def allowed(method: str, path: str) -> bool:
        decision = page.let_page_through(stock, method=method, path=path, **asked)
        return bool(decision.allowed)

    assert allowed("GET", "/memento")
    for method, path in [
        ("POST", "/memento"),
        ("GET", "/memento/"),
        ("GET", "/memento/about"),
        ("GET", "/memento/../generate"),
        ("GET", "/v1/models"),
    ]:
        assert not allowed(method, path), path
