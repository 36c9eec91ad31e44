"""demo_landscapes.py: the same drawings from the same seed, and a folder that is filled at once."""

import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, call
from PIL import Image

import demo_landscapes
from demo_landscapes import KINDS, draw_landscape, draw_landscapes


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()
    }


def test_the_same_set_from_the_same_seed(tmp_path):
    assert draw_landscapes(tmp_path / 'a', per_kind=2) == 14
    assert draw_landscapes(tmp_path / 'b', per_kind=3) == 21
    assert draw_landscapes(tmp_path / 'c', per_kind=2, seed=1) == 14
    a, b, c = (contents(tmp_path / name) for name in 'abc')
    assert sorted(a) == sorted(f'{kind}/{kind}_{n:03}.jpg' for kind in KINDS for n in (1, 2))
    assert a == {name: b[name] for name in a}
    assert set(a.values()).isdisjoint(c.values())
    assert len(set(b.values())) == 21
    for name in a:
        picture = Image.open(tmp_path / 'a' / name)
        assert (picture.size, picture.mode) == ((160, 120), 'RGB')
        assert len(picture.getcolors(160 * 120)) > 1000  # no empty canvas


def test_whoever_comes_second_keeps_what_is_there(tmp_path, monkeypatch):
    """The first call ends while the second draws its last kind."""

    def first_ends(kind, rng):
        if kind == KINDS[-1]:
            monkeypatch.undo()
            draw_landscapes(tmp_path / 'demo', per_kind=2)
        return draw_landscape(kind, rng)

    monkeypatch.setattr(demo_landscapes, 'draw_landscape', first_ends)
    assert draw_landscapes(tmp_path / 'demo', per_kind=1, seed=1) == 14
    draw_landscapes(tmp_path / 'expected', per_kind=2)
    assert contents(tmp_path / 'demo') == contents(tmp_path / 'expected')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['demo', 'expected']


def test_the_command_line(tmp_path, capsys):
    for already in '', 'already ':
        assert call(tmp_path, 'demo', '--per_kind', 1, '--seed', 5, program=demo_landscapes) == 0
        assert capsys.readouterr() == (f'7 pictures {already}in demo\n', '')
    draw_landscapes(tmp_path / 'expected', per_kind=1, seed=5)
    assert contents(tmp_path / 'demo') == contents(tmp_path / 'expected')


def test_a_signal_leaves_nothing(tmp_path):
    command = [sys.executable, ROOT / 'demo_landscapes.py', '--per_kind', '9999']
    program = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.rglob('*.jpg')):
        assert program.poll() is None
        time.sleep(0.01)
    program.terminate()
    assert program.communicate(timeout=60) == (None, '')
    assert program.returncode == 128 + signal.SIGTERM
    assert list((tmp_path / 'data').iterdir()) == []


@pytest.mark.parametrize(
    'words, code, said',
    [
        (['--per_kind', '0'], 2, '--per_kind: 0 is not a whole number above 0'),
        (['notes'], 2, 'notes has no pictures and is not empty: name another'),
        (['notes/1.txt/demo'], 1, 'notes/1.txt: File exists'),
    ],
)
def test_what_is_refused(tmp_path, capsys, words, code, said):
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes/1.txt').write_text('mine')
    assert call(tmp_path, *words, program=demo_landscapes) == code
    out, err = capsys.readouterr()
    assert out == '' and said in err and err.count('\n') == 1
    assert contents(tmp_path) == {'notes/1.txt': b'mine'}
