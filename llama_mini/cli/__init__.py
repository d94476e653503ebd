"""What the command lines share: options, the chat at the terminal, batches, --info, conversion."""
