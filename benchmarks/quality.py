"""How good the colors are: trains, then measures what predict.py makes of photos never seen.

    python benchmarks/quality.py TRAIN TEST --epochs 4
    python benchmarks/quality.py TRAIN TEST --seeds 0 1 2 --variants '' '--lr 2e-3' --epochs 4
    python benchmarks/quality.py TRAIN TEST --against EARLIER --seeds 0 1 2 --epochs 4

TRAIN and TEST are folders of photos, EARLIER is another checkout of this project. All versions
train in turns, with a process of one thread each. Flags that are not this program's own go to
colorize.py, those of --variants to one version each. All that differs between two seeds is noise:
compare means.

Printed are, at the photos' full size, of each network and of the mean of all seeds' colors
("together"), the gain over the gray copy in dB with the share of the truth's colorfulness, and the
gain at 90 % of it, interpolated between values of --saturation: nan where none of them leads there.
"""

import os
import resource
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))

import torch  # noqa: E402
from torch.nn import ModuleList  # noqa: E402

from predict import colorize, load_network  # noqa: E402
from utils import cli  # noqa: E402
from utils.color import colorfulness, is_gray, psnr  # noqa: E402
from utils.photos import list_photos, load_photo, to_pixels  # noqa: E402

SATURATIONS = 0.9, 1, 1.1, 1.2, 1.35, 1.5  # lively networks are turned down
COLORFUL = 90  # % of the truth's colorfulness at which results are compared
HEADER = '| version | seed | gain in dB | % of colorfulness | gain at 90 % | seconds of a core |'
FORMATS = '+.2f', '.1f', '+.2f', '.0f'  # of the four numbers in a row


def load_photos(root):
    """Return the photos below a folder that have color, as PIL images."""
    photos = [load_photo(os.path.join(root, name)) for name in list_photos(root)]
    return [photo for photo in photos if not is_gray(to_pixels(photo))]


def to_tensor(photo):
    """Return a PIL image as float (1, 3, H, W) in [0, 1]."""
    return to_pixels(photo).permute(2, 0, 1)[None].float() / 255


def score(results, photos):
    """Return the PSNR of PIL images in dB, over all pixels, and their mean colorfulness."""
    error = pixels = 0
    colorful = []
    for result, photo in zip(results, photos, strict=True):
        difference = to_tensor(result) - to_tensor(photo)
        error += difference.square().sum().item()
        pixels += difference.numel()
        colorful.append(colorfulness(to_tensor(result)).item())
    return psnr(error / pixels), mean(colorful)


def measure(net, photos):
    """Return of a network: gain in dB, % of the truth's colorfulness, gain at COLORFUL."""
    points = []
    gray, _ = score([photo.convert('L').convert('RGB') for photo in photos], photos)
    _, truth = score(photos, photos)
    for saturation in SATURATIONS:
        result, colorful = score(
            [colorize(net, photo, saturation=saturation) for photo in photos], photos
        )
        points.append((result - gray, 100 * colorful / truth))
        if saturation >= 1 and colorful > truth * COLORFUL / 100:
            break
    return *points[SATURATIONS.index(1)], interpolate(points)


def interpolate(points):
    """Return the gain at COLORFUL on the line through points (gain, %); NaN beyond them."""
    for (gain, percent), (next_gain, next_percent) in zip(points, points[1:], strict=False):
        if percent <= COLORFUL <= next_percent:
            share = (COLORFUL - percent) / (next_percent - percent)
            return gain + share * (next_gain - gain)
    return float('nan')


def train(checkout, photos, flags, home):
    """Train by a checkout's colorize.py; return the network and the seconds of processor."""
    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])  # user's and system's
    command = [sys.executable, checkout / 'colorize.py', '--data_path', photos, *flags]
    environment = os.environ | dict(OMP_NUM_THREADS='1')
    subprocess.run(command, cwd=home, env=environment, stdout=subprocess.DEVNULL, check=True)
    after = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    return load_network(Path(home, 'unet.pth')), after - before


def print_row(name, seed, rows):
    """Print the means of a version's rows, and the standard deviations if there are several."""
    cells = [name, str(seed)]
    # torch's means and deviations, because those of Python's statistics fail on a nan
    for form, column in zip(FORMATS, torch.tensor(rows).T, strict=True):
        cell = f'{column.mean().item():{form}}'
        if len(rows) > 1:
            cell += f' ± {column.std().item():{form.strip("+")}}'
        cells.append(cell)
    print('|', ' | '.join(cells), '|', flush=True)


def main():
    parser = cli.ArgumentParser('quality.py', __doc__)
    add = parser.add_argument
    add('train', help='a folder of photos to train on')
    add('test', help='a folder of photos to measure on')
    add('--against', type=Path, help='another checkout, measured in turns with this one')
    add('--seeds', type=cli.nonnegative_int, nargs='+', default=[0], help='of colorize.py')
    add('--variants', nargs='+', default=[''], help='flags of colorize.py, in quotes, of each')
    args, flags = parser.parse_known_args()
    torch.set_num_threads(1)
    photos = load_photos(args.test)
    checkouts = dict(here=HERE) | (dict(earlier=args.against.absolute()) if args.against else {})
    rows = {(name, variant): [] for variant in args.variants for name in checkouts}
    networks = {version: ModuleList() for version in rows}
    print(HEADER, '|---|---|---|---|---|---|', sep='\n')
    for seed in args.seeds:
        for (name, variant), measured in rows.items():
            words = ['--val_fraction', '0', '--seed', str(seed), *flags, *shlex.split(variant)]
            with tempfile.TemporaryDirectory() as home:
                train_path = os.path.abspath(args.train)
                net, seconds = train(checkouts[name], train_path, words, home)
            networks[name, variant].append(net)
            measured.append((*measure(net, photos), seconds))
            print_row(f'{name} {variant}'.strip(), seed, measured[-1:])
    if len(args.seeds) > 1:
        for (name, variant), measured in rows.items():
            print_row(f'{name} {variant}'.strip(), 'all', measured)
            seconds = sum(row[-1] for row in measured)
            together = *measure(networks[name, variant], photos), seconds
            print_row(f'{name} {variant}'.strip(), 'together', [together])
    return 0


if __name__ == '__main__':
    sys.exit(main())
