"""How fast it is, each time against something measured beside it, in turns; medians.

    python benchmarks/speed.py training --data_path PHOTOS              # beside a plain script
    python benchmarks/speed.py training --data_path PHOTOS --against EARLIER    # another checkout
    python benchmarks/speed.py steps --image_size 64                    # beside the device's best
    python benchmarks/speed.py start --data_path PHOTOS                 # a whole process, by part

The plain script is benchmarks/reference.py. Every training is a process of its own, whose last
epoch counts: of four or more, colorize.py sees all photos of that one at full size.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

from colorize import Recipe, train_step  # noqa: E402
from unet import UNet  # noqa: E402
from utils import cli  # noqa: E402
from utils.device import (  # noqa: E402
    Precision,
    channels_last,
    choose_device,
    describe_device,
    keep_memory,
)
from utils.muon import Muon  # noqa: E402

MULTIPLY_ADDS = 8.1e9 / 224**2  # of a pixel, forward; three times that with the backward pass
MATRIX = 2048  # rows of the matrices whose product shows a device's best speed
CALLS = 10  # that are timed together


# ---------------------------------------------------------------------------- training


def command(program, args, epochs):
    """Return the words that start a program of training, with this program's flags."""
    words = [sys.executable, program, '--data_path', Path(args.data_path).absolute()]
    words += ['--epochs', epochs, '--image_size', args.image_size, '--batch_size', args.batch_size]
    return [str(word) for word in words]


def output_of(program, args):
    """Return what a program of training prints, run in a folder of its own."""
    with tempfile.TemporaryDirectory() as home:
        words = command(program, args, args.epochs)
        done = subprocess.run(words, cwd=home, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def time_training(checkout, args):
    """Return the photos/s of the last epoch of a checkout's colorize.py."""
    printed = output_of(checkout / 'colorize.py', args)
    rows = re.findall(r'^ +\d+/\d+ .* (\d+\.\d)(?: \*)?$', printed, re.MULTILINE)
    return float(rows[-1])


def time_reference(args):
    """Return the photos/s of the last epoch of the plain script."""
    report = json.loads(output_of(HERE / 'reference.py', args).splitlines()[-1])
    return report['photos'] / report['epochs'][-1]['seconds']


def training(args):
    """Print the photos/s of both, in turns, and their ratio."""
    here, there = [], []
    for _ in range(args.repeat):
        here.append(time_training(HERE.parent, args))
        there.append(
            time_training(args.against.absolute(), args) if args.against else time_reference(args)
        )
    other = args.against or 'the plain script'
    print(f'photos/s, median of {args.repeat}: here {median(here):.1f}, {other} ', end='')
    print(f'{median(there):.1f}: {median(here) / median(there):.2f} times as fast')


# ---------------------------------------------------------------------------- steps


def new_step(args, device):
    """Return a function that takes one step of training on random photos."""
    torch.manual_seed(0)
    net = channels_last(UNet(), device)
    if args.compile:
        net.compile(dynamic=False)
    recipe = Recipe(Precision(args.precision, device), colorfulness_weight=0.025)
    optimizer = Muon(net.parameters(), fused=device.type != 'mps')
    y = torch.rand(args.batch_size, 3, args.image_size, args.image_size, device=device)
    x = y.mean(1, keepdim=True) * 2 - 1
    return lambda: train_step(net, optimizer, x, y, args.batch_size, recipe)


def seconds_of(function, device):
    """Return the seconds that a call takes, after three to warm up: the median of three times."""
    wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    for _ in range(3):
        function()
    times = []
    for _ in range(3):
        wait()
        start = time.perf_counter()
        for _ in range(CALLS):
            function()
        wait()
        times.append((time.perf_counter() - start) / CALLS)
    return median(times)


def floor(args, device):
    """Return the seconds that a step's multiplications take at the device's best speed."""
    dtype = torch.float32
    if Precision(args.precision, device).name != 'fp32':
        dtype = torch.bfloat16 if Precision(args.precision, device).name == 'bf16' else torch.half
    a = torch.rand(MATRIX, MATRIX, device=device, dtype=dtype)
    per_multiply_add = seconds_of(lambda: a @ a, device) / MATRIX**3
    return 3 * MULTIPLY_ADDS * args.batch_size * args.image_size**2 * per_multiply_add


def steps(args):
    """Print the photos/s of steps alone, and how much of the time the multiplications need."""
    device = choose_device('auto')
    seconds, least = seconds_of(new_step(args, device), device), floor(args, device)
    compiled = ', compiled' if args.compile else ''
    print(
        f'{describe_device(device)}, {Precision(args.precision, device).name}{compiled}, '
        f'{args.image_size}×{args.image_size}, batch {args.batch_size}: '
        f'{args.batch_size / seconds:.0f} photos/s, {100 * least / seconds:.0f} % of a matrix '
        "product's speed"
    )


# ---------------------------------------------------------------------------- start


def start(args):
    """Print when, in seconds after its start, a process of one epoch comes to what it does."""
    words = command(HERE.parent / 'colorize.py', args, epochs=1)
    began, marks = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as home:
        process = subprocess.Popen(words, cwd=home, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            marks.append((time.perf_counter() - began, line.strip()))
        if process.wait():
            return process.returncode
    marks.append((time.perf_counter() - began, 'the end'))
    for name, pattern in (
        ('imports, device, photos read', 'logging in'),
        ('page, first epoch, validation, saving', '1/1'),
        ('features, end', 'the end'),
    ):
        seconds = next(seconds for seconds, line in marks if pattern in line)
        print(f'{seconds:6.1f} s  {name}')
    return 0


PARTS = dict(training=training, steps=steps, start=start)


def main():
    parser = cli.ArgumentParser('speed.py', __doc__)
    add = parser.add_argument
    add('part', choices=PARTS)
    add('--data_path', default='data/landscapes', help='a folder of photos')
    add('--against', type=Path, help='another checkout, for training')
    add('--repeat', type=cli.positive_int, default=3, help='trainings of each')
    add('--epochs', type=cli.positive_int, default=4, help='of each training')
    add('--image_size', type=cli.image_size, default=64, help='side of a photo, in pixels')
    add('--batch_size', type=cli.positive_int, default=32, help='photos a step')
    add('--precision', choices='auto fp32 bf16 fp16'.split(), default='auto', help='of steps')
    parser.add_flag('--compile', 'torch.compile the network of steps')
    args = parser.parse_args()
    keep_memory()
    return PARTS[args.part](args)


if __name__ == '__main__':
    sys.exit(main())
