"""A task that needs mementos: the sum of all digits of some groups, modulo 100.

    question   Digit sum mod 100? a372 b91
    thought    <|block_start|>a372 00+3=03;03+7=10;10+2=12;<|block_end|>
               <|summary_start|>a=12<|summary_end|> ... b=22
    answer     The total is 22.

Each block adds one group digit by digit, starting from the last memento. Once the blocks are
evicted, the mementos are the only place where a total can be read.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass

QUESTION = "Digit sum mod 100?"
LABELS = string.ascii_lowercase + string.ascii_uppercase
MAX_BLOCKS = 24
TRAINED_BLOCKS = 32  # training goes beyond what is asked
MAX_DIGITS = 6
HELD_OUT_SEED = 1_000_000_007


@dataclass(frozen=True, slots=True)
class Problem:
    """Groups of digits, one block each."""

    groups: tuple[str, ...]

    @property
    def question(self) -> str:
        listed = " ".join(
            f"{label}{group}" for label, group in zip(LABELS, self.groups, strict=False)
        )
        return f"{QUESTION} {listed}"

    @property
    def totals(self) -> list[int]:
        """Running total after each group."""
        totals, total = [], 0
        for group in self.groups:
            total = (total + sum(map(int, group))) % 100
            totals.append(total)
        return totals

    @property
    def answer(self) -> str:
        return f"The total is {self.totals[-1]:02d}."

    @property
    def output(self) -> str:
        """The whole assistant turn, without the end-of-turn token."""
        parts = ["<think>\n"]
        total = 0
        for label, group, after in zip(LABELS, self.groups, self.totals, strict=False):
            steps = []
            for digit in map(int, group):
                steps.append(f"{total:02d}+{digit}={(total + digit) % 100:02d};")
                total = (total + digit) % 100
            parts.append(f"<|block_start|>{label}{group} {''.join(steps)}<|block_end|>")
            parts.append(f"<|summary_start|>{label}={after:02d}<|summary_end|>\n")
        parts.append(f"</think>\n{self.answer}")
        return "".join(parts)

    @property
    def messages(self) -> list[dict[str, str]]:
        """OpenAI chat messages."""
        return [{"role": "user", "content": self.question}]


def sample_problem(
    rng: random.Random, *, blocks: int | None = None, digits: int | None = None
) -> Problem:
    """Draw a problem; `blocks` 1..24 and `digits` per group 1..6 are random unless given."""
    count = blocks if blocks is not None else rng.randint(2, MAX_BLOCKS)
    groups = []
    for _ in range(count):
        length = digits if digits is not None else rng.randint(2, MAX_DIGITS)
        groups.append("".join(rng.choices(string.digits, k=length)))
    return Problem(tuple(groups))


def held_out(count: int, *, sizes: Sequence[int] = ()) -> list[Problem]:
    """Problems that training never draws from: fixed seed, block counts cycling through `sizes`
    (2 .. 24 by default)."""
    rng = random.Random(HELD_OUT_SEED)
    sizes = sizes or range(2, MAX_BLOCKS + 1)
    return [sample_problem(rng, blocks=sizes[i % len(sizes)]) for i in range(count)]
