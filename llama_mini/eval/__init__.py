"""Evaluation: perplexity of texts, and the model for lm-eval."""
