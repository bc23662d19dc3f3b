"""Calls of /generate with fields of any value that JSON can carry, for the tests of validation."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import strategies as st
from models import VOCABULARY as WORDS_OF_MODELS
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

from memento_sgl.rule.config import RequestOptions

VOCABULARY = len(WORDS_OF_MODELS)
PROMPT = [1, 9, 20, 21]

Body = dict[str, Any]


def body_of(sampling: Body | None = None, **fields: Any) -> Body:
    return {"input_ids": PROMPT, "sampling_params": sampling or {}} | fields


def memento(**options: Any) -> Body:
    return {"custom_params": {"memento": options}}


EDGES = [
    0, 1, -1, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**31) - 1, -(2**63) - 1,
    10**40, VOCABULARY - 1, VOCABULARY,
]  # fmt: skip
INTEGERS = st.sampled_from(EDGES) | st.integers()
NUMBERS = INTEGERS | st.floats() | st.sampled_from([0.5, -0.0, 1e-300, 1e-6, 1e38, 1e308])
WORDS = st.sampled_from(["strict", "caps", "off", "\ud800", "", "3"]) | st.text(max_size=6)
SCALARS = st.none() | st.booleans() | NUMBERS | WORDS
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)
TOKENS = st.lists(st.integers(-1, VOCABULARY) | SCALARS, max_size=4)


def values(kind: str) -> st.SearchStrategy[Any]:
    """Values of a field: most often of its own type, which is where ranges matter."""
    near = [JSON]
    for part, strategy in (
        ("bool", st.booleans()),
        ("int", INTEGERS),
        ("float", NUMBERS),
        ("str", WORDS),
        ("List[int]", TOKENS),
        ("Set[int]", TOKENS),
        ("float]", st.dictionaries(WORDS, NUMBERS, max_size=2)),
    ):
        near += [strategy, strategy] if part in kind else []
    return st.one_of(near)


def some(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Body]:
    """One or two of the fields."""
    one = st.sampled_from(sorted(fields)).flatmap(
        lambda name: st.builds(lambda value: {name: value}, fields[name])
    )
    return one | st.builds(lambda a, b: a | b, one, one)


OPTIONS = some({n: values(str(f.annotation)) for n, f in RequestOptions.model_fields.items()})
MODES = st.sampled_from([{}, {}, {"constrain": "strict"}, {"constrain": "caps"}])
CUSTOM = st.builds(
    lambda options, mode: {"custom_params": {"memento": options | mode}}, OPTIONS, MODES
)
SAMPLING = some({f.name: values(str(f.type)) for f in msgspec.structs.fields(SamplingParams)})
CALL = some(
    {
        name: values(str(field.type))
        for name, field in GenerateReqInput.__dataclass_fields__.items()
        if name != "sampling_params"
    }
)


@st.composite
def bodies(draw: st.DrawFn, **sampling: Any) -> Body:
    """A valid call with a few fields of any value.

    Args:
        sampling: sampling parameters of a call that has none of its own.
    """
    body: Body = {"input_ids": PROMPT, "sampling_params": sampling}
    match draw(st.sampled_from(["options", "options", "sampling", "sampling", "call", "prompt"])):
        case "options":
            body["sampling_params"] = sampling | draw(CUSTOM)
        case "sampling":
            body["sampling_params"] = sampling | draw(SAMPLING)
        case "call":
            body |= draw(CALL)
        case _:
            body["input_ids"] = draw(TOKENS | st.lists(TOKENS, max_size=3))
            body["sampling_params"] = draw(CUSTOM | st.lists(CUSTOM, max_size=3) | JSON)
    return body
