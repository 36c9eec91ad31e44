"""Stops a training again and again, at any moment, and looks for what is lost: nothing.

    python tests/kill_trial.py                              # about a quarter of an hour
    python tests/kill_trial.py --kills 10 --requests 4 --seed 1

`--kills` counts SIGKILL, `--requests` SIGTERM, SIGINT and SIGHUP. Each time the same command goes
on with the run, until it ends by itself: with the weights and curves of one that nothing stopped.
"""

import argparse
import logging
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from helpers import (  # noqa: E402
    CHECKPOINT,
    EPOCHS,
    ROW,
    STEPS,
    WEIGHTS,
    Training,
    after_an_epoch,
    at_any_moment,
    differences,
    steps_in,
    unloadable,
    while_saving,
)

from demo_landscapes import draw_landscapes  # noqa: E402

# ---------------------------------------------------------------------------- where it was stopped


def stage(training):
    """Return what the training was doing at its end, from what it had shown and written."""
    shown = training.text.rpartition('\r')[2]
    if 'logging in' not in training.text:
        return 'starting'
    if 'Next:' in training.text:
        return 'finishing'
    for name in WEIGHTS, 'unet.pth', CHECKPOINT:
        if training.is_written(f'{name}.*.tmp'):
            return f'saving {name}'
    if shown.startswith('epoch'):
        return 'training'
    if not list(training.log.glob(f'events.*.{training.process.pid}.*')):
        return 'decoding'
    if not re.search(r'epoch \d+:', training.text):
        return 'logging the graph'
    if ROW.fullmatch(training.text.rstrip().rpartition('\n')[2].strip()):
        return 'between epochs'
    checkpoint = training.folder / CHECKPOINT
    saved = checkpoint.stat().st_mtime if checkpoint.exists() else 0
    return 'logging the epoch' if training.is_written('unet.pth', since=saved) else 'validating'


def while_starting(training, delay, seconds):
    time.sleep(delay * seconds)
    return training.process.poll() is None


# ---------------------------------------------------------------------------- the trial


