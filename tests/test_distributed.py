"""Several processes on one CPU: forked, which costs little, and as torchrun starts them."""

import json
import signal
import subprocess
import sys

import pytest
from helpers import CHECKPOINT, ENVIRONMENT, FLAGS, TAGS, call, curves, differences, load

# colorize.py, but rank 1 gets a signal after its fifth step: the first of the second epoch
SIGNALED = """
import json, os, signal, socket, sys
import colorize
from utils import distributed
steps, signum = [], 0

def train_step(*args, train_step=colorize.train_step):
    steps.append(train_step(*args))
    if signum and distributed.rank == 1 and len(steps) == 5:
        signal.raise_signal(signum)
    return steps[-1]

colorize.train_step = train_step
"""

RESTARTED = f"""{SIGNALED}
if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':
    signum = signal.SIGKILL
distributed.exit(colorize.main())
"""

# makes runs (folder, machines, processes of each, signal, flags), and prints their exit codes
FORKED = f"""{SIGNALED}
def run(folder, machines, processes, rank, port, flags):
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)
    distributed.rank, distributed.world_size = rank, machines * processes
    distributed.local_rank, distributed.local_world_size = rank % processes, processes
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(distributed.world_size))
    os.environ |= dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    distributed.exit(colorize.main(flags))

for folder, machines, processes, signum, flags in json.loads(sys.argv[1]):
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
    children = []
    for rank in range(machines * processes):
        children.append(os.fork())
        if not children[-1]:
            run(folder, machines, processes, rank, port, flags)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print('exit codes', codes, flush=True)
"""


@pytest.fixture(scope='module')
def flags(drawings):
    # of the 43 photos, the last batch has one: all processes but one get none of it
    others = '--batch_size 14 --precision fp32 --epochs 2 --resume'
    return ['--data_path', str(drawings), *FLAGS, *others.split()]


def start(folder, *words):
    """Return what a Python program printed in `folder`; it must end without an error."""
    options = dict(cwd=folder, env=ENVIRONMENT | dict(TMPDIR=str(folder)), timeout=240)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    done = subprocess.run([sys.executable, *words], **options, **pipes)
    assert done.returncode == 0 and not list(folder.glob('photos_*')), done.stdout
    return done.stdout


@pytest.fixture(scope='module')
def ran(flags, tmp_path_factory):
    """The folders of three runs, two of which were stopped and went on; and what they printed."""
    folder = tmp_path_factory.mktemp('ran')
    runs = [
        ('whole', 1, 2, 0, flags),
        ('stopped', 1, 2, signal.SIGTERM, flags),
        ('stopped', 1, 2, 0, flags),
        ('many', 1, 3, signal.SIGTERM, flags),
        ('many', 2, 2, 0, flags),
        ('many', 1, 2, 0, [*flags, '--seed', '1']),
    ]
    return folder, start(folder, '-c', FORKED, json.dumps(runs))


def test_a_stop_reaches_all_processes_of_which_one_prints(ran):
    folder, text = ran
    assert differences(folder / 'stopped', folder / 'whole') == []
    lines = text.splitlines()
    codes = [0, 0], [143, 143], [0, 0], [143, 143, 143], [0, 0, 0, 0], [2, 1]
    assert [line for line in lines if 'exit codes' in line] == [f'exit codes {c}' for c in codes]
    assert [text.count(words) for words in (' 1/2 ', ' 2/2 ', 'Next:')] == [3, 3, 3]
    assert text.count('stopped in epoch 2 after step 1; to go on: torchrun --nproc') == 2
    # only rank 0 sees why it is refused, and that ends the other
    refused, lost = sorted(line for line in lines if line.startswith('colorize.py: '))
    assert refused.startswith(f'colorize.py: --resume: {CHECKPOINT} was trained with --seed 0')
    assert lost.startswith('colorize.py: another process of this run has ended: ')


def test_any_number_of_processes_gives_the_same_run(ran, flags, tmp_path):
    """Three, and two on each of two machines, which go on from there."""
    folder, _ = ran
    assert call(tmp_path, *flags) == 0
    alone, many = (load(folder / CHECKPOINT)['net'] for folder in (tmp_path, folder / 'many'))
    for name, weight in alone.items():
        # a single weight may differ more: where a gradient is nearly 0, Adam's step is rounding
        assert (weight - many[name]).abs().mean() < 1e-4
    alone, many = curves(tmp_path), curves(folder / 'many')
    for tag in TAGS:
        assert many[tag] == [(step, pytest.approx(value, rel=1e-3)) for step, value in alone[tag]]


@pytest.mark.long
def test_a_killed_process_is_restarted_and_nothing_is_lost(ran, flags, tmp_path):
    (tmp_path / 'restarted.py').write_text(RESTARTED)
    launcher = '-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=1'
    text = start(tmp_path, *launcher.split(), 'restarted.py', *flags)
    assert text.count('photos to train on') == 2 and text.count(' 1/2 ') == 1, text
    assert differences(tmp_path, ran[0] / 'whole') == []
