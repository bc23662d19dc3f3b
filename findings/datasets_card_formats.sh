#!/bin/sh
# datasets 5.2.0: a dataset card with two configurations, one of Parquet files and one of JSON lines.
# Each configuration names its own files, yet the JSON lines are read as Parquet: the format of one configuration is
# taken for all of the card. Seen: ArrowInvalid, "Parquet magic bytes not found in footer", for configuration b; a works.
# Fails if that changes: if b can be read, or fails in another way.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet 'datasets==5.2.0' 'pyarrow<26'
mkdir -p "$work/card/a" "$work/card/b"
cat > "$work/card/README.md" <<'CARD'
---
configs:
- config_name: a
  data_files: a/train.parquet
- config_name: b
  data_files: b/train.jsonl
---
CARD
HF_HUB_OFFLINE=1 HF_HOME="$work/home" "$work/venv/bin/python" - "$work/card" <<'PY'
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_dataset

card = Path(sys.argv[1])
pq.write_table(pa.table({"text": ["from a"]}), card / "a/train.parquet")
(card / "b/train.jsonl").write_text(json.dumps({"text": "from b"}) + "\n")
assert load_dataset(str(card), "a", split="train")["text"][:] == ["from a"]
try:
    found = load_dataset(str(card), "b", split="train")["text"][:]
except pa.ArrowInvalid as error:
    assert "Parquet magic bytes not found" in str(error), error
    print("as found: configuration b (JSON lines) was read as Parquet")
else:
    sys.exit(f"changed: configuration b gives {found}")
PY
