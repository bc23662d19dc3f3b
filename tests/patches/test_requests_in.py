"""Nothing that JSON can carry reaches the scheduler unchecked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang")

import msgspec
from calls import PROMPT, VOCABULARY, Body, bodies, body_of, memento
from hypothesis import HealthCheck, example, given, settings
from memento_patches.requests_in import DERIVED, check_call, check_tokenized
from pydantic import TypeAdapter
from sglang.srt.managers import tokenizer_manager
from sglang.srt.managers.io_struct import (
    GenerateReqInput,
    TokenizedGenerateReqInput,
    msgpack_decode,
    msgpack_encode,
)
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.sampling.sampling_params import SamplingParams

from memento_sgl.engine.automaton import EmissionAutomaton
from memento_sgl.errors import RequestError
from memento_sgl.request.overrides import options_of
from memento_sgl.request.settings import Settings
from memento_sgl.request.state import RequestState
from memento_sgl.request.validation import REQUEST_RANGES, SAMPLING_RANGES, UNSUPPORTED_FIELDS
from memento_sgl.rule.config import LARGEST, MementoConfig, RequestOptions
from memento_sgl.rule.emission import Structure
from memento_sgl.rule.markers import MarkerIds

WIDTH = 4
MARKERS = MarkerIds(3, 4, 5, 6, 1, 2, 9, 7, 8)
SETTINGS = Settings(
    MementoConfig(enable=True, mask_delimiters=False), MARKERS, Structure((0,), (11,))
)
BODIES = TypeAdapter(GenerateReqInput)
"""What FastAPI reads the body of /generate with."""


class Manager:
    """As much of SGLang's tokenizer manager as stands between a call and the scheduler."""

    def __init__(self) -> None:
        self.server_args = SimpleNamespace(
            _memento=SETTINGS,
            disaggregation_transfer_backend="mooncake",
            enable_custom_logit_processor=False,
            return_hidden_states_mode=None,
            enable_return_hidden_states=False,
        )
        self.model_config = SimpleNamespace(vocab_size=VOCABULARY, hidden_size=WIDTH)
        self.preferred_sampling_params = None
        self.sampling_params_class = SamplingParams
        self.tokenized_generate_req_type = TokenizedGenerateReqInput
        self.tokenizer = None
        self.num_reserved_tokens = 0
        self.context_len = 1024
        self.allow_auto_truncate = False
        self.validate_total_tokens = True
        self.is_generation = True
        self.rid_to_state = States()


class States(dict[str, Any]):
    def __missing__(self, rid: str) -> Any:
        return SimpleNamespace(
            time_stats=SimpleNamespace(set_tokenize_finish_time=lambda: None), lora_released=True
        )


def admit(body: Body) -> list[TokenizedGenerateReqInput]:
    """The way of a body through validation, up to what is sent to the scheduler.

    Raises:
        ValueError: the server answers 400 (what pydantic refuses, too).
    """
    manager: Any = Manager()
    call = BODIES.validate_python(body)
    check_call(lambda *_: iter(()), manager, call)
    call.normalize_batch_and_arguments()
    parts = [call] if call.is_single else [call[i] for i in range(call.batch_size)]
    sent = []
    for part in parts:
        ids = part.input_ids
        TokenizerManager._validate_token_ids_logprob(manager, part)
        ready = TokenizerManager._create_tokenized_object(
            manager, part, part.text, ids, part.input_embeds
        )
        check_tokenized(ready, manager, part)
        sent.append(ready)
    return sent


def take(sent: TokenizedGenerateReqInput) -> None:
    """What the scheduler does with a request before and around its first step."""
    sent.time_stats = None
    request = msgpack_decode(msgpack_encode(sent))
    params: SamplingParams = request.sampling_params
    prompt = request.input_ids
    if prompt is None:
        prompt = [1] * torch.tensor(request.input_embeds, dtype=torch.float32).shape[0]
    rows = torch.zeros(VOCABULARY, WIDTH)[torch.tensor(list(prompt), dtype=torch.int64)]
    assert rows.shape == (len(prompt), WIDTH)
    torch.tensor([params.top_k], dtype=torch.int32)
    logits = torch.zeros(1, VOCABULARY)
    logits[0, :50] = float("-inf")
    for token, bias in (params.logit_bias or {}).items():
        logits[0, int(token)] += bias
    logits.div_(torch.tensor([params.temperature], dtype=torch.float))
    logits.div_(torch.tensor([params.repetition_penalty], dtype=torch.float))
    assert torch.softmax(logits, -1).isfinite().all()
    stops = torch.zeros(VOCABULARY).scatter_(
        0, torch.tensor(sorted(params.stop_token_ids or ()), dtype=torch.int64), 1.0
    )
    stops.topk(request.top_logprobs_num)
    stops[torch.tensor(request.token_ids_logprob or [], dtype=torch.int64)]
    torch.tensor([params.max_new_tokens or 0, params.min_new_tokens], dtype=torch.int32)
    state = RequestState(prompt, SETTINGS.config, MARKERS, options_of(params.custom_params))
    automaton = EmissionAutomaton(2, VOCABULARY, MARKERS, SETTINGS.structure, "cpu")
    automaton.load([1], [state])
    automaton.constrain(torch.tensor([1]), torch.zeros(1, VOCABULARY))
    automaton.advance(torch.tensor([1]), torch.tensor([3]))


