"""The page that a run of two epochs has in TensorBoard, in a real browser."""

import os
import subprocess
import sys

import pytest
from browser import (
    browser,
    free_port,
    graph,
    images,
    needs_browser,
    open_tab,
    says,
    scalars,
    settings,
    started,
    until,
)
from helpers import ROOT, TAGS
from pages import from_page

pytestmark = needs_browser


@pytest.fixture(scope='module')
def page(drawings, tmp_path_factory):
    """A browser's page, and the address of the TensorBoard that has the run."""
    home = tmp_path_factory.mktemp('page')
    (home / 'data').mkdir()
    (home / 'data/landscapes').symlink_to(drawings)
    _, program, *flags = from_page('python colorize.py').split()
    train = [sys.executable, ROOT / program, *flags]
    subprocess.run(train, cwd=home, check=True, timeout=300)
    port, log = free_port(), home / 'tensorboard.log'
    show = from_page('tensorboard --logdir runs --port 8898').replace('8898', str(port))
    words = [sys.executable, '-m', 'tensorboard.main', *show.split()[1:]]
    url = f'http://localhost:{port}'
    with (
        started(words, log, cwd=home, env=os.environ | dict(TMPDIR=str(home))) as tensorboard,
        browser() as page,
    ):
        says(log, tensorboard, f' at {url}/')
        yield page, url


def test_the_photos_and_the_gain_are_in_sight_without_a_click(page):
    tab, url = page
    tall, laptop = tab.viewport_size, dict(width=1200, height=900)
    tab.set_viewport_size(laptop)
    open_tab(tab, url, 'timeseries', 'image-card img')
    photos, gain = tab.locator('image-card img'), tab.locator('scalar-card')
    until(lambda: (photos.count(), gain.count()), (1, 1))

    def seen():  # again until the page is laid out
        photo, chart = photos.bounding_box(), gain.bounding_box()
        if not (photo and chart):
            return None
        return (
            photos.evaluate('img => [img.naturalWidth, img.naturalHeight]'),
            photo['width'] > 300 and photo['y'] + photo['height'] < laptop['height'],
            'Gain over the gray copy (dB)' in gain.inner_text(),
            chart['y'] + 200 < laptop['height'],  # its title, and its highest values
        )

    wanted = [780, 532], True, True, True
    assert until(seen, wanted) == wanted
    tab.set_viewport_size(tall)


def test_scalars(page):
    assert scalars(*page, epochs=2) == dict.fromkeys(TAGS, 2)


def test_images(page):
    # photos of 32 pixels at four times their size, with gaps of four: 16 in a grid of four,
    # and of every other one gray, colorized and truth, in two columns
    assert images(*page) == {
        'Input': ('UNet', 532, 532, False),
        'Predicted': ('UNet', 532, 532, True),
        'Ground truth': ('UNet', 532, 532, True),
        'Colorized': ('UNet', 780, 532, True),
    }


def test_graph(page):
    assert graph(*page) == {
        'downsample_block_1',
        'downsample_block_2',
        'downsample_block_3',
        'middle_conv_block',
        'upsample_block_3',
        'upsample_block_2',
        'upsample_block_1',
        'last_conv',
    }


def test_settings(page):
    names, values = settings(*page)
    assert names[:5] == ['colorfulness_weight', 'epochs × batch_size', 'image_size', 'lr', 'seed']
    assert (
        values.items() >= {'Trial ID': 'UNet', 'epochs × batch_size': '2 × 16', 'seed': '0'}.items()
    )
