"""Trains two runs of different names in one folder, kills them again and again, and reads on.

    python tests/race_trial.py                      # about a quarter of an hour
    python tests/race_trial.py --kills 10 --seed 1

Each is killed at a random moment and started again with --resume, while a reader loads unet.pth
again and again. It must always load whole, and each run must end with the weights of one that
nothing disturbed.
"""

import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from helpers import ENVIRONMENT, load  # noqa: E402

from demo_landscapes import draw_landscapes  # noqa: E402
from unet import UNet  # noqa: E402
from utils.cli import ArgumentParser  # noqa: E402

FLAGS = '--data_path ../photos --image_size 32 --batch_size 8 --val_fraction 0.25 --device cpu'
RUNS = {'A': '0', 'B': '1'}  # names and seeds


def start(folder, name):
    """Start the run `name` in the folder, or go on with it."""
    words = [*FLAGS.split(), '--epochs', '12', '--seed', RUNS[name], '--name', name, '--resume']
    with open(folder.with_name(f'{folder.name}_{name}.log'), 'ab') as log:
        return subprocess.Popen(
            [sys.executable, ROOT / 'colorize.py', *words],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=ENVIRONMENT,
        )


class Reader(threading.Thread):
    """Load unet.pth again and again; keep what is wrong with it."""

    def __init__(self, path):
        super().__init__(daemon=True)
        self.path, self.ended, self.found, self.reads = path, threading.Event(), [], 0

    def run(self):
        while not self.ended.wait(0.05):
            try:
                UNet().load_state_dict(load(self.path))
                self.reads += 1
            except FileNotFoundError as error:
                if self.reads:
                    self.found.append(repr(error))  # it was there before
            except Exception as error:  # whatever it is, it is what is looked for
                self.found.append(repr(error))


def disturb(folder, kills, rng, longest):
    """Run both to their end, killing either at random; return the number of kills, and faults."""
    running = {name: start(folder, name) for name in RUNS}
    killed, found = 0, []
    while running:
        time.sleep(rng.uniform(0.1, longest))
        for name, process in list(running.items()):
            if process.poll() is None:
                if killed < kills and rng.random() < 0.7:
                    process.kill()
                    process.wait()
                    killed += 1
                    running[name] = start(folder, name)
            else:
                del running[name]
                if process.returncode:
                    found.append(f'{name} ended with {process.returncode}')
    return killed, found


def differences(folder, expected):
    """Return what is not as in the undisturbed runs, whose weights are `expected`."""
    found = [
        f'{name} has other weights'
        for name in RUNS
        if (folder / f'runs/{name}/unet.pth').read_bytes() != expected[name]
    ]
    if (folder / 'unet.pth').read_bytes() not in expected.values():
        found.append("unet.pth is no run's")
    found += [f'{path} was left' for path in folder.rglob('*.tmp')]
    found += [f'{path} came up' for path in folder.glob('unet_*')]
    for name in RUNS:
        text = folder.with_name(f'{folder.name}_{name}.log').read_text()
        found += [f'{name}: {text}'] if 'Traceback' in text else []
    return found


def main():
    parser = ArgumentParser('race_trial.py', __doc__)
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    rng, began = random.Random(args.seed), time.monotonic()
    killed, rounds, reads, found = 0, 0, 0, []
    with tempfile.TemporaryDirectory() as base:
        base = Path(base)
        draw_landscapes(base / 'photos', per_kind=2)
        (base / 'alone').mkdir()
        expected = {}
        for name in RUNS:
            assert start(base / 'alone', name).wait() == 0
            expected[name] = (base / f'alone/runs/{name}/unet.pth').read_bytes()
        longest = (time.monotonic() - began) / 2  # a little more than a run alone takes
        while killed < args.kills:
            rounds += 1
            folder = base / f'round_{rounds}'
            folder.mkdir()
            reader = Reader(folder / 'unet.pth')
            reader.start()
            kills, faults = disturb(folder, min(10, args.kills - killed), rng, longest)
            reader.ended.set()
            reader.join()
            killed, reads = killed + kills, reads + reader.reads
            faults += reader.found + differences(folder, expected)
            found += [f'round {rounds}: {fault}' for fault in faults]
            print(
                f'round {rounds}: {kills} kills, {reader.reads} reads of unet.pth, '
                f'{len(faults)} faults',
                flush=True,
            )
    print(
        f'{killed} kills in {rounds} rounds of two runs, {reads} reads, {len(found)} faults, '
        f'in {(time.monotonic() - began) / 60:.1f} minutes'
    )
    for fault in found:
        print(fault)
    return 1 if found else 0


if __name__ == '__main__':
    sys.exit(main())
