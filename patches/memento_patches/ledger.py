"""Every seam of SGLang that is touched: the only list there is, read by the guard and by tests.

`LEDGER` lists what is wrapped, `RELIED` what is not, but has to stay as it is.

`role` says where a seam is applied: `bootstrap` in every process, `frontend` in the process that
parses requests, `scheduler` in each scheduler process. The last two only with memento enabled.
`page` goes with `frontend` where that process serves HTTP, unless the page is turned off.
`python -m memento_patches.ledger` prints the targets whose source differs from the fingerprint;
`python -m memento_patches.compare` compares two installed versions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SGLANG_VERSION = "0.5.23"


@dataclass(frozen=True, slots=True)
class Seam:
    """One wrapped function of SGLang 0.5.23.

    Attributes:
        target: dotted name of the function.
        kind: how it is wrapped (`HookType` of SGLang).
        hook: `module:function` inside this package.
        why: what it is needed for.
        retire: what SGLang would have to offer for it to go.
        fingerprint: see `guard.fingerprint`.
    """

    target: str
    kind: Literal["BEFORE", "AFTER", "AROUND"]
    hook: str
    role: Literal["bootstrap", "frontend", "page", "scheduler"]
    why: str
    retire: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Relied:
    """Code of SGLang that is not wrapped, but whose text ours depends on.

    Attributes:
        target: dotted name of the function.
        what: what about it.
        fingerprint: see `guard.fingerprint`.
    """

    target: str
    what: str
    fingerprint: str


_BATCH = "sglang.srt.managers.schedule_batch"
_POLICY = "sglang.srt.managers.schedule_policy.PrefillAdder"
_PROCESSOR = (
    "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
)
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_TOKENIZER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_OPENAI = "sglang.srt.entrypoints.openai"
_ANTHROPIC = "sglang.srt.entrypoints.anthropic.serving.AnthropicServing"
_OLLAMA = "sglang.srt.entrypoints.ollama.serving.OllamaServing"
_WEIGHTS = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"

LEDGER: tuple[Seam, ...] = (
    Seam(
        target="sglang.srt.server_args.ServerArgs.add_cli_args",
        kind="AFTER",
        hook="server_args:add_cli_args",
        role="bootstrap",
        why="the --enable-memento and --memento-* flags",
        retire="an argument hook for plugins",
        fingerprint="df3d3401de761b19",
    ),
    Seam(
        target="sglang.srt.server_args.ServerArgs.from_cli_args",
        kind="AROUND",
        hook="server_args:from_cli_args",
        role="bootstrap",
        why="check the flags and the model before anything is started",
        retire="an argument hook for plugins",
        fingerprint="c3fd183233a8b816",
    ),
    Seam(
        target=f"{_SCHEDULER}.__init__",
        kind="AROUND",
        hook="scheduler:around_init",
        role="bootstrap",
        why="apply the scheduler's seams in its own process, only when enabled; bind to its pools",
        retire="plugins that see the server arguments, and a callback after scheduler set-up",
        fingerprint="93ad4787d25f76ee",
    ),
    Seam(
        target=f"{_TOKENIZER}.generate_request",
        kind="AROUND",
        hook="requests_in:check_call",
        role="frontend",
        why="answer 400 to calls that would end the server, before requests are built of them",
        retire="a request validation hook",
        fingerprint="21bc72224c6ac4e4",
    ),
    Seam(
        target=f"{_TOKENIZER}._create_tokenized_object",
        kind="AFTER",
        hook="requests_in:check_tokenized",
        role="frontend",
        why="answer 400 to bad options, and to what would end the scheduler",
        retire="a request validation hook",
        fingerprint="686ca460c80fadab",
    ),
    Seam(
        target=f"{_TOKENIZER}.update_request_meta_info",
        kind="AROUND",
        hook="tokenizer_manager:add_record",
        role="frontend",
        why='meta_info["memento"] of the final answer: one value, where SGLang gathers lists',
        retire="customized_info that is one value per request",
        fingerprint="137a4e82ed8771de",
    ),
    Seam(
        target="sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin.get_internal_state",
        kind="AROUND",
        hook="tokenizer_manager:tell_options",
        role="frontend",
        why="the server's options in /server_info, by which clients follow evictions",
        retire="fields of plugins in the server's information",
        fingerprint="c4a7cbb66e34363e",
    ),
    Seam(
        target=f"{_OPENAI}.serving_chat.OpenAIServingChat._process_messages",
        kind="BEFORE",
        hook="openai_serving:warn_of_dropped_system",
        role="frontend",
        why="a template that drops system messages must not do so silently",
        retire="templates that can log",
        fingerprint="80c3dd4837287a83",
    ),
    Seam(
        target=f"{_OPENAI}.serving_chat.OpenAIServingChat._patch_reasoning_skip_special_tokens",
        kind="AFTER",
        hook="reasoning:keep_tags",
        role="frontend",
        why="tags that are special tokens must reach the reasoning parser",
        retire="a detector that says which tokens it needs",
        fingerprint="5325acf55d008b64",
    ),
    Seam(
        target="sglang.srt.parser.reasoning_parser.ReasoningParser.__init__",
        kind="AFTER",
        hook="reasoning:adapt_parser",
        role="frontend",
        why="the reasoning parser depends on the markers, the request's options and its prompt",
        retire="detectors that see the request",
        fingerprint="0ca76ebd2ed90c74",
    ),
    Seam(
        target=f"{_OPENAI}.serving_chat.OpenAIServingChat._build_chat_response",
        kind="AFTER",
        hook="openai_serving:add_metadata",
        role="frontend",
        why="accounting in chat completions",
        retire="an extension point for response metadata",
        fingerprint="5ce2f980064ba9c0",
    ),
    Seam(
        target=f"{_OPENAI}.serving_chat.OpenAIServingChat._generate_chat_stream",
        kind="AROUND",
        hook="openai_serving:add_stream_metadata",
        role="frontend",
        why="accounting in the final chunk of a chat stream",
        retire="an extension point for response metadata",
        fingerprint="564bfc9d5f263b8c",
    ),
    Seam(
        target=f"{_OPENAI}.serving_completions.OpenAIServingCompletion._build_completion_response",
        kind="AFTER",
        hook="openai_serving:add_metadata",
        role="frontend",
        why="accounting in completions",
        retire="an extension point for response metadata",
        fingerprint="9af59ebbd4bfe18f",
    ),
    Seam(
        target=f"{_OPENAI}.serving_completions.OpenAIServingCompletion._generate_completion_stream",
        kind="AROUND",
        hook="openai_serving:add_stream_metadata",
        role="frontend",
        why="accounting in the final chunk of a completion stream",
        retire="an extension point for response metadata",
        fingerprint="fe1d7b5f8571fc1f",
    ),
    Seam(
        target=f"{_OPENAI}.serving_responses.OpenAIServingResponses.create_responses",
        kind="AROUND",
        hook="other_answers:record_responses",
        role="frontend",
        why="accounting in the Responses interface",
        retire="an extension point for response metadata",
        fingerprint="e489540af6f92d8d",
    ),
    Seam(
        target=f"{_ANTHROPIC}._convert_response",
        kind="AFTER",
        hook="other_answers:add_to_message",
        role="frontend",
        why="accounting in messages",
        retire="an extension point for response metadata",
        fingerprint="219796f1bc887571",
    ),
    Seam(
        target=f"{_ANTHROPIC}._generate_anthropic_stream",
        kind="AROUND",
        hook="other_answers:record_message_stream",
        role="frontend",
        why="accounting in a stream of messages",
        retire="an extension point for response metadata",
        fingerprint="0cd586a657ad551d",
    ),
    Seam(
        target=f"{_OLLAMA}.handle_chat",
        kind="AROUND",
        hook="other_answers:record_ollama",
        role="frontend",
        why="accounting in Ollama's chats",
        retire="an extension point for response metadata",
        fingerprint="5478084d6d26e510",
    ),
    Seam(
        target=f"{_OLLAMA}.handle_generate",
        kind="AROUND",
        hook="other_answers:record_ollama",
        role="frontend",
        why="accounting in Ollama's completions",
        retire="an extension point for response metadata",
        fingerprint="2fe20aecf37799f0",
    ),
    Seam(
        target="sglang.srt.entrypoints.http_server._setup_and_run_http_server",
        kind="BEFORE",
        hook="page:add_page",
        role="page",
        why="the page at /memento on the server's own port",
        retire="routes from plugins",
        fingerprint="7b68d6a8a80953ba",
    ),
    Seam(
        target="sglang.srt.utils.auth.decide_request_auth",
        kind="AROUND",
        hook="page:let_page_through",
        role="page",
        why="a browser opens the page before it can be given the API key",
        retire="an auth level for public endpoints",
        fingerprint="ba9f3a6b2d1cec33",
    ),
    Seam(
        target="sglang.srt.managers.scheduler_components.load_inquirer"
        ".SchedulerLoadInquirer.get_loads",
        kind="AFTER",
        hook="page:add_to_snapshot",
        role="scheduler",
        why="evictions and missing tokens ride along with the published load",
        retire="fields of plugins in load snapshots",
        fingerprint="9a52f7d0f88b405e",
    ),
    Seam(
        target=f"{_SCHEDULER}.update_running_batch",
        kind="AROUND",
        hook="scheduler:around_decode",
        role="scheduler",
        why="evict before memory is checked and the next decode step is prepared",
        retire="a scheduler callback before decode",
        fingerprint="423efd2207bcaef1",
    ),
    Seam(
        target=f"{_SCHEDULER}._should_defer_prefill",
        kind="AFTER",
        hook="scheduler:between_segments",
        role="scheduler",
        why="decode steps of other requests run between the segments of a prompt",
        retire="a prefill interval that a prefill policy can set",
        fingerprint="ed4f8b727d43049c",
    ),
    Seam(
        target=f"{_SCHEDULER}._reqs_finishing_inflight",
        kind="AFTER",
        hook="scheduler:not_voided",
        role="scheduler",
        why="a step in flight that is going to be ignored does not finish its request",
        retire="a per-request result callback",
        fingerprint="9708f74c69d9e13b",
    ),
    Seam(
        target=f"{_SCHEDULER}.process_batch_result",
        kind="AROUND",
        hook="scheduler:around_result",
        role="scheduler",
        why="skip voided steps; find evictions that became due",
        retire="a per-request result callback",
        fingerprint="a67c683e53477b43",
    ),
    Seam(
        target=f"{_BATCH}.Req.__init__",
        kind="AFTER",
        hook="schedule_batch:after_init",
        role="scheduler",
        why="attach the request's state",
        retire="typed plugin state on requests",
        fingerprint="e0df8400c10c643f",
    ),
    Seam(
        target=f"{_BATCH}.Req.set_finish_with_abort",
        kind="AFTER",
        hook="schedule_batch:after_set_finish_with_abort",
        role="scheduler",
        why="a refused request loses its prompt, and its state with it",
        retire="typed plugin state on requests",
        fingerprint="5bb6b0420127677a",
    ),
    Seam(
        target=f"{_BATCH}.Req.refresh_fill_ids",
        kind="AROUND",
        hook="schedule_batch:around_refresh_fill_ids",
        role="scheduler",
        why="the row of a request with evictions holds its visible tokens only",
        retire="row coordinates upstream",
        fingerprint="3bf8d057538660e5",
    ),
    Seam(
        target=f"{_BATCH}.release_req",
        kind="BEFORE",
        hook="schedule_batch:before_release_req",
        role="scheduler",
        why="a retracted request leaves its KV in the radix tree",
        retire="insertion on retraction upstream",
        fingerprint="e9a690b5c7084bb5",
    ),
    Seam(
        target=f"{_BATCH}.Req.reset_for_retract",
        kind="AFTER",
        hook="schedule_batch:after_reset_for_retract",
        role="scheduler",
        why="a retracted row is rebuilt by replaying its evictions",
        retire="row coordinates upstream",
        fingerprint="0b95c75babd5f3b1",
    ),
    Seam(
        target=f"{_BATCH}.ScheduleBatch.prepare_for_extend",
        kind="AFTER",
        hook="schedule_batch:after_prepare_for_extend",
        role="scheduler",
        why="position offsets of the slots that a prefill uses",
        retire="logical positions upstream",
        fingerprint="fa20f429824aa4ee",
    ),
    Seam(
        target=f"{_BATCH}.ScheduleBatch.cumulate_penalty_output_tokens",
        kind="AROUND",
        hook="penalties:around_cumulate",
        role="scheduler",
        why="a step that is done again counts once for penalties",
        retire="penalties that count tokens, not steps",
        fingerprint="a715a7ca367dc440",
    ),
    Seam(
        target=f"{_SCHEDULER}.get_prefill_adder_class",
        kind="AFTER",
        hook="prefill:adder_class",
        role="scheduler",
        why="a prefill ends before each eviction point; reserve what a request will hold",
        retire="a way for plugins to name the class; segment ends and reservation as methods",
        fingerprint="0368e9a0835e2278",
    ),
    Seam(
        target=f"{_SCHEDULER}.get_output_streamer_class",
        kind="AFTER",
        hook="output:streamer_class",
        role="scheduler",
        why="send a finished request's accounting along",
        retire="a way for plugins to name the class",
        fingerprint="577ec75cd314180d",
    ),
    Seam(
        target=f"{_SCHEDULER}.init_req_max_new_tokens",
        kind="AROUND",
        hook="lengths:around_init_max_new_tokens",
        role="scheduler",
        why="a request that evicts may write more tokens than the pool holds",
        retire="separate limits for tokens and rows",
        fingerprint="1abc60c5742826f1",
    ),
    Seam(
        target="sglang.srt.managers.utils.validate_input_length",
        kind="AROUND",
        hook="lengths:around_validate_input_length",
        role="scheduler",
        why="a prompt whose finished blocks make it fit is accepted",
        retire="separate limits for tokens and rows",
        fingerprint="0c70e9bceaafac1c",
    ),
    Seam(
        target=f"{_BATCH}.ScheduleBatch.retract_decode",
        kind="AFTER",
        hook="lengths:after_retract_decode",
        role="scheduler",
        why="a request that outgrows the pool ends with its output and what to do",
        retire="output in SGLang's own out-of-memory abort",
        fingerprint="02ab71312420ca65",
    ),
    Seam(
        target="sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
        kind="AFTER",
        hook="forward:after_init_new",
        role="scheduler",
        why="rope positions are logical while rows are physical",
        retire="logical positions upstream",
        fingerprint="a8507017588bae5b",
    ),
    Seam(
        target="sglang.srt.model_executor.model_runner.ModelRunner.sample",
        kind="AROUND",
        hook="forward:around_sample",
        role="scheduler",
        why="constrained emission",
        retire="custom constraints on the device",
        fingerprint="274c34149a33b550",
    ),
    Seam(
        target="sglang.srt.constrained.reasoner_grammar_backend.ReasonerGrammarBackend.__init__",
        kind="BEFORE",
        hook="grammar:before_reasoner_init",
        role="scheduler",
        why="a reasoning parser breaks constrained answers with outlines and llguidance",
        retire="mask functions on the base class of grammar backends",
        fingerprint="6996b9d6ed4c1f93",
    ),
    Seam(
        target=f"{_WEIGHTS}.update_weights_from_disk",
        kind="AROUND",
        hook="weights:around_load",
        role="scheduler",
        why="KV is named by the weights that computed it",
        retire="a weight version in SGLang's cache keys",
        fingerprint="b67dc2a5cf3170ee",
    ),
    Seam(
        target=f"{_WEIGHTS}.update_weights_from_distributed",
        kind="AROUND",
        hook="weights:around_load",
        role="scheduler",
        why="KV is named by the weights that computed it",
        retire="a weight version in SGLang's cache keys",
        fingerprint="b059149de4f9db82",
    ),
    Seam(
        target=f"{_WEIGHTS}.update_weights_from_tensor",
        kind="AROUND",
        hook="weights:around_load",
        role="scheduler",
        why="KV is named by the weights that computed it",
        retire="a weight version in SGLang's cache keys",
        fingerprint="a4090c8ac4ac997e",
    ),
    Seam(
        target=f"{_WEIGHTS}.update_weights_from_ipc",
        kind="AROUND",
        hook="weights:around_load",
        role="scheduler",
        why="KV is named by the weights that computed it",
        retire="a weight version in SGLang's cache keys",
        fingerprint="95b259ffd946a8ac",
    ),
    Seam(
        target=f"{_WEIGHTS}.end_weight_update",
        kind="AROUND",
        hook="weights:around_load",
        role="scheduler",
        why="weights may have been written from outside meanwhile (RDMA)",
        retire="a weight version in SGLang's cache keys",
        fingerprint="7cd4623a8689f548",
    ),
    Seam(
        target=f"{_WEIGHTS}.resume_memory_occupation",
        kind="AROUND",
        hook="weights:around_load",
        role="scheduler",
        why="weights or KV come back without their content",
        retire="a weight version in SGLang's cache keys",
        fingerprint="363929aa4d9ef3a4",
    ),
    Seam(
        target=f"{_WEIGHTS}.release_memory_occupation",
        kind="AROUND",
        hook="weights:around_release",
        role="scheduler",
        why="on a CPU it would end the server of a torch that was built with CUDA",
        retire="a wait for the device in use upstream",
        fingerprint="ca8fd1908a792450",
    ),
    Seam(
        target=f"{_WEIGHTS}.check_weights",
        kind="AROUND",
        hook="weights:around_check",
        role="scheduler",
        why="one of its actions overwrites the weights",
        retire="a weight version in SGLang's cache keys",
        fingerprint="2c88eb372020a5bd",
    ),
)

RELIED: tuple[Relied, ...] = (
    Relied(
        target=f"{_SCHEDULER}.event_loop_overlap",
        what="one step in flight; its result is processed behind the next launch",
        fingerprint="a6c1681f722ae8cc",
    ),
    Relied(
        target=f"{_SCHEDULER}.event_loop_normal",
        what="results are processed before the next step is prepared",
        fingerprint="e1b4f1cdca2d5dfd",
    ),
    Relied(
        target=f"{_SCHEDULER}._get_new_batch_prefill_raw",
        what="when the prefill policy is asked, and with what",
        fingerprint="66a87afb599075e1",
    ),
    Relied(
        target=f"{_POLICY}.__init__",
        what="which budgets exist, and what they start from",
        fingerprint="901ca00e6d44aff4",
    ),
    Relied(
        target=f"{_POLICY}.add_one_req",
        what="what a request reserves, and `stock_reservation` with it",
        fingerprint="194314fb5aba05df",
    ),
    Relied(
        target=f"{_POLICY}._select_prefill_admission",
        what="where a first chunk ends",
        fingerprint="3833a5a43c97d0c8",
    ),
    Relied(
        target=f"{_POLICY}._commit_prefill_admission",
        what="what a request has once it is let in",
        fingerprint="1d1f77036b3dc608",
    ),
    Relied(
        target=f"{_POLICY}.add_chunked_req",
        what="where a later chunk ends",
        fingerprint="59878bb13f9146e0",
    ),
    Relied(
        target="sglang.srt.mem_cache.prefill_budget.PrefillBudget.reserve",
        what="what counts for the pages of a request",
        fingerprint="01982b032f36ac4f",
    ),
    Relied(
        target=f"{_BATCH}.Req.init_next_round_input",
        what="fill ids, match and limits are set in this order",
        fingerprint="53d797a0a57b13b3",
    ),
    Relied(
        target=f"{_BATCH}.Req.owned_kv_len",
        what="a finished request frees no row behind this",
        fingerprint="6ede0771a67e3f76",
    ),
    Relied(
        target=f"{_BATCH}.ScheduleBatch.prepare_for_decode",
        what="lengths grow by one, behind the eviction",
        fingerprint="16de54dc492520ad",
    ),
    Relied(
        target=f"{_PROCESSOR}.process_batch_result_decode",
        what="retracted requests are skipped under overlap scheduling",
        fingerprint="038c21b9d5a79038",
    ),
    Relied(
        target="sglang.srt.managers.overlap_utils.resolve_forward_inputs",
        what="the next input token is read from `output_tokens_buf`",
        fingerprint="961cfa7af7ccd2a6",
    ),
    Relied(
        target=f"{_SCHEDULER}.pause_generation",
        what="the step in flight is processed before requests are retracted, or kept in place",
        fingerprint="c6c55b22c6b4242b",
    ),
    Relied(
        target=f"{_SCHEDULER}.flush_cache",
        what="the tree is reset only while no request holds a row",
        fingerprint="c34e3f6a3309557f",
    ),
    Relied(
        target="sglang.srt.mem_cache.common.release_kv_cache",
        what="who frees what when a request ends",
        fingerprint="90e19434d1fa8c22",
    ),
    Relied(
        target="sglang.srt.mem_cache.common.checkpoint_kv_cache",
        what="when a running request's rows go into the tree",
        fingerprint="61d4ff19b3d53de6",
    ),
    Relied(
        target="sglang.srt.mem_cache.allocation.alloc_for_extend",
        what="a row is written from the matched prefix or kept",
        fingerprint="79929fe4dbc6fcec",
    ),
    Relied(
        target="sglang.srt.mem_cache.allocation.alloc_for_decode",
        what="the slot behind the row is `seq_lens`",
        fingerprint="7ce46f3b7f4bf5be",
    ),
    Relied(
        target="sglang.srt.mem_cache.memory_pool.MHATokenToKVPool.move_kv_cache",
        what="the native copy reads all before it writes",
        fingerprint="d25ac9ef894e2ad7",
    ),
    Relied(
        target="sglang.srt.managers.scheduler_components.output_streamer"
        ".SchedulerOutputStreamer._stream_output_generation",
        what="when the accounting is asked for",
        fingerprint="780af7bac6eeb18d",
    ),
    Relied(
        target=f"{_TOKENIZER}._handle_batch_output",
        what="`meta_info` goes out with the answer it was made for",
        fingerprint="f1b8fa668166772d",
    ),
    Relied(
        target="sglang.srt.managers.load_snapshot.ShmLoadSnapshotReader._read_slot",
        what="load snapshots are read with the module's decoder, which the page replaces",
        fingerprint="d05ba5e30f5f3316",
    ),
)


def seams(role: str) -> list[Seam]:
    """The seams of one role."""
    return [seam for seam in LEDGER if seam.role == role]


if __name__ == "__main__":
    from memento_patches.guard import fingerprint

    entries: list[Seam | Relied] = [*LEDGER, *RELIED]
    for entry in entries:
        if (now := fingerprint(entry.target)) != entry.fingerprint:
            print(f"{entry.target}\t{entry.fingerprint or '-'}\t{now}")
