"""What the tests share: runs in this process and in others, what they leave, README's commands."""

import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.optimizer import register_optimizer_step_post_hook

import colorize
from unet import UNet

ROOT = Path(__file__).parent.parent
CHECKPOINT, WEIGHTS = 'runs/UNet/checkpoint.pth', 'runs/UNet/unet.pth'
GAIN = 'Gain over the gray copy (dB)'
TAGS = {
    GAIN,
    "vividness (% of the truth's colorfulness)",
    'training loss',
    'validation loss',
    'learning rate',
    'photos per second',
}
IMAGES = {'Input', 'Predicted', 'Ground truth', 'Colorized'}
# a run that takes seconds: of the 56 drawings, 43 are to train on
EPOCHS, STEPS = 4, 3
FLAGS = [
    '--image_size',
    '32',
    '--batch_size',
    '16',
    '--epochs',
    f'{EPOCHS}',
    '--val_fraction',
    '0.25',
    '--device',
    'cpu',
    '--num_workers',
    '1',
]
SMALL = ' '.join(['--epochs 2', *FLAGS[:4], *FLAGS[6:]])  # in README's commands

ROW = re.compile(rf'(\d)/{EPOCHS} +0\.\d{{5}} .*')  # that such a run prints of an epoch

# a shell's '&' makes Ctrl-C ignored, and the programs that the tests start would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)


# ---------------------------------------------------------------------------- runs in this process


def call(folder, *flags, program=colorize):
    """Return the exit code of `colorize.py flags...`, called in this process, in `folder`."""
    words = list(map(str, flags))
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    with pytest.MonkeyPatch.context() as patch:
        if folder:
            patch.chdir(folder)
        patch.setattr(sys, 'argv', ['colorize.py', *words])
        patch.setattr(colorize, 'keep_memory', lambda: None)  # it would outlast the test
        patch.setattr(threading, 'excepthook', threading.excepthook)  # so that it is put back
        try:
            return program.main(words)
        except SystemExit as end:
            return end.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


@contextmanager
def signal_after(steps, number=signal.SIGTERM):
    """Send this process the signal in its optimizer's step of that number; count all steps."""
    made = []

    def count(*_):
        made.append(len(made) + 1)
        if made[-1] == steps:
            os.kill(os.getpid(), number)

    hook = register_optimizer_step_post_hook(count)
    try:
        yield made
    finally:
        hook.remove()


# ---------------------------------------------------------------------------- runs of their own

# colorize.py as it is, but every step that its optimizer makes leaves a byte in a file
COUNTED = """
import runpy, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
steps, *sys.argv = sys.argv[1:]
steps = open(steps, 'ab', buffering=0)
register_optimizer_step_post_hook(lambda *_: steps.write(b'.'))
runpy.run_path(sys.argv[0], run_name='__main__')
"""


class Training:
    """colorize.py, started in `folder` on a terminal and in a process group of its own."""

    def __init__(self, folder, photos, *flags):
        self.folder, self.terminal, self.started = folder, b'', time.time()
        self.log = folder / 'runs/UNet'
        self.steps = folder.with_name(f'{folder.name}.steps')
        ours, its = pty.openpty()
        termios.tcsetwinsize(its, (25, 100))
        self.process = subprocess.Popen(
            [
                sys.executable,
                '-c',
                COUNTED,
                self.steps,
                ROOT / 'colorize.py',
                '--data_path',
                photos,
                *FLAGS,
                *flags,
            ],
            cwd=folder,
            stdin=its,
            stdout=its,
            stderr=its,
            start_new_session=True,
            # small networks only wait for each other's threads
            env=dict(OMP_NUM_THREADS='1') | os.environ | dict(PYTHONPATH=str(ROOT)),
        )
        os.close(its)
        self.reader = threading.Thread(target=self.read, args=[ours], daemon=True)
        self.reader.start()

    def read(self, terminal):
        with open(terminal, 'rb', buffering=0) as shown:
            try:
                while data := shown.read(65536):
                    self.terminal += data
            except OSError:  # nobody holds the other end any more
                pass

    @property
    def text(self):
        return self.terminal.decode(errors='replace')  # the end may be half a character

    def wait_for(self, happened, seconds=120):
        """Wait until `happened()` or the program's end; tell whether the program still runs."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and not happened():
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL, group=True)
                raise TimeoutError(self.text)
            time.sleep(0.0005)
        return self.process.poll() is None

    def signal(self, number, group=False):
        """Signal the program alone or, as Ctrl-C and systemd do it, its workers too."""
        (os.killpg if group else os.kill)(self.process.pid, number)

    def end(self, seconds=60):
        """Wait for the end; return the exit code, negative where a signal was the end."""
        code = self.process.wait(seconds)
        # workers left alone notice it within five seconds, and hold the terminal until then
        self.reader.join(30)
        assert not self.reader.is_alive(), 'a worker outlived the program'
        return code

    def is_written(self, pattern, *, since=0.0):
        """Tell whether this start has written such a file."""
        for path in self.folder.glob(pattern):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime > max(since, self.started):
                    return True
        return False


# each waits for its moment, and tells whether the training still runs


def at_any_moment(training, delay, seconds):
    """From the first line on."""
    alive = training.wait_for(lambda: 'logging in' in training.text)
    time.sleep(delay * seconds)
    return alive and training.process.poll() is None


def while_saving(training, delay, name, seconds=0.02):
    alive = training.wait_for(lambda: training.is_written(f'{name}.*.tmp'))
    time.sleep(delay * seconds)
    return alive and training.process.poll() is None


def after_an_epoch(training, delay, seconds=0.1):
    alive = training.wait_for(lambda: ROW.search(training.text))
    time.sleep(delay * seconds)
    return alive and training.process.poll() is None


# ---------------------------------------------------------------------------- what a run leaves


def events(folder):
    """Return what TensorBoard reads in a run's folder."""
    return EventAccumulator(str(folder), size_guidance=dict(images=0, scalars=0)).Reload()


