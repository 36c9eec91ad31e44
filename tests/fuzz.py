"""Feeds the programs damaged files: no traceback, no crash, no hang, nothing outside their folder.

    python tests/fuzz.py                                     # about a quarter of an hour
    python tests/fuzz.py --photos 20 --weights 20 --seed 1

`--photos` are damaged JPEG, PNG, WebP, TIFF and GIF files, which are trained on and colorized;
`--weights` are damaged weights and checkpoints. Each of them must be taken or refused in words,
within ten seconds. The seed decides the damage. Damaged downloads are in test_download.py.
"""

import argparse
import contextlib
import io
import os
import random
import select
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

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

from damage import damaged  # noqa: E402

import colorize  # noqa: E402
import predict  # noqa: E402
from data_utils import read_photos  # noqa: E402
from demo_landscapes import draw_landscapes  # noqa: E402
from utils.cli import UsageError  # noqa: E402
from utils.device import Precision  # noqa: E402

SECONDS = 10  # for each file
FORMATS = {
    'jpg': dict(format='JPEG'),
    'progressive.jpg': dict(format='JPEG', progressive=True),
    'png': dict(format='PNG'),
    'webp': dict(format='WEBP'),
    'tif': dict(format='TIFF', compression='tiff_lzw'),
    'raw.tif': dict(format='TIFF'),
    'gif': dict(format='GIF'),
}
TAKEN, REFUSED = 'taken', 'refused'  # all other outcomes are faults


# ---------------------------------------------------------------------------- a child, watched


def watch(check, number):
    """Yield the outcomes of check(0), check(1), …: what it returned, or how its process ended."""
    done = 0
    while done < number:
        for outcome in outcomes_of_a_child(check, range(done, number)):
            done += 1
            yield outcome


def outcomes_of_a_child(check, items):
    """Yield outcomes until the first crash or hang, which is the last of them."""
    ours, its = os.pipe()
    pid = os.fork()
    if not pid:
        with open(its, 'wb', buffering=0) as pipe:
            for item in items:
                pipe.write(repr(check(item)).encode() + b'\n')
        os._exit(0)
    os.close(its)
    with open(ours, 'rb', buffering=0) as pipe:
        for _ in items:
            if not select.select([pipe], [], [], SECONDS)[0]:
                os.kill(pid, signal.SIGKILL)
                yield 'a hang'
                break
            line = pipe.readline()
            if not line:
                yield 'a crash'
                break
            yield eval(line)  # repr's of a string
    os.waitpid(pid, 0)


def tell(check, item, folder):
    """Return check(item), or its traceback; what it prints must hold none, nor leave a file."""
    before = sorted(os.listdir(folder))
    log = tempfile.TemporaryFile('w+')
    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            outcome = check(item, folder)
    except BaseException:
        return traceback.format_exc()
    log.seek(0)
    if 'Traceback' in (text := log.read()):
        return text
    left = sorted(set(os.listdir(folder)).difference(before))
    return f'left {left}' if left else outcome


# ---------------------------------------------------------------------------- photos


def check_photo(sources, seed, item, folder):
    """Train on a damaged photo, and colorize it."""
    rng = random.Random(f'{seed} photo {item}')
    name = rng.choice(sorted(sources))
    path = folder / 'photos' / f'photo.{name}'
    path.write_bytes(damaged(sources[name], rng))
    try:
        with contextlib.suppress(UsageError):  # it is left out, and no other is there
            photos = read_photos(path.parent, [path.name], 0, 32, torch.device('cpu'))
            assert photos.pixels.shape == (1, 32, 32, 3) and photos.training == [0]
        return colorize_with(folder / 'unet.pth', path, folder)
    finally:
        path.unlink()


def encode_photos(photo):
    """Return the photo's bytes in each format, by the end of the name."""
    sources = {}
    for name, options in FORMATS.items():
        content = io.BytesIO()
        photo.save(content, **options)
        sources[name] = content.getvalue()
    return sources


# ---------------------------------------------------------------------------- weights


def check_weights(sources, seed, item, folder):
    """Colorize with damaged weights, or train on from a damaged checkpoint."""
    rng = random.Random(f'{seed} weights {item}')
    name = rng.choice(sorted(sources))
    path = folder / 'photos' / name
    path.write_bytes(damaged(sources[name], rng))
    try:
        if name == 'unet.pth':
            return colorize_with(path, folder / 'drawing.png', folder)
        return resume(path)
    finally:
        path.unlink()


def colorize_with(weights, photo, folder):
    """Colorize a photo with the weights."""
    output = folder / 'colorized'
    words = [photo, '--output', output, '--size', 32, '--device', 'cpu', '--weights', weights]
    try:
        code = predict.main([str(word) for word in words])
        assert code in (0, 1, 2), code
        return REFUSED if code else TAKEN
    finally:
        shutil.rmtree(output, ignore_errors=True)


def resume(path):
    """Make a step from the checkpoint at `path`."""
    state = new_state()
    try:
        state.load(path)
    except UsageError:
        return REFUSED
    make_a_step(state)
    return TAKEN


def new_state():
    args, cpu = colorize.parse_args([]), torch.device('cpu')
    return colorize.new_state(args, ['a.jpg'], cpu, Precision())


def make_a_step(state):
    for weight in state.net.parameters():
        weight.grad = torch.ones_like(weight)
    state.optimizer.step()
    state.progress.step += 1


# ---------------------------------------------------------------------------- the trial


def prepare(folder):
    """Write what is not damaged; return the photos and the weights, as bytes."""
    draw_landscapes(folder / 'drawings', per_kind=1)
    names = sorted((folder / 'drawings').rglob('*.jpg'))
    with predict.Image.open(names[0]) as photo:
        small = photo.resize((48, 40))
    small.save(folder / 'drawing.png')
    (folder / 'photos').mkdir()
    state = new_state()
    make_a_step(state)
    state.save(folder / 'checkpoint.pth')
    torch.save(state.net.state_dict(), folder / 'unet.pth')
    weights = {name: (folder / name).read_bytes() for name in ('unet.pth', 'checkpoint.pth')}
    return encode_photos(small), weights


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, number in dict(photos=2000, weights=500, seed=0).items():
        parser.add_argument(f'--{name}', type=int, default=number)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a forked child has no other thread of its parent
    began, faults = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        photos, weights = prepare(folder)
        checks = dict(
            photos=partial(check_photo, photos),
            weights=partial(check_weights, weights),
        )
        os.chdir(folder)
        for name, check in checks.items():
            counts = Counter()
            check = partial(tell, partial(check, args.seed), folder=folder)
            for item, outcome in enumerate(watch(check, getattr(args, name))):
                if outcome not in (TAKEN, REFUSED):
                    print(f'{name} {item}: {outcome}', flush=True)
                    outcome = 'fault'
                counts[outcome] += 1
            print(
                f'{counts.total():5} damaged {name}: {counts[TAKEN]} taken, {counts[REFUSED]} '
                f'refused, {counts["fault"]} faults',
                flush=True,
            )
            faults += counts['fault']
    print(f'{faults} faults, in {(time.monotonic() - began) / 60:.1f} minutes')
    return 1 if faults else 0


if __name__ == '__main__':
    sys.exit(main())
