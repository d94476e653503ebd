"""Reads and writes checkpoints. Each format's names of tensors and settings are translated here."""
