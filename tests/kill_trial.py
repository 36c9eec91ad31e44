"""Stops a training again and again, at any moment, and looks for what is lost: nothing.

    python tests/kill_test.py                              # about a quarter of an hour
    python tests/kill_test.py --kills 10 --requests 4 --seed 1

`--kills` counts SIGKILL, `--requests` SIGTERM, SIGINT and SIGHUP. Each time the same command goes
on with the run, until it ends by itself: with the weights and curves of one that nothing stopped.
"""
import argparse
import logging
import os
import pty
import random
import re
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from demo_landscapes import draw_landscapes  # noqa: E402
from unet import UNet  # noqa: E402

EPOCHS, STEPS = 4, 3  # steps of an epoch: of the 56 drawings 43 are to train on
FLAGS = ['--image_size', '32', '--batch_size', '16', '--epochs', f'{EPOCHS}',
         '--val_fraction', '0.25', '--device', 'cpu', '--num_workers', '1', '--resume']
# colorize.py as it is, but every step that its optimizer makes leaves a byte in a file
COUNTED = '''
import runpy, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
steps, *sys.argv = sys.argv[1:]
steps = open(steps, 'ab', buffering=0)
register_optimizer_step_post_hook(lambda *_: steps.write(b'.'))
runpy.run_path(sys.argv[0], run_name='__main__')
'''
# a shell's '&' has Ctrl-C ignored, and what is started here would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)


# ---------------------------------------------------------------------------- one start

