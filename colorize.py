"""Trains a UNet to colorize photos, and shows it learning in TensorBoard.

    python colorize.py --demo                             # two minutes, on drawings of its own
    python colorize.py --data_path my_photos --dry_run    # one small batch through everything
    python colorize.py                                    # data/landscapes → unet.pth
    python colorize.py --resume                           # goes on where the run was stopped
    torchrun --nproc_per_node=gpu colorize.py             # on all GPUs of this machine
    tensorboard --logdir runs --port 8898                 # the page: http://localhost:8898
"""
import argparse
import math
import os
import shlex
import signal
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import distributed
from arguments import OneLineParser, count, multiple_of_8, natural, number
from checkpoint import (
    Progress,
    State,
    Stopped,
    StopSignal,
    digest,
    load_checkpoint,
    plain_state_dict,
    run_folder,
    save_whole,
    set_aside,
)
from color import colorfulness, psnr, with_luminance
from data_utils import RequestError
from demo_landscapes import draw_landscapes
from device import (
    Precision,
    channels_last,
    choose_device,
    describe_device,
    keep_freed_memory,
    processors,
)
from loading import make_loaders, split
from report import decorate, describe, fault, log_epoch, open_page, say
from unet import UNet

DEMO = dict(data_path='data/demo', image_size=64, epochs=8, batch_size=8, name='demo')
DEMO_GAIN = 3.0  # dB over the grey copy that the demo must reach
METRICS = ('validation loss', 'PSNR/prediction', 'PSNR/with luminance', 'PSNR/gray copy',
           'colorfulness/prediction', 'colorfulness/truth')


# ---------------------------------------------------------------------------- arguments

