"""Every seam of SGLang that is touched: the only list there is, read by the guard and by tests.

`role` says where a seam is applied: `bootstrap` in every process, `frontend` in the process that
parses requests, `scheduler` in each scheduler process. The last two only with memento enabled.
`page` goes with `frontend` where that process serves HTTP, unless the page is turned off.
`python -m memento_patches.ledger` prints the targets whose source differs from the fingerprint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SGLANG_VERSION = "0.5.17"


@dataclass(frozen=True, slots=True)
class Seam:
    """One wrapped function of SGLang 0.5.17.

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


_BATCH = "sglang.srt.managers.schedule_batch"
_POLICY = "sglang.srt.managers.schedule_policy.PrefillAdder"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_TOKENIZER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_OPENAI = "sglang.srt.entrypoints.openai"
_STREAMER = "sglang.srt.managers.scheduler_components.output_streamer"

LEDGER: tuple[Seam, ...] = (
    Seam(
        target="sglang.srt.server_args.ServerArgs.add_cli_args",
        kind="AFTER",
        hook="server_args:add_cli_args",
        role="bootstrap",
        why="the --enable-memento and --memento-* flags",
        retire="an argument hook for plugins",
        fingerprint="0acc07dc354bfa76",
    ),
    Seam(
        target="sglang.srt.server_args.ServerArgs.from_cli_args",
        kind="AROUND",
        hook="server_args:from_cli_args",
        role="bootstrap",
        why="check the flags and the model before anything is started",
        retire="an argument hook for plugins",
        fingerprint="74460fbf23feea26",
    ),
    Seam(
        target=f"{_SCHEDULER}.__init__",
        kind="BEFORE",
        hook="scheduler:before_init",
        role="bootstrap",
        why="apply the scheduler's seams in its own process, only when enabled",
        retire="plugins that see the server arguments",
        fingerprint="ef18a94255e45fd5",
    ),
    Seam(
        target=f"{_TOKENIZER}._create_tokenized_object",
        kind="BEFORE",
        hook="tokenizer_manager:check_request",
        role="frontend",
        why="answer 400 to bad per-request options",
        retire="a request validation hook",
        fingerprint="318a56ace9818507",
    ),
    Seam(
        target=f"{_TOKENIZER}._handle_batch_output",
        kind="BEFORE",
        hook="tokenizer_manager:take_records",
        role="frontend",
        why="take the accounting out of the per-token side channel",
        retire="per-request customized_info",
        fingerprint="2a7f3f978ae1bbf2",
    ),
    Seam(
        target=f"{_TOKENIZER}._wait_one_response",
        kind="AROUND",
        hook="tokenizer_manager:add_record",
        role="frontend",
        why='meta_info["memento"] of the final answer',
        retire="per-request customized_info",
        fingerprint="e17db51a1d5dad32",
    ),
    Seam(
        target=f"{_OPENAI}.serving_chat.OpenAIServingChat._process_messages",
        kind="BEFORE",
        hook="openai_serving:warn_of_dropped_system",
        role="frontend",
        why="a template that drops system messages must not do so silently",
        retire="templates that can log",
        fingerprint="4054f88990f62b90",
    ),
    Seam(
        target=f"{_OPENAI}.serving_chat.OpenAIServingChat._patch_reasoning_skip_special_tokens",
        kind="AFTER",
        hook="reasoning:keep_tags",
        role="frontend",
        why="tags that are special tokens must reach the reasoning parser",
        retire="a detector that says which tokens it needs",
        fingerprint="792be2bf7d6d44cf",
    ),
    Seam(
        target="sglang.srt.parser.reasoning_parser.ReasoningParser.__init__",
        kind="AFTER",
        hook="reasoning:adapt_parser",
        role="frontend",
        why="the reasoning parser depends on the markers, the request's options and its prompt",
        retire="detectors that see the request",
        fingerprint="920f3ab10787ee1a",
    ),
    Seam(
        target=f"{_OPENAI}.serving_chat.OpenAIServingChat._build_chat_response",
        kind="AFTER",
        hook="openai_serving:add_metadata",
        role="frontend",
        why="accounting in chat completions",
        retire="an extension point for response metadata",
        fingerprint="b36debeb58b8d7b5",
    ),
    Seam(
        target=f"{_OPENAI}.serving_chat.OpenAIServingChat._generate_chat_stream",
        kind="AROUND",
        hook="openai_serving:add_stream_metadata",
        role="frontend",
        why="accounting in the final chunk of a chat stream",
        retire="an extension point for response metadata",
        fingerprint="df524df1eb1de040",
    ),
    Seam(
        target=f"{_OPENAI}.serving_completions.OpenAIServingCompletion._build_completion_response",
        kind="AFTER",
        hook="openai_serving:add_metadata",
        role="frontend",
        why="accounting in completions",
        retire="an extension point for response metadata",
        fingerprint="3ce0d4effe8cf218",
    ),
    Seam(
        target=f"{_OPENAI}.serving_completions.OpenAIServingCompletion._generate_completion_stream",
        kind="AROUND",
        hook="openai_serving:add_stream_metadata",
        role="frontend",
        why="accounting in the final chunk of a completion stream",
        retire="an extension point for response metadata",
        fingerprint="97cf189000a933f4",
    ),
    Seam(
        target="sglang.srt.entrypoints.http_server._setup_and_run_http_server",
        kind="BEFORE",
        hook="page:add_page",
        role="page",
        why="the page at /memento on the server's own port",
        retire="routes from plugins",
        fingerprint="2e3fa3776d38713a",
    ),
    Seam(
        target="sglang.srt.utils.auth.decide_request_auth",
        kind="AROUND",
        hook="page:let_page_through",
        role="page",
        why="a browser opens the page before it can be given the API key",
        retire="an auth level for public endpoints",
        fingerprint="dd4099e7eaa1d7fa",
    ),
    Seam(
        target="sglang.srt.managers.scheduler_components.load_inquirer"
        ".SchedulerLoadInquirer.get_loads",
        kind="AFTER",
        hook="page:add_to_snapshot",
        role="scheduler",
        why="evictions and missing tokens ride along with the published load",
        retire="fields of plugins in load snapshots",
        fingerprint="5c5adb35ffe20650",
    ),
    Seam(
        target=f"{_SCHEDULER}.init_overlap",
        kind="AFTER",
        hook="scheduler:attach",
        role="scheduler",
        why="bind to the request table and the relay of sampled tokens",
        retire="a plugin callback after scheduler set-up",
        fingerprint="6649af9f6cd80c48",
    ),
    Seam(
        target=f"{_SCHEDULER}.update_running_batch",
        kind="BEFORE",
        hook="scheduler:before_decode",
        role="scheduler",
        why="evict before memory is checked and the next decode step is prepared",
        retire="a scheduler callback before decode",
        fingerprint="5d4e056357a4e536",
    ),
    Seam(
        target=f"{_SCHEDULER}.process_batch_result",
        kind="AROUND",
        hook="scheduler:around_result",
        role="scheduler",
        why="skip voided steps; find evictions that became due",
        retire="a per-request result callback",
        fingerprint="89adb4bce2136e96",
    ),
    Seam(
        target=f"{_BATCH}.Req.__init__",
        kind="AFTER",
        hook="schedule_batch:after_init",
        role="scheduler",
        why="attach the request's state",
        retire="typed plugin state on requests",
        fingerprint="1347346eb958f3e5",
    ),
    Seam(
        target=f"{_BATCH}.Req._refresh_fill_ids",
        kind="AROUND",
        hook="schedule_batch:around_refresh_fill_ids",
        role="scheduler",
        why="the row of a request with evictions holds its visible tokens only",
        retire="row coordinates upstream",
        fingerprint="a197422d9161fd97",
    ),
    Seam(
        target=f"{_BATCH}.release_req",
        kind="BEFORE",
        hook="schedule_batch:before_release_req",
        role="scheduler",
        why="a retracted request leaves its KV in the radix tree",
        retire="insertion on retraction upstream",
        fingerprint="d4331967c8e9c257",
    ),
    Seam(
        target=f"{_BATCH}.Req.reset_for_retract",
        kind="AFTER",
        hook="schedule_batch:after_reset_for_retract",
        role="scheduler",
        why="a retracted row is rebuilt by replaying its evictions",
        retire="row coordinates upstream",
        fingerprint="e07f9ccbd55de682",
    ),
    Seam(
        target=f"{_BATCH}.ScheduleBatch.prepare_for_extend",
        kind="AFTER",
        hook="schedule_batch:after_prepare_for_extend",
        role="scheduler",
        why="position offsets of the slots that a prefill uses",
        retire="logical positions upstream",
        fingerprint="27862b721630c623",
    ),
    Seam(
        target=f"{_BATCH}.ScheduleBatch.cumulate_penalty_output_tokens",
        kind="AFTER",
        hook="penalties:after_cumulate",
        role="scheduler",
        why="a step that is done again counts once for penalties",
        retire="penalties that count tokens, not steps",
        fingerprint="a715a7ca367dc440",
    ),
    Seam(
        target=f"{_POLICY}.__init__",
        kind="AFTER",
        hook="prefill:after_adder_init",
        role="scheduler",
        why="reserve what running requests will hold after their evictions",
        retire="a reservation hook in the prefill policy",
        fingerprint="5b450328ed853f7d",
    ),
    Seam(
        target=f"{_SCHEDULER}.init_req_max_new_tokens",
        kind="AROUND",
        hook="limits:around_init_max_new_tokens",
        role="scheduler",
        why="a request that evicts may write more tokens than the pool holds",
        retire="separate limits for tokens and rows",
        fingerprint="202ef3e52b64e95b",
    ),
    Seam(
        target="sglang.srt.managers.utils.validate_input_length",
        kind="AROUND",
        hook="limits:around_validate_input_length",
        role="scheduler",
        why="a prompt whose finished blocks make it fit is accepted",
        retire="separate limits for tokens and rows",
        fingerprint="0c70e9bceaafac1c",
    ),
    Seam(
        target=f"{_BATCH}.ScheduleBatch.retract_decode",
        kind="AFTER",
        hook="limits:after_retract_decode",
        role="scheduler",
        why="a request that outgrows the pool ends with its output and what to do",
        retire="output in SGLang's own out-of-memory abort",
        fingerprint="11db2dfbea85770b",
    ),
    Seam(
        target=f"{_POLICY}.add_one_req",
        kind="AROUND",
        hook="prefill:around_add_one_req",
        role="scheduler",
        why="a prefill ends before each eviction point; reserve what a request will hold",
        retire="segment ends in the prefill policy",
        fingerprint="5e88d3ab43c32b9e",
    ),
    Seam(
        target=f"{_POLICY}.add_chunked_req",
        kind="AROUND",
        hook="prefill:around_add_chunked_req",
        role="scheduler",
        why="evict between the segments of a prefill",
        retire="segment ends in the prefill policy",
        fingerprint="bd89cdcf19fcb51e",
    ),
    Seam(
        target="sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
        kind="AFTER",
        hook="forward:after_init_new",
        role="scheduler",
        why="rope positions are logical while rows are physical",
        retire="logical positions upstream",
        fingerprint="9f0c899f3ac9a7cc",
    ),
    Seam(
        target="sglang.srt.model_executor.model_runner.ModelRunner.sample",
        kind="AROUND",
        hook="forward:around_sample",
        role="scheduler",
        why="constrained emission",
        retire="custom constraints on the device",
        fingerprint="223dc64369624dc2",
    ),
    Seam(
        target="sglang.srt.constrained.reasoner_grammar_backend.ReasonerGrammarBackend.__init__",
        kind="BEFORE",
        hook="grammar:before_reasoner_init",
        role="scheduler",
        why="a reasoning parser breaks constrained answers with outlines and llguidance",
        retire="mask functions on the base class of grammar backends",
        fingerprint="ee90ae3f4f1ae4b8",
    ),
    Seam(
        target=f"{_STREAMER}.SchedulerOutputStreamer._stream_output_generation",
        kind="BEFORE",
        hook="output:before_stream",
        role="scheduler",
        why="which requests a message is about",
        retire="per-request customized_info",
        fingerprint="aa576ead853eecd1",
    ),
    Seam(
        target=f"{_STREAMER}._GenerationStreamAccumulator.to_payload",
        kind="BEFORE",
        hook="output:before_payload",
        role="scheduler",
        why="send a finished request's accounting along",
        retire="per-request customized_info",
        fingerprint="a304dd7182c1ad89",
    ),
)


def seams(role: str) -> list[Seam]:
    """The seams of one role."""
    return [seam for seam in LEDGER if seam.role == role]


if __name__ == "__main__":
    from memento_patches.guard import fingerprint

    for seam in LEDGER:
        if (now := fingerprint(seam.target)) != seam.fingerprint:
            print(f"{seam.target}\t{seam.fingerprint or '-'}\t{now}")
