"""What holds for every request of a server."""

from __future__ import annotations

from typing import NamedTuple

from memento_sgl.rule.config import MementoConfig
from memento_sgl.rule.emission import NO_STRUCTURE, Structure
from memento_sgl.rule.markers import MarkerIds


class Settings(NamedTuple):
    """What the launcher found out once; travels to every process inside the server arguments."""

    config: MementoConfig
    markers: MarkerIds
    structure: Structure = NO_STRUCTURE
