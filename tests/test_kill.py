"""The short form of kill_test.py, and what --resume takes and refuses."""
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from conftest import ROOT
from kill_test import (
    EPOCHS,
    FLAGS,
    STEPS,
    Training,
    after_an_epoch,
    at_any_moment,
    differences,
    page,
    steps_in,
    unloadable,
    while_saving,
)
from tensorboard.summary.writer import event_file_writer
from torch.optim.optimizer import register_optimizer_step_post_hook

import colorize

CHECKPOINT = 'runs/UNet/checkpoint.pth'


def call(monkeypatch, folder, *flags):
    """The exit code of `colorize.py flags...`, called in this process, in `folder` if any."""
    words = list(map(str, flags))
    handlers = {number: signal.getsignal(number)
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with monkeypatch.context() as patch:
        if folder:
            patch.chdir(folder)
        patch.setattr(sys, 'argv', ['colorize.py', *words])
        patch.setattr(colorize, 'keep_freed_memory', lambda: None)  # it would outlast the test
        patch.setattr(threading, 'excepthook', threading.excepthook)  # so that it is put back
        try:
            return colorize.main(words)
        except SystemExit as end:
            return end.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


@contextmanager
def signal_after(steps, number=signal.SIGTERM):
    """Sends this process the signal in its optimizer's step of that number; counts all steps."""
    made = []

    def count(*_):
        made.append(len(made) + 1)
        if made[-1] == steps:
            os.kill(os.getpid(), number)

    hook = register_optimizer_step_post_hook(count)
    try:
        yield made
    finally:
        hook.remove()


@pytest.fixture(scope='module')
def reference(drawings, tmp_path_factory):
    """The folder of a run that nothing stopped. Not to be written to."""
    folder = tmp_path_factory.mktemp('uninterrupted')
    with pytest.MonkeyPatch.context() as monkeypatch, signal_after(None) as made:
        assert call(monkeypatch, folder, '--data_path', drawings, *FLAGS) == 0
    assert len(made) == EPOCHS * STEPS
    assert steps_in(folder / CHECKPOINT) == (EPOCHS * STEPS, EPOCHS * STEPS)
    return folder


@pytest.fixture
def again(drawings, tmp_path, monkeypatch):
    """again(flags...): the run goes on in a folder of the test's own; its exit code."""
    # TensorBoard reads the files of one second in the order of their names: the 10th before the 9th
    monkeypatch.setattr(event_file_writer, '_global_uid', event_file_writer.AtomicCounter(0))
    return partial(call, monkeypatch, tmp_path, '--data_path', drawings, *FLAGS)


# ---------------------------------------------------------------------------- killed

def test_killed_at_any_stage(drawings, reference, tmp_path):
    for moment in (partial(while_saving, name='unet.pth'), partial(at_any_moment, seconds=1),
                   partial(while_saving, name=CHECKPOINT), after_an_epoch):
        training = Training(tmp_path, drawings)
        assert moment(training, 0.1), training.text
        training.signal(signal.SIGKILL)
        assert training.end() == -signal.SIGKILL
        assert unloadable(tmp_path) == [] and 'Traceback' not in training.text
    training = Training(tmp_path, drawings)
    assert training.end() == 0, training.text
    assert differences(tmp_path, reference) == []


# ---------------------------------------------------------------------------- asked to stop

@pytest.mark.parametrize('ways', [[[], []], [['--stream'], ['--stream']], [['--stream'], []]],
                         ids=['in memory', 'streaming', 'one after the other'])
def test_no_step_is_made_twice(reference, again, tmp_path, capfd, ways):
    """Stopped in an epoch's last step, which is before its validation, and within an epoch."""
    made = 0
    for way, steps, number, place in ((ways[0], 3, signal.SIGTERM, 'epoch 1 after step 3'),
                                      (ways[1], 2, signal.SIGINT, 'epoch 2 after step 2')):
        with signal_after(steps, number) as counted:
            assert again(*way) == 128 + number
        made += len(counted)
        assert steps_in(tmp_path / CHECKPOINT) == (made, made)
        said = capfd.readouterr()
        assert said.err == '\nstopping after this step; once more to stop at once\n'
        assert re.search(f'^stopped in {place}; to go on: python colorize.py --data_path .* '
                         '--name UNet --resume\n', said.out, re.MULTILINE), said.out
    with signal_after(None) as counted:
        assert again(*ways[0]) == 0
    assert made + len(counted) == EPOCHS * STEPS
    assert differences(tmp_path, reference) == []


def test_a_stopped_dry_run_has_nothing_to_go_on_with(again, tmp_path, capfd):
    with signal_after(1):
        assert again('--dry_run') == 128 + signal.SIGTERM
    assert capfd.readouterr().out.endswith(
        'stopped in epoch 1 after step 1; nothing of a dry run is kept\n')
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_reaches_the_workers_and_the_printed_command_goes_on(
        drawings, reference, tmp_path, monkeypatch):
    training = Training(tmp_path, drawings, '--stream')
    assert training.wait_for(lambda: 'epoch 2' in training.text)
    training.signal(signal.SIGINT, group=True)
    assert training.end() == 130, training.text
    assert training.text.count('stopping after this step') == 1
    assert 'Traceback' not in training.text and 'Exception' not in training.text
    command = shlex.split(re.search(r'to go on: (.*)\r', training.text)[1])
    assert command[:2] == ['python', str(ROOT / 'colorize.py')]
    assert call(monkeypatch, tmp_path, *command[2:]) == 0
    assert differences(tmp_path, reference) == []


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP])
def test_workers_hear_nothing_from_their_first_moment_on(again, tmp_path, monkeypatch, capfd,
                                                         number):
    """systemd and a hang-up signal all processes, also one that has just been started."""
    start, started = torch.multiprocessing.Process.start, []

    def start_and_signal(process):
        start(process)
        started.append(process)
        for _ in range(50):
            os.kill(process.pid, number)
            time.sleep(0.001)
        if len(started) == 2:  # the first one reads the photos to look at: nothing to save yet
            os.kill(os.getpid(), number)

    monkeypatch.setattr(torch.multiprocessing.Process, 'start', start_and_signal)
    assert again('--stream') == 128 + number
    assert len(started) == 2
    said = capfd.readouterr()
    assert said.err == '\nstopping after this step; once more to stop at once\n'
    assert 'stopped in epoch 1 after step 0; ' in said.out
    assert steps_in(tmp_path / CHECKPOINT) == (0, 0)


