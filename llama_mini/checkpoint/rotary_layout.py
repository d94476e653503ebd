"""Meta's files and llama.cpp's interleave the rotary pairs of a head, where this model splits halves."""

from torch import Tensor

from llama_mini.errors import CheckpointMismatchError


def split_halves(rows: Tensor, heads: int, name: str) -> Tensor:
    """Rows of q or k, or their biases: pairs that lie side by side -> the two halves of each head.

    Raises CheckpointMismatchError where the rows are not `heads` heads of an even width.
    """
    if rows.shape[0] % (2 * heads):
        raise CheckpointMismatchError(f"{name} has {rows.shape[0]} rows, which are not {heads} heads of an even width")
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1)
    return pairs.transpose(1, 2).reshape(rows.shape)
