"""GGUF files: their header, their tensors, and the model that they describe."""