def test_a_listener_that_ctrl_c_ended_first_costs_nothing(drawings, tmp_path):
    """`2>&1 | tee log`: Ctrl-C ends the `tee` too, and nobody reads what the training prints."""
    program = subprocess.Popen([sys.executable, ROOT / 'colorize.py', '--data_path', drawings,
                                *FLAGS, '--epochs', '100'], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with program.stdout as lines:
        assert next(line for line in lines if line.startswith('epoch 1/100'))
    program.send_signal(signal.SIGINT)
    assert program.wait(60) == 130
    steps, place = steps_in(tmp_path / CHECKPOINT)
    assert steps == place >= STEPS


def test_a_second_signal_ends_it_at_once(drawings, tmp_path):
    twice = '''
import os, runpy, signal, sys
from tensorboard.summary.writer import event_file_writer
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(lambda *_: [os.kill(os.getpid(), signal.SIGINT) for _ in 'ab'])
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
'''
    done = subprocess.run([sys.executable, '-c', twice, ROOT / 'colorize.py', '--data_path',
                           drawings, *FLAGS], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | dict(PYTHONPATH=str(ROOT)))
    assert done.returncode == 130
    assert done.stderr == '\nstopping after this step; once more to stop at once\n'
    assert 'stopped in' not in done.stdout and not (tmp_path / CHECKPOINT).exists()


# ---------------------------------------------------------------------------- --resume

def test_a_finished_run_goes_on_to_a_larger_number_of_epochs(reference, again, tmp_path, capfd):
    assert again('--epochs', 2) == 0
    assert again('--epochs', 3) == 0
    weights = (tmp_path / 'unet.pth').read_bytes()
    capfd.readouterr()
    assert again('--epochs', 3) == 0
    assert capfd.readouterr().out.splitlines()[1:] == [
        'this run is finished: unet.pth has its weights, more --epochs would go on with it']
    assert (tmp_path / 'unet.pth').read_bytes() == weights
    assert again() == 0
    assert differences(tmp_path, reference) == []


def test_without_a_checkpoint_it_starts_afresh_in_the_same_folder(reference, again, tmp_path,
                                                                  capfd):
    assert again('--epochs', 1, '--seed', 1) == 0
    (tmp_path / CHECKPOINT).unlink()
    first = (tmp_path / 'unet.pth').read_bytes()
    assert again() == 0
    out = capfd.readouterr().out
    assert out.count('logging in runs/UNet\n') == 2
    assert out.count('the unet.pth that was here is now unet_1.pth\n') == 1
    assert (tmp_path / 'unet_1.pth').read_bytes() == first
    assert [path.name for path in (tmp_path / 'runs').iterdir()] == ['UNet']
    assert page(tmp_path)['training loss'] == page(reference)['training loss']
    assert differences(tmp_path, reference) == ['unet_1.pth was left']


@pytest.mark.parametrize('flags, named', [
    (['--batch_size', 8], 'batch_size is 8, but {} was trained with 16'),
    (['--image_size', 64], 'image_size is 64, but {} was trained with 32'),
    (['--seed', 1], 'seed is 1, but {} was trained with 0'),
    (['--val_fraction', 0.5], 'val_fraction is 0.5, but {} was trained with 0.25'),
    (['--data_path', 'fewer'], r'photos is 55 \([0-9a-f]{{8}}\), but {} was trained with '
                               r'56 \([0-9a-f]{{8}}\)'),
    (['--data_path', 'renamed'], r'photos is 56 \([0-9a-f]{{8}}\), but {} was trained with '
                                 r'56 \([0-9a-f]{{8}}\)'),
], ids=lambda value: value[0] if isinstance(value, list) else '')
def test_a_setting_that_contradicts_the_checkpoint_is_refused(
        drawings, reference, again, tmp_path, capfd, flags, named):
    (tmp_path / 'runs').symlink_to(reference / 'runs')
    before = (reference / CHECKPOINT).read_bytes(), sorted(reference.rglob('*'))
    for name in 'fewer', 'renamed':
        shutil.copytree(drawings, tmp_path / name)
        photo = tmp_path / name / 'lake/lake_001.jpg'
        photo.unlink() if name == 'fewer' else photo.rename(photo.with_name('pond.jpg'))
    assert again('--epochs', 5, *flags) == 2
    said = capfd.readouterr()
    assert re.fullmatch('colorize.py: --resume: ' + named.format(re.escape(CHECKPOINT))
                        + '; give that, or another --name\n', said.err), said.err
    assert said.out == ''
    assert ((reference / CHECKPOINT).read_bytes(), sorted(reference.rglob('*'))) == before
    assert not (tmp_path / 'unet.pth').exists()


def test_epochs_workers_and_learning_rate_may_change(reference, again, tmp_path):
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    assert again('--epochs', 5, '--num_workers', 0, '--lr', 5e-4) == 0
    curves, expected = page(tmp_path), page(reference)
    rate = curves.pop('learning rate')
    assert rate == [*expected.pop('learning rate'), (5, pytest.approx(5e-4))]
    for tag, points in expected.items():
        assert curves[tag][:EPOCHS] == points and len(curves[tag]) == 5
