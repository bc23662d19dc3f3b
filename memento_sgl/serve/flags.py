"""Every server flag of SGLang, each in one of four tables: what block eviction does about it.

Names are those of `ServerArgs`. A flag of a new SGLang that stands nowhere fails a test, and
`docs/flags.md` is these tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from memento_sgl.errors import ConfigError
from memento_sgl.serve.flags_irrelevant import IRRELEVANT


class Refused(NamedTuple):
    """A flag that must keep its default.

    Attributes:
        why: what would have to be supported.
        also: values that are fine beside the default.
        settled: SGLang may choose a value itself, so the one in force is looked at, too.
    """

    why: str
    also: tuple[Any, ...] = ()
    settled: bool = False


_FLAGS = "test_server_flags"
TESTED: Mapping[str, str] = {
    "device": "test_server_modes",
    "dtype": "conftest",
    "max_total_tokens": "conftest",
    "context_length": "test_radix",
    "attention_backend": "test_server_modes",
    "triton_attention_num_kv_splits": "test_server_triton",
    "page_size": "test_server_pages",
    "disable_radix_cache": "test_launch",
    "disable_overlap_schedule": "test_server_modes",
    "chunked_prefill_size": "test_server_overlap",
    "tp_size": "test_server_parallel",
    "dp_size": "test_server_parallel",
    "skip_tokenizer_init": "test_launch",
    "reasoning_parser": "test_server_demo_openai",
    "radix_cache_backend": "test_launch",
    "enable_metrics": "observation",
    "enable_cache_report": "test_server_radix",
    "grammar_backend": "test_exactness",
    "sampling_backend": "test_exactness",
    "schedule_policy": _FLAGS,
    "enable_priority_scheduling": _FLAGS,
    "schedule_low_priority_values_first": _FLAGS,
    "priority_scheduling_preemption_threshold": _FLAGS,
    "default_priority_value": _FLAGS,
    "retraction_policy": _FLAGS,
    "radix_eviction_policy": _FLAGS,
    "max_prefill_tokens": _FLAGS,
    "prefill_max_requests": _FLAGS,
    "prefill_decode_interval": _FLAGS,
    "prefill_decode_interval_min_bs": _FLAGS,
    "scheduler_recv_interval": _FLAGS,
    "num_continuous_decode_steps": _FLAGS,
    "schedule_conservativeness": _FLAGS,
    "max_running_requests": _FLAGS,
    "max_queued_requests": _FLAGS,
    "stream_interval": _FLAGS,
    "batch_notify_size": _FLAGS,
    "enable_custom_logit_processor": _FLAGS,
    "allow_auto_truncate": _FLAGS,
    "preferred_sampling_params": _FLAGS,
}
"""Works, and which test file says so."""

_GPU = "runs on accelerators only, where the project's tests have not been run"
_LORA = "adapters have not been compared with the oracle; cached KV is kept apart by adapter"
UNCHECKED: Mapping[str, str] = {
    "prefill_attention_backend": _GPU,
    "decode_attention_backend": _GPU,
    "triton_attention_reduce_in_fp32": _GPU,
    "disable_chunked_prefix_cache": _GPU,
    "flashinfer_mla_disable_ragged": _GPU,
    "enable_fused_qk_norm_rope": _GPU,
    "cuda_graph_config": _GPU,
    "cuda_graph_backend_decode": _GPU,
    "cuda_graph_backend_prefill": _GPU,
    "cuda_graph_max_bs_decode": _GPU,
    "cuda_graph_max_bs_prefill": _GPU,
    "cuda_graph_bs_decode": _GPU,
    "cuda_graph_bs_prefill": _GPU,
    "cuda_graph_prefill_max_context": _GPU,
    "cuda_graph_max_seq_len_prefill": _GPU,
    "disable_cuda_graph": _GPU,
    "disable_prefill_cuda_graph": _GPU,
    "disable_decode_cuda_graph": _GPU,
    "disable_cuda_graph_padding": _GPU,
    "enable_cudagraph_gc": _GPU,
    "kv_events_config": "the tree's events are tested, the way to their readers is not",
    "mem_fraction_static": "sizes the pool; the tests give its size in tokens",
    "enable_memory_saver": "needs CUDA; a release drops what is cached",
    "enable_lora": _LORA,
    "lora_paths": _LORA,
    "max_lora_rank": _LORA,
    "lora_target_modules": _LORA,
    "max_loaded_loras": _LORA,
    "max_loras_per_batch": _LORA,
    "lora_eviction_policy": _LORA,
    "lora_backend": _LORA,
    "max_lora_chunk_size": _LORA,
    "lora_strict_loading": _LORA,
    "lora_use_virtual_experts": _LORA,
    "experts_shared_outer_loras": _LORA,
    "enable_lora_overlap_loading": _LORA,
    "lora_drain_wait_threshold": _LORA,
    "incremental_streaming_output": "streams of pieces; clients here read whole ones",
    "abort_on_priority_when_disabled": "refuses requests with a priority before they run",
}
"""Should work, and nobody has looked: a launch that sets one says so. At most 40."""

_SPEC = "speculative decoding"
_HIDDEN = "states of prompt tokens in segments, and of steps done again, would be mixed up"
_ROWS = "it reads rows by logical length: values of evicted tokens would be stale and shifted"
_CP = "context parallelism splits rows between ranks"
_KV = "KV outside of the plain pool"
REFUSED: Mapping[str, Refused] = {
    "speculative_algorithm": Refused(_SPEC, settled=True),
    "enable_multi_layer_eagle": Refused(_SPEC),
    "decoupled_spec_role": Refused(_SPEC),
    "enable_hierarchical_cache": Refused("the hierarchical cache", settled=True),
    "hicache_storage_backend": Refused("the hierarchical cache"),
    "enable_unified_cache_external_linker": Refused(_KV),
    "enable_lmcache": Refused("LMCache", settled=True),
    "enable_flexkv": Refused("FlexKV", settled=True),
    "enable_hisparse": Refused("hierarchical sparse attention", settled=True),
    "enable_unified_memory": Refused("the unified memory pool", settled=True),
    "enable_page_major_kv_layout": Refused(_KV, settled=True),
    "enable_kv_cache_sharding": Refused(_KV, settled=True),
    "enable_dsa_cache_layer_split": Refused(_KV),
    "kv_cache_dtype": Refused("quantized KV, which has not been compared with the oracle"),
    "prefill_kv_cache_dequant_dtype": Refused("quantized KV"),
    "prefill_only_disable_kv_cache": Refused("a server without a KV cache", settled=True),
    "disaggregation_mode": Refused("prefill/decode disaggregation", settled=True),
    "enable_pd_role_switch": Refused("prefill/decode disaggregation"),
    "enable_mixed_chunk": Refused("mixed chunked prefill", settled=True),
    "enable_dynamic_chunking": Refused("dynamic chunking", settled=True),
    "enable_streaming_session": Refused("streaming sessions", settled=True),
    "enable_session_radix_cache": Refused("the session radix cache", settled=True),
    "strip_thinking_cache": Refused("--strip-thinking-cache", settled=True),
    "enable_strict_thinking": Refused("budgets of thinking tokens"),
    "dcp_size": Refused(_CP, settled=True),
    "attn_cp_size": Refused(_CP, also=(None,), settled=True),
    "enable_prefill_cp": Refused(_CP, settled=True),
    "pp_size": Refused("pipeline parallelism", settled=True),
    "attn_dp_size": Refused("data-parallel attention", also=(None,), settled=True),
    "enable_dp_attention": Refused("data-parallel attention"),
    "enable_attn_tp_input_scattered": Refused("scattered attention inputs"),
    "enable_layernorm_sp": Refused("sequence parallelism"),
    "moe_dp_size": Refused("data-parallel experts", also=(None,)),
    "dwdp_size": Refused("weights spread over data-parallel ranks"),
    "elastic_ep_backend": Refused("ranks that come and go"),
    "ep_join_mode": Refused("ranks that come and go"),
    "enable_two_batch_overlap": Refused("two-batch overlap", settled=True),
    "enable_pdmux": Refused("prefill/decode multiplexing", settled=True),
    "enable_prefill_delayer": Refused("the prefill delayer, which waits for other ranks"),
    "min_free_slots_delay": Refused("delays that count free slots"),
    "enable_deterministic_inference": Refused("deterministic inference", settled=True),
    "rl_on_policy_target": Refused("kernels that repeat a trainer's", settled=True),
    "dllm_algorithm": Refused("diffusion language models", settled=True),
    "is_embedding": Refused("embedding models", settled=True),
    "enable_multimodal": Refused("multimodal positions", also=(False,)),
    "encoder_only": Refused("an encoder-only server", settled=True),
    "language_only": Refused("a server whose encoder is elsewhere"),
    "enable_encoder_swa_bounded_replay": Refused("replays of windows"),
    "enable_decoder_swa_bounded_replay": Refused("replays of windows", also=(False,)),
    "tokenizer_worker_num": Refused("more than one tokenizer worker", settled=True),
    "grpc_mode": Refused("gRPC, which goes around the checks of requests"),
    "smg_grpc_mode": Refused("gRPC, which goes around the checks of requests"),
    "sidecar": Refused("a sidecar, which goes around the checks of requests"),
    "use_ray": Refused("Ray actors for schedulers", settled=True),
    "enable_mis": Refused("scoring of several items in one prompt", settled=True),
    "enable_watermark": Refused("watermarks"),
    "enable_return_hidden_states": Refused(f"hidden states: {_HIDDEN}"),
    "return_hidden_states_mode": Refused(f"hidden states: {_HIDDEN}"),
    "enable_return_aux_hidden_states": Refused(f"hidden states: {_HIDDEN}"),
    "aux_hidden_state_capture": Refused(f"hidden states: {_HIDDEN}"),
    "enable_return_routed_experts": Refused(f"routed experts: {_ROWS}"),
    "enable_return_indexer_topk": Refused(f"indexer top-k: {_ROWS}"),
    "kv_canary": Refused("the KV canary, which expects positions to be rows"),
    "disable_priority_preemption": Refused("priorities without preemption"),
    "radix_eviction_policy_config": Refused("options of the tree's eviction policy"),
    "enable_torch_compile": Refused("torch.compile of the model", settled=True),
    "enable_lean_attention": Refused("lean attention"),
    "debug_cuda_graph": Refused("graphs that run eagerly"),
    "triton_attention_split_tile_size": Refused("deterministic inference"),
    "enable_nvidia_megakernel": Refused("kernels that run a whole model"),
    "debug_tensor_dump_input_file": Refused("replays of dumped tensors"),
    "forward_hooks": Refused("hooks inside the model, which see rows"),
}
"""Ends the launch with the reason."""

REFUSED_VALUES: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "radix_eviction_policy": (("tlru",), "the eviction policy tlru belongs to another cache"),
}
"""Single values that end the launch, of flags that are tested otherwise."""


def check_flags(given: Any, settled: Any, defaults: Mapping[str, Any]) -> list[str]:
    """Refuse what is not supported.

    Args:
        given: server arguments as the user wrote them.
        settled: the same after SGLang has filled in its choices.
        defaults: value of each flag that nobody has set.

    Returns:
        The flags set by the user that are in `UNCHECKED`.

    Raises:
        ConfigError: a flag of `REFUSED` with another value than its default.
    """
    for name, (why, also, chosen) in REFUSED.items():
        for source in (given, settled) if chosen else (given,):
            if (value := getattr(source, name)) != defaults[name] and value not in also:
                raise ConfigError(f"memento does not support {why} yet ({name}={value!r})")
    for name, (values, why) in REFUSED_VALUES.items():
        if (value := getattr(settled, name)) in values:
            raise ConfigError(f"memento does not support {flag(name)} {value}: {why}")
    return [name for name in UNCHECKED if getattr(given, name) != defaults[name]]


def flag(name: str) -> str:
    """The command line flag of a server argument; short forms exist for a few."""
    short = {"tp_size": "tp", "dp_size": "dp", "pp_size": "pp"}.get(name, name)
    return f"--{short.replace('_', '-')}"


def page() -> str:
    """`docs/flags.md`."""
    return "\n".join(_page())


def _page() -> Iterable[str]:
    yield "# SGLang's flags, one by one"
    yield ""
    yield "Written by `python -m memento_sgl.serve.flags` from the tables that the launch checks."
    yield ""
    yield "## Works, and tests say so"
    yield ""
    yield "| flag | test |"
    yield "|---|---|"
    yield from (f"| `{flag(name)}` | `{test}` |" for name, test in sorted(TESTED.items()))
    yield ""
    yield "## Should work, unchecked"
    yield ""
    yield "A launch that sets one of these logs a line that names it."
    yield ""
    yield "| flag | why |"
    yield "|---|---|"
    yield from (f"| `{flag(name)}` | {why} |" for name, why in sorted(UNCHECKED.items()))
    yield ""
    yield "## Refused"
    yield ""
    yield "| flag | not supported |"
    yield "|---|---|"
    yield from (f"| `{flag(name)}` | {refused.why} |" for name, refused in sorted(REFUSED.items()))
    for name, (values, why) in REFUSED_VALUES.items():
        yield f"| `{flag(name)} {', '.join(values)}` | {why} |"
    yield ""
    yield "## Does not meet block eviction"
    for reason, names in IRRELEVANT.items():
        yield ""
        yield f"- {reason}: {', '.join(f'`{flag(name)}`' for name in names)}"
    yield ""


if __name__ == "__main__":
    print(page(), end="")
