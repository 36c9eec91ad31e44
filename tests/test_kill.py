"""Stopping and resuming: the short form of kill_trial.py, and what --resume takes and refuses."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

import pytest
from helpers import (
    CHECKPOINT,
    ENVIRONMENT,
    FLAGS,
    ROOT,
    WEIGHTS,
    Training,
    call,
    curves,
    differences,
    is_same,
    load,
    signal_after,
    steps_in,
    unloadable,
)

STOPPING = '\nstopping after this step; once more to stop at once\n'


@pytest.fixture(scope='module')
def whole(drawings, tmp_path_factory):
    """The folder of a run that nothing stopped, not to be written to, and its steps."""
    folder = tmp_path_factory.mktemp('whole')
    with signal_after(None) as made:
        assert call(folder, '--data_path', drawings, *FLAGS) == 0
    assert [side for _, side, _ in made] == [16, *[8] * 10, 16]  # 85 % are small
    assert steps_in(folder / CHECKPOINT) == (12, 12)
    return folder, made


# calls colorize.main in a child process for each moment, at which it gets a signal, twice
KILLED = """
import os, signal, sys
import colorize
moments, sys.argv = sys.argv[1].split(', '), sys.argv[2:]

def pass_by(place):
    if place == moment:
        signal.raise_signal(signum)
        signal.raise_signal(signum)

def replace(source, target, replace=os.replace):
    pass_by(f'before {os.path.relpath(target)}')
    replace(source, target)
    pass_by(f'after {os.path.relpath(target)}')

def train_step(*args, train_step=colorize.train_step):
    loss = train_step(*args)
    pass_by('after a step')
    return loss

