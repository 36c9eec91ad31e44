"""TensorBoard, and its page as headless Chromium shows it."""

import contextlib
import importlib.util
import io
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time

import pytest
from helpers import IMAGES
from PIL import Image, ImageChops

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
# playwright itself adds what keeps Chromium from calling home; these keep it on this machine
ALONE = [
    '--disable-gpu',
    '--no-proxy-server',
    '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1',
]

MISSING = not CHROMIUM or not importlib.util.find_spec('playwright')
needs_browser = pytest.mark.skipif(MISSING, reason='Chromium or playwright is not on this machine')


def until(see, wanted, seconds=30):
    """Return what `see()` gives once it is `wanted`, or at the end of the time."""
    end = time.monotonic() + seconds
    while (seen := see()) != wanted and time.monotonic() < end:
        time.sleep(0.1)
    return seen


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def started(words, log, **kwargs):
    """Give a program in the background, to the end of the `with`; it writes into the file `log`."""
    with open(log, 'w') as file:
        program = subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, **kwargs
        )
    try:
        yield program
    finally:
        for number in signal.SIGTERM, signal.SIGKILL:  # the group: with all that it has started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.wait(60)


def says(log, program, text):
    """Wait until the program has written `text` into `log`."""
    until(lambda: text in log.read_text() or program.poll() is not None, True, 180)
    assert text in log.read_text(), log.read_text()


@contextlib.contextmanager
def browser(height=3000):  # cards of TensorBoard that are out of sight are not drawn
    """Give an empty page of a Chromium that reaches this machine only, and leaves nothing."""
    from playwright.sync_api import sync_playwright

    # not pytest's folder: its long name is too long for Chromium's sockets
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home, sync_playwright() as run:
        chromium = run.chromium.launch(
            executable_path=CHROMIUM, args=ALONE, env=os.environ | dict(HOME=home, TMPDIR=home)
        )
        try:
            yield chromium.new_page(viewport=dict(width=1200, height=height))
        finally:
            chromium.close()


def open_tab(page, url, tab, sight):
    """Open a tab of TensorBoard at `url`, and see `sight` there."""
    from playwright.sync_api import TimeoutError

    def see():
        page.goto(f'{url}/#{tab}')
        with contextlib.suppress(TimeoutError):
            return bool(page.wait_for_selector(sight, state='attached', timeout=15_000))
        page.goto('about:blank')  # TensorBoard had not read the run yet

    assert until(see, True, 45), tab


def images(page, url):
    """Return {tag: (run, width, height, whether it is seen in color)} of all images."""
    open_tab(page, url, 'images', 'tf-image-loader img')
    page.locator('tf-image-dashboard tf-tag-filterer input').fill('.')
    cards, seen = page.locator('tf-image-loader', has=page.locator('img')), {}
    until(lambda: {card.evaluate('card => card.tag') for card in cards.all()}, IMAGES)
    for card in cards.all():
        img = card.locator('img')
        until(lambda img=img: img.evaluate('img => img.complete'), True)
        size = img.evaluate('img => [img.naturalWidth, img.naturalHeight]')
        red, _, blue = Image.open(io.BytesIO(img.screenshot())).convert('RGB').split()
        colored = ImageChops.difference(red, blue).getextrema()[1] > 0
        seen[card.evaluate('card => card.tag')] = card.evaluate('card => card.run'), *size, colored
    return seen
