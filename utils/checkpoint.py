"""What makes a run impossible to lose: atomic files, checkpoints, and stopping when asked."""
import contextlib
import io
import itertools
import math
import os
import pickle
import signal
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from utils.cli import UsageError
from utils.distributed import print0

# ---------------------------------------------------------------------------- files


def atomic_save(content, path):
    """Atomically write `content` (anything that torch.save takes) to `path`.

    Raises OSError naming `path`, which then is as it was.
    """
    content, temporary = serialize(content), Path(f'{path}.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # a read-only disk refuses this too
            temporary.unlink()
        raise OSError(error.errno, f'{path} was not saved: {error.strerror}') from error


def serialize(content):
    """Return what torch.save writes, made in memory: a full disk then raises a plain OSError."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def backup_existing(path):
    """Rename the file `path` to the first free name with a number, and return that."""
    names = (path.with_stem(f'{path.stem}_{number}') for number in itertools.count(1))
    backup = next(name for name in names if not name.exists())
    os.replace(path, backup)
    return backup


def load_tensors(path):
    """Return what torch.save wrote at `path`, on the CPU, without running code in the file.

    Raises UsageError that says what the file is instead.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch warns of foreign files, which are refused here
            return torch.load(path, map_location='cpu', weights_only=True)
    except OSError as error:
        raise UsageError(f'{path} cannot be read: {error.strerror}') from error
    except Exception as error:  # a foreign file makes the unpickler raise nearly anything
        start = Path(path).read_bytes()[:512].lstrip().lower()
        what = ('an empty file' if not start else
                'a web page' if start.startswith(b'<') else
                'no file of torch.save' if not start.startswith((b'pk', b'\x80')) else
                'a pickle of more than tensors, which could run code'
                if isinstance(error, pickle.UnpicklingError) else
                'a damaged or truncated file')
        raise UsageError(f'{path} is {what}; nothing in it was run') from error


# ---------------------------------------------------------------------------- weights

def plain_state_dict(net):
    """Return the weights as any laptop can load them: contiguous CPU float32 tensors."""
    return {name: value.detach().to('cpu', torch.float32, memory_format=torch.contiguous_format)
            for name, value in net.state_dict().items()}


def load_weights(net, path):
    """Load the weights in the file `path`, as training saves them, into `net`, and return it.

    Raises UsageError if the file holds anything else, saying what.
    """
    expected = "expected the state_dict of this project's UNet, as colorize.py saves in unet.pth"
    if not os.path.isfile(path):
        raise UsageError(f'no weights file {path}: train with colorize.py, or name it with '
                         '--weights')
    try:
        state = load_tensors(path)
    except UsageError as error:
        raise UsageError(f'{error}; {expected}') from error
    if mismatch := describe_mismatch(state, net.state_dict()):
        raise UsageError(f'{path} holds {mismatch}; {expected}')
    net.load_state_dict(state)
    return net


def describe_mismatch(state, expected):
    """Return in words how a loaded state_dict differs from the `expected` one; '' if it fits."""
    if not isinstance(state, dict):
        return f'a {type(state).__name__}'
    if {'net', 'optimizer', 'progress'} <= state.keys():
        return 'a checkpoint of a training run, not its weights'
    for name in sorted(map(str, expected.keys() - state.keys())):
        return f'another network (it has no {name})'
    for name in sorted(map(str, state.keys() - expected.keys())):
        return f'another network (it has {name})'
    for name, value in expected.items():
        shape = tuple(getattr(state[name], 'shape', ()))
        if shape != value.shape:
            return f'another network ({name} is {shape}, not {tuple(value.shape)})'
    return ''


# ---------------------------------------------------------------------------- checkpoints

@dataclass
class Progress:
    """How far a run has come."""
    epoch: int = 0            # finished epochs
    step: int = 0             # finished steps of the running epoch
    loss_sum: float = 0.0     # over the photos seen in the running epoch
    photos: int = 0           # seen in the running epoch
    best: float = math.inf    # the lowest validation loss

    def finish_epoch(self):
        """Count the running epoch as finished."""
        self.epoch += 1
        self.step, self.loss_sum, self.photos = 0, 0.0, 0


@dataclass
class State:
    """Everything needed to go on with a run; `settings` must stay the same for that."""
    net: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    settings: dict

    def save(self, path):
        """Atomically write a checkpoint to `path`. Raises OSError naming it."""
        atomic_save(dict(net=self.net.state_dict(), optimizer=self.optimizer.state_dict(),
                         scaler=self.scaler.state_dict(), progress=asdict(self.progress),
                         settings=self.settings), path)

    def restore(self, checkpoint):
        """Take over what load_checkpoint returned."""
        self.net.load_state_dict(checkpoint['net'])
        # the learning rate and what suits the device (fused) are this run's own
        self.optimizer.load_state_dict(dict(
            state=checkpoint['optimizer']['state'],
            param_groups=self.optimizer.state_dict()['param_groups']))
        if checkpoint['scaler']:  # empty unless the run was in float16
            self.scaler.load_state_dict(checkpoint['scaler'])
        self.progress = Progress(**checkpoint['progress'])


def load_checkpoint(path, net, settings):
    """Return the checkpoint at `path` (a dict), or None if there is none yet.

    Raises UsageError if `settings` contradict it, or it is no checkpoint of a network like `net`.
    """
    if not os.path.exists(path):
        return None
    remedy = 'move it away to start afresh'
    try:
        checkpoint = load_tensors(path)
    except UsageError as error:
        raise UsageError(f'{error}; {remedy}') from error
    expected = {'net', 'optimizer', 'scaler', 'progress', 'settings'}
    if (not isinstance(checkpoint, dict) or checkpoint.keys() != expected
            or checkpoint['progress'].keys() != asdict(Progress()).keys()):
        raise UsageError(f'{path} is no checkpoint of this version of the program; {remedy}')
    if mismatch := describe_mismatch(checkpoint['net'], net.state_dict()):
        raise UsageError(f'{path} holds {mismatch}; {remedy}')
    for name, value in settings.items():
        if checkpoint['settings'].get(name) != value:
            raise UsageError(f'--resume: {name} is {value}, but {path} was trained with '
                             f'{checkpoint["settings"].get(name)}; give that, or another --name')
    return checkpoint


# ---------------------------------------------------------------------------- the files of a run

class RunFolder:
    """The files of one run: `runs/NAME` below `home`, and `home/unet.pth`, the latest weights.

    A new run gets a free name: NAME, NAME_2, … A resumed one gets NAME itself.
    Raises UsageError if a file or folder is in the way, OSError if the folder cannot be made.
    """

    def __init__(self, home, name, resume):
        self.runs, self.latest = home / 'runs', home / 'unet.pth'
        if self.latest.is_dir():
            raise UsageError(f'{self.latest} is a folder, but the weights need that name; '
                             'move it away')
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
            self.path = self.make(name, resume)
        except (FileExistsError, NotADirectoryError) as error:
            raise UsageError(f'{error.filename} is a file where a folder is needed; move it away, '
                             'or give another --name') from error
        self.checkpoint, self.weights = self.path / 'checkpoint.pth', self.path / 'unet.pth'

    def make(self, name, resume):
        """Make the folder, and return its path."""
        for number in itertools.count(1):
            path = self.runs / (name if number == 1 else f'{name}_{number}')
            try:
                path.mkdir(exist_ok=resume)
                return path
            except FileExistsError:
                if resume:
                    raise

    def save_weights(self, net):
        """Save the weights of `net` as this run's, and as the latest.

        Latest weights that are in no run's folder are renamed first.
        """
        if self.latest.exists() and not self.is_kept(self.latest.read_bytes()):
            print0(f'{self.latest.name} is in no run\'s folder: it is now '
                   f'{backup_existing(self.latest).name}')
        weights = plain_state_dict(net)
        atomic_save(weights, self.weights)
        atomic_save(weights, self.latest)

    def is_kept(self, content):
        """Tell whether some run's folder has these weights."""
        return any(path.read_bytes() == content for path in self.runs.glob('*/unet.pth'))


# ---------------------------------------------------------------------------- stopping

class Stopped(Exception):
    """The run was asked to stop, and every finished step is accounted for."""


class StopSignal:
    """Remember the first Ctrl-C, SIGTERM or hang-up; end the program at the second.

    While `nothing_to_save` is true, the first one ends it too.
    """

    def __init__(self):
        self.signum, self.nothing_to_save = 0, True
        for name in 'SIGINT', 'SIGTERM', 'SIGHUP':
            signum = getattr(signal, name, None)
            # a signal that nohup or a shell's '&' made the program ignore stays ignored
            if signum and signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self.receive)

    def receive(self, signum, _):
        if self.signum or self.nothing_to_save:
            os._exit(128 + signum)
        self.signum = signum
        # not print, which the signal may have interrupted; it fails if the terminal is gone
        with contextlib.suppress(OSError):
            os.write(2, b'\nstopping after this step; once more to stop at once\n')
