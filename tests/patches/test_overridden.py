"""Values on SGLang's objects that hold during a call."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from memento_patches.overridden import overridden


def test_values_hold_inside_only() -> None:
    obj = SimpleNamespace(a=1, b=2)
    with overridden(obj, a=3):
        assert (obj.a, obj.b) == (3, 2)
        obj.a, obj.b = 5, 6
    assert (obj.a, obj.b) == (1, 6)


def test_an_exception_leaves_nothing_behind() -> None:
    obj = SimpleNamespace(a=1, b=2)
    with pytest.raises(ZeroDivisionError), overridden(obj, a=3, b=4):
        1 / 0  # noqa: B018
    assert (obj.a, obj.b) == (1, 2)


def test_an_attribute_that_is_gone_from_sglang_is_an_error() -> None:
    obj = SimpleNamespace(a=1)
    with pytest.raises(AttributeError, match="b"), overridden(obj, a=3, b=4):
        pytest.fail("it went on")
    assert obj.a == 1
