"""What only a GPU can tell. benchmarks/gpu.sh runs all of it, and this is how one part is run:

    python benchmarks/gpu.py device                       # what there is, and which versions
    python benchmarks/gpu.py profile --image_size 64      # the kernels of a training step
    python benchmarks/gpu.py empty                        # a process that has no photo of a batch

Each part runs on a CPU, too.
"""

import os
import platform
import sys
import time
from pathlib import Path

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler's own messages: none
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from speed import new_step, seconds_of  # noqa: E402
from torch.profiler import ProfilerActivity, profile as record  # noqa: E402

from colorize import Recipe, train_step  # noqa: E402
from unet import UNet  # noqa: E402
from utils import cli  # noqa: E402
from utils.device import Precision, choose_device, describe_device, free_memory  # noqa: E402
from utils.muon import Muon  # noqa: E402


def device(args):
    """Print the device and the versions."""
    here = choose_device('auto')
    print(
        f'{time.strftime("%Y-%m-%d")}: {describe_device(here)}, {free_memory(here) / 1e9:.0f} GB '
        f'free, {Precision("auto", here).name}; {os.cpu_count()} processors; torch '
        f'{torch.__version__}, Python {platform.python_version()}'
    )


def profile(args):
    """Print how long a training step takes, and its kernels that take the longest."""
    here = choose_device('auto')
    step, steps = new_step(args, here), 5
    seconds = seconds_of(step, here)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (here.type == 'cuda')
    with record(activities=activities) as recorded:
        for _ in range(steps):
            step()
        if here.type == 'cuda':
            torch.cuda.synchronize()
    name = 'self_device_time_total' if here.type == 'cuda' else 'self_cpu_time_total'
    events = recorded.key_averages()
    launches = sum(event.count for event in events if 'LaunchKernel' in event.key) / steps
    print(f'{args.image_size}×{args.image_size}: {1e3 * seconds:.2f} ms, {launches:g} kernels')
    times = sorted(((getattr(event, name), event.key) for event in events), reverse=True)
    for total, key in times[:5]:
        print(f'  {total / steps / 1e3:7.2f} ms  {key[:70]}')


def empty(args):
    """Take a step without a photo, as a process with no share of a batch does."""
    here = choose_device('auto')
    for name in 'fp32', 'bf16', 'fp16':
        net = UNet().to(here)
        before = [weight.clone() for weight in net.parameters()]
        y = torch.empty(0, 3, args.image_size, args.image_size, device=here)
        optimizer = Muon(net.parameters(), fused=here.type != 'mps')
        loss = train_step(net, optimizer, y[:, :1], y, 4, Recipe(Precision(name, here)))
        if loss != 0 or not all(map(torch.equal, before, net.parameters())):
            raise SystemExit(f'gpu.py: {name}: a step without a photo changed the weights')
    print('a step without a photo: the weights stay, in fp32, bf16 and fp16')


PARTS = dict(device=device, profile=profile, empty=empty)


def main():
    parser = cli.ArgumentParser('gpu.py', __doc__)
    add = parser.add_argument
    add('part', choices=PARTS)
    add('--image_size', type=cli.image_size, default=224, help='side of a photo, in pixels')
    add('--batch_size', type=cli.positive_int, default=32, help='photos a step')
    add('--precision', choices='auto fp32 bf16 fp16'.split(), default='auto', help='of the step')
    parser.add_flag('--compile', 'torch.compile the network')
    args = parser.parse_args()
    return PARTS[args.part](args)


if __name__ == '__main__':
    sys.exit(main())
