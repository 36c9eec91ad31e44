"""The network: a UNet (Ronneberger et al. 2015, arXiv:1505.04597) from gray to color.

python unet.py      # prints "Shapes OK"
"""

import torch
import torch.nn as nn


def double_conv(in_channels, out_channels):
    """Two 3×3 convolutions, each with a ReLU: (B, in, H, W) → (B, out, H, W)."""
    # in place: a convolution's backward pass needs its input, never its output
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, 3, padding=1),
        nn.ReLU(inplace=True),
    )


class DownSampleBlock(nn.Module):
    """(B, in, H, W) → (B, out, H/2, W/2) and the skip connection (B, out, H, W)."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv_block = double_conv(in_channels, out_channels)
        self.maxpool = nn.MaxPool2d(2)

    def forward(self, x):
        x_skip = self.conv_block(x)
        return self.maxpool(x_skip), x_skip


class UpSampleBlock(nn.Module):
    """(B, C, H, W) and a skip connection (B, in - C, 2H, 2W) → (B, out, 2H, 2W)."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv_block = double_conv(in_channels, out_channels)
        # with align_corners=True a pixel's color would depend on the photo's size
        self.upsample = nn.Upsample(scale_factor=2, mode='bilinear', align_corners=False)

    def forward(self, x, x_skip):
        return self.conv_block(torch.cat([self.upsample(x), x_skip], dim=1))


class UNet(nn.Module):
    """Gray (B, 1, H, W) in [-1, 1] → color (B, 3, H, W), about [0, 1] and not clamped.

    Raises ValueError if three 2×2 poolings cannot divide H and W, both at least 8.
    """

    def __init__(self, image_size=224):
        super().__init__()
        self.image_size = image_size  # side in pixels of the photos that it is trained on
        self.looks = ((1, False),)  # of predict.py: size / image_size; at the mirror image or not
        self.downsample_block_1 = DownSampleBlock(1, 32)
        self.downsample_block_2 = DownSampleBlock(32, 64)
        self.downsample_block_3 = DownSampleBlock(64, 128)
        self.middle_conv_block = double_conv(128, 256)
        self.upsample_block_3 = UpSampleBlock(256 + 128, 128)
        self.upsample_block_2 = UpSampleBlock(128 + 64, 64)
        self.upsample_block_1 = UpSampleBlock(64 + 32, 32)
        self.last_conv = nn.Conv2d(32, 3, 1)
        self.initialize()

    def initialize(self):
        """Draw weights that keep the size of activations through ReLUs (He et al. 2015,
        arXiv:1502.01852), and let the network begin with predicting the gray photo itself.

        One channel carries the gray along the outermost skip connection, so that training learns
        color from its first step. It stays as free to change as all others.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity='relu')
                nn.init.zeros_(module.bias)
        down, up = self.downsample_block_1.conv_block, self.upsample_block_1.conv_block
        with torch.no_grad():
            for conv, gray in (down[0], 0), (down[2], 0), (up[0], 64), (up[2], 0):
                conv.weight[0] = 0
                nn.init.dirac_(conv.weight[:1, gray:])
            down[0].bias[0] = 1  # x + 1 is never negative: ReLUs leave it as it is
            self.last_conv.weight.zero_()
            self.last_conv.weight[:, 0] = 0.5  # from [0, 2] to [0, 1]

    def forward(self, x):
        x_skip1, x_skip2, x_skip3, x = self.encode(x)
        x = self.upsample_block_3(x, x_skip3)
        x = self.upsample_block_2(x, x_skip2)
        x = self.upsample_block_1(x, x_skip1)
        return self.last_conv(x)

    def encode(self, x):
        """Return the three skip connections, and what the network knows of a photo, at H/8×W/8."""
        height, width = x.shape[-2:]
        if height % 8 or width % 8 or not height or not width:
            raise ValueError(f'UNet needs a height and width divisible by 8, not {height}×{width}')
        x, x_skip1 = self.downsample_block_1(x)
        x, x_skip2 = self.downsample_block_2(x)
        x, x_skip3 = self.downsample_block_3(x)
        return x_skip1, x_skip2, x_skip3, self.middle_conv_block(x)


if __name__ == '__main__':
    net = UNet()
    for size in (64, 224), (224, 224):
        assert net(torch.zeros(2, 1, *size)).shape == (2, 3, *size)
    assert sum(p.numel() for p in net.parameters()) == 1_946_371
    print('Shapes OK')
