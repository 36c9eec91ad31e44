"""The course's script, completed in the plainest way: what speed.py measures this project against.

    python benchmarks/reference.py --data_path PHOTOS --epochs 3

Nothing here is tuned, and nothing is to be: float32, every photo resized twice (once to gray, once
to color) by four workers of a DataLoader, the loss fetched at every step, Adam at a constant rate.
The last line of the output is JSON: the photos, the seconds and the mean loss of each epoch, and
with --val_path the PSNR that was reached on those photos.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader

# ---------------------------------------------------------------------------- photos


class GrayColorPhotos(Dataset):
    """Items (gray, color) of the photos below a folder, all or the first `limit`."""

    def __init__(self, root, size, limit=None):
        self.paths = sorted(
            path for path in Path(root).rglob('*') if path.suffix.lower() in IMG_EXTENSIONS
        )[:limit]
        self.to_color = transforms.Compose([transforms.Resize((size, size)), transforms.ToTensor()])
        self.to_gray = transforms.Compose(
            [
                transforms.Resize((size, size)),
                transforms.Grayscale(),
                transforms.ToTensor(),
                transforms.Normalize(mean=[0.5], std=[0.5]),
            ]
        )

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        photo = default_loader(self.paths[index])
        return self.to_gray(photo), self.to_color(photo)


# ---------------------------------------------------------------------------- network


def double_conv(in_channels, out_channels):
    layers = []
    for channels in in_channels, out_channels:
        layers += [nn.Conv2d(channels, out_channels, kernel_size=3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


class DownSampleBlock(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv_block = double_conv(in_channels, out_channels)
        self.maxpool = nn.MaxPool2d(kernel_size=2)

    def forward(self, x):
        skip = self.conv_block(x)
        return self.maxpool(skip), skip


class UpSampleBlock(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.upsample = nn.Upsample(scale_factor=2, mode='bilinear')
        self.conv_block = double_conv(in_channels, out_channels)

    def forward(self, x, skip):
        x = self.upsample(x)
        return self.conv_block(torch.cat((x, skip), dim=1))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.downsample_block_1 = DownSampleBlock(1, 32)
        self.downsample_block_2 = DownSampleBlock(32, 64)
        self.downsample_block_3 = DownSampleBlock(64, 128)
        self.middle_conv_block = double_conv(128, 256)
        self.upsample_block_3 = UpSampleBlock(128 + 256, 128)
        self.upsample_block_2 = UpSampleBlock(64 + 128, 64)
        self.upsample_block_1 = UpSampleBlock(32 + 64, 32)
        self.last_conv = nn.Conv2d(32, 3, kernel_size=1)

    def forward(self, gray):
        x, skip_1 = self.downsample_block_1(gray)
        x, skip_2 = self.downsample_block_2(x)
        x, skip_3 = self.downsample_block_3(x)
        x = self.middle_conv_block(x)
        x = self.upsample_block_3(x, skip_3)
        x = self.upsample_block_2(x, skip_2)
        x = self.upsample_block_1(x, skip_1)
        return self.last_conv(x)


# ---------------------------------------------------------------------------- training


def train_epoch(net, optimizer, loader, device):
    """Train for one epoch; return its seconds, and the mean of the batches' losses."""
    start, total = time.perf_counter(), 0.0
    for gray, color in loader:
        gray, color = gray.to(device), color.to(device)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(gray), color)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return dict(seconds=time.perf_counter() - start, loss=total / len(loader))


@torch.no_grad()
def mean_psnr(net, loader, device):
    """Return the mean over the photos of the prediction's PSNR in dB, clamped to [0, 1]."""
    values = []
    for gray, color in loader:
        error = net(gray.to(device)).clamp(0, 1) - color.to(device)
        values.append(-10 * error.square().mean(dim=(1, 2, 3)).log10())
    return torch.cat(values).mean().item()


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data_path', default='data/landscapes', help='photos [%(default)s]')
    parser.add_argument('--val_path', help='photos to measure the PSNR on')
    parser.add_argument('--image_size', type=int, default=224, help='[%(default)s]')
    parser.add_argument('--batch_size', type=int, default=32, help='[%(default)s]')
    parser.add_argument('--epochs', type=int, default=10, help='[%(default)s]')
    parser.add_argument('--lr', type=float, default=1e-3, help='[%(default)s]')
    parser.add_argument('--limit', type=int, help='train on the first LIMIT photos only')
    parser.add_argument('--num_workers', type=int, default=4, help='[%(default)s]')
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    photos = GrayColorPhotos(args.data_path, args.image_size, args.limit)
    if not photos.paths:
        parser.exit(2, f'reference.py: no photos in {args.data_path}; name some with --data_path\n')
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    loader = DataLoader(photos, args.batch_size, shuffle=True, num_workers=args.num_workers)
    net = UNet().to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr)
    report = dict(photos=len(photos), epochs=[])
    for _ in range(args.epochs):
        report['epochs'].append(train_epoch(net, optimizer, loader, device))
    if args.val_path:
        held_out = DataLoader(
            GrayColorPhotos(args.val_path, args.image_size),
            args.batch_size,
            num_workers=args.num_workers,
        )
        report['val_psnr'] = mean_psnr(net, held_out, device)
    print(json.dumps(report))


if __name__ == '__main__':
    main()
