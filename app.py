"""Colorize photos in a browser, on this machine alone: http://localhost:7860

    pip install -r requirements-app.txt
    python app.py                            # with the weights in unet.pth
    python app.py --weights my.pth --port 7861

No photo is kept, or sent elsewhere.
"""

import os

from utils.stop import Stop, end_quietly

if __name__ == '__main__':
    end_quietly()  # Ctrl-C during the imports below needs no traceback
    os.environ.update(GRADIO_ANALYTICS_ENABLED='False', HF_HUB_OFFLINE='1')

import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

try:
    import gradio as gr
except ImportError:
    sys.exit('app.py: the page needs Gradio: pip install -r requirements-app.txt')

import predict
from utils import cli
from utils.cli import UsageError
from utils.photos import load_photo

PREVIEW = 1600  # pixels of the longer side of what the page shows


def parse_args(argv):
    parser = cli.ArgumentParser(prog='app.py', description=__doc__)
    parser.add_argument('--weights', default='unet.pth', help='what colorize.py saved')
    parser.add_argument('--port', type=cli.port, default=7860, help="the page's, on this machine")
    parser.add_device()
    return parser.parse_args(argv)


class Page:
    """What visitors see.

    In `folder`, each browser window has a folder with the photos dropped there and their results.
    """

    def __init__(self, net, folder):
        self.net, self.folder = net, folder
        self.lock = threading.Lock()  # nothing is made for a window that was closed meanwhile

    def build(self):
        """Return the page, as gradio.Blocks."""
        size, about = self.net.image_size, self.net.about and f'The network was {self.net.about}.'
        with gr.Blocks(title='Colorize', analytics_enabled=False) as blocks:
            gr.Markdown(
                '# Colorize photos\nDrop photos, and drag the line between gray and color. '
                f'Nothing leaves this machine, or is kept when you close the page. {about}'
            )
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    several = dict(file_count='multiple', height=140)
                    files = gr.File(label='Photos', elem_id='photos', **several)
                    message = gr.Markdown(elem_id='message')
                    sliders = [
                        gr.Slider(8, 2 * size, size, step=8, label='Size', elem_id='size',
                                  info='pixels that the network sees: the shorter side'),
                        gr.Slider(0, 2, 1, step=0.05, label='Saturation', elem_id='saturation',
                                  info='0 is gray'),
                    ]  # fmt: skip
                    button = gr.DownloadButton('Download', interactive=False, elem_id='download')
                with gr.Column(scale=3):
                    still = dict(interactive=False, buttons=['fullscreen'], max_height=640)
                    pair = gr.ImageSlider(label='Gray and color', elem_id='result', **still)
                    still = dict(interactive=False, buttons=[], show_label=False)
                    others = gr.Gallery(visible=False, columns=4, elem_id='others', **still)
            blocks.unload(self.leave)
            shown = [pair, others, button, message]
            quiet = dict(show_progress='hidden', trigger_mode='always_last')
            quiet |= dict(api_visibility='private')
            files.upload(self.take, [files, *sliders], [*shown, files], **quiet)
            for slider in sliders:
                slider.change(self.show, sliders, shown, **quiet)
        return blocks

    def take(self, paths, size, saturation, request: gr.Request):
        """Take photos in place of earlier ones; return what the page shows, and an empty field."""
        photos = self.folder / request.session_hash / 'photos'
        with self.lock:
            shutil.rmtree(photos, ignore_errors=True)
        for number, path in enumerate(paths):
            folder = photos / f'{number:04}'
            folder.mkdir(parents=True)
            shutil.move(path, folder)
        return *self.show(size, saturation, request), None

    def show(self, size, saturation, request: gr.Request):
        """Colorize the window's photos.

        Returns gray and color of the first, pictures of the others, the file to download, and in
        words which photos could not be colorized and why.
        """
        torch.set_num_threads(1)  # in this thread, as in predict.py: the same to the last bit
        home = self.folder / request.session_hash
        with self.lock:
            photos = sorted(home.glob('photos/*/*'))
            # the last result stays for now: the browser may still be loading it
            for earlier in sorted(home.glob('result_*'))[:-1]:
                shutil.rmtree(earlier)
            # a new folder: browsers keep what they have seen under a name
            folder, done, refused = home / f'result_{time.time_ns()}', {}, []
            for photo in photos:
                name = f'{photo.stem}_colorized{photo.suffix}'
                result = predict.result_path(folder / 'photos' / name)
                outcome = predict.colorize_file(photo, result, self.net, size, saturation)
                if outcome == predict.DONE:
                    done[result] = photo
                else:
                    refused.append(f'**{photo.name}: {outcome}**')
            message = '\n\n'.join([*refused, *(photo.name for photo in done.values())])
            if not done:
                hidden = gr.update(value=None, visible=False)
                return None, hidden, gr.update(value=None, interactive=False), message
            first, *others = done
            gray = preview(done[first], folder / 'gray.jpg', 'L')
            pair = gray, preview(first, folder / 'color.jpg')
            pictures = [preview(path, folder / f'{path.stem}_small.jpg') for path in others]
            file = first
            if others:
                file = shutil.make_archive(folder / 'colorized', 'zip', folder / 'photos')
            gallery = gr.update(value=pictures, visible=bool(others))
            return pair, gallery, gr.update(value=file, interactive=True), message

    def leave(self, request: gr.Request):
        """Remove all files of a window."""
        time.sleep(1)  # what it asked for last is still being sent
        with self.lock:
            shutil.rmtree(self.folder / request.session_hash, ignore_errors=True)


def preview(path, smaller, mode='RGB'):
    """Save a photo as one that is small enough for the page; return the path `smaller`."""
    picture = load_photo(path).convert(mode).convert('RGB')
    picture.thumbnail((PREVIEW, PREVIEW))
    picture.save(smaller, quality=95)
    return smaller


def serve(net, port, folder):
    """Serve the page on localhost, with its files in `folder`, until a signal ends the program.

    Raises UsageError if the port is taken.
    """
    os.environ['GRADIO_TEMP_DIR'] = str(folder)
    blocks = Page(net, folder).build()
    try:
        blocks.launch(
            server_name='127.0.0.1',
            server_port=port,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size='200mb',
            footer_links=[],
            theme=gr.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['monospace']),
        )
    except OSError as error:
        raise UsageError(f'--port {port} is taken or not allowed; give another') from error
    print(f'Open http://localhost:{port} in a browser; Ctrl-C ends it.', flush=True)
    try:
        while True:
            time.sleep(1)
    finally:
        blocks.close(verbose=False)


def main(argv=None):
    args = parse_args(argv)
    Stop()  # a signal ends the program in order, without a traceback
    try:
        net = predict.load_network(args.weights, args.device)
        with tempfile.TemporaryDirectory(prefix='colorize_', ignore_cleanup_errors=True) as folder:
            serve(net, args.port, Path(folder).resolve())
    except Exception as error:
        return cli.exit_code(error, 'app.py')


if __name__ == '__main__':
    sys.exit(main())
