"""demo_landscapes.py: the same drawings from the same seed, its command line, two calls at once."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import demo_landscapes
from demo_landscapes import KINDS, draw_landscape, draw_landscapes


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()
    }


@pytest.mark.parametrize('kind', KINDS)
def test_a_drawing_comes_from_its_seed_alone(kind):
    first, same, other = (draw_landscape(kind, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert (first.size, first.mode) == ((160, 120), 'RGB')
    assert first.tobytes() == same.tobytes() != other.tobytes()
    assert len(first.getcolors(160 * 120)) > 1000  # no empty canvas


def test_only_known_kinds():
    with pytest.raises(ValueError, match="'desert' is not one of"):
        draw_landscape('desert', np.random.default_rng(0))


def test_the_same_set_from_the_same_seed(tmp_path):
    assert draw_landscapes(tmp_path / 'a', per_kind=2) == 14
    assert draw_landscapes(tmp_path / 'b', per_kind=3) == 21
    assert draw_landscapes(tmp_path / 'c', per_kind=2, seed=1) == 14
    a, b, c = (contents(tmp_path / name) for name in 'abc')
    assert sorted(a) == sorted(f'{kind}/{kind}_{n:03}.jpg' for kind in KINDS for n in (1, 2))
    assert a == {name: b[name] for name in a}
    assert set(a.values()).isdisjoint(c.values())
    assert len(set(b.values())) == 21


def test_pictures_that_are_there_are_kept(tmp_path):
    mine = tmp_path / 'mine/1.jpg'
    mine.parent.mkdir()
    Image.new('RGB', (8, 8)).save(mine)
    before = contents(tmp_path)
    assert draw_landscapes(tmp_path / 'mine', per_kind=1) == 1
    assert contents(tmp_path) == before


@pytest.mark.parametrize('target_exists', [True, False])
def test_a_link_is_followed(tmp_path, target_exists):
    if target_exists:
        (tmp_path / 'disk/demo').mkdir(parents=True)
    (tmp_path / 'demo').symlink_to('disk/demo')
    assert draw_landscapes(tmp_path / 'demo', per_kind=1) == 7
    assert (tmp_path / 'demo').is_symlink()
    assert len(contents(tmp_path / 'disk/demo')) == 7
    assert [p.name for p in (tmp_path / 'disk').iterdir()] == ['demo']


def test_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(kind, rng):
        if kind == KINDS[-1]:
            raise KeyboardInterrupt
        return draw_landscape(kind, rng)

    monkeypatch.setattr(demo_landscapes, 'draw_landscape', interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw_landscapes(tmp_path / 'demo', per_kind=1)
    assert list(tmp_path.iterdir()) == []


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


def test_two_programs_at_once(tmp_path):
    command = [sys.executable, ROOT / 'demo_landscapes.py', 'demo', '--per_kind', '2']
    both = [
        subprocess.Popen(
            command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    for program in both:
        out, err = program.communicate(timeout=120)
        assert (program.returncode, err) == (0, '')
        assert out in ('14 pictures in demo\n', '14 pictures already in demo\n')
    assert [p.name for p in tmp_path.iterdir()] == ['demo']
    draw_landscapes(tmp_path / 'expected', per_kind=2)
    assert contents(tmp_path / 'demo') == contents(tmp_path / 'expected')


def test_the_command_line(run, tmp_path):
    assert run('demo_landscapes.py', '--per_kind', 1).stdout == '7 pictures in data/demo\n'
    assert len(contents(tmp_path / 'data/demo')) == 7
    again = run('demo_landscapes.py', '--per_kind', 2)
    assert again.stdout == '7 pictures already in data/demo\n'
    run('demo_landscapes.py', 'other', '--per_kind', 1, '--seed', 5)
    draw_landscapes(tmp_path / 'expected', per_kind=1, seed=5)
    assert contents(tmp_path / 'other') == contents(tmp_path / 'expected')


@pytest.mark.parametrize('flag', ['-h', '--help'])
def test_help_draws_nothing(run, tmp_path, flag):
    done = run('demo_landscapes.py', flag)
    assert done.stderr == ''
    assert all(word in done.stdout for word in ('folder', 'data/demo', '--per_kind', '--seed'))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    'words, said',
    [
        (['--per_kind', 0], '--per_kind must be at least 1, not 0'),
        (['--per_kind', 'x'], "argument --per_kind: invalid int value: 'x'"),
        (['--seed', -1], '--seed must be 0 or above, not -1'),
        (['--per', 3], 'unrecognized arguments: --per'),
        (['a', 'b'], 'unrecognized arguments: b'),
        ([''], 'the folder has no name'),
    ],
)
def test_wrong_arguments(run, tmp_path, words, said):
    done = run('demo_landscapes.py', *words, code=2)
    assert (done.stdout, done.stderr) == ('', f'demo_landscapes.py: {said}\n')
    assert list(tmp_path.iterdir()) == []


def test_the_working_directory_is_not_replaced(run, tmp_path):
    said = 'this is the working directory; name a folder in it'
    for place in '.', tmp_path:
        done = run('demo_landscapes.py', place, code=1)
        assert done.stderr == f'demo_landscapes.py: {tmp_path}: {said}\n'
    assert list(tmp_path.iterdir()) == []
    draw_landscapes(tmp_path / 'demo', per_kind=1)
    assert (
        run('demo_landscapes.py', '.', cwd=tmp_path / 'demo').stdout == '7 pictures already in .\n'
    )


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='only Linux has it')
def test_a_full_disk_behind_the_output(tmp_path):
    with open('/dev/full', 'w') as full:
        done = subprocess.run(
            [sys.executable, ROOT / 'demo_landscapes.py', '--per_kind', '1'],
            cwd=tmp_path,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    said = 'demo_landscapes.py: standard output: No space left on device\n'
    assert (done.returncode, done.stderr) == (1, said)
    assert len(contents(tmp_path / 'data/demo')) == 7


def test_a_place_that_is_taken(run, tmp_path):
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes/1.txt').write_text('mine')
    before = contents(tmp_path)
    for place in 'notes', 'notes/1.txt':
        done = run('demo_landscapes.py', place, code=2)
        assert done.stderr == (
            f'demo_landscapes.py: {place} has no pictures, and is no empty '
            'folder: name another one\n'
        )
    done = run('demo_landscapes.py', 'notes/1.txt/demo', code=1)
    assert done.stderr == f'demo_landscapes.py: {tmp_path}/notes/1.txt: File exists\n'
    assert contents(tmp_path) == before
