"""What the response of an endpoint means: an answer, or which kind of failure.

    malformed body, 408, 409, 425, 429, 5xx                                    again
    401, 402, exhausted quota, redirect; 403, 404, a web page before any
    success                                                                    fatal
    other 4xx                                                                  refused

An error may also come with status 200; then its own code or type decides. The words of the server
are kept in every case.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from memento_pipeline.llm.rate import retry_after

FATAL = {401: "key", 402: "account"}
FATAL_AT_FIRST = {403: "key", 404: "address"}  # later they may be about one request (moderation)
AGAIN = {408, 409, 425, 429}
OVERLOADED = {429, 503, 529}
QUOTA_CODES = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
STATUS_OF_NAME = {
    "invalid_request_error": 400,
    "context_length_exceeded": 400,
    "authentication_error": 401,
    "invalid_api_key": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "model_not_found": 404,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "overloaded_error": 529,
}
"""Types and codes of error objects that say what a status would."""
LONGEST_WORDS = 500  # characters of a server's words

About = Literal["", "key", "account", "address", "redirect", "unusable", "silent", "slow"]


class Completion(NamedTuple):
    """What an endpoint answered; counts are None where it does not report them.

    `finish_reason` is the endpoint's, or one of ours: `refusal` (`text` holds the model's words)
    and `reasoning` (it reasoned, and then gave no answer).
    """

    text: str
    model: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None = None  # of the prompt tokens, from the provider's cache
    reasoned: bool = False


class Failure(NamedTuple):
    what: Literal["again", "refused", "fatal"]
    reason: str
    wait: float | None = None  # seconds, by the server's word
    overload: bool = False
    answered: bool = False  # the server is there and took the key
    about: About = ""


class Response(NamedTuple):
    """Status, headers (names in lower case) and body."""

    status: int
    headers: Mapping[str, str]
    content: bytes


def read(response: Response, model: str, *, before: bool) -> Completion | Failure:
    """The answer in a response, or what its failure means.

    Args:
        before: the endpoint has completed a request before.
    """
    if response.status != 200:
        words = error_words(response.content)
        return _failed(response.status, words, f"HTTP {response.status}: {words}", response, before)
    text = response.content.decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    kind = response.headers.get("content-type", "")
    try:
        if kind.startswith("text/event-stream") or re.match(r"(?:data|event|id|retry)?:", text):
            body = _merged(text)
        else:
            body = json.loads(text)
    except (ValueError, RecursionError):
        if text.startswith("<"):
            reason = f"a web page instead of an answer: {_one_line(re.sub(r'<[^>]*>', ' ', text))}"
            return Failure("again" if before else "fatal", reason, about="address")
        reason = f"malformed answer (not JSON): {_one_line(text) or 'it is empty'}"
        # What begins as JSON was cut off on its way; the rest is no API of the kind that is meant.
        return Failure("again", reason, about="" if text.startswith("{") else "unusable")
    if (error := _error_of(body)) is not None:
        return _failed_with_200(error, response, before)
    return _completion(body, model)


def _failed(status: int, words: str, reason: str, response: Response, before: bool) -> Failure:
    if status in FATAL or (status in FATAL_AT_FIRST and not before):
        about: Any = FATAL.get(status) or FATAL_AT_FIRST[status]
        return Failure("fatal", reason, answered=True, about=about)
    raw = response.content.decode("utf-8", "replace")
    if status in (403, 429) and any(code in raw or code in words for code in QUOTA_CODES):
        return Failure("fatal", reason, answered=True, about="account")
    if 300 <= status < 400:
        return Failure("fatal", reason, about="redirect")
    if status in AGAIN or status >= 500:
        wait = retry_after(response.headers.get("retry-after"))
        return Failure("again", reason, wait, overload=status in OVERLOADED, answered=True)
    return Failure("refused", reason, answered=True)


def _failed_with_200(error: Any, response: Response, before: bool) -> Failure:
    words = _words_of(error)
    reason = f"HTTP 200 with an error: {words}"
    names = [error.get("code"), error.get("type")] if isinstance(error, dict) else []
    for name in names:
        status = STATUS_OF_NAME.get(str(name))
        if status is None and re.fullmatch(r"[45]\d\d", str(name)):
            status = int(str(name))
        if str(name) in QUOTA_CODES:
            status = 402
        if status is not None:
            return _failed(status, words, reason, response, before)
    return Failure("again", reason, about="unusable")


def _completion(body: Any, model: str) -> Completion | Failure:
    """Lenient about all but the text: a bad figure beside a good answer is only a bad figure."""
    choices = body.get("choices") if isinstance(body, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        reason = f"malformed answer (no choices with a message): {_one_line(json.dumps(body))}"
        return Failure("again", reason, about="unusable")
    assert isinstance(choice, dict)
    usage = body.get("usage")
    text, refusal = _text(message.get("content")), _text(message.get("refusal"))
    reasoning = _text(message.get("reasoning_content")) or _text(message.get("reasoning"))
    finish = choice.get("finish_reason")
    finish = finish if isinstance(finish, str) else None
    if not text.strip() and refusal:
        text, finish = refusal, "refusal"
    elif not text.strip() and reasoning and finish != "length":
        finish = "reasoning"
    hidden = _figure(usage, "completion_tokens_details", "reasoning_tokens")
    return Completion(
        text=text,
        model=model,
        finish_reason=finish,
        prompt_tokens=_figure(usage, "prompt_tokens"),
        completion_tokens=_figure(usage, "completion_tokens"),
        cached_tokens=_cached(usage),
        reasoned=bool(reasoning or hidden or re.match(r"\s*<think", text) or "</think>" in text),
    )


def _text(content: Any) -> str:
    """Text of a message field: a string, or a list of parts of which the text parts count."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    parts = [part if isinstance(part, str) else _part(part) for part in content]
    return "".join(parts)


