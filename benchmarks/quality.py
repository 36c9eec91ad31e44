"""How near predict.py comes to the true colours, at the photos' full size, in dB.

    python benchmarks/quality.py --data_path PHOTOS --weights unet.pth

Means over the photos in PHOTOS (colour photos that the network was not trained on) of the PSNR of
the grey copy, of the network's raw output enlarged to full size, and of predict.py's result.
"""
import argparse
import os
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch.nn.functional as F  # noqa: E402
from checkpoint import load_weights  # noqa: E402
from color import psnr  # noqa: E402
from torchvision.transforms.functional import pil_to_tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data_utils import list_photos, load_photo  # noqa: E402
from predict import colorize  # noqa: E402


def tensor(photo):
    return pil_to_tensor(photo)[None] / 255


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_path', required=True)
    parser.add_argument('--weights', default='unet.pth')
    parser.add_argument('--size', type=int, default=224)
    args = parser.parse_args()
    net, rows = load_weights(args.weights), []
    raw = []
    # what colorize() is given by the network, before anything is made of it
    net.register_forward_hook(lambda module, x, y: raw.append(y))
    for name in tqdm(list_photos(args.data_path), disable=None):
        photo = load_photo(os.path.join(args.data_path, name))
        truth, gray = tensor(photo), tensor(photo.convert('L'))
        result = colorize(net, photo, args.size)
        output = F.interpolate(raw.pop().detach(), truth.shape[2:], mode='bilinear').clamp(0, 1)
        inside = ((tensor(result) > 0) & (tensor(result) < 1)).all(1)
        change = (tensor(result.convert('L')) - gray)[:, 0][inside].abs().mean() * 255
        rows.append([psnr(guess, truth).item() for guess in
                     (gray.expand_as(truth), output, tensor(result))] + [change.item()])
    for label, values in zip(('grey copy', 'raw output, enlarged', "predict.py's result"),
                             zip(*rows, strict=True), strict=False):
        print(f'{label:22} {mean(values):.2f} dB')
    print(f'luminance changed by   {max(row[3] for row in rows):.2f} grey levels in the worst of '
          f'{len(rows)} photos')


if __name__ == '__main__':
    main()
