"""How fast it is, each time against something measured beside it: A B A B ..., medians.

    python benchmarks/speed.py training --data_path PHOTOS --reference REFERENCE.py
    python benchmarks/speed.py quality --data_path PHOTOS --val_path OTHERS --reference REFERENCE.py
    python benchmarks/speed.py decoding --data_path PHOTOS
    python benchmarks/speed.py network                         # against what the device can do
    python benchmarks/speed.py start --data_path PHOTOS        # where the first seconds and MB go
    python benchmarks/speed.py processes --data_path PHOTOS    # two, one core or GPU each, or one

REFERENCE.py is a plain training script with the flags --data_path, --val_path, --batch_size,
--epochs, --limit and --num_workers that prints a JSON line at the end: `epochs`, a list with
`seconds` and `images_per_s` of each, and `val_psnr`. With --photos N, N photos of 256×256 are cut
from PHOTOS first. Each measurement runs in a process of its own.
"""
import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

START = time.perf_counter()
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from device import (  # noqa: E402
    Precision,
    channels_last,
    choose_device,
    describe_device,
    keep_freed_memory,
)
from loading import PhotoFiles, PhotoLoader, PhotosInMemory  # noqa: E402
from PIL import ImageOps  # noqa: E402
from torch.nn.functional import mse_loss  # noqa: E402
from torchvision.datasets.folder import default_loader  # noqa: E402

import colorize  # noqa: E402
from data_utils import get_colorized_dataset_loader, list_photos, load_photo  # noqa: E402
from unet import UNet  # noqa: E402

MULTIPLY_ADDS = 8.1e9  # of one 224×224 photo, forward; three times that with the backward pass
BYTES = 0.4e9          # its bfloat16 activations, each written and read once, forward and backward


def table(title, rows):
    print(f'\n{title}')
    for row in rows:
        print('| ' + ' | '.join(str(cell) for cell in row) + ' |', flush=True)


