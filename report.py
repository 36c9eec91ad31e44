"""What one sees of a run: its lines on the terminal and its page in TensorBoard."""
import os
import sys
import warnings

import torch
from torch.utils.tensorboard.summary import hparams
from torchvision.utils import make_grid

import distributed


def say(*words, file=None):
    """Prints, in one process of many, and at once: a log file is watched too."""
    if distributed.rank == 0:
        try:
            print(*words, file=file, flush=True)
        except OSError:  # a closed terminal or pipe, a full disk: no reason to lose the run
            os.dup2(os.open(os.devnull, os.O_WRONLY), (file or sys.stdout).fileno())


def describe(epoch, epochs, scalars):
    """An epoch in one line."""
    line = f'epoch {epoch}/{epochs}  training loss {scalars["training loss"]:.5f}'
    if 'validation loss' in scalars:
        line += ('  validation loss {validation loss:.5f}  PSNR {PSNR/prediction:.2f} dB, with '
                 'luminance {PSNR/with luminance:.2f} (grey copy {PSNR/gray copy:.2f})  '
                 'colorfulness {colorfulness/prediction:.0f} of {colorfulness/truth:.0f}'
                 ).format_map(scalars)
    return line + '  lr {learning rate:g}  {photos per second:.1f} photos/s'.format_map(scalars)


def decorate(act, *args, **kwargs):
    """Does what only decorates the run: a failure is told, and costs nothing else."""
    try:
        return act(*args, **kwargs)
    except Exception as error:  # whatever it is, the training is worth more
        say(f'warning: TensorBoard: {error}; training goes on', file=sys.stderr)


def log_graph(writer, net, image_size):
    """The network's graph, for one photo."""
    with warnings.catch_warnings():
        # add_graph traces, which warns of itself, and of the network's look at its input's size
        warnings.simplefilter('ignore')
        writer.add_graph(net, torch.zeros(1, 1, image_size, image_size))


def log_settings(writer, settings, metrics):
    """The run's settings as hyper-parameters, beside the `metrics` (tags) that they led to."""
    for summary in hparams(settings, dict.fromkeys(metrics, 0)):
        writer.file_writer.add_summary(summary)


@torch.no_grad()
def log_epoch(writer, net, samples, precision, scalars, epoch):
    """Scalars and the same photos' grids, flushed: the page is live."""
    for tag, value in scalars.items():
        writer.add_scalar(tag, value, epoch)
    x, y = samples
    with precision.autocast:
        prediction = net(x)
    for tag, images in dict(Input=(x + 1) / 2, Predicted=prediction.float().clamp(0, 1),
                            **{'Ground truth': y}).items():
        writer.add_image(tag, make_grid(images, nrow=4), epoch)
    writer.flush()
