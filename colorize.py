"""Train a UNet to colorize photos, and watch it learn in TensorBoard.

    python colorize.py --demo                             # two minutes, on drawings of its own
    python colorize.py --data_path my_photos --dry_run    # one small batch through everything
    python colorize.py                                    # data/landscapes → unet.pth
    python colorize.py --resume                           # go on where the run was stopped
    torchrun --nproc_per_node=gpu colorize.py             # on all GPUs of this machine
    tensorboard --logdir runs --port 8898                 # the page: http://localhost:8898
"""
import math
import os
import signal
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from data_utils import Data, open_photos
from demo_landscapes import draw_landscapes
from unet import UNet
from utils import cli, distributed, report
from utils.checkpoint import (
    Progress,
    RunFolder,
    State,
    Stopped,
    StopSignal,
    load_checkpoint,
    require_same,
)
from utils.cli import UsageError
from utils.color import dullness, measure, merge_luminance, to_metrics
from utils.device import (
    Precision,
    available_cpus,
    channels_last,
    check_compiler,
    choose_device,
    describe_device,
    keep_freed_memory,
)
from utils.distributed import all_reduce_sum, broadcast, print0
from utils.tensorboard import Page

DEMO = dict(data_path='data/demo', epochs=8, batch_size=8, name='demo')
DEMO_GAIN = 3.0  # dB over the gray copy that the demo must reach
WARM_UP = 0.2    # of all steps
# what a run must share with its checkpoint, and what else its --resume takes from there
FIXED = 'batch_size', 'image_size', 'seed', 'val_fraction', 'colorfulness_weight', 'photos'
SETTINGS = 'lr', 'epochs', *FIXED[:-1], 'data_path'


# ---------------------------------------------------------------------------- arguments

def parse_args(argv, settings=None):
    """Return the parsed command line; what it leaves out comes from a checkpoint's `settings`."""
    parser = cli.ArgumentParser(prog='colorize.py', description=__doc__)
    add = parser.add_argument
    add('--data_path', default='data/landscapes', help='a folder of photos [%(default)s]')
    add('--batch_size', type=cli.positive_int, default=32,
        help='photos per step, over all processes [%(default)s]')
    add('--epochs', type=cli.positive_int, default=10, help='[%(default)s]')
    add('--lr', type=cli.positive_float, default=1e-3,
        help="the highest learning rate: it warms up to that, and falls to 0 [%(default)s]")
    add('--colorfulness_weight', type=cli.nonnegative_float, default=0.3,
        help='0 is the plain squared error, whose colors are dull [%(default)s]')
    add('--val_fraction', type=cli.fraction, default=0.1,
        help='photos held out for validation; 0 trains on all [%(default)s]')
    add('--image_size', type=cli.multiple_of_8, default=64,
        help='photos are squashed to this many pixels square [%(default)s]')
    add('--seed', type=cli.nonnegative_int, default=0,
        help='of weights, order and flips [%(default)s]')
    add('--name', default='UNet', help='the folder in runs/ [%(default)s]')
    add('--resume', action='store_true', help='go on with the run of that name, if there is one')
    add('--dry_run', action='store_true', help='one small batch through everything; keeps nothing')
    add('--demo', action='store_true', help='draw small landscapes and learn to colorize them')
    add('--stream', action='store_true', help='read photos from disk every epoch, to save memory')
    add('--compile', action='store_true', help='torch.compile the network: for long runs on a GPU')
    add('--device', choices=('auto', 'cuda', 'mps', 'cpu'), default='auto', help='[%(default)s]')
    add('--precision', choices=('auto', 'fp32', 'bf16', 'fp16'), default='auto',
        help='[%(default)s: the fastest that is safe on the device]')
    add('--num_workers', type=cli.nonnegative_int, default=min(8, available_cpus()),
        help='threads that read photos [%(default)s]')
    if parser.parse_args(argv).demo:
        parser.set_defaults(**DEMO)
    # as text, so that a checkpoint's values are checked as those of flags are
    parser.set_defaults(**{name: str(value) for name, value in (settings or {}).items()
                           if name in SETTINGS})
    args = parser.parse_args(argv)
    if args.name in ('', '.', '..') or '/' in args.name or os.sep in args.name:
        parser.error(f'argument --name: {args.name!r} is not the name of a folder in runs/')
    if args.dry_run:
        args.epochs, args.resume = 1, False
    return args


