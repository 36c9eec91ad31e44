"""What the tests share: runs in this process and in others, and what they leave."""

import os
import pty
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
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import colorize
from unet import UNet
from utils.color import GAIN, OBJECTIVE, VIVIDNESS

ROOT = Path(__file__).parent.parent
CHECKPOINT, WEIGHTS = 'runs/UNet/checkpoint.pth', 'runs/UNet/unet.pth'
TAGS = {GAIN, OBJECTIVE, VIVIDNESS, 'training loss', 'validation loss', 'learning rate'}
IMAGES = {'Input', 'Predicted', 'Ground truth', 'Colorized'}
# a run that takes seconds: of the 56 drawings, 43 are to train on
EPOCHS, STEPS = 4, 3
FLAGS = '--epochs 4 --image_size 16 --batch_size 16 --val_fraction 0.25 --device cpu'.split()

# a shell's '&' makes Ctrl-C ignored, and the programs that the tests start would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)


def call(folder, *flags, program=colorize):
    """Return the exit code of `colorize.py flags...`, called in this process, in `folder`."""
    words = [str(flag) for flag in flags]
    signums = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    # nohup and a shell's '&' have signals ignored
    handlers = {signum: signal.signal(signum, signal.SIG_DFL) for signum in signums}
    with pytest.MonkeyPatch.context() as patch:
        if folder:
            patch.chdir(folder)
        patch.setattr(sys, 'argv', [f'{program.__name__}.py', *words])
        patch.setattr(colorize, 'keep_memory', lambda: None)  # it would outlast the test
        patch.setattr(threading, 'excepthook', threading.excepthook)  # so that it is put back
        try:
            return program.main(words)
        except SystemExit as end:
            return end.code
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)


@contextmanager
def signal_after(steps, number=signal.SIGTERM):
    """Send this process the signal in its training step of that number.

    Gives a list that gets each step: its learning rate, the photos' side, and their pixels' sum.
    """
    made, train_step = [], colorize.train_step

    def note(model, optimizer, x, *rest):
        loss = train_step(model, optimizer, x, *rest)
        made.append((optimizer.param_groups[0]['lr'], x.shape[-1], x.double().sum().item()))
        if len(made) == steps:
            os.kill(os.getpid(), number)
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(colorize, 'train_step', note)
        yield made


# small networks only wait for each other's threads
ENVIRONMENT = dict(OMP_NUM_THREADS='1') | os.environ | dict(PYTHONPATH=str(ROOT))

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
    """colorize.py, started in `folder` on a terminal and in a session of its own."""

    def __init__(self, folder, photos, *flags):
        self.folder, self.terminal, self.started = folder, b'', time.time()
        self.steps = folder.with_name(f'{folder.name}.steps')
        program = [sys.executable, '-c', COUNTED, self.steps, ROOT / 'colorize.py']
        ours, its = pty.openpty()
        termios.tcsetwinsize(its, (25, 100))
        words = [*program, '--data_path', photos, *FLAGS, *flags]
        options = dict(stdin=its, stdout=its, stderr=its, start_new_session=True, env=ENVIRONMENT)
        self.process = subprocess.Popen(words, cwd=folder, **options)
        os.close(its)
        self.reader = threading.Thread(target=self.read, args=[ours], daemon=True)
        self.reader.start()

    def read(self, terminal):
        with open(terminal, 'rb', buffering=0) as shown, suppress(OSError):  # the other end closes
            while data := shown.read(65536):
                self.terminal += data

    @property
    def text(self):
        return self.terminal.decode(errors='replace')  # the end may be half a character

    def wait_for(self, happened, seconds=120):
        """Wait until `happened()` or the program's end; tell whether the program still runs."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and not happened():
            if time.monotonic() > deadline:
                self.process.kill()
                raise TimeoutError(self.text)
            time.sleep(0.002)
        return self.process.poll() is None

    def end(self, seconds=60):
        """Wait for the end; return the exit code, negative where a signal was the end."""
        code = self.process.wait(seconds)
        self.reader.join(seconds)
        assert not self.reader.is_alive(), 'a child outlived the program'
        return code


def in_a_child(function):
    """Return the exit code of a forked process that calls the function: negative for a signal."""
    child = os.fork()
    if not child:
        os._exit(function())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def events(folder):
    """Return what TensorBoard reads in a run's folder."""
    return EventAccumulator(str(folder), size_guidance=dict(images=0, scalars=0)).Reload()


def series(page, tag):
    """Return the points (step, value) of one curve."""
    return [(event.step, event.value) for event in page.Scalars(tag)]


def curves(folder):
    """Return {tag: [(step, value)]} of a run, but for its speed; of images only the steps."""
    page = events(folder / 'runs/UNet')
    scalars = {tag: series(page, tag) for tag in page.Tags()['scalars'] if 'photos' not in tag}
    images = {tag: [event.step for event in page.Images(tag)] for tag in page.Tags()['images']}
    return scalars | images


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
    found = unloadable(folder) + [
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
    steps = {int(weight['step']) for weight in state['optimizer'].values() if 'step' in weight}
    assert len(steps) <= 1, steps
    return max(steps, default=0), state['progress']['epoch'] * STEPS + state['progress']['step']