def parse_args(argv):
    parser = OneLineParser(description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--data_path', default='data/landscapes', help='a folder of photos [%(default)s]')
    add('--batch_size', type=count, default=32,
        help='photos per step, over all processes [%(default)s]')
    add('--epochs', type=count, default=10, help='[%(default)s]')
    add('--lr', type=number(float, lambda lr: 0 < lr < math.inf, 'a number above 0'), default=1e-3,
        help="Adam's learning rate [%(default)s]")
    add('--val_fraction', type=number(float, lambda f: 0 <= f < 1, 'at least 0 and below 1'),
        default=0.1, help='photos held out for validation; 0 trains on all [%(default)s]')
    add('--image_size', type=multiple_of_8, default=224,
        help='photos are squashed to this many pixels square [%(default)s]')
    add('--seed', type=natural, default=0, help='of weights, order and flips [%(default)s]')
    add('--name', default='UNet', help='the folder in runs/ [%(default)s]')
    add('--resume', action='store_true', help='go on with the run of that name, if there is one')
    add('--dry_run', action='store_true', help='one small batch through everything; keeps nothing')
    add('--demo', action='store_true', help='draw small landscapes and learn to colorize them')
    add('--stream', action='store_true', help='read photos from disk every epoch, to save memory')
    add('--compile', action='store_true', help='torch.compile the network: for long runs on a GPU')
    add('--device', choices=('auto', 'cuda', 'mps', 'cpu'), default='auto', help='[%(default)s]')
    add('--precision', choices=('auto', 'fp32', 'bf16', 'fp16'), default='auto',
        help='[%(default)s: the fastest that is safe on the device]')
    add('--num_workers', type=natural, default=min(8, processors()),
        help='threads or processes that decode photos [%(default)s]')
    if parser.parse_args(argv).demo:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    if args.name in ('', '.', '..') or '/' in args.name or os.sep in args.name:
        parser.error(f'argument --name: {args.name!r} is not the name of a folder in runs/')
    if args.dry_run:
        args.epochs, args.resume = 1, False
    return args


# ---------------------------------------------------------------------------- training

def train(net, optimizer, loader, epochs=5, writer=None, *,
          model=None, precision=None, progress=None, stop=None):
    """Trains `net` on the (x, y) of `loader`; returns the mean loss of the last epoch.

    x (B, 1, H, W) in [-1, 1], y (B, 3, H, W) in [0, 1]; the loss is the mean squared error, and
    `writer` gets it as 'training loss'. What is called is `model`: `net`, or `net` wrapped.
    `progress` tells where to go on and is kept up to date; `stop.number` asks for the end.

    Raises Stopped then, FloatingPointError where the loss is not finite, RequestError where no
    photo could be read.
    """
    model, precision = model or net, precision or Precision()
    progress, stop = progress or Progress(), stop or SimpleNamespace(number=0)
    device = next(net.parameters()).device
    net.train()
    for epoch in range(epochs):
        if epoch:
            progress.finish_epoch()
        losses, stopping, seen, start, asked = [], 0, 0, time.monotonic(), time.monotonic()
        for x, y in (bar := progress_bar(loader, progress)):
            photos, stopping = distributed.total(len(x), stop.number)
            if stopping:
                break
            progress.step += 1
            if photos:
                loss = take_step(model, optimizer, precision, x.to(device), y.to(device), photos)
                losses.append((progress.step, loss))
                progress.photos += len(x)
                seen += photos
            if (now := time.monotonic()) - asked > 0.5 and losses:
                settle(losses, progress)
                bar.set_postfix_str(f'loss {progress.loss_sum / max(1, progress.photos):.4f}, '
                                    f'{seen / (now - start):.1f} photos/s')
                asked = now
        settle(losses, progress)
        if not all(weight.isfinite().all() for weight in net.parameters()):
            raise FloatingPointError(f'a weight is not finite {not_finite(progress)}')
        progress.loss_sum, progress.photos = distributed.total(progress.loss_sum, progress.photos)
        if stopping:
            raise Stopped
        if not progress.photos:
            raise RequestError('none of the photos could be read')
        loss = progress.loss_sum / progress.photos
        if writer:
            writer.add_scalar('training loss', loss, progress.epoch + 1)
    return loss


def take_step(model, optimizer, precision, x, y, photos):
    """One step on this process's share of `photos` photos; returns the sum of their losses.

    Processes average their gradients: what is differentiated makes that the mean over all photos.
    """
    with precision.autocast:
        errors = F.mse_loss(model(x), y, reduction='sum') / y.shape[1:].numel()
    optimizer.zero_grad()
    precision.scaler.scale(errors * distributed.world / photos).backward()
    precision.scaler.step(optimizer)
    precision.scaler.update()
    return errors.detach()


def progress_bar(loader, progress):
    """Steps and the time left of an epoch; silent in a log file, and in all but one process."""
    return tqdm(loader, f'epoch {progress.epoch + 1}', len(loader), initial=progress.step,
                unit=' steps', leave=False, disable=None if distributed.rank == 0 else True)


def settle(losses, progress):
    """Adds up the losses of the last steps; only here does the host wait for the device."""
    steps, values = zip(*losses, strict=True) if losses else ((), ())
    for step, loss in zip(steps, torch.stack(values).tolist() if values else (), strict=True):
        if not math.isfinite(loss):
            raise FloatingPointError(f'the loss is {loss} {not_finite(progress, step)}')
        progress.loss_sum += loss
    losses.clear()


def not_finite(progress, step=None):
    """Where, and what to do."""
    return (f'at step {step or progress.step} of epoch {progress.epoch + 1}; the last good weights '
            'and checkpoint are kept: --resume with a smaller --lr or --precision fp32')


@torch.no_grad()
def evaluate(net, loader, precision, stop):
    """Means over all photos of `loader`, over all processes: a dict of METRICS.

    The PSNR of the prediction as it is, of the prediction with the photo's own luminance, and of
    the grey copy, which is to be beaten. Raises Stopped.
    """
    net.eval()
    sums = torch.zeros(len(METRICS) + 1, dtype=torch.float64)
    for x, y in loader:
        if distributed.total(stop.number)[0]:
            raise Stopped
        with precision.autocast:
            prediction = net(x)
        prediction, gray = prediction.float(), (x + 1) / 2
        values = torch.stack([
            (prediction - y).square().flatten(1).mean(1),
            psnr(prediction.clamp(0, 1), y),
            psnr(with_luminance(prediction, gray), y),
            psnr(gray.expand_as(y), y),
            colorfulness(prediction.clamp(0, 1)),
            colorfulness(y),
            torch.ones(len(x), device=x.device),
        ])
        sums += values.sum(1).cpu()
    *sums, photos = distributed.total(*sums.tolist())
    if not photos:
        raise RequestError('none of the held-out photos could be read')
    return {name: value / photos for name, value in zip(METRICS, sums, strict=True)}


# ---------------------------------------------------------------------------- the run

def new_state(args, settings, checkpoint, device, precision):
    """Network, optimizer and progress: new from the seed, or as the checkpoint has them."""
    torch.manual_seed(args.seed)
    net = channels_last(UNet(), device)
    optimizer = torch.optim.Adam(net.parameters(), args.lr, fused=device.type != 'mps')
    state = State(net, optimizer, precision.scaler, Progress(), settings)
    if checkpoint:
        state.restore(checkpoint)
        for group in optimizer.param_groups:
            group['lr'] = args.lr
        if distributed.rank:  # the sums over all processes are the first one's to carry on
            state.progress.loss_sum = state.progress.photos = 0
    return state


def keep_best(weights, net, scalars, progress):
    """Writes unet.pth where this epoch is the best so far, or nothing is held out to tell."""
    if 'validation loss' in scalars:
        if not scalars['validation loss'] < progress.best:
            return
        progress.best = scalars['validation loss']
    state = plain_state_dict(net)
    # another run may have written it, since this one was stopped too
    if digest(weights) != progress.saved and (kept := set_aside(weights, state)):
        say(f'the {weights.name} that was here is now {kept.name}')
    save_whole(weights, state)
    progress.saved = digest(weights)


def fit(args, folder, weights, state, precision, loaders, stop):
    """Epoch after epoch: train, validate, save, show. Returns the last epoch's scalars."""
    net, progress, scalars = state.net, state.progress, {}
    model = DistributedDataParallel(net) if distributed.world > 1 else net
    loader, held, samples = loaders
    writer = open_page(folder, args, progress, METRICS) if distributed.rank == 0 else None
    while progress.epoch < args.epochs:
        loader.epoch, loader.start = progress.epoch, progress.step
        start, before = time.perf_counter(), progress.photos
        scalars = {'training loss': train(net, state.optimizer, loader, 1, model=model,
                                          precision=precision, progress=progress, stop=stop)}
        speed = (progress.photos - before) / (time.perf_counter() - start)
        if held:
            scalars |= evaluate(net, held, precision, stop)
            if not math.isfinite(scalars['validation loss']):
                raise FloatingPointError(f'the validation loss is {scalars["validation loss"]} '
                                         f'{not_finite(progress)}')
        scalars |= {'learning rate': args.lr, 'photos per second': speed}
        progress.finish_epoch()
        if distributed.rank == 0:
            keep_best(weights, net, scalars, progress)
            if writer:
                decorate(log_epoch, writer, net, samples, precision, scalars, progress.epoch)
            # last: a run killed before this repeats the epoch, and what it logged is taken back
            state.save(folder / 'checkpoint.pth')
            say(describe(progress.epoch, args.epochs, scalars))
    if writer:
        decorate(writer.close)
    return scalars


def run(args, home, stop):
    """One run, from the photos to the weights, below the folder `home`; returns the exit code."""
    device, weights = choose_device(args.device, distributed.local_rank), home / 'unet.pth'
    distributed.start(device)
    if args.demo and distributed.rank == 0:
        draw_landscapes(args.data_path)
    distributed.from_first(None)  # the others wait for the drawings
    names, training, validation, settings = split(args)
    if weights.is_dir():
        raise RequestError(f'{weights} is a folder, but the weights need that name; move it away')
    folder = checkpoint = None
    if distributed.rank == 0:
        folder = run_folder(home / 'runs', args)
        checkpoint = load_checkpoint(folder / 'checkpoint.pth', settings) if args.resume else None
    folder, checkpoint = distributed.from_first((folder, checkpoint))
    precision = Precision(args.precision, device)
    state = new_state(args, settings, checkpoint, device, precision)
    say(f'{describe_device(device)}, {precision.name}: {len(training)} photos to train on, '
        f'{len(validation)} held out; logging in {folder}')
    if state.progress.epoch >= args.epochs:
        say(f'this run is finished: {weights} has its weights, more --epochs would go on with it')
        return 0
    loaders = make_loaders(args, names, training, validation, device)
    if args.compile:
        state.net.compile()
    try:
        stop.nothing_to_save = False
        scalars = fit(args, folder, weights, state, precision, loaders, stop)
    except Stopped:
        if distributed.rank == 0:
            state.save(folder / 'checkpoint.pth')
        say(f'stopped in epoch {state.progress.epoch + 1} after step {state.progress.step}; '
            + ('nothing of a dry run is kept' if args.dry_run else
               f'to go on: {same_command(folder.name)} --resume'))
        return 128 + (stop.number or signal.SIGTERM)
    if skipped := int(distributed.total(len(loaders[0].photos.skipped))[0]):
        say(f'{skipped} of {len(names)} photos could not be read and were skipped')
    return finish(args, weights, scalars)


def same_command(name):
    """The command line of this run, without its --resume."""
    words = [word for word in sys.argv if word != '--resume']
    return shlex.join(['python', *words, '--name', name])


def finish(args, weights, scalars):
    """Says what was reached and what comes next; returns the exit code."""
    if args.dry_run:
        say('the dry run went through everything, and kept nothing')
        return 0
    say(f'the weights are in {weights}. Next:\n'
        '    tensorboard --logdir runs --port 8898    # then open http://localhost:8898\n'
        f'    python predict.py {shlex.quote(args.data_path)} --output colorized')
    if args.demo and 'PSNR/prediction' in scalars:
        gain = scalars['PSNR/prediction'] - scalars['PSNR/gray copy']
        if gain < DEMO_GAIN:
            say(f'but the network does not colorize: {gain:.1f} dB over the grey copy, not '
                f'{DEMO_GAIN:g} (--epochs {args.epochs})', file=sys.stderr)
            return 1
        say(f'The network colorizes: {gain:.1f} dB over the grey copy, {DEMO_GAIN:g} were asked.')
    return 0


def main(argv=None):
    args = parse_args(argv)
    sys.stdout.reconfigure(errors='backslashreplace')  # names need not be printable
    stop = StopSignal()
    keep_freed_memory()
    try:
        with tempfile.TemporaryDirectory() if args.dry_run else nullcontext('') as home:
            code = run(args, Path(home), stop)
        distributed.end()
        return code
    except (RequestError, OSError, ArithmeticError, MemoryError, RuntimeError) as error:
        code, line = fault(error, args)
        if not code:
            raise
        print(f'colorize.py: {line}', file=sys.stderr)
        return code


if __name__ == '__main__':
    sys.exit(main())
