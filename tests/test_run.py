"""Which folder a run gets, and that no weights are lost."""

import os
import signal

import pytest
import torch

from unet import UNet
from utils.cli import UsageError
from utils.run import RunFolder


def make_runs(home, *names, files=('checkpoint.pth', 'unet.pth')):
    for number, name in enumerate(names):
        (home / 'runs' / name).mkdir(parents=True)
        for file in files:
            (home / 'runs' / name / file).write_text(f'{number}')


def open_run(home, name=None, resume=False):
    """Return the name of the folder that a run gets; its lock is given up again."""
    folder = RunFolder(home, name, 'UNet', resume)
    folder.lock.close()
    return folder.path.name


@pytest.mark.parametrize(
    'runs, name, resume, expected',
    [
        ('', None, False, 'UNet'),
        ('UNet', None, False, 'UNet_2'),
        ('UNet UNet_2 UNet_10 UNet_1 UNet_x', None, False, 'UNet_11'),
        ('UNet', 'test', False, 'test'),
        ('test', 'test', False, 'test_2'),
        ('', None, True, 'UNet'),
        ('UNet UNet_2 demo_3', None, True, 'UNet_2'),
        ('UNet UNet_2', 'UNet', True, 'UNet'),
    ],
)
def test_names(tmp_path, runs, name, resume, expected):
    make_runs(tmp_path, *runs.split())
    assert open_run(tmp_path, name, resume) == expected


def test_a_start_that_saved_nothing_does_not_use_up_the_name(tmp_path):
    make_runs(tmp_path, 'UNet', files=())
    assert open_run(tmp_path) == 'UNet'


def test_another_process_s_run_is_its_own_until_that_ends(tmp_path):
    ours, its = os.pipe()
    other = os.fork()
    if not other:
        try:
            folder = RunFolder(tmp_path, None, 'UNet', False)
            os.write(its, folder.path.name.encode())
            signal.pause()
        finally:
            os._exit(1)
    assert os.read(ours, 9) == b'UNet'
    with pytest.raises(UsageError, match='another process is training in .*/UNet; give another'):
        open_run(tmp_path, resume=True)
    assert open_run(tmp_path) == 'UNet_2'
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    assert open_run(tmp_path, 'UNet', resume=True) == 'UNet'


def names(home):
    return sorted(str(path.relative_to(home)) for path in home.rglob('*.*') if path.suffix)


def test_weights_that_are_no_run_s_are_renamed_once(tmp_path, capsys):
    make_runs(tmp_path, 'UNet')
    for number, content in enumerate(['from a friend', 'another'], 1):
        (tmp_path / 'unet.pth').write_text(content)
        open_run(tmp_path, 'new', resume=True)
        assert "unet.pth is in no run's folder: it is now" in capsys.readouterr().out
        assert (tmp_path / f'unet_{number}.pth').read_text() == content
    (tmp_path / 'unet.pth').write_text('0')  # as in runs/UNet
    open_run(tmp_path, 'new', resume=True)
    assert (tmp_path / 'unet.pth').read_text() == '0'


def test_weights_behind_a_link_are_renamed_there(tmp_path, capsys):
    (tmp_path / 'shared').mkdir()
    (tmp_path / 'shared/best.pth').write_text('from a friend')
    (tmp_path / 'unet.pth').symlink_to('shared/best.pth')
    folder = RunFolder(tmp_path, None, 'UNet', False)
    folder.save_weights(UNet(), 'drawn')
    assert (tmp_path / 'unet.pth').is_symlink()
    assert (tmp_path / 'shared/best_1.pth').read_text() == 'from a friend'
    assert (tmp_path / 'shared/best.pth').read_bytes() == folder.weights.read_bytes()


def test_weights_without_their_checkpoint_are_kept(tmp_path):
    make_runs(tmp_path, 'UNet', files=['unet.pth'])
    (tmp_path / 'unet.pth').write_text('0')
    open_run(tmp_path, resume=True)
    assert names(tmp_path) == ['runs/UNet/unet_1.pth', 'unet.pth']


@pytest.mark.parametrize('renames', [0, 1])
def test_a_kill_while_weights_are_saved(tmp_path, monkeypatch, renames):
    """The two files are written, and so many of them have their names."""
    make_runs(tmp_path, 'UNet')
    (tmp_path / 'unet.pth').write_text('0')
    folder, done = RunFolder(tmp_path, None, 'UNet', True), []

    class Killed(BaseException):
        pass

    def replace(source, target, replace=os.replace):
        if len(done) == renames:
            raise Killed
        done.append(replace(source, target))

    with monkeypatch.context() as patch:
        patch.setattr('os.replace', replace)
        with pytest.raises(Killed):
            folder.save_weights(UNet(), 'drawn')
    folder.lock.close()
    open_run(tmp_path, resume=True)
    assert names(tmp_path) == ['runs/UNet/checkpoint.pth', 'runs/UNet/unet.pth', 'unet.pth']
    if renames:
        UNet().load_state_dict(torch.load(tmp_path / 'unet.pth', weights_only=True))
