"""A real HTTP server that speaks the chat completions protocol, answers by rule, and misbehaves.

The "LLM" computes its answers from the prompt alone: a boundary's grade from the words around it, a
memento from its block, a judgement from candidate and block. So any run over the same traces must
end with the same rows, whatever goes wrong on the way. Faults are drawn from a seed, the request
and how often it was asked, so they do not depend on timing.

    python tests/pipeline/fault_server.py '{"latency": 0.1, "faults": {"500": 0.1}}'

prints its port and serves until it is ended. `GET /stats` tells what happened.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any

TRANSPORT_FAULTS = (
    *("429", "429-after", "429-date", "500", "503-after", "529"),
    *("hang", "drip", "close", "cut-body", "bad-body", "no-choices", "error-body"),
)
CONTENT_FAULTS = (
    *("nan", "out-of-range", "missing", "foreign-number", "unnumbered", "eighty"),
    *("truncated", "empty", "echo", "unclosed-reasoning", "two-answers", "prose-only"),
)
HARMLESS = (  # must be read as if they were not there
    *("reasoning", "prose", "fence", "sketch", "parts", "odd-usage", "stream"),
)
HOPELESS = (  # what some endpoints answer to everything
    *("html", "not-json", "error-400", "error-429", "stream-error", "empty-stream"),
    *("refusal", "filtered", "reasoned", "cut", "quota", "no-model"),
)
ALL_FAULTS = (*TRANSPORT_FAULTS, *CONTENT_FAULTS, *HARMLESS)


def spread(rate: float, kinds: tuple[str, ...] = ALL_FAULTS) -> dict[str, float]:
    """Faults of every kind that together strike with probability `rate`."""
    return {kind: rate / len(kinds) for kind in kinds}


@dataclass
class Settings:
    latency: float = 0.0  # seconds an answer takes
    jitter: float = 0.0  # part of the latency that varies
    capacity: int = 10**9  # requests at once; more get 429
    faults: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    key: str | None = None  # refuse others with 401
    path: str = "/v1/chat/completions"
    schema: bool = True  # else response_format is refused with 400
    usage: bool = True
    cache: bool = False  # report the prompt tokens that an earlier prompt began with
    always: str = ""  # one of HOPELESS
    limit_name: str = "max_tokens"  # the other name of it is refused with 400
    temperature: bool = True  # else it is refused with 400
    hang: float = 30.0  # seconds that "hang" and "drip" take
    retry_after: float = 0.05
    refuse: str = ""  # a prompt that contains this is refused with 400


def _digest(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:6], "big")


MARK = re.compile(r" ?⟦(\d+)⟧")


def answer(system: str, user: str) -> tuple[str, str]:
    """The canned LLM: (kind of task, answer)."""
    if "\nGrade the cuts " in user:
        return "score", _scores(user)
    nonce = re.search(r"<problem-(\w+)>", user)
    assert nonce, "not one of our prompts"
    tag = nonce[1]
    task = user[user.rindex("\nTask: ") :]
    blocks = dict(re.findall(rf"<block-(\d+)-{tag}>\n(.*?)\n</block-\1-{tag}>", user, re.S))
    blocks |= _cut_blocks(user, task, tag)
    found = re.findall(rf"<candidate-(\d+)-{tag}>\n(.*?)\n</candidate-\1-{tag}>", task, re.S)
    if task.startswith("\nTask: grade these mementos."):
        return "judge", _judgements(blocks, dict(found))
    if task.startswith("\nTask: grade these mementos, then"):
        grades = _judgements(blocks, dict(found))
        remarks = re.findall(rf"<remarks-(\d+)-{tag}>", task)
        bad = [str(g["n"]) for g in json.loads(grades)["judgements"] if not g["formulas"]]
        wanted = [n for n, _ in found if n in bad or n in remarks]
        return "review", "\n".join([grades, *_tagged(wanted, blocks, tag, 0.24)])
    numbers = re.findall(r"^- block (\d+)\b", task, re.M)
    share = 0.16 if task.startswith("\nTask: write") else 0.24
    text = "\n".join(_tagged(numbers, blocks, tag, share))
    return ("summarize" if share == 0.16 else "refine"), text


def _tagged(numbers: list[str], blocks: dict[str, str], tag: str, share: float) -> list[str]:
    return [
        f"<memento-{n}-{tag}>\n{_memento(blocks[n], share)}\n</memento-{n}-{tag}>" for n in numbers
    ]


def _cut_blocks(user: str, task: str, tag: str) -> dict[str, str]:
    """The listed blocks of a trace that is shown in one piece, with its cuts numbered."""
    shown = re.search(rf"<trace-{tag}>\n(.*?)\n</trace-{tag}>", user, re.S)
    if shown is None:
        return {}
    text = shown[1]
    places = {match[1]: match.span() for match in MARK.finditer(text)}
    blocks: dict[str, str] = {}
    for n, start, end in re.findall(
        r"^- block (\d+): (\S+|the start) to (\S+|the end) \(", task, re.M
    ):
        a = 0 if start == "the start" else places[start.strip("⟦⟧")][1]
        b = len(text) if end == "the end" else places[end.strip("⟦⟧")][0]
        blocks[n] = MARK.sub("", text[a:b]).strip("\n")
    return blocks


def _scores(user: str) -> str:
    pieces = MARK.split(user)  # text, number, text, number, ...
    entries = {}
    for index in range(1, len(pieces), 2):
        before = pieces[index - 1].split()[-1:]
        after = pieces[index + 1].split()[:1]
        entries[pieces[index]] = _digest(*before, *after) % 4
    return json.dumps({"scores": entries})


def _memento(block: str, share: float) -> str:
    """Whole lines of the block, up to a share of its length; at least the shortest line."""
    lines = [line.strip() for line in re.split(r"\n|(?<=[.!?])\s", block) if line.strip()]
    kept, size = [], 0
    for line in sorted(lines, key=len):
        if kept and size + len(line) > share * len(block):
            break
        kept.append(line)
        size += len(line)
    return " ".join(kept)


def _judgements(blocks: dict[str, str], candidates: dict[str, str]) -> str:
    """About 3 of 10 short mementos pass, 9 of 10 long ones (as in the paper)."""
    entries = []
    for number, text in candidates.items():
        short = text == _memento(blocks[number], 0.16)
        luck = _digest("judge", text) % 100
        formulas = 3 if luck < (28 if short else 92) else 0
        entries.append(
            {
                "n": int(number),
                "formulas": formulas,
                **{"numbers": 2, "methods": 2, "validation": 1, "correctness": 1},
                **{"result_first": 1, "deductions": 0},
                "feedback": "" if formulas else r"Add \(x\), say what \frac{1}{2} is; failed.",
            }
        )
    return json.dumps({"judgements": entries})


def spoil(kind: str, task: str, text: str, user: str) -> str:
    """`text` with one of the content faults."""
    tagged = task in ("summarize", "refine")
    if kind == "reasoning":
        return f'<think>Maybe {{"scores": [{{"n": 1, "s": 3}}]}}? SCORE: 10/10</think>\n{text}'
    if kind == "prose":
        return f"Sure, here it is:\n{text}\nI hope this helps {{really}}!"
    if kind == "sketch":
        return f'Roughly {{"scores": [{{"n": ?}}], "judgements": [{{...}}]}} and so on.\n{text}'
    if kind in ("parts", "odd-usage", "stream"):
        return text
    if kind == "fence":
        return f"```json\n{text}\n```"
    if kind == "empty":
        return ""
    if kind == "echo":
        return user
    if kind == "unclosed-reasoning":
        return f"<think>{text}"
    if kind == "prose-only":
        return "SCORE: 10/10. The memento 1 is excellent, 2 failed."
    if kind == "truncated":
        return text[: len(text) * 2 // 3]
    figure = r'("\d+"|"methods"): \d'
    if kind == "two-answers":
        return text + "\n" + re.sub(r'("\d+"|"methods"): [123]', r"\1: 0", text)
    if kind == "nan":
        return re.sub(figure, r"\1: NaN", text, count=1)
    if kind == "out-of-range":
        return re.sub(figure, r"\1: 99", text, count=1)
    if kind == "eighty":
        return re.sub(figure, r'\1: "80/10"', text, count=1)
    if kind == "missing":
        if tagged:
            return re.sub(r"<memento-(\d+)-\w+>.*?</memento-\1-\w+>", "", text, count=1, flags=re.S)
        return re.sub(r'(\{"n".*?\}|"\d+": \d)(, )?', "", text, count=1)
    if kind == "foreign-number":
        if tagged:
            return re.sub(r"memento-(\d+)-", lambda m: f"memento-{int(m[1]) + 1}-", text)
        return re.sub(r'("n": |")(\d+)\b', lambda m: f"{m[1]}{int(m[2]) + 1}", text)
    assert kind == "unnumbered"
    if tagged:
        return re.sub(r"memento-\d+-\w+", "memento", text)
    return re.sub(r'"n": \d+, ', "", re.sub(r'"\d+":', '"x":', text))


class FaultServer:
    """Serves on a free port of the loopback address; an async context manager."""

    def __init__(self, settings: Settings | None = None, **changes: Any) -> None:
        self.settings = settings or Settings(**changes)
        self.asked: Counter[str] = Counter()  # by payload
        self.answered: Counter[str] = Counter()  # by payload, whole good answers only
        self.by_key: Counter[str] = Counter()  # by Idempotency-Key, the same
        self.calls: Counter[str] = Counter()  # by task
        self.struck: Counter[str] = Counter()  # by fault
        self.tokens: Counter[str] = Counter()  # by direction
        self.by_stage: Counter[str] = Counter()  # the same, by task and direction
        self.cached = 0  # of the tokens in, when `cache`
        self.users: list[str] = []  # prompts, when `keep_prompts`
        self.systems: set[str] = set()
        self.keep_prompts = False
        self.in_flight = self.peak = 0
        self.level: list[tuple[float, int]] = []  # (time, requests in flight from then on)
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()
        self._pages: set[bytes] = set()  # of prompts, when `cache`
        self.bodies: list[dict[str, Any]] = []  # of requests, when `keep_prompts`

    async def __aenter__(self) -> FaultServer:
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def stats(self) -> dict[str, Any]:
        return {
            "asked": dict(self.asked),
            "answered": dict(self.answered),
            "by_key": dict(self.by_key),
            "calls": dict(self.calls),
            "struck": dict(self.struck),
            "tokens": dict(self.tokens),
            "peak": self.peak,
            "level": self.level,
        }

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client has gone, or the server ends
        finally:
            self._open.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if first.startswith("GET /stats"):
            await self._send(writer, 200, self.stats())
            return True
        self._enter(1)
        try:
            return await self._complete(first.split()[1], headers, body, writer)
        finally:
            self._enter(-1)

    def _enter(self, change: int) -> None:
        self.in_flight += change
        self.peak = max(self.peak, self.in_flight)
        self.level.append((time.monotonic(), self.in_flight))

    async def _complete(
        self, path: str, headers: dict[str, str], raw: bytes, writer: asyncio.StreamWriter
    ) -> bool:
        settings = self.settings
        self.calls["all"] += 1
        if path != settings.path:
            return await self._send(writer, 404, _error(f"no route {path}"))
        if settings.key is not None and headers.get("authorization") != f"Bearer {settings.key}":
            shown = headers.get("authorization", "none")
            return await self._send(writer, 401, _error(f"Incorrect API key provided: {shown}"))
        body = json.loads(raw)
        if "response_format" in body and not settings.schema:
            return await self._send(writer, 400, _error("response_format is not supported"))
        if refused := _unsupported(body, settings):
            return await self._send(writer, 400, refused)
        payload = hashlib.sha256(raw).hexdigest()[:24]
        self.asked[payload] += 1
        system, user = (message["content"] for message in body["messages"])
        if settings.refuse and settings.refuse in user:
            return await self._send(writer, 400, _error("maximum context length exceeded"))
        if self.keep_prompts:
            self.users.append(user)
            self.bodies.append(body)
            self.systems.add(system)
        kind = self._draw(payload)
        draw = random.Random(f"{settings.seed}:{payload}").uniform(-1, 1)
        await asyncio.sleep(settings.latency * (1 + settings.jitter * draw))
        if self.in_flight > settings.capacity:
            kind = "429-after"
        if settings.always:
            return await self._hopeless(settings.always, writer)
        if kind in TRANSPORT_FAULTS:
            return await self._misbehave(kind, writer)
        task, text = answer(system, user)
        if kind:
            text = spoil(kind, task, text, user)
        self.calls[task] += 1
        self.tokens["in"] += (len(system) + len(user)) // 4
        self.tokens["out"] += len(text) // 4
        self.by_stage[f"{task} in"] += (len(system) + len(user)) // 4
        self.by_stage[f"{task} out"] += len(text) // 4
        reply = _reply(text, (len(system) + len(user)) // 4, settings.usage)
        if settings.cache:
            known = self._known_prefix(system + user) // 4
            self.cached += known
            reply["usage"]["prompt_tokens_details"] = {"cached_tokens": known}
        self.answered[payload] += 1
        self.by_key[headers.get("idempotency-key", "")] += 1
        if kind == "parts":
            part = {"type": "text", "text": text}
            reply["choices"][0]["message"]["content"] = [{"type": "thinking"}, part]
        elif kind == "odd-usage":
            reply["usage"] = {"prompt_tokens": -1, "completion_tokens": "many", "cost": None}
        elif kind == "stream":
            return await self._send(writer, 200, _streamed(text))
        return await self._send(writer, 200, reply)

    def _known_prefix(self, prompt: str) -> int:
        """Characters that an earlier prompt began with too, in whole pages."""
        digest, seen, known = hashlib.sha256(), 0, 0
        for end in range(CACHE_PAGE, len(prompt) + 1, CACHE_PAGE):
            digest.update(prompt[end - CACHE_PAGE : end].encode())
            page = digest.digest()
            if page in self._pages and seen == end - CACHE_PAGE:
                seen = known = end
            self._pages.add(page)
        return known

    async def _hopeless(self, kind: str, writer: asyncio.StreamWriter) -> bool:
        message = {"role": "assistant", "content": None}
        if kind == "html":
            page = "<html><title>Welcome</title><body>Please sign in</body></html>"
            return await self._send(writer, 200, page)
        if kind == "not-json":
            return await self._send(writer, 200, "OK, but who are you?")
        if kind == "error-400":
            error = {"message": "context of 4096 exceeded", "type": "invalid_request_error"}
            return await self._send(writer, 200, {"error": error})
        if kind == "error-429":
            return await self._send(writer, 200, {"error": {"message": "busy", "code": 429}})
        if kind == "stream-error":
            return await self._send(
                writer, 200, 'data: {"error": {"message": "out of memory"}}\n\n'
            )
        if kind == "empty-stream":
            return await self._send(writer, 200, ": keep-alive\n\ndata: [DONE]\n\n")
        if kind == "quota":
            error = {"message": "You exceeded your quota", "code": "insufficient_quota"}
            return await self._send(writer, 429, {"error": error})
        if kind == "no-model":
            return await self._send(writer, 404, _error("The model `canned` does not exist"))
        reply = _reply("", 10, True)
        choice = reply["choices"][0]
        choice["message"] = message
        if kind == "refusal":
            message["refusal"] = "I cannot help with that."
        elif kind == "reasoned":
            message["reasoning_content"] = "The cuts are good, I think."
        elif kind == "filtered":
            choice["finish_reason"] = "content_filter"
        else:
            assert kind == "cut"
            message["content"] = '{"scores": {'
            choice["finish_reason"] = "length"
        return await self._send(writer, 200, reply)

    def _draw(self, payload: str) -> str:
        chance = random.Random(f"{self.settings.seed}:{payload}:{self.asked[payload]}").random()
        for kind, rate in self.settings.faults.items():
            chance -= rate
            if chance < 0:
                self.struck[kind] += 1
                return kind
        return ""

    async def _misbehave(self, kind: str, writer: asyncio.StreamWriter) -> bool:
        wait = self.settings.retry_after
        good = json.dumps(_reply("never seen", 1, True)).encode()
        if kind == "529":
            return await self._send(writer, 529, _error("overloaded"))
        if kind == "429":
            return await self._send(writer, 429, _error("slow down"))
        if kind in ("429-after", "503-after"):
            return await self._send(writer, int(kind[:3]), _error("slow down"), f"{wait:g}")
        if kind == "429-date":
            return await self._send(writer, 429, _error("slow down"), formatdate(usegmt=True))
        if kind == "500":
            return await self._send(writer, 500, "<html>Internal Server Error</html>")
        if kind == "bad-body":
            return await self._send(writer, 200, '{"choices": [{"message": {"content": "x')
        if kind == "no-choices":
            return await self._send(writer, 200, {"choices": []})
        if kind == "error-body":
            return await self._send(writer, 200, _error("upstream failed"))
        if kind == "hang":
            await asyncio.sleep(self.settings.hang)
        if kind == "close":
            return False
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
        writer.write(f"content-length: {len(good)}\r\n\r\n".encode())
        if kind == "cut-body":
            writer.write(good[:-7])
            await writer.drain()
            return False
        for byte in good:  # drip
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(self.settings.hang / len(good))
        return True

    async def _send(
        self, writer: asyncio.StreamWriter, status: int, body: Any, retry_after: str | None = None
    ) -> bool:
        content = (body if isinstance(body, str) else json.dumps(body)).encode()
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n"
        if retry_after is not None:
            head += f"retry-after: {retry_after}\r\n"
        writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        await writer.drain()
        return True


CACHE_PAGE = 64  # characters: 16 tokens, as SGLang and vLLM


def _unsupported(body: dict[str, Any], settings: Settings) -> dict[str, Any] | None:
    """As OpenAI's newer models refuse parameters."""
    for name, other in (("max_tokens", "max_completion_tokens"), ("max_completion_tokens", "")):
        if name in body and settings.limit_name != name:
            hint = f"Unsupported parameter: '{name}' is not supported with this model."
            return _error(f"{hint} Use '{other}' instead." if other else hint)
    if "temperature" in body and not settings.temperature:
        return _error("Unsupported value: 'temperature' does not support 0.2 with this model.")
    return None


def _streamed(text: str) -> str:
    """A whole answer as an event stream."""
    middle = len(text) // 2
    events = [
        {"choices": [{"delta": {"content": part}}]} for part in (text[:middle], text[middle:])
    ]
    last = {"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 7}}
    lines = [f"data: {json.dumps(event)}\n\n" for event in [*events, last]]
    return ": hello\n\n" + "".join(lines) + "data: [DONE]\n\n"


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "test", "code": None}}


def _reply(text: str, prompt_tokens: int, usage: bool) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    counts = {"prompt_tokens": prompt_tokens, "completion_tokens": len(text) // 4}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        **({"usage": counts} if usage else {}),
    }


async def _serve(settings: Settings) -> None:
    async with FaultServer(settings) as server:
        print(server.port, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(Settings(**json.loads(sys.argv[1] if len(sys.argv) > 1 else "{}"))))
