"""Train each variant of a table over several seeds, and compare the colors that predict.py gives.

    python benchmarks/quality.py --data_path TRAIN --val_path TEST
    python benchmarks/quality.py --data_path TRAIN --val_path TEST --variants default,plain
    python benchmarks/quality.py --val_path TEST --weights unet.pth --saturations 1,1.2,1.4

Each variant of VARIANTS, below, is a set of colorize.py's flags: add your own. colorize.py trains
on all of TRAIN, in a process and a temporary folder of its own; seconds are those of that whole
process. Then predict.colorize colorizes the photos of TEST at their full size, once for each
saturation. Use photos that the network is not trained on; gray ones are left out.

PSNR in dB is computed from the mean squared error over all pixels of all photos, gain is the PSNR
above that of the gray copies, and colorfulness (Hasler and Süsstrunk) is the mean over the photos,
also in percent of that of the true photos. A number ± another is the mean over the seeds and their
standard deviation: differences within it are chance.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torchvision.transforms.functional import pil_to_tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data_utils import list_photos, load_photo  # noqa: E402
from predict import colorize  # noqa: E402
from unet import UNet  # noqa: E402
from utils import cli  # noqa: E402
from utils.checkpoint import load_weights  # noqa: E402
from utils.cli import UsageError  # noqa: E402
from utils.color import colorfulness, is_gray, psnr  # noqa: E402

VARIANTS = {  # name: flags of colorize.py; they win over --epochs and --seeds
    'default': '',
    'plain': '--colorfulness_weight 0',
    'vivid': '--colorfulness_weight 0.06',
    'lr 2e-3': '--lr 2e-3',
    'full size': '--small_steps 0',
    'batch 8': '--batch_size 8',
    '32 px': '--image_size 32',
    '96 px': '--image_size 96',
}
COLUMNS = 'PSNR', 'gain', 'colorfulness', '% of truth', 'seconds'


# ---------------------------------------------------------------------------- arguments


def list_of(kind):
    """Return an argparse type: a comma-separated list of what the type `kind` takes."""
    return lambda text: [kind(part.strip()) for part in text.split(',')]


def variant(name):
    if name not in VARIANTS:
        known = ', '.join(VARIANTS)
        raise argparse.ArgumentTypeError(f'{name!r} is no variant; there are: {known}')
    return name


def parse_args(argv=None):
    parser = cli.ArgumentParser(prog='quality.py', description=__doc__)
    add = parser.add_argument
    add('--data_path', help='the folder of photos to train on')
    add('--val_path', required=True, help='the folder of photos to test on')
    add('--variants', type=list_of(variant), default=','.join(VARIANTS), help='which to train')
    seeds = 'each variant is trained once with each of them'
    add('--seeds', type=list_of(cli.nonnegative_int), default='0,1,2', help=seeds)
    add('--epochs', type=cli.positive_int, default=4, help='of each training')
    saturations = 'as in predict.py: a row of the table for each'
    add('--saturations', type=list_of(cli.factor), default='1', help=saturations)
    add('--weights', help='a file: test these weights, and train nothing')
    args = parser.parse_args(argv)
    if not args.weights and not args.data_path:
        parser.error('give --data_path, photos to train on, or --weights, to test without training')
    return args


# ---------------------------------------------------------------------------- test


def tensor(photo):
    return pil_to_tensor(photo)[None] / 255


def load_test_photos(root):
    """Return the color photos below `root` as PIL images. Raises UsageError if there are none."""
    photos = []
    for name in list_photos(root):
        try:
            photo = load_photo(os.path.join(root, name))
        except OSError as error:
            print(f'skipped {name!r}: {error}', file=sys.stderr)
            continue
        if not is_gray(pil_to_tensor(photo).permute(1, 2, 0)):
            photos.append(photo)
    if not photos:
        raise UsageError(f'no color photo in {root} can be read; name another --val_path')
    return photos


def measure(photos, results):
    """Return (PSNR in dB over all pixels, mean colorfulness) of `results`, given the true photos.

    Both are iterables of PIL images.
    """
    errors, pixels, colorfulnesses = 0.0, 0, []
    for photo, result in zip(photos, results, strict=True):
        y = tensor(result)
        errors += (y - tensor(photo)).square().sum(dtype=torch.float64).item()
        pixels += y.numel()
        colorfulnesses.append(colorfulness(y).item())
    return psnr(errors / pixels), mean(colorfulnesses)


class TestSet:
    """The test photos, the PSNR of their gray copies, and their mean colorfulness."""

    def __init__(self, root):
        self.photos = load_test_photos(root)
        copies = (photo.convert('L').convert('RGB') for photo in self.photos)
        self.gray_psnr, _ = measure(self.photos, copies)
        _, self.colorfulness = measure(self.photos, self.photos)

    def test(self, net, saturation):
        """Return the first four of COLUMNS for what predict.py makes of the photos with `net`."""
        results = (colorize(net, photo, saturation=saturation) for photo in self.photos)
        result_psnr, color = measure(self.photos, results)
        return result_psnr, result_psnr - self.gray_psnr, color, 100 * color / self.colorfulness


# ---------------------------------------------------------------------------- train


def train(args, name, seed, folder):
    """Train the variant in `folder`, and return its network and the seconds that it took.

    Raises RuntimeError if colorize.py fails, which has printed why.
    """
    start = time.perf_counter()
    flags = f'--val_fraction 0 --epochs {args.epochs} --seed {seed} {VARIANTS[name]}'.split()
    flags += ['--data_path', os.path.abspath(args.data_path)]
    command = [sys.executable, ROOT / 'colorize.py', *flags]
    code = subprocess.call(command, cwd=folder, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    if code:
        raise RuntimeError(f'the variant {name!r}: colorize.py ended with exit code {code}')
    return load_weights(UNet(), os.path.join(folder, 'unet.pth')), seconds


def train_and_test(args, test_set):
    """Return a dict from (variant, saturation) to its rows, one for each seed."""
    rows = {}
    runs = [(name, seed) for name in args.variants for seed in args.seeds]
    for name, seed in tqdm(runs, 'training', unit=' runs', disable=None):
        with tempfile.TemporaryDirectory() as folder:
            net, seconds = train(args, name, seed, folder)
        for saturation in args.saturations:
            row = *test_set.test(net, saturation), seconds
            rows.setdefault((name, saturation), []).append(row)
            values = zip(COLUMNS, row, strict=True)
            line = ', '.join(f'{column} {value:.2f}' for column, value in values)
            tqdm.write(f'{name}, seed {seed}, saturation {saturation:g}: {line}', file=sys.stderr)
    return rows


# ---------------------------------------------------------------------------- the table


def print_row(*cells):
    print('| ' + ' | '.join(cells) + ' |')


def print_table(rows):
    """Print mean and standard deviation of each (variant, saturation) as a Markdown table."""
    columns = COLUMNS[: len(next(iter(rows.values()))[0])]
    print_row('variant', 'saturation', 'seeds', *columns)
    print_row(*['---'] * (3 + len(columns)))
    for (name, saturation), values in rows.items():
        cells = []
        for column in zip(*values, strict=True):
            spread = f' ± {stdev(column):.2f}' if len(column) > 1 else ''
            cells.append(f'{mean(column):.2f}{spread}')
        print_row(name, f'{saturation:g}', str(len(values)), *cells)


def run(args):
    if not args.weights:
        list_photos(args.data_path)  # refuses a wrong folder before anything is read or trained
    test_set = TestSet(args.val_path)
    print(
        f'{len(test_set.photos)} color photos: gray copy {test_set.gray_psnr:.2f} dB, '
        f'colorfulness of the truth {test_set.colorfulness:.2f}',
        flush=True,
    )
    if args.weights:
        net = load_weights(UNet(), args.weights)
        rows = {(args.weights, s): [test_set.test(net, s)] for s in args.saturations}
        print_table(rows)
    else:
        print_table(train_and_test(args, test_set))


def main():
    try:
        run(parse_args())
        return 0
    except (UsageError, RuntimeError) as error:
        print(f'quality.py: {error}', file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print('quality.py: stopped; each finished run is printed above', file=sys.stderr)
        return 130


if __name__ == '__main__':
    sys.exit(main())
