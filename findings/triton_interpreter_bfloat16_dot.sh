#!/bin/sh
# Triton 3.8.0 (of torch 2.14.1): in the interpreter (TRITON_INTERPRET=1) `tl.dot` of bfloat16 operands is wrong without a word.
# numpy has no bfloat16: the interpreter keeps its bits as uint16 and multiplies those as integers; only float8 is converted first.
# Seen: products of 16 x 16 standard normal matrices off by more than 1e9; float16 and float32 are right. SGLang's Triton
# attention kernels can be checked in the interpreter, in float16 or float32 only.
# Fails if that changes: if bfloat16 is right, or another type is wrong.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet 'torch==2.14.1' 'triton==3.8.0' numpy
cat >"$work/found.py" <<'PY'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def product(a, b, c, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def error(dtype):
    torch.manual_seed(0)
    a, b = (torch.randn(16, 16).to(dtype) for _ in "ab")
    c = torch.zeros(16, 16)
    product[(1,)](a, b, c, 16)
    return (c - a.float() @ b.float()).abs().max().item()


found = {dtype: error(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)}
print("largest error:", found)
if found[torch.float32] > 1e-4 or found[torch.float16] > 1e-4 or found[torch.bfloat16] < 1e6:
    sys.exit("changed")
PY
TRITON_INTERPRET=1 "$work/venv/bin/python" "$work/found.py"
