"""Hugging Face directories: config.json, safetensors in one file or in shards, and the hub they come from."""
