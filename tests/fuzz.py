"""Feeds the programs damaged files: no traceback, no crash, no hang, nothing outside their folder.

    python tests/fuzz.py                                     # about a quarter of an hour
    python tests/fuzz.py --photos 20 --weights 20 --seed 1

Each photo, which is trained on and colorized, and each file of weights or checkpoint must be taken
or refused in words, within ten seconds. The seed decides the damage.
"""

import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from helpers import in_a_child  # noqa: E402

import colorize  # noqa: E402
import predict  # noqa: E402
from data_utils import read_photos  # noqa: E402
from demo_landscapes import draw_landscapes  # noqa: E402
from utils.cli import ArgumentParser, UsageError  # noqa: E402
from utils.device import Precision  # noqa: E402

SECONDS = 10  # for each file
CPU = torch.device('cpu')
PHOTOS = {
    'photo.jpg': {},
    'progressive.jpg': dict(progressive=True),
    'photo.png': {},
    'photo.webp': {},
    'photo.tif': dict(compression='tiff_lzw'),
    'raw.tif': {},
    'photo.gif': {},
}
WEIGHTS = 'unet.pth', 'checkpoint.pth'
TAKEN, REFUSED, FAULT = range(3)


def damage(data, rng):
    """Return a copy as a bad disk, a bad line or a copy cut off leaves it, never the same."""
    copy = bytearray(data)
    kind, start = rng.choice(['flips', 'burst', 'truncation', 'hole']), rng.randrange(len(copy))
    if kind == 'flips':
        for bit in rng.sample(range(8 * len(copy)), rng.randint(1, 8)):
            copy[bit // 8] ^= 1 << bit % 8
    elif kind == 'burst':
        for place in range(start, min(len(copy), start + 64)):
            copy[place] ^= rng.randint(1, 255)
    elif kind == 'truncation':
        del copy[start:]
    else:
        del copy[start : start + rng.randint(1, 64)]
    return bytes(copy)


def check_photo(path, folder):
    with contextlib.suppress(UsageError):  # it is left out, and no other is there
        photos = read_photos(path.parent, [path.name], 0, 32, CPU)
        assert photos.pixels.shape == (1, 32, 32, 3) and photos.training == [0]
    return colorize_with(folder / 'unet.pth', path, folder)


def check_weights(path, folder):
    if path.name == 'unet.pth':
        return colorize_with(path, folder / 'photo.png', folder)
    state = new_state()
    try:
        state.load(path)
    except UsageError:
        return REFUSED
    make_a_step(state)
    return TAKEN


def colorize_with(weights, photo, folder):
    output = folder / 'colorized'
    words = [photo, '--output', output, '--size', 32, '--device', 'cpu', '--weights', weights]
    code = predict.main([str(word) for word in words])
    shutil.rmtree(output, ignore_errors=True)
    assert code in (0, 1, 2), code
    return REFUSED if code else TAKEN


def new_state():
    return colorize.new_state(colorize.parse_args([]), ['a.jpg'], CPU, Precision())


def make_a_step(state):
    for weight in state.net.parameters():
        weight.grad = torch.ones_like(weight)
    state.optimizer.step()
    state.progress.step += 1


def watch(check, path, folder):
    """Return the outcome of check(path, folder), in a child process; print it if it is a fault."""
    before = set(os.listdir(folder))
    with tempfile.TemporaryFile('w+') as log:

        def child():
            signal.alarm(SECONDS)  # ends it
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                try:
                    return check(path, folder)
                except BaseException:
                    traceback.print_exc()
                    return FAULT
                finally:
                    log.flush()

        code = in_a_child(child)
        log.seek(0)
        text = log.read()
    left = set(os.listdir(folder)) - before
    if code in (TAKEN, REFUSED) and 'Traceback' not in text and not left:
        return code
    print(f'{path.name}: exit code {code}, left {sorted(left)}: {text}', flush=True)
    return FAULT


def prepare(folder):
    draw_landscapes(folder / 'drawings', per_kind=1)
    with predict.Image.open(folder / 'drawings/city/city_001.jpg') as photo:
        for name, options in PHOTOS.items():
            photo.resize((48, 40)).save(folder / name, **options)
    state = new_state()
    make_a_step(state)
    state.save(folder / 'checkpoint.pth')
    torch.save(state.net.state_dict(), folder / 'unet.pth')
    (folder / 'damaged').mkdir()


def try_files(kind, names, check, number, seed, folder):
    counts = Counter()
    for item in range(number):
        rng = random.Random(f'{seed} {kind} {item}')
        name = rng.choice(sorted(names))
        path = folder / 'damaged' / name
        path.write_bytes(damage((folder / name).read_bytes(), rng))
        counts[watch(check, path, folder)] += 1
    tally = f'{counts[TAKEN]} taken, {counts[REFUSED]} refused, {counts[FAULT]} faults'
    print(f'{number:5} damaged {kind}: {tally}', flush=True)
    return counts[FAULT]


def main():
    parser = ArgumentParser('fuzz.py', __doc__)
    for name, number in dict(photos=2000, weights=500, seed=0).items():
        parser.add_argument(f'--{name}', type=int, default=number)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a forked child has no other thread of its parent
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare(folder)
        os.chdir(folder)
        trial = partial(try_files, seed=args.seed, folder=folder)
        faults = trial('photos', PHOTOS, check_photo, args.photos)
        faults += trial('weights', WEIGHTS, check_weights, args.weights)
    print(f'{faults} faults, in {(time.monotonic() - began) / 60:.1f} minutes')
    return 1 if faults else 0


if __name__ == '__main__':
    sys.exit(main())
