"""How fast it is, each time against something measured beside it: A B A B ..., medians.

    python benchmarks/speed.py training --data_path PHOTOS     # photos/s, beside a plain script
    python benchmarks/speed.py quality --data_path PHOTOS --val_path OTHERS     # seconds to a PSNR
    python benchmarks/speed.py decoding --data_path PHOTOS     # photos/s read on one core
    python benchmarks/speed.py network                         # steps, against what a device can do
    python benchmarks/speed.py start --data_path PHOTOS        # where the first seconds and MB go
    python benchmarks/speed.py processes --data_path PHOTOS    # two, one core or GPU each, or one

The plain script is benchmarks/reference.py, or any other that takes its flags and prints its line
of JSON. With --photos N, N photos of 256×256 are cut from PHOTOS first. Each measurement runs in a
process of its own; one that fails is a row that says so.
"""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from statistics import median
from types import SimpleNamespace

START = time.perf_counter()
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
from PIL import ImageOps  # noqa: E402
from torchvision.datasets.folder import default_loader  # noqa: E402
from upsampling import use_matmul  # noqa: E402

import colorize  # noqa: E402
from colorize import Recipe  # noqa: E402
from data_utils import (  # noqa: E402
    PhotoFolder,
    PhotoLoader,
    get_colorized_dataset_loader,
    list_photos,
    load_photo,
    load_photos,
)
from unet import UNet  # noqa: E402
from utils import cli  # noqa: E402
from utils.checkpoint import Progress  # noqa: E402
from utils.device import (  # noqa: E402
    Precision,
    channels_last,
    choose_device,
    describe_device,
    keep_memory,
)

MULTIPLY_ADDS = 8.1e9  # of one 224×224 photo, forward; three times that with the backward pass
BYTES = 0.4e9  # its bfloat16 activations, each written and read once, forward and backward
MODES = {'eager': None, 'compiled': {}, 'CUDA-graphs': dict(mode='reduce-overhead')}


class MeasurementFailed(Exception):
    """A measurement's process has failed. The message is one line that says why."""


def table(title, rows):
    """Print rows of cells as a Markdown table."""
    width = max(map(len, rows))
    print(f'\n{title}\n\n|' + ' |' * width + '\n|' + '---|' * width)
    for row in rows:
        print('| ' + ' | '.join(map(str, [*row, *[''] * (width - len(row))])) + ' |', flush=True)


def json_of(*command, **kwargs):
    """Run a command, and return what the JSON in its last line says. Raises MeasurementFailed."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True, **kwargs
    )
    try:
        result = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise MeasurementFailed(
            f'{Path(command[0]).name} failed: exit code {done.returncode}'
        ) from None
    if 'error' in result:
        raise MeasurementFailed(result['error'])
    return result


def reference(args, *flags):
    """Return the reference script's report."""
    for name in 'limit', 'image_size':
        if value := getattr(args, name):
            flags += f'--{name}', value
    return json_of(
        args.reference, '--data_path', args.data_path, '--batch_size', args.batch_size, *flags
    )


def measure(part, args, **more):
    """Return what a function of MEASUREMENTS measures, in a new process."""
    return json_of(__file__, 'measure', part, json.dumps({**vars(args), **more}))


def measurement(part, args):
    """Print, in the new process, the measurement as JSON, or why it failed."""
    try:
        result = MEASUREMENTS[part](args)
    except Exception as error:
        code, line = cli.explain_error(error, args.batch_size)
        if not code:
            raise
        result = dict(error=line)
    print(json.dumps(result))


def peak_mb(device):
    """Return the most memory that this process had, in MB: of the host, and of the device."""
    device_peak = torch.cuda.max_memory_allocated() / 1e6 if device.type == 'cuda' else 0
    return [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, device_peak]


def mb(peak):
    return '{:.0f} MB host, {:.0f} MB device'.format(*peak)


def photos_in_memory(args, root, device, limit=None):
    """Return the first `limit` photos below `root`, in memory."""
    folder = PhotoFolder(root, args.image_size, args.num_workers)
    folder.keep(list(range(len(folder)))[:limit], [])
    return load_photos(folder, torch.device(device))


def new_network(args, device):
    """Return a UNet, and its optimizer, for the arguments upsample and mode."""
    torch.manual_seed(0)
    net = UNet()
    if args.upsample == 'matmul':
        use_matmul(net, args.image_size)
    net = channels_last(net, device)
    if args.mode != 'eager':
        net.compile(dynamic=False, **MODES[args.mode])
    return net, torch.optim.Adam(net.parameters(), 1e-3, fused=device.type != 'mps')