def _part(part: Any) -> str:
    """The text of a part; reasoning and images have none."""
    if not isinstance(part, dict) or part.get("type", "text") not in ("text", "output_text"):
        return ""
    text = part.get("text")
    return text if isinstance(text, str) else ""


def _figure(usage: Any, *path: str) -> int | None:
    """A count of tokens; None where it is missing or none."""
    for name in path:
        usage = usage.get(name) if isinstance(usage, dict) else None
    if isinstance(usage, float) and usage.is_integer():
        usage = int(usage)
    known = isinstance(usage, int) and not isinstance(usage, bool) and 0 <= usage < 2**53
    return usage if known else None


def _cached(usage: Any) -> int | None:
    """Prompt tokens that came from a cache, under the names that providers use."""
    paths = (
        ("prompt_tokens_details", "cached_tokens"),  # OpenAI, SGLang, vLLM, llama.cpp
        ("prompt_cache_hit_tokens",),  # DeepSeek
        ("cache_read_input_tokens",),  # Anthropic behind a proxy
    )
    found = (_figure(usage, *path) for path in paths)
    return next((figure for figure in found if figure is not None), None)


def _merged(text: str) -> Any:
    """The body that an event stream adds up to: some servers stream without being asked.

    Raises:
        ValueError: an event is not JSON, or there is none.
    """
    parts: list[str] = []
    finish, usage = None, None
    seen = False
    for event in _events(text):
        seen = True
        if _error_of(event) is not None:
            return event
        usage = event.get("usage") or usage
        for choice in event.get("choices") or []:
            delta = choice.get("delta") or choice.get("message") or {}
            parts.append(_text(delta.get("content")))
            finish = choice.get("finish_reason") or finish
    if not seen:
        raise ValueError("no event")
    message = {"role": "assistant", "content": "".join(parts)}
    return {"choices": [{"message": message, "finish_reason": finish}], "usage": usage}


def _events(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data not in ("", "[DONE]"):
            event = json.loads(data)
            if not isinstance(event, dict):
                raise ValueError("an event that is no object")
            yield event


def _error_of(body: Any) -> Any:
    """The error object of a body; None when it holds none."""
    if not isinstance(body, dict):
        return None
    if body.get("error") and not body.get("choices"):
        return body["error"]
    return body if body.get("object") == "error" else None


def error_words(content: bytes) -> str:
    """The server's own words in an error body, shortened to one line."""
    text = content.decode("utf-8", "replace")
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return _one_line(re.sub(r"<[^>]*>", " ", text) if text.lstrip().startswith("<") else text)
    error = body.get("error", body) if isinstance(body, dict) else body
    return _words_of(error)


def _words_of(error: Any) -> str:
    """`message` or `detail` of an error object, else all of it; with the parameter it names."""
    if not isinstance(error, dict):
        return _one_line(error if isinstance(error, str) else json.dumps(error))
    said = error.get("message") or error.get("detail") or error
    words = _one_line(said if isinstance(said, str) else json.dumps(said))
    param = error.get("param")
    return f"{words} (param: {param})" if isinstance(param, str) and param else words


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_WORDS else f"{line[:LONGEST_WORDS]}..."
