"""From photo files to batches: the course's loader, and the training's own."""

import errno
import os
import random
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from torchvision.transforms import Compose, Grayscale, Normalize, Resize, ToTensor

import data_utils
from data_utils import (
    ImageFolderGrayColor,
    augment,
    batches,
    crop,
    fingerprint,
    get_colorized_dataset_loader,
    is_held_out,
    read_photos,
    relight,
    split,
)
from utils import distributed
from utils.cli import UsageError
from utils.color import luminance
from utils.photos import list_photos

CPU = torch.device('cpu')


def course_transforms(size):
    gray = Compose([Resize((size, size)), Grayscale(), ToTensor(), Normalize([0.5], [0.5])])
    return gray, Compose([Resize((size, size)), ToTensor()])


def read(drawings, size=8, device=CPU):
    return read_photos(drawings, list_photos(drawings), 0.25, size, device)


def test_the_course_s_loader(drawings):
    x, y = next(iter(get_colorized_dataset_loader(drawings, batch_size=4)))
    assert x.shape == (4, 1, 224, 224) and y.shape == (4, 3, 224, 224)
    assert x.dtype == y.dtype == torch.float32
    gray, color = course_transforms(224)
    photo = Image.open(drawings / list_photos(drawings)[2]).convert('RGB')
    assert torch.equal(x[2], gray(photo)) and torch.equal(y[2], color(photo))
    assert len(ImageFolderGrayColor(drawings / 'lake')) == 8  # without class folders


def test_holding_out_goes_by_the_path_alone():
    names = [f'lake/{n}.jpg' for n in range(4000)]
    _, tenth = split(names, 0.1)
    # fixed for ever: other values would leak trained-on photos into the validation of old runs
    assert tenth[:4] == [23, 45, 47, 48] and 340 < len(tenth) < 460
    assert set(tenth) < set(split(names, 0.2)[1])
    # the same names, composed and decomposed
    for n in range(20):
        assert is_held_out(f's\u00fcd{n}.jpg', 0.5) == is_held_out(f'su\u0308d{n}.jpg', 0.5)
    assert split(['lake/23.jpg'], 0) == ([0], [])


def test_the_fingerprint_is_of_the_names():
    assert len({fingerprint(names) for names in (['a', 'b'], ['a', 'c'], ['ab'])}) == 3


def test_what_cannot_be_read_and_what_is_gray_is_left_out_with_its_reason(tmp_path):
    names = [f'{n}.png' for n in range(6)]
    for n, name in enumerate(names):
        Image.new('RGB', (20 + n, 20), 'gray' if n == 4 else 'red').save(tmp_path / name)
    (tmp_path / '3.png').write_text('no photo')
    photos = read_photos(tmp_path, names, 0, 8, CPU)
    assert photos.skipped == {3: 'no photo that Pillow can read', 4: 'gray'}
    assert (photos.training, photos.validation) == ([0, 1, 2, 5], [])
    with pytest.raises(UsageError, match="photos, 1 are .* and 0 to validate .*; '4.png': gray"):
        read_photos(tmp_path, ['1.png', '4.png'], 0.1, 8, CPU)


def test_ranks_that_see_other_photos_are_refused(drawings, monkeypatch):
    monkeypatch.setattr(distributed, 'broadcast', lambda names: names[1:])
    with pytest.raises(UsageError, match="is not what it is on rank 0's machine; copy the same"):
        read(drawings)


@pytest.mark.parametrize('room', ['memory', 'file', 'device', 'disk full'])
def test_photos_go_where_there_is_room(drawings, tmp_path, monkeypatch, capsys, room):
    """The device is torch's 'meta', which keeps no numbers."""
    expected, device = read(drawings), torch.device('meta')
    size = expected.pixels.nbytes
    free = dict(cpu=2 * size + (room == 'memory'), meta=2 * size + (room == 'device'))
    monkeypatch.setattr(data_utils, 'free_memory', lambda device: free[device.type])
    monkeypatch.setattr(data_utils.tempfile, 'tempdir', str(tmp_path))
    if room == 'disk full':
        full = OSError(errno.ENOSPC, 'No space left on device')
        monkeypatch.setattr(os, 'posix_fallocate', Mock(side_effect=full))
        with pytest.raises(UsageError, match='GB of photos .* No space left on device; .* TMPDIR'):
            read(drawings, device=device)
    else:
        photos = read(drawings, device=device)
        assert photos.pixels.device.type == ('meta' if room == 'device' else 'cpu')
        assert room == 'device' or torch.equal(photos.pixels, expected.pixels)
    told = f'too large for memory: 0.0 GB of photos go to a file in {tmp_path}\n'
    assert capsys.readouterr().out == ('' if room == 'memory' else told)
    assert list(tmp_path.iterdir()) == []  # the file has no name any more


def test_batches_agree_with_torchvision(drawings):
    photos, (gray, color) = read(drawings, 64), course_transforms(64)
    parts = list(batches(photos, range(20), 8, CPU))
    assert [len(x) for x, _ in parts] == [8, 8, 4]
    x, y = map(torch.cat, zip(*parts, strict=True))
    truth = [Image.open(drawings / photos.names[number]).convert('RGB') for number in range(20)]
    assert (y - torch.stack([color(photo) for photo in truth])).abs().max() <= 1.001 / 255
    # x spans 2 where y spans 1; torchvision's gray is rounded to a level, ours is not
    assert (x - torch.stack([gray(photo) for photo in truth])).abs().max() <= 2 * 1.501 / 255


def key(y):
    """A photo's colors whichever way it is flipped, and the way."""
    left, right = y.tolist(), y.flip(2).tolist()
    return str(min(left, right)), left < right


