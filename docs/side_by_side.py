"""Show photos as several networks colorize them: a row a photo, gray, each network, the truth.

    python docs/side_by_side.py OUTPUT.jpg WEIGHTS,WEIGHTS PHOTO PHOTO …

old_photos.jpg shows china.jpg and flower.jpg, which come with scikit-learn, in the folder
sklearn/datasets/images, by the UNet and the pretrained network.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from predict import colorize, load_network, side_by_side  # noqa: E402
from utils.photos import load_photo  # noqa: E402

WIDTH, MARGIN = 320, 24  # of a photo, and above the rows, in pixels


def main(output, weights, *paths):
    networks = [load_network(path) for path in weights.split(',')]
    rows = []
    for path in paths:
        photo = load_photo(path)
        gray = photo.convert('L').convert('RGB')
        parts = [gray, *(colorize(net, gray) for net in networks), photo]
        size = WIDTH, WIDTH * photo.height // photo.width
        rows.append(side_by_side([part.resize(size) for part in parts]))
    names = ['gray', *(type(net).__name__ for net in networks), 'truth']
    height = MARGIN + sum(row.height + 4 for row in rows)
    sheet = Image.new('RGB', (rows[0].width, height), 'white')
    draw, top = ImageDraw.Draw(sheet), MARGIN
    for column, name in enumerate(names):
        draw.text(
            (column * sheet.width // len(names), 2), name, 'black', ImageFont.load_default(16)
        )
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + 4
    sheet.save(output, quality=88)


if __name__ == '__main__':
    main(*sys.argv[1:])
