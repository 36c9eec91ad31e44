"""Train a UNet to colorize photos, and watch it learn in TensorBoard.

python colorize.py --demo                             # two minutes, on drawings of its own
python colorize.py --data_path my_photos --dry_run    # one small batch through everything
python colorize.py                                    # data/landscapes → unet.pth
python colorize.py --resume                           # go on where the run was stopped
torchrun --nproc_per_node=gpu colorize.py             # on all GPUs of this machine
tensorboard --logdir runs --port 8898                 # the page: http://localhost:8898
"""

from utils.stop import Stop, Stopped, end_quietly

if __name__ == '__main__':
    end_quietly()  # Ctrl-C during the imports needs no traceback

import math
import os
import signal
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from data_utils import augment, batches, fingerprint, gray_and_color, read_photos, split
from demo_landscapes import draw_landscapes
from pretrained_unet import PretrainedUNet, Teacher
from unet import UNet
from utils import cli, color, distributed, report
from utils.checkpoint import Progress, State
from utils.device import Precision, channels_last, check_compiler, choose_device, keep_memory
from utils.distributed import all_reduce_sum, print0
from utils.muon import Muon
from utils.photos import list_photos
from utils.run import RunFolder
from utils.tensorboard import Page, harmless

NETWORKS = dict(unet=UNet, pretrained=PretrainedUNet)
DEMO = dict(data_path='data/demo', epochs=6, batch_size=8)
# what a resumed run must share with its checkpoint, beside the photos
FIXED = 'network batch_size image_size seed val_fraction colorfulness_weight demo'.split()
# what the page shows of a run
SETTINGS = 'batch_size colorfulness_weight data epochs image_size lr network seed'.split()
WARM_UP = 0.2  # of all steps
SMALL_STEPS = 0.85  # of all steps see photos at five eighths of their size
TEACHER_WEIGHT = 0.1  # of the distance to the teacher's features, in what is minimized


def parse_args(argv):
    parser = cli.ArgumentParser('colorize.py', __doc__)
    add, add_flag = parser.add_argument, parser.add_flag
    add('--data_path', default='data/landscapes', help='a folder of photos')
    add('--epochs', type=cli.positive_int, default=10, help='how often each photo is seen')
    add('--batch_size', type=cli.positive_int, default=32, help='photos a step, over all processes')
    add('--lr', type=cli.positive_float, default=1e-3, help='the peak of the learning rate')
    add('--colorfulness_weight', type=cli.factor, default=0.025, help='asks for livelier colors')
    add('--network', choices=NETWORKS, default='unet', help='plain, or pretrained on ImageNet')
    add('--val_fraction', type=cli.fraction_below_1, default=0.1, help='share of photos held out')
    add('--image_size', type=cli.image_size, default=64, help='side of a photo, in pixels')
    add('--seed', type=cli.nonnegative_int, default=0, help='draws weights, order and flips')
    add('--name', type=cli.folder_name, help='the folder in runs/ (default: UNet, or demo)')
    add_flag('--resume', 'go on with the run of --name, else with the latest of UNet, UNet_2, …')
    add_flag('--dry_run', 'send one small batch through everything, and keep nothing')
    add_flag('--demo', 'draw small landscapes, and learn to colorize them')
    parser.add_device()
    add('--precision', choices='auto fp32 bf16 fp16'.split(), default='auto', help='of the network')
    add_flag('--compile', 'torch.compile the network, for long runs on a GPU')
    args = parser.parse_args(argv)
    if args.network == 'pretrained':
        parser.set_defaults(image_size=128)
    if args.demo:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    if args.dry_run:
        args.epochs, args.resume = 1, False
    return args


