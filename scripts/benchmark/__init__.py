"""Measures this engine and its peers, in turn, in one run: scripts/bench.py."""

MEASURES = (
    *("decode", "prefill", "batch", "verify", "context", "long", "files", "busy", "start", "load", "memory", "quality"),
)
SERVED = ("bfloat16", "int8", "int4")  # the number formats that --serve measures
