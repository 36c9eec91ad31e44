"""An attack on the training program: two runs at once, links, pipes, hostile files, odd requests.

The number in a test's name is that of the list of faults that an attack found.
"""

import copy
import math
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import colorize
import data_utils
import predict
from data_utils import PhotoFolder
from unet import UNet
from utils import distributed
from utils.checkpoint import RunFolder, atomic_save, load_checkpoint, load_weights
from utils.cli import UsageError

ROOT = Path(__file__).parent.parent
CHECKPOINT = 'runs/UNet/checkpoint.pth'
FLAGS = [
    '--image_size',
    '32',
    '--batch_size',
    '8',
    '--val_fraction',
    '0.25',
    '--device',
    'cpu',
    '--num_workers',
    '1',
    '--precision',
    'fp32',
]
WEIGHT = 'downsample_block_1.conv_block.0.weight'


@pytest.fixture(autouse=True)
def no_hang():
    """End a test that waits for ever."""

    def end(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(240)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope='session')
def photos(drawings, tmp_path_factory):
    """A folder of twelve photos, nine of them to train on."""
    folder = tmp_path_factory.mktemp('twelve') / 'photos'
    folder.mkdir()
    for path in sorted(drawings.rglob('*.jpg'))[::5][:12]:
        (folder / path.name).symlink_to(path)
    return folder


def train(folder, *flags):
    """Return the exit code of `colorize.py flags...`, called in this process, in `folder`."""
    signals = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(colorize, 'keep_memory', lambda: None)  # it outlasts the test
        patch.setattr(threading, 'excepthook', threading.excepthook)  # so that it is put back
        patch.setattr(sys, 'argv', ['colorize.py'])
        try:
            return colorize.main(list(map(str, flags)))
        except SystemExit as end:
            return end.code
        finally:
            for number, handler in signals.items():
                signal.signal(number, handler)


@pytest.fixture(scope='module')
def trained(photos, tmp_path_factory):
    """A folder in which a run has made an epoch, and its checkpoint. Not to be written to."""
    folder = tmp_path_factory.mktemp('trained')
    assert train(folder, '--data_path', photos, *FLAGS, '--epochs', 1) == 0
    return folder, torch.load(folder / CHECKPOINT, weights_only=True)


@pytest.fixture
def again(photos, trained, tmp_path):
    """A copy of the trained folder, and a call that goes on in it."""
    for path in trained[0].rglob('*.pth'):
        target = tmp_path / path.relative_to(trained[0])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return lambda *flags: train(tmp_path, '--data_path', photos, *FLAGS, '--resume', *flags)


def start(code, folder, **kwargs):
    """Start a Python program, given as text, in `folder`; its output can be read."""
    return subprocess.Popen(
        [sys.executable, '-c', code],
        cwd=folder,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
        **kwargs,
    )


# ---------------------------------------------------------------------------- 2: two at once

SAVE = """
import sys
from pathlib import Path
import torch
from unet import UNet
from utils.checkpoint import RunFolder
torch.manual_seed(len(sys.argv))
run, net = RunFolder(Path('.'), {name!r}, False), UNet()
print('ready', flush=True)
input()
for _ in range(15):
    run.save_weights(net)
"""


def test_02_two_runs_of_different_names_publish_their_weights(tmp_path):
    running = [start(SAVE.format(name=name), tmp_path) for name in 'AB']
    for process in running:
        assert process.stdout.readline() == 'ready\n'
    for process in running:
        process.stdin.write('\n')
        process.stdin.flush()
    loads = 0
    while any(process.poll() is None for process in running):
        if (tmp_path / 'unet.pth').exists():
            load_weights(UNet(), tmp_path / 'unet.pth')
            loads += 1
    assert [process.wait() for process in running] == [0, 0], [p.stdout.read() for p in running]
    assert loads
    latest = (tmp_path / 'unet.pth').read_bytes()
    assert latest in [(tmp_path / f'runs/{name}/unet.pth').read_bytes() for name in 'AB']
    assert not list(tmp_path.rglob('*.tmp')) + list(tmp_path.glob('unet_*'))


