"""Evaluation: perplexity, comparison of two models, and a model class for lm-eval."""
