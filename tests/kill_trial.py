"""Stops a training again and again, at any moment, and looks for what is lost: nothing.

    python tests/kill_trial.py                              # about a quarter of an hour
    python tests/kill_trial.py --kills 10 --requests 4 --seed 1

`--kills` counts SIGKILL, `--requests` SIGTERM, SIGINT and SIGHUP. Each time the same command goes
on with the run, until it ends by itself: with the weights and curves of one that nothing stopped.
"""

import logging
import random
import re
import signal
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from helpers import (  # noqa: E402
    CHECKPOINT,
    EPOCHS,
    STEPS,
    WEIGHTS,
    Training,
    differences,
    steps_in,
    unloadable,
)

from demo_landscapes import draw_landscapes  # noqa: E402
from utils.cli import ArgumentParser  # noqa: E402


def is_running(training):
    return 'logging in' in training.text


def has_finished_an_epoch(training):
    return re.search(rf' \d/{EPOCHS} +0\.', training.text)


def is_saving(name, training):
    for path in training.folder.glob(f'{name}.*.tmp'):
        with suppress(FileNotFoundError):
            if path.stat().st_mtime > training.started:
                return True
    return False


class Trial:
    """Runs in folders of their own below `base`, the number of stops, and what was found."""

    def __init__(self, base, seed):
        self.base, self.random = base, random.Random(seed)
        self.photos, self.reference = base / 'photos', base / 'uninterrupted'
        self.stops, self.found, self.runs = 0, [], 0
        assert draw_landscapes(self.photos, per_kind=8) == 56
        self.reference.mkdir()
        training = Training(self.reference, self.photos)
        training.wait_for(partial(is_running, training))
        self.starting = time.time() - training.started
        assert training.end() == 0, training.text
        self.running = time.time() - training.started - self.starting
        self.steps = training.steps.stat().st_size
        assert steps_in(training.folder / CHECKPOINT) == (self.steps, self.steps)

    def run(self, stop, wanted, *, exact):
        """One run, stopped by `stop` until it ends by itself; `exact`: no step made twice."""
        self.runs += 1
        folder = self.base / f'run_{self.runs}'
        folder.mkdir()
        barren = 0
        while True:
            training = Training(folder, self.photos, '--resume')
            before = steps_in(training.folder / CHECKPOINT)
            stopped = self.stops < wanted and stop(training, barren)
            code = training.end()
            after = steps_in(training.folder / CHECKPOINT)
            barren = 0 if after > before else barren + 1
            self.examine(training, code, before, after)
            if not stopped or code == 0:
                break
        made = training.steps.stat().st_size - self.steps
        found = differences(folder, self.reference)
        found += [f'{made} steps were made twice'] if exact and made else []
        self.found += [f'{folder.name}: {difference}' for difference in found]
        tally = f'{self.stops} stops so far, {made} steps repeated'
        print(f'{folder.name}: {tally}, {len(found)} differences', flush=True)

    def examine(self, training, code, before, after):
        """What must hold after each stop: whole files, the right place, no traceback."""
        found = unloadable(training.folder)
        if 'Traceback' in training.text or 'Exception' in training.text:
            found.append(training.text)
        if after[0] != after[1] or after < before:
            found.append(f'steps made, and by the position: {before}, then {after}')
        said = re.search(r'stopped in epoch (\d+) after step (\d+); to go on: ', training.text)
        if said and (int(said[1]) - 1) * STEPS + int(said[2]) != after[1]:
            found.append(f'{said[0]}, but the checkpoint has {after}')
        # before the first epoch and after the last one there is no place to tell
        silent = not re.search(r'epoch \d+:', training.text) or after[1] == self.steps
        asked = code in (129, 130, 143) and (said or silent)
        if code not in (0, -signal.SIGKILL) and not asked:
            found.append(f'exit code {code}: {training.text}')
        self.found += [f'{training.folder.name}: {difference}' for difference in found]

    def kill(self, training, barren):
        """Send SIGKILL at a moment drawn by lot; tell whether the program still ran."""
        moments = {  # what to wait for, a span after it, and how often it is drawn
            (None, self.starting): 10,
            (is_running, self.running * (1 - 2 / EPOCHS)): 50,
            (partial(is_saving, WEIGHTS), 0.02): 6,
            (partial(is_saving, 'unet.pth'), 0.02): 6,
            (partial(is_saving, CHECKPOINT), 0.02): 12,
            (has_finished_an_epoch, 0.1): 16,
        }
        if barren >= 5:  # no luck forever would be a trial without an end
            moments = {(has_finished_an_epoch, 0.1): 1}
        return self.interrupt(training, moments, signal.SIGKILL)

    def ask(self, training, _):
        """Send SIGTERM, SIGINT or SIGHUP, once the program listens."""
        moments = {
            (is_running, self.running): 3,
            (partial(is_saving, 'unet.pth'), 0.02): 1,
            (has_finished_an_epoch, 0.1): 1,
        }
        signum = self.random.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
        return self.interrupt(training, moments, signum)

    def interrupt(self, training, moments, signum):
        (happens, span), *_ = self.random.choices(list(moments), moments.values())
        if happens:
            training.wait_for(partial(happens, training))
        time.sleep(self.random.uniform(0, span))
        training.process.send_signal(signum)  # does nothing once the program has ended
        if training.process.wait(60) == 0:
            return False  # it came when all was done
        self.stops += 1
        return True


def main():
    parser = ArgumentParser('kill_trial.py', __doc__)
    parser.add_argument('--kills', type=int, default=100)
    parser.add_argument('--requests', type=int, default=30)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    logging.getLogger('tensorboard').setLevel('ERROR')  # it remarks on every restart
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as base:
        trial = Trial(Path(base), args.seed)
        while (killed := trial.stops) < args.kills:
            trial.run(trial.kill, args.kills, exact=False)
        while trial.stops < killed + args.requests:
            trial.run(trial.ask, killed + args.requests, exact=True)
    minutes = (time.monotonic() - start) / 60
    print(f'{trial.stops} stops, {len(trial.found)} differences, in {minutes:.1f} minutes')
    for difference in trial.found:
        print(f'\n{difference}')
    return 1 if trial.found else 0


if __name__ == '__main__':
    sys.exit(main())
