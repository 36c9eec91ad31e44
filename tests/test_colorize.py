"""The training: as a student calls it, step by step, and as whole runs."""

import io
import math
import re
import shlex
import signal
from contextlib import redirect_stderr, redirect_stdout
from functools import partialmethod
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import CHECKPOINT, IMAGES, TAGS, WEIGHTS, call, curves, events, load, signal_after
from PIL import Image
from torch._dynamo.testing import CompileCounter
from torchvision.transforms.functional import pil_to_tensor

import colorize
import predict
from benchmarks.reference import UNet as TemplateUNet
from colorize import Recipe
from data_utils import augment
from unet import UNet
from utils.checkpoint import Progress, load_weights
from utils.color import GAIN, OBJECTIVE, luminance
from utils.device import Precision
from utils.stop import Stopped


def batches(n=3, size=16):
    torch.manual_seed(0)
    return [(torch.rand(4, 1, size, size) * 2 - 1, torch.rand(4, 3, size, size)) for _ in range(n)]


def adam(net):
    return torch.optim.Adam(net.parameters(), 1e-3)


def test_train_as_a_student_calls_it():
    net, by_hand, loader, seen = UNet(), UNet(), batches(), []
    by_hand.load_state_dict(net.state_dict())
    writer = SimpleNamespace(add_scalar=lambda *event: seen.append(event))
    assert math.isnan(colorize.train(net, adam(net), loader, 0, writer))  # and nothing changes
    loss = colorize.train(net, adam(net), loader, 2, writer)

    optimizer, losses = adam(by_hand), []
    for x, y in 2 * loader:
        optimizer.zero_grad()
        error = F.mse_loss(by_hand(x), y)
        error.backward()
        optimizer.step()
        losses.append(error.item())
    first, second = (pytest.approx(sum(losses[n : n + 3]) / 3, rel=1e-4) for n in (0, 3))
    assert seen == [('training loss', first, 1), ('training loss', second, 2)]
    assert loss == second


@pytest.mark.parametrize('bad, step', [(math.nan, 2), (math.inf, 3)])
def test_a_loss_that_is_not_finite_names_its_step(bad, step):
    net, loader = UNet(), batches()
    loader[step - 1][1][0, 0, 0, 0] = bad
    with pytest.raises(FloatingPointError, match=f'loss is {bad} at step [{step}-3] of epoch 1'):
        colorize.train(net, adam(net), loader)


def test_weights_that_became_infinite_in_the_last_step_are_seen():
    net = UNet()
    with pytest.raises(FloatingPointError, match='weight is not finite at step 1 of epoch 1'):
        colorize.train(net, torch.optim.SGD(net.parameters(), math.inf), batches(1), 1)


def test_a_stop_finishes_the_step_and_tells_the_place():
    net, progress, stop = UNet(), Progress(), SimpleNamespace(signum=0)

    def loader():
        for number, batch in enumerate(batches(), 1):
            stop.signum = signal.SIGTERM if number == 3 else 0
            yield batch

    with pytest.raises(Stopped):
        colorize.train_epoch(net, adam(net), loader(), progress, stop=stop)
    assert (progress.epoch, progress.step, progress.seen) == (0, 2, 8)


@pytest.mark.parametrize('share', [0.0, 1.0])
def test_a_step_sees_photos_augmented_and_a_student_s_batches_as_they_are(monkeypatch, share):
    seen, net, loader = [], UNet(), batches()
    keep = lambda *given: seen.append(given[2:4]) or torch.tensor(0.0)  # noqa: E731
    monkeypatch.setattr(colorize, 'train_step', keep)
    recipe = Recipe(small_steps=share, steps_per_epoch=3, steps=120)
    colorize.train_epoch(net, adam(net), loader, Progress(epoch=20), recipe)
    for step, (batch, xy) in enumerate(zip(loader, seen, strict=True), 60):
        expected = augment(*batch, 8, 20, 40, step) if share else batch
        torch.testing.assert_close(xy, tuple(expected), rtol=0, atol=0)


