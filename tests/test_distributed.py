"""Several processes on one CPU, as torchrun starts them."""
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from browser import TAGS
from conftest import ROOT
from test_colorize import events, series

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone']


@pytest.fixture
def flags(small):
    return [str(word) for word in [*small, '--precision', 'fp32', '--epochs', 1, '--resume']]


def weights(folder):
    return torch.load(folder / 'unet.pth', weights_only=True)


def difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def torchrun(processes, folder, *words):
    folder.mkdir(exist_ok=True)
    return subprocess.run([*TORCHRUN, f'--nproc_per_node={processes}', ROOT / 'colorize.py',
                           *words], cwd=folder, capture_output=True, text=True, timeout=240)


def test_any_number_of_processes_gives_the_same_run(flags, tmp_path, run):
    flags += ['--batch_size', '14']  # 43 photos: of the last batch, all but one process get none
    alone = tmp_path / 'alone'
    alone.mkdir()
    lines = run('colorize.py', *flags, cwd=alone).stdout.splitlines()
    for processes, more in (2, []), (3, ['--stream']):
        folder = tmp_path / str(processes)
        done = torchrun(processes, folder, *flags, *more)
        assert done.returncode == 0, done.stderr
        # one process prints, logs and saves
        assert done.stdout.count('epoch 1/1') == done.stdout.count('the weights are in') == 1
        assert len(list((folder / 'runs/UNet').glob('events*'))) == 1
        assert difference(weights(alone), weights(folder)) < 1e-5
        ours, theirs = (events(f / 'runs/UNet') for f in (alone, folder))
        for tag in TAGS - {'photos per second'}:
            assert series(ours, tag) == [(1, pytest.approx(series(theirs, tag)[0][1], rel=1e-4))]
    assert any('43 photos to train on, 13 held out' in line for line in lines)

    # what two processes began, three end
    done = torchrun(3, tmp_path / '2', *flags, '--epochs', '2')
    assert done.returncode == 0, done.stderr
    run('colorize.py', *flags, '--epochs', 2, cwd=alone)
    assert difference(weights(alone), weights(tmp_path / '2')) < 1e-4


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
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True) as launcher:
        limit = threading.Timer(200, end, [launcher])
        limit.start()
        try:
            yield launcher
        finally:
            limit.cancel()
            if launcher.poll() is None:
                end(launcher)


@pytest.mark.skipif(not os.path.exists('/proc/self/environ'), reason='needs /proc')
def test_a_killed_process_is_restarted_and_nothing_is_lost(flags, tmp_path):
    flags = [*flags, '--epochs', '4']
    assert torchrun(2, tmp_path / 'whole', *flags).returncode == 0
    with launched(tmp_path / 'killed', *TORCHRUN, '--nproc_per_node=2', '--max-restarts=1',
                  ROOT / 'colorize.py', *flags) as launcher:
        lines = []
        for line in launcher.stdout:
            lines.append(line)
            if line.startswith('epoch 1/4') and lines.count(line) == 1:
                os.kill(worker(1, launcher.pid), signal.SIGKILL)
        assert launcher.wait(60) == 0, ''.join(lines)
    output = ''.join(lines)
    assert sum('photos to train on' in line for line in lines) == 2, output  # started twice
    assert difference(weights(tmp_path / 'whole'), weights(tmp_path / 'killed')) == 0
    whole, killed = (events(tmp_path / name / 'runs/UNet') for name in ('whole', 'killed'))
    for tag in TAGS - {'photos per second'}:
        assert series(killed, tag) == series(whole, tag)


def test_a_stop_reaches_all_processes_at_the_same_step(flags, tmp_path):
    (tmp_path / 'whole').mkdir()
    flags = [*flags, '--epochs', '3']
    with launched(tmp_path / 'stopped', *TORCHRUN, '--nproc_per_node=2', ROOT / 'colorize.py',
                  *flags) as launcher:
        lines = []
        for line in launcher.stdout:
            lines.append(line)
            if line.startswith('epoch 1/3'):
                time.sleep(0.1)
                os.kill(worker(1, launcher.pid), signal.SIGTERM)  # one is told, both stop
    output = ''.join(lines)
    assert output.count('stopped in epoch') == 1, output
    assert 'colorize.py", line' not in output  # a traceback, but for torchrun's own
    done = torchrun(2, tmp_path / 'stopped', *flags)
    assert done.returncode == 0, done.stderr
    assert torchrun(2, tmp_path / 'whole', *flags).returncode == 0
    assert difference(weights(tmp_path / 'whole'), weights(tmp_path / 'stopped')) == 0


def test_a_process_that_fails_ends_the_others_with_its_reason(flags, tmp_path):
    done = torchrun(2, tmp_path / 'other', *flags, '--data_path', 'nowhere')
    assert done.returncode != 0
    assert 'colorize.py: no such folder: nowhere' in done.stderr
