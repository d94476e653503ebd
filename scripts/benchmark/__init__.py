"""Measures this engine and its peers, in turn, in one run: scripts/bench.py."""

MEASURES = ("decode", "prefill", "batch", "context", "start", "load", "memory", "quality")