@dataclass(frozen=True)
class Recipe:
    """How steps are taken. The defaults are the course's: squared error, the optimizer's own rate.

    Rate and size follow from these fields and the step's number: no checkpoint holds them.
    """

    precision: Precision = Precision()
    colorfulness_weight: float = 0.0  # of dullness in what is minimized
    lr: float | None = None  # the peak of the learning rate; None leaves the optimizer's alone
    small_steps: float = 0.0  # the share of steps that see small photos; 0 changes no photo
    steps_per_epoch: int = 0
    steps: int = 0  # of the whole run
    teacher: Teacher | None = None  # of a pretrained network

    def get_objective(self, squared_error, dullness):
        """Return the objective; without dullness, a network that is unsure predicts gray."""
        return squared_error + self.colorfulness_weight * dullness

    def get_lr(self, step):
        """Return the learning rate of the step (from 0): it rises in a line, and falls in one."""
        warm_up = math.ceil(WARM_UP * self.steps)
        if step < warm_up:
            return self.lr * (step + 1) / warm_up
        return self.lr * (self.steps - step) / (self.steps - warm_up)

    def get_side(self, step, size):
        """Return the side at which the step (from 0) sees photos of `size` pixels: small at first.

        Five eighths cost two fifths, and what they teach holds at full size: photos, not drawings,
        look alike at all scales (progressive resizing; Tan and Le 2021, arXiv:2104.00298).
        """
        # the first step is not small, so that a lack of memory shows at once
        is_small = 0 < step < self.small_steps * self.steps
        return 8 * round(5 * size / 64) if is_small else size  # a UNet's multiple of 8


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
    """Train on all of `loader`, an epoch from `progress.step` on; return the epoch's mean loss.

    Raises Stopped if `stop` asks for it, FloatingPointError if the loss or a weight is not finite.
    """
    device = next(model.parameters()).device
    exact = torch.float32 if device.type == 'mps' else torch.float64  # an Apple GPU has no more
    loss_sum = torch.tensor(progress.loss_sum, dtype=exact, device=device)  # stays on the device
    model.train()
    asked, signum = 0, 0
    first = progress.epoch * recipe.steps_per_epoch + progress.step
    options = dict(initial=first, unit='step', leave=False, disable=distributed.no_bar)
    # its time left is that of the whole run
    bar = tqdm(loader, f'epoch {progress.epoch + 1}', recipe.steps or None, **options)
    for step, (x, y) in enumerate(bar, first):
        # every rank must agree on the size of the batch, and on stopping
        batch_size, signum = all_reduce_sum(len(x), stop.signum if stop else 0)
        if signum:
            break
        if recipe.lr:
            for group in optimizer.param_groups:
                group['lr'] = recipe.get_lr(step)
        if recipe.small_steps:
            size, epochs = x.shape[-1], recipe.steps // recipe.steps_per_epoch
            x, y = augment(x, y, recipe.get_side(step, size), progress.epoch, epochs, step)
        loss_sum += train_step(model, optimizer, x.to(device), y.to(device), batch_size, recipe)
        progress.step += 1
        progress.seen += len(x)
        if time.monotonic() - asked > 0.5:  # seldom, because the host has to wait for the device
            progress.set_loss(loss_sum.item())
            bar.set_postfix_str(f'loss {progress.loss_sum / max(1, progress.seen):.4f}')
            asked = time.monotonic()
    progress.set_loss(loss_sum.item())
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise progress.not_finite('a weight is not finite')
    progress.all_reduce()
    if signum:
        raise Stopped
    return progress.loss_sum / progress.seen


def train_step(model, optimizer, x, y, batch_size, recipe):
    """Take one step on this rank's share of a batch of `batch_size` photos.

    x is gray (B, 1, H, W) in [-1, 1], y color (B, 3, H, W) in [0, 1], both on the model's device.
    Returns the sum of the share's losses: of each photo's mean squared error.
    """
    optimizer.zero_grad()
    with recipe.precision.autocast:
        prediction = model(x).float()
        distance = recipe.teacher.get_distance(y) if recipe.teacher else 0
    squared_error = F.mse_loss(prediction, y, reduction='sum') / y.shape[1:].numel()
    objective = squared_error
    if recipe.colorfulness_weight:
        colorized = color.merge_luminance(prediction, (x + 1) / 2)
        objective = recipe.get_objective(squared_error, color.dullness(colorized, y).sum())
    objective = objective + TEACHER_WEIGHT * distance
    scaler = recipe.precision.scaler
    # DistributedDataParallel divides by the world size, which is undone here
    scaler.scale(objective * distributed.world_size / batch_size).backward()
    scaler.step(optimizer)
    scaler.update()
    return squared_error.detach()


