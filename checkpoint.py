"""What makes a run impossible to lose: files written whole, resuming, stopping when asked."""
import contextlib
import hashlib
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

from data_utils import RequestError
from unet import UNet


@dataclass
class Progress:
    """How far a run has come; with the network and the optimizer, all that is needed to go on."""
    epoch: int = 0            # finished epochs
    step: int = 0             # finished steps of the running epoch
    loss_sum: float = 0.0     # over the photos seen in the running epoch
    photos: int = 0
    best: float = math.inf    # the lowest validation loss
    saved: str = ''           # the digest of this run's unet.pth

    def finish_epoch(self):
        self.epoch += 1
        self.step, self.loss_sum, self.photos = 0, 0.0, 0


# ---------------------------------------------------------------------------- files

def save_whole(path, content):
    """Writes `content` to the file `path` whole or not at all: never half, never neither.

    Raises OSError naming `path`, which then is as it was.
    """
    content, temporary = serialized(content), Path(f'{path}.tmp')
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


def serialized(content):
    """The bytes of a file by torch.save; made in memory, a full disk is an ordinary OSError."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def plain_state_dict(net):
    """The weights as any laptop can load them: contiguous CPU float32 tensors."""
    return {name: value.detach().to('cpu', torch.float32, memory_format=torch.contiguous_format)
            for name, value in net.state_dict().items()}


def digest(path):
    """SHA-256 of a file; '' where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ''


def set_aside(path, content):
    """Keeps an earlier run's file, where `content` is about to take its place.

    Renames it to the first free name with a number, which is returned; None where there was no
    file, or the same one, which a run left that was killed before its first checkpoint.
    """
    if not path.exists() or path.read_bytes() == serialized(content):
        return None
    names = (path.with_stem(f'{path.stem}_{number}') for number in itertools.count(1))
    kept = next(name for name in names if not name.exists())
    os.replace(path, kept)
    return kept


def run_folder(runs, args):
    """The folder of this run: runs/NAME, or with a number where an earlier run has that.

    Raises RequestError where a file is in the way, OSError where it cannot be made.
    """
    try:
        runs.mkdir(parents=True, exist_ok=True)
        folder, number = runs / args.name, 1
        while True:
            try:
                folder.mkdir(exist_ok=args.resume)
                return folder
            except FileExistsError:
                if args.resume:
                    raise
                number += 1
                folder = runs / f'{args.name}_{number}'
    except (FileExistsError, NotADirectoryError) as error:
        raise RequestError(f'{error.filename} is a file where a folder is needed; move it away, '
                           'or give another --name') from error


