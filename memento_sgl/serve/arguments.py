"""From command line flags to an engine that evicts: parse, check, settle, before weights load."""

from __future__ import annotations

import argparse
import logging
import threading
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_args

import msgspec

from memento_sgl.cache.key import LONGEST
from memento_sgl.environment import (
    excluded_from_sglang,
    extensions_folder,
    misses_forced,
    served_by_rust,
)
from memento_sgl.errors import ConfigError
from memento_sgl.observe.trace.writer import check_folder
from memento_sgl.request.state import Settings
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.emission import resolve_structure
from memento_sgl.rule.markers import resolve_markers
from memento_sgl.serve.flags import check_flags, flag
from memento_sgl.serve.models import check_architectures, check_backend, refuse_model

logger = logging.getLogger(__name__)

RADIX_BACKEND = "memento"
REASONING_PARSER = "memento"
NO_PARSER = "none"  # SGLang's None cannot be told from a flag that is not given


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--enable-memento`, `--memento-config` and one flag for each option."""
    group = parser.add_argument_group("memento: in-place eviction of finished reasoning blocks")
    group.add_argument("--enable-memento", action="store_true", help="Evict finished blocks.")
    group.add_argument(
        "--memento-config",
        metavar="JSON-OR-PATH",
        help="Options as a JSON object or the path of a JSON file; the flags below override it.",
    )
    for name, field in MementoConfig.model_fields.items():
        if name == "enable":
            continue
        kinds = _kinds(field.annotation)
        group.add_argument(
            f"--memento-{name.replace('_', '-')}",
            dest=f"memento_{name}",
            metavar="/".join(kinds),
            help=f"{(field.description or '').replace('%', '%%')} (default: {field.default})",
        )


def _kinds(annotation: Any) -> list[str]:
    """Names of the types or values that an option accepts."""
    if annotation is bool:
        return ["true", "false"]
    if isinstance(annotation, type):
        return [annotation.__name__]
    parts = get_args(annotation)
    return [kind for part in parts for kind in ([part] if isinstance(part, str) else _kinds(part))]


def config_from_flags(args: argparse.Namespace) -> MementoConfig | None:
    """The options of a launch; None when memento is not asked for.

    Raises:
        ConfigError: bad JSON, unknown option, wrong type, contradiction, options without enabling.
    """
    given: dict[str, Any] = {}
    for name, field in MementoConfig.model_fields.items():
        text = getattr(args, f"memento_{name}", None)
        if text is not None:
            given[name] = _value(name, text, field.annotation)
    source = getattr(args, "memento_config", None)
    base = MementoConfig.parse(source) if source is not None else MementoConfig()
    enabled = bool(getattr(args, "enable_memento", False))
    if enabled and "enable" in base.model_fields_set and not base.enable:
        raise ConfigError('--enable-memento contradicts "enable": false in --memento-config')
    if not (enabled or base.enable):
        if given:
            flag = next(iter(given)).replace("_", "-")
            raise ConfigError(f"--memento-{flag} has no effect without --enable-memento")
        return None
    return MementoConfig.parse(base.model_dump() | given | {"enable": True})


def _value(name: str, text: str, annotation: Any) -> Any:
    kinds = _kinds(annotation)
    if "true" in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if annotation is int:
        try:
            return int(text)
        except ValueError:
            raise ConfigError(
                f"--memento-{name.replace('_', '-')}: not a number: {text!r}"
            ) from None
    if annotation is str or text in kinds:
        return text
    raise ConfigError(
        f"--memento-{name.replace('_', '-')}: expected {' or '.join(kinds)}, not {text!r}"
    )


def enable(server_args: Any, config: MementoConfig) -> None:
    """Make `server_args` start an engine that evicts, or refuse.

    Resolves the markers and the model family and leaves the settings on the arguments, which are
    read-only otherwise and travel to every process (`settings_of`). The request-parsing seams are
    applied to this process.

    Raises:
        ConfigError: an engine flag that is not supported, an unknown model family.
        MarkerError: a marker is not exactly one token.
    """
    if (value := excluded_from_sglang()) is not None:
        raise ConfigError(
            f"SGLANG_PLUGINS={value!r} keeps the memento plugin out: add memento to it"
        )
    if misses_forced():
        raise ConfigError("memento does not support SGLANG_RADIX_FORCE_MISS: unset it")
    if served_by_rust():
        raise ConfigError(
            "memento does not support SGLANG_RUST_SERVER, which goes around the checks of "
            "requests: unset it"
        )
    from sglang.srt.arg_groups.overrides import model_config_of, resolving_view

    record = server_args
    record.resolve_once()
    server_args = resolving_view(record)
    refuse_flags(record, server_args)
    model = model_config_of(record)
    refuse_model(model)
    if not server_args.disable_radix_cache:
        refuse_context(model.context_len)
    config = config.for_family(list(model.hf_config.architectures or ()))
    if config.trace_dir:
        config = config.model_copy(update={"trace_dir": str(check_folder(config.trace_dir))})
    tokenizer = _tokenizer(server_args)
    vocabulary = model.vocab_size
    markers = resolve_markers(config, tokenizer, vocabulary)
    structure = resolve_structure(tokenizer, _ends(model, tokenizer), vocabulary)
    check_backend(server_args.attention_backend, str(model.dtype))
    check_architectures(model.hf_config.architectures or ())
    logger.info("memento: %s markers=%s", config.model_dump_json(exclude_defaults=True), markers)
    record._memento = Settings(config, markers, structure)

    from memento_patches.plugin import install

    from memento_sgl.serve.reasoning import register_parser

    register_parser(config)
    install("frontend")


def settings_of(server_args: Any) -> Settings | None:
    """What `enable` left on the server arguments; None for a stock engine."""
    settings: Settings | None = getattr(server_args, "_memento", None)
    return settings


def required_arguments(config: MementoConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Server arguments to be set before `ServerArgs` resolves and freezes itself.

    Args:
        given: what the user asked for.

    Raises:
        ConfigError: another radix cache was asked for.
    """
    parser = given.get("reasoning_parser") or REASONING_PARSER
    required = {"reasoning_parser": None if parser == NO_PARSER else parser}
    return required | _required_cache(config, given)


def _required_cache(config: MementoConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    if given.get("disable_radix_cache"):
        return {}
    if (backend := given.get("radix_cache_backend")) not in (None, RADIX_BACKEND):
        raise ConfigError(
            f"memento brings its own radix cache: remove --radix-cache-backend {backend}"
        )
    if config.restart_mode:
        logger.warning("memento: restart mode recomputes mementos: prefix caching is turned off")
        return {"disable_radix_cache": True}
    return {"radix_cache_backend": RADIX_BACKEND}


def make_radix_cache(context: Any) -> Any:
    """Radix cache factory of SGLang's registry, for `--radix-cache-backend memento`."""
    from memento_sgl.cache.paged import PagedRadixCache
    from memento_sgl.cache.prefix import PrunableRadixCache
    from memento_sgl.engine.runtime import current

    settings = settings_of(context.server_args)
    if settings is None:
        raise ConfigError("--radix-cache-backend memento needs --enable-memento")
    if context.params.enable_kv_cache_events:
        with saying_what_it_waits_for("the hashes of KV events: a C++ extension is being built"):
            load_hashes()
    if context.params.page_size == 1:
        return PrunableRadixCache(context.params, settings.markers)
    return PagedRadixCache(context.params, settings.markers, current().move_kv)


def load_hashes() -> None:
    """Build or load SGLang's extension that names pages in KV events, now rather than when the
    first request ends."""
    from sglang.srt.mem_cache.cpp_utils.native_hash import get_native_hash

    get_native_hash(array("q", [0]), None)


@contextmanager
def saying_what_it_waits_for(what: str, seconds: float = 3.0) -> Iterator[None]:
    """Log a line if what is inside takes longer than `seconds`."""
    folder = extensions_folder()
    timer = threading.Timer(
        seconds,
        logger.warning,
        ("memento: the start waits for %s (or another process builds it, in %s)", what, folder),
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def refuse_flags(given: Any, settled: Any) -> None:
    """Raise ConfigError for a flag that is not supported; name those that nobody has checked.

    Args:
        given: the record of server arguments, as it was written.
        settled: its view after SGLang has filled in its choices.
    """
    defaults = {field.name: field.default for field in msgspec.structs.fields(type(given))}
    if unchecked := check_flags(given, settled, defaults):
        names = ", ".join(map(flag, unchecked))
        logger.warning("memento: not checked with block eviction, see docs/flags.md: %s", names)
    if settled.chunked_prefill_size is not None and settled.chunked_prefill_size <= 0:
        raise ConfigError(
            "memento needs chunked prefill: remove --chunked-prefill-size or make it positive"
        )


def refuse_context(length: int) -> None:
    """Raise ConfigError for a context too long for the keys of the radix tree."""
    if length >= LONGEST:
        raise ConfigError(
            f"memento caches prefixes of less than {LONGEST} tokens: lower --context-length "
            f"({length}) or add --disable-radix-cache"
        )


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """The tokens at which SGLang ends a request."""
    ends = set(model.hf_eos_token_id or ())
    if tokenizer is not None:
        ends |= {tokenizer.eos_token_id} - {None}
        ends |= set(getattr(tokenizer, "additional_stop_token_ids", None) or ())
    return ends


def _tokenizer(server_args: Any) -> Any:
    if server_args.skip_tokenizer_init:
        return None
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    return get_tokenizer(
        server_args.tokenizer_path,
        tokenizer_mode=server_args.tokenizer_mode,
        trust_remote_code=server_args.trust_remote_code,
        revision=server_args.revision,
    )