@pytest.mark.parametrize('name', ['bf16', 'fp16'])
def test_half_precision_on_the_cpu_stays_near_float32(name):
    losses = []
    for recipe in Recipe(), Recipe(Precision(name)):
        torch.manual_seed(0)
        net = UNet()
        losses.append(colorize.train_epoch(net, adam(net), batches(4, 8), Progress(), recipe))
        assert net.last_conv.weight.dtype == torch.float32
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.03)


def test_the_rate_rises_for_two_of_ten_steps_and_falls_for_eight():
    recipe = Recipe(lr=1e-3, steps=10)
    rates = [0.5e-3, 1e-3, *(eighths / 8e3 for eighths in range(8, 0, -1))]
    assert [recipe.get_lr(step) for step in range(10)] == pytest.approx(rates)


@pytest.mark.parametrize(
    'share, size, sides',
    [
        (0.75, 64, [64, 40, 40, 40, 40, 40, 64, 64]),  # the first tells whether the memory suffices
        (0.5, 16, [16, 8, 8, 8, 16, 16, 16, 16]),
        (0.75, 8, [8] * 8),
        (0.0, 64, [64] * 8),
    ],
)
def test_the_first_steps_see_small_photos(share, size, sides):
    recipe = Recipe(small_steps=share, steps=8)
    assert [recipe.get_side(step, size) for step in range(8)] == sides


@pytest.fixture(scope='module')
def trained(drawings, tmp_path_factory):
    """The folder of a run of five epochs that learns; the file `log` has what it printed."""
    folder = tmp_path_factory.mktemp('trained')
    flags = '--epochs 5 --image_size 32 --batch_size 8 --val_fraction 0.25 --device cpu'.split()
    with open(folder / 'log', 'w') as log, redirect_stdout(log), redirect_stderr(log):
        assert call(folder, '--data_path', drawings, *flags) == 0
    return folder


def test_a_log_file_has_a_line_an_epoch_with_the_page_s_numbers(trained):
    text, curve = (trained / 'log').read_text(), curves(trained)
    assert '\r' not in text and curve.keys() == TAGS | IMAGES
    rows = re.findall(r'^ +(\d)/5 +(\S+) +(\S+) .* (\S+) dB', text, re.MULTILINE)
    tags = 'training loss', 'validation loss', GAIN
    assert rows == [
        (f'{n}', f'{training:.5f}', f'{validation:.5f}', f'{gain:+.2f}')
        for (n, training), (_, validation), (_, gain) in zip(*map(curve.get, tags), strict=True)
    ]


def test_the_page_has_the_same_photos_at_every_epoch_and_the_graph(trained):
    page = events(trained / 'runs/UNet')
    grids = {}
    for tag in IMAGES:
        assert [event.step for event in page.Images(tag)] == [1, 2, 3, 4, 5]
        images = [Image.open(io.BytesIO(event.encoded_image_string)) for event in page.Images(tag)]
        grids[tag] = [pil_to_tensor(image.convert('RGB')).float() for image in images]
        assert torch.equal(*grids[tag][::4]) == (tag in ('Input', 'Ground truth'))
    # the input is undone from [-1, 1]: it is the truth's own gray, but for the JPEG's losses
    gray = luminance(grids['Ground truth'][0][None])
    assert (grids['Input'][0] - gray).abs().mean() < 2 and gray.std() > 20
    nodes = ' '.join(node.name for node in page.Graph().node)
    assert all(f'{way}sample_block_{n}' in nodes for way in ('down', 'up') for n in (1, 2, 3))
    places = re.findall(r'_path: "(.*)"', (trained / 'runs/projector_config.pbtxt').read_text())
    assert len(places) == 3 and all((trained / 'runs' / place).exists() for place in places)


