"""The baseline without a language model: deterministic, and no more than a baseline.

Boundary scores come from words that open and close steps; mementos are sentences of the block that
hold formulas, numbers and results. Useful to try the pipeline, in tests, and as the floor that a
model has to beat. The quality of training data made with it has not been measured.
"""

from __future__ import annotations

import re

from memento_pipeline.records import BoundaryScores, DecidedBy, Sentences
from memento_pipeline.text.split import split
from memento_pipeline.text.tokens import TokenCounter

LEAST_RATIO, MOST_RATIO = 0.15, 0.25
"""Memento tokens per block token (paper, average 0.17)."""

_TURN = re.compile(
    r"\s*(?:#{1,6} |\*\*|[-*]{3,}|(?:But |Ok(?:ay)?,? |OK,? |Hmm,? )?(?:wait|now|next|finally|"
    r"alternatively|another (?:way|idea|approach)|"
    r"let me (?:try|check|verify|start|think|recap|double)|"
    r"let's (?:try|check|verify|start|move|consider)|first(?:ly)?,|second(?:ly)?,|third(?:ly)?,|"
    r"step \d|case \d|part \(?[a-z0-9]|to (?:verify|check|summarize)|in summary|moving on|"
    r"back to)\b)",
    re.IGNORECASE,
)
_CLOSES = re.compile(
    r"^\s*(?:therefore|thus|hence|consequently|in conclusion|so,? (?:the|we|that|this|it)\b)"
    r"|\b(?:the (?:final )?answer is|we (?:get|have shown|conclude|find)|"
    r"which (?:matches|confirms)|as (?:required|expected|desired)|checks out|"
    r"is (?:correct|confirmed|proved))\b|\\boxed",
    re.IGNORECASE,
)
_LEANS_BACK = re.compile(r"\s*(?:this|that|it|its|these|those|they|which|here|and|because)\b", re.I)
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n[^\S\n]*$")
_DIGIT = re.compile(r"\d")
_EQUALITY = re.compile(r"=|≈|≤|≥|\\(?:approx|leq?|geq?|equiv|implies)\b|\$|\\[(\[]")
_NARRATION = re.compile(
    r"^\s*(?:hmm|wait|okay|ok|let me|let's|maybe|perhaps|i (?:think|need|should|wonder|guess))\b",
    re.I,
)


def forced_scores(thought: str, sentences: Sentences) -> BoundaryScores:
    """Scores of the candidates that text alone decides (always 0); the others are None.

    A sentence that refers back within its paragraph, or the one after a question in it, continues.
    """
    texts = sentences.texts(thought)
    scores: list[float | None] = [
        0.0 if _continues(texts[b], texts[b + 1]) else None for b in sentences.candidates
    ]
    return _scores(sentences, scores)


def rule_scores(thought: str, sentences: Sentences) -> BoundaryScores:
    """A score for every candidate, by rules: a paragraph end, a turn, and a conclusion count 1."""
    texts = sentences.texts(thought)
    return _scores(sentences, [_score(texts[b], texts[b + 1]) for b in sentences.candidates])


def extract_memento(
    block_text: str,
    counter: TokenCounter,
    *,
    least: float = LEAST_RATIO,
    most: float = MOST_RATIO,
) -> str:
    """Sentences of the block within `most` of its tokens: the result first, the rest in order.

    Of a block whose every sentence is beyond the limit the end of the shortest is taken, cut at
    white space; the ratio may then be below `least`.
    """
    sentences = split(block_text, counter)
    texts = [text.strip() for text in sentences.texts(block_text)]
    total = sum(sentences.tokens)
    ranked = sorted(range(len(texts)), key=lambda i: (-_worth(texts[i], i, len(texts)), -i))
    chosen: list[int] = []
    used = 0
    for index in ranked:
        cost = sentences.tokens[index] + 1
        if (
            texts[index]
            and used + cost <= most * total
            and texts[index] not in (texts[i] for i in chosen)
        ):
            chosen.append(index)
            used += cost
        if used >= (least + most) / 2 * total:
            break
    if not chosen:
        return _tail(min(filter(None, texts), key=len, default=""), most * len(block_text))
    result = max(chosen, key=lambda i: (bool(_CLOSES.search(texts[i])), i))
    return "\n".join(texts[i] for i in [result, *sorted(set(chosen) - {result})])


def _scores(sentences: Sentences, scores: list[float | None]) -> BoundaryScores:
    by: list[DecidedBy | None] = [None if score is None else "rule" for score in scores]
    return BoundaryScores(
        boundaries=sentences.candidates, scores=tuple(scores), decided_by=tuple(by)
    )


def _continues(left: str, right: str) -> bool:
    if _BLANK_LINE.search(left):
        return False
    return bool(_LEANS_BACK.match(right)) or left.rstrip().endswith("?")


def _score(left: str, right: str) -> float:
    if _continues(left, right):
        return 0.0
    score = 0.0
    if _BLANK_LINE.search(left):
        score += 1
    if _TURN.match(right):
        score += 1
    if _CLOSES.search(left):
        score += 1
    if _LEANS_BACK.match(right) or left.rstrip().endswith("?"):
        score -= 1
    return max(score, 0.0)


def _worth(text: str, index: int, count: int) -> float:
    """Higher for results, formulas and numbers; lower for talk; later sentences win ties."""
    worth = 3.0 * bool(_CLOSES.search(text)) + 2.0 * bool(_EQUALITY.search(text))
    worth += bool(_DIGIT.search(text)) - 2.0 * bool(_NARRATION.match(text))
    return worth - text.endswith("?") - text.endswith(":") + index / max(count, 1)


def _tail(text: str, characters: float) -> str:
    if len(text) <= characters:
        return text
    start = len(text) - max(int(characters), 1)
    spaces = [match.end() for match in re.finditer(r"\s+", text) if match.end() >= start]
    return text[spaces[0] if spaces else start :]
