"""Records calls of the norms of transformers, which our norms must repeat: tests/golden/norms_*.safetensors.

    python scripts/make_goldens.py                     writes all goldens; refuses if one exists
    python scripts/make_goldens.py llama gemma3 --force
    python scripts/make_goldens.py --check             rebuilds in a temporary folder and compares

One file for each family: a tiny random model in three dtypes, or the real SmolLM2-135M ("smollm2") in float32. Each
call of a norm gives `<dtype>/<module>/input`, `.../gain` and `.../output`; `calls` in the metadata says how to rebuild
the norm. llama_mini computes none of these values.
"""

import argparse
import contextlib
import io
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

GOLDEN_DIR = Path(__file__).parents[1] / "tests" / "golden"
SEED = 20240229
PROMPT = "The capital of France is"
DTYPES = ("float32", "bfloat16", "float16")

# Relative difference allowed when a golden is rebuilt on another processor: its matrix products, and so the inputs of
# the norms, round differently. The output of a norm on equal input does not, and is compared bit by bit.
DRIFT = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


class Family(NamedTuple):
    """The norm of a model of transformers, as its source has it: the class, the gain convention, the rounding order."""

    model_type: str
    norm_class: str
    gain: str
    cast: str
    eps: float


FAMILIES = {
    "llama": Family("llama", "LlamaRMSNorm", "w", "early", 1e-5),
    "qwen3": Family("qwen3", "Qwen3RMSNorm", "w", "early", 1e-6),  # q and k normed per head, (B, T, H, D)
    "olmo2": Family("olmo2", "Olmo2RMSNorm", "w", "late", 1e-5),  # q and k normed over the whole projection
    "gemma2": Family("gemma2", "Gemma2RMSNorm", "1+w", "late", 1e-6),
    "gemma3": Family("gemma3_text", "Gemma3RMSNorm", "1+w", "late", 1e-6),  # q and k per head, (B, H, T, D)
}
TINY = {
    "vocab_size": 32,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,  # not hidden_size / heads: a q or k norm over the wrong width cannot pass
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Golden(NamedTuple):
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which goldens, default all: {' '.join(BUILDERS)}")
    parser.add_argument("--check", action="store_true", help="rebuild in a temporary folder and compare; write nothing")
    parser.add_argument("--force", action="store_true", help="replace goldens that exist")
    parser.add_argument("--out", type=Path, default=GOLDEN_DIR, metavar="DIR", help="default: tests/golden")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in BUILDERS]:
        parser.error(f"unknown golden {', '.join(unknown)}; known: {', '.join(BUILDERS)}")
    names = args.names or list(BUILDERS)
    return check(names, args.out) if args.check else write(names, args.out, force=args.force)


def write(names: list[str], folder: Path, *, force: bool) -> int:
    """Builds the named goldens into `folder`. Returns the exit code: 1 if one exists and `force` is off."""
    if not force and (existing := [str(path) for name in names if (path := path_of(name, folder)).exists()]):
        print(f"already exists, --force replaces it: {', '.join(existing)}", file=sys.stderr)
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        path, golden = path_of(name, folder), BUILDERS[name]()
        aside = path.with_suffix(".part")
        save_file(golden.tensors, aside, metadata=golden.metadata)
        aside.replace(path)
        print(f"{path}: {len(json.loads(golden.metadata['calls']))} norm calls, {path.stat().st_size:,} bytes")
    return 0


def check(names: list[str], folder: Path) -> int:
    """Rebuilds the named goldens elsewhere and prints how they differ. Returns the exit code: 1 if they do."""
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        with contextlib.redirect_stdout(io.StringIO()):  # its paths would mean nothing to the user
            write(names, Path(temporary), force=False)
        for name in names:
            path = path_of(name, folder)
            if not path.exists():
                faults, note = ["is absent"], ""
            else:
                faults, note = compare(read(path), read(path_of(name, Path(temporary))))
            failed |= bool(faults)
            print("\n".join(f"{path}: {line}" for line in faults or [f"as rebuilt ({note})"]))
    return int(failed)


def compare(stored: Golden, rebuilt: Golden) -> tuple[list[str], str]:
    """A line for each fault, and a note on what differs and may: versions, and rounding within DRIFT."""
    faults = [
        f"metadata {key!r} differs: {stored.metadata.get(key)!r}, rebuilt {rebuilt.metadata.get(key)!r}"
        for key in ("seed", "rule", "calls", "prompt")
        if stored.metadata.get(key) != rebuilt.metadata.get(key)
    ]
    if stored.tensors.keys() != rebuilt.tensors.keys():
        return [*faults, f"tensors differ: {sorted(stored.tensors.keys() ^ rebuilt.tensors.keys())}"], ""
    drifted, worst = 0, 0.0
    for name, old in stored.tensors.items():
        new = rebuilt.tensors[name]
        if (old.dtype, old.shape) != (new.dtype, new.shape):
            faults.append(f"{name} is {old.dtype} {tuple(old.shape)}, rebuilt {new.dtype} {tuple(new.shape)}")
        elif not torch.equal(old, new):
            call, _, part = name.rpartition("/")
            computed = part == "input" or (part == "output" and not same(stored, rebuilt, f"{call}/input"))
            drift = ((old.double() - new.double()).abs().max() / old.double().abs().max()).item()
            if not computed or not drift <= DRIFT[call.partition("/")[0]]:
                faults.append(f"{name} differs by {drift:.2g} of its largest element")
            drifted, worst = drifted + 1, max(worst, drift)
    made_with = ", ".join(f"{key} {stored.metadata[key]}" for key in ("torch", "transformers"))
    note = f"all bits; made with {made_with}" if not drifted else f"{drifted} tensors drift, at most {worst:.2g}"
    return faults, note