os.replace, colorize.train_step = replace, train_step
for words in moments:
    name, _, moment = words.partition(' ')
    signum = signal.Signals[name]
    if not (child := os.fork()):
        os._exit(colorize.main())
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (-signum if name == 'SIGKILL' else 128 + signum), (words, code)
"""


def test_killed_at_any_moment(drawings, whole, train, tmp_path):
    kills = f'before {CHECKPOINT}', f'after {CHECKPOINT}', 'before unet.pth', f'before {WEIGHTS}'
    moments = ', '.join(['SIGINT after a step', *(f'SIGKILL {kill}' for kill in kills)])
    words = [ROOT / 'colorize.py', '--data_path', drawings, *FLAGS, '--resume']
    options = dict(cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    done = subprocess.run([sys.executable, '-c', KILLED, moments, *words], **options)
    assert (done.returncode, done.stderr) == (0, STOPPING)  # a second signal ends it at once
    assert 'stopped in' not in done.stdout and unloadable(tmp_path) == []
    assert load(tmp_path / CHECKPOINT)['progress']['epoch'] == 1
    train('--resume')
    assert differences(tmp_path, whole[0]) == []


def test_no_step_is_made_twice_and_all_are_as_they_would_have_been(whole, train, tmp_path):
    # within an epoch, and in an epoch's last step, which is before its validation
    (folder, expected), steps = whole, []
    for number, signum, place in (
        (2, signal.SIGTERM, 'epoch 1 after step 2'),
        (4, signal.SIGINT, 'epoch 2 after step 3'),
        (2, signal.SIGHUP, 'epoch 3 after step 2'),
    ):
        with signal_after(number, signum) as made:
            printed = train('--resume', code=128 + signum)
        steps += made
        assert steps_in(tmp_path / CHECKPOINT) == (len(steps), len(steps))
        assert printed.err == STOPPING and f'\nstopped in {place}; to go on: ' in printed.out
    with signal_after(None) as made:
        train('--resume')
    assert steps + made == expected
    assert differences(tmp_path, folder) == []


def test_ctrl_c_on_a_terminal_and_the_printed_command_goes_on(drawings, whole, tmp_path):
    training = Training(tmp_path, drawings)
    assert training.wait_for(lambda: 'epoch 2: ' in training.text)
    training.process.send_signal(signal.SIGINT)
    assert training.end() == 130, training.text
    time.sleep(1)  # TensorBoard reads files of one second by their process numbers
    assert 'reading photos: ' in training.text and 'epoch 1: ' in training.text  # bars
    assert training.text.count('stopping after this step') == 1
    assert 'Traceback' not in training.text and 'Exception' not in training.text
    command = re.search(r'to go on: (.*)\r', training.text)[1]
    typed = [str(ROOT / 'colorize.py'), '--data_path', str(drawings), *FLAGS]
    assert shlex.split(command) == ['python', *typed, '--resume']
    assert call(tmp_path, *typed[1:], '--resume') == 0
    assert differences(tmp_path, whole[0]) == []


def test_a_listener_that_ctrl_c_ended_first_costs_nothing(drawings, tmp_path):
    """`2>&1 | tee log`: Ctrl-C ends the `tee` too, and nobody reads what the training prints."""
    listener, pipe = os.pipe()
    os.close(listener)
    with open(pipe, 'w') as nobody, redirect_stdout(nobody), redirect_stderr(nobody):
        with signal_after(4, signal.SIGINT):
            assert call(tmp_path, '--data_path', drawings, *FLAGS) == 130
    assert steps_in(tmp_path / CHECKPOINT) == (4, 4)


def test_resume_goes_on_with_the_latest_run(train, tmp_path):
    train('--epochs', 1)
    first = (tmp_path / CHECKPOINT).read_bytes(), (tmp_path / WEIGHTS).read_bytes()
    with signal_after(1):
        printed = train('--epochs', 1, code=128 + signal.SIGTERM).out
    # at the start, too, because a kill leaves no time to print it
    assert printed.startswith('runs/UNet is taken: this run is in runs/UNet_2; to go on with it, ')
    assert printed.endswith(' --name UNet_2 --resume\n')
    assert 'going on in epoch 1 of 1 after step 1' in train('--epochs', 1, '--resume').out
    assert is_same(load(tmp_path / 'runs/UNet_2/unet.pth'), load(tmp_path / WEIGHTS))
    assert ((tmp_path / CHECKPOINT).read_bytes(), (tmp_path / WEIGHTS).read_bytes()) == first


def test_a_finished_run_goes_on_to_more_epochs(train, tmp_path):
    train('--resume', '--epochs', 1)
    before, first = (tmp_path / CHECKPOINT).read_bytes(), curves(tmp_path)
    printed = train('--resume', '--epochs', 1).out
    assert printed.startswith('runs/UNet is finished at epoch 1; more --epochs make it go on\n')
    better = printed.splitlines()[-1]  # the command that was typed
    assert ' --device cpu --epochs 1 --network pretrained' in better and '--resume' not in better
    assert 'Next:' in printed and (tmp_path / CHECKPOINT).read_bytes() == before
    train('--resume', '--epochs', 2)
    assert steps_in(tmp_path / CHECKPOINT) == (6, 6)
    for tag, points in curves(tmp_path).items():
        assert points[:1] == first[tag] and len(points) == 2


@pytest.mark.parametrize(
    'flags, trained',
    [
        (['--batch_size', 8], '--batch_size 16'),
        (['--image_size', 64], '--image_size 16'),
        (['--seed', 1], '--seed 0'),
        (['--val_fraction', 0.5], '--val_fraction 0.25'),
        (['--colorfulness_weight', 0], '--colorfulness_weight 0.025'),
        (['--demo', '--name', 'UNet'], '--demo False'),
        (['--data_path', 'lake'], r'--data_path of 56 photos \([0-9a-f]{8}\)'),
    ],
)
def test_a_setting_that_contradicts_the_checkpoint_is_refused(
    drawings, whole, train, tmp_path, flags, trained
):
    folder, _ = whole
    (tmp_path / 'runs').symlink_to(folder / 'runs')
    before = (folder / CHECKPOINT).read_bytes(), sorted(folder.rglob('*'))
    (tmp_path / 'lake').symlink_to(drawings / 'lake')
    printed = train('--resume', '--epochs', 5, *flags, code=2)
    line = f'colorize.py: --resume: {CHECKPOINT} was trained with {trained}, not .*: give that'
    assert re.fullmatch(f'{line}, or another --name\n', printed.err), printed.err
    assert ((folder / CHECKPOINT).read_bytes(), sorted(folder.rglob('*'))) == before
    assert printed.out == '' and not (tmp_path / 'unet.pth').exists()
