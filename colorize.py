"""Train a UNet to colorize photos, and watch it learn in TensorBoard.

    python colorize.py --demo                             # two minutes, on drawings of its own
    python colorize.py --data_path my_photos --dry_run    # one small batch through everything
    python colorize.py                                    # data/landscapes → unet.pth
    python colorize.py --resume                           # go on where the run was stopped
    torchrun --nproc_per_node=gpu colorize.py             # on all GPUs of this machine
    tensorboard --logdir runs --port 8898                 # the page: http://localhost:8898
"""
import hashlib
import math
import os
import shlex
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
from tqdm import tqdm

from data_utils import PhotoFolder, PhotoLoader, load_into_memory, split
from demo_landscapes import draw_landscapes
from unet import UNet
from utils import cli, distributed, tensorboard
from utils.checkpoint import Progress, RunFolder, State, Stopped, StopSignal, load_checkpoint
from utils.cli import UsageError
from utils.color import colorfulness, merge_luminance, psnr
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

DEMO = dict(data_path='data/demo', image_size=64, epochs=8, batch_size=8, name='demo')
DEMO_GAIN = 3.0  # dB over the gray copy that the demo must reach
METRICS = ('validation loss', 'PSNR/prediction', 'PSNR/with luminance', 'PSNR/gray copy',
           'colorfulness/prediction', 'colorfulness/truth')


# ---------------------------------------------------------------------------- arguments

def parse_args(argv):
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('--data_path', default='data/landscapes', help='a folder of photos [%(default)s]')
    add('--batch_size', type=cli.positive_int, default=32,
        help='photos per step, over all processes [%(default)s]')
    add('--epochs', type=cli.positive_int, default=10, help='[%(default)s]')
    add('--lr', type=cli.positive_float, default=1e-3, help="Adam's learning rate [%(default)s]")
    add('--val_fraction', type=cli.fraction, default=0.1,
        help='photos held out for validation; 0 trains on all [%(default)s]')
    add('--image_size', type=cli.multiple_of_8, default=224,
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
        help='threads or processes that read photos [%(default)s]')
    if parser.parse_args(argv).demo:
        parser.set_defaults(**DEMO)
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
        if writer:
            writer.add_scalar('training loss', loss, epoch + 1)
    return loss


def train_epoch(model, optimizer, loader, progress, precision=Precision(), stop=None):  # noqa: B008
    """Train for one epoch, or for what `progress` leaves of it, and return its mean loss per photo.

    Raises Stopped if `stop.signum` asks for it, FloatingPointError if the loss or a weight is no
    longer finite, UsageError if no photo could be read.
    """
    device = next(model.parameters()).device
    model.train()
    losses, signum = [], 0  # the losses stay on the device until sync_losses
    start = synced = time.monotonic()
    seen = 0
    for x, y in (bar := progress_bar(loader, progress)):
        # every rank must agree on the size of the batch, and on stopping
        photos, signum = all_reduce_sum(len(x), stop.signum if stop else 0)
        if signum:
            break
        progress.step += 1
        if photos:  # 0 if none of the batch could be read
            loss = train_step(model, optimizer, precision, (x.to(device), y.to(device)), photos)
            losses.append((progress.step, loss))
            progress.photos += len(x)
            seen += photos
        if (now := time.monotonic()) - synced > 0.5:
            synced = now
            sync_losses(losses, progress)
            bar.set_postfix_str(f'loss {progress.loss_sum / max(1, progress.photos):.4f}, '
                                f'{seen / (now - start):.1f} photos/s')
    sync_losses(losses, progress)
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise FloatingPointError(f'a weight is not finite {where_and_remedy(progress)}')
    progress.loss_sum, progress.photos = all_reduce_sum(progress.loss_sum, progress.photos)
    if signum:
        raise Stopped
    if not progress.photos:
        raise UsageError('none of the photos could be read')
    return progress.loss_sum / progress.photos


