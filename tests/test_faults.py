"""What goes wrong, the one line that says so, and the exit code. No tracebacks, no lost files."""

import os
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from helpers import CHECKPOINT, call
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from unet import UNet

FLAGS = '--data_path photos --image_size 16 --val_fraction 0.25 --device cpu'.split()
NEXT = ['--resume', '--epochs', 2]  # the second epoch of the run that there is, a single step


@pytest.fixture(scope='module')
def trained(drawings, tmp_path_factory):
    """A folder with 14 photos and a run of one epoch on ten of them. Not to be written to."""
    folder = tmp_path_factory.mktemp('trained')
    shutil.copytree(drawings, folder / 'photos', ignore=shutil.ignore_patterns('*_00[3-8].jpg'))
    assert call(folder, *FLAGS, '--epochs', 1) == 0
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of that folder, to do harm to."""
    return Path(shutil.copytree(trained, tmp_path / 'here'))


@pytest.fixture
def fault(folder, capfd):
    """fault(flags..., code=1): the lines on stderr."""

    def fault(*flags, code=1, cwd=folder):
        capfd.readouterr()
        ended = call(cwd, *FLAGS, *flags)
        errors = capfd.readouterr().err
        assert ended == code and 'Traceback' not in errors, errors
        return errors.splitlines()

    return fault


def files(folder):
    """Return {path: bytes} of what must not be lost, and of what must not be left."""
    return {path: path.read_bytes() for path in (*folder.rglob('*.pth'), *folder.rglob('*.tmp'))}


def save(path, color='red', size=(1, 1)):
    Image.new('RGB', size, color).save(path)


def save_part(path):
    path.write_bytes((path.parent / 'lake/lake_001.jpg').read_bytes()[:2000])


# a photo's name, how it is made, why it is skipped: None where it is not
PHOTOS = [
    ('one_pixel.jpg', save, None),
    (os.fsdecode(b'caf\xe9.png'), Path.touch, 'no photo that Pillow can read'),
    ('words.jpg', lambda path: path.write_text('not a photo'), 'no photo that Pillow can read'),
    ('part.jpg', save_part, r'image file is truncated \(\d+ bytes not processed\)'),
    ('gray.jpg', partial(save, color='gray'), 'gray'),
    ('huge.png', partial(save, size=(70_000, 1)), '70000×1 pixels are too many for this machine'),
]


def test_bad_photos_are_named_once_and_left_out(folder, fault):
    for name, make, _ in PHOTOS:
        make(folder / 'photos' / name)
    (folder / 'photos/lake/again').symlink_to(folder / 'photos')  # each photo counts once
    named = fault('--epochs', 1, '--name', 'new', code=0)
    listed = (folder / 'runs/new/skipped.txt').read_text(errors='surrogateescape').splitlines()
    assert named == [f'skipped {line}' for line in listed]
    expected = sorted(f'{re.escape(repr(name))}: {reason}' for name, _, reason in PHOTOS if reason)
    for line, pattern in zip(sorted(listed), expected, strict=True):
        assert re.fullmatch(pattern, line), line


@pytest.mark.parametrize(
    'flags, words',
    [
        ('--data_path nowhere', 'nowhere ./download_landscapes.sh --demo'),
        ('--data_path unet.pth', 'unet.pth file --data_path'),
        ('--data_path photos/bad --val_fraction 0.01', '--val_fraction 0.jpg Pillow'),
        ('--val_fraction 1', '--val_fraction 1 below'),
        ('--lr nan', '--lr nan above'),
        ('--image_size 225', '--image_size 225 multiple 8'),
        ('--name ../up', '--name ../up'),
        ('--epoch 3', '--epoch'),
    ],
)
def test_a_wrong_request_gets_one_line(folder, fault, flags, words):
    (folder / 'photos/bad').mkdir()
    (folder / 'photos/bad/0.jpg').write_text('no photo')
    before = files(folder)
    (line,) = fault('--name', 'new', *flags.split(), code=2)
    assert line.startswith('colorize.py: ') and all(word in line for word in words.split()), line
    assert files(folder) == before


def test_a_damaged_checkpoint_is_refused(folder, fault):
    os.truncate(folder / CHECKPOINT, 1_000_000)
    before = files(folder)
    line = f'colorize.py: {CHECKPOINT} is damaged, or no file of tensors; nothing was run'
    assert fault(*NEXT, code=2) == [line] and files(folder) == before


def test_weights_that_only_validation_finds_ruined(folder, fault):
    before = files(folder)
    # in the only step of an epoch, whose loss is that of the weights before
    (line,) = fault(*NEXT, '--lr', 1e30)
    assert re.match('colorize.py: the validation loss is (nan|inf) at step 1 of epoch 2; ', line)
    assert line.endswith('with a smaller --lr or --precision fp32') and files(folder) == before


def test_out_of_memory_names_the_batch_size(folder, fault, monkeypatch):
    error = torch.cuda.OutOfMemoryError('CUDA out of memory.\nTried')
    monkeypatch.setattr(UNet, 'forward', Mock(side_effect=error))
    line = fault('--name', 'new')[-1]
    assert line.startswith('colorize.py: out of memory: try a smaller --batch_size than 32 or --im')


# TensorBoard's thread still wants to write into a folder that the test has left
@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
@pytest.mark.parametrize('method', ['__init__', 'add_graph', 'flush', 'add_embedding', 'close'])
def test_tensorboard_failing_costs_a_warning(folder, fault, monkeypatch, method):
    def fail(*_, **__):
        raise RuntimeError('no luck')

    monkeypatch.setattr(SummaryWriter, method, fail)
    warning = 'warning: TensorBoard: no luck; training goes on'
    assert fault('--epochs', 1, '--name', 'new', code=0) == [warning]
    assert (folder / 'runs/new/unet.pth').exists()


@pytest.fixture
def disk(trained, tmp_path):
    """A disk of 64 MB with that folder's run on it."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=64m', 'tmpfs', disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('mounting a small disk takes Linux, and its root')
    shutil.copytree(trained, disk, dirs_exist_ok=True)
    yield disk
    # TensorBoard may still hold a file that it could not write
    subprocess.run(['umount', '--lazy', disk], check=True)


@pytest.mark.parametrize(
    'left, reason',
    [
        (12_000_000, 'No space left on device'),  # enough for one file of weights, not for both
        (0, 'No space left on device'),
        (None, 'Read-only file system'),
    ],
)
def test_a_full_disk_costs_one_line_and_no_file(disk, fault, left, reason):
    before = files(disk)
    if left is None:
        subprocess.run(['mount', '-o', 'remount,ro', disk], check=True)
    else:
        with open(disk / 'ballast', 'wb') as ballast:
            os.posix_fallocate(ballast.fileno(), 0, shutil.disk_usage(disk).free - left)
    *warned, line = fault(*NEXT, cwd=disk)
    assert line.startswith('colorize.py: ') and line.endswith(reason), line
    assert all(w.startswith('warning: TensorBoard: ') and reason in w for w in warned), warned
    assert files(disk) == before