# ---------------------------------------------------------------------------- training


def measure_training(args):
    """Seconds to read the photos and of each epoch; the held-out PSNR after it, where asked."""
    keep_memory()
    device = choose_device('auto')
    precision = Precision(args.precision, device)
    start = time.perf_counter()
    photos = photos_in_memory(args, args.data_path, device, args.limit)
    read = time.perf_counter() - start
    loader = PhotoLoader(photos, range(len(photos.photos)), args.batch_size, device, seed=0)
    held_out = None
    if args.val_path:
        held_out = photos_in_memory(args, args.val_path, device)
        held_out = PhotoLoader(held_out, range(len(held_out.photos)), args.batch_size, device)
    net, optimizer = new_network(args, device)
    epochs, scores = [], []
    for epoch in range(args.epochs):
        start, loader.epoch = time.perf_counter(), epoch
        colorize.train_epoch(net, optimizer, loader, Progress(epoch), Recipe(precision))
        epochs.append(time.perf_counter() - start)
        if held_out:
            metrics = colorize.evaluate(net, held_out, precision, SimpleNamespace(signum=0))
            scores.append(metrics['PSNR of prediction'])
            if args.until and scores[-1] >= args.until:
                break
    return dict(
        read=read, epochs=epochs, photos=len(photos.photos), scores=scores, peak=peak_mb(device)
    )


def training(args):
    """Photos per second end to end: with the reading on a CPU, from the second epoch on a GPU."""
    gpu = torch.cuda.is_available()
    epochs = 3 if gpu else 1
    rates = {'reference': [], 'this project': []}
    for _ in range(args.repeat):
        report = reference(args, '--epochs', epochs)
        seconds = [epoch['seconds'] for epoch in report['epochs']][gpu:]
        rates['reference'].append(report['photos'] * len(seconds) / sum(seconds))
        own = measure('training', args, epochs=epochs, val_path='')
        seconds = own['epochs'][1:] if gpu else [own['read'] + own['epochs'][0]]
        rates['this project'].append(own['photos'] * len(seconds) / sum(seconds))
    a, b = (median(rate) for rate in rates.values())
    table(
        f'training, photos/s, batch {args.batch_size}, {square(args)}, {own["photos"]} photos, '
        f'{args.mode}',
        [[name, *(f'{rate:.2f}' for rate in row)] for name, row in rates.items()]
        + [['ratio of the medians', f'{b / a:.1f}×'], ['peak', mb(own['peak'])]],
    )


def quality(args):
    """Time until the reference's held-out PSNR after its epochs, reading and start included."""
    if not args.val_path:
        raise cli.UsageError('quality needs --val_path, a folder of photos to measure the PSNR on')
    start = time.perf_counter()
    report = reference(args, '--epochs', args.epochs, '--val_path', args.val_path)
    whole, goal = time.perf_counter() - start, report['val_psnr']
    start = time.perf_counter()
    own = measure('training', args, until=goal, epochs=10 * args.epochs)
    seconds, best = time.perf_counter() - start, max(own['scores'])
    table(
        f'seconds until a held-out PSNR of {goal:.2f} dB',
        [
            ['reference', f'{whole:.0f}', f'{args.epochs} epochs'],
            ['this project', f'{seconds:.0f}', f'{len(own["scores"])} epochs', f'{best:.2f} dB'],
            ['ratio', f'1/{whole / seconds:.1f}' if best >= goal else 'not reached'],
        ],
    )


def square(args):
    return f'{args.image_size}×{args.image_size}'


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
        for title, root, limit in (
            ('as they are', args.data_path, args.limit),
            ('12-megapixel JPEGs', folder, args.limit),
        ):
            rates = [], []
            loader = get_colorized_dataset_loader(root, batch_size=args.batch_size)
            loader.dataset.samples = loader.dataset.samples[:limit]
            loader.dataset.loader = default_loader  # torchvision's, as in the course
            for _ in range(args.repeat):
                for rate, read in zip(
                    rates,
                    (
                        lambda loader=loader: deque(loader, maxlen=0),
                        lambda root=root, limit=limit: photos_in_memory(
                            SimpleNamespace(image_size=224, num_workers=1), root, 'cpu', limit
                        ),
                    ),
                    strict=True,
                ):
                    start = time.perf_counter()
                    read()
                    rate.append(len(loader.dataset) / (time.perf_counter() - start))
            a, b = map(median, rates)
            table(
                f'decoding, photos/s on one core, {len(loader.dataset)} photos {title}',
                [
                    ['reference pipeline', f'{a:.1f}'],
                    ['this project', f'{b:.1f}'],
                    ['ratio', f'{b / a:.1f}×'],
                ],
            )


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


