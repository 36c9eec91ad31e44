"""What makes a run impossible to lose: files that are written whole, weights, checkpoints."""

import contextlib
import io
import math
import os
import uuid
import warnings
from collections import OrderedDict
from dataclasses import asdict, dataclass, field

import torch

from utils import distributed
from utils.cli import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

VERSION = 4  # of checkpoints; others are refused


# ---------------------------------------------------------------------------- files


def atomic_save(content, *paths):
    """Atomically write `content` (anything that torch.save takes) to each of the paths.

    A path that is a link is followed. All files are written before the first takes its name.
    Raises OSError naming the path that could not be written, which then is as it was.
    """
    buffer, temporaries = io.BytesIO(), []
    torch.save(content, buffer)  # not to the file: on a full disk, it would raise no OSError
    try:
        for path in paths:
            # a name of its own, because another process may write to the same path
            temporaries.append(f'{os.path.realpath(path)}.{uuid.uuid4().hex[:8]}.tmp')
            with open(temporaries[-1], 'xb') as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in zip(paths, temporaries, strict=True):
            os.replace(temporary, os.path.realpath(path))
    except OSError as error:
        for temporary in temporaries:
            with contextlib.suppress(OSError):  # it is in place already, or the disk is read-only
                os.unlink(temporary)
        raise OSError(error.errno, f'{path} was not saved: {error.strerror}') from error


def lock(path, wait=False):
    """Return an open file that holds the lock `path` until it is closed, or the process ends.

    Returns None if another process holds it, and `wait` is false.
    """
    file = open(path, 'a')
    if fcntl:
        try:
            # a POSIX lock: child processes do not inherit it, and so cannot outlive the owner
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError):
            file.close()
            return None
        except OSError:  # a file system without locks: go on unprotected
            pass
    return file


