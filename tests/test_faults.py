"""The table of faults: what goes wrong, the one line that says so, the exit code. No tracebacks."""

import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import CHECKPOINT, ROOT, WEIGHTS, call
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

import data_utils
from unet import UNet
from utils.tensorboard import Page

FLAGS = [
    '--data_path',
    'photos',
    '--image_size',
    32,
    '--batch_size',
    8,
    '--val_fraction',
    0.25,
    '--device',
    'cpu',
    '--num_workers',
    1,
]
NEXT = ['--resume', '--epochs', 2]  # the second epoch of the run that there is
FRESH = '; move it away to start afresh'
FOREIGN = rf'{CHECKPOINT} is no checkpoint of this version of the program \(.*\){FRESH}'
KEPT = '; the last good checkpoint is kept: --resume with a smaller --lr or --precision fp32'


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
def fault(folder, monkeypatch, capfd):
    """fault(flags..., code=1): the lines on stderr, of which no other thread may have a part."""
    raised = []
    monkeypatch.setattr(threading, 'excepthook', raised.append)

    def fault(*flags, code=1, cwd=folder):
        capfd.readouterr()
        with warnings.catch_warnings(record=True) as warned:
            ended = call(cwd, *FLAGS, *flags)
        errors = capfd.readouterr().err
        assert ended == code and raised == [] and 'Traceback' not in errors, errors
        assert list(map(str, warned)) == []
        return errors.splitlines()

    return fault


@pytest.fixture
def as_anybody(folder, monkeypatch):
    """as_anybody() gives up root's right to read and write everything, until the test's end.

    The way to the test's folder is closed then: one is in it already.
    """
    root = os.geteuid() == 0
    folder.chmod(0o777)
    (folder / 'runs').chmod(0o777)
    (folder / 'runs/.lock').chmod(0o666)
    monkeypatch.chdir(folder)
    yield lambda: os.seteuid(65534) if root else None
    if root:
        os.seteuid(0)
    for path in folder, *(path for path in folder.rglob('*') if path.is_dir()):
        path.chmod(0o755)


def files(folder):
    """The bytes of what must not be lost, and the names of what must not be left."""
    names = 'unet.pth', WEIGHTS, CHECKPOINT
    return (
        {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()},
        [path.name for path in folder.rglob('*.tmp')],
    )


# ---------------------------------------------------------------------------- photos


def png_of(width, height):
    """A PNG of a hundred bytes that claims to be this large."""

    def chunk(data):
        return struct.pack('>I', len(data) - 4) + data + struct.pack('>I', zlib.crc32(data))

    header = struct.pack('>4sIIBBBBB', b'IHDR', width, height, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        map(chunk, [header, b'IDAT' + zlib.compress(b'\0' * 99), b'IEND'])
    )


def link_to_itself(path):
    path.symlink_to(path.name)


def one_pixel(path):
    Image.new('RGB', (1, 1), 'red').save(path, 'JPEG')


# a photo's name, how it is made, why it is skipped: None where it can be read
PHOTOS = [
    ('one_pixel.jpg', one_pixel, None),
    (os.fsdecode(b'caf\xe9.jpg'), one_pixel, None),
    (os.fsdecode(b'caf\xe9.png'), Path.touch, 'no photo that Pillow can read'),
    ('empty.jpg', Path.touch, 'no photo that Pillow can read'),
    ('words.jpg', lambda path: path.write_text('not a photo'), 'no photo that Pillow can read'),
    (
        'bomb.png',
        lambda path: path.write_bytes(png_of(1_000_000, 1_000_000)),
        'larger than the [0-9]+ megapixels that memory allows',
    ),
    ('loop.jpg', link_to_itself, 'no such file'),
    ('nowhere.jpg', lambda path: path.symlink_to('gone.jpg'), 'no such file'),
    ('folder.jpg', lambda path: path.touch(), 'no regular file'),  # see `meanwhile`
    ('deleted.jpg', one_pixel, 'no such file'),
]


