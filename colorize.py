"""Train a UNet to colorize photos, and watch it learn in TensorBoard.

    python colorize.py --demo                             # two minutes, on drawings of its own
    python colorize.py --data_path my_photos --dry_run    # one small batch through everything
    python colorize.py                                    # data/landscapes → unet.pth
    python colorize.py --resume                           # go on where the run was stopped
    torchrun --nproc_per_node=gpu colorize.py             # on all GPUs of this machine
    tensorboard --logdir runs --port 8898                 # the page: http://localhost:8898
With --resume, what you leave out is taken from the run's checkpoint.
"""

import math
import signal
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

if __name__ == '__main__' and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports needs no traceback

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from data_utils import Data, PhotoFolder, load_photos, split
from demo_landscapes import draw_landscapes
from unet import UNet
from utils import checkpoint, cli, color, distributed, report
from utils.checkpoint import Progress, RunFolder, State, Stopped
from utils.cli import UsageError
from utils.device import available_cpus, channels_last, check_compiler, choose_device, keep_memory
from utils.distributed import all_reduce_sum, print0
from utils.recipe import Precision, Recipe
from utils.tensorboard import Page

DEMO = dict(data_path='data/demo', epochs=8, batch_size=8, name='demo', small_steps=0.0)
DEMO_GAIN = 3.0  # dB over the gray copy that the demo must reach
# what a resumed run must share with its checkpoint, and all that --resume takes from there
FIXED = 'batch_size image_size seed val_fraction colorfulness_weight'.split()
SETTINGS = [*FIXED, 'lr', 'epochs', 'small_steps', 'data_path']


def parse_args(argv, settings=(), program='colorize.py'):
    """Return the parsed command line; what it leaves out comes from a checkpoint's `settings`."""
    parser = cli.ArgumentParser(program, __doc__)
    add, add_flag = parser.add_argument, parser.add_flag
    add('--data_path', default='data/landscapes', help='a folder of photos')
    add('--epochs', type=cli.positive_int, default=10, help='how often each photo is seen')
    add('--batch_size', type=cli.positive_int, default=32, help='photos a step, over all processes')
    add('--lr', type=cli.positive_float, default=1e-3, help='the peak of the learning rate')
    add('--colorfulness_weight', type=cli.factor, default=0.025, help='0: duller')
    add('--val_fraction', type=cli.fraction_below_1, default=0.1, help='share of photos held out')
    add('--image_size', type=cli.image_size, default=64, help='side of a photo, in pixels')
    add('--small_steps', type=cli.fraction_below_1, default=0.75, help='first share, at half size')
    add('--seed', type=cli.nonnegative_int, default=0, help='draws weights, order and flips')
    add('--name', type=cli.folder_name, default='UNet', help='the folder in runs/')
    add_flag('--resume', 'go on with the run of --name, else with the latest of UNet, UNet_2, …')
    add_flag('--dry_run', 'send one small batch through everything, and keep nothing')
    add_flag('--demo', 'draw small landscapes, and learn to colorize them')
    add_flag('--stream', 'read the photos from disk in every epoch, to save memory')
    parser.add_num_workers(min(8, available_cpus()), 'threads that read photos')
    parser.add_device()
    add('--precision', choices='auto fp32 bf16 fp16'.split(), default='auto', help='of the network')
    add_flag('--compile', 'torch.compile the network, for long runs on a GPU')
    if parser.parse_args(argv).demo:
        parser.set_defaults(**DEMO)
    # as text, so that a checkpoint's values are checked as those of flags are
    parser.set_defaults(**{name: str(settings[name]) for name in SETTINGS if name in settings})
    args = parser.parse_args(argv)
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
        batch_size, signum = all_reduce_sum(len(x), stop.signum if stop else 0)
        if signum:
            break
        step = progress.epoch * len(loader) + progress.step
        recipe.set_lr(optimizer, step)
        x, y = recipe.shrink(step, progress.epoch, x, y)
        progress.step += 1
        if batch_size:  # 0 if none of the batch could be read
            loss = train_step(model, optimizer, recipe, (x.to(device), y.to(device)), batch_size)
            losses.append((progress.step, loss))
            progress.photos += len(x)
        if time.monotonic() - synced > 0.5:
            progress.sync_losses(losses)
            bar.set_postfix_str(f'loss {progress.loss_sum / max(1, progress.photos):.4f}')
            synced = time.monotonic()
    progress.sync_losses(losses)
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise FloatingPointError(f'a weight is not finite {progress.describe_position()}')
    progress.loss_sum, photos = all_reduce_sum(progress.loss_sum, progress.photos)
    progress.photos = int(photos)  # the sums over several ranks are floats
    if signum:
        raise Stopped
    if not progress.photos:
        raise UsageError('none of the photos could be read')
    return progress.loss_sum / progress.photos


