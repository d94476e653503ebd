"""Reading, converting and writing checkpoints. Foreign names of tensors and settings are translated here."""
