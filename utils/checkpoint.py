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

VERSION = 8  # of checkpoints; others are refused


def atomic_write(content, *paths, sync=True):
    """Atomically write bytes to each of the paths: no reader ever sees a part of a file.

    A path that is a link is followed. All files are written before the first takes its name. With
    `sync`, which takes milliseconds, they outlast a power cut, too.
    Raises OSError naming the path that could not be written, which then is as it was.
    """
    temporaries = []
    try:
        for path in paths:
            # a name of its own, because another process may write to the same path
            temporaries.append(f'{os.path.realpath(path)}.{uuid.uuid4().hex[:8]}.tmp')
            with open(temporaries[-1], 'xb') as file:
                file.write(content)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
        for path, temporary in zip(paths, temporaries, strict=True):
            os.replace(temporary, os.path.realpath(path))
    except OSError as error:
        for temporary in temporaries:
            with contextlib.suppress(OSError):  # it is in place already, or the disk is read-only
                os.unlink(temporary)
        raise OSError(error.errno, f'{path} was not saved: {error.strerror}') from error


def to_bytes(value):
    """Return what torch.save makes of a value."""
    content = io.BytesIO()  # torch.save to a file raises no OSError on a full disk
    torch.save(value, content)
    return content.getbuffer()


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


def save_weights(net, about, *paths):
    """Atomically save the weights, as any laptop can load them: contiguous CPU float32 tensors.

    `net.image_size` and `about`, a line on their origin, travel in the metadata, where PyTorch
    keeps the versions of modules. Raises OSError naming the path that could not be written.
    """
    state = net.state_dict()
    plain = OrderedDict(
        (name, value.detach().to('cpu', torch.float32, memory_format=torch.contiguous_format))
        for name, value in state.items()
    )
    plain._metadata = OrderedDict(state._metadata)
    plain._metadata[''] = dict(state._metadata[''], image_size=net.image_size, about=about)
    atomic_write(to_bytes(plain), *paths)


def load_weights(net, path):
    """Load the weights in a file into `net`, and return it.

    If the file tells, `net.image_size` becomes that of the training, and `net.about` a line on the
    weights' origin. Raises UsageError if the file holds anything else.
    """
    if not os.path.exists(path):
        raise UsageError(f'no weights {path}: train with colorize.py, or name them with --weights')
    state = load_tensors(path)
    if isinstance(state, dict) and 'progress' in state:
        raise UsageError(f'{path} is the checkpoint of a run; its weights are unet.pth beside it')
    set_weights(net, state, path)
    metadata = getattr(state, '_metadata', {}).get('', {})
    net.image_size = metadata.get('image_size') or net.image_size
    net.about = str(metadata.get('about', ''))
    return net


def set_weights(net, state, path):
    """Load a state_dict, which `path` holds, into `net`. Raises UsageError if it does not fit."""
    try:
        net.load_state_dict(state)
    except Exception as error:  # of a foreign file, names and values can be anything
        reason = ' '.join(str(error).split())[:150]
        raise UsageError(f'{path} holds no weights of this network: {reason}') from error
    if not all(weight.isfinite().all() for weight in net.parameters()):
        raise UsageError(f'{path} holds weights that are not finite')


@dataclass
class Progress:
    """How far a run has come."""

    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the running epoch
    loss_sum: float = 0.0  # over the photos seen in the running epoch
    seen: int = 0  # photos, in the running epoch
    best: float = math.inf  # the lowest objective on the held-out photos
    best_epoch: int = 0  # the epoch that had it, whose weights are saved
    best_gain: float = 0.0  # dB over the gray copy in that epoch

    def set_loss(self, loss_sum):
        """Note the sum of the losses of all photos seen. Raises FloatingPointError."""
        if not math.isfinite(loss_sum):
            raise self.not_finite(f'the loss is {loss_sum}')
        self.loss_sum = loss_sum

    def all_reduce(self):
        """Take the sums over all ranks; after --resume, rank 0 alone goes on with them."""
        self.loss_sum, self.seen = distributed.all_reduce_sum(self.loss_sum, self.seen)

    def finish_epoch(self):
        """Count the running epoch as finished."""
        self.epoch += 1
        self.step, self.loss_sum, self.seen = 0, 0.0, 0

    def update_best(self, objective, gain):
        """Note the running epoch as the best if its objective is the lowest; tell whether it is."""
        if not math.isfinite(objective):
            raise self.not_finite(f'the validation loss is {objective}')
        if is_best := objective < self.best:
            self.best, self.best_epoch, self.best_gain = objective, self.epoch + 1, gain
        return is_best

    def not_finite(self, what):
        """Return the error of a run that `what` ends."""
        return FloatingPointError(
            f'{what} at step {self.step} of epoch {self.epoch + 1}; weights and checkpoint of the '
            'epochs before are kept: --resume, or begin again, with a smaller --lr or '
            '--precision fp32'
        )


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
        atomic_write(to_bytes(checkpoint), path)

    def load(self, path):
        """Go on from the checkpoint that rank 0 has at `path`, if there is one.

        Raises UsageError if the file is no checkpoint of this version, or has other settings.
        """
        checkpoint = None
        if distributed.rank == 0 and os.path.exists(path):
            checkpoint = load_tensors(path)
            if not isinstance(checkpoint, dict) or checkpoint.get('version') != VERSION:
                raise UsageError(f'{path} is of another version of the program; move it away')
            for name, value in self.settings.items():
                if (trained := checkpoint['settings'][name]) != value:
                    wanted = f'--{name} {trained}, not {value}: give that, or another --name'
                    raise UsageError(f'--resume: {path} was trained with {wanted}')
        checkpoint = distributed.broadcast(checkpoint)
        if not checkpoint:
            return
        set_weights(self.net, checkpoint['net'], path)
        state = dict(self.optimizer.state_dict(), state=checkpoint['optimizer'])
        self.optimizer.load_state_dict(state)
        if checkpoint['scaler'] and self.scaler.is_enabled():  # empty unless in float16
            self.scaler.load_state_dict(checkpoint['scaler'])
        self.progress = Progress(**checkpoint['progress'])
        if distributed.rank:  # the sums over all ranks are rank 0's to carry on
            self.progress.loss_sum, self.progress.seen = 0.0, 0
