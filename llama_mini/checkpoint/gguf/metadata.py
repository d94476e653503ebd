"""The metadata of a GGUF file, one setting at a time. A key that nothing reads is refused, unless it is neutral."""

from typing import Any

import numpy as np

from llama_mini.checkpoint.gguf.header import GGUFHeader
from llama_mini.checkpoint.gguf.rope import ROPE_KEYS
from llama_mini.errors import ConfigError
from llama_mini.validate import is_whole, short_repr

NEUTRAL_KEYS = {  # these values change nothing; others are refused where no setting reads the key
    **dict.fromkeys(("attention.clamp_kqv", "attention.max_alibi_bias", "attention.sliding_window"), 0),
    **dict.fromkeys(("expert_count", "expert_used_count", "leading_dense_block_count", "nextn_predict_layers"), 0),
    **dict.fromkeys(("attention.temperature_scale", "pooling_type"), 0),
    "attention.causal": True,
    "logit_scale": 1,
    "use_parallel_residual": False,
}
IGNORED_KEYS = {"tensor_data_layout"}  # names the layout of the file that this one was converted from
IGNORED_KEYS |= {"attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"}  # of norms that a model lacks


class Metadata:
    """The keys `<architecture>.*` of a file.

    Every member raises ConfigError, which names the key, its value and what is implemented.
    """

    def __init__(self, header: GGUFHeader) -> None:
        self.values, self.tensors = header.metadata, header.tensors
        self.architecture: Any = self.values.get("general.architecture")
        self._read = IGNORED_KEYS | ROPE_KEYS  # the others are read where they are needed

    def get(self, name: str, *default: Any) -> Any:
        """The value of `<architecture>.<name>`, which is required where there is no default."""
        self._read.add(name)
        value = self.values.get(f"{self.architecture}.{name}", *default)
        if isinstance(value, np.ndarray) and len(value) and np.all(value == value[0]):
            value = value[0].item()  # one value for each layer, all the same
        if value is None and not default:
            raise ConfigError(f"{self.architecture}.{name} is missing from the metadata")
        if isinstance(value, np.ndarray | list):
            raise ConfigError(f"{self.architecture}.{name} differs between layers; only one value is implemented")
        return shortest(value)

    def layers(self, name: str, period: int, n_layers: int) -> tuple[int, ...]:
        """The layers that a pattern selects: a flag for each layer, or a period whose last layer is left out."""
        self._read.add(name)
        pattern = self.values.get(f"{self.architecture}.{name}", period)
        if isinstance(pattern, np.ndarray) and pattern.dtype.kind in "biu" and pattern.shape == (n_layers,):
            return tuple(np.flatnonzero(pattern).tolist())
        if not is_whole(pattern) or pattern < 0:
            known = f"a flag for each of {n_layers} layers, or a number n: all but every n-th"
            raise ConfigError(f"{self.architecture}.{name} is {short_repr(pattern)}; it must be {known}")
        return tuple(i for i in range(n_layers) if not pattern or i % pattern != pattern - 1)

    def ignore(self, *names: str) -> None:
        """Accepts any value of these settings, which change nothing in the architecture."""
        self._read.update(names)

    def check_all_read(self) -> None:
        """Refuses the settings that nothing has read, and that would change something."""
        for name, neutral in NEUTRAL_KEYS.items():
            value = self.values.get(key := f"{self.architecture}.{name}", neutral)
            if name not in self._read and (isinstance(value, np.ndarray) or value != neutral):
                raise ConfigError(f"{key} is {short_repr(value)}; only {neutral!r} is implemented")
        for key, value in self.values.items():
            name = key.removeprefix(f"{self.architecture}.")
            if name not in (key, *NEUTRAL_KEYS, *self._read):
                raise ConfigError(f"{key:.80} is {short_repr(value)}; this setting is not implemented")


def shortest(value: Any) -> Any:
    """The short decimal that a float32 stands for: 1e-05, not 9.999999747378752e-06."""
    if not isinstance(value, float):
        return value
    with np.errstate(over="ignore"):
        single = np.float32(value)
    return float(str(single)) if single == value else value
