"""Quantised safetensors checkpoints: a module for each method, which tells what matrices its tensors make up."""