def same(one: Golden, other: Golden, name: str) -> bool:
    return torch.equal(one.tensors[name], other.tensors[name])


def path_of(name: str, folder: Path) -> Path:
    return folder / f"norms_{name}.safetensors"


def read(path: Path) -> Golden:
    with safe_open(path, framework="pt") as file:
        return Golden({name: file.get_tensor(name) for name in file.keys()}, file.metadata())  # noqa: SIM118


def tiny_golden(family: Family) -> Golden:
    """Two layers with random weights and gains, run in each dtype on two sequences of five tokens."""
    tokens = torch.tensor([[1, 17, 4, 9, 30], [1, 5, 5, 22, 3]])
    tensors: dict[str, Tensor] = {"tokens": tokens}
    calls: dict[str, dict[str, Any]] = {}
    for dtype in DTYPES:
        record(tiny_model(family).to(getattr(torch, dtype)), family, tokens, dtype, tensors, calls)
    return Golden(tensors, describe(calls, model_type=family.model_type))


def tiny_model(family: Family) -> nn.Module:
    transformers = import_transformers()
    config = transformers.AutoConfig.for_model(
        family.model_type, **TINY, rms_norm_eps=family.eps, attn_implementation="eager"
    )
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config).eval()
    # NumPy's uniform numbers are whole numbers scaled: equal on every machine, unlike torch.randn.
    random = np.random.Generator(np.random.PCG64(SEED))
    for name, parameter in model.named_parameters():
        values = random.random(tuple(parameter.shape)) * 2 - 1
        if parameter.ndim == 1:
            values = values / 2 + (family.gain == "w")  # effective gains of 0.5 to 1.5
        else:  # embeddings as small as in real models, so that eps matters in the first norm
            values *= 0.02 if "embed" in name else math.sqrt(3 / parameter.shape[1])
        parameter.data = torch.from_numpy(values).float()
    return model


def smollm2_golden() -> Golden:
    """All 61 norms of the default checkpoint, float32, for one short prompt."""
    from llama_mini.cli.default_model import ensure_default_checkpoint  # where the file lies, nothing more

    transformers, path = import_transformers(), ensure_default_checkpoint()
    tokens = transformers.AutoTokenizer.from_pretrained(path)(PROMPT, return_tensors="pt").input_ids
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="float32", attn_implementation="eager").eval()
    tensors: dict[str, Tensor] = {"tokens": tokens}
    calls: dict[str, dict[str, Any]] = {}
    record(model, FAMILIES["llama"], tokens, "float32", tensors, calls)
    return Golden(tensors, describe(calls, model_type="llama", prompt=PROMPT))


def record(
    model: nn.Module,
    family: Family,
    tokens: Tensor,
    dtype: str,
    tensors: dict[str, Tensor],
    calls: dict[str, dict[str, Any]],
) -> None:
    """Runs `model` on `tokens` and adds every norm call to `tensors` and `calls`, under `<dtype>/<module>`."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, call: str) -> None:
        if call in calls:
            raise RuntimeError(f"{call} ran twice: the second call would hide the first")
        assert isinstance(module.weight, Tensor)
        parts = {"input": args[0], "gain": module.weight, "output": output}
        tensors.update({f"{call}/{part}": value.detach().clone().contiguous() for part, value in parts.items()})
        eps = vars(module)["eps" if "eps" in vars(module) else "variance_epsilon"]
        calls[call] = {"dtype": dtype, "eps": eps, "gain": family.gain, "cast": family.cast}

    norms = {name: module for name, module in model.named_modules() if type(module).__name__.endswith("Norm")}
    if strange := {type(module).__name__ for module in norms.values()} - {family.norm_class}:
        raise RuntimeError(f"norms of another class than {family.norm_class}: {', '.join(strange)}")
    for name, module in norms.items():
        module.register_forward_hook(partial(hook, call=f"{dtype}/{name}"))
    with torch.no_grad():
        model(tokens)
    if missed := [name for name in norms if f"{dtype}/{name}" not in calls]:
        raise RuntimeError(f"norms that never ran: {', '.join(missed)}")


def describe(calls: dict[str, dict[str, Any]], **more: str) -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "transformers": import_transformers().__version__,
        "seed": str(SEED),
        "rule": "forward hooks on the norms of transformers: eager attention, kernels from the hub off, no gradients",
        "calls": json.dumps(calls),
        **more,
    }


def import_transformers() -> Any:
    """transformers without kernels from the hub; it reads this setting once, when it is imported."""
    os.environ["USE_HUB_KERNELS"] = "NO"
    import transformers

    return transformers


BUILDERS: dict[str, Callable[[], Golden]] = {
    **{name: partial(tiny_golden, family) for name, family in FAMILIES.items()},
    "smollm2": smollm2_golden,
}


if __name__ == "__main__":
    sys.exit(main())