class Trial:
    """Runs in folders of their own below `base`, and the tally of what was seen."""

    def __init__(self, base, seed):
        self.base, self.random = base, random.Random(seed)
        self.photos, self.reference = base / 'photos', base / 'uninterrupted'
        self.stages, self.signals, self.found = Counter(), Counter(), []
        self.runs = self.repeated = 0
        assert draw_landscapes(self.photos, per_kind=8) == 56

    def uninterrupted(self):
        """The run to compare with; measures how long starting takes, and the rest."""
        self.reference.mkdir()
        training = Training(self.reference, self.photos)
        training.wait_for(lambda: 'logging in' in training.text)
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
        flags = ['--resume', '--stream'] if self.runs % 3 == 0 else ['--resume']
        barren = 0
        while True:
            training = Training(folder, self.photos, *flags)
            before = steps_in(training.folder / CHECKPOINT)
            stopped = sum(self.signals.values()) < wanted and stop(training, barren)
            code = training.end()
            after = steps_in(training.folder / CHECKPOINT)
            barren = 0 if after > before else barren + 1
            self.examine(training, code, before, after)
            if not stopped or code == 0:
                break
        made = training.steps.stat().st_size
        self.repeated += made - self.steps
        found = differences(folder, self.reference)
        if exact and made != self.steps:
            found.append(f'{made} steps were made, not {self.steps}')
        self.found += [f'{folder.name}: {difference}' for difference in found]
        print(
            f'{folder.name} {" ".join(flags):17}  {sum(self.signals.values()):3} times stopped  '
            f'{made - self.steps:2} steps repeated  {len(found)} differences',
            flush=True,
        )

    def examine(self, training, code, before, after):
        """What must hold after each stop: whole files, the right place, no traceback."""
        found = unloadable(training.folder)
        if 'Traceback' in training.text or 'Exception' in training.text:
            found.append(training.text)
        if after[0] != after[1] or after < before:
            found.append(f'steps made, and by the position: {before}, then {after}')
        said = re.search(
            r'stopped in epoch (\d+) after step (\d+); to go on: python .* --resume', training.text
        )
        if said and (int(said[1]) - 1) * STEPS + int(said[2]) != after[1]:
            found.append(f'{said[0]}, but the checkpoint has {after}')
        # while decoding there is no place to tell; at the very end the interpreter is deaf
        if (
            code not in (0, -signal.SIGKILL)
            and stage(training) != 'finishing'
            and not (code in (129, 130, 143) and (said or stage(training) == 'decoding'))
        ):
            found.append(f'exit code {code} while {stage(training)}: {training.text}')
        self.found += [f'{training.folder.name}: {difference}' for difference in found]

    def kill(self, training, barren):
        """SIGKILL, at a moment drawn by lot; whether it came before the program's own end."""
        epoch = self.running / EPOCHS
        moments = {
            partial(at_any_moment, seconds=self.running - 2 * epoch): 50,
            partial(while_starting, seconds=self.starting): 10,
            partial(while_saving, name=WEIGHTS): 6,
            partial(while_saving, name='unet.pth'): 6,
            partial(while_saving, name=CHECKPOINT): 12,
            after_an_epoch: 16,
        }
        moment = self.random.choices(list(moments), moments.values())[0]
        # no luck forever would be a test without an end: an epoch must be able to finish
        return self.interrupt(training, moment if barren < 5 else after_an_epoch, signal.SIGKILL)

    def ask(self, training, _):
        """SIGTERM, SIGINT or SIGHUP, once the program listens."""
        moment = self.random.choice(
            [partial(at_any_moment, seconds=self.running)] * 3
            + [partial(while_saving, name='unet.pth'), after_an_epoch]
        )
        return self.interrupt(
            training, moment, self.random.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
        )

    def interrupt(self, training, moment, number):
        alone = self.random.random() < 0.5
        if not moment(training, self.random.random()):
            return False
        before = stage(training)
        training.signal(number, group=not alone)
        if training.process.wait(60) == 0:
            return False  # it came when all was done
        killed = number == signal.SIGKILL
        self.stages[killed, stage(training) if killed else before] += 1
        self.signals[number.name + (' to the group' if not alone else '')] += 1
        return True


def report(trial, killed, minutes):
    """The summary, as a table."""
    print(f'\n{"":28}{"SIGKILL":>10}{"asked to stop":>18}')
    for name in sorted({name for _, name in trial.stages}):
        print(f'{name:28}{trial.stages[True, name]:10}{trial.stages[False, name]:18}')
    print(f'{"all":28}{killed:10}{sum(trial.signals.values()) - killed:18}\n')
    print('\n'.join(f'{number:5} {name}' for name, number in sorted(trial.signals.items())))
    print(
        f'{trial.runs:5} runs of {trial.steps} steps, after one that nothing stopped\n'
        f'{trial.repeated:5} steps repeated, all after SIGKILL\n'
        f'{len(trial.found):5} differences found, in {minutes:.1f} minutes'
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--kills', type=int, default=100)
    parser.add_argument('--requests', type=int, default=30)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    logging.getLogger('tensorboard').setLevel('ERROR')  # it remarks on every restart
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as base:
        trial = Trial(Path(base), args.seed)
        trial.uninterrupted()
        while (killed := sum(trial.signals.values())) < args.kills:
            trial.run(trial.kill, args.kills, exact=False)
        while sum(trial.signals.values()) < killed + args.requests:
            trial.run(trial.ask, killed + args.requests, exact=True)
    report(trial, killed, (time.monotonic() - start) / 60)
    for difference in trial.found:
        print(f'\n{difference}')
    return 1 if trial.found else 0


if __name__ == '__main__':
    sys.exit(main())
