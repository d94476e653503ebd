"""The commands: options, chat at the terminal, batches, info, conversion, the default checkpoint."""
