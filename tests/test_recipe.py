"""The learning rate, and what a step sees of its photos: both come from its number alone."""

import pytest
import torch
from helpers import EPOCHS, STEPS, signal_after

import colorize
from unet import UNet
from utils import recipe as recipe_module
from utils.recipe import WHOLE_EPOCHS, Recipe


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


def sizes(recipe, size, epoch=0):
    y = torch.zeros(2, 3, size, size)
    seen = [recipe.shrink(step, epoch, y[:, :1], y) for step in range(8)]
    shapes = [[tuple(photos.shape) for photos in batch] for batch in seen]
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
    for epoch in 0, WHOLE_EPOCHS:
        assert sizes(Recipe(small_steps=share, steps=8), size, epoch) == seen


def test_a_student_s_own_loop_sees_photos_as_they_are():
    assert sizes(Recipe(), 64) == [64] * 8


def test_small_photos_are_the_means_of_two_by_two_pixels():
    y = torch.rand(2, 3, 16, 16)
    x, small = Recipe(small_steps=0.5, steps=4).shrink(1, WHOLE_EPOCHS - 1, y[:, 2:], y)
    assert torch.allclose(small[1, 2, 3, 5], y[1, 2, 6:8, 10:12].mean())
    assert torch.equal(x, small[:, 2:])


def test_after_many_epochs_small_photos_are_parts():
    size, half, epoch = 32, 16, WHOLE_EPOCHS
    recipe = Recipe(small_steps=0.99, steps=200)
    rows = torch.arange(size, dtype=torch.float32)[:, None].expand(size, size)
    y = torch.stack([rows, rows.T, rows + rows.T]).repeat(2, 1, 1, 1)  # each pixel tells its place
    parts = []
    for step in range(1, 150):
        x, small = recipe.shrink(step, epoch, y[:, 2:], y)
        assert torch.equal(small[0], small[1]) and torch.equal(x, small[:, 2:])
        again, _ = recipe.shrink(step, epoch, y, y)  # of a resumed run, of another process
        assert torch.equal(small, again)
        down, across = small[0, 0, :, 0], small[0, 1, 0]
        scale = (down[-1] - down[0]).item() / (half - 1)
        # pixel k of the small photo lies at (k + 1/2) * scale - 1/2 of the part
        top, left = (start.item() - (scale - 1) / 2 for start in (down[0], across[0]))
        places = scale * torch.arange(half) + (scale - 1) / 2
        torch.testing.assert_close(down, top + places, rtol=0, atol=1e-4)
        torch.testing.assert_close(across, left + places, rtol=0, atol=1e-4)
        parts.append((scale * half, top, left))
    parts = torch.tensor(parts)
    assert (parts - parts.round()).abs().max() < 1e-3
    side, *corners = parts.round().unbind(1)
    assert (side.min(), side.max()) == (half, size)  # every side from the half to the whole
    for corner in corners:
        assert corner.min() == 0 and (corner + side).max() == size
        assert (corner > 0).float().mean() > 0.5


def test_a_resumed_run_has_the_rates_and_photos_that_it_would_have_had(train, monkeypatch):
    seen, forward = [], UNet.forward
    monkeypatch.setattr(recipe_module, 'WHOLE_EPOCHS', 1)

    def see(net, x):
        if net.training and torch.is_grad_enabled():
            seen.append((x.shape[-1], x.double().sum().item()))
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
    assert [size for size, _ in whole[1]] == [32, *[16] * 5, *[32] * 6]
    assert len(whole[0]) == EPOCHS * STEPS
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