def test_a_tiny_run_learns_and_its_printed_commands_work(trained, drawings):
    """The script is its own test: it and the commands that it prints must get somewhere."""
    curve = curves(trained)
    assert curve[GAIN][-1][1] > 1  # a network that learns only gray has 0
    assert curve['validation loss'][-1][1] < 0.7 * curve['validation loss'][0][1]
    TemplateUNet().load_state_dict(load(trained / 'unet.pth'), strict=True)
    _, best = min((objective, epoch) for epoch, objective in curve[OBJECTIVE])
    gain, about = dict(curve[GAIN])[best], load_weights(UNet(), trained / 'unet.pth').about
    assert about == f'trained on 43 photos; {gain:+.1f} dB in epoch {best} of UNet'

    text = (trained / 'log').read_text().replace('YOUR_PHOTOS', str(drawings))
    for command in re.findall(r'^    python predict\.py (.*)$', text, re.MULTILINE):
        assert call(trained, *shlex.split(command, comments=True), program=predict) == 0
    assert len(list((trained / 'compared').glob('*.jpg'))) == 4
    results = [path.relative_to(drawings) for path in drawings.rglob('*.jpg')]
    truth, colorized = (
        torch.stack([pil_to_tensor(Image.open(folder / name)).float() for name in results])
        for folder in (drawings, trained / 'colorized')
    )
    # about 1 dB better than the gray copy
    assert F.mse_loss(colorized, truth) < 0.8 * F.mse_loss(luminance(truth).expand_as(truth), truth)


def test_without_validation_the_last_weights_are_saved(train, tmp_path):
    assert '56 photos to train on, 0 held out' in train('--val_fraction', 0, '--epochs', 2).out
    weights, last = load(tmp_path / 'unet.pth'), load(tmp_path / CHECKPOINT)['net']
    assert all(torch.equal(weights[name], value) for name, value in last.items())
    assert 'validation loss' not in curves(tmp_path)
    about = load_weights(UNet(), tmp_path / 'unet.pth').about
    assert about == 'trained on 56 photos; epoch 2 of UNet'


def test_a_dry_run_goes_through_everything_and_keeps_nothing(train, tmp_path):
    printed = train('--dry_run')
    assert '8 photos to train on' in printed.out and ' 1/1 ' in printed.out and printed.err == ''
    with signal_after(1):
        assert 'to go on' not in train('--dry_run', code=128 + signal.SIGTERM).out
    assert list(tmp_path.iterdir()) == []


def test_best_weights_are_kept(train, tmp_path):
    train('--epochs', 2)
    progress = load(tmp_path / CHECKPOINT)['progress']
    gains = dict(curves(tmp_path)[GAIN])
    assert progress['best_gain'] == pytest.approx(gains[progress['best_epoch']])
    # a third epoch with a ruinous learning rate changes the checkpoint but not the weights
    weights = (tmp_path / WEIGHTS).read_bytes()
    train('--epochs', 3, '--lr', 0.3, '--resume')
    last = load(tmp_path / CHECKPOINT)['progress']
    best = [progress[key] for key in ('best', 'best_epoch')]
    assert [last[key] for key in ('epoch', 'best', 'best_epoch')] == [3, *best]
    assert (tmp_path / WEIGHTS).read_bytes() == (tmp_path / 'unet.pth').read_bytes() == weights


def test_a_run_in_float16_goes_on_with_its_scaler(train, tmp_path):
    # few pixels, because many processors compute float16 in software: two steps an epoch
    half = '--precision', 'fp16', '--image_size', 8, '--batch_size', 24, '--epochs', 2
    train(*half, '--name', 'whole')
    with signal_after(3):
        train(*half, code=128 + signal.SIGTERM)
    assert load(tmp_path / CHECKPOINT)['scaler']['_growth_tracker'] == 3
    train(*half, '--resume')
    assert load(tmp_path / CHECKPOINT)['scaler']['_growth_tracker'] == 4
    ends = (dict(load(tmp_path / path)) for path in (WEIGHTS, 'runs/whole/unet.pth'))
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_a_compiled_network_trains_and_saves_plain_weights(train, tmp_path, monkeypatch):
    """With Dynamo's graphs run as they are: a C++ compiler would take minutes over them."""
    graphs = CompileCounter()
    method = partialmethod(torch.nn.Module.compile, backend=graphs)
    monkeypatch.setattr(torch.nn.Module, 'compile', method)
    monkeypatch.setattr(colorize, 'check_compiler', lambda _: None)
    step = '--epochs', 1, '--val_fraction', 0, '--batch_size', 56, '--image_size', 8
    train(*step)
    train(*step, '--compile', '--name', 'compiled')
    plain, compiled = load(tmp_path / WEIGHTS), load(tmp_path / 'runs/compiled/unet.pth')
    assert graphs.frame_count > 0
    torch.testing.assert_close(dict(compiled), dict(plain), atol=1e-3, rtol=1e-3)
