"""Trains two runs of different names in one folder, kills them again and again, and reads on.

    python tests/race_trial.py     # about a quarter of an hour

Each is killed at random moments and started again with --resume. All the time unet.pth must load
whole, and each run must end with the weights of one that nothing disturbed.
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

FLAGS = '--data_path ../photos --image_size 32 --batch_size 8 --val_fraction 0.25 --device cpu'
RUNS = {'A': '0', 'B': '1'}  # names and seeds
FOLDERS, KILLS = 5, 10  # in each


def start(folder, name):
    folder.mkdir(exist_ok=True)
    words = [*FLAGS.split(), '--epochs', '12', '--seed', RUNS[name], '--name', name, '--resume']
    program = [sys.executable, ROOT / 'colorize.py', *words]
    with open(folder / f'{name}.log', 'ab') as log:
        return subprocess.Popen(program, cwd=folder, stdout=log, stderr=log, env=ENVIRONMENT)


def read(path, ended, found):
    is_there = False
    while not ended.wait(0.05):
        try:
            is_there |= path.exists()
            if is_there:
                UNet().load_state_dict(load(path))
        except Exception as error:  # whatever it is, it is what is looked for
            found.append(repr(error))


def disturb(folder, kills, longest):
    ended, found = threading.Event(), []
    reader = threading.Thread(target=read, args=[folder / 'unet.pth', ended, found])
    reader.start()
    running = {name: start(folder, name) for name in RUNS}
    while running:
        time.sleep(random.uniform(0.1, longest))
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
            elif kills and random.random() < 0.7:
                process.kill()
                process.wait()
                running[name], kills = start(folder, name), kills - 1
    ended.set()
    reader.join()
    return found


def main():
    began, found = time.monotonic(), []
    with tempfile.TemporaryDirectory() as base:
        alone, photos = Path(base, 'alone'), Path(base, 'photos')
        draw_landscapes(photos, per_kind=2)
        for name in RUNS:
            assert start(alone, name).wait() == 0
        longest = (time.monotonic() - began) / 2  # a little more than a run alone takes
        weights = {name: (alone / f'runs/{name}/unet.pth').read_bytes() for name in RUNS}
        for number in range(FOLDERS):
            folder = Path(base, f'run_{number}')
            found += disturb(folder, KILLS, longest)
            found += [
                f'{path} is left' for path in [*folder.rglob('*.tmp'), *folder.glob('unet_*')]
            ]
            if (folder / 'unet.pth').read_bytes() not in weights.values():
                found.append("unet.pth is no run's")
            for name in RUNS:
                if (folder / f'runs/{name}/unet.pth').read_bytes() != weights[name]:
                    found.append(f'{name} has other weights')
                if 'Traceback' in (text := (folder / f'{name}.log').read_text()):
                    found.append(text)
            print(f'{KILLS * (number + 1)} kills at most, {len(found)} faults', flush=True)
    print(*found, sep='\n')
    return 1 if found else 0


if __name__ == '__main__':
    sys.exit(main())
