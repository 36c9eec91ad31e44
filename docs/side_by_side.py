"""Show photos as several networks colorize them: a row a photo, gray, each network, the truth.

    python docs/side_by_side.py OUTPUT.jpg WEIGHTS,WEIGHTS PHOTO PHOTO …

old_photos.jpg shows china.jpg and flower.jpg, which come with scikit-learn, in the folder
sklearn/datasets/images, by the UNet and the pretrained network.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from predict import colorize, load_network  # noqa: E402
from utils.photos import load_photo  # noqa: E402

WIDTH, GAP = 320, 4  # of a photo and between photos, in pixels


def main(output, weights, *paths):
    networks = [load_network(path) for path in weights.split(',')]
    rows = []
    for path in paths:
        photo = load_photo(path)
        gray = photo.convert('L')
        row = [gray, *(colorize(net, gray) for net in networks), photo]
        rows.append([each.resize((WIDTH, WIDTH * photo.height // photo.width)) for each in row])
    names = ['gray', *(type(net).__name__ for net in networks), 'truth']
    font = ImageFont.load_default(16)
    height = 24 + sum(row[0].height + GAP for row in rows)
    sheet = Image.new('RGB', (len(names) * (WIDTH + GAP) - GAP, height), 'white')
    draw, top = ImageDraw.Draw(sheet), 24
    for column, name in enumerate(names):
        draw.text((column * (WIDTH + GAP), 2), name, 'black', font)
    for row in rows:
        for column, photo in enumerate(row):
            sheet.paste(photo, (column * (WIDTH + GAP), top))
        top += row[0].height + GAP
    sheet.save(output, quality=88)


if __name__ == '__main__':
    main(*sys.argv[1:])