def train_step(model, optimizer, recipe, share, batch_size):
    """Take one step on this rank's share (x, y) of a batch of `batch_size` photos.

    Returns the sum of the share's losses: of each photo's mean squared error.
    """
    x, y = share
    optimizer.zero_grad()  # here, because CUDA graphs reuse the gradients' memory
    with recipe.precision.autocast:
        prediction = model(x)
    prediction = prediction.float()
    loss = objective = F.mse_loss(prediction, y, reduction='sum') / y.shape[1:].numel()
    if recipe.colorfulness_weight:
        # with the squared error alone, a network that is unsure predicts gray
        colorized = color.merge_luminance(prediction, (x + 1) / 2)
        objective = recipe.objective(loss, color.dullness(colorized, y).sum())
    # DistributedDataParallel divides by the world size, which is undone here
    scaler = recipe.precision.scaler
    scaler.scale(objective * distributed.world_size / batch_size).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.detach()


def progress_bar(loader, progress):
    """Show the steps and the time left of an epoch, on rank 0's terminal; nothing in a log file."""
    options = dict(initial=progress.step, unit='step', leave=False, disable=distributed.no_bar)
    return tqdm(loader, f'epoch {progress.epoch + 1}', len(loader), **options)


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
        measured = color.measure(prediction.float(), x, y)
        sums = sums + torch.stack(list(measured.values())).sum(1)  # stays on the device
        photos += len(x)
    *sums, photos = all_reduce_sum(*sums.tolist(), photos)
    if not photos:
        raise UsageError('none of the held-out photos could be read')
    means = {name: total / photos for name, total in zip(measured, sums, strict=True)}
    return color.to_metrics(means)


# ---------------------------------------------------------------------------- a run


def fit(state, data, recipe, run_folder, epochs, stop):
    """Run epoch after epoch: train, validate, save, show. Only rank 0 has a `run_folder`."""
    net, progress = state.net, state.progress
    model = DistributedDataParallel(net) if distributed.world_size > 1 else net
    page = Page(run_folder.path, data.samples, progress.epoch + 1) if run_folder else None
    if page:
        page.log_start(UNet(), state.settings, is_new=progress == Progress())
    while progress.epoch < epochs:
        data.train_loader.epoch, data.train_loader.first_step = progress.epoch, progress.step
        start, before = time.perf_counter(), progress.photos
        loss = train_epoch(model, state.optimizer, data.train_loader, progress, recipe, stop)
        speed = (progress.photos - before) / (time.perf_counter() - start)
        lr = recipe.get_lr((progress.epoch + 1) * len(data.train_loader) - 1)
        metrics = {'training loss': loss, 'learning rate': lr, 'photos per second': speed}
        objective = None
        if data.val_loader:
            metrics |= evaluate(net, data.val_loader, recipe.precision, stop)
            objective = recipe.objective(metrics['validation loss'], metrics['dullness'])
        is_best = progress.update_best(objective, metrics.get(color.GAIN, 0.0))
        progress.finish_epoch()
        if run_folder:
            if is_best:
                run_folder.save_weights(net)  # in runs/NAME/unet.pth, and a copy in unet.pth
            page.log_epoch(net, recipe.precision, metrics, progress.epoch)
            # Last. If the run is killed before this, --resume repeats the epoch.
            state.save(run_folder.checkpoint)
            report.print_epoch(progress.epoch, epochs, metrics, is_best)
    if page:
        page.log_features(net, data.sample_folders, progress.epoch)
        page.close()


