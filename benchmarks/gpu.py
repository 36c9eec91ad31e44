"""What only a GPU can tell. benchmarks/gpu.sh runs all of it, and this is how one part is run:

    python benchmarks/gpu.py device                       # what there is, and which versions
    python benchmarks/gpu.py upsampling                   # its backward pass, in three precisions
    python benchmarks/gpu.py profile --image_size 64      # the kernels of a training step
    python benchmarks/gpu.py epoch --data_path PHOTOS     # the parts of an epoch, in seconds
    python benchmarks/gpu.py empty                        # a process that has no photo of a batch
    python benchmarks/gpu.py split --data_path PHOTOS --output FOLDER       # links: train, val

Each part runs on a CPU, too.
"""

import os
import platform
import sys
import tempfile
import time
from functools import wraps
from pathlib import Path

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler's own messages: none
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
from speed import new_network, new_step, seconds_of, table  # noqa: E402
from torch import nn  # noqa: E402
from torch.profiler import ProfilerActivity, profile as record  # noqa: E402
from upsampling import MatmulUpsample  # noqa: E402

import colorize  # noqa: E402
from data_utils import list_photos  # noqa: E402
from utils import cli  # noqa: E402
from utils.checkpoint import RunFolder, State  # noqa: E402
from utils.device import Precision, choose_device, describe_device, free_memory  # noqa: E402
from utils.tensorboard import Page  # noqa: E402


def device(args):
    """Print the device and the versions."""
    here = choose_device('auto')
    rows = [
        ['device', describe_device(here)],
        ['date', time.strftime('%Y-%m-%d %H:%M')],
        ['memory free', f'{free_memory(here) / 1e9:.1f} GB'],
        ['processors', f'{os.cpu_count()} × {platform.machine()}'],
        ['Python', platform.python_version()],
        ['torch', torch.__version__],
        ['precision', Precision('auto', here).name],
    ]
    if here.type == 'cuda':
        rows += [
            ['compute capability', '{}.{}'.format(*torch.cuda.get_device_capability(here))],
            ['CUDA, cuDNN', f'{torch.version.cuda}, {torch.backends.cudnn.version()}'],
        ]
    table('', rows)


def upsampling(args):
    """Time the backward pass of the three upsamplings of a step, torch's and as matrix products."""
    here, rows = choose_device('auto'), []
    for dtype in torch.float32, torch.bfloat16, torch.float16:
        for channels, factor in (256, 8), (128, 4), (64, 2):
            size = args.image_size // factor
            x = torch.rand(args.batch_size, channels, size, size, device=here, dtype=dtype)
            x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
            cells = []
            for module in nn.Upsample(scale_factor=2, mode='bilinear'), MatmulUpsample(size):
                y = module.to(here, dtype)(x)
                gradient = torch.ones_like(y)
                cells.append(
                    1e3
                    * seconds_of(
                        lambda y=y, x=x, gradient=gradient: torch.autograd.grad(
                            y, x, gradient, retain_graph=True
                        ),
                        here,
                    )
                )
            rows.append(
                [
                    str(dtype),
                    f'{channels} × {size}²',
                    *(f'{ms:.2f}' for ms in cells),
                    f'{cells[0] / cells[1]:.2f}×',
                ]
            )
    table(
        f'backward pass of the upsampling in ms, batch {args.batch_size}: torch, matrix products',
        rows,
    )


def profile(args):
    """Print the kernels of a training step that take the longest."""
    here = choose_device('auto')
    step, steps = new_step(args, here), 5
    seconds = seconds_of(step, here)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (here.type == 'cuda')
    with record(activities=activities) as recorded:
        for _ in range(steps):
            step()
        if here.type == 'cuda':
            torch.cuda.synchronize()
    events = recorded.key_averages()
    launches = sum(event.count for event in events if 'LaunchKernel' in event.key) / steps
    print(
        f'a step takes {1e3 * seconds:.2f} ms without the profiler, and launches {launches:g} '
        f'kernels; of {steps} steps with it:'
    )
    by = 'self_cuda_time_total' if here.type == 'cuda' else 'self_cpu_time_total'
    print(events.table(sort_by=by, row_limit=20, max_name_column_width=60))


def measure_calls(home, name, seconds):
    """Have every call of the function `name` of `home` leave its seconds in `seconds[name]`."""
    function = getattr(home, name)

    @wraps(function)
    def call(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - start
        return result

    setattr(home, name, call)


def epoch(args):
    """Run the program on photos, and print the seconds of the last epoch's parts."""
    seconds = {}
    for home, name in (
        (colorize, 'train_epoch'),
        (colorize, 'evaluate'),
        (RunFolder, 'save_weights'),
        (Page, 'log_epoch'),
        (State, 'save'),
    ):
        measure_calls(home, name, seconds)
    data = Path(args.data_path).absolute()
    with tempfile.TemporaryDirectory() as home:
        os.chdir(home)
        code = colorize.main(
            [
                '--data_path',
                str(data),
                '--image_size',
                str(args.image_size),
                '--small_steps',
                '0',
                '--batch_size',
                str(args.batch_size),
                '--epochs',
                '3',
                '--val_fraction',
                '0.2',
                '--precision',
                args.precision,
            ]
        )
        os.chdir(HERE)
    if not code:
        table(
            f'seconds of an epoch of {len(list_photos(data))} photos, a fifth of them held out',
            [[name, f'{value:.3f}'] for name, value in seconds.items()],
        )
    return code


def empty(args):
    """Take a step without a photo, as a process with no share of a batch does."""
    here, rows = choose_device('auto'), []
    for name in 'fp32', 'bf16', 'fp16':
        net, optimizer = new_network(args, here)
        before = [weight.clone() for weight in net.parameters()]
        y = torch.empty(0, 3, args.image_size, args.image_size, device=here)
        loss = colorize.train_step(
            net, optimizer, colorize.Recipe(Precision(name, here)), (y[:, :1], y), 4
        )
        if loss != 0 or not all(map(torch.equal, before, net.parameters())):
            raise SystemExit(f'gpu.py: {name}: a step without a photo changed the weights')
        rows.append([name, 'loss 0, the weights as before'])
    table('a step without a photo', rows)


def split(args):
    """Link every tenth photo in OUTPUT/val, the others in OUTPUT/train."""
    names = list_photos(args.data_path)
    for number, name in enumerate(names):
        link = Path(args.output, 'train' if number % 10 else 'val', name)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(args.data_path, name).absolute())
    print(len(names), 'photos')


PARTS = dict(
    device=device, upsampling=upsampling, profile=profile, epoch=epoch, empty=empty, split=split
)


def main():
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('part', choices=PARTS, nargs='?')
    add('--data_path', default='data/landscapes', help='a folder of photos [%(default)s]')
    add('--output', help='a folder, for split')
    add('--image_size', type=cli.image_size, default=224, help='[%(default)s]')
    add('--batch_size', type=cli.positive_int, default=32, help='[%(default)s]')
    add('--precision', choices=('auto', 'fp32', 'bf16', 'fp16'), default='auto')
    args = parser.parse_args()
    if not args.part:
        parser.print_help()
        return 0
    if args.part == 'split' and not args.output:
        parser.error('split needs --output, a new folder')
    args.mode, args.upsample = 'eager', 'interpolate'
    try:
        return PARTS[args.part](args)
    except Exception as error:
        return cli.exit_code(error, 'gpu.py', args.batch_size)


if __name__ == '__main__':
    sys.exit(main())
