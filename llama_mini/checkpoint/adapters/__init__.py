"""Adapters of PEFT and mlx-lm, merged into a model while it is read."""