HOLD = """
from pathlib import Path
from utils.checkpoint import RunFolder
run = RunFolder(Path('.'), 'UNet', True)
print('held', flush=True)
input()
"""


def test_02_a_run_that_another_process_makes_is_refused_until_that_is_gone(again, tmp_path, capfd):
    before = (tmp_path / CHECKPOINT).read_bytes()
    holder = start(HOLD, tmp_path)
    assert holder.stdout.readline() == 'held\n'
    assert again('--epochs', 2) == 2
    assert capfd.readouterr().err == (
        'colorize.py: another process is training in runs/UNet; wait for its end, or give another '
        '--name\n'
    )
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    holder.kill()
    holder.wait()
    assert again('--epochs', 2) == 0


def test_02_temporary_files_of_two_processes_have_different_names(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(os, 'replace', lambda source, target: names.append(source))
    for _ in range(2):
        atomic_save({}, tmp_path / 'unet.pth')
    assert len(set(names)) == 2


@pytest.mark.parametrize('kill', [1, 2])
def test_02_a_kill_between_the_two_files_of_weights(tmp_path, monkeypatch, kill):
    """The repeated epoch must not take the latest weights for somebody else's."""
    net, replaced = UNet(), []
    RunFolder(tmp_path, 'A', True).save_weights(net)
    (tmp_path / 'runs/A/checkpoint.pth').touch()  # these weights belong to it
    torch.nn.init.ones_(net.last_conv.bias)

    def replace(*names, real=os.replace):
        replaced.append(names)
        if len(replaced) == kill:
            raise KeyboardInterrupt
        real(*names)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, 'replace', replace)
        RunFolder(tmp_path, 'A', True).save_weights(net)
    RunFolder(tmp_path, 'A', True).save_weights(net)
    assert sorted(os.listdir(tmp_path)) == ['runs', 'unet.pth']
    assert (tmp_path / 'unet.pth').read_bytes() == (tmp_path / 'runs/A/unet.pth').read_bytes()
    assert sorted(os.listdir(tmp_path / 'runs/A')) == ['.lock', 'checkpoint.pth', 'unet.pth']


# ---------------------------------------------------------------------------- 3: where they are


def test_03_says_which_file_has_the_weights_of_this_run(again, tmp_path, capfd):
    (tmp_path / 'unet.pth').write_bytes(b'of another run')
    for _ in 'replaced', 'removed':
        assert again('--epochs', 1) == 0
        text = capfd.readouterr().out
        assert 'runs/UNet/unet.pth: epoch 1 of runs/UNet\n' in text
        assert '--weights runs/UNet/unet.pth' in text
        (tmp_path / 'unet.pth').unlink(missing_ok=True)
    (tmp_path / 'runs/UNet/unet.pth').unlink()
    assert again('--epochs', 1) == 0
    assert 'runs/UNet/unet.pth was removed' in capfd.readouterr().out


def test_03_an_epoch_that_did_not_improve(again, trained, tmp_path, capfd):
    state = copy.deepcopy(trained[1])
    state['progress']['best'] = 1e-9
    torch.save(state, tmp_path / CHECKPOINT)
    before = (tmp_path / 'unet.pth').read_bytes()
    assert again('--epochs', 2) == 0
    assert 'unet.pth: epoch 1 of runs/UNet\n' in capfd.readouterr().out
    assert (tmp_path / 'unet.pth').read_bytes() == before


# ---------------------------------------------------------------------------- 5: black photos


@pytest.mark.parametrize('pixel, value', [((1, 1), 1.02), ((0, 0), math.nan), ((3, 3), math.inf)])
def test_05_floating_point_photos_are_not_read_as_black(tmp_path, pixel, value):
    photo = Image.new('F', (32, 32), 0.5)
    photo.putpixel(pixel, value)
    photo.save(tmp_path / 'photo.tif')
    read, reason = PhotoFolder(tmp_path, 32).try_item(0)
    assert reason == '' and read[16, 16].tolist() == [128, 128, 128]


# ---------------------------------------------------------------------------- 6, 10: processes


