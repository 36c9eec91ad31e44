"""The page that colorizes photos, in a real browser."""

import os
import re
import shutil
import signal
import sys
import zipfile
from pathlib import Path

import helpers
import pytest
import torch
from browser import browser, free_port, needs_browser, says, started, until
from PIL import Image

from unet import UNet

gr = pytest.importorskip('gradio', reason='Gradio is not installed: requirements-app.txt')
import app  # noqa: E402
import predict  # noqa: E402


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A folder with weights: untrained, but with colors."""
    home = tmp_path_factory.mktemp('app')
    torch.manual_seed(0)
    net = UNet()
    with torch.no_grad():
        net.last_conv.weight *= 20
        net.last_conv.bias.copy_(torch.tensor([0.8, 0.5, 0.2]))
    torch.save(net.state_dict(), home / 'unet.pth')
    (home / 'tmp').mkdir()
    return home


@pytest.fixture(scope='module')
def server(home):
    """The port of a running app.py, which leaves nothing behind when it is stopped."""
    port, log = free_port(), home / 'app.log'
    words = [sys.executable, helpers.ROOT / 'app.py', '--port', str(port), '--device', 'cpu']
    with started(words, log, cwd=home, env=os.environ | dict(TMPDIR=str(home / 'tmp'))) as program:
        says(log, program, f'http://localhost:{port}')
        yield port
    assert program.returncode == 128 + signal.SIGTERM and not tree(home / 'tmp')
    assert 'Traceback' not in log.read_text()


def tree(folder):
    """The files below a folder that have content: Gradio leaves empty ones."""
    return {path for path in folder.rglob('*') if path.is_file() and path.stat().st_size}


@pytest.fixture(scope='module')
def chromium(server):
    with browser(height=900) as page:
        yield page.context.browser


@pytest.fixture
def window(chromium, server):
    """window(): a new window of the browser with the page in it, and what it asked for."""
    contexts = []

    def window():
        contexts.append(chromium.new_context(viewport=dict(width=1200, height=850)))
        page = contexts[-1].new_page()
        page.urls = []
        page.on('request', lambda request: page.urls.append(request.url))
        page.goto(f'http://localhost:{server}')
        page.wait_for_selector('#photos input[type=file]', state='attached')
        return page

    yield window
    for context in contexts:
        context.close()


def drop(page, path):
    """Drop a photo on the page, and wait for what comes of it."""
    page.set_input_files('#photos input[type=file]', path)
    page.wait_for_function(
        'name => document.querySelector("#message").innerText.includes(name)', arg=path.name
    )


def set_slider(page, name, value):
    """Type a value beside a slider, and wait until the result is replaced."""
    before = page.locator('#result img').evaluate_all('all => all.map(img => img.src)')
    page.fill(f'#{name} input[type=number]', str(value))
    page.keyboard.press('Tab')
    page.wait_for_function(
        'before => { const all = [...document.querySelectorAll("#result img")];'
        ' return all.length == 2 && all.every(img => !before.includes(img.src)) }',
        arg=before,
    )


def download(page, home):
    """Click the button; return the name that the browser saves under, and the content."""
    page.wait_for_selector('#download:not([disabled])')
    with page.expect_download() as waiting:
        page.click('#download')
    waiting.value.save_as(home / 'got')
    return waiting.value.suggested_filename, (home / 'got').read_bytes()


def colorize(home, photo, *flags):
    """Return the name and the content of the file that the page should give for a photo."""
    flags = '--device', 'cpu', '--overwrite', *flags
    assert helpers.call(home, photo, *flags, program=predict) == 0
    name = f'{photo.stem}_colorized{photo.suffix}'
    return name, (home / 'colorized' / photo.name).read_bytes()


@needs_browser
def test_nothing_is_kept_of_a_closed_page(window, home, drawings):
    page, before = window(), tree(home / 'tmp')
    drop(page, drawings / 'field/field_001.jpg')
    for saturation in 0.5, 1.5:
        set_slider(page, 'saturation', saturation)
    made = tree(home / 'tmp') - before
    result = ['color.jpg', 'field_001_colorized.jpg', 'gray.jpg']  # two: one may be loading
    assert sorted(path.name for path in made) == sorted(['field_001.jpg', *result, *result])
    page.close()
    assert not until(lambda: any(path.exists() for path in made), False)


@needs_browser
def test_a_drawing_is_colorized_as_predict_does(window, home, drawings, server):
    photo, page = home / 'a lake.jpg', window()
    shutil.copy(drawings / 'lake/lake_002.jpg', photo)
    drop(page, photo)
    page.wait_for_selector('#result img')
    assert download(page, home) == colorize(home, photo)
    set_slider(page, 'saturation', 1.5)
    assert download(page, home) == colorize(home, photo, '--saturation', '1.5')
    set_slider(page, 'size', 64)
    assert download(page, home) == colorize(home, photo, '--saturation', '1.5', '--size', '64')
    asked = {re.match(r'\w+://[^/]*|blob:|data:', url)[0] for url in page.urls}
    assert asked <= {f'http://localhost:{server}', 'blob:', 'data:'}


@needs_browser
def test_two_windows_have_their_own_photos_one_transparent(window, home, drawings):
    pages, photos = [window(), window()], [home / 'one.png', home / 'two.png']
    Image.open(drawings / 'ocean/ocean_001.jpg').save(photos[0])
    clear = Image.open(drawings / 'city/city_001.jpg')
    clear.putalpha(clear.convert('L'))
    clear.save(photos[1])
    for page, photo in zip(pages, photos, strict=True):
        drop(page, photo)
    set_slider(pages[0], 'saturation', 0.5)
    assert download(pages[0], home) == colorize(home, photos[0], '--saturation', '0.5')
    assert download(pages[1], home) == colorize(home, photos[1])


@needs_browser
def test_several_photos_are_one_archive(window, home, drawings):
    page, photos = window(), [drawings / f'{kind}/{kind}_001.jpg' for kind in ('city', 'road')]
    (home / 'notes.jpg').write_text('Not a photo.')
    page.set_input_files('#photos input[type=file]', [*photos, home / 'notes.jpg'])
    name, content = download(page, home)
    assert name == 'colorized.zip'
    with zipfile.ZipFile(home / 'got') as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    assert found == dict(colorize(home, photo) for photo in photos)
    assert page.locator('#others img').count() == 1
    assert page.inner_text('#message').startswith('notes.jpg: no photo that Pillow can read')


def test_only_this_machine_is_listened_to(server):
    for table, address in ('tcp', f'0100007F:{server:04X}'), ('tcp6', None):
        if os.path.exists(f'/proc/net/{table}'):
            rows = [line.split() for line in Path(f'/proc/net/{table}').read_text().splitlines()]
            listening = {row[1] for row in rows if row[3] == '0A' and f':{server:04X}' in row[1]}
            assert listening == ({address} if address else set())


def test_what_cannot_be_served_is_told_in_a_line(home, server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('GRADIO_TEMP_DIR', str(tmp_path))  # so that it is put back
    assert helpers.call(home, '--port', server, '--device', 'cpu', program=app) == 2
    line = f'app.py: --port {server} is taken or not allowed; give another\n'
    assert capsys.readouterr().err.endswith(line)
    assert helpers.call(tmp_path, program=app) == 2
    assert capsys.readouterr().err.startswith('app.py: no weights unet.pth: ')
