"""The native interface of an SGLang server: token ids in, token ids out. No torch, no SGLang.

Text that goes through a tokenizer twice may come back as other tokens, and then nothing of a KV
cache fits. So prompts are tokenised once, by the server and with its own chat template, and what
it generated is sent back as the ids that it gave.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx

from memento_sgl.address import DEFAULT_URL, server_root
from memento_sgl.errors import EndpointError, RefusedError
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.machine import BlockMachine, section_start_of
from memento_sgl.rule.markers import MarkerIds, resolve_markers

THINK_END = "</think>"
Prompt = str | Sequence[Mapping[str, Any]]
"""A user message, or OpenAI chat messages."""


@dataclass(frozen=True, slots=True)
class Output:
    """What one call generated.

    Attributes:
        ids: all token ids, the one that ended it included.
        text: their text; without the end-of-sequence token, cut at a stop string.
        meta: the server's `meta_info`.
    """

    ids: tuple[int, ...]
    text: str
    meta: dict[str, Any]

    @property
    def finish(self) -> str | None:
        """ "stop", "length" or "abort"; None while it goes on."""
        reason = self.meta.get("finish_reason")
        return None if reason is None else str(reason["type"])

    @property
    def matched(self) -> int | str | None:
        """The token id or string that stopped it."""
        reason = self.meta.get("finish_reason") or {}
        found: int | str | None = reason.get("matched")
        return found


class NativeClient:
    """One server; may be shared by threads.

    Args:
        base_url: with or without `/v1`.
        api_key: sent as bearer token.
        config: the server's options as far as they name markers; only needed where they differ
            from the defaults.

    Raises:
        ConfigError: `base_url` is no address.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        config: MementoConfig | None = None,
    ) -> None:
        self.base_url = server_root(base_url)
        self.api_key = api_key
        settings = {"enable": True, "mask_delimiters": False}
        self.config = (config or MementoConfig()).model_copy(update=settings)
        self._running: set[str] = set()
        self._texts: dict[int, str] = {}
        self._http = httpx.Client(
            base_url=self.base_url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(None, connect=10),
            # The server drops idle connections after 5 seconds: be earlier.
            limits=httpx.Limits(max_connections=None, keepalive_expiry=2),
        )

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text."""
        body = {"prompt": text, "add_special_tokens": add_special_tokens}
        ids: list[int] = self._post("/tokenize", body)["tokens"]
        return ids

    def encode_chat(self, question: Prompt) -> list[int]:
        """Token ids of a prompt in the server's chat template: those of `/v1/chat/completions`."""
        messages = (
            [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
        )
        ids: list[int] = self._post("/tokenize", {"messages": messages})["tokens"]
        return ids

    def decode(self, *pieces: Sequence[int]) -> list[str]:
        """Text of each list of token ids, special tokens included."""
        if not pieces:
            return []
        body = {"tokens": [list(piece) for piece in pieces], "skip_special_tokens": False}
        texts: list[str] = self._post("/detokenize", body)["text"]
        return texts

    def convert_ids_to_tokens(self, ids: int) -> str:
        """The text of one token; with `encode` what `resolve_markers` asks of a tokenizer."""
        if ids not in self._texts:
            self._texts[ids] = self.decode([ids])[0]
        return self._texts[ids]

    @cached_property
    def markers(self) -> MarkerIds:
        """Token ids of the markers.

        Raises:
            MarkerError: this model's tokenizer does not have them.
        """
        return resolve_markers(self.config, self)

    @cached_property
    def context_length(self) -> int:
        """Most logical tokens of a request, prompt included."""
        length: int = self._request("GET", "/v1/models")["data"][0]["max_model_len"]
        return length

    def room(self, prompt: Sequence[int], wanted: int) -> int:
        """How many of the `wanted` tokens the context leaves behind a prompt; at least 1.

        Raises:
            RefusedError: none at all.
        """
        left = self.context_length - len(prompt)
        if left < 1:
            raise RefusedError(
                f"the prompt has {len(prompt)} tokens, the context ends at {self.context_length}"
            )
        return min(wanted, left)

    def machine(self, prompt: Sequence[int], assistant_start: int | None = None) -> BlockMachine:
        """The rule at the end of a prompt, in the state in which the server has it there."""
        start = section_start_of(prompt, self.config, self.markers, assistant_start)
        machine = BlockMachine(self.markers, self.config, section_start=start)
        machine.feed_all(prompt)
        return machine

    def info(self) -> dict[str, Any]:
        """The server's `/server_info`."""
        return self._request("GET", "/server_info")

    def generate(
        self,
        ids: Sequence[int],
        sampling: Mapping[str, Any],
        memento: Mapping[str, Any] | None = None,
        **body: Any,
    ) -> Output:
        """Continue `ids`.

        Args:
            sampling: SGLang's sampling parameters.
            memento: the request's overrides (docs/semantics.md).
            body: further fields of `/generate`.

        Raises:
            RefusedError: this request cannot be served; the message is the server's.
            EndpointError: the server is not there, or serves nobody now.
        """
        request = request_body(ids, sampling, memento, **body)
        with self._tracked(request["rid"]):
            answer = self._post("/generate", request)
        return Output(tuple(answer["output_ids"]), answer["text"], answer["meta_info"])

    def stream(
        self,
        ids: Sequence[int],
        sampling: Mapping[str, Any],
        memento: Mapping[str, Any] | None = None,
        **body: Any,
    ) -> Iterator[Output]:
        """As `generate`; yields everything so far, again and again. Closing it ends the request."""
        request = request_body(ids, sampling, memento, stream=True, **body)
        text = ""
        output: list[int] = []
        with self._tracked(request["rid"]), self._stream("/generate", request) as lines:
            for line in lines:
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise _refusal(int(chunk["error"].get("code", 400)), chunk["error"]["message"])
                new, meta = chunk["output_ids"], chunk["meta_info"]
                # Incremental if the server was started so; else each chunk holds everything.
                whole = len(new) == meta["completion_tokens"]
                output = new if whole else output + new
                text = chunk["text"] if whole else text + chunk["text"]
                yield Output(tuple(output), text, meta)

    def abort(self) -> None:
        """End the running requests of this client; each returns what it has, finish "abort"."""
        for rid in tuple(self._running):
            self._http.post("/abort_request", json={"rid": rid})

    @contextlib.contextmanager
    def _tracked(self, rid: str) -> Iterator[None]:
        self._running.add(rid)
        try:
            yield
        finally:
            self._running.discard(rid)

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._request("POST", path, json=body)

    def _request(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        with self._connected():
            response = self._http.request(method, path, **options)
        if response.status_code != 200:
            raise _refusal(response.status_code, _reason(response))
        answer: dict[str, Any] = response.json()
        return answer

    @contextlib.contextmanager
    def _stream(self, path: str, body: Mapping[str, Any]) -> Iterator[Iterator[str]]:
        with self._connected(), self._http.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                response.read()
                raise _refusal(response.status_code, _reason(response))
            yield response.iter_lines()

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPError as error:
            raise EndpointError(
                f"no answer from {self.base_url} ({error}): start a server with `memento serve "
                "MODEL`, or name the one that runs"
            ) from None


def request_body(
    ids: Sequence[int],
    sampling: Mapping[str, Any],
    memento: Mapping[str, Any] | None = None,
    **body: Any,
) -> dict[str, Any]:
    """Body of a `/generate` request with a request id of its own."""
    params: dict[str, Any] = {"skip_special_tokens": False, **sampling}
    if memento:
        params["custom_params"] = {"memento": dict(memento)}
    return {"rid": uuid.uuid4().hex, "input_ids": list(ids), "sampling_params": params, **body}


def _reason(response: httpx.Response) -> str:
    try:
        body = response.json()
    except ValueError:
        return response.text[:500]
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)


def _refusal(status: int, reason: str) -> EndpointError:
    """A status that concerns one request, or everybody (key, overload, no such interface)."""
    if status in (401, 403, 404, 408, 429, 502, 503, 504):
        return EndpointError(f"the server answered HTTP {status}: {reason}")
    return RefusedError(f"the server refused (HTTP {status}): {reason}")
