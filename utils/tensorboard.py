"""Everything that goes to TensorBoard's page. It decorates a run, and may fail without harm."""

import contextlib
import io
import sys
import threading
import warnings

import torch
import torch.nn.functional as F
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from utils.color import GAIN, OBJECTIVE, VIVIDNESS, merge_luminance
from utils.distributed import print0

# TensorBoard opens the tags that sort first: the grid 'Colorized', and the first of these curves
METRICS = GAIN, OBJECTIVE, 'training loss', 'validation loss', VIVIDNESS  # of the settings
CURVES = *METRICS, 'learning rate', 'photos per second'
LEAST_SIDE = 128  # pixels of a photo in a grid: smaller ones are enlarged


@contextlib.contextmanager
def harmless():
    """Turn an error of TensorBoard into a warning: the training is worth more."""
    try:
        yield
    except Exception as error:
        reason = ' '.join(str(error).split())
        print0(f'warning: TensorBoard: {reason}; training goes on', file=sys.stderr)


class Page:
    """The page of one run, in the folder `path`: its curves, and the same photos at every epoch.

    `samples` are these photos' (x, y), `names` what they are called in the tab Projector. What a
    killed run logged of `first_epoch` (from 1) and later is taken back.
    """

    def __init__(self, path, samples, names, first_epoch):
        self.path, (self.x, self.y), self.names = path, samples, names
        silence_writer_thread()
        self.writer = SummaryWriter(path, purge_step=first_epoch)

    def log_start(self, net, settings):
        """Log the graph of `net`, and the settings of a new run as hyperparameters."""
        with harmless(), warnings.catch_warnings():
            # tracing warns of itself, and of the network's check of its input's size
            warnings.simplefilter('ignore')
            self.writer.add_graph(net, torch.zeros(1, *self.x.shape[1:]))
        with harmless():
            for summary in hparams(settings, dict.fromkeys(METRICS, 0)):
                self.writer.file_writer.add_summary(summary)

    @torch.no_grad()
    def log_epoch(self, net, precision, metrics, epoch):
        """Log the metrics, and grids of the sample photos; flush, so that the page is live."""
        with harmless():
            for tag in CURVES:
                if tag in metrics:
                    self.writer.add_scalar(tag, metrics[tag], epoch)
            with precision.autocast:
                prediction = net(self.x).float()
            gray = (self.x + 1) / 2
            colorized = merge_luminance(prediction, gray)
            triptychs = torch.cat([gray.expand_as(self.y), colorized, self.y], dim=3)[::2]
            grids = {
                'Input': encode(gray, 4),
                'Ground truth': encode(self.y, 4),
                'Predicted': encode(prediction.clamp(0, 1), 4),
                'Colorized': encode(triptychs, 2),
            }
            for tag, image in grids.items():
                summary = Summary(value=[Summary.Value(tag=tag, image=image)])
                self.writer.file_writer.add_summary(summary, epoch)
            self.writer.flush()

    def close(self, net, epoch):
        """Place the photos by the network's features, for the tab Projector, and end the page.

        The tab shows the run that ended last: of several, it would open with the oldest.
        """
        with harmless(), torch.no_grad():
            features = net.encode(self.x)[-1].float().mean((2, 3))
            thumbnails = F.interpolate(self.y, (64, 64), mode='bilinear', antialias=True)
            self.writer.add_embedding(features, self.names, thumbnails, epoch, self.path.name)
            self.writer.close()
            config = self.path / 'projector_config.pbtxt'  # one in runs/ is read, too
            text = config.read_text().replace(f'"{epoch:05}/', f'"{self.path.name}/{epoch:05}/')
            (self.path.parent / config.name).write_text(text)
            config.unlink()


def silence_writer_thread():
    """Keep the writer thread's errors off the terminal: its next call raises them again."""

    def hook(args, show=threading.excepthook):
        if not type(args.thread).__module__.startswith('tensorboard'):
            show(args)

    threading.excepthook = hook


def encode(images, columns):
    """Return a grid of images (B, C, H, W) in [0, 1], with white gaps, as TensorBoard's message.

    As JPEG: a PNG of the same grid takes seventy times as long.
    """
    enlarge = max(1, LEAST_SIDE // images.shape[2])
    images = F.interpolate(images.cpu(), scale_factor=enlarge, mode='nearest')
    grid = make_grid(images, nrow=columns, padding=4, pad_value=1)
    content = io.BytesIO()
    to_pil_image(grid).save(content, 'JPEG', quality=95, subsampling=0)
    height, width = grid.shape[1:]
    jpeg = content.getvalue()
    return Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=jpeg)
