"""The folder of a run: its name, its lock, its weights, and the latest weights of all runs."""

import itertools
import os
import re
from pathlib import Path

from utils.checkpoint import lock
from utils.cli import UsageError
from utils.distributed import print0


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
        self.default, self.lock_path = default, self.runs / '.lock'  # the lock is for all weights
        self.runs.mkdir(parents=True, exist_ok=True)
        self.path = self.open(name or default, is_exact=resume and name is not None, resume=resume)
        self.checkpoint, self.weights = self.path / 'checkpoint.pth', self.path / 'unet.pth'
        self.skipped = self.path / 'skipped.txt'
        if resume and not self.checkpoint.exists():
            print0(f'nothing to go on with in {self.path}: its run begins')
        with lock(self.lock_path, wait=True):
            self.finish_killed_saving()
            if self.weights.exists() and not self.checkpoint.exists():
                rename(self.weights, 'has no checkpoint beside it')
            if self.latest.exists() and not self.is_in_a_run(self.latest.read_bytes()):
                rename(self.latest, "is in no run's folder")

    def open(self, name, is_exact, resume):
        """Make and lock the folder; return its path."""
        number = 1 if is_exact else latest_number(self.runs, name)
        while True:
            path = self.runs / (name if number == 1 else f'{name}_{number}')
            if resume or not is_used(path):
                path.mkdir(exist_ok=True)
                self.lock = lock(path / '.lock')
                if self.lock:
                    break
                if resume:
                    raise UsageError(
                        f'another process is training in {path}; wait for its end, or give '
                        'another --name'
                    )
            number += 1
        if number > 1 and not resume:  # a run that is killed has no time to say it
            print0(
                f'{self.runs / name} is taken: this run is in {path}; to go on with it, '
                f'add --name {path.name} --resume'
            )
        return path

    def finish_killed_saving(self):
        """Do what a process did not come to that was killed while it saved."""
        for leftover in self.path.glob('*.pth.????????.tmp'):
            if self.latest.exists() and leftover.read_bytes() == self.latest.read_bytes():
                os.replace(leftover, self.weights)  # between the two files of save_weights
            else:
                leftover.unlink()
        for leftover in self.latest.parent.glob('unet.pth.????????.tmp'):
            leftover.unlink()

    def is_latest(self):
        """Tell whether the latest weights are this run's."""
        return self.latest.exists() and self.latest.read_bytes() == self.weights.read_bytes()

    def is_in_a_run(self, weights):
        """Tell whether some run's folder has these weights (bytes)."""
        # a file that a killed run could not rename any more counts, too
        return any(path.read_bytes() == weights for path in self.runs.glob('*/unet*.pth*'))


def is_used(path):
    """Tell whether a run has saved anything in the folder `path`."""
    return any(path.glob('*.pth'))


def latest_number(runs, name):
    """Return the highest number of the runs NAME (1), NAME_2, … in the folder `runs`, 1 of none."""
    family = re.compile(re.escape(name) + '(?:_([2-9]|[1-9][0-9]+))?')
    matches = map(family.fullmatch, os.listdir(runs))
    return max((int(match[1] or 1) for match in matches if match), default=1)


def rename(path, reason):
    """Rename a file of weights that would be lost to the first free name with a number."""
    path = Path(os.path.realpath(path))
    names = (path.with_stem(f'{path.stem}_{number}') for number in itertools.count(1))
    backup = next(name for name in names if not name.exists())
    os.replace(path, backup)
    print0(f'{path.name} {reason}: it is now {backup}')
