"""Files that are whole or not there, weights for any laptop, checkpoints equal to the bit."""

import os
import pickle

import pytest
import torch
from helpers import TemplateUNet, is_same, load

from unet import UNet
from utils import checkpoint
from utils.checkpoint import Progress, State, atomic_save, load_weights, lock, save_weights
from utils.cli import UsageError
from utils.device import channels_last
from utils.muon import Muon

CPU = torch.device('cpu')


class Malicious:
    """Unpickling it creates the file `executed`."""

    def __reduce__(self):
        return open, ('executed', 'w')


def new_state(seed=0, **settings):
    torch.manual_seed(seed)
    net = channels_last(UNet(image_size=32), CPU)
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    return State(net, Muon(net.parameters()), scaler, dict(batch_size=32, demo=False) | settings)


def take_steps(state, number):
    torch.manual_seed(number)
    for _ in range(number):
        state.optimizer.zero_grad()
        state.net(torch.rand(2, 1, 16, 16) * 2 - 1).square().mean().backward()
        state.optimizer.step()


# ---------------------------------------------------------------------------- files


@pytest.mark.parametrize('step', ['write', 'fsync', 'replace'])
def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch, step):
    path = tmp_path / 'a.pth'
    atomic_save(1, path)

    def fail(*_):
        raise OSError(28, 'No space left on device')

    if step == 'write':
        monkeypatch.setattr(checkpoint, 'open', lambda *_: fail(), raising=False)
    else:
        monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match='a.pth was not saved: No space left on device'):
        atomic_save(2, path)
    assert load(path) == 1 and list(tmp_path.iterdir()) == [path]


def test_a_link_is_followed(tmp_path):
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'a.pth').symlink_to('disk/b.pth')
    atomic_save(1, tmp_path / 'a.pth')
    assert (tmp_path / 'a.pth').is_symlink() and load(tmp_path / 'disk/b.pth') == 1


def test_a_lock_is_held_until_its_file_is_closed(tmp_path):
    held = lock(tmp_path / '.lock')
    pid = os.fork()
    if not pid:  # a POSIX lock is the process's own
        os._exit(lock(tmp_path / '.lock') is None)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    held.close()
    assert lock(tmp_path / '.lock')


# ---------------------------------------------------------------------------- weights


def test_weights_are_a_plain_state_dict_that_knows_its_size(tmp_path):
    net = channels_last(UNet(image_size=96), CPU).bfloat16()
    save_weights(net, tmp_path / 'a.pth', tmp_path / 'b.pth', lock_path=tmp_path / '.lock')
    assert (tmp_path / 'a.pth').read_bytes() == (tmp_path / 'b.pth').read_bytes()
    state = torch.load(tmp_path / 'a.pth', weights_only=True)
    for value in state.values():
        assert value.dtype == torch.float32 and value.device == CPU
        assert value.is_contiguous() and not value.requires_grad
    TemplateUNet().load_state_dict(state, strict=True)
    loaded = load_weights(UNet(), tmp_path / 'a.pth')
    assert loaded.image_size == 96
    assert all(map(torch.equal, loaded.state_dict().values(), state.values()))
    torch.save(dict(state), tmp_path / 'c.pth')  # a student's own
    assert load_weights(UNet(96), tmp_path / 'c.pth').image_size is None


def changed(name, value):
    return lambda path: torch.save(UNet().state_dict() | {name: value}, path)


