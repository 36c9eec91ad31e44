"""The page that colorizes photos, in a real browser."""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from browser import browser, free_port, needs_browser, says, started, until
from PIL import Image

import app
from unet import UNet

ROOT = Path(__file__).parent.parent
needs_gradio = pytest.mark.skipif(
    not importlib.util.find_spec('gradio'), reason='Gradio is not installed: requirements-app.txt'
)


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
    """The port of a running app.py."""
    port, log = free_port(), home / 'app.log'
    words = [sys.executable, ROOT / 'app.py', '--port', str(port), '--device', 'cpu']
    with started(words, log, cwd=home, env=os.environ | dict(TMPDIR=str(home / 'tmp'))) as app:
        says(log, app, f'http://localhost:{port}')
        yield port


@needs_gradio
@pytest.mark.parametrize('size', [8, 64, 4096])
def test_every_size_of_training_is_on_the_slider(size):
    import gradio as gr

    with gr.Blocks():
        slider = app.add_controls(gr, size).size
    assert slider.preprocess(size) == size


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
        page.wait_for_selector('#photo input[type=file]', state='attached')
        return page

    yield window
    for context in contexts:
        context.close()


def drop(page, path):
    """Drop a photo on the page, and wait for what comes of it."""
    page.set_input_files('#photo input[type=file]', path)
    page.wait_for_function(
        'name => document.querySelector("#message").innerText.includes(name)',
        arg=os.path.basename(path),
    )


def download(page, path):
    """Save what the page's button downloads; return the name that it proposes."""
    page.wait_for_selector('#download:not([disabled])')
    with page.expect_download() as waiting:
        page.click('#download')
    waiting.value.save_as(path)
    return waiting.value.suggested_filename


def predicted(home, photo, *flags):
    """What predict.py makes of a photo."""
    shutil.rmtree(home / 'colorized', ignore_errors=True)
    subprocess.run(
        [sys.executable, ROOT / 'predict.py', photo, '--device', 'cpu', *flags],
        cwd=home,
        check=True,
        capture_output=True,
        timeout=120,
    )
    return (home / 'colorized' / os.path.basename(photo)).read_bytes()


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


def tree(folder):
    """The files below a folder that have content: Gradio leaves empty ones."""
    return [path for path in folder.rglob('*') if path.is_file() and path.stat().st_size]


# ---------------------------------------------------------------------------- in the browser


@needs_gradio
@needs_browser
def test_a_drawing_is_colorized_as_predict_does(window, home, drawings, server):
    photo, page = home / 'a lake.jpg', window()
    shutil.copy(drawings / 'lake/lake_002.jpg', photo)
    drop(page, photo)
    page.wait_for_selector('#result img')
    assert download(page, home / 'got.jpg') == 'a lake.jpg'
    assert (home / 'got.jpg').read_bytes() == predicted(home, photo)
    if path := os.environ.get('APP_SCREENSHOT'):
        page.mouse.move(5, 5)
        page.screenshot(path=path)

    set_slider(page, 'saturation', 1.5)
    download(page, home / 'got.jpg')
    assert (home / 'got.jpg').read_bytes() == predicted(home, photo, '--saturation', '1.5')
    set_slider(page, 'size', 64)
    download(page, home / 'got.jpg')
    assert (home / 'got.jpg').read_bytes() == predicted(
        home, photo, '--saturation', '1.5', '--size', '64'
    )
    assert {re.match(r'\w+://[^/]*|blob:|data:', url)[0] for url in page.urls} <= {
        f'http://localhost:{server}',
        'blob:',
        'data:',
    }


@needs_gradio
@needs_browser
def test_a_text_is_refused_in_the_page(window, home):
    (home / 'notes.jpg').write_text('Not a photo.')
    page = window()
    drop(page, home / 'notes.jpg')
    assert page.inner_text('#message').startswith('notes.jpg: no photo that Pillow can read.')
    assert page.locator('#result img').count() == 0
    assert page.locator('#download').is_disabled()


@needs_gradio
@needs_browser
def test_two_windows_have_their_own_photos(window, home, drawings):
    pages = window(), window()
    photos = [home / 'one.png', home / 'two.png']
    for kind, photo in zip(('ocean', 'city'), photos, strict=True):
        Image.open(drawings / f'{kind}/{kind}_001.jpg').save(photo)
    for page, photo in zip(pages, photos, strict=True):
        drop(page, photo)
    set_slider(pages[0], 'saturation', 0.5)
    for page, photo, saturation in zip(pages, photos, ('0.5', '1'), strict=True):
        assert download(page, home / 'got.png') == photo.name
        assert (home / 'got.png').read_bytes() == predicted(home, photo, '--saturation', saturation)