def test_order_and_flips_come_from_seed_and_epoch_alone(drawings):
    photos, seen = read(drawings), []
    for seed, epoch in (3, 0), (3, 1), (4, 0), (3, 0):
        random.seed(len(seen))
        torch.manual_seed(len(seen))
        loader = batches(photos, range(50), 8, CPU, seed, epoch)
        seen.append([key(photo) for _, y in loader for photo in y])
    assert seen.pop() == seen[0]
    orders = [[photo for photo, _ in epoch] for epoch in seen]
    flips = [[way for _, way in sorted(epoch)] for epoch in seen]
    assert len(set(orders[0])) == 50 and all(sorted(o) == sorted(orders[0]) for o in orders)
    assert len(set(map(tuple, orders))) == len(set(map(tuple, flips))) == 3


def test_starting_inside_an_epoch_gives_its_rest(drawings):
    photos = read(drawings)
    whole, rest, none = (
        [y for _, y in batches(photos, range(50), 8, CPU, seed=1, first_step=step)]
        for step in (0, 3, 7)
    )
    assert len(whole) == 7 and len(rest) == 4 and none == []
    assert all(map(torch.equal, whole[3:], rest))


@pytest.mark.parametrize('world_size', [2, 3, 5])
def test_processes_share_each_batch(drawings, monkeypatch, world_size):
    photos = read(drawings)
    whole = [y for _, y in batches(photos, range(50), 8, CPU, seed=1)]
    monkeypatch.setattr(distributed, 'world_size', world_size)
    shares = []
    for rank in range(world_size):
        monkeypatch.setattr(distributed, 'rank', rank)
        shares.append([y for _, y in batches(photos, range(50), 8, CPU, seed=1)])
    for batch, *parts in zip(whole, *shares, strict=True):
        # with 5 processes the last batch, of 2 photos, leaves some with none
        together = sorted(key(photo) for part in parts for photo in part)
        assert together == sorted(key(photo) for photo in batch)


def test_small_photos_are_the_means_of_two_by_two_pixels():
    y = torch.rand(2, 3, 16, 16)
    x, small = augment(y[:, 2:], y, 8, epoch=3, epochs=60, step=1)
    torch.testing.assert_close(small, torch.nn.functional.avg_pool2d(y, 2))
    assert torch.equal(x, small[:, 2:])


def test_photos_seen_often_are_changed():
    x, y = relight(torch.rand(4, 3, 16, 16), 0)
    cases = (16, 19, 40, 1), (16, 38, 39, 1), (8, 3, 40, 1), (8, 4, 40, 0.5), (8, 38, 39, 0.5)
    for side, epoch, epochs, smallest in cases:
        expected = tuple(crop(z, side, 7, smallest) for z in (x, y))
        torch.testing.assert_close(augment(x, y, side, epoch, epochs, 7), expected)
    for side, *at in (8, 20, 40, 7), (16, 20, 40, 7):
        gray, color = augment(x, y, side, *at)
        torch.testing.assert_close(color, relight(crop(y, side, 7, 0.3), 7)[1])
        torch.testing.assert_close(gray, luminance(color) * 2 - 1)
        # a process of several sees the same, also if it has none of the photos
        for share in slice(1, None, 2), slice(4, None):
            torch.testing.assert_close(augment(x[share], y[share], side, *at)[1], color[share])


def test_each_step_has_a_light_of_its_own():
    y = torch.tensor([[0.25, 0.25], [0.5, 0.5], [0.25, 0.5]])[:, None, None].expand(-1, 3, -1, -1)
    x, colors = zip(*(relight(y, step) for step in range(200)), strict=True)
    assert torch.equal(torch.cat(x), luminance(torch.cat(colors)) * 2 - 1)
    values = torch.stack(colors).squeeze(3)  # (steps, 3 photos, 3 channels, 2 pixels)
    torch.testing.assert_close(values, values[:, :, :1].expand_as(values))  # gray is gray
    dark, bright, both = values[:, :, 0].unbind(1)
    gamma = (bright / dark).log2()[:, 0]
    brightness = bright[:, 0] / 0.5**gamma
    contrast = both.diff()[:, 0] / (bright - dark)[:, 0]
    for light in gamma.log2() / 2, brightness - 1, contrast - 1:
        assert -0.25 <= light.min() < -0.23 and 0.23 < light.max() <= 0.25
    assert torch.stack([gamma, brightness, contrast]).corrcoef().triu(1).abs().max() < 0.2


@pytest.mark.parametrize('smallest, least', [(0.5, 16), (0.3, 9)])
def test_parts_come_from_the_step_alone_and_from_every_place(smallest, least):
    size, count = 32, 8
    rows = torch.arange(size, dtype=torch.float32)[:, None].expand(size, size)
    y = torch.stack([rows, rows.T])[None]  # each pixel tells its place
    small = torch.cat([crop(y, count, step, smallest) for step in range(150)])
    assert torch.equal(small[99:100], crop(y, count, 99, smallest))
    for places in small[:, 0, :, 0], small[:, 1, 0]:  # down and across: (steps, count)
        # a part begins at `start`; pixel k of the small photo is in the middle of its share of it
        side = (places[:, -1:] - places[:, :1]) * count / (count - 1)
        start = places[:, :1] - (side / count - 1) / 2
        expected = start + (torch.arange(count) + 0.5) * side / count - 0.5
        torch.testing.assert_close(places, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close((start, side), (start.round(), side.round()), rtol=0, atol=1e-3)
        assert (side.round().min(), side.round().max()) == (least, size)
        assert start.round().min() == 0 and (start + side).round().max() == size
        assert (start > 0.5).float().mean() > 0.5
