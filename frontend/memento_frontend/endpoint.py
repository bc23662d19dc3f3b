"""SGLang's frontend language on token ids: the backend of `sgl.function` programs.

SGLang's own endpoint sends the text of a program again with each call, and the server tokenises it
again. Here a program keeps its token ids beside its text: what was generated goes back as the ids
that the server gave, and only text that the program itself adds is tokenised, piece by piece. So
each call continues exactly where the last one ended, and reuses its KV.

    stop_token_ids   the token stays, in text and ids
    </think>         as a stop string: stays, where it is several tokens
    other strings    cut off, as SGLang does; that one output is tokenised again
    end of sequence  dropped: a program may go on behind it
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.choices import (
    ChoicesDecision,
    greedy_token_selection,
    token_length_normalized,
)
from sglang.lang.interpreter import ProgramState, StreamExecutor
from sglang.lang.ir import SglSamplingParams

from memento_frontend.native import THINK_END, NativeClient, Output, Prompt
from memento_sgl.address import DEFAULT_URL
from memento_sgl.errors import ConfigError

# Among the variables of a program, because those are what its forks take along.
TRACE = "memento.trace"
OPTIONS = "memento.options"
SELECT_BIAS = 200.0
"""Added to the logits of choices: far above all others, and small enough to keep their order."""
LOGPROBS = ("return_logprob", "logprob_start_len", "top_logprobs_num", "return_text_in_logprobs")


@dataclass(frozen=True, slots=True)
class Trace:
    """A program's text as the server knows it. Model text starts at logical index `start`."""

    text: str
    ids: tuple[int, ...]
    start: int