# ---------------------------------------------------------------------------- training

def train(net, optimizer, loader, epochs=5, writer=None):
    """Train `net` on the (x, y) of `loader`, and return the mean loss of the last epoch.

    x is (B, 1, H, W) in [-1, 1], y (B, 3, H, W) in [0, 1]; the loss is the mean squared error.
    `writer`, if given, gets it as 'training loss'. Without an epoch, the loss is NaN.
    """
    loss, progress = math.nan, Progress()
    for epoch in range(epochs):
        loss = train_epoch(net, optimizer, loader, progress)
        progress.finish_epoch()
        print0(f'epoch {epoch + 1}/{epochs}: training loss {loss:.5f}')
        if writer:
            writer.add_scalar('training loss', loss, epoch + 1)
    return loss


@dataclass
class Recipe:
    """How steps are taken. The defaults are the course's: squared error at a constant rate."""
    precision: Precision = Precision()
    colorfulness_weight: float = 0.0
    lr: float | None = None  # the highest; None leaves the optimizer's rate alone
    steps: int = 0           # of the whole run, for the rate

    def get_lr(self, step):
        """Return the learning rate of the step (from 0): a linear warm-up, then half a cosine."""
        warm_up = math.ceil(WARM_UP * self.steps)
        if step < warm_up:
            return self.lr * (step + 1) / warm_up
        done = (step - warm_up) / max(1, self.steps - warm_up)
        return self.lr * (1 + math.cos(math.pi * min(1, done))) / 2


def train_epoch(model, optimizer, loader, progress, recipe=Recipe(), stop=None):  # noqa: B008
    """Train for one epoch, or for what `progress` leaves of it, and return its mean loss per photo.

    Raises Stopped if `stop.signum` asks for it, FloatingPointError if the loss or a weight is no
    longer finite, UsageError if no photo could be read.
    """
    device = next(model.parameters()).device
    model.train()
    losses, signum, synced = [], 0, time.monotonic()  # losses stay on the device until sync_losses
    for x, y in (bar := progress_bar(loader, progress)):
        # every rank must agree on the size of the batch, and on stopping
        photos, signum = all_reduce_sum(len(x), stop.signum if stop else 0)
        if signum:
            break
        if recipe.lr:
            set_lr(optimizer, recipe.get_lr(progress.epoch * len(loader) + progress.step))
        progress.step += 1
        if photos:  # 0 if none of the batch could be read
            loss = train_step(model, optimizer, recipe, (x.to(device), y.to(device)), photos)
            losses.append((progress.step, loss))
            progress.photos += len(x)
        if time.monotonic() - synced > 0.5:
            sync_losses(losses, progress)
            bar.set_postfix_str(f'loss {progress.loss_sum / max(1, progress.photos):.4f}')
            synced = time.monotonic()
    sync_losses(losses, progress)
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise FloatingPointError(f'a weight is not finite {progress.place()}')
    progress.loss_sum, progress.photos = all_reduce_sum(progress.loss_sum, progress.photos)
    if signum:
        raise Stopped
    if not progress.photos:
        raise UsageError('none of the photos could be read')
    return progress.loss_sum / progress.photos


def train_step(model, optimizer, recipe, batch, photos):
    """Take one step on this rank's share of a batch of `photos`; return its squared error."""
    x, y = batch
    optimizer.zero_grad()  # here, because CUDA graphs reuse the gradients' memory
    with recipe.precision.autocast:
        prediction = model(x)
    prediction = prediction.float()
    loss = objective = F.mse_loss(prediction, y, reduction='sum') / y.shape[1:].numel()
    if recipe.colorfulness_weight:
        # the squared error alone answers a doubt with gray: ask for the color that is missing
        colorized = merge_luminance(prediction, (x + 1) / 2)
        objective = loss + recipe.colorfulness_weight * dullness(colorized, y).sum()
    # ranks average their gradients: this makes that the gradient of the mean over all photos
    scaler = recipe.precision.scaler
    scaler.scale(objective * distributed.world_size / photos).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.detach()


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group['lr'] = lr


