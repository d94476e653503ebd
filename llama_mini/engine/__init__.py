"""The engine: from prompts to completions. The public names of the package can be imported from here too."""

from llama_mini import __getattr__ as __getattr__