def measure_floor(args):
    """Copies in GB/s, matrix products in TFLOP/s, and the photos/s that no training step beats."""
    device = choose_device('auto')
    precision = Precision(args.precision, device).name
    side, size = (8192, 2**30) if device.type == 'cuda' else (1024, 2**27)
    matrix = torch.randn(
        side,
        side,
        device=device,
        dtype=dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)[precision],
    )
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    flops = 2 * side**3 / seconds_of(lambda: matrix @ matrix, device)
    rate = 2 * size / seconds_of(lambda: target.copy_(source), device)
    pixels = (args.image_size / 224) ** 2
    wide = 2 if precision == 'fp32' else 1
    seconds = pixels * max(6 * MULTIPLY_ADDS / flops, wide * BYTES / rate)
    return dict(copy=rate / 1e9, matrix=flops / 1e12, floor=1 / seconds, precision=precision)


def new_step(args, device):
    """Return a function that takes a training step, on one batch that is there already."""
    net, optimizer = new_network(args, device)
    precision = Precision(args.precision, device)
    y = torch.rand(args.batch_size, 3, args.image_size, args.image_size, device=device)
    y = y.contiguous(memory_format=torch.channels_last)
    batch = y.mean(1, keepdim=True) * 2 - 1, y
    return lambda: colorize.train_step(net, optimizer, Recipe(precision), batch, args.batch_size)


def measure_network(args):
    """Photos per second of training steps."""
    keep_memory()
    device = choose_device('auto')
    seconds = seconds_of(new_step(args, device), device, 20 if device.type == 'cuda' else 3)
    return dict(rate=args.batch_size / seconds, peak=peak_mb(device))


def network(args):
    """Each way of computing, with each batch size, against the floor."""
    gpu = torch.cuda.is_available()
    floor = measure('floor', args)
    rows = [
        ['copy', f'{floor["copy"]:.0f} GB/s'],
        ['matrix product', f'{floor["matrix"]:.2f} TFLOP/s'],
        ['floor', f'{floor["floor"]:.1f} photos/s'],
    ]
    for mode in args.modes or (MODES if gpu else ['eager']):
        for size in args.batch_sizes or ((16, 32, 64, 128, 256) if gpu else (8, 32)):
            try:
                own = measure('network', args, mode=mode, batch_size=size)
                cells = [
                    f'{own["rate"]:.1f} photos/s',
                    f'{own["rate"] / floor["floor"]:.0%}',
                    mb(own['peak']),
                ]
            except MeasurementFailed as failure:
                cells = [str(failure)]
            rows.append([f'{mode}, batch {size}', *cells])
    table(
        f'training steps, {square(args)}, {floor["precision"]}, upsampling by {args.upsample}, '
        'and the part of the floor that they reach',
        rows,
    )


# ---------------------------------------------------------------------------- start


def measure_start(args):
    """Seconds of each part until the first step is done."""
    imported = time.perf_counter() - START
    keep_memory()
    begun = time.perf_counter()
    device = choose_device('auto')
    photos = photos_in_memory(args, args.data_path, device, args.limit)
    read = time.perf_counter()
    first = range(len(photos.photos))[: args.batch_size]
    loader = PhotoLoader(photos, first, args.batch_size, device)
    net, optimizer = new_network(args, device)
    recipe = Recipe(Precision(args.precision, device))
    colorize.train_epoch(net, optimizer, loader, Progress(), recipe)
    return dict(
        imports=imported,
        reading=read - begun,
        first_step=time.perf_counter() - read,
        peak=peak_mb(device),
    )


def start(args):
    """Where the first seconds go, and the memory."""
    own = measure('start', args)
    peak = own.pop('peak')
    table(
        'seconds until the first training step is done',
        [[name.replace('_', ' '), f'{seconds:.1f}'] for name, seconds in own.items()]
        + [['together', f'{sum(own.values()):.1f}'], ['peak', mb(peak)]],
    )


# ---------------------------------------------------------------------------- processes


