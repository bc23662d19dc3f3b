"""Moved to `memento_sgl.offline.rollout.record`; this name goes with the release after 0.2."""

from memento_sgl.moved import moved
from memento_sgl.offline.rollout.record import *  # noqa: F403

moved(__name__, "memento_sgl.offline.rollout.record")
