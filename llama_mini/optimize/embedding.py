"""The head, and the embedding that is tied to it: one stored copy serves the lookup of rows and the logits."""

import torch
from torch import Tensor, nn

from llama_mini.optimize.matrix import FEW, Matrix, tracked


class FusedHead(nn.Module):
    """Hidden states (..., C) -> logits (..., V); float32 where they are few, since nothing needs to round them."""

    def __init__(self, matrix: Matrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.matrix
        if matrix.kernels and x.numel() <= FEW * matrix.columns and not tracked(x):
            return torch.ops.llama_mini.project(x, matrix.tensors, matrix.bias_or_nothing, matrix.width)
        return matrix(x)


class FusedEmbedding(nn.Module):
    """tokens (B, T) -> (B, T, C), and the tied head."""

    def __init__(self, matrix: Matrix) -> None:
        super().__init__()
        self.head = FusedHead(matrix)

    @property
    def dtype(self) -> torch.dtype:
        return self.head.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.head.matrix.tensors[0].device

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head.matrix.rows_at(tokens)

    def project(self, x: Tensor) -> Tensor:
        return self.head(x)