class MementoEndpoint(RuntimeEndpoint):  # type: ignore[misc]
    """Backend for `sgl.function` programs against a Memento server.

    `meta_info` of each `gen` has `output_ids` in addition: all that was generated.

    Raises:
        EndpointError: no server there.
        ConfigError: a program asks for what cannot be exact (images, `n`, `select` of texts).
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        client: NativeClient | None = None,
        chat_template_name: str | None = None,
    ) -> None:
        self.client = client or NativeClient(base_url, api_key)
        self.client.info()  # says clearly what is wrong
        super().__init__(
            self.client.base_url,
            api_key=self.client.api_key,
            chat_template_name=chat_template_name,
        )
        self.support_concate_and_append = False

    def begin(
        self, s: ProgramState, question: Prompt, options: Mapping[str, Any] | None = None
    ) -> tuple[int, ...]:
        """Start a program with a prompt in the server's chat template, assistant turn open.

        Args:
            options: overrides for all its calls (docs/semantics.md).

        Returns:
            The prompt's token ids.
        """
        if s.text():
            raise ConfigError("begin() comes first: this program has text already")
        ids = tuple(self.client.encode_chat(question))
        (text,) = self.client.decode(ids)
        s.set_var(TRACE, Trace(text, ids, len(ids)))
        s.set_var(OPTIONS, dict(options or {}))
        s += text
        return ids

    def ids(self, s: ProgramState) -> tuple[int, ...]:
        """Token ids of a program's text."""
        s.sync()
        return self._trace(s.stream_executor).ids

    def generate(
        self, s: StreamExecutor, sampling_params: SglSamplingParams
    ) -> tuple[str, dict[str, Any]]:
        sampling, body = self._request(s, sampling_params)
        trace = self._trace(s)
        output = self.client.generate(trace.ids, sampling, self._options(s, trace), **body)
        kept = self._kept(output, sampling)
        self._extend(s, trace, output, output.text + kept, kept)
        return output.text + kept, {**output.meta, "output_ids": list(output.ids)}

    def generate_stream(
        self, s: StreamExecutor, sampling_params: SglSamplingParams
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        sampling, body = self._request(s, sampling_params)
        trace = self._trace(s)
        text = ""
        for output in self.client.stream(trace.ids, sampling, self._options(s, trace), **body):
            kept = self._kept(output, sampling)
            new = output.text[len(text) :] + kept
            text += new
            if output.finish is not None:
                self._extend(s, trace, output, text, kept)
            yield new, {**output.meta, "output_ids": list(output.ids)}

    def select(
        self, s: StreamExecutor, choices: list[str], temperature: float, choices_method: Any
    ) -> ChoicesDecision:
        """Take the likeliest of single tokens: greedy sampling with all others out of reach.

        Texts of several tokens would need the log-probabilities of prompt tokens, which there are
        none of while blocks are evicted.
        """
        ids = [self.client.encode(choice) for choice in choices]
        if any(len(tokens) != 1 for tokens in ids):
            raise ConfigError(
                f"select: each choice must be one token, not {choices}: use "
                'gen(regex="...|...") for choices of several tokens'
            )
        if choices_method not in (token_length_normalized, greedy_token_selection) or temperature:
            raise ConfigError(
                "select: only token_length_normalized and greedy_token_selection, at temperature 0"
            )
        trace = self._trace(s)
        tokens = [token for (token,) in ids]
        bias = {str(token): SELECT_BIAS for token in tokens}
        sampling = {"max_new_tokens": 1, "temperature": 0, "logit_bias": bias}
        output = self.client.generate(trace.ids, sampling, self._options(s, trace))
        if output.ids[0] not in tokens:
            raise ConfigError(f"select: none of {choices} may follow here")
        choice = choices[tokens.index(output.ids[0])]
        s.variables[TRACE] = Trace(trace.text + choice, trace.ids + output.ids, trace.start)
        return ChoicesDecision(decision=choice, meta_info=output.meta)

    def commit_lazy_operations(self, s: StreamExecutor) -> None:
        """Have the server read the text so far, so that forks share it."""
        trace = self._trace(s)
        self.client.generate(trace.ids, {"max_new_tokens": 0}, self._options(s, trace))
        s.variables[TRACE] = trace

    def cache_prefix(self, prefix_str: str) -> None:
        ids = self.client.encode(prefix_str, add_special_tokens=True)
        self.client.generate(ids, {"max_new_tokens": 0})

    def fill_image(self, s: StreamExecutor) -> None:
        raise ConfigError("images are not supported: Memento models read text")

    def _request(
        self, s: StreamExecutor, params: SglSamplingParams
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Sampling parameters, and fields beside them."""
        if s.images_:
            self.fill_image(s)
        if params.n != 1:
            raise ConfigError(f"gen(n={params.n}): use fork({params.n}) instead")
        self._handle_dtype_to_regex(params)
        values = {name: getattr(params, name) for name in LOGPROBS}
        body = {name: value for name, value in values.items() if value is not None}
        sampling = params.to_srt_kwargs()
        if OPTIONS in s.variables and isinstance(params.stop, (list, tuple)):
            # begin() took the server's template: the stop strings of SGLang's own, which the
            # interpreter adds to each gen, are no part of it.
            added = self.chat_template.stop_str
            sampling["stop"] = [stop for stop in params.stop if stop not in added]
        return sampling, body

    def _trace(self, s: StreamExecutor) -> Trace:
        """The ids of all text so far: those known, and those of what the program has added."""
        known: Trace | None = s.variables.get(TRACE)
        if known is None:
            ids = tuple(self.client.encode(s.text_, add_special_tokens=True))
            return Trace(s.text_, ids, len(ids))
        if not s.text_.startswith(known.text):
            raise ConfigError(
                "the program's text was changed behind what the server has read of it "
                "(separate_reasoning does that): leave it as it is"
            )
        added = s.text_[len(known.text) :]
        if not added:
            return known
        return Trace(s.text_, (*known.ids, *self.client.encode(added)), known.start)

    def _options(self, s: StreamExecutor, trace: Trace) -> dict[str, Any]:
        """Overrides of a call. A prompt without chat markup ends where the program first
        generates; later calls must say so."""
        options: dict[str, Any] = s.variables.get(OPTIONS, {})
        markers = self.client.markers
        if markers.im_start is None or markers.in_chat(trace.ids[: trace.start]):
            return options
        return {"assistant_start": trace.start, **options}

    def _kept(self, output: Output, sampling: Mapping[str, Any]) -> str:
        """What stopped the output and belongs to it; the server leaves it out of the text."""
        matched = output.matched
        if matched == THINK_END:
            return THINK_END
        if isinstance(matched, int) and matched in (sampling["stop_token_ids"] or ()):
            return self.client.convert_ids_to_tokens(matched)
        return ""

    def _extend(
        self, s: StreamExecutor, trace: Trace, output: Output, text: str, kept: str
    ) -> None:
        ids = output.ids
        if isinstance(output.matched, str) and not kept:
            ids = tuple(self.client.encode(text))
        elif isinstance(output.matched, int) and not kept:
            ids = ids[:-1]
        s.variables[TRACE] = Trace(trace.text + text, trace.ids + ids, trace.start)
