"""When decode steps run between the segments of a prompt with finished blocks; plain Python.

SGLang prefills before it decodes, and each segment is a prefill of its own: a short prompt of many
small blocks would keep all other requests waiting for hundreds of forward passes.
"""

from __future__ import annotations

SEGMENTS = 8
"""Segments in a row: others wait for eight short forward passes, about as for one plain chunk."""


class Pacing:
    """Counts the segments that were run since the last decode step."""

    def __init__(self) -> None:
        self._segments = 0

    def decode_next(self, *, more_segments: bool, others: bool) -> bool:
        """Asked once per scheduler step.

        Args:
            more_segments: a prompt is being prefilled whose next segment ends at an eviction point.
            others: requests wait for a decode step.
        """
        waiting = more_segments and others
        due = waiting and self._segments == SEGMENTS
        self._segments = self._segments + 1 if waiting and not due else 0
        return due