def sync_losses(losses, progress):
    """Add up the losses (step, tensor): only here the host waits for the device."""
    steps, values = zip(*losses, strict=True) if losses else ((), ())
    for step, loss in zip(steps, torch.stack(values).tolist() if values else (), strict=True):
        if not math.isfinite(loss):
            raise FloatingPointError(f'the loss is {loss} {progress.place(step)}')
        progress.loss_sum += loss
    losses.clear()


def progress_bar(loader, progress):
    """Show the steps and the time left of an epoch, on rank 0's terminal; nothing in a log file."""
    return tqdm(loader, f'epoch {progress.epoch + 1}', len(loader), initial=progress.step,
                unit='step', leave=False, disable=None if distributed.rank == 0 else True)


@torch.no_grad()
def evaluate(net, loader, precision, stop):
    """Return the metrics of all photos of `loader`, over all ranks: a dict (see to_metrics).

    Raises Stopped, or UsageError if no photo can be read.
    """
    net.eval()
    sums, photos = 0, 0
    for x, y in loader:
        if all_reduce_sum(stop.signum)[0]:
            raise Stopped
        with precision.autocast:
            prediction = net(x)
        measured = measure(prediction.float(), x, y)
        sums = sums + torch.stack(list(measured.values())).sum(1)  # stays on the device
        photos += len(x)
    *sums, photos = all_reduce_sum(*sums.tolist(), photos)
    if not photos:
        raise UsageError('none of the held-out photos could be read')
    return to_metrics({name: value / photos for name, value in zip(measured, sums, strict=True)})


# ---------------------------------------------------------------------------- a run

def fit(state, data, recipe, run_folder, epochs, stop):
    """Run epoch after epoch: train, validate, save, show. Return the last epoch's metrics."""
    net, progress, metrics, page = state.net, state.progress, {}, None
    model = DistributedDataParallel(net) if distributed.world_size > 1 else net
    if run_folder:
        page = Page(run_folder.path, data.samples, progress.epoch + 1)
        if page.writer and progress == Progress():
            page.log_start(UNet(), state.settings)
        print0(report.HEADER)
    while progress.epoch < epochs:
        data.train_loader.epoch, data.train_loader.first_step = progress.epoch, progress.step
        start, before = time.perf_counter(), progress.photos
        metrics = {'training loss': train_epoch(model, state.optimizer, data.train_loader, progress,
                                                recipe, stop)}
        metrics |= {'photos per second': (progress.photos - before) / (time.perf_counter() - start),
                    'learning rate': state.optimizer.param_groups[0]['lr']}
        if data.val_loader:
            metrics |= evaluate(net, data.val_loader, recipe.precision, stop)
        is_best = update_best(progress, metrics, recipe)
        progress.finish_epoch()
        if run_folder:
            if is_best:
                run_folder.save_weights(net)
            if page.writer:
                page.log_epoch(net, recipe.precision, metrics, progress.epoch)
            # last: a run killed before this repeats the epoch, and takes back what it logged
            state.save(run_folder.checkpoint)
            report.print_epoch(progress.epoch, epochs, metrics, is_best)
    if page and page.writer:
        page.log_features(net, data.sample_names, progress.epoch)
        page.close()
    return metrics


def update_best(progress, metrics, recipe):
    """Tell whether this epoch is the best so far; without held-out photos, every epoch is."""
    objective = 0.0
    if 'validation loss' in metrics:
        objective = metrics['validation loss'] + recipe.colorfulness_weight * metrics['dullness']
        if not math.isfinite(objective):
            raise FloatingPointError(f'the validation loss is {objective} '
                                     f'{progress.place()}')
        if objective >= progress.best:
            return False
    progress.best, progress.best_epoch = objective, progress.epoch + 1
    progress.best_gain = metrics.get('Gain over the gray copy (dB)', 0.0)
    return True


