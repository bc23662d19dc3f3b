"""Why a run cannot go on with an endpoint, and what to change."""

from __future__ import annotations

from memento_pipeline.llm.responses import Failure
from memento_pipeline.llm.wire import Server
from memento_sgl.errors import EndpointError, StoppedError

AGAIN = "run the command again to resume"


def failed(server: Server, failure: Failure) -> EndpointError:
    """The endpoint failed for good."""
    endpoint = server.endpoint
    said = f"{endpoint.url} refused the request ({failure.reason})"
    if failure.about == "silent":
        return EndpointError(
            f"{endpoint.url} took a request and {failure.reason}: start the server anew, or, where "
            f"the model is that slow, raise --first-timeout; then {AGAIN}"
        )
    if not server.reached:
        return EndpointError(
            f"{endpoint.url} cannot be reached ({failure.reason}): start the server or correct "
            f"the address, then {AGAIN}"
        )
    if failure.about == "unusable":
        return EndpointError(
            f"{endpoint.url} gave {server.unusable} responses that are no chat completion, and "
            f"never one that is; the last: {failure.reason}. Is the address that of an "
            f"OpenAI-compatible API (.../v1)? Correct it, then {AGAIN}"
        )
    advice = {
        "account": "the account's quota or credit is used up, or its limit is reached: raise it",
        "redirect": "redirects are not followed: give the final address",
        "address": f"the address or the model name {endpoint.model!r} is wrong: correct it",
    }.get(failure.about, "")
    if not advice:
        advice = f"no key was sent: set the environment variable {endpoint.variable}"
        if server.key is not None:
            advice = f"check the key in the environment variable {endpoint.variable}"
        advice += f". The address and the model name {endpoint.model!r} must be right too"
    return EndpointError(f"{said}: {advice}. Nothing was made up; {AGAIN}")


def down(server: Server, why: str) -> StoppedError:
    """The endpoint worked, or at least answered, and does no longer."""
    return StoppedError(
        f"{server.endpoint.url} is down or overloaded ({why}). What was done is kept; {AGAIN}"
    )


def too_slow(server: Server, timeout: float) -> StoppedError:
    """Answers take longer than allowed although nothing else is asked at the same time."""
    return StoppedError(
        f"{server.endpoint.url} is too slow: {server.slow} requests in a row, each alone, had no "
        f"complete answer within {timeout:g} s. Raise --timeout, or have the model say less "
        f"(--max-tokens, less reasoning). What was done is kept; {AGAIN}"
    )
