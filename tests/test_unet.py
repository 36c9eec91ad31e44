import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from conftest import ROOT
from device import channels_last

import unet


def template_conv(i, o):
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.ReLU(),
                         nn.Conv2d(o, o, 3, padding=1), nn.ReLU())


class TemplateBlock(nn.Module):
    def __init__(self, i, o, **kwargs):
        super().__init__()
        self.conv_block = template_conv(i, o)
        for name, module in kwargs.items():
            setattr(self, name, module)


class TemplateUNet(nn.Module):
    """As a student would write it from the course's template: names and shapes only."""

    def __init__(self):
        super().__init__()
        for n, (i, o) in enumerate([(1, 32), (32, 64), (64, 128)], 1):
            setattr(self, f'downsample_block_{n}', TemplateBlock(i, o, maxpool=nn.MaxPool2d(2)))
        self.middle_conv_block = template_conv(128, 256)
        for n, (i, o) in {3: (384, 128), 2: (192, 64), 1: (96, 32)}.items():
            setattr(self, f'upsample_block_{n}',
                    TemplateBlock(i, o, upsample=nn.Upsample(scale_factor=2, mode='bilinear')))
        self.last_conv = nn.Conv2d(32, 3, 1)

    def forward(self, x):
        skips = []
        for n in 1, 2, 3:
            block = getattr(self, f'downsample_block_{n}')
            skips.append(block.conv_block(x))
            x = block.maxpool(skips[-1])
        x = self.middle_conv_block(x)
        for n in 3, 2, 1:
            block = getattr(self, f'upsample_block_{n}')
            x = block.conv_block(torch.cat([block.upsample(x), skips.pop()], 1))
        return self.last_conv(x)


def test_parameters_and_shapes():
    net = unet.UNet()
    assert sum(p.numel() for p in net.parameters()) == 1_946_371
    assert net(torch.zeros(2, 1, 16, 40)).shape == (2, 3, 16, 40)
    down, skip = unet.DownSampleBlock(1, 32)(torch.zeros(2, 1, 8, 16))
    assert down.shape == (2, 32, 4, 8) and skip.shape == (2, 32, 8, 16)
    up = unet.UpSampleBlock(64 + 32, 32)(torch.zeros(2, 64, 4, 8), skip)
    assert up.shape == (2, 32, 8, 16)


def test_computes_what_the_template_computes():
    torch.manual_seed(0)
    net, template = unet.UNet(), TemplateUNet()
    template.load_state_dict(net.state_dict(), strict=True)
    x = torch.rand(2, 1, 32, 48) * 2 - 1
    torch.testing.assert_close(net(x), template(x))


def test_channels_last_reaches_the_upsampling_s_backward_pass_and_changes_no_gradient():
    torch.manual_seed(0)
    plain, net = unet.UNet(), unet.UNet()
    net.load_state_dict(plain.state_dict())
    net, whole = channels_last(net, torch.device('cpu')), []

    def watch(module, inputs, output):
        output.grad_fn.register_prehook(lambda gradients: whole.append(
            gradients[0].is_contiguous(memory_format=torch.channels_last)))

    for block in net.upsample_block_1, net.upsample_block_2, net.upsample_block_3:
        block.upsample.register_forward_hook(watch)
    x, y = torch.rand(2, 1, 32, 48) * 2 - 1, torch.rand(2, 3, 32, 48)
    for n in plain, net:
        nn.functional.mse_loss(n(x), y).backward()
    assert whole == [True] * 3
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize('size', [(12, 16), (16, 12), (0, 8), (225, 225)])
def test_refuses_sizes_that_three_poolings_cannot_divide(size):
    with pytest.raises(ValueError, match=f'{size[0]}×{size[1]}'):
        unet.UNet()(torch.zeros(1, 1, *size))


def test_its_own_check():
    done = subprocess.run([sys.executable, ROOT / 'unet.py'], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, 'Shapes OK\n')
