"""Make docs/colab.ipynb of docs/colab.md: text and code blocks in turn, from the first section on.

python docs/make_notebook.py
"""

import json
import re
from pathlib import Path

DOCS = Path(__file__).parent
METADATA = {
    'accelerator': 'GPU',
    'colab': {'gpuType': 'T4', 'provenance': []},
    'kernelspec': {'display_name': 'Python 3', 'name': 'python3'},
    'language_info': {'name': 'python'},
}


def make_notebook(page):
    """Return the content of the notebook (a str) for the page's text."""
    sections = page[page.index('\n## ') :]
    parts = re.split(r'^```python\n(.*?)^```$', sections, flags=re.MULTILINE | re.DOTALL)
    cells = []
    for number, part in enumerate(parts):  # code stands at the odd numbers
        source = part.strip().splitlines(keepends=True)
        if number % 2:
            cells.append(
                {
                    'cell_type': 'code',
                    'execution_count': None,
                    'metadata': {},
                    'outputs': [],
                    'source': source,
                }
            )
        elif source:
            cells.append({'cell_type': 'markdown', 'metadata': {}, 'source': source})
    notebook = {'cells': cells, 'metadata': METADATA, 'nbformat': 4, 'nbformat_minor': 4}
    return json.dumps(notebook, indent=1, ensure_ascii=False) + '\n'


if __name__ == '__main__':
    page = (DOCS / 'colab.md').read_text('utf-8')
    (DOCS / 'colab.ipynb').write_text(make_notebook(page), 'utf-8')
