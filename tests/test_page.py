"""The page that a run of two epochs has in TensorBoard, in a real browser."""

import os
import sys

import pytest
from browser import browser, free_port, images, needs_browser, open_tab, says, started, until
from helpers import call
from pages import from_page

# as it opens on a laptop; the other tabs are looked at in a higher window
LAPTOP = dict(width=1200, height=900)


def first_sight(page, url):
    """Return what is seen without a click: the photos' size, and whether they and a curve fit."""
    open_tab(page, url, 'timeseries', 'image-card img')
    photos, gain = page.locator('image-card img'), page.locator('scalar-card')
    until(lambda: (photos.count(), gain.count()), (1, 1))

    def see():  # again until the page is laid out
        photo, chart = photos.bounding_box(), gain.bounding_box()
        if not (photo and chart):
            return None
        return (
            photos.evaluate('img => [img.naturalWidth, img.naturalHeight]'),
            photo['width'] > 300 and photo['y'] + photo['height'] < LAPTOP['height'],
            'Gain over the gray copy (dB)' in gain.inner_text(),
            chart['y'] + 200 < LAPTOP['height'],  # its title, and its highest values
        )

    return until(see, ([780, 532], True, True, True))


@pytest.mark.long
@needs_browser
def test_the_page_of_a_run(drawings, tmp_path):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/landscapes').symlink_to(drawings)
    assert call(tmp_path, *from_page('python colorize.py').split()[2:]) == 0
    port, log = free_port(), tmp_path / 'tensorboard.log'
    url = f'http://localhost:{port}'
    show = from_page('tensorboard --logdir runs --port 8898').replace('8898', str(port))
    words = [sys.executable, '-m', 'tensorboard.main', *show.split()[1:]]
    env = os.environ | dict(TMPDIR=str(tmp_path))
    with started(words, log, cwd=tmp_path, env=env) as tensorboard, browser() as page:
        says(log, tensorboard, f' at {url}/')
        tall = page.viewport_size
        page.set_viewport_size(LAPTOP)
        assert first_sight(page, url) == ([780, 532], True, True, True)
        page.set_viewport_size(tall)

        # photos of 32 pixels at four times their size, with gaps of four: 16 in a grid of four,
        # and of every other one gray, colorized and truth, in two columns
        assert images(page, url) == {
            'Input': ('UNet', 532, 532, False),
            'Predicted': ('UNet', 532, 532, True),
            'Ground truth': ('UNet', 532, 532, True),
            'Colorized': ('UNet', 780, 532, True),
        }

        for cell in 'batch_size', 'data', '56 photos', 'UNet':
            open_tab(page, url, 'hparams', f'vaadin-grid-cell-content:has-text("{cell}")')
