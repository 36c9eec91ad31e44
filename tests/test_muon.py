"""The optimizer: what it does to a matrix, to each layer, and in float16."""

import copy

import torch
from helpers import is_same

from pretrained_unet import PretrainedUNet
from unet import UNet
from utils.device import channels_last
from utils.muon import Muon, orthogonalize


def hidden(optimizer):
    return {id(weight) for weight, state in optimizer.state.items() if 'momentum' in state}


def error(net):
    torch.manual_seed(1)
    x, y = torch.rand(2, 1, 16, 16) * 2 - 1, torch.rand(2, 3, 16, 16)
    return (net(x) - y).square().mean()


def test_steps_are_those_of_the_whole_matrix():
    torch.manual_seed(0)
    matrix = torch.randn(16, 8, dtype=torch.float64) @ torch.randn(8, 144, dtype=torch.float64)
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    torch.testing.assert_close(orthogonalize(matrix), x, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(orthogonalize(matrix.T).T, x, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(orthogonalize(matrix.float()).double(), x, atol=1e-3, rtol=1e-2)


def test_a_step_of_a_hidden_convolution_is_as_long_as_adam_s():
    torch.manual_seed(0)
    net = channels_last(UNet(), torch.device('cpu'))
    torch.nn.init.normal_(net.last_conv.weight)
    before, optimizer = copy.deepcopy(net), Muon(net.parameters(), lr=1e-3, weight_decay=0)
    error(net).backward()
    optimizer.step()
    pairs = zip(net.parameters(), before.parameters(), strict=True)
    steps = [new - old for new, old in pairs if id(new) in hidden(optimizer)]
    assert len(steps) == 13
    # orthogonal rows: scale × √0.5 to √1.2, at full rank
    assert 0.2e-3 < max(step.square().mean().sqrt() for step in steps) <= 0.5e-3 * 1.25


def test_the_weights_of_hidden_convolutions_shrink():
    net = PretrainedUNet()
    before, optimizer = copy.deepcopy(net), Muon(net.parameters(), lr=0.25)
    (0 * sum(weight.sum() for weight in net.parameters())).backward()
    optimizer.step()
    assert len(hidden(optimizer)) == 31 + 11  # 1×1 of the encoder, and the rest
    for new, old in zip(net.parameters(), before.parameters(), strict=True):
        assert torch.equal(new, old * (0.75 if id(new) in hidden(optimizer) else 1))


def test_first_and_last_layer_and_biases_are_adam_s():
    torch.manual_seed(0)
    net = UNet()
    torch.nn.init.normal_(net.last_conv.weight)  # else only this layer learns in the first step
    other = copy.deepcopy(net)
    optimizer = Muon(net.parameters(), lr=1e-3)
    adam = torch.optim.Adam(other.parameters(), lr=1e-3, fused=True)
    for model in net, other:
        error(model).backward()
    optimizer.step()
    adam.step()
    for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs) == (id(ours) not in hidden(optimizer))


def test_float16_s_scale_changes_nothing_and_an_overflow_takes_no_step():
    torch.manual_seed(0)
    net = UNet()
    scaled = copy.deepcopy(net)
    optimizer, other = Muon(net.parameters()), Muon(scaled.parameters())
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.0)
    for _ in range(2):
        optimizer.zero_grad()
        other.zero_grad()
        error(net).backward()
        scaler.scale(error(scaled)).backward()
        optimizer.step()
        scaler.step(other)
        scaler.update()
    for ours, theirs in zip(net.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    before = copy.deepcopy([scaled.state_dict(), other.state_dict()['state']])
    other.zero_grad()
    scaler.scale(error(scaled) * float('inf')).backward()
    scaler.step(other)
    scaler.update()
    assert is_same(before, [scaled.state_dict(), other.state_dict()['state']])
    assert scaler.get_scale() == 512
