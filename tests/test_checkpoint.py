"""Files that are whole or not there, weights for any laptop, checkpoints equal to the bit."""

import os
import pickle
import resource
import signal

import pytest
import torch
from helpers import in_a_child, is_same, load

from benchmarks.reference import UNet as TemplateUNet
from unet import UNet
from utils.checkpoint import VERSION, Progress, State, atomic_write, load_weights, save_weights
from utils.cli import UsageError
from utils.device import Precision, channels_last
from utils.muon import Muon

CPU = torch.device('cpu')
DAMAGED = 'a.pth is damaged, or no file of tensors; nothing was run'


class Malicious:
    """Unpickling it creates the file `executed`."""

    def __reduce__(self):
        return open, ('executed', 'w')


def new_state(seed=0, fused=True):
    torch.manual_seed(seed)
    net = channels_last(UNet(image_size=32), CPU)
    optimizer, scaler = Muon(net.parameters(), fused=fused), Precision().scaler
    return State(net, optimizer, scaler, dict(batch_size=32, demo=False))


def take_steps(state, number):
    torch.manual_seed(number)
    for _ in range(number):
        state.optimizer.zero_grad()
        state.net(torch.rand(2, 1, 16, 16) * 2 - 1).square().mean().backward()
        state.optimizer.step()


@pytest.mark.parametrize('moment', ['fsync', 'replace'])
def test_a_kill_while_saving_leaves_the_file_as_it_was(tmp_path, monkeypatch, moment):
    atomic_write(b'1', tmp_path / 'a.pth')
    monkeypatch.setattr(os, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert in_a_child(lambda: atomic_write(b'2', tmp_path / 'a.pth')) == -signal.SIGKILL
    assert (tmp_path / 'a.pth').read_bytes() == b'1'


def test_a_file_that_cannot_be_written_leaves_all_as_they_were(tmp_path):
    atomic_write(b'1', tmp_path / 'a.pth')
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))  # as on a full disk
    try:
        with pytest.raises(OSError, match='b.pth was not saved: File too large'):
            atomic_write(bytes(4000), tmp_path / 'b.pth', tmp_path / 'a.pth')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert (tmp_path / 'a.pth').read_bytes() == b'1' and os.listdir(tmp_path) == ['a.pth']


def test_weights_are_a_plain_state_dict_that_knows_its_size(tmp_path):
    net = channels_last(UNet(image_size=96), CPU).bfloat16()
    save_weights(net, 'made up', tmp_path / 'a.pth', tmp_path / 'b.pth')
    assert (tmp_path / 'a.pth').read_bytes() == (tmp_path / 'b.pth').read_bytes()
    state = torch.load(tmp_path / 'a.pth', weights_only=True)
    for value in state.values():
        assert value.dtype == torch.float32 and value.device == CPU
        assert value.is_contiguous() and not value.requires_grad
    TemplateUNet().load_state_dict(state, strict=True)
    loaded = load_weights(UNet(), tmp_path / 'a.pth')
    assert (loaded.image_size, loaded.about) == (96, 'made up')
    assert all(map(torch.equal, loaded.state_dict().values(), state.values()))
    torch.save(dict(state), tmp_path / 'c.pth')  # a student's own
    assert load_weights(UNet(96), tmp_path / 'c.pth').image_size == 96


def changed(name, value):
    return lambda path: torch.save(UNet().state_dict() | {name: value}, path)


@pytest.mark.parametrize(
    'make, reason',
    [
        (lambda path: None, 'no weights a.pth: train with colorize.py, or name them'),
        (lambda path: path.touch(), DAMAGED),
        (lambda path: path.write_bytes(pickle.dumps(Malicious())), DAMAGED),
        (lambda path: torch.save(dict(net=Malicious()), path), DAMAGED),
        (lambda path: torch.save([1, 2], path), 'of this network: Expected state_dict'),
        (lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path), 'Missing key'),
        (changed('last_conv.bias', torch.zeros(4)), 'size mismatch for last_conv.bias'),
        (changed('last_conv.bias', torch.full((3,), torch.nan)), 'weights that are not finite'),
        (changed('more', torch.zeros(1)), 'Unexpected key.*"more"'),
        (lambda path: new_state().save(path), 'a.pth is the checkpoint of a run'),
    ],
)
def test_what_is_no_weights_is_refused_in_a_line_and_not_run(tmp_path, monkeypatch, make, reason):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / 'a.pth')
    with pytest.raises(UsageError, match=reason) as error:
        load_weights(UNet(), 'a.pth')
    if reason == DAMAGED:
        with pytest.raises(UsageError, match=reason):
            new_state().load('a.pth')
    assert '\n' not in str(error.value) and not (tmp_path / 'executed').exists()


@pytest.mark.parametrize('fused', [True, False])  # False on an Apple GPU
def test_a_loaded_state_goes_on_to_the_bit(tmp_path, fused):
    state, other = new_state(), new_state(7, fused)
    other.load(tmp_path / 'c.pth')
    assert other.progress == Progress()  # there is no checkpoint yet
    take_steps(state, 2)
    state.progress.update_best(0.5, 1.5)
    state.progress.finish_epoch()
    state.save(tmp_path / 'c.pth')
    other.load(tmp_path / 'c.pth')
    assert other.progress == Progress(epoch=1, best=0.5, best_epoch=1, best_gain=1.5)
    assert other.optimizer.param_groups[0]['fused'] == fused  # as this start wants it
    for weight in other.net.parameters():
        for average in other.optimizer.state[weight].values():
            assert not average.dim() or average.stride() == weight.stride()
    other.save(tmp_path / 'd.pth')
    assert is_same(load(tmp_path / 'c.pth'), load(tmp_path / 'd.pth'))
    for run in state, other:
        take_steps(run, 3)
    for ours, theirs in zip(state.net.parameters(), other.net.parameters(), strict=True):
        assert torch.equal(ours, theirs) or not fused and torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    'change, reason',
    [
        (lambda saved: saved.update(version=VERSION - 1), 'is of another version of the program'),
        (lambda saved: saved['net'].popitem(), 'holds no weights of this network: .* Missing key'),
        (
            lambda saved: saved['settings'].update(batch_size=16),
            'was trained with --batch_size 16, not 32: give that, or another --name',
        ),
    ],
)
def test_a_checkpoint_of_another_version_or_run_is_refused(tmp_path, change, reason):
    new_state().save(tmp_path / 'c.pth')
    saved = load(tmp_path / 'c.pth')
    change(saved)
    torch.save(saved, tmp_path / 'c.pth')
    with pytest.raises(UsageError, match=reason):
        new_state().load(tmp_path / 'c.pth')
