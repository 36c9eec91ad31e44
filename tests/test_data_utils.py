import random
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torchvision import transforms

import data_utils
from data_utils import (
    ImageFolderGrayColor,
    batches,
    fingerprint,
    get_colorized_dataset_loader,
    is_held_out,
    read_photos,
    shrink,
    split,
)
from utils import distributed
from utils.cli import UsageError
from utils.photos import list_photos

CPU = torch.device('cpu')


def stripes(size=(40, 24)):
    """A photo that no turn or mirroring leaves as it is."""
    photo = Image.new('RGB', size, 'blue')
    photo.paste('red', (0, 0, size[0] // 2, size[1] // 3))
    photo.paste('lime', (0, size[1] // 2, size[0] // 4, size[1]))
    return photo


# ---------------------------------------------------------------------------- the course's loader


def course_transforms(size):
    color = transforms.Compose([transforms.Resize((size, size)), transforms.ToTensor()])
    gray = transforms.Compose(
        [
            transforms.Resize((size, size)),
            transforms.Grayscale(),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    return gray, color


def test_the_course_s_loader(drawings):
    loader = get_colorized_dataset_loader(drawings, batch_size=4)
    x, y = next(iter(loader))
    assert x.shape == (4, 1, 224, 224) and y.shape == (4, 3, 224, 224)
    assert x.dtype == y.dtype == torch.float32
    gray, color = course_transforms(224)
    photo = Image.open(drawings / list_photos(drawings)[2]).convert('RGB')
    assert torch.equal(x[2], gray(photo)) and torch.equal(y[2], color(photo))


def test_image_folder_without_class_folders(tmp_path):
    stripes().save(tmp_path / 'a.png')
    dataset = ImageFolderGrayColor(tmp_path, target_transform=transforms.ToTensor())
    photo, target = dataset[0]
    assert len(dataset) == 1 and photo.size == (40, 24) and target.shape == (3, 24, 40)


# ---------------------------------------------------------------------------- the photos of a run


def test_holding_out_goes_by_the_path_alone():
    names = [f'lake/{n}.jpg' for n in range(4000)]
    side = {name: is_held_out(name, 0.1) for name in names}
    assert 340 < sum(side.values()) < 460
    assert [name for name in names if is_held_out(name, 0)] == []
    # fixed for ever: other values would leak trained-on photos into the validation of old runs
    assert [n for n in range(60) if side[f'lake/{n}.jpg']] == [23, 45, 47, 48]
    # the same name, composed and decomposed
    assert is_held_out('s\u00fcd.jpg', 0.5) == is_held_out('su\u0308d.jpg', 0.5)
    # what is held out at 10 % is held out at 20 % too
    assert all(is_held_out(name, 0.2) for name in names if side[name])


def test_a_split_without_a_photo_on_one_side_is_refused():
    assert split(['lake/23.jpg', 'lake/24.jpg'], 0.1) == ([1], [0])
    assert split(['lake/23.jpg'], 0) == ([0], [])
    for name, fraction in ('lake/23.jpg', 0.1), ('lake/24.jpg', 0.1):
        with pytest.raises(UsageError, match='--val_fraction 0.1 holds out [01] of the 1 photos'):
            split([name], fraction)


def test_the_fingerprint_is_of_the_names():
    assert fingerprint(['a', 'b']).startswith('of 2 photos (')
    assert len({fingerprint(names) for names in (['a', 'b'], ['a', 'c'], ['ab'])}) == 3


def read(drawings, size=16, val_fraction=0.25):
    return read_photos(drawings, list_photos(drawings), val_fraction, size, CPU)


@pytest.fixture
def place(monkeypatch, tmp_path):
    """place('file') lets photos be too large for memory; they go to a file in tmp_path."""

    def place(where):
        if where == 'file':
            monkeypatch.setattr(data_utils, 'free_memory', lambda device: 1000)
            monkeypatch.setattr(data_utils.tempfile, 'tempdir', str(tmp_path))

    return place


@pytest.mark.parametrize('where', ['memory', 'file'])
def test_batches_agree_with_torchvision(drawings, tmp_path, place, where):
    place(where)
    photos, (gray, color) = read(drawings, 64), course_transforms(64)
    assert list(tmp_path.iterdir()) == []  # the file has no name any more
    done = 0
    for x, y in batches(photos, list(range(20)), 8, CPU):
        assert x.shape[1:] == (1, 64, 64) and y.shape[1:] == (3, 64, 64)
        for x1, y1 in zip(x, y, strict=True):
            photo = Image.open(photos.get_path(done)).convert('RGB')
            assert (y1 - color(photo)).abs().max() <= 1.001 / 255
            # x spans 2 where y spans 1; torchvision's gray is rounded to a level, ours is not
            assert (x1 - gray(photo)).abs().max() <= 2 * 1.501 / 255
            done += 1
    assert done == 20


def test_a_disk_without_room_is_told(drawings, place, monkeypatch):
    place('file')
    monkeypatch.setattr(data_utils.shutil, 'disk_usage', lambda _: SimpleNamespace(free=0))
    with pytest.raises(UsageError, match='has no room for .* GB of photos.* TMPDIR'):
        read(drawings)


def key(y):
    """A photo's colors whichever way it is flipped, and the way."""
    left, right = y.tolist(), y.flip(2).tolist()
    return str(min(left, right)), left < right


def test_an_epoch_shows_every_photo_once_in_an_order_that_comes_from_seed_and_epoch(drawings):
    photos, epochs = read(drawings), []
    for epoch in 0, 1, 0:
        random.seed(epoch)
        torch.manual_seed(len(epochs))
        loader = batches(photos, range(50), 8, CPU, seed=3, epoch=epoch)
        epochs.append([key(y1) for _, y in loader for y1 in y])
    order = [[photo for photo, _ in epoch] for epoch in epochs]
    assert len(set(order[0])) == 50 and sorted(order[0]) == sorted(order[1])
    assert order[0] != order[1] and epochs[0] == epochs[2]
    flips = [[way for _, way in sorted(epoch)] for epoch in epochs]
    assert flips[0] != flips[1]


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
    shares = []
    for rank in range(world_size):
        monkeypatch.setattr(distributed, 'rank', rank)
        monkeypatch.setattr(distributed, 'world_size', world_size)
        shares.append([y for _, y in batches(photos, range(50), 8, CPU, seed=1)])
    for batch, *parts in zip(whole, *shares, strict=True):
        # with 5 processes the last batch, of 2 photos, leaves some with none
        together = sorted(key(photo) for part in parts for photo in part)
        assert together == sorted(key(photo) for photo in batch)


def test_what_cannot_be_read_and_what_is_gray_is_left_out_with_its_reason(tmp_path):
    names = [f'{n}.png' for n in range(6)]
    for n, name in enumerate(names):
        stripes((20 + n, 20)).save(tmp_path / name)
    (tmp_path / '3.png').write_text('no photo')
    stripes().convert('L').save(tmp_path / '4.png')
    photos = read_photos(tmp_path, names, 0, 8, CPU)
    assert photos.skipped == {3: 'no photo that Pillow can read', 4: 'gray'}
    assert (photos.training, photos.validation) == ([0, 1, 2, 5], [])
    with pytest.raises(UsageError, match="none of 1 photos can be used; the first, '4.png': gray"):
        read_photos(tmp_path, ['4.png'], 0, 8, CPU)


@pytest.mark.parametrize('fraction, number', [(0, 16), (0.9, 16), (0.1, 6)])
def test_up_to_sixteen_photos_are_shown_held_out_ones_if_possible(drawings, fraction, number):
    photos = read(drawings, 8, fraction)
    shown = photos.get_shown()
    side = photos.validation or photos.training
    assert len(shown) == min(16, len(side)) == len(set(shown)) and set(shown) <= set(side)
    assert number == 16 or shown == side


# ---------------------------------------------------------------------------- half the size


def test_small_photos_are_the_means_of_two_by_two_pixels():
    y = torch.rand(2, 3, 16, 16)
    x, small = shrink(y[:, 2:], y, step=1, of_parts=False)
    assert torch.allclose(small[1, 2, 3, 5], y[1, 2, 6:8, 10:12].mean())
    assert torch.equal(x, small[:, 2:])


def test_parts_come_from_the_step_and_from_every_place():
    size, half = 32, 16
    rows = torch.arange(size, dtype=torch.float32)[:, None].expand(size, size)
    y = torch.stack([rows, rows.T, rows + rows.T]).repeat(2, 1, 1, 1)  # each pixel tells its place
    parts = []
    for step in range(1, 150):
        x, small = shrink(y[:, 2:], y, step, of_parts=True)
        assert torch.equal(small[0], small[1]) and torch.equal(x, small[:, 2:])
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
