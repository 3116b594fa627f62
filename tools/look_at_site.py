"""Look at the pages of the site without Quarto: what is wider than the page, and screenshots.

`python tools/look_at_site.py FOLDER [PAGE ...]` processes the notebooks as nbdev_docs does and converts them
with pandoc as Quarto does. It lists what makes a page scroll sideways at 390 and at 1400 pixels, and takes
screenshots of the named pages (`index`, `layers/03_coupling`) at both widths. Needs pandoc and Chromium.
Sidebar and themes are Quarto's and not seen here; the style below has its widths and sizes of letters.
"""
import html
import json
import re
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'tests'))

from test_site import Site, find_notebooks, is_option, joined, options, page_id, shown_outputs, shows_source

widths = (390, 1400)
base_style = '''
* { box-sizing: border-box; }
body { margin: 0; font: 17px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
main { max-width: 800px; margin: auto; padding: 0 .75em; }
pre, code { font-family: Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .875em; }
pre > code { font-size: 1em; }
pre { overflow: auto; margin-top: 0; }
code { overflow-wrap: anywhere; }
pre > code.sourceCode { white-space: pre-wrap; }
.cell-output-stdout pre code { overflow-wrap: anywhere; white-space: pre-wrap; }
.cell-output-display { overflow-x: auto; }
div.sourceCode { margin: 1em 0; padding: .4em; background: #f3f5f6; border: 1px solid transparent; }
img { max-width: 100%; height: auto; }
table { width: 100%; margin: 1rem 0; border-collapse: collapse; }
td, th { padding: .5rem; text-align: left; }
'''
# Names what sticks out: the innermost elements beyond the right edge that no box around them scrolls
measure = '''
const frames = [...document.querySelectorAll('iframe')];
const scrolls = e => ['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX);
function stickingOut(page) {
  const wide = [];
  for (const e of page.body.querySelectorAll('*')) {
    const place = e.getBoundingClientRect();
    const right = Math.max(place.right, place.left + e.scrollWidth);
    if (right <= page.documentElement.clientWidth + 1) continue;
    let box = e;
    while (box && box !== page.body && !scrolls(box)) box = box.parentElement;
    if (box === page.body) wide.push(e);
  }
  const inner = wide.filter(e => !wide.some(other => other !== e && e.contains(other)));
  return inner.map(e => e.tagName + ': ' + e.textContent.trim().slice(0, 60).replace(/\\s+/g, ' '));
}
window.onload = () => {
  const found = frames.map(frame => {
    const page = frame.contentDocument;
    return [frame.dataset.page, page.documentElement.scrollWidth, stickingOut(page)];
  });
  document.body.innerHTML = '<pre id="found"></pre>';
  document.body.firstChild.textContent = JSON.stringify(found);
};
'''

def run(command, text=None):
    "Run a program; return what it prints"
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout

def fenced(text, language=''):
    "A block of code in markdown, with a fence longer than any in the text"
    fence = '`'*max(3, 1 + max(map(len, re.findall('`+', text)), default=0))
    return f'{fence}{language}\n{text}\n{fence}\n'

def output_markdown(cell, out):
    "Markdown of an output, as Quarto writes it"
    data = out.get('data', {})
    alt = str(options(cell).get('fig-alt', ''))
    picture = next((kind for kind in data if kind.startswith('image/')), None)
    if picture == 'image/svg+xml':
        shown = joined(data[picture])
    elif picture:
        shown = f'<img alt="{html.escape(alt)}" src="data:{picture};base64,{joined(data[picture]).strip()}">'
    elif 'text/markdown' in data:
        shown = joined(data['text/markdown'])
    elif 'text/html' in data:
        shown = f'```{{=html}}\n{joined(data["text/html"])}\n```'
    else:
        shown = fenced(joined(out.get('text', data.get('text/plain', ''))))
    if options(cell).get('output') == 'asis':
        return shown if 'data' in out else joined(out['text'])
    kind = 'display' if data else out.get('name', 'stdout')
    return f'::: {{.cell-output .cell-output-{kind}}}\n{shown}\n:::\n'

def page_markdown(page):
    "Markdown of a page, as Quarto writes it before it calls pandoc"
    parts = []
    for cell in page.cells:
        if cell['cell_type'] == 'markdown':
            parts.append(joined(cell['source']))
        elif cell['cell_type'] == 'code':
            lines = [line for line in joined(cell['source']).splitlines() if not is_option(line)]
            shown = [fenced('\n'.join(lines), '{.python .cell-code}')] if shows_source(cell) and lines else []
            shown += [output_markdown(cell, out) for out in shown_outputs(cell)]
            parts.append('\n'.join(['::: {.cell}', *shown, ':::']))
    return '\n\n'.join(parts)

def write_page(page, folder, head):
    "Convert a page into HTML below a folder; return its file"
    body = run(['pandoc', '--from=markdown', '--to=html5', '--mathml', '--section-divs'], page_markdown(page))
    title = html.escape(str(page.front_matter.get('title', '')))
    description = html.escape(str(page.front_matter.get('description', '')))
    file = folder/(page.id.replace('/', '+') + '.html')
    start = f'<!doctype html><meta charset="utf-8"><base href="{page.path.as_uri()}">{head}'
    heading = f'<h1 class="title">{title}</h1><div class="description"><p>{description}</p></div>'
    file.write_text(f'{start}<main class="content">{heading}{body}</main>')
    return file

def frames(files, width, script=''):
    "A page that shows files in frames of this width"
    tag = '<iframe data-page="{}" src="{}" width="{}" height="2400"></iframe>'
    tags = ''.join(tag.format(file.stem, file.as_uri(), width) for file in files)
    style = '<style>body { margin: 0; } iframe { border: 0; display: block; }</style>'
    return f'<!doctype html><meta charset="utf-8">{style}<body>{tags}<script>{script}</script>'

def chromium(folder, text, *arguments):
    "Open a page in Chromium; return what it prints"
    file = folder/'frames.html'
    file.write_text(text)
    own = ['--headless', '--no-sandbox', '--disable-gpu', '--hide-scrollbars']
    files = ['--allow-file-access-from-files', '--virtual-time-budget=20000']
    return run(['chromium', *own, *files, *arguments, file.as_uri()])

def too_wide(folder, files, width):
    "What sticks out of each page at this width, by page"
    dom = chromium(folder, frames(files, width, measure), '--dump-dom')
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.S)[1]))
    return {name: elements for name, scroll, elements in found if scroll > width or elements}

def look(folder, *names):
    "List what is too wide, and take screenshots of the pages with these names"
    folder.mkdir(parents=True, exist_ok=True)
    site = Site(root, folder/'processed')
    head = f'<style>{base_style}</style><style>{(root/"nbs"/"styles.css").read_text()}</style>'
    files = {page_id(path): write_page(site.page(path), folder, head) for path in find_notebooks(root)}
    for width in widths:
        for name, elements in too_wide(folder, files.values(), width).items():
            print(f'{name} at {width} pixels:', *elements, sep='\n    ')
        for name in names:
            shot = folder/f'{files[name].stem}-{width}.png'
            size = f'--window-size={width},2400'
            chromium(folder, frames([files[name]], width), f'--screenshot={shot}', size)

if __name__ == '__main__':
    look(Path(sys.argv[1]).resolve(), *sys.argv[2:])
