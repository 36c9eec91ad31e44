"""Stopping and resuming: the short form of kill_trial.py, and what --resume takes and refuses."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from helpers import (
    CHECKPOINT,
    EPOCHS,
    FLAGS,
    ROOT,
    STEPS,
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

from utils.checkpoint import find_run


@pytest.fixture(scope='module')
def reference(drawings, tmp_path_factory):
    """The folder of a run that nothing stopped. Not to be written to."""
    folder = tmp_path_factory.mktemp('uninterrupted')
    with signal_after(None) as made:
        assert call(folder, '--data_path', drawings, *FLAGS) == 0
    assert len(made) == EPOCHS * STEPS
    assert steps_in(folder / CHECKPOINT) == (EPOCHS * STEPS, EPOCHS * STEPS)
    return folder


@pytest.fixture
def again(train):
    """again(flags..., code=0): the run of `train` goes on."""
    return lambda *flags, **kwargs: train('--resume', *flags, **kwargs)


# ---------------------------------------------------------------------------- killed

# runs colorize.py in a child process for each moment, at which SIGKILL ends it: before or after a
# file takes its name, or after a step
KILLED = """
import os, signal, sys
from pathlib import Path
from torch.optim.optimizer import register_optimizer_step_post_hook
import colorize
moments, sys.argv = sys.argv[1].split(), sys.argv[2:]
replace = os.replace

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def replace_and_kill(source, target):
    here = Path(target).resolve() == Path(name).resolve()
    if here and when == 'before':
        kill()
    replace(source, target)
    if here:
        kill()

def kill_after_steps(*_):
    steps.pop()
    if not steps:
        kill()

for moment in moments:
    when, name = moment.split(':')
    if not (child := os.fork()):
        if when == 'step':
            steps = [None] * int(name)
            register_optimizer_step_post_hook(kill_after_steps)
        else:
            os.replace = replace_and_kill
        os._exit(colorize.main())
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, moment
"""


def test_killed_at_any_moment(drawings, reference, again, tmp_path):
    moments = [
        'step:2',
        *(
            f'{when}:{name}'
            for name in (CHECKPOINT, WEIGHTS, 'unet.pth')
            for when in ('before', 'after')
        ),
        'step:3',
    ]
    done = subprocess.run(
        [
            sys.executable,
            '-c',
            KILLED,
            ' '.join(moments),
            ROOT / 'colorize.py',
            '--data_path',
            drawings,
            *FLAGS,
            '--resume',
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
    )
    assert (done.returncode, done.stderr) == (0, '')
    assert unloadable(tmp_path) == []
    assert load(tmp_path / CHECKPOINT)['progress']['epoch'] == 1
    again()
    assert differences(tmp_path, reference) == []


# ---------------------------------------------------------------------------- asked to stop


@pytest.mark.parametrize(
    'ways',
    [[[], []], [['--stream'], ['--stream']], [['--stream'], []]],
    ids=['in memory', 'streaming', 'one after the other'],
)
def test_no_step_is_made_twice(reference, again, tmp_path, capfd, ways):
    """Stopped within an epoch, and in an epoch's last step, which is before its validation."""
    made = 0
    for way, steps, number, place in (
        (ways[0], 2, signal.SIGTERM, 'epoch 1 after step 2'),
        (ways[1], 4, signal.SIGINT, 'epoch 2 after step 3'),
    ):
        with signal_after(steps, number) as counted:
            printed = again(*way, code=128 + number)
        made += len(counted)
        assert steps_in(tmp_path / CHECKPOINT) == (made, made)
        assert printed.err == '\nstopping after this step; once more to stop at once\n'
        assert re.search(
            f'^stopped in {place}; to go on: python colorize.py --data_path .* '
            '--name UNet --resume\n',
            printed.out,
            re.MULTILINE,
        ), printed.out
    with signal_after(None) as counted:
        again(*ways[0])
    assert made + len(counted) == EPOCHS * STEPS
    assert differences(tmp_path, reference) == []


