"""Bilinear upsampling as two matrix products, beside torch's own.

On a GPU the backward pass of nn.Upsample adds up with atomic operations, slowly and in no fixed
order. Two matrix products need none. Only a measurement on a GPU can tell whether they pay:

    python benchmarks/gpu.py upsampling
    python benchmarks/speed.py network --upsample matmul
"""

import torch
from torch import nn
from torch.nn.functional import interpolate


class MatmulUpsample(nn.Module):
    """Compute nn.Upsample(scale_factor=2, mode='bilinear') of squares (B, C, size, size)."""

    def __init__(self, size):
        super().__init__()
        # row o of the matrix has the weights of the inputs in the output o
        weights = interpolate(torch.eye(size)[None], scale_factor=2, mode='linear')[0]
        self.register_buffer('matrix', weights.T.contiguous(), persistent=False)

    def forward(self, x):
        batch, channels, height, width = x.shape
        x = x.permute(0, 2, 3, 1)  # as channels-last lies in memory
        x = self.matrix @ x.reshape(batch, height, width * channels)
        x = self.matrix @ x.reshape(batch * 2 * height, width, channels)
        return x.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


def use_matmul(net, image_size):
    """Replace the upsampling in a UNet for photos of `image_size` pixels square; return it."""
    for block, factor in (
        (net.upsample_block_3, 8),
        (net.upsample_block_2, 4),
        (net.upsample_block_1, 2),
    ):
        block.upsample = MatmulUpsample(image_size // factor)
    return net