def reference(args, *flags):
    """The reference script's report."""
    done = subprocess.run([sys.executable, args.reference, '--data_path', args.data_path,
                           '--batch_size', str(args.batch_size), *map(str, flags)],
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def ours(part, args, **more):
    """What `part` of this file measures, in a new process."""
    flags = dict(vars(args), **more)
    done = subprocess.run([sys.executable, __file__, f'_{part}', json.dumps(flags)],
                          stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_mb(device):
    device_peak = torch.cuda.max_memory_allocated() / 1e6 if device.type == 'cuda' else 0
    return [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, device_peak]


# ---------------------------------------------------------------------------- training

def _training(args):
    """Seconds to read the photos and of each epoch; the held-out PSNR after it, where asked."""
    keep_freed_memory()
    torch.manual_seed(0)
    device = choose_device('auto')
    precision = Precision('auto', device)
    start = time.perf_counter()
    names = list_photos(args.data_path)[:args.limit]
    photos = PhotosInMemory(PhotoFiles(args.data_path, names, 224, args.num_workers), device)
    read = time.perf_counter() - start
    loader = PhotoLoader(photos, list(range(len(names))), args.batch_size, device, seed=0)
    net = channels_last(UNet(), device)
    if args.compile:
        net.compile()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
    held = None
    if args.val_path:
        held = list_photos(args.val_path)
        held = PhotosInMemory(PhotoFiles(args.val_path, held, 224, args.num_workers), device)
        held = PhotoLoader(held, list(range(len(held.photos))), args.batch_size, device)
    epochs, scores = [], []
    for epoch in range(args.epochs):
        start, loader.epoch = time.perf_counter(), epoch
        colorize.train(net, optimizer, loader, 1, precision=precision)
        epochs.append(time.perf_counter() - start)
        if held:
            stop = argparse.Namespace(number=0)
            scores.append(colorize.evaluate(net, held, precision, stop)['PSNR/prediction'])
        if scores and scores[-1] >= args.until:
            break
    return dict(read=read, epochs=epochs, photos=len(names), scores=scores, peak=peak_mb(device),
                total=time.perf_counter() - START)


def training(args):
    """Photos per second end to end: with the reading on a CPU, from the second epoch on a GPU."""
    gpu = torch.cuda.is_available()
    args.epochs = 3 if gpu else 1
    rates = {'reference': [], 'this project': []}
    for _ in range(args.repeat):
        report = reference(args, '--epochs', args.epochs, *(['--limit', args.limit]
                                                            if args.limit else []))
        seconds = [epoch['seconds'] for epoch in report['epochs']]
        rates['reference'].append(report['photos'] * len(seconds[gpu:]) / sum(seconds[gpu:]))
        own = ours('training', args)
        seconds = own['epochs'][1:] if gpu else [own['read'] + own['epochs'][0]]
        rates['this project'].append(own['photos'] * len(seconds) / sum(seconds))
    a, b = (median(rate) for rate in rates.values())
    table(f'training, photos/s, batch {args.batch_size}, 224×224, {own["photos"]} photos',
          [[name, *(f'{rate:.2f}' for rate in row)] for name, row in rates.items()]
          + [['ratio of the medians', f'{b / a:.1f}×']])


def quality(args):
    """Time until the reference's held-out PSNR after its epochs, reading and start included."""
    start = time.perf_counter()
    report = reference(args, '--epochs', args.epochs, '--val_path', args.val_path,
                       *(['--limit', args.limit] if args.limit else []))
    whole, goal = time.perf_counter() - start, report['val_psnr']
    start = time.perf_counter()
    own = ours('training', args, until=goal, epochs=10 * args.epochs)
    seconds = time.perf_counter() - start
    table(f'seconds until a held-out PSNR of {goal:.2f} dB', [
        ['reference', f'{whole:.0f}', f'{args.epochs} epochs'],
        ['this project', f'{seconds:.0f}', f'{len(own["scores"])} epochs',
         f'{own["scores"][-1]:.2f} dB'],
        ['ratio', f'1/{whole / seconds:.1f}']])


# ---------------------------------------------------------------------------- decoding

def decoding(args):
    """Photos per second on one core: an epoch of the course's loader, and the one reading here."""
    torch.set_num_threads(1)
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    names = list_photos(args.data_path)
    with tempfile.TemporaryDirectory() as folder:
        for n, name in enumerate(names[:6]):
            photo = ImageOps.fit(load_photo(os.path.join(args.data_path, name)), (4000, 3000))
            photo.save(f'{folder}/{n}.jpg', quality=90)
        for title, root in ('as they are', args.data_path), ('12-megapixel JPEGs', folder):
            names, rates = list_photos(root), ([], [])
            loader = get_colorized_dataset_loader(root, batch_size=args.batch_size)
            loader.dataset.loader = default_loader  # torchvision's, as in the course
            for _ in range(max(3, args.repeat)):
                start = time.perf_counter()
                for _ in loader:
                    pass
                rates[0].append(len(names) / (time.perf_counter() - start))
                start = time.perf_counter()
                PhotosInMemory(PhotoFiles(root, names, 224, num_workers=1), torch.device('cpu'))
                rates[1].append(len(names) / (time.perf_counter() - start))
            a, b = (median(rate) for rate in rates)
            table(f'decoding, photos/s on one core, {len(names)} photos {title}',
                  [['reference pipeline', f'{a:.1f}'], ['this project', f'{b:.1f}'],
                   ['ratio', f'{b / a:.1f}×']])


# ---------------------------------------------------------------------------- network

def seconds_of(act, device, repeat=5):
    """The median time of `act`, after a warm-up, the device's queue emptied."""
    times = []
    for _ in range(repeat + 2):
        start = time.perf_counter()
        act()
        if device.type == 'cuda':
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[2:])


def floor(device):
    """(seconds of a training step per photo that nothing beats, copy GB/s, TFLOP/s), measured."""
    dtype = dict(bf16=torch.bfloat16, fp16=torch.float16)[Precision('auto', device).name] \
        if Precision('auto', device).name != 'fp32' else torch.float32
    side = 8192 if device.type == 'cuda' else 2048
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    source = torch.empty(2 ** 30 if device.type == 'cuda' else 2 ** 28, dtype=torch.uint8,
                         device=device)
    target = torch.empty_like(source)
    flops = 2 * side ** 3 / seconds_of(lambda: matrix @ matrix, device)
    rate = 2 * source.numel() / seconds_of(lambda: target.copy_(source), device)
    return max(6 * MULTIPLY_ADDS / flops, BYTES / rate), rate / 1e9, flops / 1e12


def _network(args):
    """Photos per second of training steps on one batch that is there already."""
    keep_freed_memory()
    device = choose_device('auto')
    precision = Precision('auto', device)
    net = channels_last(UNet(), device)
    if args.compile:
        net.compile()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
    y = torch.rand(args.batch_size, 3, 224, 224, device=device)
    y = y.contiguous(memory_format=torch.channels_last)
    x = y.mean(1, keepdim=True) * 2 - 1

    def step():
        with precision.autocast:
            loss = mse_loss(net(x), y)
        optimizer.zero_grad()
        precision.scaler.scale(loss).backward()
        precision.scaler.step(optimizer)
        precision.scaler.update()

    rate = args.batch_size / seconds_of(step, device, 20 if device.type == 'cuda' else 3)
    return dict(rate=rate, peak=peak_mb(device))


def network(args):
    """The best batch size, eager and compiled, against the floor."""
    device = choose_device('auto')
    least, copy, flops = floor(device)
    sizes = (16, 32, 64, 128, 256) if device.type == 'cuda' else (8, 32)
    rows = [['copy', f'{copy:.0f} GB/s'], ['matrix product', f'{flops:.2f} TFLOP/s'],
            ['floor', f'{1 / least:.1f} photos/s']]
    for compiled in (False, True) if device.type == 'cuda' else (False,):
        for size in sizes:
            own = ours('network', args, compile=compiled, batch_size=size)
            rows.append(['compiled' if compiled else 'eager', f'batch {size}',
                         f'{own["rate"]:.1f} photos/s', f'{100 * own["rate"] * least:.0f} %',
                         '{:.0f} MB host, {:.0f} MB device'.format(*own['peak'])])
    table('training steps, 224×224, and the part of the floor they reach', rows)


# ---------------------------------------------------------------------------- start

def _start(args):
    imported = time.perf_counter() - START
    keep_freed_memory()
    begun = time.perf_counter()
    device = choose_device('auto')
    names = list_photos(args.data_path)[:args.limit]
    listed = time.perf_counter()
    photos = PhotosInMemory(PhotoFiles(args.data_path, names, 224, args.num_workers), device)
    read = time.perf_counter()
    loader = PhotoLoader(photos, list(range(len(names)))[:args.batch_size], args.batch_size, device)
    net = channels_last(UNet(), device)
    colorize.train(net, torch.optim.Adam(net.parameters(), fused=True), loader, 1,
                   precision=Precision('auto', device))
    return dict(imports=imported, listing=listed - begun, reading=read - listed,
                first_step=time.perf_counter() - read, peak=peak_mb(device))


def start(args):
    own = ours('start', args)
    peak = own.pop('peak')
    table('seconds until the first training step is done',
          [[name, f'{seconds:.1f}'] for name, seconds in own.items()]
          + [['together', f'{sum(own.values()):.1f}'],
             ['peak', '{:.0f} MB host, {:.0f} MB device'.format(*peak)]])


# ---------------------------------------------------------------------------- processes

def processes(args):
    """Photos per second in the second epoch of one process, and of two with as much each."""
    rates = {'one process': [], 'two processes': []}
    for _ in range(args.repeat):
        for count, name in enumerate(rates, 1):
            with tempfile.TemporaryDirectory() as home:
                done = subprocess.run(
                    [sys.executable, '-m', 'torch.distributed.run', '--standalone',
                     f'--nproc_per_node={count}', colorize.__file__, '--val_fraction', '0',
                     '--data_path', Path(args.data_path).absolute(), '--epochs', '2',
                     '--batch_size', str(args.batch_size)], cwd=home, stdout=subprocess.PIPE,
                    check=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
            rates[name].append(float(re.findall(r'([0-9.]+) photos/s', done.stdout)[-1]))
    one, two = (median(rate) for rate in rates.values())
    table(f'training, photos/s, batch {args.batch_size} over all processes, 224×224',
          [[name, *row] for name, row in rates.items()]
          + [['ratio of the medians', f'{two / one:.2f}×']])


def cut(source, count, folder):
    """`count` photos of 256×256 from those in `source`: crops, each second one mirrored."""
    names = list_photos(source)
    for n in range(count):
        photo = load_photo(os.path.join(source, names[n % len(names)]))
        turn = n // len(names)
        left, top = (turn * 37) % (photo.width - 255), (turn * 61) % (photo.height - 255)
        photo = photo.crop((left, top, left + 256, top + 256))
        (ImageOps.mirror(photo) if turn % 2 else photo).save(f'{folder}/{n:05}.jpg', quality=90)


def main():
    if sys.argv[1:] and sys.argv[1].startswith('_'):  # a measurement's own process
        args = argparse.Namespace(**json.loads(sys.argv[2]))
        print(json.dumps(globals()[sys.argv[1]](args)))
        return
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=(
        'training', 'quality', 'decoding', 'network', 'start', 'processes'))
    parser.add_argument('--data_path')
    parser.add_argument('--val_path', default='')
    parser.add_argument('--reference')
    parser.add_argument('--photos', type=int, help='cut so many of 256×256 and measure with those')
    parser.add_argument('--limit', type=int, help='use the first LIMIT photos only')
    parser.add_argument('--batch_size', type=int, default=32)
    parser.add_argument('--epochs', type=int, default=10, help="the reference's, for quality")
    parser.add_argument('--repeat', type=int, default=3)
    parser.add_argument('--compile', action='store_true')
    args = parser.parse_args()
    args.num_workers, args.until = min(8, os.cpu_count()), float('inf')
    print(f'{time.strftime("%Y-%m-%d")}, {describe_device(choose_device("auto"))}, '
          f'torch {torch.__version__}: python {" ".join(sys.argv)}')
    with tempfile.TemporaryDirectory() as folder:
        if args.photos:
            (Path(folder) / 'photos').mkdir()
            cut(args.data_path, args.photos, f'{folder}/photos')
            args.data_path = folder
        globals()[args.what](args)


if __name__ == '__main__':
    main()
