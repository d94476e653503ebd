"""Names of number formats and devices: strings and those of torch both work, everywhere."""

import torch

from llama_mini.errors import RequestError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def as_dtype(dtype: torch.dtype | str, device: torch.device | str = "cpu") -> torch.dtype:
    """`auto` is bfloat16 where the processor or GPU computes in it, else float32. Raises RequestError when unknown."""
    if dtype == "auto":
        return torch.bfloat16 if _has_bfloat16(torch.device(device)) else torch.float32
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise RequestError(f"unknown dtype {name!r}; known: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def as_device(device: torch.device | str) -> torch.device:
    """A device that can be used here. Raises RequestError."""
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RequestError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "meta":
        raise RequestError("device 'meta' cannot be used: it holds no numbers")
    return device


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
