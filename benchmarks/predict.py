"""The speed of predict.py on a folder of photos, against an earlier version in another folder.

    python benchmarks/predict.py --data_path PHOTOS --weights unet.pth --against ../earlier

The two take turns. For each, the medians of the rounds: photos/s of the colorizing, seconds of the
whole call, seconds of processor time, peak memory. Then how far apart their results are, in gray
levels: of luminance and of chroma.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))

from PIL import Image, ImageChops  # noqa: E402

from utils.photos import list_photos  # noqa: E402


def colorize(home, args, output):
    """Return (photos/s, seconds, seconds of processor time, peak memory in GB) of one call."""
    words = [sys.executable, home / 'predict.py', args.data_path, '--output', output]
    words += ['--weights', args.weights, '--size', str(args.size)]
    log = Path(f'{output}.log')
    began = time.perf_counter()
    with open(log, 'w') as file:
        child = subprocess.Popen(words, stdout=file)
        _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f'{home}/predict.py failed')
    speed = float(re.search(r'\(([\d.]+) photos/s\)', log.read_text())[1])
    return speed, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def compare(old, new):
    """Print the differences between the results in two folders."""
    luminance, chroma, far, pixels = 0, 0, 0, 0
    for name in list_photos(old):
        planes = [Image.open(folder / name).convert('YCbCr').split() for folder in (old, new)]
        y, *colors = (ImageChops.difference(*pair) for pair in zip(*planes, strict=True))
        luminance = max(luminance, y.getextrema()[1])
        for difference in colors:
            counts = difference.histogram()
            pixels, far = pixels + sum(counts), far + sum(counts[2:])
            chroma = max(chroma, difference.getextrema()[1])
    print(
        f'luminance: at most {luminance} apart; chroma: at most {chroma}, '
        f'{100 * (1 - far / pixels):.3f} % within one level'
    )


def show(name, rows):
    """Print the medians of what colorize returned."""
    speed, seconds, busy, memory = (median(column) for column in zip(*rows, strict=True))
    print(
        f'{name:10} {speed:6.1f} photos/s {seconds:7.1f} s in all {busy:7.1f} s of processors '
        f'{memory:5.2f} GB'
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data_path', required=True)
    parser.add_argument('--weights', default='unet.pth')
    parser.add_argument('--against', type=Path, required=True)
    parser.add_argument('--size', type=int, default=64)
    parser.add_argument('--rounds', type=int, default=3)
    args = parser.parse_args()
    homes = dict(earlier=args.against, this=HERE)
    figures = {name: [] for name in homes}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for name, home in homes.items():
                # a folder for each round: results that exist are skipped
                figures[name].append(colorize(home, args, Path(folder, f'{name}_{number}')))
        for name, rows in figures.items():
            show(name, rows)
        compare(*(Path(folder, f'{name}_0') for name in homes))


if __name__ == '__main__':
    main()