def series(page, tag):
    """Return the points (step, value) of one curve."""
    return [(event.step, event.value) for event in page.Scalars(tag)]


def curves(folder):
    """Return {tag: [(step, value)]} of the run in `folder`; of images only the steps.

    Without the speed, which no two runs have in common.
    """
    page = events(folder / 'runs/UNet')
    return {
        tag: series(page, tag) for tag in page.Tags()['scalars'] if tag != 'photos per second'
    } | {tag: [event.step for event in page.Images(tag)] for tag in page.Tags()['images']}


def load(path):
    return torch.load(path, map_location='cpu', weights_only=True)


def is_same(a, b):
    """Compare what two files of torch.save hold, bit by bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(is_same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def unloadable(folder):
    """Return the names of the weights and checkpoints that are not whole, with the reason."""
    bad = []
    for path in folder.rglob('*.pth'):
        try:
            state = load(path)
            UNet().load_state_dict(state['net'] if path.name == 'checkpoint.pth' else state)
        except Exception as error:  # whatever it is, it is what is looked for
            bad.append(f'{path.relative_to(folder)}: {error!r}')
    return bad


def differences(folder, reference):
    """Return how a run that was stopped differs from one that was not: a list, to be empty."""
    found = unloadable(folder)
    found += [
        f'{name} differs'
        for name in ('unet.pth', WEIGHTS)
        if (folder / name).read_bytes() != (reference / name).read_bytes()
    ]
    ended, expected = load(folder / CHECKPOINT), load(reference / CHECKPOINT)
    found += [
        f"the checkpoint's {part} differs"
        for part in expected.keys() | ended.keys()
        if not is_same(ended.get(part), expected.get(part))
    ]
    theirs, ours = curves(reference), curves(folder)
    found += [
        f'{tag}: {ours.get(tag)}, not {theirs.get(tag)}'
        for tag in sorted(theirs.keys() | ours.keys())
        if ours.get(tag) != theirs.get(tag)
    ]
    return found + [
        f'{path.name} was left' for path in (*folder.rglob('*.tmp'), *folder.glob('unet_*.pth'))
    ]


def steps_in(checkpoint):
    """Return the optimizer's own count, and what the position says; 0 where there is none."""
    if not checkpoint.exists():
        return 0, 0
    state = load(checkpoint)
    steps = {int(weight['step']) for weight in state['optimizer'].values()}
    assert len(steps) <= 1, steps
    return max(steps, default=0), state['progress']['epoch'] * STEPS + state['progress']['step']


# ---------------------------------------------------------------------------- the course's own


def template_conv(i, o):
    return nn.Sequential(
        nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.Conv2d(o, o, 3, padding=1), nn.ReLU()
    )


class TemplateBlock(nn.Module):
    def __init__(self, i, o, **kwargs):
        super().__init__()
        self.conv_block = template_conv(i, o)
        for name, module in kwargs.items():
            setattr(self, name, module)


class TemplateUNet(nn.Module):
    """As a student would write it from the course's template: names and shapes only."""

    def __init__(self):
        super().__init__()
        for n, (i, o) in enumerate([(1, 32), (32, 64), (64, 128)], 1):
            setattr(self, f'downsample_block_{n}', TemplateBlock(i, o, maxpool=nn.MaxPool2d(2)))
        self.middle_conv_block = template_conv(128, 256)
        for n, (i, o) in {3: (384, 128), 2: (192, 64), 1: (96, 32)}.items():
            setattr(
                self,
                f'upsample_block_{n}',
                TemplateBlock(i, o, upsample=nn.Upsample(scale_factor=2, mode='bilinear')),
            )
        self.last_conv = nn.Conv2d(32, 3, 1)

    def forward(self, x):
        skips = []
        for n in 1, 2, 3:
            block = getattr(self, f'downsample_block_{n}')
            skips.append(block.conv_block(x))
            x = block.maxpool(skips[-1])
        x = self.middle_conv_block(x)
        for n in 3, 2, 1:
            block = getattr(self, f'upsample_block_{n}')
            x = block.conv_block(torch.cat([block.upsample(x), skips.pop()], 1))
        return self.last_conv(x)