def processes(args):
    """Photos per second in the second epoch of one process, and of two with as much each."""
    rates = {'one process': [], 'two processes': []}
    for _ in range(args.repeat):
        for count, name in enumerate(rates, 1):
            with tempfile.TemporaryDirectory() as home:
                done = subprocess.run(
                    [
                        sys.executable,
                        '-m',
                        'torch.distributed.run',
                        '--standalone',
                        f'--nproc_per_node={count}',
                        colorize.__file__,
                        '--val_fraction',
                        '0',
                        '--data_path',
                        Path(args.data_path).absolute(),
                        '--epochs',
                        '2',
                        '--image_size',
                        str(args.image_size),
                        '--small_steps',
                        '0',
                        '--batch_size',
                        str(args.batch_size),
                    ],
                    cwd=home,
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, 'OMP_NUM_THREADS': '1'},
                )
            if done.returncode:
                raise MeasurementFailed(f'{name} failed: exit code {done.returncode}')
            rates[name].append(
                float(re.findall(r'^ +2/2 .* ([0-9.]+)(?: \*)?$', done.stdout, re.MULTILINE)[-1])
            )
    one, two = (median(rate) for rate in rates.values())
    table(
        f'training, photos/s, batch {args.batch_size} over all processes, {square(args)}',
        [[name, *row] for name, row in rates.items()]
        + [['ratio of the medians', f'{two / one:.2f}×']],
    )


# ---------------------------------------------------------------------------- command line

PARTS = dict(
    training=training,
    quality=quality,
    decoding=decoding,
    network=network,
    start=start,
    processes=processes,
)
MEASUREMENTS = dict(
    training=measure_training, floor=measure_floor, network=measure_network, start=measure_start
)


def cut(source, count, folder):
    """Save `count` photos of 256×256 from those in `source`: crops, each second one mirrored."""
    names = list_photos(source)
    for n in range(count):
        photo = load_photo(os.path.join(source, names[n % len(names)]))
        if min(photo.size) < 256:
            photo = ImageOps.fit(photo, (256, 256))
        turn = n // len(names)
        left, top = (turn * 37) % (photo.width - 255), (turn * 61) % (photo.height - 255)
        photo = photo.crop((left, top, left + 256, top + 256))
        (ImageOps.mirror(photo) if turn % 2 else photo).save(f'{folder}/{n:05}.jpg', quality=90)


def parse_args(argv):
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('part', choices=PARTS, nargs='?', help='what to measure')
    add('--data_path', default='data/landscapes', help='a folder of photos [%(default)s]')
    add('--val_path', default='', help='photos to measure the PSNR on, for quality')
    add('--reference', default=str(HERE / 'reference.py'), help='a plain training script')
    add('--photos', type=int, help='cut so many of 256×256 and measure with those')
    add('--limit', type=int, help='use the first LIMIT photos only')
    add('--image_size', type=cli.image_size, default=224, help='[%(default)s]')
    add('--batch_size', type=cli.positive_int, default=32, help='[%(default)s]')
    add(
        '--epochs',
        type=cli.positive_int,
        default=10,
        help="the reference's, for quality [%(default)s]",
    )
    add('--repeat', type=cli.positive_int, default=3, help='[%(default)s]')
    add('--precision', choices=('auto', 'fp32', 'bf16', 'fp16'), default='auto')
    add('--mode', choices=MODES, default='eager', help='how training computes [%(default)s]')
    add('--modes', choices=MODES, nargs='+', help='for network [all on a GPU]')
    add('--batch_sizes', type=cli.positive_int, nargs='+', help='for network')
    add(
        '--upsample',
        choices=('interpolate', 'matmul'),
        default='interpolate',
        help="torch's own, or as two matrix products [%(default)s]",
    )
    args = parser.parse_args(argv)
    if not args.part:
        parser.print_help()
        parser.exit()
    args.num_workers, args.until = min(8, os.cpu_count()), None
    return args


def main():
    if sys.argv[1:2] == ['measure']:
        measurement(sys.argv[2], SimpleNamespace(**json.loads(sys.argv[3])))
        return 0
    args = parse_args(None)
    # not choose_device: measurements need all of the GPU's memory
    device = describe_device(
        torch.device('cuda', 0) if torch.cuda.is_available() else choose_device('auto')
    )
    print(
        f'{time.strftime("%Y-%m-%d")}, {device}, torch {torch.__version__}: '
        f'python {" ".join(sys.argv)}',
        flush=True,
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            if args.part != 'network':
                list_photos(args.data_path)  # raises UsageError if there are none
            if args.photos:
                cut(args.data_path, args.photos, folder)
                args.data_path = folder
            PARTS[args.part](args)
    except (MeasurementFailed, cli.UsageError) as error:
        print(f'speed.py: {error}', file=sys.stderr)
        return 2 if isinstance(error, cli.UsageError) else 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
