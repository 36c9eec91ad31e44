import random

import loading
import pytest
import torch
from loading import PhotoFiles, PhotoLoader, PhotosInMemory, held_out
from PIL import Image
from test_data_utils import course_transforms, stripes

import colorize
from data_utils import list_photos

CPU = torch.device('cpu')


def test_holding_out_goes_by_the_path_alone():
    names = [f'lake/{n}.jpg' for n in range(4000)]
    side = {name: held_out(name, 0.1) for name in names}
    assert 340 < sum(side.values()) < 460
    assert [name for name in names if held_out(name, 0)] == []
    # fixed for ever: other values would leak trained-on photos into the validation of old runs
    assert [n for n in range(60) if side[f'lake/{n}.jpg']] == [23, 45, 47, 48]
    # the same name, composed and decomposed
    assert held_out('s\u00fcd.jpg', 0.5) == held_out('su\u0308d.jpg', 0.5)
    # what is held out at 10 % is held out at 20 % too
    assert all(held_out(name, 0.2) for name in names if side[name])


@pytest.fixture(params=['memory', 'stream', 'stream with workers'])
def photos(request, drawings):
    files = PhotoFiles(drawings, list_photos(drawings), 64, num_workers=2)
    if request.param == 'memory':
        return PhotosInMemory(files, CPU)
    files.num_workers = 2 if 'workers' in request.param else 0
    return files


def test_the_fast_loaders_agree_with_torchvision(photos, drawings):
    gray, color = course_transforms(64)
    names = list_photos(drawings)
    done = 0
    for x, y in PhotoLoader(photos, list(range(20)), 8):
        assert x.shape[1:] == (1, 64, 64) and y.shape[1:] == (3, 64, 64)
        for x1, y1 in zip(x, y, strict=True):
            photo = Image.open(drawings / names[done]).convert('RGB')
            assert (y1 - color(photo)).abs().max() <= 1.001 / 255
            # x spans 2 where y spans 1; torchvision's grey is rounded to a level, ours is not
            assert (x1 - gray(photo)).abs().max() <= 2 * 1.501 / 255
            done += 1
    assert done == 20


def both_loaders(drawings, **kwargs):
    files = PhotoFiles(drawings, list_photos(drawings), 16, num_workers=2)
    return [PhotoLoader(photos, list(range(50)), 8, **kwargs)
            for photos in (PhotosInMemory(files, CPU), files)]


def test_memory_and_stream_give_the_same_batches_in_the_same_order(drawings):
    memory, stream = both_loaders(drawings, seed=3)
    for epoch in 0, 1:
        memory.epoch = stream.epoch = epoch
        for (x1, y1), (x2, y2) in zip(memory, stream, strict=True):
            assert torch.equal(x1, x2) and torch.equal(y1, y2)
            assert y1.stride() == y2.stride()


def key(y):
    """A photo's colours whichever way it is flipped, and the way."""
    left, right = y.tolist(), y.flip(2).tolist()
    return str(min(left, right)), left < right


def test_an_epoch_shows_every_photo_once_in_an_order_of_its_own(drawings):
    memory, _ = both_loaders(drawings, seed=3)
    epochs = []
    for memory.epoch in 0, 1, 0:
        epochs.append([key(y1) for _, y in memory for y1 in y])
    photos = [[photo for photo, _ in epoch] for epoch in epochs]
    assert len(set(photos[0])) == 50 and sorted(photos[0]) == sorted(photos[1])
    assert photos[0] != photos[1] and epochs[0] == epochs[2]
    flips = [[way for _, way in sorted(epoch)] for epoch in epochs]
    assert flips[0] != flips[1]


def test_starting_inside_an_epoch_gives_its_rest(drawings):
    for loader in both_loaders(drawings, seed=1):
        whole = [y for _, y in loader]
        loader.start = 3
        rest = [y for _, y in loader]
        assert len(whole) == len(loader) == 7 and len(rest) == 4
        assert all(torch.equal(a, b) for a, b in zip(whole[3:], rest, strict=True))
        loader.start = 7  # stopped after the last step, before the validation
        assert list(loader) == []


@pytest.mark.parametrize('world', [2, 3, 5])
def test_processes_share_each_batch(drawings, world):
    whole, _ = both_loaders(drawings, seed=1)
    shares = [list(PhotoLoader(whole.photos, whole.indices, 8, seed=1, rank=rank, world=world))
              for rank in range(world)]
    for batch, (_, y) in enumerate(whole):
        parts = [share[batch][1] for share in shares]
        # with 5 processes the last batch, of 2 photos, leaves some with none
        together = sorted(key(photo) for part in parts for photo in part)
        assert together == sorted(key(photo) for photo in y)


def test_what_cannot_be_read_is_left_out_and_named(tmp_path, capsys):
    for n in range(6):
        stripes((20 + n, 20)).save(tmp_path / f'{n}.png')
    (tmp_path / '3.png').write_text('no photo')
    files = PhotoFiles(tmp_path, list_photos(tmp_path), 8)
    for in_memory in True, False:
        files.skipped.clear()
        photos = PhotosInMemory(files, CPU) if in_memory else files
        loader = PhotoLoader(photos, list(range(6)), 4, seed=0)
        for _ in 'two epochs':
            assert sum(len(x) for x, _ in loader) == 5
        assert files.skipped == {3}
        assert capsys.readouterr().err == "skipped '3.png': no photo that Pillow can read\n"


def test_the_order_does_not_hang_on_random_state(drawings):
    memory, _ = both_loaders(drawings, seed=7)
    first = [y for _, y in memory]
    random.seed(1)
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, (_, b) in zip(first, memory, strict=True))


@pytest.mark.parametrize('held, shown', [(3, [0, 1, 2]), (16, list(range(16))), (
    20, [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 15, 16, 17, 18])])
def test_sixteen_held_out_photos_are_shown_where_there_are_so_many(monkeypatch, held, shown):
    class Photos:
        def batches(self, order, flips, sizes):
            for part in order.split(sizes):
                yield part.view(-1, 1, 1, 1).expand(-1, 8, 8, 3)

    monkeypatch.setattr(loading, 'load_photos', lambda *_: Photos())
    args = colorize.parse_args([])
    _, _, (_, y) = loading.make_loaders(args, [], [50, 51], list(range(held)), 'cpu')
    assert (y[:, 0, 0, 0] * 255).round().int().tolist() == shown
