"""The folder of a run: its name, its lock, its weights, and the latest weights of all runs."""

import itertools
import os
import re
from pathlib import Path

from utils.checkpoint import save_weights
from utils.cli import UsageError
from utils.distributed import print0

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class RunFolder:
    """The files of one run: `runs/NAME` below `home`, and `home/unet.pth`, the latest weights.

    A new run gets the next free name: NAME, NAME_2, … A resumed one gets NAME if that is given,
    else the latest of `default`, `default`_2, … The folder is locked until the process ends.

    Weights that would be lost are renamed: those in the folder that have no checkpoint beside
    them, and latest ones that are no run's. Raises UsageError if another process trains in the
    folder, OSError if it cannot be made.
    """

    def __init__(self, home, name, default, resume):
        self.runs, self.latest = Path(home, 'runs'), Path(home, 'unet.pth')
        self.runs.mkdir(parents=True, exist_ok=True)
        asked, is_exact = self.runs / (name or default), resume and name is not None
        self.path, self.lock = find_folder(asked, is_exact, resume)
        self.is_renamed = self.path != asked
        if not self.lock:
            raise UsageError(f'another process is training in {self.path}; give another --name')
        self.checkpoint, self.weights = self.path / 'checkpoint.pth', self.path / 'unet.pth'
        with lock(self.runs, wait=True):
            self.keep_weights()
        if resume and not self.checkpoint.exists():
            print0(f'nothing to go on with in {self.path}: its run begins')
        elif self.is_renamed and not resume:  # a run that is killed has no time to say it
            how = f'--name {self.path.name} --resume'
            print0(f'{asked} is taken: this run is in {self.path}; to go on with it, add {how}')

    def keep_weights(self):
        """Rename weights that would be lost, and remove what a killed process left."""
        if self.weights.exists() and not self.checkpoint.exists():
            rename(self.weights, 'has no checkpoint beside it')
        if self.latest.exists():
            weights = self.latest.read_bytes()
            # a file that a killed run could not rename any more counts, too
            if all(path.read_bytes() != weights for path in self.runs.glob('*/unet*.pth*')):
                rename(self.latest, "is in no run's folder")
        for folder in self.path, self.latest.parent:
            for leftover in folder.glob('*.pth.????????.tmp'):  # of a process that was killed
                leftover.unlink()

    def save_weights(self, net, about):
        """Atomically save the weights, with a line on their origin, as the run's and the latest."""
        with lock(self.runs, wait=True):
            save_weights(net, f'{about} of {self.path.name}', self.latest, self.weights)

    def is_latest(self):
        """Tell whether the latest weights are this run's."""
        return self.latest.exists() and self.latest.read_bytes() == self.weights.read_bytes()


def find_folder(path, is_exact, resume):
    """Make and lock the folder of a run that asks for `path`; return it and its lock (see lock)."""
    family, number = re.compile(re.escape(path.name) + '(?:_([2-9]|[1-9][0-9]+))?'), 1
    if not is_exact:
        matches = map(family.fullmatch, os.listdir(path.parent))
        number = max((int(match[1] or 1) for match in matches if match), default=1)
    while True:
        folder = path if number == 1 else path.with_name(f'{path.name}_{number}')
        if resume or not any(folder.glob('*.pth')):
            folder.mkdir(exist_ok=True)
            if (held := lock(folder)) or resume:
                return folder, held
        number += 1


def lock(folder, wait=False):
    """Return an open file that locks the folder until it is closed, or the process ends.

    Returns None if another process holds the lock, and `wait` is false.
    """
    file = open(folder / '.lock', 'a')
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


def rename(path, reason):
    """Rename a file of weights that would be lost to the first free name with a number."""
    path = Path(os.path.realpath(path))
    names = (path.with_stem(f'{path.stem}_{number}') for number in itertools.count(1))
    backup = next(name for name in names if not name.exists())
    os.replace(path, backup)
    print0(f'{path.name} {reason}: it is now {backup}')