@pytest.mark.parametrize('way', [[], ['--stream']], ids=['in memory', 'streaming'])
def test_bad_photos_are_named_once_and_left_out(folder, fault, monkeypatch, way):
    photos = folder / 'photos'
    for name, make, _ in PHOTOS:
        make(photos / name)
    (photos / 'lake/again').symlink_to(photos)  # every photo would be found again and again

    def meanwhile(root):
        names = list_photos(root)
        for name in 'folder.jpg', 'deleted.jpg':
            (photos / name).unlink()
        (photos / 'folder.jpg').mkdir()
        return names

    list_photos = data_utils.list_photos
    monkeypatch.setattr(data_utils, 'list_photos', meanwhile)
    expected = sorted(
        f'skipped {re.escape(repr(name))}: {reason}' for name, _, reason in PHOTOS if reason
    )
    named = sorted(fault('--epochs', 2, *way, code=0))
    assert len(named) == len(expected) and all(map(re.fullmatch, expected, named)), named


def test_a_folder_whose_name_cannot_be_printed(folder, fault):
    name = os.fsdecode(b'caf\xe9')
    (folder / 'photos').rename(folder / name)
    assert fault('--data_path', name, '--epochs', 1, '--name', 'new', code=0) == []
    assert (folder / 'runs/new/unet.pth').exists()