def fit_or_save(state, data, recipe, run_folder, epochs, stop):
    """Fit, and save a checkpoint if the run is stopped. Return the exit code."""
    stop.nothing_to_save = False
    try:
        fit(state, data, recipe, run_folder, epochs, stop)
        return 0
    except Stopped:
        if run_folder:
            state.save(run_folder.checkpoint)
            report.print_stopped(state.progress, run_folder.path.name, is_kept=not stop.temporary)
        return 128 + (stop.signum or signal.SIGTERM)
    except FloatingPointError as error:
        raise FloatingPointError(f'{error}; {checkpoint.describe_kept(state.progress)}') from error


def run(args, argv, base, stop):
    """Run the training, from photos to weights, in the folder `base`; return the exit code."""
    device = choose_device(args.device, distributed.local_rank)
    if args.compile:
        check_compiler(device)
    distributed.init(device)
    saved = load_saved(args, argv, base)
    if args.demo and distributed.rank == 0:
        draw_landscapes(args.data_path)
    distributed.barrier()
    photos = PhotoFolder(args.data_path, args.image_size, args.num_workers)
    photos.is_stopped = lambda: stop.signum
    indices = split(photos, args.val_fraction)
    settings = {name: getattr(args, name) for name in SETTINGS} | dict(photos=photos.fingerprint())
    if args.dry_run:
        indices = photos.keep(*(part[:8] for part in indices))
    precision = Precision(args.precision, device)
    recipe = Recipe(precision, args.colorfulness_weight, args.lr, args.small_steps)
    state = new_state(settings, recipe, device)
    if saved:
        checkpoint.require_same(settings, saved['settings'], [*FIXED, 'photos'])
        state.restore(saved)
    run_folder = RunFolder(base, args.name, args.resume) if distributed.rank == 0 else None
    data = None
    if state.progress.epoch < args.epochs:
        source = load_photos(photos, device, args.stream)
        report.print_skipped(photos, run_folder)
        data = Data(source, indices, photos, args.batch_size, device, args.seed)
        recipe.steps = args.epochs * len(data.train_loader)
        report.print_start(device, recipe, data, run_folder, state.progress)
        if args.compile:
            state.net.compile(dynamic=False)  # else the smaller last batch slows down all others
        if code := fit_or_save(state, data, recipe, run_folder, args.epochs, stop):
            return code
    if args.dry_run:
        print0('the dry run went through everything, and kept nothing')
    elif run_folder:
        report.print_end(run_folder, state.progress, data, args.data_path if args.demo else None)
        if args.demo and args.val_fraction and state.progress.best_gain < DEMO_GAIN:
            print0(f'colorize.py: the demo should gain {DEMO_GAIN:g} dB', file=sys.stderr)
            return 1
    return 0


def load_saved(args, argv, base):
    """Return the checkpoint that --resume goes on with, or None; complete `args` from that run."""
    saved, path = None, checkpoint.find_run(base, args.name, argv) / 'checkpoint.pth'
    if args.resume and distributed.rank == 0:
        like = {name: getattr(args, name) for name in SETTINGS} | dict(photos='')
        saved = checkpoint.load_checkpoint(path, UNet(), like)
    if saved := distributed.broadcast(saved):
        vars(args).update(vars(parse_args(argv, saved['settings'], f'colorize.py: {path}')))
    args.name = path.parent.name
    return saved


def new_state(settings, recipe, device):
    """Return the State of a new run on the device: weights drawn from the seed."""
    torch.manual_seed(settings['seed'])
    net = channels_last(UNet(), device)
    net.image_size = settings['image_size']
    optimizer = torch.optim.Adam(net.parameters(), recipe.lr, fused=device.type != 'mps')
    return State(net, optimizer, recipe.precision.scaler, Progress(), settings)


def main(argv=None):
    cli.open_streams()
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    stop = checkpoint.StopSignal()
    keep_memory()
    try:
        with tempfile.TemporaryDirectory() if args.dry_run else nullcontext('') as base:
            stop.temporary = base
            code = run(args, argv, Path(base), stop)
        distributed.cleanup()
        return code
    except Exception as error:
        return cli.exit_code(error, 'colorize.py', args.batch_size)


if __name__ == '__main__':
    cli.exit(main())