def fit_or_save(state, data, recipe, run_folder, epochs, stop):
    """Fit; save a checkpoint if the run is stopped. Return the exit code."""
    progress = state.progress
    try:
        stop.nothing_to_save = False
        fit(state, data, recipe, run_folder, epochs, stop)
        return 0
    except Stopped:
        if run_folder:
            state.save(run_folder.checkpoint)
            report.print_stopped(progress, run_folder.path.name, is_kept=not stop.temporary)
        return 128 + (stop.signum or signal.SIGTERM)
    except FloatingPointError as error:
        remedy = 'a smaller --lr or --precision fp32'
        raise FloatingPointError(
            f'{error}; ' + (f'the last good checkpoint is kept: --resume with {remedy}'
                            if progress.epoch else f'begin again with {remedy}')) from error


def run(args, argv, home, stop):
    """Run the training, from the photos to the weights, below the folder `home`.

    Returns the exit code.
    """
    device, is_rank0 = choose_device(args.device, distributed.local_rank), distributed.rank == 0
    if args.compile:
        check_compiler(device)
    distributed.init(device)
    checkpoint = None
    if args.resume and is_rank0:
        checkpoint = load_checkpoint(home / 'runs' / args.name / 'checkpoint.pth', UNet())
    if checkpoint := broadcast(checkpoint):
        args = parse_args(argv, checkpoint['settings'])
    if args.demo and is_rank0:
        draw_landscapes(args.data_path)
    broadcast(None)  # the others wait for the drawings
    folder, training, validation = open_photos(args.data_path, args.image_size, args.num_workers,
                                               args.val_fraction)
    settings = {name: getattr(args, name) for name in SETTINGS} | dict(photos=folder.fingerprint())
    if args.dry_run:
        training, validation = folder.keep(training[:8], validation[:8])
    recipe = Recipe(Precision(args.precision, device), args.colorfulness_weight, args.lr)
    state = new_state(settings, recipe, device)
    if checkpoint:
        require_same(settings, checkpoint['settings'], FIXED)
        state.restore(checkpoint)
        if not is_rank0:  # the sums over all ranks are rank 0's to carry on
            state.progress.loss_sum, state.progress.photos = 0.0, 0
    run_folder = RunFolder(home, args.name, args.resume) if is_rank0 else None
    code, samples = 0, []
    if state.progress.epoch < args.epochs:
        print0(f'{describe_device(device)}, {recipe.precision.name}: {len(training)} photos to '
               f'train on, {len(validation)} held out; '
               f'logging in {run_folder and run_folder.path}')
        data = Data.load(folder, (training, validation), args.batch_size, device, args.seed,
                         args.stream)
        if run_folder:
            report.print_skipped(folder.skipped, folder.names, run_folder.path / 'skipped.txt')
        recipe.steps, samples = args.epochs * len(data.train_loader), data.sample_paths
        if args.compile:
            state.net.compile(dynamic=False)  # else a smaller last batch makes all others slow
        code = fit_or_save(state, data, recipe, run_folder, args.epochs, stop)
    if code or not is_rank0:
        return code
    if args.dry_run:
        print0('the dry run went through everything, and kept nothing')
        return 0
    report.print_end(run_folder, state.progress, samples,
                     args.data_path if args.demo else 'YOUR_PHOTOS')
    if args.demo and state.progress.best_gain < DEMO_GAIN and args.val_fraction:
        print0(f'colorize.py: the demo should be {DEMO_GAIN:g} dB better than the gray copy '
               f'(--epochs {args.epochs})', file=sys.stderr)
        return 1
    return 0


def new_state(settings, recipe, device):
    """Return the State of a new run: weights drawn from the seed."""
    torch.manual_seed(settings['seed'])
    net = channels_last(UNet(), device)
    net.image_size = settings['image_size']
    optimizer = torch.optim.Adam(net.parameters(), recipe.lr, fused=device.type != 'mps')
    return State(net, optimizer, recipe.precision.scaler, Progress(), settings)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if sys.stdout:  # names need not be printable
        sys.stdout.reconfigure(errors='backslashreplace')
    stop = StopSignal()
    keep_freed_memory()
    try:
        with tempfile.TemporaryDirectory() if args.dry_run else nullcontext('') as home:
            stop.temporary = home if args.dry_run else None
            code = run(args, argv, Path(home), stop)
        distributed.cleanup()
        return code
    except Exception as error:
        code, line = cli.explain_error(error, args.batch_size)
        if not code:
            raise
        print(f'colorize.py: {line}', file=sys.stderr)
        return code


if __name__ == '__main__':
    sys.exit(main())
