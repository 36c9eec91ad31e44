"""What a run prints: the table of epochs, what it left out, the verdict, and what comes next."""
import shlex
import sys
from collections import Counter

from utils.distributed import print0

HEADER = ('         training  validation     PSNR in dB      better than  colorful,\n'
          '  epoch      loss        loss   raw  colorized     gray copy  of truth   photos/s')


def print_epoch(epoch, epochs, metrics, is_saved):
    """Print an epoch's metrics as a row under HEADER; an asterisk marks weights that were saved."""
    row = f'{epoch:>4}/{epochs:<4}{metrics["training loss"]:>8.5f}'
    if 'validation loss' in metrics:
        row += ('{validation loss:>12.5f}{PSNR of prediction:>6.2f}{PSNR of colorized:>11.2f}'
                '{Better than the gray copy (dB):>+11.2f} dB'
                "{Colorfulness (% of truth's):>8.0f} %").format_map(metrics)
    else:
        row += ' ' * 52
    print0(f'{row}{metrics["photos per second"]:>11.1f}{" *" if is_saved else ""}')


def print_skipped(skipped, names, path):
    """Print which photos are left out, and why; write the whole list to the file `path`.

    `skipped` has a reason by index. The gray ones, of which there can be hundreds, share a line.
    """
    if not skipped:
        return
    lines = [f'{names[index]!r}: {reason}' for index, reason in sorted(skipped.items())]
    for line in lines:
        if not line.endswith(': gray'):
            print0(f'skipped {line}', file=sys.stderr)
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8', errors='surrogateescape')
    gray = Counter(skipped.values())['gray']
    if gray:
        first = ', '.join(repr(names[index]) for index in sorted(skipped)
                          if skipped[index] == 'gray')[:60]
        print0(f'skipped {gray} gray photos, which would teach gray: {first}… (all in {path})',
               file=sys.stderr)


def verdict(gain):
    """Return in words what a gain over the gray copy, in dB, says of a network."""
    if gain < 0.1:
        return (f'It does not colorize yet ({gain:+.1f} dB over the gray copy): try more --epochs, '
                'more photos, or a smaller --image_size.')
    return f'It colorizes: {gain:.1f} dB better than the gray copy.'


def print_next(weights, photos, examples):
    """Print the commands that come after a run: `photos` to colorize, `examples` to compare."""
    option = '' if weights == 'unet.pth' else f' --weights {shlex.quote(weights)}'
    print0('Next:\n    tensorboard --logdir runs --port 8898    # then open http://localhost:8898')
    if examples:
        print0(f'    python predict.py {shlex.join(examples)}{option} --compare '
               '--output compared')
    print0(f'    python predict.py {photos}{option}')
