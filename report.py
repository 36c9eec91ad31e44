"""What one sees of a run: its lines on the terminal and its page in TensorBoard."""
import os
import sys
import threading
import warnings

import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.utils import make_grid

import distributed
from checkpoint import Progress
from data_utils import RequestError
from unet import UNet


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


def open_page(folder, args, progress, metrics):
    """The run's TensorBoard writer; None where it cannot be written."""
    # TensorBoard's thread hands its errors on to the calls below: one warning, no traceback
    threading.excepthook = lambda _: None
    # what a killed run logged after its last checkpoint is taken back, and logged again
    writer = decorate(SummaryWriter, folder, purge_step=progress.epoch + 1)
    if writer and progress == Progress():
        decorate(log_graph, writer, UNet(), args.image_size)
        decorate(log_settings, writer, vars(args), ('training loss', *metrics))
    return writer


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


def fault(error, args):
    """(exit code, one line) for what a user can mend; (0, '') for what is our own mistake."""
    text = ' '.join(str(error).split())
    if isinstance(error, RequestError):
        return 2, text
    if isinstance(error, OSError) and error.strerror:
        return 1, f'{error.filename}: {error.strerror}' if error.filename else error.strerror
    if isinstance(error, OSError | FloatingPointError):
        return 1, text
    if (isinstance(error, MemoryError | torch.cuda.OutOfMemoryError)
            or "can't allocate memory" in text):
        smaller = (f'--batch_size {args.batch_size // 2}' if args.batch_size > 1 else
                   'a smaller --image_size')
        return 1, f'out of memory with --batch_size {args.batch_size}: try {smaller}'
    if 'DataLoader worker' in text:
        return 1, f'{text}: out of memory? Try fewer than --num_workers {args.num_workers}'
    if distributed.world > 1 and isinstance(error, RuntimeError):
        return 1, f'process {distributed.rank}: {text}'
    return 0, ''
