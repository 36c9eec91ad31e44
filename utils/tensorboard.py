"""Everything that goes to TensorBoard's page. It decorates a run, and may fail without harm."""
import contextlib
import sys
import threading
import warnings

import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.utils import make_grid

from utils.distributed import print0


@contextlib.contextmanager
def harmless():
    """Turn an error of TensorBoard into a warning: the training is worth more."""
    try:
        yield
    except Exception as error:
        print0(f'warning: TensorBoard: {error}; training goes on', file=sys.stderr)


def open_writer(folder, first_epoch):
    """Return a SummaryWriter into `folder`, or None if it cannot be written.

    What a killed run logged of `first_epoch` (from 1) and later is taken back.
    """
    silence_writer_thread()
    with harmless():
        return SummaryWriter(folder, purge_step=first_epoch)


def silence_writer_thread():
    """Keep the traceback of TensorBoard's writer thread off the terminal.

    Its errors are raised again in the next call of the writer, and reported there.
    """
    def hook(args, show=threading.excepthook):
        if not type(args.thread).__module__.startswith('tensorboard'):
            show(args)
    threading.excepthook = hook


def log_graph(writer, net, image_size):
    """Log the graph of `net` for one photo."""
    with warnings.catch_warnings():
        # tracing warns of itself, and of the network's check of its input's size
        warnings.simplefilter('ignore')
        writer.add_graph(net, torch.zeros(1, 1, image_size, image_size))


def log_settings(writer, settings, metrics):
    """Log the run's settings as hyperparameters, and the tags of the `metrics` they led to."""
    for summary in hparams(settings, dict.fromkeys(metrics, 0)):
        writer.file_writer.add_summary(summary)


@torch.no_grad()
def log_epoch(writer, net, samples, precision, metrics, epoch):
    """Log the metrics, and grids of the `samples` (x, y); flush, so that the page is live."""
    for tag, value in metrics.items():
        writer.add_scalar(tag, value, epoch)
    x, y = samples
    with precision.autocast:
        prediction = net(x)
    for tag, images in dict(Input=(x + 1) / 2, Predicted=prediction.float().clamp(0, 1),
                            **{'Ground truth': y}).items():
        writer.add_image(tag, make_grid(images, nrow=4), epoch)
    writer.flush()