def train_step(model, optimizer, precision, batch, photos):
    """Take one step on this rank's share of a batch of `photos`; return the sum of their losses."""
    x, y = batch
    # before the forward pass: CUDA graphs write the new gradients where the old ones are
    optimizer.zero_grad()
    with precision.autocast:
        loss = F.mse_loss(model(x), y, reduction='sum') / y.shape[1:].numel()
    # ranks average their gradients: this makes that the gradient of the mean over all photos
    precision.scaler.scale(loss * distributed.world_size / photos).backward()
    precision.scaler.step(optimizer)
    precision.scaler.update()
    return loss.detach()


def sync_losses(losses, progress):
    """Add up the losses (step, tensor) of the last steps. Only here the host waits for the device."""
    steps, values = zip(*losses, strict=True) if losses else ((), ())
    for step, loss in zip(steps, torch.stack(values).tolist() if values else (), strict=True):
        if not math.isfinite(loss):
            raise FloatingPointError(f'the loss is {loss} {where_and_remedy(progress, step)}')
        progress.loss_sum += loss
    losses.clear()


def where_and_remedy(progress, step=None):
    """Return at which step a number was not finite, and what to do."""
    return (f'at step {step or progress.step} of epoch {progress.epoch + 1}; the last good weights '
            'and checkpoint are kept: --resume with a smaller --lr or --precision fp32')


def progress_bar(loader, progress):
    """Show the steps and the time left of an epoch, on rank 0's terminal; nothing in a log file."""
    return tqdm(loader, f'epoch {progress.epoch + 1}', len(loader), initial=progress.step,
                unit=' steps', leave=False, disable=None if distributed.rank == 0 else True)


@torch.no_grad()
def evaluate(net, loader, precision, stop):
    """Return the means over all photos of `loader`, over all ranks: a dict of METRICS.

    PSNR in dB of the prediction as it is, of the prediction with the photo's own luminance, and
    of the gray copy, which is to be beaten. Raises Stopped, UsageError if no photo can be read.
    """
    net.eval()
    sums = []  # of each batch; they stay on the device until the end
    for x, y in loader:
        if all_reduce_sum(stop.signum)[0]:
            raise Stopped
        with precision.autocast:
            prediction = net(x)
        prediction, gray = prediction.float(), (x + 1) / 2
        values = torch.stack([
            (prediction - y).square().flatten(1).mean(1),
            psnr(prediction.clamp(0, 1), y),
            psnr(merge_luminance(prediction, gray), y),
            psnr(gray.expand_as(y), y),
            colorfulness(prediction.clamp(0, 1)),
            colorfulness(y),
            torch.ones(len(x), device=x.device),
        ])
        sums.append(values.sum(1))
    sums = torch.stack(sums).cpu().double().sum(0)
    *sums, photos = all_reduce_sum(*sums.tolist())
    if not photos:
        raise UsageError('none of the held-out photos could be read')
    return {name: value / photos for name, value in zip(METRICS, sums, strict=True)}


# ---------------------------------------------------------------------------- a run

@dataclass
class Data:
    """The photos of a run."""
    folder: PhotoFolder
    train_loader: PhotoLoader
    val_loader: PhotoLoader | None  # None if nothing is held out
    samples: tuple | None           # (x, y) of 16 photos to look at, on rank 0


def open_photos(args):
    """Return the run's PhotoFolder, and the indices of its training and of its validation photos.

    Raises UsageError if there are none, or if the ranks see different ones.
    """
    folder = PhotoFolder(args.data_path, args.image_size, args.num_workers)
    if broadcast(folder.names) != folder.names:
        raise UsageError(f'{args.data_path} holds other photos here than where rank 0 runs; copy '
                         'the same to every machine')
    training, validation = split(folder.names, args.val_fraction)
    return folder, training, validation


