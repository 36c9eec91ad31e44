"""Several processes on one CPU, as torchrun starts them."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import CHECKPOINT, FLAGS, ROOT, TAGS, WEIGHTS, call, events, load, series

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
# of the 43 photos, the last batch has one: all processes but one get none of it
BATCHES = ['--batch_size', '14', '--precision', 'fp32', '--resume']


@pytest.fixture(scope='module')
def flags(drawings):
    return ['--data_path', str(drawings), *FLAGS, *BATCHES]


@pytest.fixture(scope='module')
def whole(flags, tmp_path_factory):
    """The folder of a run of two processes that nothing stopped."""
    folder = tmp_path_factory.mktemp('whole')
    done = torchrun(2, folder, *flags)
    assert done.returncode == 0, done.stderr
    return folder


def difference(a, b):
    """Return the largest of all layers' mean differences between the runs in two folders.

    Single weights may differ more: where a gradient is nearly 0, Adam makes steps of its rounding.
    """
    a, b = load(a / CHECKPOINT)['net'], load(b / CHECKPOINT)['net']
    return max((a[name] - b[name]).abs().mean().item() for name in a)


def torchrun(processes, folder, *words):
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        [*TORCHRUN, f'--nproc_per_node={processes}', ROOT / 'colorize.py', *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_any_number_of_processes_gives_the_same_run(flags, tmp_path):
    """Three processes give what one gives, and two go on from there."""
    alone, three = tmp_path / 'alone', tmp_path / 'three'
    alone.mkdir()
    assert call(alone, *flags, '--epochs', 1) == 0
    done = torchrun(3, three, *flags, '--epochs', '1')
    assert done.returncode == 0, done.stderr
    # one process prints, logs and saves
    assert done.stdout.count('Next:') == done.stdout.count(' 1/1 ') == 1
    assert len(list((three / 'runs/UNet').glob('events*'))) == 1
    assert difference(alone, three) < 1e-5
    ours, theirs = (events(folder / 'runs/UNet') for folder in (alone, three))
    for tag in TAGS - {'photos per second'}:
        assert series(ours, tag) == [(1, pytest.approx(series(theirs, tag)[0][1], rel=1e-3))]

    done = torchrun(2, three, *flags, '--epochs', '2')
    assert done.returncode == 0, done.stderr
    assert call(alone, *flags, '--epochs', 2) == 0
    assert difference(alone, three) < 1e-4


def worker(rank, parent):
    """The process id of that rank below the torchrun `parent`; None while it is not there."""
    for children in Path(f'/proc/{parent}/task').glob('*/children'):
        for pid in children.read_text().split():
            if f'\0LOCAL_RANK={rank}\0' in Path(f'/proc/{pid}/environ').read_text():
                return int(pid)
    return None


def end(launcher):
    """Kills a torchrun and its processes, which are sessions of their own."""
    for pid in [worker(0, launcher.pid), worker(1, launcher.pid), launcher.pid]:
        if pid:
            os.kill(pid, signal.SIGKILL)


@contextmanager
def launched(folder, *command):
    """A running torchrun whose lines can be read; a run that hangs is killed, and so ends."""
    folder.mkdir()
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as launcher:
        limit = threading.Timer(500, end, [launcher])
        limit.start()
        try:
            yield launcher
        finally:
            limit.cancel()
            if launcher.poll() is None:
                end(launcher)


needs_proc = pytest.mark.skipif(not os.path.exists('/proc/self/environ'), reason='needs /proc')


def lines_until_the_end(launcher, number):
    """Read the lines of a torchrun, and signal its process of rank 1 after the first epoch."""
    lines = []
    for line in launcher.stdout:
        lines.append(line)
        if ' 1/4 ' in line and sum(' 1/4 ' in line for line in lines) == 1:
            os.kill(worker(1, launcher.pid), number)
    return lines


@needs_proc
def test_a_killed_process_is_restarted_and_nothing_is_lost(flags, whole, tmp_path):
    with launched(
        tmp_path / 'killed',
        *TORCHRUN,
        '--nproc_per_node=2',
        '--max-restarts=1',
        ROOT / 'colorize.py',
        *flags,
    ) as launcher:
        output = ''.join(lines_until_the_end(launcher, signal.SIGKILL))
        assert launcher.wait(60) == 0, output
    assert output.count('photos to train on') == 2, output  # started twice
    assert difference(whole, tmp_path / 'killed') == 0
    ours, killed = (events(folder / 'runs/UNet') for folder in (whole, tmp_path / 'killed'))
    for tag in TAGS - {'photos per second'}:
        assert series(killed, tag) == series(ours, tag)


@needs_proc
def test_a_stop_reaches_all_processes_at_the_same_step(flags, whole, tmp_path):
    stopped = tmp_path / 'stopped'
    with launched(
        stopped, *TORCHRUN, '--nproc_per_node=2', ROOT / 'colorize.py', *flags
    ) as launcher:
        output = ''.join(lines_until_the_end(launcher, signal.SIGTERM))  # one is told, both stop
    assert output.count('stopped in epoch') == 1, output
    assert 'colorize.py", line' not in output  # a traceback, but for torchrun's own
    done = torchrun(2, stopped, *flags)
    assert done.returncode == 0, done.stderr
    assert difference(whole, stopped) == 0
    assert (whole / WEIGHTS).read_bytes() == (stopped / WEIGHTS).read_bytes()


def test_a_part_of_another_launcher_s_environment(run, drawings):
    environ = os.environ | dict(WORLD_SIZE='2', RANK='', LOCAL_RANK='')
    done = run('colorize.py', '--data_path', drawings, *FLAGS, code=2, env=environ)
    assert done.stderr.startswith('colorize.py: ') and done.stderr.count('\n') == 1
    assert done.stderr.endswith('; start with torchrun, or unset RANK and WORLD_SIZE\n')


def test_a_process_that_fails_ends_the_others_with_its_reason(flags, tmp_path):
    done = torchrun(2, tmp_path / 'other', *flags, '--data_path', 'nowhere')
    assert done.returncode != 0
    assert 'colorize.py: no such folder: nowhere' in done.stderr
