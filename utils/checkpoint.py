"""What makes a run impossible to lose: atomic files, checkpoints, and stopping when asked."""

import contextlib
import errno
import io
import itertools
import math
import os
import pickle
import pickletools
import re
import shutil
import signal
import uuid
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from utils.cli import LARGEST_SIZE, UsageError
from utils.distributed import print0, rank

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LARGEST_PICKLE = 2**16  # bytes; a checkpoint's has 13,000: tensors lie beside it


# ---------------------------------------------------------------------------- files


def atomic_save(content, *paths):
    """Atomically write `content` (anything that torch.save takes) to each of the paths.

    A path that is a link is followed. All files are written before the first takes its name.
    Raises OSError naming the path that could not be written, which then is as it was.
    """
    content, written = serialize(content), []
    try:
        for path in paths:
            target = os.path.realpath(path) if os.path.islink(path) else str(path)
            if os.path.exists(target) and not os.path.isfile(target):  # as root, even /dev/null
                raise OSError(errno.EEXIST, 'it is no regular file, and is not replaced')
            # a name of its own, because another process may write to the same target
            temporary = f'{target}.{uuid.uuid4().hex[:8]}.tmp'
            written.append((temporary, target))
            with open(temporary, 'xb') as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, names in zip(paths, written, strict=True):  # noqa: B007, `path` is for the error
            os.replace(*names)
    except OSError as error:
        for temporary, _ in written:
            with contextlib.suppress(OSError):  # it is in place already, or the disk is read-only
                os.unlink(temporary)
        raise OSError(error.errno, f'{path} was not saved: {error.strerror}') from error


