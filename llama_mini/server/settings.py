"""Settings of the server, checked."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How the server answers.

    Args:
        model_names: the names that a request may give as `model`; the first one stands in the replies.
        max_queue: answers that may run and wait at a time; more are refused with status 503.
    """

    model_names: tuple[str, ...] = ("llama_mini",)
    max_queue: int = 256
