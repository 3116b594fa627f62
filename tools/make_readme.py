"""Write README.md from nbs/index.ipynb. Run from anywhere; `--check` only says whether they agree."""
import re, sys
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent
hidden = re.compile(r'^#\|\s*hide', re.M)

def readme():
    "The text of the README that belongs to the index notebook"
    nb = nbformat.read(root/'nbs/index.ipynb', as_version=4)
    nb.cells = [c for c in nb.cells if not hidden.search(c.source)]
    for c in nb.cells: c.source = re.sub(r'^#\|.*\n', '', c.source, flags=re.M)
    body,_ = MarkdownExporter().from_notebook_node(nb)
    body = re.sub(r'\]\((?=images/)', '](nbs/', body)                    # pictures, seen from the top folder
    body = re.sub(r'\]\((?=[\w/]+\.ipynb)', '](nbs/', body)              # links to notebooks
    note = '<!-- Made from nbs/index.ipynb by tools/make_readme.py: edit there, not here. -->\n\n'
    return note + re.sub(r'\n{3,}', '\n\n', body).strip() + '\n'

if __name__=='__main__':
    path = root/'README.md'
    if '--check' in sys.argv:
        same = path.read_text(encoding='utf-8')==readme()
        sys.exit(0 if same else 'README.md differs from nbs/index.ipynb: run python tools/make_readme.py')
    path.write_text(readme(), encoding='utf-8')