def test_a_large_photo_is_no_bomb(tmp_path):
    """100 megapixels: Pillow warns of them, which is not for the user to read."""
    (tmp_path / 'large.png').write_bytes(png_of(10_000, 10_000))
    code = 'import data_utils; data_utils.load_photo("large.png")'
    done = subprocess.run(
        [sys.executable, '-c', code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
    )
    assert 'image file is truncated' in done.stderr and 'Warning' not in done.stderr


def test_photos_deleted_while_streaming(folder, fault, monkeypatch):
    lost = sorted((folder / 'photos').rglob('*.jpg'))[:3]

    def lose_photos(*args, **kwargs):
        for photo in lost:
            photo.unlink(missing_ok=True)
        return log_start(*args, **kwargs)

    log_start = Page.log_start
    monkeypatch.setattr(Page, 'log_start', lose_photos)
    assert sorted(fault('--epochs', 3, '--stream', '--name', 'new', code=0)) == [
        f"skipped '{photo.relative_to(folder / 'photos')}': no such file" for photo in lost
    ]


# ---------------------------------------------------------------------------- refused, or stopped


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class Malicious:
    """Unpickling it creates the file `executed`."""

    def __reduce__(self):
        return open, ('executed', 'w')


def malicious_pickle(path):
    path.write_bytes(pickle.dumps(Malicious()))


def malicious_zip(path):
    torch.save({'net': Malicious()}, path)


def another_network(path):
    checkpoint = torch.load(path, weights_only=True)
    checkpoint['net'] = torch.nn.Linear(2, 2).state_dict()
    torch.save(checkpoint, path)


def wider_network(path):
    checkpoint = torch.load(path, weights_only=True)
    checkpoint['net']['last_conv.bias'] = torch.zeros(4)
    torch.save(checkpoint, path)


def only_weights(path):
    shutil.copy(path.with_name('unet.pth'), path)


def nothing_in_it(path):
    path.write_bytes(b'')


def web_page(path):
    path.write_text('<!DOCTYPE html>')


def folder_instead(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def file_instead(path):
    shutil.rmtree(path)
    path.touch()


def empty_folder_instead(path):
    shutil.rmtree(path)
    path.mkdir()


def self_link_instead(path):
    shutil.rmtree(path)
    path.symlink_to(path.name)


# what is done to which file, with which flags it is met, the exit code and the line
FAULTS = [
    (
        shutil.rmtree,
        'photos',
        NEXT,
        2,
        'no such folder: photos. ./download_landscapes.sh fetches '
        'the landscapes, --demo draws some, --data_path names your own',
    ),
    (
        self_link_instead,
        'photos',
        NEXT,
        2,
        'no such folder: photos. ./download_landscapes.sh '
        'fetches the landscapes, --demo draws some, --data_path names your own',
    ),
    (file_instead, 'photos', NEXT, 2, 'photos is a file; --data_path takes a folder of photos'),
    (empty_folder_instead, 'photos', NEXT, 2, r'no photos in photos \(.*\.jpg.*\)'),
    (folder_instead, 'unet.pth', NEXT, 2, 'unet.pth is a folder, but .* that name; move it away'),
    (
        file_instead,
        'runs',
        NEXT,
        2,
        'runs is a file where a folder is needed; move it away, or give another --name',
    ),
    (
        file_instead,
        'runs/UNet',
        NEXT,
        2,
        'runs/UNet is a file where a folder is needed; move it away, or give another --name',
    ),
    (folder_instead, CHECKPOINT, NEXT, 2, f'{CHECKPOINT} is a folder{FRESH}'),
    (
        half,
        CHECKPOINT,
        NEXT,
        2,
        f'{CHECKPOINT} is a damaged or truncated file; nothing in it was run{FRESH}',
    ),
    (
        nothing_in_it,
        CHECKPOINT,
        NEXT,
        2,
        f'{CHECKPOINT} is an empty file; nothing in it was run{FRESH}',
    ),
    (web_page, CHECKPOINT, NEXT, 2, f'{CHECKPOINT} is a web page; nothing in it was run{FRESH}'),
    (
        malicious_pickle,
        CHECKPOINT,
        NEXT,
        2,
        f'{CHECKPOINT} is a pickle of more than tensors, '
        f'which could run code; nothing in it was run{FRESH}',
    ),
    (
        malicious_zip,
        CHECKPOINT,
        NEXT,
        2,
        f'{CHECKPOINT} is a pickle of more than tensors, '
        f'which could run code; nothing in it was run{FRESH}',
    ),
    (only_weights, CHECKPOINT, NEXT, 2, FOREIGN),
    (another_network, CHECKPOINT, NEXT, 2, FOREIGN),
    (wider_network, CHECKPOINT, NEXT, 2, FOREIGN),
    (None, '', [*NEXT, '--lr', 1e30], 1, r'the loss is (nan|inf) at step \d of epoch 2' + KEPT),
]


@pytest.mark.parametrize(
    'harm, name, flags, code, line',
    FAULTS,
    ids=[
        f'{name}: {harm.__name__}' if harm else ' '.join(map(str, flags))
        for harm, name, flags, _, _ in FAULTS
    ],
)
def test_the_table_of_faults(folder, fault, harm, name, flags, code, line):
    if harm:
        harm(folder / name)
    before = files(folder)
    lines = fault(*flags, code=code)
    assert len(lines) == 1 and re.fullmatch(f'colorize.py: {line}', lines[0]), lines
    assert files(folder) == before and before[1] == []
    assert not (folder / 'executed').exists()


def test_weights_that_only_validation_finds_ruined(folder, fault):
    """The only step of an epoch: its loss is that of the weights before."""
    one_step = ['--batch_size', 16, '--name', 'one']
    assert fault(*one_step, '--epochs', 1, code=0) == []
    names = folder / 'unet.pth', folder / 'runs/one/checkpoint.pth'
    before = [path.read_bytes() for path in names]
    (line,) = fault(*one_step, *NEXT, '--lr', 1e30)
    assert re.fullmatch(
        'colorize.py: the validation loss is (nan|inf) at step 1 of epoch 2' + KEPT, line
    )
    assert [path.read_bytes() for path in names] == before


@pytest.mark.parametrize(
    'error, flags, line',
    [
        (
            torch.cuda.OutOfMemoryError('CUDA out of memory.\nTried to allocate 9 GiB'),
            [],
            'out of memory with --batch_size 8: try --batch_size 4 or less',
        ),
        (MemoryError(), [], 'out of memory with --batch_size 8: try --batch_size 4 or less'),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            ),
            [],
            'out of memory with --batch_size 8: try --batch_size 4 or less',
        ),
        (
            torch.cuda.OutOfMemoryError('CUDA out of memory.'),
            ['--batch_size', 1, '--name', 'one'],
            'out of memory with --batch_size 1: try a smaller --image_size',
        ),
    ],
    ids=['device', 'Python', 'host', 'one photo'],
)
def test_out_of_memory_names_the_batch_size(folder, fault, monkeypatch, error, flags, line):
    def forward(*_):
        raise error

    monkeypatch.setattr(UNet, 'forward', forward)
    before = files(folder)
    assert fault(*NEXT, *flags)[-1] == f'colorize.py: {line}'
    assert files(folder) == before


# ---------------------------------------------------------------------------- permissions


def test_folders_and_photos_without_permission(folder, fault, as_anybody):
    (folder / 'photos/lake').chmod(0)
    (folder / 'photos/city/city_001.jpg').chmod(0)
    as_anybody()
    assert fault('--epochs', 1, '--name', 'new', code=0, cwd=None) == [
        'passed over photos/lake: Permission denied',
        "skipped 'city/city_001.jpg': Permission denied",
    ]


def test_a_data_folder_without_permission(folder, fault, as_anybody):
    (folder / 'photos').chmod(0)
    as_anybody()
    assert fault(*NEXT, code=2, cwd=None) == [
        'colorize.py: photos cannot be read: Permission denied'
    ]


