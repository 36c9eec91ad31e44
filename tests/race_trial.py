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
    program = [sys.executable, ROOT / 'colorize.py', *words]
    with open(folder / f'{name}.log', 'ab') as log:
        return subprocess.Popen(program, cwd=folder, stdout=log, stderr=log, env=ENVIRONMENT)


def read(path, ended, found):
    """Load the weights again and again until the event `ended`; note what is wrong with them."""
    is_there = False
    while not ended.wait(0.05):
        try:
            UNet().load_state_dict(load(path))
            is_there = True
        except Exception as error:  # whatever it is, it is what is looked for
            if is_there or not isinstance(error, FileNotFoundError):
                found.append(repr(error))


def disturb(folder, kills, rng, longest):
    """Run both to their end, killing either at random; return the number of kills."""
    running = {name: start(folder, name) for name in RUNS}
    killed = 0
    while running:
        time.sleep(rng.uniform(0.1, longest))
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
            elif killed < kills and rng.random() < 0.7:
                process.kill()
                process.wait()
                killed += 1
                running[name] = start(folder, name)
    return killed


def differences(folder, expected):
    """Return what is not as in the undisturbed runs, whose weights are `expected`."""
    found = [f'{path} was left' for path in (*folder.rglob('*.tmp'), *folder.glob('unet_*'))]
    if (folder / 'unet.pth').read_bytes() not in expected.values():
        found.append("unet.pth is no run's")
    for name in RUNS:
        if (folder / f'runs/{name}/unet.pth').read_bytes() != expected[name]:
            found.append(f'{name} has other weights')
        text = (folder / f'{name}.log').read_text()
        if 'Traceback' in text:
            found.append(text)
    return found


def main():
    parser = ArgumentParser('race_trial.py', __doc__)
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    rng, began = random.Random(args.seed), time.monotonic()
    killed, found, expected = 0, [], {}
    with tempfile.TemporaryDirectory() as base:
        base = Path(base)
        draw_landscapes(base / 'photos', per_kind=2)
        (base / 'alone').mkdir()
        for name in RUNS:
            assert start(base / 'alone', name).wait() == 0
            expected[name] = (base / f'alone/runs/{name}/unet.pth').read_bytes()
        longest = (time.monotonic() - began) / 2  # a little more than a run alone takes
        while killed < args.kills:
            folder = Path(tempfile.mkdtemp(dir=base))
            ended = threading.Event()
            reader = threading.Thread(target=read, args=[folder / 'unet.pth', ended, found])
            reader.start()
            killed += disturb(folder, min(10, args.kills - killed), rng, longest)
            ended.set()
            reader.join()
            found += differences(folder, expected)
            print(f'{killed} kills, {len(found)} faults', flush=True)
    for fault in found:
        print(fault)
    return 1 if found else 0


if __name__ == '__main__':
    sys.exit(main())
