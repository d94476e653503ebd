"""The state of trainings in a folder, so that one that was stopped can go on."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from llama_mini.checkpoint.io.atomic import new_file
from llama_mini.errors import CheckpointFormatError, CheckpointPathError, RequestError
from llama_mini.lab.distillation import State
from llama_mini.validate import join_names


@dataclass
class Kept:
    """A folder for the states of a call's trainings, each in its own file; None keeps nothing.

    of: what the trainings depend on, by name. A state of another call is refused.
    """

    folder: Path | None
    of: dict[str, str]

    def __post_init__(self) -> None:
        try:
            if self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointPathError(f"cannot make the folder {self.folder}: {error.strerror}") from None

    def load(self, name: str) -> State | None:
        """The state of a training, if there is one. Raises RequestError if it is of another call."""
        if self.folder is None or not (file := self._file(name)).exists():
            return None
        try:
            kept = torch.load(file, weights_only=True)
            of, state = kept["of"], State(**kept["state"])
        except Exception as error:  # torch.load raises what it likes
            raise CheckpointFormatError(f"{file} cannot be read ({error!s:.100}): remove it, and begin again") from None
        if differing := [key for key, value in self.of.items() if of.get(key) != value]:
            raise RequestError(
                f"{file} is of a training with another {join_names(differing)}: name a new folder, or call as before"
            )
        return state

    def keep(self, name: str) -> Callable[[State], None]:
        """A function that writes the state of a training, whole or not at all."""

        def write(state: State) -> None:
            if self.folder is None:
                return
            try:
                with new_file(self._file(name)) as made:
                    torch.save({"of": self.of, "state": vars(state)}, made)
            except (OSError, RuntimeError) as error:  # the latter: torch.save on a full disk
                raise CheckpointPathError(f"cannot write {self._file(name)}: {error}") from None

        return write

    @contextmanager
    def resumable(self, name: str, state: State) -> Iterator[None]:
        """Says how to go on if the user stops the training inside the block."""
        try:
            yield
        except KeyboardInterrupt:
            how = "to be able to go on, name a folder (--folder DIR)" if self.folder is None else self._how(name)
            print(f"\n{name}: stopped after {state.step} of {state.steps} steps; {how}", file=sys.stderr)
            raise

    def _how(self, name: str) -> str:
        state = self.load(name)
        return f"the same call goes on after step {0 if state is None else state.step}, from {self.folder}"

    def _file(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.pt"