@pytest.mark.parametrize('flags', [['--name', 'new'], NEXT], ids=['new', 'resumed'])
def test_a_folder_that_cannot_be_written(folder, fault, as_anybody, flags):
    for path in folder, folder / 'runs', folder / 'runs/UNet':
        path.chmod(0o555)
    for path in folder.rglob('.lock'):  # else their owner could still take the lock
        path.chmod(0o444)
    before = files(folder)
    as_anybody()
    *warned, line = fault(*flags, cwd=None)
    assert re.fullmatch('colorize.py: .*runs.*Permission denied', line)
    assert all('training goes on' in warning for warning in warned)
    assert files(Path()) == before


# ---------------------------------------------------------------------------- decorations


@pytest.mark.parametrize(
    'method, flags, times',
    [
        ('__init__', [], 1),
        ('add_graph', ['--name', 'new'], 1),
        ('add_scalar', [], 2),
        ('flush', [], 2),
        ('add_embedding', [], 1),
        ('close', [], 1),
    ],
)
def test_tensorboard_failing_costs_a_warning(folder, fault, monkeypatch, method, flags, times):
    def fail(*_, **__):
        raise RuntimeError('no luck')

    monkeypatch.setattr(SummaryWriter, method, fail)
    before = files(folder)
    assert fault('--resume', '--epochs', 3, *flags, code=0) == times * [
        'warning: TensorBoard: no luck; training goes on'
    ]
    assert files(folder)[0][CHECKPOINT] != before[0][CHECKPOINT] or flags


# ---------------------------------------------------------------------------- full disks


@pytest.fixture
def disk(trained, tmp_path):
    """A disk of 64 MB with that folder's run on it."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=64m', 'tmpfs', disk]
    if sys.platform != 'linux' or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('mounting a small disk takes Linux, and its root')
    shutil.copytree(trained, disk, dirs_exist_ok=True)
    yield disk
    # TensorBoard may still hold a file that it could not write
    subprocess.run(['umount', '--lazy', disk], check=True)


def fill(disk, left):
    """Leaves so many bytes free."""
    with open(disk / 'ballast', 'wb') as ballast:
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        os.posix_fallocate(ballast.fileno(), 0, free - left)


FULL = 'No space left on device'


@pytest.mark.parametrize(
    'harm, reason',
    [
        (partial(fill, left=12_000_000), FULL),
        (partial(fill, left=2_000_000), FULL),
        (partial(fill, left=0), FULL),
        (
            lambda disk: subprocess.run(['mount', '-o', 'remount,ro', disk], check=True),
            'Read-only file system',
        ),
    ],
    ids=['for the checkpoint', 'for the weights', 'for all', 'read-only'],
)
def test_a_full_disk_costs_one_line_and_no_file(disk, fault, harm, reason):
    before = files(disk)[0]
    harm(disk)
    *warned, line = fault(*NEXT, cwd=disk)
    assert line.startswith('colorize.py: ') and line.endswith(reason), line
    assert all(w.startswith('warning: TensorBoard: ') and reason in w for w in warned), warned
    after, left = files(disk)
    assert left == [] and after.keys() == before.keys()
    assert after[CHECKPOINT] == before[CHECKPOINT] and after['unet.pth'] == after[WEIGHTS]


def test_on_a_full_disk_nothing_is_said_at_the_exit(disk, run):
    fill(disk, left=0)
    said = run('colorize.py', *FLAGS, *NEXT, cwd=disk, code=1).stderr.splitlines()
    assert [line.partition(':')[0] for line in said] == [
        *['warning'] * (len(said) - 1),
        'colorize.py',
    ]


def test_a_disk_that_is_full_only_while_the_page_is_written(disk, fault, monkeypatch):
    """TensorBoard writes in a thread of its own; that has no say in how the training ends."""

    def log_on_a_full_disk(*args):
        fill(disk, left=0)
        try:
            log_epoch(*args)
        finally:
            (disk / 'ballast').unlink()

    log_epoch = Page.log_epoch
    monkeypatch.setattr(Page, 'log_epoch', log_on_a_full_disk)
    before = files(disk)[0]
    said = fault('--resume', '--epochs', 3, code=0, cwd=disk)
    assert said and all(
        line.startswith('warning: TensorBoard: ') and FULL in line for line in said
    ), said
    after, left = files(disk)
    assert after[CHECKPOINT] != before[CHECKPOINT] and left == []