class Training:
    """colorize.py, started in `folder` on a terminal and in a process group of its own."""

    def __init__(self, folder, photos, *flags):
        self.folder, self.terminal, self.started = folder, b'', time.time()
        self.log = folder / 'runs/UNet'
        self.steps = folder.with_name(f'{folder.name}.steps')
        ours, its = pty.openpty()
        termios.tcsetwinsize(its, (25, 100))
        self.process = subprocess.Popen(
            [sys.executable, '-c', COUNTED, self.steps, ROOT / 'colorize.py',
             '--data_path', photos, *FLAGS, *flags],
            cwd=folder, stdin=its, stdout=its, stderr=its, start_new_session=True,
            # small networks only wait for each other's threads
            env=dict(OMP_NUM_THREADS='1') | os.environ | dict(PYTHONPATH=str(ROOT)))
        os.close(its)
        self.reader = threading.Thread(target=self.read, args=[ours], daemon=True)
        self.reader.start()

    def read(self, terminal):
        with open(terminal, 'rb', buffering=0) as shown:
            try:
                while data := shown.read(65536):
                    self.terminal += data
            except OSError:  # nobody holds the other end any more
                pass

    @property
    def text(self):
        return self.terminal.decode(errors='replace')  # the end may be half a character

    def wait_for(self, happened, seconds=120):
        """Until `happened()`, or the program's end; whether the program still runs."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and not happened():
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL, group=True)
                raise TimeoutError(self.text)
            time.sleep(0.0005)
        return self.process.poll() is None

    def signal(self, number, group=False):
        """To the program alone, or as Ctrl-C and systemd do it: to its workers too."""
        (os.killpg if group else os.kill)(self.process.pid, number)

    def end(self, seconds=60):
        """Waits for the end; returns the exit code, negative where a signal was the end."""
        code = self.process.wait(seconds)
        # workers left alone notice it within five seconds, and hold the terminal until then
        self.reader.join(30)
        assert not self.reader.is_alive(), 'a worker outlived the program'
        return code

    def written(self, name, *, since=0.0):
        path = self.folder / name
        try:
            return path.stat().st_mtime > max(since, self.started)
        except FileNotFoundError:
            return False

    def stage(self):
        """What it was doing at its end, from what it had shown and written."""
        shown = self.text.rpartition('\r')[2]
        if 'logging in' not in self.text:
            return 'starting'
        if 'the weights are in' in self.text or 'this run is finished' in self.text:
            return 'finishing'
        for name in 'unet.pth.tmp', 'runs/UNet/checkpoint.pth.tmp':
            if self.written(name):
                return f'saving {Path(name).stem}'
        if shown.startswith('epoch'):
            return 'training'
        if not list(self.log.glob(f'events.*.{self.process.pid}.*')):
            return 'decoding'
        if ' steps' not in self.text:
            return 'logging the graph'
        if re.search(r'photos/s\s*$', self.text):
            return 'between epochs'
        checkpoint = self.log / 'checkpoint.pth'
        if self.written('unet.pth', since=checkpoint.stat().st_mtime if checkpoint.exists() else 0):
            return 'logging the epoch'
        return 'validating'


# ---------------------------------------------------------------------------- when to stop it

def while_starting(training, delay, seconds):
    time.sleep(delay * seconds)
    return training.process.poll() is None


def at_any_moment(training, delay, seconds):
    """From the first line on."""
    alive = training.wait_for(lambda: 'logging in' in training.text)
    time.sleep(delay * seconds)
    return alive and training.process.poll() is None


def while_saving(training, delay, name, seconds=0.02):
    alive = training.wait_for(lambda: training.written(f'{name}.tmp'))
    time.sleep(delay * seconds)
    return alive and training.process.poll() is None


def after_an_epoch(training, delay, seconds=0.1):
    alive = training.wait_for(lambda: re.search(r'epoch \d+/\d+  training', training.text))
    time.sleep(delay * seconds)
    return alive and training.process.poll() is None


# ---------------------------------------------------------------------------- what must hold

def page(folder):
    """The curves as TensorBoard shows them: {tag: [(step, value)]}; of images only the steps."""
    events = EventAccumulator(str(folder / 'runs/UNet'), size_guidance=dict(scalars=0, images=0))
    events.Reload()
    curves = {tag: [(event.step, event.value) for event in events.Scalars(tag)]
              for tag in events.Tags()['scalars'] if tag != 'photos per second'}
    return curves | {tag: [event.step for event in events.Images(tag)]
                     for tag in events.Tags()['images']}


def unloadable(folder):
    """Names of the weights and checkpoints in `folder` that are not whole, with the reason."""
    bad = []
    for path in folder.rglob('*.pth'):
        try:
            state = torch.load(path, map_location='cpu', weights_only=True)
            UNet().load_state_dict(state['net'] if path.name == 'checkpoint.pth' else state)
        except Exception as error:  # whatever it is, it is what this trial looks for
            bad.append(f'{path.relative_to(folder)}: {error!r}')
    return bad


def differences(folder, reference):
    """How a run that was stopped differs from one that was not: a list, to be empty."""
    found = unloadable(folder)
    if (folder / 'unet.pth').read_bytes() != (reference / 'unet.pth').read_bytes():
        found.append('unet.pth differs')
    ended, expected = (torch.load(run / 'runs/UNet/checkpoint.pth', weights_only=True)
                       for run in (folder, reference))
    if ended['progress'] != expected['progress']:
        found.append(f'the checkpoint has {ended["progress"]}, not {expected["progress"]}')
    for part in 'net', 'optimizer':
        if not same(ended[part], expected[part]):
            found.append(f"the checkpoint's {part} differs")
    curves, drawn = page(reference), page(folder)
    found += [f'{tag}: {drawn.get(tag)}, not {curves.get(tag)}'
              for tag in sorted(curves.keys() | drawn.keys()) if drawn.get(tag) != curves.get(tag)]
    return found + [f'{path.name} was left' for path in (*folder.rglob('*.tmp'),
                                                         *folder.glob('unet_*.pth'))]


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def steps_in(checkpoint):
    """The optimizer's own count, and the one that the position says; 0 where there is none."""
    if not checkpoint.exists():
        return 0, 0
    state = torch.load(checkpoint, weights_only=True)
    steps = {int(weight['step']) for weight in state['optimizer']['state'].values()}
    place = state['progress']['epoch'] * STEPS + state['progress']['step']
    assert len(steps) <= 1, steps
    return max(steps, default=0), place


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
        assert steps_in(training.log / 'checkpoint.pth') == (self.steps, self.steps)

    def run(self, stop, wanted, *, exact):
        """One run, stopped by `stop` until it ends by itself; `exact`: no step made twice."""
        self.runs += 1
        folder = self.base / f'run_{self.runs}'
        folder.mkdir()
        flags = ['--stream'] if self.runs % 3 == 0 else []
        barren = 0
        while True:
            training = Training(folder, self.photos, *flags)
            before = steps_in(training.log / 'checkpoint.pth')
            stopped = sum(self.signals.values()) < wanted and stop(training, barren)
            code = training.end()
            after = steps_in(training.log / 'checkpoint.pth')
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
        print(f'{folder.name} {" ".join(flags):8}  {sum(self.signals.values()):3} times stopped  '
              f'{made - self.steps:2} steps repeated  {len(found)} differences', flush=True)

    def examine(self, training, code, before, after):
        """What must hold after each stop: whole files, the right place, no traceback."""
        found = unloadable(training.folder)
        if 'Traceback' in training.text or 'Exception' in training.text:
            found.append(training.text)
        if after[0] != after[1] or after < before:
            found.append(f'steps made, and by the position: {before}, then {after}')
        said = re.search(r'stopped in epoch (\d+) after step (\d+); to go on: python .* --resume',
                         training.text)
        if said and (int(said[1]) - 1) * STEPS + int(said[2]) != after[1]:
            found.append(f'{said[0]}, but the checkpoint has {after}')
        # while decoding there is no place to tell; at the very end the interpreter is deaf
        if (code not in (0, -signal.SIGKILL) and training.stage() != 'finishing'
                and not (code in (129, 130, 143) and (said or training.stage() == 'decoding'))):
            found.append(f'exit code {code} while {training.stage()}: {training.text}')
        self.found += [f'{training.folder.name}: {difference}' for difference in found]

    def kill(self, training, barren):
        """SIGKILL, at a moment drawn by lot; whether it came before the program's own end."""
        epoch = self.running / EPOCHS
        moments = {partial(at_any_moment, seconds=self.running - 2 * epoch): 50,
                   partial(while_starting, seconds=self.starting): 10,
                   partial(while_saving, name='unet.pth'): 12,
                   partial(while_saving, name='runs/UNet/checkpoint.pth'): 12,
                   after_an_epoch: 16}
        moment = self.random.choices(list(moments), moments.values())[0]
        # no luck forever would be a test without an end: an epoch must be able to finish
        return self.interrupt(training, moment if barren < 5 else after_an_epoch, signal.SIGKILL)

    def ask(self, training, _):
        """SIGTERM, SIGINT or SIGHUP, once the program listens."""
        moment = self.random.choice([partial(at_any_moment, seconds=self.running)] * 3
                                    + [partial(while_saving, name='unet.pth'), after_an_epoch])
        return self.interrupt(training, moment,
                              self.random.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP]))

    def interrupt(self, training, moment, number):
        alone = self.random.random() < 0.5
        if not moment(training, self.random.random()):
            return False
        stage = training.stage()
        training.signal(number, group=not alone)
        if training.process.wait(60) == 0:
            return False  # it came when all was done
        killed = number == signal.SIGKILL
        self.stages[killed, training.stage() if killed else stage] += 1
        self.signals[number.name + (' to the group' if not alone else '')] += 1
        return True


def report(trial, killed, minutes):
    """The summary, as a table."""
    print(f'\n{"":20}{"SIGKILL":>10}{"asked to stop":>18}')
    for stage in sorted({stage for _, stage in trial.stages}):
        print(f'{stage:20}{trial.stages[True, stage]:10}{trial.stages[False, stage]:18}')
    print(f'{"all":20}{killed:10}{sum(trial.signals.values()) - killed:18}\n')
    print('\n'.join(f'{number:5} {name}' for name, number in sorted(trial.signals.items())))
    print(f'{trial.runs:5} runs of {trial.steps} steps, after one that nothing stopped\n'
          f'{trial.repeated:5} steps repeated, all after SIGKILL\n'
          f'{len(trial.found):5} differences found, in {minutes:.1f} minutes')


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
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
