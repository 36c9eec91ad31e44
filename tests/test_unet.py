import runpy
import sys

import pytest
import torch
import torch.nn as nn
from helpers import ROOT

import unet
from benchmarks.reference import UNet as TemplateUNet
from utils.device import channels_last


def test_shapes():
    assert unet.UNet()(torch.zeros(2, 1, 16, 40)).shape == (2, 3, 16, 40)
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


def test_begins_with_predicting_the_gray_photo_and_learns_in_every_layer():
    torch.manual_seed(0)
    net = unet.UNet()
    x, y = torch.rand(2, 1, 32, 48) * 2 - 1, torch.rand(2, 3, 32, 48)
    torch.testing.assert_close(net(x), ((x + 1) / 2).expand(-1, 3, -1, -1))
    before = [weight.clone() for weight in net.parameters()]
    optimizer = torch.optim.Adam(net.parameters())
    for _ in range(2):  # the first step changes last_conv, from which the others learn
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
    for old, new in zip(before, net.parameters(), strict=True):
        assert (old != new).float().mean() > 0.5


def test_channels_last_reaches_the_upsampling_s_backward_pass_and_changes_no_gradient():
    torch.manual_seed(0)
    plain, net = unet.UNet(), unet.UNet()
    net.load_state_dict(plain.state_dict())
    net, whole = channels_last(net, torch.device('cpu')), []
    last = dict(memory_format=torch.channels_last)

    def watch(module, inputs, output):
        output.grad_fn.register_prehook(lambda grads: whole.append(grads[0].is_contiguous(**last)))

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


def test_its_own_check(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['unet.py'])
    runpy.run_path(str(ROOT / 'unet.py'), run_name='__main__')
    assert capsys.readouterr().out == 'Shapes OK\n'
