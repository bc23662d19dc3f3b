"""Evict finished reasoning blocks inside a running request, on SGLang."""

__version__ = "0.1.0"
