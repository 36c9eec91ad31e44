"""What a run prints: the table of epochs, what it left out, the verdict, and what comes next."""

import contextlib
import shlex
import sys

from utils.device import describe_device
from utils.distributed import print0

HEADER = (
    '         training  validation     PSNR in dB        gain over  vividness,    * = weights\n'
    '  epoch      loss        loss   raw  colorized     gray copy    of truth   photos/s saved'
)
NAMED = 10  # so many gray photos are named on the terminal


def print_epoch(epoch, epochs, metrics, is_saved):
    """Print an epoch's metrics as a row under HEADER; an asterisk marks weights that were saved."""
    row = f'{epoch:>4}/{epochs:<4}{metrics["training loss"]:>8.5f}'
    if 'validation loss' in metrics:
        row += (
            '{validation loss:>12.5f}{PSNR of prediction:>6.2f}{PSNR of colorized:>11.2f}'
            '{Gain over the gray copy (dB):>+11.2f} dB'
            "{vividness (% of the truth's colorfulness):>10.0f} %"
        ).format_map(metrics)
    else:
        row += ' ' * 54
    print0(f'{row}{metrics["photos per second"]:>11.1f}{" *" if is_saved else ""}')


def print_start(device, recipe, data, run_folder, progress):
    """Print machine and photos, sizes of training, where the run begins, and the table's header."""
    if run_folder:
        training = len(data.train_loader.indices)
        validation = len(data.val_loader.indices) if data.val_loader else 0
        print0(
            f'{describe_device(device)}, {recipe.precision.name}: {training} photos to train on, '
            f'{validation} held out; logging in {run_folder.path}'
        )
        size = data.samples[0].shape[-1]
        if recipe.is_small(1, size):
            print0(
                f'the first {100 * recipe.small_steps:g} % of the steps see {size // 2}×'
                f'{size // 2} pixels, the others {size}×{size}, which takes longer'
            )
        if progress.epoch or progress.step:
            print0(f'going on in epoch {progress.epoch + 1} after step {progress.step}')
        print0(HEADER)


def print_skipped(folder, run_folder):
    """Print which photos of a PhotoFolder are left out, and why; on rank 0, list them in a file.

    Gray photos, of which there can be hundreds, may share a line.
    """
    if not run_folder:
        return
    skipped, names, path = folder.skipped, folder.names, run_folder.skipped
    lines = {index: f'{names[index]!r}: {skipped[index]}' for index in sorted(skipped)}
    gray = [index for index in lines if skipped[index] == 'gray']
    for index, line in lines.items():
        if skipped[index] != 'gray' or len(gray) <= NAMED:
            print0(f'skipped {line}', file=sys.stderr)
    if len(gray) > NAMED:
        print0(
            f'skipped {len(gray)} gray photos, which would teach gray; {path} names them',
            file=sys.stderr,
        )
    if lines:
        with contextlib.suppress(OSError):  # whether the disk can be written, saving will tell
            path.write_text('\n'.join(lines.values()) + '\n', 'utf-8', 'surrogateescape')
        print0(f'{len(lines)} of {len(names)} photos are left out')


def verdict(gain):
    """Return in words what a gain over the gray copy, in dB, says of a network."""
    if gain < 0.1:
        return (
            f'It does not colorize yet ({gain:+.1f} dB over the gray copy): try more --epochs '
            'or more photos.'
        )
    if gain < 1:
        return (
            f'It begins to colorize: {gain:.1f} dB better than the gray copy. More --epochs or '
            'more photos should give more.'
        )
    return f'It colorizes: {gain:.1f} dB better than the gray copy.'


def print_stopped(progress, name, is_kept):
    """Print where a run was stopped, and the command that goes on with it."""
    words, is_name = ['python'], False
    for word in sys.argv:
        if not is_name and word != '--resume' and not word.startswith('--name'):
            words.append(word)
        is_name = word == '--name'
    command = shlex.join([*words, '--name', name, '--resume'])
    print0(
        f'stopped in epoch {progress.epoch + 1} after step {progress.step}; '
        + (f'to go on: {command}' if is_kept else 'nothing of a dry run is kept')
    )


def print_end(run_folder, progress, data, photos):
    """Print where the weights are, how good they are, and the commands to use them.

    The samples of `data` show what the network makes of them; it is None if the run was finished
    before. `photos` is what to colorize after that, if that is known.
    """
    if not run_folder.weights.exists():
        print0(
            f'this run is finished, and {run_folder.weights} was removed; '
            'more --epochs make new weights'
        )
        return
    weights = run_folder.latest if run_folder.is_latest() else run_folder.weights
    print0(f'{weights}: epoch {progress.best_epoch} of {run_folder.path}')
    if progress.best_gain:  # else nothing is held out to tell
        print0(verdict(progress.best_gain))
    option = [] if weights == run_folder.latest else ['--weights', str(weights)]
    print0('Next:\n    tensorboard --logdir runs --port 8898    # then open http://localhost:8898')
    if data:
        words = [*data.sample_paths[::4], *option, '--compare', '--output', 'compared']
        print0(f'    python predict.py {shlex.join(words)}    # gray, colorized, true')
    print0(f'    {shlex.join(["python", "predict.py", photos or "YOUR_PHOTOS", *option])}')