def load_tensors(path):
    """What torch.save wrote at `path`, on the CPU; code in the file is never run.

    Raises RequestError that says what the file is instead.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of torch about foreign files: the line below says it
            return torch.load(path, map_location='cpu', weights_only=True)
    except OSError as error:
        raise RequestError(f'{path} cannot be read: {error.strerror}') from error
    except Exception as error:  # a foreign file makes the unpickler raise nearly anything
        start = Path(path).read_bytes()[:512].lstrip().lower()
        what = ('an empty file' if not start else
                'a web page' if start.startswith(b'<') else
                'no file of torch.save' if not start.startswith((b'pk', b'\x80')) else
                'a pickle of more than tensors, which could run code'
                if isinstance(error, pickle.UnpicklingError) else
                'a damaged or truncated file')
        raise RequestError(f'{path} is {what}; nothing in it was run') from error


def load_weights(path):
    """A UNet (on the CPU, float32) with the weights in the file `path`, as training wrote it.

    Raises RequestError for any other file, saying what it is and what was expected.
    """
    expected = "expected the state_dict of this project's UNet, as colorize.py saves in unet.pth"
    if not os.path.isfile(path):
        raise RequestError(f'no weights file {path}: train with colorize.py, or name it with '
                           '--weights')
    try:
        state = load_tensors(path)
    except RequestError as error:
        raise RequestError(f'{error}; {expected}') from error
    net = UNet()
    if difference := differs(state, net.state_dict()):
        raise RequestError(f'{path} holds {difference}; {expected}')
    net.load_state_dict(state)
    return net


def differs(state, own):
    """How a loaded state_dict differs from `own`, in words; '' where it fits."""
    if not isinstance(state, dict):
        return f'a {type(state).__name__}'
    if {'net', 'optimizer', 'progress'} <= state.keys():
        return 'a checkpoint of a training run, not its weights'
    for name in sorted(map(str, own.keys() - state.keys())):
        return f'another network (it has no {name})'
    for name in sorted(map(str, state.keys() - own.keys())):
        return f'another network (it has {name})'
    for name, value in own.items():
        shape = tuple(getattr(state[name], 'shape', ()))
        if shape != value.shape:
            return f'another network ({name} is {shape}, not {tuple(value.shape)})'
    return ''


# ---------------------------------------------------------------------------- resuming

@dataclass
class State:
    """Everything needed to go on with a run; `settings` is what must stay the same for that."""
    net: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    settings: dict

    def save(self, path):
        """Raises OSError as save_whole does."""
        save_whole(path, dict(net=self.net.state_dict(), optimizer=self.optimizer.state_dict(),
                              scaler=self.scaler.state_dict(), progress=asdict(self.progress),
                              settings=self.settings))

    def restore(self, checkpoint):
        """Takes over what load_checkpoint gave."""
        self.net.load_state_dict(checkpoint['net'])
        self.optimizer.load_state_dict(checkpoint['optimizer'])
        if checkpoint['scaler']:  # empty where the run was not in float16
            self.scaler.load_state_dict(checkpoint['scaler'])
        self.progress = Progress(**checkpoint['progress'])


def load_checkpoint(path, settings):
    """The checkpoint at `path` (a dict), or None where there is none yet.

    Raises RequestError where `settings` contradict the run's, or it is no checkpoint of this UNet.
    """
    if not os.path.exists(path):
        return None
    remedy = 'move it away to start afresh'
    try:
        checkpoint = load_tensors(path)
    except RequestError as error:
        raise RequestError(f'{error}; {remedy}') from error
    expected = {'net', 'optimizer', 'scaler', 'progress', 'settings'}
    if (not isinstance(checkpoint, dict) or checkpoint.keys() != expected
            or checkpoint['progress'].keys() != asdict(Progress()).keys()):
        raise RequestError(f'{path} is no checkpoint of this program; {remedy}')
    if difference := differs(checkpoint['net'], UNet().state_dict()):
        raise RequestError(f'{path} holds {difference}; {remedy}')
    for name, value in settings.items():
        if checkpoint['settings'].get(name) != value:
            raise RequestError(f'--resume: {name} is {value}, but {path} was trained with '
                               f'{checkpoint["settings"].get(name)}; give that, or another --name')
    return checkpoint


# ---------------------------------------------------------------------------- stopping

class Stopped(Exception):
    """The run was asked to stop, and every finished step is accounted for."""


class StopSignal:
    """Remembers the first Ctrl-C, SIGTERM or hang-up, and lets the second end the program at once.

    While `nothing_to_save`, the first one ends it too.
    """

    def __init__(self):
        self.number, self.nothing_to_save = 0, True
        for name in 'SIGINT', 'SIGTERM', 'SIGHUP':
            number = getattr(signal, name, None)
            # what nohup or a shell's '&' made the program ignore stays ignored
            if number and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.receive)

    def receive(self, number, _):
        if self.number or self.nothing_to_save:
            os._exit(128 + number)
        self.number = number
        # the terminal may be gone: after a hang-up, or as Ctrl-C ended the `tee` behind the pipe
        with contextlib.suppress(OSError):
            # not print: the signal may have come in the middle of one
            os.write(2, b'\nstopping after this step; once more to stop at once\n')
