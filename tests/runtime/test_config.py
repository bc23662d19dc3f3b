"""Options: the reference's JSON, flags, overrides, and one clear message for each mistake."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from memento_sgl.errors import ConfigError, MarkerError, RequestError
from memento_sgl.request.overrides import check_options
from memento_sgl.request.settings import Settings
from memento_sgl.rule.config import LARGEST, Limits, MementoConfig, RequestOptions
from memento_sgl.rule.markers import MarkerIds, resolve_markers

REFERENCE = (
    '{"enable": true, "keep_last_n_blocks": 0, "mask_delimiters": false, '
    '"compact_on_summary_end": true, "require_assistant_section": true, "debug": true}'
)


def test_the_references_launch_json_works_unchanged() -> None:
    config = MementoConfig.parse(REFERENCE)
    assert config.evicts
    assert config.debug
    assert config.mask_delimiters is False


def test_json_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "memento.json"
    path.write_text(REFERENCE)
    assert MementoConfig.parse(str(path)) == MementoConfig.parse(REFERENCE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"enable": tru', "not valid JSON"),
        ("[1]", "neither a JSON object nor a readable file"),
        ('{"keep_last_blocks": 1}', "unknown option 'keep_last_blocks'"),
        ('{"enable": "yes"}', "enable: "),
        ('{"keep_last_n_blocks": true}', "keep_last_n_blocks: "),
        ('{"keep_last_n_blocks": -2}', "greater than or equal to -1"),
        ('{"mask_delimiters": "maybe"}', "mask_delimiters: "),
        ('{"restart_mode": true, "keep_last_n_blocks": 1}', "restart_mode needs"),
        ('{"restart_mode": true, "keep_last_block_for_answer": true}', "exclude each other"),
        ('{"restart_mode": true, "compact_on_summary_end": false}', "compact_on_summary_end=true"),
        ("/no/such/file.json", "nor a readable file"),
    ],
)
def test_bad_configs(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match="memento config") as caught:
        MementoConfig.parse(text)
    assert message in str(caught.value)


INTEGERS = [name for name, field in MementoConfig.model_fields.items() if field.annotation is int]


@pytest.mark.parametrize("option", INTEGERS)
def test_every_integer_option_is_bounded(option: str) -> None:
    """An error before the model loads, with the option, the value and what it may be."""
    needs = {"constrain": "strict"} if option != "trace_files" else {"trace_dir": "x"}
    assert MementoConfig.parse(needs | {option: LARGEST})
    for value in (LARGEST + 1, 1 << 63):
        with pytest.raises(ConfigError, match=f"{option}: .* equal to {LARGEST}, not {value}"):
            MementoConfig.parse(needs | {option: value})
        with pytest.raises(ConfigError, match=f"{option}: .* equal to {LARGEST}, not {value}"):
            parsed("--enable-memento", f"--memento-{option.replace('_', '-')}", str(value))


def test_marker_ids_are_compared_with_the_vocabulary() -> None:
    ids = {f"{name}_token": str(number) for number, name in enumerate(MarkerIds._fields[:9], 90)}
    config = MementoConfig(enable=True, **ids)
    assert resolve_markers(config, None, 99).think_end == 98
    with pytest.raises(MarkerError, match=r"think_end_token='98' is token id 98, .* ends at 97"):
        resolve_markers(config, None, 98)
    with pytest.raises(MarkerError, match="block_end_token is a token id of 5000 digits"):
        resolve_markers(config.model_copy(update={"block_end_token": "9" * 5000}), None)


def test_the_model_family_settles_the_delimiters() -> None:
    auto = MementoConfig(enable=True)
    assert auto.for_family(["Qwen3ForCausalLM"]).mask_delimiters is False
    assert auto.for_family(["Olmo3ForCausalLM"]).mask_delimiters is False
    assert auto.for_family(["Phi3ForCausalLM"]).mask_delimiters is True
    with pytest.raises(ConfigError, match="--memento-mask-delimiters"):
        auto.for_family(["LlamaForCausalLM"])
    explicit = MementoConfig(enable=True, mask_delimiters=True)
    assert explicit.for_family(["LlamaForCausalLM"]).mask_delimiters is True


def test_request_overrides() -> None:
    config = MementoConfig(enable=True, mask_delimiters=False)
    merged = config.for_request(RequestOptions.parse({"keep_last_n_blocks": 2}))
    assert merged.keep_last_n_blocks == 2
    assert config.for_request(RequestOptions.parse(None)) is config
    restart = MementoConfig(enable=True, mask_delimiters=False, restart_mode=True)
    with pytest.raises(RequestError, match="restart_mode needs"):
        restart.for_request(RequestOptions.parse({"keep_last_n_blocks": 1}))
    settings = Settings(config, MarkerIds(1, 2, 3, 4))
    with pytest.raises(RequestError, match="log-probabilities"):
        check_options({}, [0] * 5, settings, input_logprobs=True)
    with pytest.raises(RequestError, match="behind the prompt"):
        check_options({"memento": {"assistant_start": 6}}, [0] * 5, settings)


@pytest.mark.parametrize(
    ("server", "request_options", "mode", "bounds"),
    [
        ({}, {}, "off", {}),
        ({"max_block_tokens": 9}, {}, "caps", {"max_block": 9}),
        ({"max_block_tokens": 9}, {"constrain": "off"}, "off", {}),
        ({"max_block_tokens": 9}, {"enable": False}, "off", {}),
        ({"max_block_tokens": 9}, {"constrain": "strict"}, "strict", {"max_block": 9}),
        (
            {"constrain": "strict", "max_blocks": 4, "max_block_tokens": 9},
            {"constrain": "caps"},
            "caps",
            {"max_block": 9},
        ),
        ({"constrain": "strict", "max_blocks": 4}, {"constrain": "off"}, "off", {}),
        ({"constrain": "strict", "max_blocks": 4}, {"min_blocks": 2}, "strict",
         {"max_blocks": 4, "min_blocks": 2}),
    ],
)  # fmt: skip
def test_emission_of_a_request(
    server: dict[str, Any], request_options: dict[str, Any], mode: str, bounds: dict[str, int]
) -> None:
    config = MementoConfig(enable=True, mask_delimiters=False, **server)
    merged = config.for_request(RequestOptions.parse(request_options))
    assert merged.emission == mode
    assert merged.limits == Limits(0, 0, 0, 0, 0, 0)._replace(**bounds)


@pytest.mark.parametrize(
    ("server", "request_options", "reason"),
    [
        ({}, {"max_blocks": 2}, "max_blocks needs constrain=strict"),
        ({}, {"constrain": "caps"}, "constrain=caps needs max_block_tokens or"),
        ({}, {"constrain": "off", "max_block_tokens": 3}, "needs constrain=caps or strict"),
        ({}, {"enable": False, "constrain": "strict"}, "no effect with enable=false"),
        ({}, {"constrain": "strict", "min_blocks": 3, "max_blocks": 2}, "min_blocks=3 is more"),
        ({"constrain": "strict"}, {"constrain": "caps"}, "constrain=caps needs"),
        ({}, {"constrain": "loose"}, "'off', 'caps' or 'strict'"),
    ],
)
def test_contradictory_emission(
    server: dict[str, Any], request_options: dict[str, Any], reason: str
) -> None:
    config = MementoConfig(enable=True, mask_delimiters=False, **server)
    with pytest.raises(RequestError, match=reason):
        config.for_request(RequestOptions.parse(request_options))


def flags(*argv: str) -> argparse.Namespace:
    pytest.importorskip("torch")
    from memento_sgl.serve.memento_flags import add_flags

    parser = argparse.ArgumentParser()
    add_flags(parser)
    return parser.parse_args(argv)


def parsed(*argv: str) -> MementoConfig | None:
    from memento_sgl.serve.memento_flags import config_from_flags

    return config_from_flags(flags(*argv))


def test_every_option_has_a_flag() -> None:
    names = vars(flags()).keys()
    for option in MementoConfig.model_fields:
        assert ("enable_memento" if option == "enable" else f"memento_{option}") in names


def test_flags_enable_and_override_the_json() -> None:
    assert parsed() is None
    assert parsed("--memento-config", '{"enable": false}') is None
    config = parsed("--memento-config", REFERENCE, "--memento-keep-last-n-blocks", "2")
    assert config is not None
    assert config.keep_last_n_blocks == 2
    config = parsed("--enable-memento", "--memento-mask-delimiters", "true")
    assert config is not None
    assert config.mask_delimiters is True


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--memento-restart-mode", "true"], "no effect without --enable-memento"),
        (["--enable-memento", "--memento-config", '{"enable": false}'], "contradicts"),
        (["--enable-memento", "--memento-keep-last-n-blocks", "two"], "not a number"),
        (["--enable-memento", "--memento-debug", "yes"], "expected true or false"),
        (["--enable-memento", "--memento-mask-delimiters", "x"], "expected true or false or auto"),
    ],
)
def test_bad_flags(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parsed(*argv)


def test_prefixes_are_cached_at_every_page_size() -> None:
    pytest.importorskip("sglang")
    from memento_sgl.serve.arguments import required_arguments

    config = MementoConfig(enable=True)
    for page in (None, 1, 64):
        assert "disable_radix_cache" not in required_arguments(config, {"page_size": page})


class Words:
    """A tokenizer of whole words."""

    def __init__(self, *words: str) -> None:
        self.words = list(words)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [self.words.index(text)] if text in self.words else [0, 0]

    def convert_ids_to_tokens(self, ids: int) -> str:
        return self.words[ids]


CHAT = ("<|im_start|>", "<|im_end|>", "assistant")
BLOCK = ("<|block_start|>", "<|block_end|>", "<|summary_start|>", "<|summary_end|>")


def test_markers_resolve() -> None:
    config = MementoConfig(enable=True)
    assert resolve_markers(config, Words("x", *BLOCK, *CHAT)) == MarkerIds(1, 2, 3, 4, 5, 6, 7)
    thought = Words("x", *BLOCK, *CHAT, "<think>", "</think>")
    assert resolve_markers(config, thought) == MarkerIds(*range(1, 10))
    plain = MementoConfig(enable=True, require_assistant_section=False)
    assert resolve_markers(plain, Words("x", *BLOCK)) == MarkerIds(1, 2, 3, 4)
    numbers = json.dumps({f"{n}_token": str(i) for i, n in enumerate(MarkerIds._fields[:9], 10)})
    assert resolve_markers(MementoConfig.parse(numbers), None) == MarkerIds(*range(10, 19))


def test_markers_that_do_not_resolve() -> None:
    config = MementoConfig(enable=True)
    with pytest.raises(MarkerError, match=r"summary_end_token='<\|summary_end\|>'"):
        resolve_markers(config, Words("x", *BLOCK[:3], *CHAT))
    with pytest.raises(MarkerError, match="require_assistant_section"):
        resolve_markers(config, Words("x", *BLOCK))
    with pytest.raises(MarkerError, match="without a tokenizer"):
        resolve_markers(config, None)
    strict = MementoConfig(enable=True, constrain="strict")
    with pytest.raises(MarkerError, match="think_start_token='<think>'"):
        resolve_markers(strict, Words("x", *BLOCK, *CHAT))
    same = MementoConfig(enable=True, block_end_token="<|block_start|>")
    with pytest.raises(MarkerError, match="same token"):
        resolve_markers(same, Words("x", *BLOCK, *CHAT))
