"""A trainer's side of a server: streams that run while it pauses and loads other weights."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from conftest import Job, Served, request_body

# How far before the first token that the old weights would not have chosen the new ones may have
# taken over: models agree by chance, and a token in flight is chosen by the old weights.
LOOK_BACK = 12


class Stream:
    """One streaming request in a thread of its own; `output` grows while it runs."""

    def __init__(self, server: Served, job: Job, **fields: Any) -> None:
        self.ids, count, self.options = job
        self.output: list[int] = []
        self.meta: dict[str, Any] = {}
        self.error: str | None = None
        self._changed = threading.Condition()
        self._done = False
        self._body = request_body(self.ids, count, **self.options) | {"stream": True} | fields
        self._thread = threading.Thread(target=self._run, args=(server.url,), daemon=True)
        self._thread.start()

    def _run(self, url: str) -> None:
        try:
            with httpx.stream("POST", f"{url}/generate", json=self._body, timeout=300) as response:
                if response.status_code != 200:
                    response.read()
                    self.error = response.text
                    return
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        self._take(json.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as error:
            self.error = repr(error)
        finally:
            with self._changed:
                self._done = True
                self._changed.notify_all()

    def _take(self, chunk: dict[str, Any]) -> None:
        with self._changed:
            if "error" in chunk:
                self.error = json.dumps(chunk["error"])
                return
            self.output, self.meta = chunk["output_ids"], chunk["meta_info"]
            self._changed.notify_all()

    def wait(self, tokens: int) -> None:
        """Until it has so many output tokens, or ended."""
        with self._changed:
            reached = self._changed.wait_for(
                lambda: self._done or len(self.output) >= tokens, timeout=300
            )
        assert reached, f"{len(self.output)} of {tokens} tokens"

    @property
    def done(self) -> bool:
        return self._done

    def finish(self) -> dict[str, Any]:
        """The whole answer."""
        self._thread.join(300)
        assert self._done
        assert self.error is None, self.error
        return {"output_ids": self.output, "meta_info": self.meta}


@dataclasses.dataclass
class Trainer:
    """Controls one server.

    Attributes:
        folders, models: checkpoints of equal shape by name, and the same in Hugging Face.
    """

    server: Served
    folders: dict[str, Path]
    models: dict[str, Any] = dataclasses.field(repr=False)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        response = self.server.post(path, **body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json() if response.text.startswith("{") else {}
        return answer

    def pause(self, mode: str) -> None:
        self.post("/pause_generation", mode=mode)

    def go_on(self) -> None:
        self.post("/continue_generation")

    def load(self, name: str, **fields: Any) -> None:
        fields = {"flush_cache": False} | fields
        self.post("/update_weights_from_disk", model_path=str(self.folders[name]), **fields)

    def stream(self, jobs: Sequence[Job], **fields: Any) -> list[Stream]:
        return [Stream(self.server, job, **fields) for job in jobs]

    def verify(self, name: str, jobs: Sequence[Job], answers: Sequence[dict[str, Any]]) -> None:
        """Every answer is what these weights alone give."""
        for (ids, _, options), answer in zip(jobs, answers, strict=True):
            wrong = self.mismatches(partial(_alone, self.models[name]), ids, answer, options)
            assert not wrong, (options, wrong[:3])

    def generate(self, name: str, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """New requests, all together, verified with these weights."""
        answers = self.server.generate_many(list(jobs), len(jobs))
        self.verify(name, jobs, answers)
        return answers

    def mismatches(
        self, logits_of: Any, ids: list[int], answer: dict[str, Any], options: dict[str, Any]
    ) -> list[Any]:
        from memento_sgl.offline.reference import compare_greedy

        found = compare_greedy(
            logits_of,
            ids,
            answer["output_ids"],
            self.server.merged(options),
            self.server.markers,
            assistant_start=options.get("assistant_start"),
            structure=self.server.structure,
        )
        return [mismatch for mismatch in found if mismatch.gap > self.server.tie]

    def switched(
        self, stream: Stream, old: str, new: str, *, kept: bool, boundaries: Sequence[int] = ()
    ) -> int | None:
        """The row of logits from which `new` computed an answer that `old` had begun; None: all
        of it is what `old` gives.

        Args:
            kept: the KV of `old` stayed in the request (`in_place`), or all was computed again.
            boundaries: rows inside the prompt at which `new` may have begun; 0: at once.
        """
        from memento_sgl.offline.reference_updates import Phase, kept_logits, recomputed_logits

        answer = stream.finish()
        ids, options = stream.ids, stream.options
        wrong = self.mismatches(partial(_alone, self.models[old]), ids, answer, options)
        if not wrong:
            return None
        first = wrong[0].position - 1
        rows = list(range(first, max(0, first - LOOK_BACK), -1)) if kept else [first]
        rows += [row for row in reversed(boundaries) if row not in rows]
        logits_of: Callable[..., Any] = kept_logits if kept else recomputed_logits
        closest: list[Any] = []
        for row in rows:
            phases = [Phase(self.models[new], row)]
            if row:
                phases.insert(0, Phase(self.models[old], 0))
            found = self.mismatches(partial(logits_of, phases), ids, answer, options)
            if not found:
                return row
            closest = min(closest or found, found, key=len)
        raise AssertionError(f"{len(closest)} tokens wrong, {options}: {closest[:3]}")

    def assert_told(self, stream: Stream, version: str, *, kept: bool) -> None:
        """`meta_info["weight_versions"]` says at which token "B", loaded under this name, took over
        from "A", and it did. In place SGLang does not count a token whose step was in flight, which
        the old weights have computed yet: one token later."""
        from memento_sgl.offline.reference_updates import Phase, kept_logits, recomputed_logits

        answer = stream.finish()
        *_, before, last = told = answer["meta_info"]["weight_versions"]
        assert (last["version"], last["end"]) == (version, len(answer["output_ids"]))
        assert before["end"] == last["start"]
        row = len(stream.ids) + last["start"] - 1
        logits_of: Callable[..., Any] = kept_logits if kept else recomputed_logits
        wrong = []
        for begin in (row, row + 1) if kept else (row,):
            phases = [Phase(self.models["A"], 0), Phase(self.models["B"], begin)]
            logits = partial(logits_of, phases)
            wrong.append(self.mismatches(logits, stream.ids, answer, stream.options))
        assert not min(wrong, key=len), told


def trainer_of(server: Served, folder: Path) -> Trainer:
    """Weights "A" are those that the server started with, "B" others, written to `folder`."""
    import torch
    from models import build_model
    from transformers import AutoModelForCausalLM

    build_model(folder, seed=1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    folders = {"A": server.folder, "B": folder}
    return Trainer(server, folders, {"A": server.model, "B": model})


def _alone(model: Any, tokens: Sequence[int], evictions: Any) -> Any:
    from memento_sgl.offline.reference import masked_logits

    return masked_logits(model, tokens, evictions)
