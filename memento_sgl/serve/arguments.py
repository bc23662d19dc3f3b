"""From the options of a launch to server arguments of an engine that evicts: check and settle,
before weights load."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from memento_sgl.errors import ConfigError
from memento_sgl.observe.trace.writer import check_folder
from memento_sgl.request.settings import Settings
from memento_sgl.rule.config import DELIMITERS_KEY, MementoConfig
from memento_sgl.rule.emission import resolve_structure
from memento_sgl.serve.models import check_architectures, check_backend, refuse_model
from memento_sgl.serve.refuse import refuse_context, refuse_environment, refuse_flags
from memento_sgl.serve.sections import settle_sections

logger = logging.getLogger(__name__)

RADIX_BACKEND = "memento"
REASONING_PARSER = "memento"
NO_PARSER = "none"  # SGLang's None cannot be told from a flag that is not given


def enable(server_args: Any, config: MementoConfig) -> None:
    """Make `server_args` start an engine that evicts, or refuse.

    Resolves the markers and the model family and leaves the settings on the arguments, which are
    read-only otherwise and travel to every process (`settings_of`). The request-parsing seams are
    applied to this process.

    Raises:
        ConfigError: an engine flag that is not supported, an unknown model family.
        MarkerError: a marker is not exactly one token.
    """
    refuse_environment()
    from sglang.srt.arg_groups.overrides import model_config_of, resolving_view

    record = server_args
    record.resolve_once()
    server_args = resolving_view(record)
    refuse_flags(record, server_args)
    model = model_config_of(record)
    refuse_model(model)
    if not server_args.disable_radix_cache:
        refuse_context(model.context_len)
    recorded = getattr(model.hf_config, DELIMITERS_KEY, None)
    config = config.for_family(list(model.hf_config.architectures or ()), recorded)
    if config.trace_dir:
        config = config.model_copy(update={"trace_dir": str(check_folder(config.trace_dir))})
    tokenizer = _tokenizer(server_args)
    vocabulary = model.vocab_size
    config, markers = settle_sections(config, server_args.chat_template, tokenizer, vocabulary)
    structure = resolve_structure(tokenizer, _ends(model, tokenizer), vocabulary)
    check_backend(server_args.attention_backend, str(model.dtype))
    check_architectures(model.hf_config.architectures or ())
    logger.info("memento: %s markers=%s", config.model_dump_json(exclude_defaults=True), markers)
    record._memento = Settings(config, markers, structure)

    from memento_patches.plugin import install

    from memento_sgl.serve.reasoning_parser import register_parser

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