def load_tensors(path):
    """Return what torch.save wrote at `path`, on the CPU, without running code in the file.

    Raises UsageError if it is anything else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch warns of foreign files, which are refused here
            return torch.load(path, map_location='cpu', weights_only=True)
    except OSError as error:
        raise UsageError(f'{path} cannot be read: {error.strerror or error}') from error
    except Exception as error:  # a foreign file makes the unpickler raise nearly anything
        raise UsageError(f'{path} is damaged, or no file of tensors; nothing was run') from error


def describe_mismatch(found, expected):
    """Return in words how the state_dict `found` differs from `expected`; '' if it fits."""
    if not isinstance(found, dict):
        return f'a {type(found).__name__}'
    for name in [*expected, *found]:
        value, wanted = found.get(name), expected.get(name)
        if wanted is None:
            return f'it has {str(name)[:50]}'
        if not isinstance(value, torch.Tensor):
            return f'it has no tensor {name}'
        if value.shape != wanted.shape:
            return f'{name} is {tuple(value.shape)}, not {tuple(wanted.shape)}'
        if not value.isfinite().all():
            return f'{name} is not finite'
    return ''


# ---------------------------------------------------------------------------- weights


def plain_state_dict(net):
    """Return the weights as any laptop can load them: contiguous CPU float32 tensors.

    `net.image_size` travels in the metadata, where PyTorch keeps the versions of modules.
    """
    state = net.state_dict()
    plain = OrderedDict(
        (name, value.detach().to('cpu', torch.float32, memory_format=torch.contiguous_format))
        for name, value in state.items()
    )
    plain._metadata = OrderedDict(state._metadata)
    plain._metadata[''] = dict(state._metadata[''], image_size=getattr(net, 'image_size', None))
    return plain


def save_weights(net, *paths, lock_path):
    """Atomically save the weights of `net` at all of the paths, for which the lock stands.

    Raises OSError naming the path that could not be written.
    """
    with lock(lock_path, wait=True):
        atomic_save(plain_state_dict(net), *paths)


def load_weights(net, path):
    """Load the weights in the file `path`, as training saves them, into `net`, and return it.

    `net.image_size` becomes the side in pixels of the photos that it was trained on, or None if
    the file does not tell. Raises UsageError if the file holds anything else.
    """
    if not os.path.exists(path):
        raise UsageError(f'no weights {path}: train with colorize.py, or name them with --weights')
    state = load_tensors(path)
    if isinstance(state, dict) and 'progress' in state:
        raise UsageError(f'{path} is the checkpoint of a run; its weights are unet.pth beside it')
    if mismatch := describe_mismatch(state, net.state_dict()):
        raise UsageError(f"{path} holds no weights of this project's UNet: {mismatch}")
    size = getattr(state, '_metadata', {}).get('', {}).get('image_size')
    if size is not None and not (isinstance(size, int) and size > 0 and size % 8 == 0):
        raise UsageError(f'{path} says it was trained at {str(size)[:50]} pixels, which cannot be')
    net.load_state_dict(dict(state))  # without the metadata
    net.image_size = size
    return net


# ---------------------------------------------------------------------------- checkpoints


@dataclass
class Progress:
    """How far a run has come."""

    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the running epoch
    loss_sum: float = 0.0  # over the photos seen in the running epoch
    photos: int = 0  # seen in the running epoch
    best: float = math.inf  # the lowest objective on the held-out photos
    best_epoch: int = 0  # the epoch that had it, whose weights are saved
    best_gain: float = 0.0  # dB over the gray copy in that epoch

    def finish_epoch(self):
        """Count the running epoch as finished."""
        self.epoch += 1
        self.step, self.loss_sum, self.photos = 0, 0.0, 0

    def update_best(self, objective, gain):
        """Note the running epoch as the best if its objective is the lowest; tell whether it is.

        `objective` is None if nothing is held out: then every epoch is the best so far.
        """
        if objective is not None:
            if not math.isfinite(objective):
                raise FloatingPointError(f'the validation loss is {objective} {self.describe()}')
            if objective >= self.best:
                return False
            self.best = objective
        self.best_epoch, self.best_gain = self.epoch + 1, gain
        return True

    def describe(self, step=None):
        """Return in words where the run is, or was at the given step of the running epoch."""
        return f'at step {step or self.step} of epoch {self.epoch + 1}'


@dataclass
class State:
    """All that --resume needs to go on with a run.

    `settings` are those that a run cannot change: {flag without its dashes: value}.
    """

    net: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    settings: dict
    progress: Progress = field(default_factory=Progress)

    def save(self, path):
        """Atomically write a checkpoint to `path`. Raises OSError naming it."""
        checkpoint = dict(
            version=VERSION,
            net=self.net.state_dict(),
            # only its state: how it works best on a device is the next start's to say
            optimizer=self.optimizer.state_dict()['state'],
            scaler=self.scaler.state_dict(),
            progress=asdict(self.progress),
            settings=self.settings,
        )
        atomic_save(checkpoint, path)

    def load(self, path):
        """Go on from the checkpoint that rank 0 has at `path`, if there is one.

        Raises UsageError if the file is no checkpoint of this version, or has other settings.
        """
        checkpoint = None
        if distributed.rank == 0 and os.path.exists(path):
            checkpoint = read_checkpoint(path, self.net, self.settings)
        checkpoint = distributed.broadcast(checkpoint)
        if not checkpoint:
            return
        self.net.load_state_dict(checkpoint['net'])
        state = dict(self.optimizer.state_dict(), state=checkpoint['optimizer'])
        self.optimizer.load_state_dict(state)
        if checkpoint['scaler'] and self.scaler.is_enabled():  # empty unless in float16
            self.scaler.load_state_dict(checkpoint['scaler'])
        self.progress = Progress(**checkpoint['progress'])
        if distributed.rank:  # the sums over all ranks are rank 0's to carry on
            self.progress.loss_sum, self.progress.photos = 0.0, 0


def read_checkpoint(path, net, settings):
    """Return the checkpoint at `path`, a dict. Raises UsageError as State.load does."""
    checkpoint = load_tensors(path)
    if not isinstance(checkpoint, dict) or checkpoint.get('version') != VERSION:
        raise UsageError(
            f'{path} is no checkpoint of this version of the program: move it away, or give '
            'another --name'
        )
    if mismatch := describe_mismatch(checkpoint['net'], net.state_dict()):
        raise UsageError(f'{path} is of another network: {mismatch}; give another --name')
    trained = checkpoint['settings']
    for name, value in settings.items():
        if trained[name] != value:
            raise UsageError(
                f'--resume: {path} was trained with --{name} {trained[name]}, not {value}: give '
                'that, or another --name'
            )
    return checkpoint
