"""AWQ (`quantization_config` or quant_config.json) in the layout `gemm`.

`qweight` is the transpose of the weight, packed along rows: (columns, rows / 8). `qzeros` holds the zero points, packed
in the same way: (groups, rows / 8). `scales` is (groups, rows).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from llama_mini.checkpoint.io.safetensors_header import WEIGHTS, Tensors
from llama_mini.checkpoint.quantized.affine import Affine, affine_matrix, unpack_some
from llama_mini.checkpoint.quantized.weight import (
    Parts,
    QuantizedMatrix,
    expect,
    modules,
    sizes_of,
    warn_of_activations,
    warn_of_unknown,
)
from llama_mini.errors import ConfigError
from llama_mini.validate import check_whole, short_repr

_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word each of eight rows is
_LAYOUTS = ("gemm", "exllama", "ipex")  # versions; the last two are kernels for files of the first
_BITS = 4
_KEYS = ("version", "zero_point", "bits", "w_bit", "group_size", "q_group_size", "modules_to_", "fuse_", "do_fuse")
# How the tools found the codes and run them: prefixes of what GPTQModel, AutoGPTQ, transformers and AutoRound write.
_TOOLS = (
    *("quant_method", "method", "format", "checkpoint_format", "meta", "lm_head", "pack_dtype", "damp_", "static_"),
    *("true_sequential", "model_", "module", "act_group_aware", "mse", "dataset", "tokenizer", "batch_size", "block_"),
    *("cache_block_outputs", "max_input_length", "pad_token_id", "use_", "exllama", "backend", "quantizer", "sym"),
    *("packing_format", "data_type", "dynamic", "extra_config", "autoround_version", "amp", "enable_", "iters", "lr"),
    *("gradient_accumulate_steps", "low_", "minmax_lr", "nsamples", "seqlen", "quant_block_list", "regex_config"),
    *("scale_dtype", "supported_types", "to_quant_block_names", "act_", "activation", "desc_act", "rotation"),
)


def matrices(settings: Mapping[str, Any], tensors: Tensors, method: str = "AWQ") -> Iterator[QuantizedMatrix]:
    """The matrices of a checkpoint of AWQ. Raises CheckpointFormatError, ConfigError."""
    check_tools(settings, _KEYS, method)
    given = lambda *keys: next((settings[key] for key in keys if settings.get(key) is not None), None)  # noqa: E731
    layout, bits, size = (
        given("version", "checkpoint_format", "format"),
        given("bits", "w_bit"),
        given("group_size", "q_group_size"),
    )
    if str(layout or "gemm").lower() not in _LAYOUTS:
        raise ConfigError(f"version is {short_repr(layout)}; only the layout 'gemm' is implemented")
    if bits not in (None, _BITS):
        raise ConfigError(f"bits is {short_repr(bits)}; AWQ has {_BITS}")
    size = 128 if size is None else size
    if size != -1:
        check_whole("group_size", size, ConfigError)
    for module, parts in modules(tensors, ("qweight", "qzeros", "scales")):
        (columns, _), (_, rows) = sizes_of(parts["qweight"]), sizes_of(parts["scales"])
        group = columns if size < 1 else size
        n_groups = -(-columns // group)
        expect(parts["scales"], WEIGHTS, (n_groups, rows))
        for end, n in (("qweight", columns), ("qzeros", n_groups)):
            expect(parts[end], ("I32", "U32"), (n, -(-rows // 8)))
        yield affine_matrix(module, (rows, columns), parts, method, _BITS, group, _decode)


def check_tools(settings: Mapping[str, Any], known: tuple[str, ...], method: str) -> None:
    """Warns of keys that neither are `known` nor of the tools. Raises ConfigError if one changes what is computed."""
    warn_of_unknown(settings, (*known, *_TOOLS))
    for key in ("rotation", "rotation_config", "rotation_configs"):
        if settings.get(key):
            raise ConfigError(f"{key} is {short_repr(settings[key])}; only checkpoints without it can be read")
    if settings.get("activation") or settings.get("act_bits") not in (None, 16, 32):
        warn_of_activations(method)


def _decode(parts: Parts, first: int, n: int) -> Affine:
    codes, zeros = (unpack_some(parts[end], _BITS, first, n, _ORDER).T.contiguous() for end in ("qweight", "qzeros"))
    scale = parts["scales"][:, first : first + n].T.float().contiguous()
    return Affine(codes, scale, -scale * zeros)