def load_data(args, folder, training, validation, device):
    """Return the Data of a run: in memory if there is room, else streamed."""
    photos = folder if args.stream else load_into_memory(folder, device)
    shown = validation or training
    number = min(16, len(shown))
    shown = [shown[place * len(shown) // number] for place in range(number)]
    samples = PhotoLoader(photos, shown, len(shown), device)
    samples.rank, samples.world_size = 0, 1
    return Data(folder,
                PhotoLoader(photos, training, args.batch_size, device, args.seed),
                PhotoLoader(photos, validation, args.batch_size, device) if validation else None,
                next(iter(samples)) if distributed.rank == 0 else None)


def new_state(args, settings, device, scaler):
    """Return the State of a new run: weights from the seed."""
    torch.manual_seed(args.seed)
    net = channels_last(UNet(), device)
    optimizer = torch.optim.Adam(net.parameters(), args.lr, fused=device.type != 'mps')
    return State(net, optimizer, scaler, Progress(), settings)


def fit(state, data, precision, run_folder, epochs, stop):
    """Run epoch after epoch: train, validate, save, show. Return the last epoch's metrics."""
    net, progress, metrics = state.net, state.progress, {}
    model = DistributedDataParallel(net) if distributed.world_size > 1 else net
    writer = None
    if distributed.rank == 0:
        writer = tensorboard.open_writer(run_folder.path, progress.epoch + 1)
    if writer and progress == Progress():
        with tensorboard.harmless():
            tensorboard.log_graph(writer, UNet(), data.folder.size)
        with tensorboard.harmless():
            tensorboard.log_settings(writer, state.settings, ('training loss', *METRICS))
    while progress.epoch < epochs:
        data.train_loader.epoch, data.train_loader.first_step = progress.epoch, progress.step
        start, before = time.perf_counter(), progress.photos
        loss = train_epoch(model, state.optimizer, data.train_loader, progress, precision, stop)
        speed = (progress.photos - before) / (time.perf_counter() - start)
        metrics = {'training loss': loss}
        if data.val_loader:
            metrics |= evaluate(net, data.val_loader, precision, stop)
        metrics |= {'learning rate': state.optimizer.param_groups[0]['lr'],
                    'photos per second': speed}
        is_best = update_best(progress, metrics)
        progress.finish_epoch()
        if distributed.rank == 0:
            if is_best:
                run_folder.save_weights(net)
            if writer:
                with tensorboard.harmless():
                    tensorboard.log_epoch(writer, net, data.samples, precision, metrics,
                                          progress.epoch)
            # last: a run killed before this repeats the epoch, and takes back what it logged
            state.save(run_folder.checkpoint)
            print0(describe_epoch(progress.epoch, epochs, metrics))
    if writer:
        with tensorboard.harmless():
            writer.close()
    return metrics


def update_best(progress, metrics):
    """Tell whether this epoch is the best so far; without held-out photos, every epoch is."""
    loss = metrics.get('validation loss', -math.inf)
    if not math.isfinite(loss) and 'validation loss' in metrics:
        raise FloatingPointError(f'the validation loss is {loss} {where_and_remedy(progress)}')
    if 'validation loss' not in metrics:
        return True
    is_best = loss < progress.best
    progress.best = min(loss, progress.best)
    return is_best


def describe_epoch(epoch, epochs, metrics):
    """Return an epoch's metrics in one line."""
    line = f'epoch {epoch}/{epochs}  training loss {metrics["training loss"]:.5f}'
    if 'validation loss' in metrics:
        line += ('  validation loss {validation loss:.5f}  PSNR {PSNR/prediction:.2f} dB, with '
                 'luminance {PSNR/with luminance:.2f} (gray copy {PSNR/gray copy:.2f})  '
                 'colorfulness {colorfulness/prediction:.0f} of {colorfulness/truth:.0f}'
                 ).format_map(metrics)
    return line + '  lr {learning rate:g}  {photos per second:.1f} photos/s'.format_map(metrics)


def run(args, home, stop):
    """Run the training, from the photos to the weights, below the folder `home`.

    Returns the exit code.
    """
    device = choose_device(args.device, distributed.local_rank)
    if args.compile:
        check_compiler(device)
    distributed.init(device)
    if args.demo and distributed.rank == 0:
        draw_landscapes(args.data_path)
    broadcast(None)  # the others wait for the drawings
    folder, training, validation = open_photos(args)
    listing = hashlib.sha256('\n'.join(folder.names).encode('utf-8', 'surrogateescape')).hexdigest()
    settings = dict(batch_size=args.batch_size, image_size=args.image_size, seed=args.seed,
                    val_fraction=args.val_fraction, photos=f'{len(folder)} ({listing[:8]})')
    if args.dry_run:
        training, validation = training[:8], validation[:8]
        folder.keep(training + validation)
        training, validation = (list(range(len(training))),
                                list(range(len(training), len(folder))))
    precision = Precision(args.precision, device)
    state = new_state(args, settings, device, precision.scaler)
    run_folder = checkpoint = None
    if distributed.rank == 0:
        run_folder = RunFolder(home, args.name, args.resume)
        if args.resume:
            checkpoint = load_checkpoint(run_folder.checkpoint, state.net, settings)
    run_folder, checkpoint = broadcast((run_folder, checkpoint))
    if checkpoint:
        state.restore(checkpoint)
        if distributed.rank:  # the sums over all ranks are rank 0's to carry on
            state.progress.loss_sum = state.progress.photos = 0
    print0(f'{describe_device(device)}, {precision.name}: {len(training)} photos to train on, '
           f'{len(validation)} held out; logging in {run_folder.path}')
    if state.progress.epoch >= args.epochs:
        print0(f'this run is finished: {run_folder.weights} has its weights, more --epochs would '
               'go on with it')
        return 0
    data = load_data(args, folder, training, validation, device)
    if args.compile:
        # not dynamic: the smaller last batch would make every later batch run slower code
        state.net.compile(dynamic=False)
    try:
        stop.nothing_to_save = False
        metrics = fit(state, data, precision, run_folder, args.epochs, stop)
    except Stopped:
        if distributed.rank == 0:
            state.save(run_folder.checkpoint)
        print0(f'stopped in epoch {state.progress.epoch + 1} after step {state.progress.step}; '
               + ('nothing of a dry run is kept' if args.dry_run else
                  f'to go on: {same_command(run_folder.path.name)} --resume'))
        return 128 + (stop.signum or signal.SIGTERM)
    if skipped := int(all_reduce_sum(len(folder.skipped))[0]):
        print0(f'{skipped} of {len(folder)} photos could not be read and were skipped')
    return finish(args, run_folder, metrics)


def same_command(name):
    """Return the command line of this run, without its --resume."""
    words = [word for word in sys.argv if word != '--resume']
    return shlex.join(['python', *words, '--name', name])


def finish(args, run_folder, metrics):
    """Print what was reached and what comes next; return the exit code."""
    if args.dry_run:
        print0('the dry run went through everything, and kept nothing')
        return 0
    print0(f'the weights are in {run_folder.latest}. Next:\n'
           '    tensorboard --logdir runs --port 8898    # then open http://localhost:8898\n'
           f'    python predict.py {shlex.quote(args.data_path)} --output colorized')
    if args.demo and 'PSNR/prediction' in metrics:
        gain = metrics['PSNR/prediction'] - metrics['PSNR/gray copy']
        if gain < DEMO_GAIN:
            print0(f'but the network does not colorize: {gain:.1f} dB over the gray copy, not '
                   f'{DEMO_GAIN:g} (--epochs {args.epochs})', file=sys.stderr)
            return 1
        print0(f'The network colorizes: {gain:.1f} dB over the gray copy, {DEMO_GAIN:g} were asked.')
    return 0


def main(argv=None):
    args = parse_args(argv)
    sys.stdout.reconfigure(errors='backslashreplace')  # names need not be printable
    stop = StopSignal()
    keep_freed_memory()
    try:
        with tempfile.TemporaryDirectory() if args.dry_run else nullcontext('') as home:
            code = run(args, Path(home), stop)
        distributed.cleanup()
        return code
    except Exception as error:
        code, line = cli.explain_error(error, args.batch_size, args.num_workers)
        if not code:
            raise
        print(f'colorize.py: {line}', file=sys.stderr)
        return code


if __name__ == '__main__':
    sys.exit(main())