def test_a_plain_call_is_admitted() -> None:
    for body in (
        body_of(),
        body_of({"temperature": 0, "top_k": -1, "max_new_tokens": None, "n": 3}),
        body_of(memento(max_block_tokens=LARGEST, constrain="strict", max_blocks=LARGEST)),
        body_of({"logit_bias": {"3": -1e9}, "stop_token_ids": [5]}, return_logprob=True),
        body_of(input_ids=[PROMPT, PROMPT[:3]], sampling_params=[{}, {"n": 1}]),
        {"input_ids": None, "input_embeds": [[0.5] * WIDTH] * 3, "sampling_params": {}},
        {"input_ids": [PROMPT], "sampling_params": None},
    ):
        for sent in admit(body):
            take(sent)


@pytest.fixture(autouse=True, scope="module")
def unpublished() -> Iterator[None]:
    """What SGLang asks of the settings that a running server has published."""
    with pytest.MonkeyPatch.context() as patch:
        disaggregation = SimpleNamespace(disaggregation_transfer_backend="mooncake")
        patch.setattr(tokenizer_manager, "get_disagg", lambda: disaggregation)
        features = SimpleNamespace(
            enable_watermark=False,
            watermark_key=None,
            watermark_context_window=1,
            watermark_default_enabled=False,
            watermark_enforce_all=False,
        )
        patch.setattr(tokenizer_manager, "get_exec", lambda: SimpleNamespace(features=features))
        yield


@pytest.mark.parametrize(
    "option",
    [name for name, field in RequestOptions.model_fields.items() if "int" in str(field.annotation)],
)
def test_every_integer_option_of_a_request_is_bounded(option: str) -> None:
    for value in (LARGEST + 1, 1 << 63, 1 << 64, 10**30, -2, -(1 << 63)):
        with pytest.raises(ValueError, match=option) as caught:
            admit(body_of(memento(**{option: value}, constrain="strict")))
        if abs(value) < 1 << 64:
            assert str(value) in str(caught.value)
            assert str(LARGEST) in str(caught.value) or value < 0