@needs_gradio
@needs_browser
def test_a_transparent_photo(window, home, drawings):
    photo, page = home / 'clear.png', window()
    picture = Image.open(drawings / 'road/road_001.jpg')
    picture.putalpha(picture.convert('L'))
    picture.save(photo)
    drop(page, photo)
    download(page, home / 'got.png')
    assert (home / 'got.png').read_bytes() == predicted(home, photo)


@needs_gradio
@needs_browser
def test_an_example_is_tried_with_a_click(window):
    page = window()
    page.wait_for_selector('#examples img')
    assert page.locator('#examples img').count() == 7
    page.locator('#examples button:has(img)').nth(2).click()
    page.wait_for_selector('#result img')
    assert page.inner_text('#message').strip() == 'forest_001.jpg'


@needs_gradio
@needs_browser
def test_nothing_is_kept_of_a_closed_page(window, home, drawings):
    page = window()
    before = set(tree(home / 'tmp'))
    drop(page, drawings / 'field/field_001.jpg')
    page.wait_for_selector('#download:not([disabled])')
    assert {path.name for path in set(tree(home / 'tmp')) - before} == {
        'gray.jpg',
        'color.jpg',
        'field_001.jpg',
    }
    page.close()
    assert until(lambda: set(tree(home / 'tmp')) - before, set()) == set()


# ---------------------------------------------------------------------------- the server


@needs_gradio
def test_the_socket_is_this_machine_s_own(server):
    listening = [line.split()[1:4] for line in Path('/proc/net/tcp').read_text().splitlines()[1:]]
    addresses = {
        local
        for local, _, state in listening
        if state == '0A' and int(local.split(':')[1], 16) == server
    }
    assert addresses == {f'0100007F:{server:04X}'}
    everywhere = Path('/proc/net/tcp6').read_text() if os.path.exists('/proc/net/tcp6') else ''
    assert f':{server:04X} ' not in ''.join(line[:44] for line in everywhere.splitlines())


@needs_gradio
@pytest.mark.parametrize(
    'path',
    [
        '/file=../../etc/passwd',
        '/file=/etc/passwd',
        '/gradio_api/file=../../etc/passwd',
        '/gradio_api/file=/etc/passwd',
        '/gradio_api/file=UNET',
        '/static/../../../../etc/passwd',
        '/static//etc/passwd',
        '/assets/..%2f..%2f..%2f..%2f..%2f..%2fetc/passwd',
        '/gradio_api/proxy=http://127.0.0.1/',
    ],
)
def test_other_files_are_not_served(server, home, path):
    request = f'GET {path.replace("UNET", str(home / "unet.pth"))} HTTP/1.0\r\n\r\n'
    with socket.create_connection(('127.0.0.1', server)) as connection:
        connection.sendall(request.encode())
        answer = b''.join(iter(lambda: connection.recv(65536), b''))
    assert re.match(rb'HTTP/1\.1 4\d\d ', answer) and b'root:' not in answer
    assert len(answer) < 2000


@needs_gradio
def test_the_browser_may_fetch_nothing_from_elsewhere(server):
    with urllib.request.urlopen(f'http://127.0.0.1:{server}/') as answer:
        assert answer.headers['content-security-policy'].startswith("default-src 'self' ")


@needs_gradio
def test_a_file_that_is_too_large_is_refused(server):
    line = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n'
        b'Content-Type: image/jpeg\r\n\r\n'
    )
    body = line + bytes(201 * 2**20) + b'\r\n--x--\r\n'
    request = urllib.request.Request(
        f'http://127.0.0.1:{server}/gradio_api/upload',
        body,
        {'Content-Type': 'multipart/form-data; boundary=x'},
    )
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request)
    assert error.value.code == 413


@needs_gradio
def test_a_port_that_is_taken_is_told(run, home, server):
    done = run('app.py', '--port', server, '--device', 'cpu', cwd=home, code=2)
    assert done.stderr.splitlines()[-1] == (
        f'app.py: --port {server} is taken or not allowed; give another'
    )


def test_without_weights(run):
    done = run('app.py', code=2)
    assert done.stderr == (
        'app.py: no weights file unet.pth: train with colorize.py, or name it with --weights\n'
    )
