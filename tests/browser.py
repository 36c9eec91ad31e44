"""TensorBoard, and its page as headless Chromium shows it."""

import contextlib
import importlib.util
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time

import pytest
from helpers import IMAGES, TAGS
from PIL import Image, ImageChops

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
# playwright itself adds what keeps Chromium from calling home; these keep it on this machine
ALONE = [
    '--disable-gpu',
    '--no-proxy-server',
    '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1',
]

needs_browser = pytest.mark.skipif(
    not (CHROMIUM and importlib.util.find_spec('playwright')),
    reason='Chromium or playwright is not on this machine',
)


def until(see, wanted, seconds=30):
    """What `see()` gives once it is `wanted`, or at the end of the time."""
    end = time.monotonic() + seconds
    while (seen := see()) != wanted and time.monotonic() < end:
        time.sleep(0.1)
    return seen


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def started(words, log, **kwargs):
    """A program in the background, until the end of the `with`; it writes into the file `log`."""
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
                program.wait(10)


def says(log, program, text):
    """Waits until the program has written `text` into `log`."""
    until(lambda: text in log.read_text() or program.poll() is not None, True, 180)
    assert text in log.read_text(), log.read_text()


@contextlib.contextmanager
def browser(height=3000):
    """An empty page of a Chromium that reaches this machine only, and leaves nothing behind.

    It is so tall that all of TensorBoard's cards are in sight: others are not drawn.
    """
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
    """Opens a tab of TensorBoard at `url`, again until `sight` is there to be seen."""
    from playwright.sync_api import TimeoutError

    for last in False, False, True:  # it may not have read the run yet
        page.goto('about:blank')
        page.goto(f'{url}/#{tab}')
        try:
            return page.wait_for_selector(sight, state='attached', timeout=15_000)
        except TimeoutError:
            if last:
                raise


def show_all(page):
    """The cards of all tags, on tabs that fold up all but the first few."""
    page.locator('tf-tag-filterer input').fill('.')


def scalars(page, url, epochs):
    """{tag: the points of its line} of all charts: there should be one an epoch."""
    open_tab(page, url, 'scalars', 'tf-scalar-card path.line')
    show_all(page)
    # of two points it takes both for outliers, and draws neither
    page.get_by_text('Ignore outliers in chart scaling').click()

    points = 'lines => Math.max(0, ...lines.map(line => line.getAttribute("d").split("L").length))'

    def charts():
        return {
            card.evaluate('card => card.tag'): card.locator('path.line').evaluate_all(points)
            for card in page.locator('tf-scalar-card').all()
        }

    return until(charts, dict.fromkeys(TAGS, epochs))


def images(page, url):
    """{tag: (run, width, height, whether it is seen in color)} of the images that have loaded."""
    open_tab(page, url, 'images', 'tf-image-loader img')
    show_all(page)

    def cards():
        return {
            card.evaluate('card => card.tag'): card
            for card in page.locator('tf-image-loader', has=page.locator('img')).all()
        }

    until(lambda: cards().keys(), IMAGES)
    seen = {}
    for tag, card in cards().items():
        img = card.locator('img')
        until(lambda img=img: img.evaluate('img => img.complete'), True)
        size = img.evaluate('img => [img.naturalWidth, img.naturalHeight]')
        red, _, blue = Image.open(io.BytesIO(img.screenshot())).convert('RGB').split()
        colored = ImageChops.difference(red, blue).getextrema()[1] > 0
        seen[tag] = card.evaluate('card => card.run'), *size, colored
    return seen


def graph(page, url):
    """The names of the parts in the drawing of the UNet, which a double click opens."""
    open_tab(page, url, 'graphs', 'g.node[data-name="UNet"]')
    page.locator('g.node[data-name="UNet"]').dblclick()
    page.wait_for_selector('g.node[data-name^="UNet/"]')
    names = page.locator('g.node.meta[data-name^="UNet/"]').evaluate_all(
        'nodes => nodes.map(node => node.dataset.name)'
    )
    return {re.fullmatch(r'UNet/\w+\[(\w+)\]', name)[1] for name in names}


def settings(page, url):
    """The names of all settings, and {heading: value} of what is in sight of a single run."""
    open_tab(page, url, 'hparams', 'tf-hparams-table-view vaadin-grid')
    text = 'cells => cells.map(cell => cell.textContent.trim())'

    def cells():
        cells = page.locator('vaadin-grid-cell-content').evaluate_all(text)
        return [cell for cell in cells if cell not in ('', 'Show Metrics')]

    until(lambda: 'UNet' in cells(), True)
    half = len(cells()) // 2
    return (
        page.locator('.hparam-checkbox').evaluate_all(text),
        dict(zip(cells()[:half], cells()[half:], strict=True)),
    )
