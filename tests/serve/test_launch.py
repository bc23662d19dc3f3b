"""Mistakes at launch end the process with one message, before weights load."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("sglang")

from memento_sgl.serve.sglang_flags import listed

SCRIPT = """
import json, sys
from memento_sgl.serve.sglang_flags import installed
flags = installed()
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
from memento_sgl.serve.arguments import settings_of

def launch(argv):
    try:
        args = prepare_server_args(argv)
    except SystemExit as error:
        return str(error.code)
    settings = settings_of(args)
    shared = {"reasoning_parser": args.reasoning_parser}
    if settings is None:
        return shared | {"stock": True, "radix_cache": not args.disable_radix_cache}
    cache = "off" if args.disable_radix_cache else args.radix_cache_backend
    return shared | json.loads(settings.config.model_dump_json()) | {"radix_cache": cache}

results = [launch(argv) for argv in json.load(sys.stdin)]
json.dump([flags, *results], open(sys.argv[1], "w"))
"""
REFERENCE = (
    '{"enable": true, "keep_last_n_blocks": 0, "mask_delimiters": false, '
    '"compact_on_summary_end": true, "require_assistant_section": true, "debug": true}'
)

# Flags after --model-path, and a part of the one message.
REFUSED = [
    (["--enable-memento", "--enable-mixed-chunk"], "mixed chunked prefill"),
    (["--enable-memento", "--disaggregation-mode", "prefill"], "disaggregation"),
    (["--enable-memento", "--chunked-prefill-size", "-1"], "needs chunked prefill"),
    (["--enable-memento", "--tokenizer-worker-num", "2"], "more than one tokenizer worker"),
    (["--enable-memento", "--pp-size", "2"], "pipeline parallelism"),
    (["--enable-memento", "--memento-config", '{"enable": tru'], "not valid JSON"),
    (
        ["--enable-memento", "--memento-config", '{"keep_blocks": 1}'],
        "unknown option 'keep_blocks'",
    ),
    (["--enable-memento", "--memento-config", '{"enable": false}'], "contradicts"),
    (["--enable-memento", "--memento-config", "/no/such/file"], "readable file"),
    (["--enable-memento", "--memento-keep-last-n-blocks", "x"], "not a number"),
    (["--enable-memento", "--memento-restart-mode", "perhaps"], "expected true or false"),
    (
        [
            "--enable-memento",
            "--memento-restart-mode",
            "true",
            "--memento-keep-last-n-blocks",
            "1",
        ],
        "restart_mode needs keep_last_n_blocks=0",
    ),
    (["--memento-debug", "true"], "no effect without --enable-memento"),
    (
        ["--enable-memento", "--memento-trace-dir", "/dev/null/x"],
        "not a folder that can be written",
    ),
    (["--enable-memento", "--memento-trace-files", "5"], "trace_files needs trace_dir"),
    (
        ["--enable-memento", "--memento-block-start-token", "<blk>"],
        "block_start_token='<blk>' is not exactly one token",
    ),
    (
        ["--enable-memento", "--memento-block-start-token", "<|block_end|>"],
        "are the same token",
    ),
    (
        ["--enable-memento", "--radix-cache-backend", "lmcache"],
        "brings its own radix cache",
    ),
    (["--enable-memento", "--skip-tokenizer-init"], "cannot be resolved without a tokenizer"),
]


def launch(cases: list[list[str]], folder: Path) -> list[object]:
    """One process for all cases: SGLang takes 15 s to import."""
    out = folder / "results.json"
    subprocess.run(
        [sys.executable, "-c", SCRIPT, str(out)],
        input=json.dumps(cases),
        text=True,
        check=True,
        timeout=300,
    )
    results: list[object] = json.loads(out.read_text())
    return results


@pytest.fixture(scope="module")
def results(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, object]:
    qwen, llama = str(checkpoint("qwen3")), str(checkpoint("llama"))
    folder = tmp_path_factory.mktemp("launch")
    settings = folder / "memento.json"
    settings.write_text(REFERENCE)
    cpu = ["--device", "cpu", "--attention-backend", "torch_native"]
    cases = {
        "stock": [qwen],
        "stock, no parser": [qwen, "--reasoning-parser", "none"],
        "no parser": [qwen, "--enable-memento", "--reasoning-parser", "none"],
        "other parser": [qwen, "--enable-memento", "--reasoning-parser", "qwen3"],
        "stock, this parser": [qwen, "--reasoning-parser", "memento"],
        "json": [qwen, "--memento-config", REFERENCE],
        "file": [qwen, "--memento-config", str(settings)],
        "flag wins": [qwen, "--memento-config", REFERENCE, "--memento-keep-last-n-blocks", "2"],
        "no cache": [qwen, "--enable-memento", "--disable-radix-cache"],
        "restart": [qwen, "--enable-memento", "--memento-restart-mode", "true"],
        "unknown family": [llama, "--enable-memento"],
        "mistyped": [qwen, "--enable-memento", "--memento-keep-last", "1"],
        "told family": [llama, "--enable-memento", "--memento-mask-delimiters", "true"],
    } | {" ".join(flags): [qwen, *flags] for flags, _ in REFUSED}
    commands = [["--model-path", *case, *cpu] for case in cases.values()]
    return dict(zip(["flags", *cases], launch(commands, folder), strict=True))


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused(results: dict[str, object], flags: list[str], message: str) -> None:
    found = results[" ".join(flags)]
    assert isinstance(found, str), found
    assert found.startswith("memento: ")
    assert message in found


def test_without_the_flag_the_engine_is_stock(results: dict[str, object]) -> None:
    stock = {"reasoning_parser": None, "stock": True, "radix_cache": True}
    assert results["stock"] == results["stock, no parser"] == stock
    assert results["stock, this parser"] == stock | {"reasoning_parser": "memento"}


def test_json_file_and_flags_agree(results: dict[str, object]) -> None:
    from_json = results["json"]
    assert isinstance(from_json, dict)
    assert from_json["enable"]
    assert from_json["debug"]
    assert results["file"] == from_json
    assert results["flag wins"] == from_json | {"keep_last_n_blocks": 2}


def test_the_reasoning_parser_is_ours_unless_another_is_named(results: dict[str, object]) -> None:
    cases = ("json", "no parser", "other parser")
    parsers = [results[name]["reasoning_parser"] for name in cases]  # type: ignore[index]
    assert parsers == ["memento", None, "qwen3"]


def test_prefix_caching_is_on_unless_it_cannot_be(results: dict[str, object]) -> None:
    caches = {name: results[name]["radix_cache"] for name in ("json", "no cache", "restart")}  # type: ignore[index]
    assert caches == {"json": "memento", "no cache": "off", "restart": "off"}


def test_the_family_settles_the_delimiters_or_has_to_be_told(results: dict[str, object]) -> None:
    assert "--memento-mask-delimiters false" in str(results["unknown family"])
    told = results["told family"]
    assert isinstance(told, dict)
    assert told["mask_delimiters"] is True


def test_a_mistyped_flag_is_no_other_one(results: dict[str, object]) -> None:
    """argparse would take `--memento-keep-last` for `--memento-keep-last-n-blocks`."""
    assert results["mistyped"] == "2"


def test_the_list_of_flags_is_that_of_sglang(results: dict[str, object]) -> None:
    assert results["flags"] == listed(), "run: python -m memento_sgl.serve.sglang_flags"