@torch.no_grad()
def evaluate(net, loader, precision, stop):
    """Return the metrics of all photos of `loader`, over all ranks: a dict (see to_metrics).

    Raises Stopped.
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
    means = {name: total / photos for name, total in zip(measured, sums, strict=True)}
    return color.to_metrics(means)


def run(args, home, stop):
    """Run the training, from photos to weights, in the folder `home`; return the exit code."""
    device = choose_device(args.device)
    precision = Precision(args.precision, device)
    distributed.init(device)
    names = find_photos(args)
    state = new_state(args, names, device, precision)
    demo = args.data_path if args.demo else None
    folder, page = None, None  # only rank 0 has them
    if distributed.rank == 0:
        folder = RunFolder(home, args.name, 'demo' if args.demo else 'UNet', args.resume)
    teacher = Teacher(state.net) if args.network == 'pretrained' else None  # before it is resumed
    if args.resume:
        state.load(folder and folder.checkpoint)
    if state.progress.epoch >= args.epochs:
        if folder:
            report.print_end(folder, state.progress, args.network, demo)
        return 0
    photos = read_photos(args.data_path, names, args.val_fraction, args.image_size, device)
    steps_per_epoch = math.ceil(len(photos.training) / args.batch_size)
    small_steps, steps = 0.0 if args.demo else SMALL_STEPS, args.epochs * steps_per_epoch
    recipe = Recipe(
        precision, args.colorfulness_weight, args.lr, small_steps, steps_per_epoch, steps, teacher
    )
    if folder:
        report.print_skipped(photos, None if args.dry_run else folder.path / 'skipped.txt')
        report.print_start(device, recipe, photos, folder.path, state.progress)
        page = open_page(args, folder, photos, state)
    if args.compile:
        check_compiler(device)
        state.net.compile(dynamic=False)  # else the smaller last batch slows down all others
    with stop:
        try:
            fit(args, state, recipe, photos, folder, page, stop)
        except Stopped:
            if folder and not args.dry_run:
                state.save(folder.checkpoint)
                report.print_stopped(state.progress, folder)
            return 128 + (stop.signum or signal.SIGTERM)  # 0 if another rank had the signal
    if page:
        page.close(state.net, state.progress.epoch)
    if args.dry_run:
        print0('the dry run went through everything, and kept nothing')
    elif folder:
        shown = [os.path.join(photos.root, photos.names[index]) for index in photos.get_shown(4)]
        report.print_end(folder, state.progress, args.network, demo, shown)
    return 0


def fit(args, state, recipe, photos, folder, page, stop):
    """Run epoch after epoch: train, validate, save, show. Raises Stopped."""
    net, optimizer, progress = state.net, state.optimizer, state.progress
    model = DistributedDataParallel(net) if distributed.world_size > 1 else net
    device = next(net.parameters()).device
    make_batches = partial(batches, photos, batch_size=args.batch_size, device=device)
    for epoch in range(progress.epoch, args.epochs):
        at = dict(seed=args.seed, epoch=epoch, first_step=progress.step)
        loader = make_batches(photos.training, **at)
        start, before = time.perf_counter(), progress.seen
        loss = train_epoch(model, optimizer, loader, progress, recipe, stop)
        metrics = {
            'training loss': loss,
            'learning rate': recipe.get_lr((epoch + 1) * recipe.steps_per_epoch - 1),
            'photos per second': (progress.seen - before) / (time.perf_counter() - start),
        }
        objective = -epoch  # with nothing held out, the last epoch is the best
        if photos.validation:
            loader = make_batches(photos.validation)  # without a seed: in order, unflipped
            metrics |= evaluate(net, loader, recipe.precision, stop)
            objective = recipe.get_objective(metrics['validation loss'], metrics['dullness'])
            metrics[color.OBJECTIVE] = objective
        is_best = progress.update_best(objective, metrics.get(color.GAIN, 0.0))
        progress.finish_epoch()
        if folder:
            if is_best:
                of = 'drawings, and knows nothing else' if args.demo else 'photos'
                gain = f'{progress.best_gain:+.1f} dB in ' if photos.validation else ''
                about = f'trained on {len(photos.training)} {of}; {gain}epoch {epoch + 1}'
                folder.save_weights(net, about)
            if page:
                page.log_epoch(net, recipe.precision, metrics, progress.epoch)
            # Last. If the run is killed before this, --resume repeats the epoch.
            state.save(folder.checkpoint)
            report.print_epoch(progress.epoch, args.epochs, metrics, is_best)


def find_photos(args):
    """Return the names of the photos of a run; those of the demo are drawn first."""
    if args.demo and distributed.rank == 0:
        draw_landscapes(args.data_path)
    distributed.barrier()
    names = list_photos(args.data_path)
    training, validation = split(names, args.val_fraction)
    return [names[index] for index in training[:8] + validation[:8]] if args.dry_run else names


def new_state(args, names, device, precision):
    """Return the State of a new run on the device: weights drawn from the seed."""
    torch.manual_seed(args.seed)
    net = NETWORKS[args.network](args.image_size)
    if args.network == 'pretrained':
        net.load_encoder()
    net = channels_last(net, device)
    optimizer = Muon(net.parameters(), args.lr, fused=device.type != 'mps')
    settings = {name: getattr(args, name) for name in FIXED} | dict(data_path=fingerprint(names))
    return State(net, optimizer, precision.scaler, settings)


def open_page(args, folder, photos, state):
    """Return the Page of a run, which shows the same photos at every epoch; None if it fails."""
    shown = photos.get_shown()
    names = [os.path.dirname(photos.names[index]) or '.' for index in shown]
    samples = gray_and_color(photos.pixels[shown].to(next(state.net.parameters()).device))
    page = None
    with harmless():
        page = Page(folder.path, samples, names, state.progress.epoch + 1)
    if page and state.progress == Progress():
        # another network, on the CPU: tracing must not touch the one that is trained
        settings = vars(args) | dict(data=f'{args.data_path}, {state.settings["data_path"]}')
        page.log_start(NETWORKS[args.network](), {name: settings[name] for name in SETTINGS})
    return page


def main(argv=None):
    cli.print_any_name()
    args = parse_args(sys.argv[1:] if argv is None else argv)
    keep_memory()
    try:
        with tempfile.TemporaryDirectory() if args.dry_run else nullcontext('') as home:
            code = run(args, home, Stop())
        distributed.barrier()  # none leaves while another still needs it
        return code
    except Exception as error:
        return cli.exit_code(error, 'colorize.py', args.batch_size)


if __name__ == '__main__':
    distributed.exit(main())