def test_every_number_of_sglangs_has_a_range() -> None:
    """A number that a new SGLang takes needs a range of its own."""
    kinds = {
        f.name: str(f.type) for f in msgspec.structs.fields(SamplingParams) if f.name not in DERIVED
    }
    numbers = {name for name, kind in kinds.items() if "int" in kind or "float" in kind}
    assert numbers - {"stop_token_ids", "logit_bias", "custom_params"} == set(SAMPLING_RANGES) | {
        "beam_width"
    }
    sent = {
        field.name: str(field.type) for field in msgspec.structs.fields(TokenizedGenerateReqInput)
    }
    numbers = {name for name, kind in sent.items() if "int" in kind or "float" in kind}
    prompt = {"input_ids", "input_embeds"}
    apart = {"top_logprobs_num", "token_ids_logprob"} | prompt
    covered = set(REQUEST_RANGES) | set(UNSUPPORTED_FIELDS) | apart
    assert {n for n in numbers if "PickleWrapper" not in sent[n]} <= covered


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (body_of(input_ids=[1, VOCABULARY]), f"token id {VOCABULARY} at index 1"),
        (body_of(input_ids=[1, -1]), "token id -1 at index 1"),
        (body_of(input_ids=[1, True]), "one is True"),
        (body_of(input_ids=[[1], []]), r"input_ids\[1\] must be a list that is not empty"),
        (body_of(input_ids=[[1], [VOCABULARY]]), rf"input_ids\[1\]: token id {VOCABULARY}"),
        (body_of(input_ids=[]), "not empty"),
        (body_of(input_ids=[[[1]]]), "input_ids"),
        (body_of(input_ids=None), "exactly one of"),
        (body_of(text="x"), "exactly one of"),
        (body_of(input_ids=None, text=["x", "\ud800"]), "not valid Unicode"),
        (body_of({"max_new_tokens": 5.5}), "max_new_tokens"),
        (body_of({"max_new_tokens": 1 << 31}), "max_new_tokens=2147483648"),
        (body_of({"max_new_tokens": "5"}), "max_new_tokens"),
        (body_of({"n": LARGEST}), "n=2147483647 must be from 1 to 4096"),
        (body_of({"n": 4096}, input_ids=[PROMPT] * 17), "more than 65536 requests"),
        (body_of({"n": None}), "n must be a number"),
        (body_of({"temperature": 10**400}), "temperature"),
        (body_of({"temperature": math.nan}), "temperature=nan"),
        (body_of({"repetition_penalty": 1e-40}), "repetition_penalty"),
        (body_of({"logit_bias": {"3": math.inf}}), "logit_bias"),
        (body_of({"logit_bias": {str(VOCABULARY): 1}}), "logit_bias"),
        (body_of({"stop_regex": ["a+", "("]}), "stop_regex: '\\(' is not a regular expression"),
        (body_of({"stop_token_ids": [-1]}), "stop_token_ids: token id -1"),
        (body_of({"stream_interval": 0}), "stream_interval=0"),
        (body_of({"is_normalized": True}), "is_normalized"),
        (body_of({"unheard_of": 1}), "unheard_of"),
        (body_of([{}]), "sampling_params is a list of 1 for one prompt"),
        (body_of([{}], input_ids=[PROMPT, PROMPT]), "sampling_params is a list of 1 for 2"),
        (body_of([memento(max_blocks=1 << 63, constrain="strict")], input_ids=[PROMPT]), "blocks"),
        (body_of({"custom_params": [1]}), "custom_params"),
        (body_of({"custom_params": {"a": [[1]]}}), "custom_params"),
        (body_of(memento(constrain=["strict"])), "custom_params"),
        (body_of(memento(constrain="loose")), "constrain"),
        (body_of(memento(assistant_start=5)), "behind the prompt"),
        (body_of(top_logprobs_num=VOCABULARY + 1), f"top_logprobs_num={VOCABULARY + 1}"),
        (body_of(logprob_start_len=-2), "logprob_start_len=-2"),
        (body_of(return_logprob=True, token_ids_logprob=[VOCABULARY]), "token_ids_logprob"),
        (body_of(lora_id="x"), "lora_id cannot be set"),
        (body_of(http_worker_ipc="x"), "http_worker_ipc cannot be set"),
        (body_of(multi_item_delimiter_indices=[[1]]), "multi_item_delimiter_indices cannot"),
        (body_of({"beam_width": 2}), "beam_width cannot be set"),
        (body_of(watermark={"enabled": True}), "watermark cannot be set"),
        (body_of(rid=""), "rid must not be empty"),
        (body_of(session_params={"id": "s", "replace": True}), "needs the rid"),
        (body_of(session_params={"id": "s", "offset": -1}), "offset=-1"),
        (
            {"input_embeds": [[0.5] * WIDTH], "session_params": {"id": "s"}},
            "input_embeds cannot be joined",
        ),
        ({"input_embeds": [[0.5] * (WIDTH + 1)]}, "lists of 4 finite numbers"),
        ({"input_embeds": [[0.5] * WIDTH, [0.5]]}, "lists of 4 finite numbers"),
        ({"input_embeds": [[1e300] * WIDTH]}, "lists of 4 finite numbers"),
        ({"input_embeds": []}, "lists of 4 finite numbers"),
        (
            {
                "input_embeds": [[0.5] * WIDTH],
                "sampling_params": memento(max_block_tokens=1 << 63),
            },
            "max_block_tokens",
        ),
    ],
)
def test_what_would_end_the_server_is_refused(body: Body, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        admit(body)


@settings(deadline=None, max_examples=400, suppress_health_check=list(HealthCheck))
@given(body=bodies())
@example(body=body_of(memento(max_block_tokens=1 << 63)))
@example(body=body_of({"stop_regex": "?"}))
def test_no_value_reaches_the_scheduler_unchecked(body: Body) -> None:
    """Whatever validation lets in, the scheduler can take."""
    try:
        sent = admit(body)
    except ValueError:  # pydantic's own, too
        return
    for request in sent:
        take(request)


def test_messages_stay_short() -> None:
    for value in (10**5000, "x" * 5000):
        with pytest.raises(RequestError) as caught:
            admit(body_of(memento(max_block_tokens=value)))
        assert len(str(caught.value)) < 300
        json.dumps(str(caught.value))
