"""docs/colab.ipynb, made from docs/colab.md and executed from top to bottom, but for Google's part.

Stood in for: the address of the code, by a repository of this checkout; Drive, by a folder; the
downloaded landscapes, by drawings; the runs, by small ones.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from pages import PAGES, ROOT, SMALL

spec = importlib.util.spec_from_file_location('make_notebook', ROOT / 'docs/make_notebook.py')
notebook_maker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(notebook_maker)

MISSING = [name for name in ('nbclient', 'ipykernel', 'pip') if not importlib.util.find_spec(name)]
if not shutil.which('git'):
    MISSING.append('git')


def test_the_notebook_is_made_from_the_page():
    notebook = (ROOT / 'docs/colab.ipynb').read_text('utf-8')
    assert notebook == notebook_maker.make_notebook(PAGES[ROOT / 'docs/colab.md']), (
        'run python docs/make_notebook.py'
    )


@pytest.fixture
def repository(tmp_path):
    """A git repository of this checkout as it is, in which the download links the drawings."""
    path = tmp_path / 'repository'
    shutil.copytree(
        ROOT,
        path,
        ignore=shutil.ignore_patterns('.?*', '__pycache__', 'data', 'runs', 'colorized', '*.pth'),
    )
    (path / 'download_landscapes.sh').write_text(
        '#!/bin/sh\nmkdir -p data && ln -sfn "$DRAWINGS" data/landscapes && echo linked\n'
    )
    user = ['-c', 'user.name=test', '-c', 'user.email=test@localhost']
    for words in ['init', '-q'], ['add', '-A'], [*user, 'commit', '-qm', 'test']:
        subprocess.run(['git', *words], cwd=path, check=True)
    return path


@pytest.fixture
def machine(tmp_path, drawings, monkeypatch):
    """The environment of Colab's machine, which finds Python and TensorBoard; all of it ends."""
    for tool, call in dict(python='', pip='-m pip', tensorboard='-m tensorboard.main').items():
        path = tmp_path / 'bin' / tool
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {call} "$@"\n')
        path.chmod(0o755)
    for name, value in dict(
        PATH=f'{tmp_path}/bin:{os.environ["PATH"]}',
        TMPDIR=tmp_path,
        HOME=tmp_path,
        IPYTHONDIR=tmp_path / 'ipython',
        DRAWINGS=drawings,
        PIP_NO_INDEX=1,
        PIP_DISABLE_PIP_VERSION_CHECK=1,
    ).items():
        monkeypatch.setenv(name, str(value))
    yield
    for info in tmp_path.glob('.tensorboard-info/pid-*.info'):  # the server outlives its notebook
        with contextlib.suppress(ProcessLookupError):
            os.kill(json.loads(info.read_text())['pid'], signal.SIGTERM)


def execute(folder, repository, drive):
    """Execute the notebook in `folder`, and return its code cells but for the two of Google's."""
    import nbclient
    import nbformat

    notebook = nbformat.read(ROOT / 'docs/colab.ipynb', as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
    notebook.cells = [cell for cell in cells if 'google.colab' not in cell.source]
    assert len(notebook.cells) == len(cells) - 2
    for cell in notebook.cells:
        cell.source = (
            cell.source.replace('REPOSITORY', f'file://{repository}')
            .replace('/content/drive/MyDrive', str(drive))
            .replace('colorize.py --', f'colorize.py {SMALL} --')
        )
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name='python3', resources={'metadata': {'path': str(folder)}}
    ).execute()
    return notebook.cells


def printed(cell):
    return ''.join(output.get('text', '') for output in cell.outputs)


def shown(cell):
    return {kind for output in cell.outputs for kind in output.get('data', {})}


@pytest.mark.skipif(bool(MISSING), reason=f'not on this machine: {", ".join(MISSING)}')
def test_the_notebook_runs_and_goes_on_after_a_disconnect(repository, machine, tmp_path):
    drive = tmp_path / 'MyDrive'
    drive.mkdir()

    first = tmp_path / 'first'
    first.mkdir()
    code, _, restore, tensorboard, demo, download, train, album, last = execute(
        first, repository, drive
    )
    assert 'True' in printed(code) or 'False' in printed(code)
    assert 'fatal' not in printed(code)
    assert printed(restore).strip() == ''
    assert 'text/html' in shown(tensorboard)  # the frame with the page
    assert printed(download).split() == ['linked']
    assert 'unet.pth' in printed(demo) and 'unet.pth' in printed(train)
    assert all('photos to train on' in printed(cell) for cell in (demo, train))
    assert '4 photos in ' in printed(album)
    assert 'image/png' in shown(last)
    kept = {
        path.relative_to(drive / 'colorize').as_posix(): path.read_bytes()
        for path in drive.rglob('*.pth')
    }
    assert set(kept) == {
        'unet.pth',
        *(f'runs/{run}/{name}.pth' for run in ('demo', 'UNet') for name in ('unet', 'checkpoint')),
    }
    assert kept['runs/UNet/unet.pth'] == (first / 'colorize/runs/UNet/unet.pth').read_bytes()
    assert len(list(drive.glob('colorize/colorized/*.jpg'))) == 4
    assert list(drive.rglob('*.part')) == []

    shutil.rmtree(first)
    second = tmp_path / 'second'  # another machine, which has nothing but Drive
    second.mkdir()
    _, _, restore, _, demo, _, train, _, last = execute(second, repository, drive)
    assert printed(restore).split() == ['runs/UNet/unet.pth', 'runs/demo/unet.pth']
    for cell in demo, train:
        assert 'unet.pth: epoch ' in printed(cell)
        assert 'photos to train on' not in printed(cell)  # a finished run is not repeated
    assert 'image/png' in shown(last)
    assert {
        path.relative_to(drive / 'colorize').as_posix(): path.read_bytes()
        for path in drive.rglob('*.pth')
    } == kept