@pytest.mark.parametrize(
    'make, reason',
    [
        (lambda path: None, 'no weights a.pth: train with colorize.py, or name them'),
        (lambda path: path.mkdir(), 'a.pth cannot be read: Is a directory'),
        (lambda path: path.touch(), 'a.pth is damaged, or no file of tensors; nothing was run'),
        (lambda path: path.write_text('<!DOCTYPE html>'), 'a.pth is damaged, or no file of'),
        (lambda path: path.write_bytes(pickle.dumps(Malicious())), 'a.pth is damaged, or no'),
        (lambda path: torch.save(dict(net=Malicious()), path), 'a.pth is damaged, or no file'),
        (lambda path: torch.save([1, 2], path), 'a.pth holds no weights .*: a list'),
        (lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path), 'it has no tensor'),
        (changed('last_conv.bias', torch.zeros(4)), r'last_conv.bias is \(4,\), not \(3,\)'),
        (changed('last_conv.bias', torch.full((3,), torch.nan)), 'last_conv.bias is not finite'),
        (changed('last_conv.bias', 1), 'it has no tensor last_conv.bias'),
        (changed('more', torch.zeros(1)), 'it has more'),
        (lambda path: new_state().save(path), 'a.pth is the checkpoint of a run'),
    ],
)
def test_what_is_no_weights_is_refused_in_a_line_and_not_run(tmp_path, monkeypatch, make, reason):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / 'a.pth')
    with pytest.raises(UsageError, match=reason) as error:
        load_weights(UNet(), 'a.pth')
    assert '\n' not in str(error.value) and not (tmp_path / 'executed').exists()


def test_half_a_file_is_refused(tmp_path):
    torch.save(UNet().state_dict(), tmp_path / 'a.pth')
    whole = (tmp_path / 'a.pth').read_bytes()
    (tmp_path / 'a.pth').write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match='damaged'):
        load_weights(UNet(), tmp_path / 'a.pth')


# ---------------------------------------------------------------------------- checkpoints


def test_a_loaded_state_goes_on_to_the_bit(tmp_path):
    state, other = new_state(), new_state(seed=7)
    take_steps(state, 2)
    state.progress.update_best(0.5, 1.5)
    state.progress.finish_epoch()
    state.save(tmp_path / 'c.pth')
    other.load(tmp_path / 'c.pth')
    assert other.progress == Progress(epoch=1, best=0.5, best_epoch=1, best_gain=1.5)
    for weight in other.net.parameters():
        for average in other.optimizer.state[weight].values():
            assert not average.dim() or average.stride() == weight.stride()
    for run in state, other:
        take_steps(run, 3)
        run.save(tmp_path / f'{run is state}.pth')
    ended = [torch.load(tmp_path / f'{which}.pth', weights_only=True) for which in (True, False)]
    assert is_same(*ended)


def test_without_a_checkpoint_nothing_changes(tmp_path):
    state = new_state()
    state.load(tmp_path / 'c.pth')
    assert state.progress == Progress()


@pytest.mark.parametrize(
    'settings, reason',
    [
        (dict(batch_size=16), 'was trained with --batch_size 32, not 16: give that, or another'),
        (dict(demo=True), 'was trained with --demo False, not True'),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, settings, reason):
    new_state().save(tmp_path / 'c.pth')
    with pytest.raises(UsageError, match=reason):
        new_state(**settings).load(tmp_path / 'c.pth')


@pytest.mark.parametrize(
    'change, reason',
    [
        (lambda saved: saved.update(version=3), 'is no checkpoint of this version'),
        (lambda saved: saved.pop('version'), 'is no checkpoint of this version'),
        (lambda saved: saved['net'].popitem(), 'is of another network: it has no tensor'),
    ],
)
def test_a_checkpoint_of_another_version_is_refused(tmp_path, change, reason):
    new_state().save(tmp_path / 'c.pth')
    saved = torch.load(tmp_path / 'c.pth', weights_only=True)
    change(saved)
    torch.save(saved, tmp_path / 'c.pth')
    with pytest.raises(UsageError, match=reason):
        new_state().load(tmp_path / 'c.pth')


def test_the_lowest_objective_is_the_best():
    progress, best = Progress(), []
    for objective in 0.5, 0.6, 0.4:
        best.append(progress.update_best(objective, 1.0))
        progress.finish_epoch()
    assert best == [True, False, True] and (progress.best, progress.best_epoch) == (0.4, 3)
    assert progress.update_best(None, 0.0) and progress.best_epoch == 4
    with pytest.raises(FloatingPointError, match='validation loss is nan at step 0 of epoch 4'):
        progress.update_best(float('nan'), 0.0)