def test_06_10_skipped_photos_are_counted_once_and_all_processes_end(photos, tmp_path):
    folder = tmp_path / 'photos'
    folder.mkdir()
    for number, path in enumerate(sorted(photos.iterdir())):
        data = path.read_bytes()
        (folder / path.name).write_bytes(data[:40] if number % 2 else data)
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node=2',
            ROOT / 'colorize.py',
            '--data_path',
            folder,
            *FLAGS,
            '--val_fraction',
            '0',
            '--stream',
            '--epochs',
            '1',
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert '6 of 12 photos are left out\n' in done.stdout
    assert (
        done.stderr.count("skipped '")
        == 6
        == len((tmp_path / 'runs/UNet/skipped.txt').read_text().splitlines())
    )


def test_10_processes_wait_for_each_other_before_they_leave(monkeypatch):
    calls = []
    monkeypatch.setattr(distributed.dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(distributed, 'world_size', 2)
    monkeypatch.setattr(distributed.dist, 'all_reduce', lambda _: calls.append('all-reduce'))
    distributed.cleanup()
    assert calls == ['all-reduce']


def test_12_a_checkpoint_of_several_processes_is_taken(photos, tmp_path, monkeypatch):
    """Their sums are floats; it was refused because a number of photos is none."""
    monkeypatch.setattr(colorize, 'all_reduce_sum', lambda *numbers: list(map(float, numbers)))
    signal_after(monkeypatch, 1)
    flags = '--data_path', photos, *FLAGS, '--epochs', 1, '--resume'
    assert train(tmp_path, *flags) == 143
    progress = torch.load(tmp_path / CHECKPOINT, weights_only=True)['progress']
    assert (progress['step'], progress['photos']) == (1, 8)
    assert train(tmp_path, *flags) == 0


def signal_after(monkeypatch, steps):
    """Make this process send itself SIGTERM in its training's step of that number."""
    made = []

    def step(*args, real=colorize.train_step):
        made.append(1)
        if len(made) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(colorize, 'train_step', step)


# ---------------------------------------------------------------------------- 8: links


def test_08_weights_are_written_through_a_link(photos, tmp_path):
    (tmp_path / 'shared').mkdir()
    shared, link = tmp_path / 'shared/weights.pth', tmp_path / 'unet.pth'
    shared.write_bytes(b"somebody's")
    link.symlink_to('shared/weights.pth')
    assert train(tmp_path, '--data_path', photos, *FLAGS, '--epochs', 1) == 0
    assert link.is_symlink() and os.readlink(link) == 'shared/weights.pth'
    assert shared.read_bytes() == (tmp_path / 'runs/UNet/unet.pth').read_bytes()
    assert (tmp_path / 'shared/weights_1.pth').read_bytes() == b"somebody's"
    assert sorted(os.listdir(tmp_path / 'shared')) == ['weights.pth', 'weights_1.pth']


# ---------------------------------------------------------------------------- 9: streaming


def test_09_streaming_needs_no_shared_memory(photos, tmp_path):
    small = [
        'unshare',
        '-m',
        'bash',
        '-c',
        'mount -t tmpfs -o size=4k tmpfs /dev/shm && exec "$@"',
        'bash',
    ]
    if subprocess.run([*small, 'true'], capture_output=True).returncode:
        pytest.skip('only root can make /dev/shm small')
    done = subprocess.run(
        [
            *small,
            sys.executable,
            ROOT / 'colorize.py',
            '--data_path',
            photos,
            *FLAGS,
            '--num_workers',
            '4',
            '--stream',
            '--epochs',
            '1',
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0 and done.stderr == '', done.stderr
    load_weights(UNet(), tmp_path / 'unet.pth')


def test_09_a_stop_is_obeyed_while_the_disk_is_silent(photos, tmp_path, monkeypatch):
    reads, disk = [], threading.Event()

    def read(*args, real=data_utils.load_photo, **kwargs):
        reads.append(1)
        # all 12 are looked at, and three are shown; the second batch of the epoch has one
        if len(reads) == 12 + 3 + 9:
            os.kill(os.getpid(), signal.SIGTERM)
            disk.wait()
        return real(*args, **kwargs)

    monkeypatch.setattr(data_utils, 'load_photo', read)
    try:
        assert train(tmp_path, '--data_path', photos, *FLAGS, '--stream', '--epochs', 1) == 143
    finally:
        disk.set()
    assert load_checkpoint(tmp_path / CHECKPOINT, UNet(), settings())['progress']['step'] <= 1


# ---------------------------------------------------------------------------- 11: pipes


@pytest.mark.parametrize(
    'name, line',
    [
        (CHECKPOINT, f'{CHECKPOINT} is no regular file; move it away to start afresh'),
        ('unet.pth', 'unet.pth is no regular file, but a run needs that name; move it away'),
        *(
            (
                f'runs/UNet/{name}',
                f'runs/UNet/{name} is no regular file, but a run needs that name; move it away',
            )
            for name in ('unet.pth', 'skipped.txt')
        ),
    ],
)
def test_11_a_pipe_in_the_place_of_a_file(again, tmp_path, capfd, name, line):
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    assert again('--epochs', 2) == 2
    assert capfd.readouterr().err == f'colorize.py: {line}\n'
    assert (tmp_path / name).is_fifo()


def test_11_a_pipe_in_the_folder_of_another_run_is_not_waited_for(again, tmp_path):
    (tmp_path / 'runs/other').mkdir()
    os.mkfifo(tmp_path / 'runs/other/unet.pth')
    (tmp_path / 'unet.pth').write_bytes(b"somebody's")
    assert again('--epochs', 4) == 0
    assert (tmp_path / 'unet_1.pth').read_bytes() == b"somebody's"


def test_11_of_temporary_files_only_the_program_s_own_are_removed(again, tmp_path):
    own = 'unet.pth.0123abcd.tmp', 'runs/UNet/unet.pth.0123abcd.tmp', f'{CHECKPOINT}.0123abcd.tmp'
    others = 'unet.pth.mine.tmp', 'runs/UNet/notes.tmp', 'runs/UNet/unet.pth.0123abcd.tmp.txt'
    for name in own + others:
        (tmp_path / name).write_text(name)
    os.mkfifo(tmp_path / 'runs/UNet/unet.pth.76543210.tmp')
    (tmp_path / 'unet.pth.fedcba98.tmp').mkdir()
    assert again('--epochs', 4) == 0
    assert not any((tmp_path / name).exists() for name in own)
    assert [(tmp_path / name).read_text() for name in others] == list(others)
    assert (tmp_path / 'runs/UNet/unet.pth.76543210.tmp').is_fifo()
    assert (tmp_path / 'unet.pth.fedcba98.tmp').is_dir()


def test_11_a_device_behind_a_link_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / 'device')
    (tmp_path / 'unet.pth').symlink_to('device')
    with pytest.raises(OSError, match='unet.pth was not saved: it is no regular file'):
        atomic_save({}, tmp_path / 'unet.pth')
    assert (tmp_path / 'device').is_fifo() and len(os.listdir(tmp_path)) == 2


def test_11_a_pipe_in_the_place_of_weights(tmp_path):
    os.mkfifo(tmp_path / 'unet.pth')
    with pytest.raises(UsageError, match='unet.pth is no regular file; expected the state_dict'):
        load_weights(UNet(), tmp_path / 'unet.pth')


# ---------------------------------------------------------------------------- 12: checkpoints


def settings():
    """Return settings whose types are those of a run's."""
    args = colorize.parse_args([])
    return {name: getattr(args, name) for name in colorize.SETTINGS} | dict(photos='')


def nested(make, depth):
    value = ['x'] * 10
    for _ in range(depth):
        value = make(value)
    return value


REMOVE = object()
SCALER = torch.amp.GradScaler('cpu').state_dict()
LAUGHS = nested(lambda value: [value] * 10, 12)  # 10 ** 13 words
# where in a checkpoint, what is put there, and what is said of it
HOSTILE = {
    'no optimizer': ('optimizer', REMOVE, 'it has no optimizer'),
    'no exp_avg_sq': ('optimizer.0.exp_avg_sq', REMOVE, 'it has no optimizer.0.exp_avg_sq'),
    'three numbers': (
        'optimizer.0.exp_avg',
        torch.zeros(3),
        r'optimizer.0.exp_avg is \(3,\), not \(32, 1, 3, 3\)',
    ),
    'a negative square': (
        'optimizer.0.exp_avg_sq',
        torch.full((32, 1, 3, 3), -1.0),
        'a square is negative',
    ),
    'steps that differ': ('optimizer.0.step', torch.tensor(1.0), 'its weights have made'),
    'an infinite step': ('optimizer.0.step', torch.tensor(math.inf), 'step is not finite'),
    'progress a list': ('progress', [], 'progress. is a list, not a dict'),
    'progress deep': (
        'progress',
        nested(lambda value: {'a': value}, 100),
        'it has no progress.best',
    ),
    'settings None': ('settings', None, 'settings. is a NoneType, not a dict'),
    'settings empty': ('settings', {}, 'it has no settings.batch_size'),
    'settings of a tensor': (
        'settings.batch_size',
        torch.tensor([8, 8]),
        'settings.batch_size is a Tensor',
    ),
    'settings of a bool': ('settings.batch_size', True, 'settings.batch_size is True'),
    'settings of a list': ('settings.lr', [1e-3], 'settings.lr is a list'),
    'settings more': ('settings.name', '../../x', 'it has settings.name'),
    'photos in words': ('settings.photos', 'many', 'photos is many'),
    'epoch a string': ('progress.epoch', '1', 'progress.epoch is 1'),
    'epoch a bool': ('progress.epoch', True, 'progress.epoch is True'),
    'epoch a float': ('progress.epoch', 1.0, 'progress.epoch is 1.0'),
    'epoch a tensor': ('progress.epoch', torch.tensor(1), 'progress.epoch is a Tensor'),
    'epoch without an end': ('progress.epoch', LAUGHS, 'progress.epoch is a list'),
    'epoch -5': ('progress.epoch', -5, 'epoch is -5'),
    'epoch 10 ** 9': ('progress.epoch', 10**9, 'epoch is 1000000000'),
    'step -3': ('progress.step', -3, 'step is -3'),
    'step 10 ** 6': ('progress.step', 10**6, 'step is 1000000'),
    'photos 10 ** 30': ('progress.photos', 10**30, 'photos is 10{30}'),
    'loss_sum inf': ('progress.loss_sum', math.inf, 'loss_sum is inf'),
    'loss_sum at no step': ('progress.loss_sum', 1e308, r'loss_sum is 1e\+308'),
    'best NaN': ('progress.best', math.nan, 'progress.best is nan'),
    'best -inf': ('progress.best', -math.inf, 'best is -inf'),
    'best_epoch 99': ('progress.best_epoch', 99, 'best_epoch is 99'),
    'best_gain inf': ('progress.best_gain', math.inf, 'best_gain is inf'),
    'a key None': (None, {None: 1}, 'it has None'),
    'a key 3': (None, {3: 1}, 'it has 3'),
    'a key of a tuple': (None, {(1, 2): 1}, 'it has a tuple'),
    'scaler of a tensor': (
        'scaler',
        SCALER | dict(scale=torch.ones(3)),
        'scaler.scale is a Tensor',
    ),
    'scaler 0': ('scaler', SCALER | dict(scale=0.0), 'the gradient scaler is'),
    'scaler never grows': (
        'scaler',
        SCALER | dict(growth_interval=10**30),
        'the gradient scaler is',
    ),
    'whole numbers': (
        f'net.{WEIGHT}',
        torch.zeros(32, 1, 3, 3, dtype=torch.int32),
        f'net.{WEIGHT} is torch.int32, not torch.float32',
    ),
    'double': (f'net.{WEIGHT}', torch.zeros(32, 1, 3, 3).double(), 'is torch.float64'),
    'weights NaN': (
        f'net.{WEIGHT}',
        torch.full((32, 1, 3, 3), math.nan),
        f'net.{WEIGHT} is not finite',
    ),
    'meta': (f'net.{WEIGHT}', torch.zeros(32, 1, 3, 3, device='meta'), 'is no plain tensor'),
    'sparse': (f'net.{WEIGHT}', torch.zeros(32, 1, 3, 3).to_sparse(), 'is no plain tensor'),
    'huge': (f'net.{WEIGHT}', torch.zeros(1).expand(2**40), r'is \(1099511627776,\)'),
    'a float': (f'net.{WEIGHT}', 0.5, 'is no plain tensor'),
}


def spoil(state, place, value):
    """Return a copy of the checkpoint with `value` at the dotted place."""
    if place is None:
        return state | value
    head, _, rest = place.partition('.')
    if head == 'net' or not rest:
        parent, key = (state['net'], rest) if head == 'net' else (state, head)
        changed = {name: old for name, old in parent.items() if name != key}
        if value is not REMOVE:
            changed[key] = value
        return dict(state, net=changed) if head == 'net' else changed
    key = int(head) if head.isdigit() else head
    return dict(state) | {key: spoil(state[key], rest, value)}


@pytest.mark.parametrize('kind', HOSTILE)
def test_12_hostile_checkpoints_are_refused(trained, tmp_path, kind):
    place, value, why = HOSTILE[kind]
    torch.save(spoil(trained[1], place, value), tmp_path / 'x.pth')
    with pytest.raises(
        UsageError,
        match=rf'x.pth is no checkpoint of this version of the program '
        rf'\(.*{why}.*\); move it away to start afresh',
    ):
        load_checkpoint(tmp_path / 'x.pth', UNet(), settings())


def test_12_nested_tensors_are_refused(trained, tmp_path, recwarn):
    parts = [torch.zeros(3), torch.zeros(2)]
    torch.save(
        spoil(trained[1], f'net.{WEIGHT}', torch.nested.nested_tensor(parts)), tmp_path / 'x.pth'
    )
    with pytest.raises(UsageError, match='is no plain tensor'):
        load_checkpoint(tmp_path / 'x.pth', UNet(), settings())


def test_12_a_refused_checkpoint_is_left_alone(again, trained, tmp_path, capfd):
    torch.save(spoil(trained[1], 'optimizer.0.exp_avg', torch.zeros(3)), tmp_path / CHECKPOINT)
    before = (tmp_path / CHECKPOINT).read_bytes()
    assert again('--epochs', 2) == 2
    error = capfd.readouterr().err
    assert error.count('\n') == 1 and f'{CHECKPOINT} is no checkpoint of this version' in error
    assert (tmp_path / CHECKPOINT).read_bytes() == before


@pytest.mark.parametrize('metadata', [5, [1], {'': 5}])
def test_12_metadata_of_weights_in_a_checkpoint_is_ignored(again, trained, tmp_path, metadata):
    state = copy.deepcopy(trained[1])
    state['net']._metadata = metadata
    torch.save(state, tmp_path / CHECKPOINT)
    assert again('--epochs', 2) == 0


def repack(path, compression, change=lambda data: data):
    """Write a file of torch.save again, packed and with another pickle."""
    with zipfile.ZipFile(path) as old:
        members = {member: old.read(member) for member in old.namelist()}
    with zipfile.ZipFile(path, 'w', compression) as new:
        for member, data in members.items():
            new.writestr(member, change(data) if member.endswith('.pkl') else data)


def test_12_a_pickle_that_overflows_the_stack(tmp_path):
    """A tuple in a tuple, 200,000 deep, as a key of a dict: torch.load crashed."""
    torch.save({}, tmp_path / 'x.pth')
    repack(
        tmp_path / 'x.pth',
        zipfile.ZIP_STORED,
        lambda _: b'\x80\x02})' + b'\x85' * 200_000 + b'K\x01s.',
    )
    with pytest.raises(
        UsageError,
        match='x.pth is a damaged or truncated file; nothing in it was run; move it away',
    ):
        load_checkpoint(tmp_path / 'x.pth', UNet(), settings())


def test_12_a_key_that_takes_forever_to_hash(tmp_path):
    """A tuple of the same tuple twice, 60 levels deep: its hash takes 2 ** 60 steps."""
    torch.save({}, tmp_path / 'x.pth')
    level = b'q\x00h\x00\x86'  # note the top of the stack, push it again, join both
    repack(
        tmp_path / 'x.pth',
        zipfile.ZIP_STORED,
        lambda _: b'\x80\x02})' + level * 60 + b'K\x01s.',
    )
    with pytest.raises(UsageError, match='x.pth is a damaged or truncated file'):
        load_weights(UNet(), tmp_path / 'x.pth')


def test_12_impossible_settings_name_the_checkpoint(again, trained, tmp_path, capfd):
    torch.save(spoil(trained[1], 'settings.lr', -1.0), tmp_path / CHECKPOINT)
    assert again('--epochs', 2) == 2
    assert capfd.readouterr().err == (
        f'colorize.py: {CHECKPOINT}: argument --lr: -1.0 is not a number above 0\n'
    )


def test_12_weights_so_large_that_no_color_is_finite(photos, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    photo = str(sorted(photos.iterdir())[0])
    torch.save({name: value.fill_(1e30) for name, value in UNet().state_dict().items()}, 'x.pth')
    assert predict.main([photo, '--weights', 'x.pth', '--device', 'cpu']) == 1
    error = capfd.readouterr().err
    assert error.count('\n') == 1 and 'the network computes no finite colors' in error
    assert not list((tmp_path / 'colorized').glob('*.*'))


def test_12_a_file_that_grows_in_memory(tmp_path):
    torch.save(torch.zeros(2**22), tmp_path / 'x.pth')
    repack(tmp_path / 'x.pth', zipfile.ZIP_DEFLATED)
    assert (tmp_path / 'x.pth').stat().st_size < 2**16
    with pytest.raises(UsageError, match='x.pth is a damaged or truncated file'):
        load_weights(UNet(), tmp_path / 'x.pth')


@pytest.mark.parametrize(
    'change, why',
    [
        (lambda state: {name: value * math.nan for name, value in state.items()}, 'is not finite'),
        (lambda state: {name: value.int() for name, value in state.items()}, 'is torch.int32'),
        (lambda state: dict(list(state.items())[1:]), f'it has no {WEIGHT}'),
        (lambda state: state | {3: 1}, 'it has 3'),
        (lambda state: list(state), 'it is a list, not a dict'),
    ],
)
def test_12_hostile_weights_are_refused(tmp_path, change, why):
    torch.save(change(UNet().state_dict()), tmp_path / 'x.pth')
    with pytest.raises(UsageError, match=rf'x.pth holds other weights \(.*{why}'):
        load_weights(UNet(), tmp_path / 'x.pth')


@pytest.mark.parametrize('size', [10**9, 12, 0, -8, '64', 64.0, True, [64]])
def test_12_an_impossible_image_size_is_refused(tmp_path, size):
    state = UNet().state_dict()
    state._metadata['']['image_size'] = size
    torch.save(state, tmp_path / 'x.pth')
    with pytest.raises(UsageError, match='which cannot be'):
        load_weights(UNet(), tmp_path / 'x.pth')


# ---------------------------------------------------------------------------- 13: small


@pytest.mark.parametrize('closed', ['>&-', '2>&-', '<&- >&- 2>&-'])
def test_13_closed_streams(photos, tmp_path, closed):
    words = [sys.executable, str(ROOT / 'colorize.py'), *FLAGS, '--epochs', '1']
    command = f'{shlex.join([*words, "--data_path", str(photos)])} {closed}'
    done = subprocess.run(['bash', '-c', command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == '', done
    load_weights(UNet(), tmp_path / 'unet.pth')


@pytest.mark.parametrize(
    'flag, value, rule',
    [
        ('--seed', 18446744073709551616, 'a whole number, 0 or above'),
        ('--batch_size', 10**22, 'a whole number above 0'),
        ('--colorfulness_weight', '1e39', 'a number from 0 to 1000'),
        ('--image_size', 4104, 'a multiple of 8, at most 4096'),
    ],
)
def test_13_numbers_that_overflow(tmp_path, capfd, flag, value, rule):
    assert train(tmp_path, flag, value) == 2
    assert capfd.readouterr().err == f'colorize.py: argument {flag}: {value} is not {rule}\n'


def test_13_ctrl_c_during_the_imports(tmp_path):
    (tmp_path / 'torch.py').write_text('print("importing", flush=True)\ninput()\n')
    program = subprocess.Popen(
        [sys.executable, ROOT / 'colorize.py'],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | dict(PYTHONPATH=str(tmp_path)),
        # a shell's '&' makes Ctrl-C ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert program.stdout.readline() == 'importing\n'
    program.send_signal(signal.SIGINT)
    assert program.wait() == -signal.SIGINT and program.stderr.read() == ''


STOP_TWICE = """
import os, runpy, signal, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
def stop(*_):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
register_optimizer_step_post_hook(stop)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def test_13_a_dry_run_that_is_stopped_twice_leaves_nothing(photos, tmp_path):
    temporary = tmp_path / 'temporary'
    temporary.mkdir()
    done = subprocess.run(
        [
            sys.executable,
            '-c',
            STOP_TWICE,
            ROOT / 'colorize.py',
            '--data_path',
            photos,
            *FLAGS,
            '--dry_run',
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | dict(TMPDIR=str(temporary), PYTHONPATH=str(ROOT)),
    )
    assert done.returncode == 143, done.stderr
    assert os.listdir(temporary) == [] and os.listdir(tmp_path) == ['temporary']


def test_13_a_rate_that_ruins_the_first_epoch(photos, tmp_path, capfd):
    """Nothing is kept that could be gone on with."""
    assert train(tmp_path, '--data_path', photos, *FLAGS, '--epochs', 2, '--lr', 1e9) == 1
    error = capfd.readouterr().err
    assert error.count('\n') == 1 and 'of epoch 1; begin again with a smaller --lr' in error
    assert 'kept' not in error and not list(tmp_path.rglob('*.pth'))


DEMO = """
import sys
from functools import partial
import colorize
colorize.draw_landscapes = partial(colorize.draw_landscapes, per_kind=2)
print('ready', flush=True)
input()
sys.exit(colorize.main(sys.argv[1:]))
"""


def test_13_two_demos_at_once(tmp_path):
    flags = ['--demo', *FLAGS, '--epochs', '1', '--val_fraction', '0']
    demos = [
        subprocess.Popen(
            [sys.executable, '-c', DEMO, *flags],
            cwd=tmp_path,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(PYTHONPATH=str(ROOT)),
        )
        for _ in range(2)
    ]
    for demo in demos:
        assert demo.stdout.readline() == 'ready\n'
    for demo in demos:
        demo.stdin.write('\n')
        demo.stdin.flush()
    texts = [demo.communicate()[0] for demo in demos]
    assert [demo.returncode for demo in demos] == [0, 0], texts
    assert {path.name for path in (tmp_path / 'runs').glob('demo*')} == {'demo', 'demo_2'}
    assert len(list((tmp_path / 'data/demo').rglob('*.jpg'))) == 14


def test_a_place_that_its_settings_allow_is_taken(trained, tmp_path):
    """What the checks of number 12 must not refuse: any place where a run can be stopped."""
    rng = random.Random(0)
    for _ in range(20):
        state = copy.copy(trained[1])
        step = rng.randint(0, 2)
        progress = dict(epoch=0, step=step, loss_sum=0.1 * step, photos=min(9, 8 * step))
        state['progress'] = (
            state['progress'] | progress | dict(best=math.inf, best_epoch=0, best_gain=0.0)
        )
        state['optimizer'] = (
            {
                index: values | dict(step=torch.tensor(float(step)))
                for index, values in state['optimizer'].items()
            }
            if step
            else {}
        )
        torch.save(state, tmp_path / 'x.pth')
        assert load_checkpoint(tmp_path / 'x.pth', UNet(), settings())['progress']['step'] == step
    assert RunFolder(tmp_path, 'UNet', True).path == tmp_path / 'runs/UNet'
