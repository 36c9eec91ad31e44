"""Draw colorfulness.svg: what livelier colors cost, asked for in training or turned up afterwards.

    python docs/plot.py

The points are those of the table in measurements.md, below the heading of the same name.
"""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent
HEADING = '## What livelier colors cost'
WIDTH, HEIGHT, MARGIN = 640, 360, 56
X, Y = (50, 105), (0.9, 1.8)  # of the axes: % of the truth's colorfulness, dB
CURVES = {  # name: (color, words)
    'afterwards': ('#888', 'squared error alone, turned up afterwards'),
    'training': ('#d55e00', 'asked for in training: weight 0.025, turned up afterwards'),
}


def read_points(text):
    """Return {curve: [(% of the truth's colorfulness, gain in dB)]} of the table in `text`."""
    table = text.partition(HEADING)[2].partition('\n## ')[0]
    row = r'^\| ([\d.]+) \| [\d.]+ \| \+([\d.]+) ± [\d.]+ dB \| ([\d.]+) ± [\d.]+ % \|$'
    points = {name: [] for name in CURVES}
    for weight, gain, share in re.findall(row, table, re.MULTILINE):
        name = 'afterwards' if weight == '0' else 'training'
        points[name].append((float(share), float(gain)))
    return points


def place(x, y):
    """Return where on the picture, in pixels, the values x and y are."""
    (x0, x1), (y0, y1) = X, Y
    across = MARGIN + (x - x0) / (x1 - x0) * (WIDTH - 2 * MARGIN)
    return round(across, 1), round(
        HEIGHT - MARGIN - (y - y0) / (y1 - y0) * (HEIGHT - 2 * MARGIN), 1
    )


def draw_text(x, y, words, anchor='middle', color='#333'):
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{color}">{words}</text>'


def draw(points):
    """Return the plot as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        ' font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for share in range(50, 101, 10):
        x, y = place(share, Y[0])
        parts += [draw_text(x, y + 20, share), f'<path d="M{x} {y}v6" stroke="#333"/>']
    for tenth in range(10, 19, 2):
        x, y = place(X[0], tenth / 10)
        parts.append(draw_text(x - 8, y + 4, f'+{tenth / 10}', 'end'))
        parts.append(f'<path d="M{x} {y}h{WIDTH - 2 * MARGIN}" stroke="#ddd"/>')
    parts.append(draw_text(WIDTH / 2, HEIGHT - 12, "% of the truth's colorfulness"))
    parts.append(draw_text(MARGIN, 30, 'dB over the gray copy', 'start'))
    for line, (name, (color, words)) in enumerate(CURVES.items()):
        places = [place(*point) for point in points[name]]
        path = ' '.join(f'{x},{y}' for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="4" fill="{color}"/>' for x, y in places]
        parts.append(draw_text(MARGIN + 20, HEIGHT - 120 + 18 * line, words, 'start', color))
    return '\n'.join([*parts, '</svg>\n'])


if __name__ == '__main__':
    points = read_points((DOCS / 'measurements.md').read_text('utf-8'))
    (DOCS / 'colorfulness.svg').write_text(draw(points), 'utf-8')