def serialize(content):
    """Return what torch.save writes: writing to a full disk, it would not raise OSError itself."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def backup_existing(path):
    """Rename the file `path` to the first free name with a number, and return that.

    A link is followed: the file behind it is renamed.
    """
    path = Path(os.path.realpath(path))
    names = (path.with_stem(f'{path.stem}_{number}') for number in itertools.count(1))
    backup = next(name for name in names if not name.exists())
    os.replace(path, backup)
    return backup


def find_leftovers(path):
    """Return the temporary files of atomic_save that killed processes left beside `path`."""
    own = re.compile(re.escape(path.name) + r'\.[0-9a-f]{8}\.tmp')
    return [
        other for other in path.parent.iterdir() if own.fullmatch(other.name) and other.is_file()
    ]


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

    Raises UsageError that says what the file is instead.
    """
    if not os.path.isfile(path):  # reading a pipe or a device could wait forever
        raise UsageError(
            f'{path} is a folder' if os.path.isdir(path) else f'{path} is no regular file'
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch warns of foreign files, which are refused here
            refuse_bomb(path)
            return torch.load(path, map_location='cpu', weights_only=True)
    except OSError as error:
        raise UsageError(f'{path} cannot be read: {error.strerror or error}') from error
    except Exception as error:  # a foreign file makes the unpickler raise nearly anything
        with open(path, 'rb') as file:
            start = file.read(512).lstrip().lower()
        what = (
            'an empty file'
            if not start
            else 'a web page'
            if start.startswith(b'<')
            else 'no file of torch.save'
            if not start.startswith((b'pk', b'\x80'))
            else 'a pickle of more than tensors, which could run code'
            if isinstance(error, pickle.UnpicklingError) or start.startswith(b'\x80')
            else 'a damaged or truncated file'
        )
        raise UsageError(f'{path} is {what}; nothing in it was run') from error


def refuse_bomb(path):
    """Raise ValueError if reading the file could take far more memory or time than it should.

    torch.save compresses nothing. In a long pickle, deeply nested tuples would overflow torch's
    stack. A tuple that is used twice, in one that is used twice, … takes forever as a key.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > os.path.getsize(path):
            raise ValueError('it grows when it is read')
        for member in members:
            if member.filename.lower().endswith('.pkl'):
                if member.file_size > LARGEST_PICKLE:
                    raise ValueError('its pickle is too long')
                refuse_shared_tuples(archive.read(member))


def refuse_shared_tuples(content):
    """Raise ValueError if a pickle uses a tuple twice: torch.save makes each anew."""
    tuples, made = set(), False
    for opcode, argument, _ in pickletools.genops(content):
        if 'GET' in opcode.name and argument in tuples or opcode.name == 'DUP':
            raise ValueError('a tuple is used twice')
        if made and 'PUT' in opcode.name:
            tuples.add(argument)
        made = opcode.name.startswith('TUPLE')


def describe_mismatch(found, expected, name=''):
    """Return in words how `found`, from a file, differs from `expected`; '' if it fits.

    Dicts need the same keys, tensors the same shape and dtype and finite values, other values
    the same type. Float values must not be NaN.
    """
    if isinstance(expected, dict):
        if not isinstance(found, dict):
            return f'{name or "it"} is a {type(found).__name__}, not a dict'
        for key in sorted(map(str, expected.keys() - found.keys())):
            return f'it has no {name}{key}'
        for key in found.keys() - expected.keys():
            return f'it has {name}{brief(key)}'
        mismatches = (
            describe_mismatch(found[key], value, f'{name}{key}' + '.' * isinstance(value, dict))
            for key, value in expected.items()
        )
        return next(filter(None, mismatches), '')
    if isinstance(expected, torch.Tensor):
        if (
            type(found) not in (torch.Tensor, torch.nn.Parameter)
            or found.is_nested
            or found.layout != torch.strided
            or found.is_meta
        ):
            return f'{name} is no plain tensor'
        if found.shape != expected.shape:
            return f'{name} is {tuple(found.shape)}, not {tuple(expected.shape)}'
        if found.dtype != expected.dtype:
            return f'{name} is {found.dtype}, not {expected.dtype}'
        return '' if found.isfinite().all() else f'{name} is not finite'
    if type(found) is not type(expected) or found != found:
        return f'{name} is {brief(found)}'
    return ''


def brief(value):
    """Return a short text for a value from a file: nested ones could be endless."""
    if value is None or isinstance(value, bool | int | float | str):
        return str(value)[:50]
    return f'a {type(value).__name__}'


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


def load_weights(net, path):
    """Load the weights in the file `path`, as training saves them, into `net`, and return it.

    `net.image_size` becomes the side in pixels of the photos that it was trained on, or None if
    the file does not tell. Raises UsageError if the file holds anything else, saying what.
    """
    expected = "expected the state_dict of this project's UNet, as colorize.py saves in unet.pth"
    if not os.path.lexists(path):
        raise UsageError(
            f'no weights file {path}: train with colorize.py, or name it with --weights'
        )
    try:
        state = load_tensors(path)
    except UsageError as error:
        raise UsageError(f'{error}; {expected}') from error
    if isinstance(state, dict) and {'net', 'optimizer', 'progress'} <= state.keys():
        raise UsageError(
            f'{path} holds a checkpoint of a training run, not its weights; {expected}'
        )
    if mismatch := describe_mismatch(state, net.state_dict()):
        raise UsageError(f'{path} holds other weights ({mismatch}); {expected}')
    net.load_state_dict(dict(state))
    net.image_size = stored_image_size(state, path)
    return net


def stored_image_size(state, path):
    """Return the image size in the metadata of a state_dict, or None. Raises UsageError."""
    metadata = getattr(state, '_metadata', None)
    metadata = metadata.get('') if isinstance(metadata, dict) else None
    size = metadata.get('image_size') if isinstance(metadata, dict) else None
    if size is not None and not (type(size) is int and size in range(8, LARGEST_SIZE + 1, 8)):
        raise UsageError(f'{path} says it was trained at {str(size)[:50]} pixels, which cannot be')
    return size


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

    def update_best(self, objective, gain):
        """Note the running epoch as the best if its objective is the lowest; tell whether it is.

        `objective` is None if nothing is held out: then every epoch is the best so far.
        """
        if objective is not None:
            if not math.isfinite(objective):
                raise FloatingPointError(
                    f'the validation loss is {objective} {self.describe_position()}'
                )
            if objective >= self.best:
                return False
            self.best = objective
        self.best_epoch, self.best_gain = self.epoch + 1, gain
        return True

    def sync_losses(self, losses):
        """Add up and forget the losses (step, tensor): only here the host waits for the device.

        Raises FloatingPointError if one is not finite.
        """
        if not losses:
            return
        steps, values = zip(*losses, strict=True)
        for step, loss in zip(steps, torch.stack(values).tolist(), strict=True):
            if not math.isfinite(loss):
                raise FloatingPointError(f'the loss is {loss} {self.describe_position(step)}')
            self.loss_sum += loss
        losses.clear()

    def describe_position(self, step=None):
        """Return in words where the run is, or was at the given step of the running epoch."""
        return f'at step {step or self.step} of epoch {self.epoch + 1}'

    def finish_epoch(self):
        """Count the running epoch as finished."""
        self.epoch += 1
        self.step, self.loss_sum, self.photos = 0, 0.0, 0


@dataclass
class State:
    """Everything needed to go on with a run, and the settings that it was started with."""

    net: torch.nn.Module
    optimizer: torch.optim.Adam
    scaler: torch.amp.GradScaler
    progress: Progress
    settings: dict

    def save(self, path):
        """Atomically write a checkpoint to `path`. Raises OSError naming it."""
        # of the optimizer only its state: how it works best on a device is the next run's to say
        atomic_save(
            dict(
                net=self.net.state_dict(),
                optimizer=self.optimizer.state_dict()['state'],
                scaler=self.scaler.state_dict(),
                progress=asdict(self.progress),
                settings=self.settings,
            ),
            path,
        )

    def restore(self, checkpoint):
        """Take over what load_checkpoint returned."""
        self.net.load_state_dict(dict(checkpoint['net']))  # without its metadata
        parameters = dict(enumerate(self.net.parameters()))
        # Adam's kernels need its averages in the memory layout of the weights
        averages = {
            index: {
                name: value if name == 'step' else torch.empty_like(parameters[index]).copy_(value)
                for name, value in state.items()
            }
            for index, state in checkpoint['optimizer'].items()
        }
        self.optimizer.load_state_dict(dict(self.optimizer.state_dict(), state=averages))
        if checkpoint['scaler'] and self.scaler.is_enabled():  # empty unless in float16
            self.scaler.load_state_dict(checkpoint['scaler'])
        self.progress = Progress(**checkpoint['progress'])
        if rank:  # the sums over all ranks are rank 0's to carry on
            self.progress.loss_sum, self.progress.photos = 0.0, 0


def describe_kept(progress):
    """Return what is left of a run whose numbers are no longer finite, and what to do."""
    remedy = 'a smaller --lr or --precision fp32'
    if progress.epoch:
        return f'the last good checkpoint is kept: --resume with {remedy}'
    return f'begin again with {remedy}'


def load_checkpoint(path, net, settings):
    """Return the checkpoint at `path` (a dict), or None if there is none yet.

    Raises UsageError if it is not what this program writes for a network like `net` and settings
    of the types of `settings`.
    """
    if not os.path.lexists(path):
        return None
    remedy = 'move it away to start afresh'
    try:
        checkpoint = load_tensors(path)
    except UsageError as error:
        raise UsageError(f'{error}; {remedy}') from error
    if mismatch := describe_bad_checkpoint(checkpoint, net, settings):
        raise UsageError(
            f'{path} is no checkpoint of this version of the program ({mismatch}); {remedy}'
        )
    return checkpoint


def describe_bad_checkpoint(checkpoint, net, settings):
    """Return in words what in a loaded checkpoint cannot be; '' if all is well."""
    adam = {
        index: dict(step=torch.tensor(0.0), exp_avg=weight, exp_avg_sq=weight)
        for index, weight in enumerate(net.parameters())
    }
    scaler = torch.amp.GradScaler('cpu', enabled=True).state_dict()
    expected = dict(
        net=net.state_dict(),
        optimizer=adam,
        scaler=scaler,
        progress=asdict(Progress()),
        settings=settings,
    )
    if isinstance(checkpoint, dict):
        for name in 'optimizer', 'scaler':  # empty before the first step, and unless in float16
            if checkpoint.get(name) == {}:
                expected[name] = {}
    if mismatch := describe_mismatch(checkpoint, expected):
        return mismatch
    steps = {float(state['step']) for state in checkpoint['optimizer'].values()}
    if len(steps) > 1 or min(steps, default=0) < 0:
        return f'its weights have made {sorted(steps)} steps'
    if any((state['exp_avg_sq'] < 0).any() for state in checkpoint['optimizer'].values()):
        return 'a square is negative'
    numbers = checkpoint['progress'] | checkpoint['scaler']
    if negative := [name for name, value in numbers.items() if value < 0 and name != 'best_gain']:
        return f'{negative[0]} is {numbers[negative[0]]}'
    if found := checkpoint['scaler']:
        scaler |= dict(scale=found['scale'], _growth_tracker=found['_growth_tracker'])
        if found != scaler or not 0 < found['scale'] < math.inf:
            return f'the gradient scaler is {list(found.values())}'
    return describe_impossible_place(
        Progress(**checkpoint['progress']), checkpoint['settings'], max(steps, default=0.0)
    )


def describe_impossible_place(progress, settings, made):
    """Return in words why a run of these settings cannot have come so far; '' if it can.

    `made` are the steps that the optimizer counts: those that were skipped in float16 are missing.
    """
    if not re.fullmatch(r'[0-9]{1,9} \([0-9a-f]{8}\)', settings['photos']):
        return f'photos is {brief(settings["photos"])}'
    photos = int(settings['photos'].split()[0])
    steps = math.ceil(photos / max(1, settings['batch_size']))
    is_new, at_start = not progress.epoch, not progress.step
    wrong = dict(
        epoch=progress.epoch > settings['epochs'],
        step=progress.step > steps,
        photos=progress.photos > (0 if at_start else photos),
        loss_sum=at_start and progress.loss_sum or progress.loss_sum == math.inf,
        best=is_new and progress.best < math.inf,
        best_epoch=not min(1, progress.epoch) <= progress.best_epoch <= progress.epoch,
        best_gain=math.isinf(progress.best_gain),
    )
    if not made.is_integer() or made > progress.epoch * steps + progress.step:
        return f'its weights have made {made:g} steps'
    return next((f'{name} is {getattr(progress, name)}' for name in wrong if wrong[name]), '')


def require_same(settings, earlier, names):
    """Raise UsageError if one of the named settings contradicts the checkpoint's, `earlier`."""
    for name in names:
        if settings[name] != earlier.get(name):
            raise UsageError(
                f'--resume: {name} is {settings[name]}, but the checkpoint was '
                f'trained with {earlier.get(name)}; give that, or another --name'
            )


# ---------------------------------------------------------------------------- the files of a run


def latest_number(runs, name):
    """Return the highest number of the runs NAME (1), NAME_2, … in the folder `runs`, 0 of none."""
    family = re.compile(re.escape(name) + '(?:_([2-9]|[1-9][0-9]+))?')
    matches = map(family.fullmatch, os.listdir(runs) if runs.is_dir() else [])
    return max((int(match[1] or 1) for match in matches if match), default=0)


def numbered(name, number):
    """Return the name of the run NAME of that number: NAME, NAME_2, …"""
    return name if number < 2 else f'{name}_{number}'


def find_run(home, name, argv):
    """Return the folder below `home` of the run that the command line `argv` asks for.

    It is runs/NAME. With --resume and without --name, it is the latest of runs/NAME, runs/NAME_2,
    and so on: the same command without --resume may have made that.
    """
    runs = home / 'runs'
    is_latest = '--resume' in argv and not any(word.split('=')[0] == '--name' for word in argv)
    return runs / numbered(name, latest_number(runs, name) if is_latest else 1)


class RunFolder:
    """The files of one run: `runs/NAME` below `home`, and `home/unet.pth`, the latest weights.

    A new run gets the next name: NAME, NAME_2, … A resumed one gets NAME itself. The folder is
    locked until the process ends. Raises UsageError if a file, a folder or another process is in
    the way, OSError if the folder cannot be made.
    """

    def __init__(self, home, name, resume):
        self.runs, self.latest = home / 'runs', home / 'unet.pth'
        self.refuse_other_kinds(self.latest)
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
            self.path = self.make(name, resume)
        except (FileExistsError, NotADirectoryError) as error:
            raise UsageError(
                f'{error.filename} is a file where a folder is needed; move it away, '
                'or give another --name'
            ) from error
        self.checkpoint, self.weights = self.path / 'checkpoint.pth', self.path / 'unet.pth'
        self.skipped = self.path / 'skipped.txt'
        self.refuse_other_kinds(
            self.checkpoint, self.weights, self.skipped, self.path / '.lock', self.runs / '.lock'
        )
        self.lock = lock(self.path / '.lock')
        if not self.lock:
            raise UsageError(
                f'another process is training in {self.path}; wait for its end, or '
                'give another --name'
            )
        if resume and not self.checkpoint.exists():
            print0(f'nothing to go on with in {self.path}: its run begins')
        for leftover in find_leftovers(self.weights) + find_leftovers(self.checkpoint):
            if self.latest.exists() and leftover.read_bytes() == self.latest.read_bytes():
                os.replace(leftover, self.weights)  # between the renames of save_weights
            else:
                leftover.unlink()

    @staticmethod
    def refuse_other_kinds(*paths):
        """Raise UsageError if there is a folder, a pipe or a device at one of the paths."""
        for path in paths:
            if path.exists() and not path.is_file():
                kind = 'a folder' if path.is_dir() else 'no regular file'
                raise UsageError(f'{path} is {kind}, but a run needs that name; move it away')

    def make(self, name, resume):
        """Make the folder, and return its path."""
        if resume:
            path = self.runs / name
            path.mkdir(exist_ok=True)
            return path
        for number in itertools.count(latest_number(self.runs, name) + 1):
            path = self.runs / numbered(name, number)
            with contextlib.suppress(FileExistsError):  # of a run that began in this moment
                path.mkdir()
                break
        if number > 1:  # a run that is killed has no time to say it
            print0(
                f'{self.runs / name} is taken: this run is in {path}; to go on with it, '
                f'add --name {path.name} --resume'
            )
        return path

    def save_weights(self, net):
        """Save the weights of `net` as this run's, and as the latest.

        Weights that would be lost are renamed first: the latest if they are in no run's folder, and
        this folder's if there is no checkpoint that they belong to.
        """
        weights = plain_state_dict(net)
        with lock(self.runs / '.lock', wait=True):  # runs of other names write the latest, too
            if self.weights.exists() and not self.checkpoint.exists():
                if self.weights.read_bytes() != serialize(weights):  # a killed run's are the same
                    print0(
                        f'{self.weights} has no checkpoint beside it: it is now '
                        f'{backup_existing(self.weights).name}'
                    )
            if self.latest.exists() and not self.is_in_a_run(self.latest.read_bytes()):
                print0(
                    f"{self.latest.name} is in no run's folder: it is now "
                    f'{backup_existing(self.latest).name}'
                )
            for leftover in find_leftovers(self.latest):
                leftover.unlink()
            atomic_save(weights, self.latest, self.weights)

    def is_latest(self):
        """Tell whether the latest weights are this run's."""
        return self.latest.exists() and self.latest.read_bytes() == self.weights.read_bytes()

    def is_in_a_run(self, weights):
        """Tell whether some run's folder has these weights (bytes)."""
        # a file that a killed run could not rename any more counts, too
        candidates = (path for path in self.runs.glob('*/unet*.pth*') if path.is_file())
        return any(path.read_bytes() == weights for path in candidates)


# ---------------------------------------------------------------------------- stopping


class Stopped(Exception):
    """The run was asked to stop, and every finished step is accounted for."""


class StopSignal:
    """Remember the first Ctrl-C, SIGTERM or hang-up; end the program at the second.

    While `nothing_to_save` is true, the first one ends it too. The folder `temporary`, if any, is
    removed then.
    """

    def __init__(self):
        self.signum, self.nothing_to_save, self.temporary = 0, True, None
        for name in 'SIGINT', 'SIGTERM', 'SIGHUP':
            signum = getattr(signal, name, None)
            # a signal that nohup or a shell's '&' made the program ignore stays ignored
            if signum and signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self.receive)

    def receive(self, signum, _):
        if self.signum or self.nothing_to_save:
            if self.temporary:
                shutil.rmtree(self.temporary, ignore_errors=True)
            os._exit(128 + signum)
        self.signum = signum
        # not print, which the signal may have interrupted; it fails if the terminal is gone
        with contextlib.suppress(OSError):
            os.write(2, b'\nstopping after this step; once more to stop at once\n')
