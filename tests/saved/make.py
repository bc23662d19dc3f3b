"""Write what users of this release will have on disk: `python tests/saved/make.py FOLDER`.

To be run before memento-sgl moves to another SGLang, or changes a format; see docs/upgrade.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import httpx
from transformers import PreTrainedTokenizerFast

from memento_sgl.demo import MODEL_DIR
from memento_sgl.demo.server import running_server, serve_command
from memento_sgl.offline.rollout.record import RolloutRecord, write_rollouts
from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.emission import resolve_structure
from memento_sgl.rule.markers import resolve_markers

LAUNCH: dict[str, Any] = {
    "enable": True,
    "keep_last_n_blocks": 2,
    "mask_delimiters": True,
    "max_block_tokens": 512,
    "max_summary_tokens": 128,
    "trace_dir": "traces",
    "debug": True,
}
CAPS = {"max_block_tokens": 9, "max_summary_tokens": 4}
ASKED: tuple[tuple[dict[str, Any], float], ...] = (
    ({}, 0.0),
    ({"keep_last_n_blocks": 1}, 1.0),
    ({"max_block_tokens": 6, "max_summary_tokens": 3}, 0.7),
    ({"constrain": "strict", "max_blocks": 3} | CAPS, 1.0),
    ({"enable": False}, 0.0),
)
"""Options and temperature of each request."""


def main(out: Path) -> None:
    traces = out / "traces"
    traces.mkdir(parents=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL_DIR)
    config = MementoConfig(enable=True, mask_delimiters=False)
    markers = resolve_markers(config, tokenizer)
    structure = resolve_structure(tokenizer, {tokenizer.eos_token_id})
    flags = ["--dtype", "float32", "--max-total-tokens", "8000", "--log-level", "warning"]
    flags += ["--memento-trace-dir", str(traces)]
    records = []
    log = out.with_suffix(".log")
    with running_server(serve_command(str(MODEL_DIR), *flags), log, timeout=500) as url:
        for i, (options, temperature) in enumerate(ASKED):
            question = f"Total mod 100? a{37 + i} b9{i} c5{i} d{i}4"
            ids = tokenizer.encode(
                f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            )
            sampling: dict[str, Any] = {"temperature": temperature, "max_new_tokens": 240}
            sampling["custom_params"] = {"memento": options}
            body = {"input_ids": ids, "return_logprob": True, "sampling_params": sampling}
            answer = httpx.post(f"{url}/generate", json=body, timeout=300)
            record = RolloutRecord.from_generate(
                answer.raise_for_status().json(),
                ids,
                markers,
                config=config,
                options=options,
                structure=structure,
                temperature=temperature,
                id=f"r{i}",
            )
            records.append(record)
    write_rollouts(out / "rollouts.jsonl", records)
    launch = MementoConfig.parse(LAUNCH).model_dump()
    (out / "launch.json").write_text(json.dumps(launch, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
