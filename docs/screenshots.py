"""Make the pictures in docs/ again: run the demo, and look at its pages in headless Chromium.

    pip install -r tests/requirements.txt -r requirements-app.txt
    python docs/screenshots.py

The pages are as a newcomer gets them by following the README: nothing is clicked, but that the
graph is opened by its double click.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

from browser import browser, free_port, says, started  # noqa: E402

from data_utils import load_photo, split  # noqa: E402
from demo_landscapes import KINDS  # noqa: E402
from predict import colorize  # noqa: E402
from unet import UNet  # noqa: E402
from utils.checkpoint import load_weights  # noqa: E402

TABS = 'timeseries', 'images', 'graphs', 'projector'
SIZE = dict(width=1200, height=900)


def demo_picture(home):
    """Return a held-out drawing of each kind, side by side: gray, colorized, true."""
    net, columns = load_weights(UNet(), home / 'unet.pth'), []
    for kind in KINDS:
        paths = sorted((home / 'data/demo' / kind).glob('*.jpg'))
        names = [f'{kind}/{path.name}' for path in paths]
        photo = load_photo(paths[split(names, 0.1)[1][0]])
        columns.append([photo.convert('L').convert('RGB'), colorize(net, photo), photo])
    width, height = photo.size
    picture = Image.new('RGB', (len(columns) * (width + 4) - 4, 3 * (height + 4) - 4), 'white')
    for x, column in enumerate(columns):
        for y, image in enumerate(column):
            picture.paste(image, (x * (width + 4), y * (height + 4)))
    return picture


def tensorboard_pages(home, folder):
    """Save a screenshot of each of TABS."""
    port, log = free_port(), home / 'tensorboard.log'
    words = [sys.executable, '-m', 'tensorboard.main', '--logdir', 'runs', '--port', str(port)]
    with started(words, log, cwd=home) as program, browser() as page:
        says(log, program, f'localhost:{port}/')
        page.set_viewport_size(SIZE)
        for tab in TABS:
            page.goto('about:blank')
            page.goto(f'http://localhost:{port}/#{tab}')
            if tab == 'graphs':
                page.locator('g.node[data-name="UNet"]').dblclick()
            page.wait_for_load_state('networkidle')
            page.wait_for_timeout(10_000)  # charts, pictures and points move into their places
            page.screenshot(path=folder / f'tensorboard_{tab}.png')


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--run', type=Path, help='the folder of a finished demo; else one is made')
    parser.add_argument('--output', type=Path, default=ROOT / 'docs')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        if args.run:
            for name in 'runs', 'data':
                shutil.copytree(args.run / name, home / name)
            shutil.copy(args.run / 'unet.pth', home)
        else:
            subprocess.run([sys.executable, ROOT / 'colorize.py', '--demo'], cwd=home, check=True)
        demo_picture(home).save(args.output / 'demo.jpg', quality=90)
        tensorboard_pages(home, args.output)


if __name__ == '__main__':
    main()
