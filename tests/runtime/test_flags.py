"""Every flag of SGLang stands in one table, and the launch does what the table says."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

import msgspec
from sglang.srt.server_args import ServerArgs

from memento_sgl.errors import ConfigError
from memento_sgl.rule.config import MementoConfig
from memento_sgl.serve.arguments import enable
from memento_sgl.serve.flags import (
    IRRELEVANT,
    REFUSED,
    REFUSED_VALUES,
    TESTED,
    UNCHECKED,
    check_flags,
    flag,
    page,
)
from memento_sgl.serve.refuse import refuse_flags

ROOT = Path(__file__).parents[2]
FIELDS = {field.name: field for field in msgspec.structs.fields(ServerArgs)}
DEFAULTS: dict[str, Any] = {
    name: None if field.default is msgspec.NODEFAULT else field.default
    for name, field in FIELDS.items()
}


def another(name: str) -> Any:
    """A value that a flag does not have by default."""
    default = DEFAULTS[name]
    if isinstance(default, bool):
        return not default
    return default + 7 if isinstance(default, int) else "another"


def test_every_flag_of_sglang_stands_in_one_table() -> None:
    named = [*TESTED, *UNCHECKED, *REFUSED]
    named += [name for names in IRRELEVANT.values() for name in names]
    assert [name for name, times in Counter(named).items() if times > 1] == []
    assert sorted(set(FIELDS) - set(named)) == [], "new flags: decide about each"
    assert sorted(set(named) - set(FIELDS)) == [], "flags that SGLang does not have"
    assert len(UNCHECKED) <= 40
    assert set(REFUSED_VALUES) <= set(TESTED)


def test_tested_flags_are_tested() -> None:
    files = {path.stem: path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    for name, test in TESTED.items():
        mentions = (flag(name), f'"{name}"', f"{name}=")
        assert any(text in files[test] for text in mentions), f"{test}.py does not set {name}"


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_flag_ends_the_launch(name: str) -> None:
    stock = SimpleNamespace(**DEFAULTS)
    asked = SimpleNamespace(**DEFAULTS | {name: another(name)})
    assert check_flags(stock, stock, DEFAULTS) == []
    with pytest.raises(ConfigError, match=rf"does not support .* \({name}="):
        check_flags(asked, stock, DEFAULTS)
    if REFUSED[name].settled:  # chosen by SGLang itself
        with pytest.raises(ConfigError, match=rf"does not support .* \({name}="):
            check_flags(stock, asked, DEFAULTS)


def test_refused_values_and_unchecked_flags(caplog: pytest.LogCaptureFixture) -> None:
    stock = SimpleNamespace(**DEFAULTS)
    tlru = SimpleNamespace(**DEFAULTS | {"radix_eviction_policy": "tlru"})
    with pytest.raises(ConfigError, match="--radix-eviction-policy tlru"):
        check_flags(tlru, tlru, DEFAULTS)
    for name in UNCHECKED:
        asked = SimpleNamespace(**DEFAULTS | {name: another(name)})
        assert check_flags(asked, stock, DEFAULTS) == [name]
    given = ServerArgs(model_path="x", mem_fraction_static=0.5, enable_lora=True)
    with caplog.at_level(logging.WARNING):
        refuse_flags(given, stock)
    assert [record.getMessage() for record in caplog.records] == [
        "memento: not checked with block eviction, see docs/flags.md: "
        "--mem-fraction-static, --enable-lora"
    ]


@pytest.mark.parametrize("name", ["SGLANG_RUST_SERVER", "SGLANG_RADIX_FORCE_MISS"])
def test_environments_that_go_around_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match=f"does not support {name}"):
        enable(None, MementoConfig(enable=True))


def test_the_page_is_the_tables() -> None:
    assert (ROOT / "docs" / "flags.md").read_text() == page(), "python -m memento_sgl.serve.flags"
