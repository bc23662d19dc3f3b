"""The stream parser: any chunking of a text gives the same events, and the rule's own blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memento_frontend import events as e
from memento_frontend.collect import collect
from memento_frontend.results import Block
from memento_frontend.stream import GenerateParser, OpenAIParser, read
from memento_frontend.text_parser import TextParser

from memento_sgl.demo.task import held_out
from memento_sgl.errors import ConfigError, ServerError
from memento_sgl.rule.accounting import account
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.machine import BlockMachine
from memento_sgl.rule.markers import MarkerIds

BS, BE, SS, SE = "<|block_start|>", "<|block_end|>", "<|summary_start|>", "<|summary_end|>"
# Markers and chat markup in the order of `MarkerIds`; every other piece is one token too.
PIECES = [BS, BE, SS, SE, "<|im_start|>", "<|im_end|>", "assistant"]
PIECES += ["<think>", "</think>", "x", "é.", "\n", "<", "<|block", "<|summary_"]
MARKERS = MarkerIds(*range(7))
# Block after block happens too seldom by chance.
WHOLE = [[BS, "x", BE, SS, "é.", SE], [BS, BE, SS, SE], ["<|im_start|>", "assistant", "\n"]]

pieces = st.lists(
    st.one_of(st.sampled_from([[piece] for piece in PIECES]), st.sampled_from(WHOLE)), max_size=30
).map(lambda parts: [piece for part in parts for piece in part])
configs = st.sampled_from(
    [
        MementoConfig(enable=True, mask_delimiters=False),
        MementoConfig(enable=True, mask_delimiters=True, keep_last_n_blocks=1),
        MementoConfig(enable=True, mask_delimiters=False, keep_last_n_blocks=-1),
        MementoConfig(enable=True, mask_delimiters=True, keep_last_block_for_answer=True),
        MementoConfig(enable=True, mask_delimiters=False, restart_mode=True),
        MementoConfig(enable=True, mask_delimiters=False, require_assistant_section=False),
        MementoConfig(mask_delimiters=False),
    ]
)


def ids_of(parts: Sequence[str]) -> list[int]:
    return [PIECES.index(part) for part in parts]


def machine_of(parts: Sequence[str], config: MementoConfig) -> BlockMachine:
    machine = BlockMachine(MARKERS, config, section_start=0)
    machine.feed_all(ids_of(parts))
    return machine


def split(text: str, cuts: Sequence[int]) -> list[str]:
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(places)]


def merged(found: Sequence[e.Event]) -> list[e.Event]:
    """Neighbouring texts of one kind as one."""
    out: list[e.Event] = []
    for event in found:
        texts = (e.ThoughtText, e.AnswerText, e.BlockText, e.MementoText)
        if out and isinstance(event, texts) and out[-1] == replace(event, text=out[-1].text):
            out[-1] = replace(event, text=out[-1].text + event.text)
        else:
            out.append(event)
    return out


def parsed(
    chunks: Sequence[str], config: MementoConfig | None = None, **options: Any
) -> list[e.Event]:
    parser = TextParser(config, **options)
    found = [event for chunk in chunks for event in parser.feed(chunk)]
    return found + parser.end()


@settings(deadline=None)
@given(pieces, st.lists(st.integers(0, 300)), configs, st.booleans())
def test_any_chunking_gives_the_same_events(
    parts: list[str], cuts: list[int], config: MementoConfig, in_thought: bool
) -> None:
    text = "".join(parts)
    whole = parsed([text], config, in_thought=in_thought)
    assert "".join(event.text for event in whole) == text
    for chunks in (split(text, cuts), list(text)):
        assert merged(parsed(chunks, config, in_thought=in_thought)) == merged(whole)


@settings(deadline=None)
@given(pieces, configs)
def test_the_rule_agrees(parts: list[str], config: MementoConfig) -> None:
    machine = machine_of(parts, config)
    found = list(read(one_token_each(parts), OpenAIParser(config)))
    blocks = collect(found).blocks
    assert [block.tokens for block in blocks] == [b.block_tokens for b in machine.blocks]
    assert [block.memento_tokens for block in blocks] == [b.summary_tokens for b in machine.blocks]
    for block, expected in zip(blocks, machine.blocks, strict=True):
        # </think> inside a block is for the parser the beginning of the answer.
        if "</think>" not in parts[: expected.summary_end]:
            assert block.text == "".join(parts[expected.start + 1 : expected.end])
            inner = parts[expected.summary_start + 1 : expected.summary_end]
            assert block.memento == "".join(inner)
    starts = [block.start for block in machine.blocks]
    gone = [event for event in found if isinstance(event, e.BlockEvicted)]
    assert [event.tokens for event in gone] == [due.tokens for due in machine.evictions]
    for event, due in zip(gone, machine.evictions, strict=True):
        assert starts[event.number] in (due.start, due.start - 1)


def one_token_each(parts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """An OpenAI stream as SGLang sends it with continuous usage."""
    yield {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
    for count, part in enumerate(parts, start=1):
        usage = {"prompt_tokens": 10, "completion_tokens": count}
        yield {"choices": [{"index": 0, "delta": {"content": part}}], "usage": usage}


def native(
    parts: Sequence[str], cuts: Sequence[int], config: MementoConfig, *, incremental: bool
) -> Iterator[dict[str, Any]]:
    """A `/generate` stream, `cuts` being places among the tokens; the prompt has 10 tokens."""
    places = sorted({min(cut, len(parts)) for cut in cuts if cut > 0} | {len(parts)})
    before = 0
    for place in places:
        start = before if incremental else 0
        meta: dict[str, Any] = {"prompt_tokens": 10, "completion_tokens": place}
        if place == len(parts):
            meta["finish_reason"] = {"type": "length", "length": place}
            machine = BlockMachine(MARKERS, config, section_start=10)
            machine.feed_all(ids_of(parts), start=10)
            meta["memento"] = account(machine, 10, 10 + len(parts)).as_dict()
        yield {
            "text": "".join(parts[start:place]),
            "output_ids": ids_of(parts[start:place]),
            "meta_info": meta,
        }
        before = place


@settings(deadline=None)
@given(pieces, st.lists(st.integers(0, 40)), configs, st.booleans())
def test_native_streams(
    parts: list[str], cuts: list[int], config: MementoConfig, incremental: bool
) -> None:
    chunks = list(native(parts, cuts, config, incremental=incremental))
    parser = GenerateParser(config, markers=MARKERS)
    found = list(read(chunks, parser))
    machine = machine_of(parts, config)
    closed = [event.tokens for event in found if isinstance(event, e.MementoClosed)]
    assert closed == [block.summary_tokens for block in machine.blocks]
    assert "".join(event.text for event in found) == "".join(parts)
    reasoning = collect(found)
    assert reasoning.output_ids == tuple(ids_of(parts))
    assert (reasoning.prompt_tokens, reasoning.output_tokens) == (10, len(parts))
    assert reasoning.finish_reason == "length"
    assert [block.tokens for block in reasoning.blocks] == [b.block_tokens for b in machine.blocks]

    # Without token ids of the markers and without the server's options: all from the record.
    late = list(read(chunks, GenerateParser(MementoConfig(
        require_assistant_section=config.require_assistant_section))))  # fmt: skip
    seen = machine.evictions[: len(chunks[-1]["meta_info"]["memento"]["evicted_spans"])]
    told = [event for event in late if isinstance(event, e.BlockEvicted)]
    assert [event.tokens for event in told] == [due.tokens for due in seen]
    assert collect(late).blocks == reasoning.blocks
    announced = [event for event in found if isinstance(event, e.BlockEvicted)]
    assert announced[: len(told)] == told


PROBLEM = held_out(1, sizes=[3])[0]
THOUGHT, _, ANSWER = PROBLEM.output.partition("</think>")
EXPECTED = tuple(
    Block(part.partition(BE)[0], part.partition(SS)[2].partition(SE)[0])
    for part in THOUGHT.split(BS)[1:]
)


def deltas(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"choices": [{"index": 0, "delta": {name: text}}]} for name, text in pairs]


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_the_server_separates_the_answer_and_keeps_markers(size: int, name: str) -> None:
    thought = THOUGHT.removeprefix("<think>")
    chunks = [(name, thought[i : i + size]) for i in range(0, len(thought), size)]
    chunks += [("content", ANSWER[i : i + size]) for i in range(0, len(ANSWER), size)]
    separate = collect(read(deltas(*chunks), OpenAIParser()))
    raw = collect(read(deltas(("content", PROBLEM.output)), OpenAIParser()))
    assert separate == raw
    assert raw.blocks == EXPECTED
    assert raw.answer == PROBLEM.answer
    assert raw.unfinished == ""


def test_reasoning_without_markers_is_thought_text() -> None:
    chunks = deltas(("reasoning_content", "so 3+4"), ("reasoning_content", "=7 </think>"))
    found = list(read([*chunks, *deltas(("content", "Seven"))], OpenAIParser()))
    assert [type(event) for event in merged(found)] == [
        e.ThoughtOpened, e.ThoughtText, e.ThoughtClosed, e.AnswerText, e.Done
    ]  # fmt: skip
    assert collect(found).unfinished == "so 3+4=7 </think>"
    assert collect(found).answer == "Seven"


@pytest.mark.parametrize(
    ("text", "blocks", "unfinished", "answer"),
    [
        ("Just 7, no thought", 0, "", "Just 7, no thought"),
        ("In <think> I trust", 0, "", "In <think> I trust"),
        (" <think>hm</think>\n7 </think>", 0, "hm", "7 </think>"),
        ("prompt had the tag</think>7", 0, "prompt had the tag", "7"),
        (f"{BS}a{BE}{SS}b{SE}then", 1, "then", ""),
        (f"<think>{BS}a{BS}b{BE}{SS}c{SE}</think>7", 1, "a", "7"),
        (f"<think>{BS}a{BE}x{BS}b{BE}{SS}c{BS}d", 0, "x\na\nb\nc\nd", ""),
        (f"<think>{BS}a{BE}{SS}b{SE}{SS}again{SE}</think>7", 1, "again", "7"),
        (f"<think>{BS}cut </think>7", 0, "cut", "7"),
        (f"<think>{BS}cut </think>7{BE}{SS}late{SE}8", 1, "", "78"),
        (f"<think>{BE}{SE}</think>{BE}7", 0, "", "7"),
    ],
)
def test_what_becomes_of_a_text(text: str, blocks: int, unfinished: str, answer: str) -> None:
    for chunks in ([text], list(text)):
        reasoning = collect(read(deltas(*(("content", c) for c in chunks)), OpenAIParser()))
        found = (len(reasoning.blocks), reasoning.unfinished, reasoning.answer)
        assert found == (blocks, unfinished, answer)


@settings(deadline=None)
@given(st.integers(0, len(PROBLEM.output)))
def test_truncated_anywhere(length: int) -> None:
    text = PROBLEM.output[:length]
    parser = OpenAIParser()
    found = [event for chunk in deltas(("content", text)) for event in parser.feed(chunk)]
    found += parser.finish()
    assert parser.finish() == []
    assert "".join(event.text for event in found) == text
    reasoning = collect(found)
    assert isinstance(found[-1], e.Done)
    assert reasoning.finish_reason is None
    assert reasoning.blocks == EXPECTED[: text.count(SE)]


def test_several_choices_one_parser_each() -> None:
    chunks = [
        {"choices": [{"index": index, "delta": {"content": text}, "finish_reason": reason}],
         "usage": {"prompt_tokens": 5, "completion_tokens": count}}
        for index, text, count, reason in
        [(1, f"{BS}a", 2, None), (0, f"{BS}b{BE}", 3, None), (1, f"{BE}{SS}c{SE}", 6, "stop"),
         (0, f"{SS}d{SE}", 6, "length")]
    ]  # fmt: skip
    chunks.append({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 12}})
    first, second = (collect(read(chunks, OpenAIParser(index=index))) for index in (0, 1))
    assert [(block.text, block.memento) for block in first.blocks] == [("b", "d")]
    assert [(block.text, block.memento) for block in second.blocks] == [("a", "c")]
    assert (first.finish_reason, second.finish_reason) == ("length", "stop")
    # What chunks told may lack a last token without text, and the end tells only the sum.
    assert first.output_tokens is second.output_tokens is None


def test_tokens_are_unknown_rather_than_guessed() -> None:
    parts = [BS, "x", "x", BE, SS, "x", SE]
    together = [parts[:1], parts[1:4], *([part] for part in parts[4:])]
    chunks, count = [], 0
    for some in together:
        count += len(some)
        (chunk,) = deltas(("content", "".join(some)))
        chunks.append(chunk | {"usage": {"prompt_tokens": 1, "completion_tokens": count}})
    (block,) = collect(read(chunks, OpenAIParser())).blocks
    assert (block.tokens, block.memento_tokens) == (None, 1)
    spelled = GenerateParser(markers=MARKERS)  # the markers are no tokens
    ids = [9] * 7
    meta = {"prompt_tokens": 1, "completion_tokens": 7}
    found = read([{"text": "".join(parts), "output_ids": ids, "meta_info": meta}], spelled)
    (block,) = collect(found).blocks
    assert (block.tokens, block.memento_tokens) == (None, None)


def test_finished_blocks_of_the_prompt_are_not_the_streams() -> None:
    record = {"block_tokens": [7, 3], "summary_tokens": [2, 1]}
    record |= {"evicted_spans": [[5, 12], [20, 23]]}  # type: ignore[dict-item]
    (chunk,) = deltas(("content", f"{BS}xxx{BE}{SS}y{SE}"))
    chunk["choices"][0]["finish_reason"] = "stop"
    found = list(read([chunk | {"metadata": {"memento": [record]}}], OpenAIParser()))
    assert [event for event in found if isinstance(event, e.BlockEvicted)] == [
        e.BlockEvicted("", 0, 3)
    ]
    assert collect(found).blocks == (Block("xxx", "y", 3, 1),)


def test_other_marker_strings() -> None:
    config = MementoConfig(
        block_start_token="[b]", block_end_token="[/b]", summary_start_token="[b]]",
        summary_end_token="[/m]", enable=True, mask_delimiters=False,
    )  # fmt: skip
    for size in (1, 2, 50):
        text = "<think>[b]one[/b][b]]two[/m] [b"
        chunks = [("content", text[i : i + size]) for i in range(0, len(text), size)]
        reasoning = collect(read(deltas(*chunks), OpenAIParser(config)))
        assert [(block.text, block.memento) for block in reasoning.blocks] == [("one", "two")]
        assert reasoning.unfinished == "[b"


def test_turns_that_one_token_opens() -> None:
    config = MementoConfig(
        im_start_token="<A>", assistant_token="", im_end_token="</s>",
        section_start_tokens="<R>", section_end_tokens="<U>", enable=True, mask_delimiters=False,
    )  # fmt: skip
    block = f"{BS}one{BE}{SS}1{SE}"
    for before, blocks in (("<U>", 0), ("<U>no<A>", 1), ("</s>no<R>", 1), (f"{BS}x{BE}{SS}<A>", 1)):
        events = TextParser(config).feed(before + block)
        kinds = [type(event).__name__ for event in events]
        assert kinds.count("BlockEvicted") == kinds.count("MementoClosed") == blocks, before
        assert kinds.count("BlockAbandoned") == before.startswith(BS)
        assert "".join(event.text for event in events) == before + block
    taken = MementoConfig(section_end_tokens="<|im_end|>")
    with pytest.raises(ConfigError, match="same string"):
        TextParser(taken)


def test_errors() -> None:
    with pytest.raises(ServerError, match="out of memory"):
        OpenAIParser().feed({"error": {"message": "out of memory"}})
    with pytest.raises(ServerError, match="skip-tokenizer-init"):
        GenerateParser().feed({"output_ids": [1], "meta_info": {}})
    with pytest.raises(ConfigError, match="not its token id 151669"):
        TextParser(MementoConfig(block_start_token="151669"))
    with pytest.raises(ConfigError, match="same string"):
        TextParser(MementoConfig(block_end_token=BS))