def test_resume_goes_on_with_the_run_that_the_command_made(train, reference, tmp_path):
    """A kill leaves no time to print its name."""
    train('--epochs', 1)
    with signal_after(4):
        started = train(code=128 + signal.SIGTERM)
    assert started.out.startswith(
        'runs/UNet is taken: this run is in runs/UNet_2; to go on with it, '
        'add --name UNet_2 --resume\n'
    )
    first = load(tmp_path / CHECKPOINT)
    assert 'going on in epoch 2 after step 1' in train('--resume').out
    assert is_same(load(tmp_path / CHECKPOINT), first)
    assert is_same(
        load(tmp_path / 'runs/UNet_2/checkpoint.pth')['net'], load(reference / CHECKPOINT)['net']
    )
    assert 'going on in epoch 2 after step 0' in train('--resume', '--name', 'UNet').out
    assert load(tmp_path / CHECKPOINT)['progress']['epoch'] == EPOCHS


@pytest.mark.parametrize(
    'runs, words, name',
    [
        ([], ['--resume'], 'UNet'),
        (['UNet'], ['--resume'], 'UNet'),
        (['UNet', 'UNet_2', 'UNet_10'], ['--resume'], 'UNet_10'),
        (['UNet', 'UNet_2'], [], 'UNet'),
        (['UNet', 'UNet_2'], ['--resume', '--name', 'UNet'], 'UNet'),
        (['UNet', 'UNet_2'], ['--name=UNet', '--resume'], 'UNet'),
        (['UNet', 'UNet_old', 'UNet_02', 'UNet_1', 'VNet_3', 'UNet_2_2'], ['--resume'], 'UNet'),
    ],
)
def test_which_run_a_command_asks_for(tmp_path, runs, words, name):
    for run in runs:
        (tmp_path / 'runs' / run).mkdir(parents=True)
    assert find_run(tmp_path, 'UNet', words) == tmp_path / 'runs' / name


def test_the_next_run_is_the_latest(train, tmp_path):
    """Whatever other folders there are: --resume finds what the command made."""
    for name in 'UNet', 'UNet_7':
        (tmp_path / 'runs' / name).mkdir(parents=True)
    train('--epochs', 1)
    made = find_run(tmp_path, 'UNet', ['--resume'])
    assert made == tmp_path / 'runs/UNet_8' and (made / 'checkpoint.pth').exists()


def test_a_stopped_dry_run_has_nothing_to_go_on_with(train, tmp_path):
    with signal_after(1):
        assert train('--dry_run', code=128 + signal.SIGTERM).out.endswith(
            'stopped in epoch 1 after step 1; nothing of a dry run is kept\n'
        )
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_on_a_terminal_and_the_printed_command_goes_on(drawings, reference, tmp_path):
    training = Training(tmp_path, drawings, '--stream')
    assert training.wait_for(lambda: 'epoch 2: ' in training.text)
    training.signal(signal.SIGINT, group=True)
    assert training.end() == 130, training.text
    assert training.text.count('stopping after this step') == 1
    assert 'Traceback' not in training.text and 'Exception' not in training.text
    command = shlex.split(re.search(r'to go on: (.*)\r', training.text)[1])
    assert command[:2] == ['python', str(ROOT / 'colorize.py')]
    assert call(tmp_path, *command[2:]) == 0
    assert differences(tmp_path, reference) == []


