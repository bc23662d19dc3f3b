"""Flags of SGLang that block eviction never meets, by the reason why."""

from __future__ import annotations

NO_SUCH_MODEL = (
    "only read for models that are refused: recurrent, sliding-window, sparse, multimodal"
)
REFUSED_FEATURE = "only read with a feature that is refused"

_GROUPS = {
    "which weights are loaded, from where and how": """
        model_path revision load_format model_loader_extra_config trust_remote_code model_impl
        model_config_parser json_model_override_args quantization quantization_param_path
        modelopt_quant modelopt_checkpoint_restore_path modelopt_checkpoint_save_path
        modelopt_export_path quantize_and_serve rl_quant_profile startup_weight_load_mode
        custom_weight_loader weight_loader_disable_mmap weight_loader_prefetch_checkpoints
        weight_loader_prefetch_num_threads weight_loader_drop_cache_after_load
        remote_instance_weight_loader_seed_instance_ip
        remote_instance_weight_loader_seed_instance_service_port
        remote_instance_weight_loader_send_weights_group_ports remote_instance_weight_loader_backend
        remote_instance_weight_loader_start_seed_via_transfer_engine engine_info_bootstrap_port
        modelexpress_config download_dir model_checksum delete_ckpt_after_loading
        decrypted_config_file checkpoint_engine_wait_weights_before_ready weight_version
        weight_cache_mode weight_cache_socket weight_cache_timeout enable_weights_cpu_backup
        mooncake_ib_device
    """,
    "where weights lie while they are not in use": """
        cpu_offload_gb offload_group_size offload_num_in_group offload_prefetch_step offload_mode
        kt_weight_path kt_method kt_cpuinfer kt_threadpool_count kt_num_gpu_experts
        kt_max_deferred_experts_per_token ple_offload_embedding ple_offload_backend ple_offload_dir
        enable_paged_experts paged_experts_num_resident
    """,
    "how layers other than attention compute; they see neither KV slots nor positions": """
        enable_fp32_lm_head enable_tf32_matmul fp8_gemm_runner_backend fp4_gemm_runner_backend
        bf16_gemm_backend disable_flashinfer_autotune flashinfer_autotune_skip_ops
        enable_fused_moe_sum_all_reduce enable_amd_monokernel enable_single_batch_overlap
        enable_precise_embedding_interpolation
    """,
    "how experts of a mixture compute and where they lie": """
        ep_size moe_a2a_backend enable_w4a4_mxfp4_megamoe deepep_v2_mode moe_runner_backend
        flashinfer_mxfp4_moe_precision deepep_mode fuseep_mode deepep_dispatcher_output_dtype
        ep_num_redundant_experts ep_dispatch_algorithm init_expert_location enable_eplb
        eplb_algorithm eplb_rebalance_num_iterations eplb_rebalance_layers_per_chunk
        eplb_min_rebalancing_utilization_threshold expert_distribution_recorder_mode
        expert_distribution_recorder_buffer_size expert_balancedness_report_mode deepep_config
        enable_waterfill disable_flashinfer_cutlass_moe_fp4_allgather
        disable_shared_experts_fusion enforce_shared_experts_fusion shared_experts_tp_size
        flashinfer_a2a_dispatch_type enable_megamoe_for_layernorm_sp
    """,
    "how ranks talk to each other": """
        nccl_port dist_timeout dist_init_addr gated_launch_port nnodes node_rank enable_p2p_check
        disable_custom_all_reduce enable_mscclpp enable_torch_symm_mem enable_symm_mem
        enable_nccl_nvls pre_warm_nccl boundary_reduction enable_quant_communications
        enable_flashinfer_allreduce_fusion enforce_disable_flashinfer_allreduce_fusion
        flashinfer_allreduce_fusion_backend enable_aiter_allreduce_fusion
        disable_aiter_allreduce_fusion_in_prefill disable_aiter_allreduce_fusion_in_decode
        load_balance_method
    """,
    "processes, devices and files of the host": """
        base_gpu_id gpu_id_step random_seed watchdog_timeout soft_watchdog_timeout sleep_on_idle
        custom_sigquit_handler numa_node gc_threshold crash_dump_folder gc_warning_threshold_secs
        disable_outlines_disk_cache file_storage_path
    """,
    "how HTTP and its neighbours are served, and who may ask": """
        host port fastapi_root_path skip_server_warmup warmups enable_http2
        http2_max_concurrent_streams http2_initial_connection_window_size ssl_keyfile ssl_certfile
        ssl_ca_certs ssl_keyfile_password enable_ssl_refresh api_key admin_api_key
        served_model_name tool_server smg_http_sidecar_port enable_response_store
        enable_http_worker_reuseport
    """,
    "how text becomes tokens before a request is made, or tokens text after it": """
        tokenizer_path tokenizer_mode tokenizer_backend chat_template trust_request_chat_template
        hf_chat_template_name completion_template default_chat_template_kwargs tool_call_parser
        sampling_defaults enable_dynamic_batch_tokenizer dynamic_batch_tokenizer_batch_size
        dynamic_batch_tokenizer_batch_timeout enable_tokenizer_batch_encode
        disable_tokenizer_batch_decode detokenizer_worker_num asr_max_buffer_seconds
        asr_max_concurrent_sessions return_input_ids return_output_ids
        stream_response_default_include_usage constrained_json_whitespace_pattern
        constrained_json_disable_any_whitespace constrained_json_max_whitespace_cnt
    """,
    "logs, metrics and traces of SGLang's own": """
        log_level log_level_http log_requests log_requests_level log_requests_format
        log_requests_target uvicorn_access_log_exclude_prefixes show_time_cost
        enable_mfu_metrics enable_metrics_for_all_schedulers load_snapshot_publish_interval
        tokenizer_metrics_custom_labels_header tokenizer_metrics_allowed_custom_labels
        extra_metric_labels bucket_time_to_first_token bucket_inter_token_latency
        bucket_e2e_request_latency prompt_tokens_buckets generation_tokens_buckets
        decode_log_interval enable_request_time_stats_logging load_publish_endpoint
        enable_forward_pass_metrics forward_pass_metrics_worker_id forward_pass_metrics_ipc_name
        enable_trace trace_modules otlp_traces_endpoint otlp_service_name export_metrics_to_file
        export_metrics_to_file_dir stat_loggers enable_layerwise_nvtx_marker
        debug_tensor_dump_output_folder debug_tensor_dump_layers msprobe_dump_config
        enable_profile_cuda_graph spec_trace_dir
    """,
    NO_SUCH_MODEL: """
        c128_page_size swa_full_tokens_ratio disable_hybrid_swa_memory swa_prefix_tails
        _swa_full_tokens_ratio_explicitly_set max_mamba_cache_size mamba_ssm_dtype
        mamba_max_states_per_path enable_mamba_cache_stochastic_rounding mamba_cache_philox_rounds
        mamba_full_memory_ratio mamba_radix_cache_strategy uses_mamba_radix_cache
        mamba_track_interval enable_int8_mamba_checkpoint int8_mamba_ckpt_size mamba_backend
        linear_attn_backend linear_attn_decode_backend linear_attn_prefill_backend
        linear_attn_verify_backend enable_linear_replayssm linear_replayssm_cache_len
        enable_linear_replayssm_spec enable_scattered_sconv dsa_prefill_backend
        dsv4_prefill_backend dsa_decode_backend dsa_paged_mqa_logits_backend dsa_topk_backend
        dsv4_attn_backend dsa_triton_union enable_dsa_fused_indexer qsa_indexer_dtype
        enable_deepseek_v4_fp4_indexer mm_attention_backend enable_broadcast_mm_inputs_process
        enable_prefix_mm_cache mm_enable_dp_encoder mm_process_config mm_processor_worker_num
        mm_io_worker_num allowed_media_domains media_url_max_file_size_mb
        mm_preprocess_cache_size_mb trust_mm_content_hashes limit_mm_data_per_request
        enable_mm_global_cache image_processor_backend mm_global_cache_backend
        disable_fast_image_processor mm_feature_transport language_model_only
        mlx_enable_sampling
    """,
    REFUSED_FEATURE: """
        uno_lora_path speculative_draft_model_path speculative_draft_model_revision
        speculative_draft_load_format speculative_num_steps speculative_eagle_topk
        speculative_num_draft_tokens speculative_dflash_block_size speculative_dspark_block_size
        speculative_dspark_sps_table_path speculative_dspark_confidence_sts_path
        speculative_dspark_align_verify_tokens_to_graph_tier speculative_accept_threshold_single
        speculative_accept_threshold_acc speculative_use_rejection_sampling speculative_token_map
        speculative_attention_mode speculative_draft_attention_backend speculative_dsa_topk_backend
        speculative_draft_kv_cache_dtype speculative_draft_window_size
        speculative_moe_runner_backend speculative_moe_a2a_backend
        speculative_enable_w4a4_mxfp4_megamoe speculative_draft_model_quantization
        _speculative_draft_quantization_explicitly_set speculative_adaptive
        speculative_adaptive_config speculative_domino_candidate_pool_size
        speculative_boundary_reduction speculative_use_block_verification
        speculative_draft_sink_size speculative_ngram_min_bfs_breadth
        speculative_ngram_max_bfs_breadth speculative_ngram_match_type
        speculative_ngram_max_trie_depth speculative_ngram_capacity
        speculative_ngram_external_corpus_path speculative_ngram_external_sam_budget
        speculative_ngram_external_corpus_max_tokens decoupled_spec_bind_endpoint
        decoupled_spec_connect_endpoints decoupled_spec_rank decrypted_draft_config_file
        enable_draft_weights_cpu_backup hicache_host_memory_mode hicache_ratio hicache_size
        hicache_write_policy hicache_io_backend hicache_mem_layout hicache_storage_prefetch_policy
        hicache_storage_backend_extra_config hicache_storage_prefetch_retry_poll_interval
        hicache_storage_prefetch_retry_max_attempts hicache_host_memory_fraction
        unified_cache_external_linker_backend unified_cache_external_linker_config
        enable_linker_mla_dedup hisparse_config lmcache_config_file flexkv_config_file
        dllm_algorithm_config dllm_fdfo disaggregation_transfer_backend
        disaggregation_bootstrap_port disaggregation_ib_device
        disaggregation_decode_enable_radix_cache disaggregation_decode_enable_offload_kvcache
        disaggregation_decode_retraction_backup num_reserved_decode_tokens
        disaggregation_decode_extra_slots disaggregation_decode_polling_interval
        optimistic_prefill_attempts disaggregation_enable_kv_checksum
        disaggregation_decode_host_receive_threshold disaggregation_decode_allocation_policy
        encoder_transfer_backend encoder_urls encoder_bootstrap_port encoder_register_urls
        enable_adaptive_dispatch_to_encoder pdmux_config_path sm_group_num
        tbo_token_distribution_threshold pp_max_micro_batch_size pp_async_batch_depth
        dcp_comm_backend dcp_replicate_q_proj cp_strategy enable_cp_decode_attn_tp
        enable_cp_tp_group_sharing enable_dp_attention_local_control_broadcast enable_dp_lm_head
        enable_tp_lm_head_all_to_all enable_shared_experts_attn_tp enable_dense_mlp_attn_tp
        moe_dense_tp_size disable_attn_tp_gather grpc_port grpc_worker_threads
        grpc_response_timeout_secs sidecar_args elastic_ep_initial_size max_ep_size
        elastic_ep_scale_timeout ep_join_rank_offset enable_elastic_expert_backup
        kv_canary_real_data kv_canary_sweep_interval watermark_config watermark_key
        watermark_key_b watermark_context_window watermark_mixing_probability
        watermark_max_probability watermark_default_enabled watermark_enforce_all
        return_aux_hidden_state_layer_ids sampling_mask_max_tokens
        prefill_delayer_max_delay_passes prefill_delayer_token_usage_low_watermark
        prefill_delayer_forward_passes_buckets prefill_delayer_wait_seconds_buckets
        prefill_delayer_queue_min_ratio prefill_delayer_max_delay_ms
        enable_torch_compile_debug_mode torch_compile_max_bs
        _radix_eviction_policy_explicitly_set
    """,
}

IRRELEVANT = {reason: tuple(names.split()) for reason, names in _GROUPS.items()}
"""Reason to flags, by their names in SGLang's `ServerArgs`."""
