"""The learning rate and the photos' size, which come from the number of the step alone."""

import pytest
import torch
from helpers import EPOCHS, STEPS, signal_after

import colorize
from data_utils import gray_and_color
from unet import UNet
from utils.recipe import Recipe


def test_the_rate_rises_and_falls():
    recipe = Recipe(lr=1e-3, steps=10)  # two steps of warm-up, then half a cosine over eight
    rates = [recipe.get_lr(step) for step in range(11)]
    assert rates == pytest.approx(
        [0.5e-3, 1e-3, 1e-3, 0.96194e-3, 0.85355e-3, 0.69134e-3]
        + [0.5e-3, 0.30866e-3, 0.14645e-3, 0.03806e-3, 0],
        abs=1e-8,
    )
    assert recipe.get_lr(1000) == 0
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=7)
    recipe.set_lr(optimizer, 6)
    assert optimizer.param_groups[0]['lr'] == rates[6]
    Recipe().set_lr(optimizer, 0)  # a student's own rate
    assert optimizer.param_groups[0]['lr'] == rates[6]


def sizes(recipe, size):
    y = torch.zeros(2, 3, size, size)
    shapes = [[tuple(part.shape) for part in recipe.shrink(s, y[:, :1], y)] for s in range(8)]
    assert all(x == (2, 1, *y[2:]) and y[:2] == (2, 3) for x, y in shapes)
    return [y[-1] for _, y in shapes]


@pytest.mark.parametrize(
    ('share', 'size', 'seen'),
    [
        (0.75, 64, [64, 32, 32, 32, 32, 32, 64, 64]),  # the first tells whether memory suffices
        (0.5, 16, [16, 8, 8, 8, 16, 16, 16, 16]),
        (0.0, 64, [64] * 8),
        (0.75, 40, [40] * 8),  # 20 is no multiple of 8
        (0.75, 8, [8] * 8),
    ],
)
def test_the_first_steps_see_small_photos(share, size, seen):
    assert sizes(Recipe(small_steps=share, steps=8), size) == seen


def test_a_student_s_own_loop_sees_photos_as_they_are():
    assert sizes(Recipe(), 64) == [64] * 8


def test_small_photos_are_the_means_of_two_by_two_pixels():
    photos = torch.randint(256, (2, 16, 16, 3), dtype=torch.uint8)
    x, y = gray_and_color(photos)
    small_x, small_y = Recipe(small_steps=0.5, steps=4).shrink(1, x, y)
    assert torch.allclose(small_y[1, 2, 3, 5], y[1, 2, 6:8, 10:12].mean())
    # and their gray is still that of their color
    assert torch.allclose(
        small_x,
        (small_y * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True) * 2 - 1,
        atol=1e-6,
    )


def test_a_resumed_run_has_the_rates_and_sizes_that_it_would_have_had(train, monkeypatch):
    seen, forward = [], UNet.forward

    def see(net, x):
        if net.training and torch.is_grad_enabled():
            seen.append(x.shape[-1])
        return forward(net, x)

    rates, set_lr = [], Recipe.set_lr

    def note(recipe, optimizer, step):
        set_lr(recipe, optimizer, step)
        rates.append(optimizer.param_groups[0]['lr'])

    monkeypatch.setattr(UNet, 'forward', see)
    monkeypatch.setattr(Recipe, 'set_lr', note)
    out = train('--small_steps', 0.5).out
    assert 'the first 50 % of the steps see 16×16 pixels, the others 32×32' in out
    whole, rates[:], seen[:] = (rates[:], seen[:]), [], []
    assert whole[1] == [32, *[16] * 5, *[32] * 6] and len(whole[0]) == EPOCHS * STEPS
    flags = ['--small_steps', 0.5]  # later from the checkpoint
    for stop in 4, 3:
        with signal_after(stop):
            train('--name', 'second', '--resume', *flags, code=143)
        flags = []
    train('--name', 'second', '--resume')
    assert (rates, seen) == whole


def test_the_demo_sees_drawings_at_full_size():
    assert colorize.parse_args(['--demo']).small_steps == 0
    assert colorize.parse_args(['--demo', '--small_steps', '0.5']).small_steps == 0.5