def test_a_listener_that_ctrl_c_ended_first_costs_nothing(drawings, tmp_path):
    """`2>&1 | tee log`: Ctrl-C ends the `tee` too, and nobody reads what the training prints."""
    program = subprocess.Popen(
        [sys.executable, ROOT / 'colorize.py', '--data_path', drawings, *FLAGS, '--epochs', '100'],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    with program.stdout as lines:
        assert next(line for line in lines if line.strip().startswith('1/100 '))
    program.send_signal(signal.SIGINT)
    assert program.wait(60) == 130
    steps, place = steps_in(tmp_path / CHECKPOINT)
    assert steps == place >= STEPS


def test_a_second_signal_ends_it_at_once(drawings, tmp_path):
    twice = """
import os, runpy, signal, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(lambda *_: [os.kill(os.getpid(), signal.SIGINT) for _ in 'ab'])
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""
    done = subprocess.run(
        [sys.executable, '-c', twice, ROOT / 'colorize.py', '--data_path', drawings, *FLAGS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
    )
    assert done.returncode == 130
    assert done.stderr == '\nstopping after this step; once more to stop at once\n'
    assert 'stopped in' not in done.stdout and not (tmp_path / CHECKPOINT).exists()


# ---------------------------------------------------------------------------- --resume


def test_a_finished_run_goes_on_to_a_larger_number_of_epochs(again, tmp_path):
    again('--epochs', 2)
    weights = (tmp_path / WEIGHTS).read_bytes()
    with signal_after(None) as made:
        assert 'Next:' in again('--epochs', 2).out
    assert made == [] and (tmp_path / WEIGHTS).read_bytes() == weights
    first = curves(tmp_path)
    again('--epochs', 3, '--num_workers', 0)
    assert steps_in(tmp_path / CHECKPOINT) == (3 * STEPS, 3 * STEPS)
    for tag, points in curves(tmp_path).items():
        assert points[:2] == first[tag] and len(points) == 3


def test_without_a_checkpoint_it_starts_afresh_in_the_same_folder(reference, again, tmp_path):
    again('--epochs', 1, '--seed', 1)
    (tmp_path / CHECKPOINT).unlink()
    earlier = (tmp_path / 'runs/UNet/unet.pth').read_bytes()
    out = again().out
    assert 'logging in runs/UNet\n' in out and out.count('it is now unet_1.pth\n') == 1
    assert (tmp_path / 'runs/UNet/unet_1.pth').read_bytes() == earlier
    assert [path.name for path in (tmp_path / 'runs').iterdir() if path.is_dir()] == ['UNet']
    assert differences(tmp_path, reference) == []


@pytest.mark.parametrize(
    'flags, name, values',
    [
        (['--batch_size', 8], 'batch_size', ('8', '16')),
        (['--image_size', 64], 'image_size', ('64', '32')),
        (['--seed', 1], 'seed', ('1', '0')),
        (['--val_fraction', 0.5], 'val_fraction', (r'0\.5', r'0\.25')),
        (['--data_path', 'fewer'], 'photos', (r'55 \([0-9a-f]{8}\)', r'56 \([0-9a-f]{8}\)')),
        (['--data_path', 'renamed'], 'photos', (r'56 \([0-9a-f]{8}\)', r'56 \([0-9a-f]{8}\)')),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else '',
)
def test_a_setting_that_contradicts_the_checkpoint_is_refused(
    drawings, reference, again, tmp_path, flags, name, values
):
    (tmp_path / 'runs').symlink_to(reference / 'runs')
    before = (reference / CHECKPOINT).read_bytes(), sorted(reference.rglob('*'))
    for folder in 'fewer', 'renamed':
        if folder in flags:
            shutil.copytree(drawings, tmp_path / folder)
            photo = tmp_path / folder / 'lake/lake_001.jpg'
            photo.unlink() if folder == 'fewer' else photo.rename(photo.with_name('pond.jpg'))
    printed = again('--epochs', 5, *flags, code=2)
    asked, earlier = values
    assert re.fullmatch(
        f'colorize.py: --resume: {name} is {asked}, but .* {earlier}; give that, '
        'or another --name\n',
        printed.err,
    ), printed.err
    assert printed.out == ''
    assert ((reference / CHECKPOINT).read_bytes(), sorted(reference.rglob('*'))) == before
    assert not (tmp_path / 'unet.pth').exists()


def test_a_checkpoint_of_an_earlier_version_is_refused_in_one_line(reference, again, tmp_path):
    checkpoint = load(reference / CHECKPOINT)
    checkpoint['progress'] = dict(epoch=1, step=0, loss_sum=0.0, photos=0, best=0.1, saved='5f3a')
    (tmp_path / CHECKPOINT).parent.mkdir(parents=True)
    torch.save(checkpoint, tmp_path / CHECKPOINT)
    before = (tmp_path / CHECKPOINT).read_bytes()
    printed = again(code=2)
    assert printed.err.count('\n') == 1 and printed.out == ''
    assert re.match(
        f'colorize.py: {CHECKPOINT} is no checkpoint of this version .*; move it away', printed.err
    ), printed.err
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_a_resumed_run_takes_its_settings_from_the_checkpoint(drawings, reference, tmp_path):
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    other = tmp_path / CHECKPOINT
    assert call(tmp_path, '--resume', '--epochs', EPOCHS + 1, '--device', 'cpu') == 0
    assert steps_in(other) == ((EPOCHS + 1) * STEPS, (EPOCHS + 1) * STEPS)
    settings = load(other)['settings']
    assert settings == load(reference / CHECKPOINT)['settings'] | dict(epochs=EPOCHS + 1)
