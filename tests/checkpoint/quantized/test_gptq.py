"""GPTQ and AutoRound: every layout gives the weights that the formula gives, in NumPy with float64.

(GPTQModel's own code needs CUDA or Triton; the layouts are those of its packers and of AutoRound's.)
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama_mini.model.llama import Llama
from tests.checkpoint.quantized.writers import gptq, layers_only, write_model
from tests.tiny_families import logits
from tests.tiny_models import random_tokens

TOKENS = random_tokens(1, 9)


def random_layout(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "bits": int(rng.choice([2, 3, 4, 4, 8])),
        "size": int(rng.choice([32, 64, 16, -1])),
        "sym": bool(rng.integers(2)),
        "v1": bool(rng.integers(2)),
        "order": [None, False, True][rng.integers(3)],
    }


@pytest.mark.parametrize("seed", range(8))
def test_weights_and_logits(tmp_path: Path, seed: int) -> None:
    layout, rng = random_layout(seed), np.random.default_rng(seed)
    settings = {
        "quant_method": "gptq",
        "bits": layout["bits"],
        "group_size": layout["size"],
        "sym": layout["sym"],
        "desc_act": layout["order"] is True,
        "checkpoint_format": "gptq" if layout["v1"] else "gptq_v2",
    }
    model = write_model(
        tmp_path,
        {"quantization_config": settings},
        lambda name, weight: gptq(rng, tuple(weight.shape), **layout) if layers_only(name, weight) else None,
    )
    mine = Llama.from_pretrained(tmp_path, dtype="float32")
    torch.testing.assert_close(mine(TOKENS), logits(model, TOKENS), rtol=0, atol=2e-5)
