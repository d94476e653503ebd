"""Reading, converting and writing checkpoints. Hugging Face's words stop here."""
