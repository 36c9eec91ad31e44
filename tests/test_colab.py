"""docs/colab.ipynb, made from docs/colab.md and executed, but for Google's part.

Stood in for: the address of the code, by a repository of this checkout; Drive, by a folder; the
landscapes and the demo's 280 drawings, by 56 drawings; the runs, by small ones.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess

import pytest
from pages import PAGES, ROOT, SMALL, copy_project, make_tools

MISSING = [name for name in ('nbclient', 'ipykernel', 'pip') if not importlib.util.find_spec(name)]
MISSING += [] if shutil.which('git') else ['git']


def test_the_notebook_is_made_from_the_page(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'docs')
    from make_notebook import make_notebook

    notebook = (ROOT / 'docs/colab.ipynb').read_text('utf-8')
    page = PAGES[ROOT / 'docs/colab.md']
    assert notebook == make_notebook(page), 'run python docs/make_notebook.py'


@pytest.fixture
def machine(drawings, tmp_path, monkeypatch):
    """A repository of the code, and the environment of Colab's machine; all of it ends."""
    code, tools = tmp_path / 'repository', tmp_path / 'bin'
    copy_project(code)
    shutil.copytree(drawings, code / 'data/demo')
    (code / 'download_landscapes.sh').write_text('cp -r data/demo data/landscapes\n')
    user = '-c user.name=test -c user.email=test@localhost'.split()
    for words in ['init', '-q'], ['add', '-A'], [*user, 'commit', '-qm', 'test']:
        subprocess.run(['git', *words], cwd=code, check=True)
    make_tools(tools)
    monkeypatch.setenv('PATH', f'{tools}:{os.environ["PATH"]}')
    for name in 'TMPDIR', 'HOME', 'IPYTHONDIR':
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv('PIP_NO_INDEX', '1')  # pip must not go out
    yield code
    for info in tmp_path.glob('.tensorboard-info/pid-*.info'):  # the server outlives its notebook
        with contextlib.suppress(ProcessLookupError):
            os.kill(json.loads(info.read_text())['pid'], signal.SIGTERM)


def execute(folder, machine, drive, epochs, wanted=('',)):
    """Execute the cells with one of the words; return what each printed, and the kinds it shows."""
    import nbclient
    import nbformat

    notebook = nbformat.read(ROOT / 'docs/colab.ipynb', as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
    ours = [cell for cell in cells if 'google.colab' not in cell.source]
    assert len(ours) == len(cells) - 2
    notebook.cells = [cell for cell in ours if any(word in cell.source for word in wanted)]
    for cell in notebook.cells:
        source = cell.source.replace('REPOSITORY', f'file://{machine}')
        source = source.replace('/content/drive/MyDrive', str(drive))
        cell.source = source.replace('colorize.py --', f'colorize.py {SMALL} --epochs {epochs} --')
    folder.mkdir()
    place = {'metadata': {'path': str(folder)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name='python3', resources=place).execute()
    outputs = [cell.outputs for cell in notebook.cells]
    said = [''.join(part.get('text', '') for part in parts) for parts in outputs]
    return said, [{kind for part in parts for kind in part.get('data', {})} for parts in outputs]


def weights_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*.pth')}


@pytest.mark.long
@pytest.mark.skipif(bool(MISSING), reason=f'not on this machine: {", ".join(MISSING)}')
def test_the_notebook_runs_and_goes_on_after_a_disconnect(machine, tmp_path):
    drive = tmp_path / 'MyDrive'
    drive.mkdir()
    said, shown = execute(tmp_path / 'first', machine, drive, 1)
    code, _, restored, _, demo, _, train, album, _ = said
    assert 'fatal' not in code and not restored.strip()
    assert all('photos to train on' in text and 'unet.pth: epoch' in text for text in (demo, train))
    assert '4 photos in ' in album and len(list(drive.glob('colorize/colorized/*.jpg'))) == 4
    assert 'text/html' in shown[3]  # the frame with TensorBoard's page
    assert 'image/png' in shown[-1]
    kept = weights_in(drive / 'colorize')
    assert kept == weights_in(tmp_path / 'first/colorize') and len(kept) == 5
    assert list(drive.rglob('*.part')) == []

    shutil.rmtree(tmp_path / 'first')  # another machine has nothing but Drive
    wanted = 'REPOSITORY', 'DRIVE =', 'download', 'save_until'
    (_, restored, _, train), _ = execute(tmp_path / 'second', machine, drive, 2, wanted)
    assert restored.split() == ['runs/UNet/unet.pth', 'runs/demo/unet.pth']
    assert ' 2/2 ' in train and ' 1/2 ' not in train  # no epoch is repeated
    assert weights_in(drive / 'colorize') == weights_in(tmp_path / 'second/colorize') != kept
