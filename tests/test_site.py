"""Every notebook becomes a page of the site: nothing fails, nothing is lost, every link has its target.

`nbdev_docs` processes the notebooks and hands the result to Quarto. Quarto is not on every machine, so these
tests do the first half, `nbdev.serve_drv.main`, in a fresh process for each notebook, and read the result.
"""
import configparser
import contextlib
import difflib
import fcntl
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import pytest
import yaml

root = Path(__file__).resolve().parent.parent
max_output_width = 90    # wider lines of an output are cut off on the page
max_source_width = 110   # the rule of this project for code
page_suffixes = ('.ipynb', '.qmd', '.md')

# Imports what notebooks need, and the indices that nbdev's links come from, then forks a process for each
# notebook: the imports take six times as long as the rest. A module of ours that cannot be imported is left
# to the pages that need it.
processor = '''
import contextlib
import importlib
import json
import os
import signal
import sys
import traceback
from importlib.metadata import entry_points
from pathlib import Path

import datasets
import fastai.basics
import matplotlib.pyplot
import nbdev.serve_drv
import scipy.stats
import torch._dynamo
from nbdev.processors import FilterDefaults, exec_show_docs

for index in entry_points(group='nbdev'):
    with contextlib.suppress(Exception):  # as nbdev does
        index.load()
for module in ('bijdiff.all', 'bijdiff.documents', 'bijdiff.runs', 'bijdiff.testing'):
    with contextlib.suppress(Exception):
        importlib.import_module(module)

failures = []

class NoteFailures(exec_show_docs):
    "Run the cells that the documentation needs, and go on after one that fails"
    def __call__(self, cell):
        stored = cell.get('outputs')
        try:
            super().__call__(cell)
        except Exception as stopped:
            error = self.k.exc or stopped
            failures.append(dict(id=cell.id, source=cell.source, error=f'{type(error).__name__}: {error}'))
            self.k.exc = None
            cell.outputs = stored

class ToTheEnd(FilterDefaults):
    "The processors of nbdev, with the one above"
    def procs(self):
        return [NoteFailures if proc is exec_show_docs else proc for proc in super().procs()]

def process(project, source, destination, log, noted=None):
    "Process a notebook as nbdev_docs does, or to the end and note the failures"
    signal.alarm(300)
    os.chdir(project)
    with open(log, 'w') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    nbdev.serve_drv.main((Path(source), Path(destination), ToTheEnd if noted else FilterDefaults))
    if noted:
        Path(noted).write_text(json.dumps(failures))

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            process(*json.loads(line))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitpid(child, 0)[1], flush=True)
'''

@functools.cache
def start_processor():
    "Start the processor, once in each process of the tests; it ends when its input ends"
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, '-c', processor], cwd=root, stdin=pipe, stdout=pipe, text=True)

def fails(*task):
    "Process a notebook; return True if that fails"
    running = start_processor()
    print(json.dumps([str(part) for part in task]), file=running.stdin, flush=True)
    return running.stdout.readline() != '0\n'

# Notebooks and pages

def find_notebooks(project):
    "Notebooks of a project that become pages"
    nbs = project/'nbs'
    found = sorted(nbs.rglob('*.ipynb'))
    return [path for path in found if not any(part[0] in '._' for part in path.relative_to(nbs).parts)]

def page_id(path):
    "Name of a notebook in the reports: its path below nbs/"
    parts = path.with_suffix('').parts
    return '/'.join(parts[parts.index('nbs') + 1:])

def published_name(relative):
    "Address at which nbdev publishes a notebook: the number is stripped, the folder stays"
    name = re.sub(r'^\d+[a-zA-Z0-9]*_', '', relative.name.lower())
    return relative.with_name(name).with_suffix('.html').as_posix()

def joined(lines):
    "Text of a field that notebooks store as a string or as a list of lines"
    return ''.join(lines)

def last_error(log):
    "The line of a log that names the exception which ended the process"
    lines = log.strip().splitlines() or ['ended without a message']
    return next((line for line in reversed(lines) if re.match(r'[\w.]+(Error|Exception)\b', line)), lines[-1])

class Site:
    "A project, and the folder that keeps its processed notebooks"

    def __init__(self, project, cache):
        self.root = project.resolve()
        self.nbs = self.root/'nbs'
        self.cache = cache
        self.cache.mkdir(parents=True, exist_ok=True)
        self.pages = {}
        settings = configparser.ConfigParser(interpolation=None)
        settings.read(self.root/'settings.ini')
        self.settings = settings['DEFAULT']

    @property
    def host(self):
        "Address of the site, which nbdev puts before the links it makes"
        return (self.settings['doc_host'] + self.settings['doc_baseurl']).rstrip('/')

    @functools.cached_property
    def published(self):
        "Notebooks by the address below the host that nbdev gives them"
        return {published_name(path.relative_to(self.nbs)): path for path in find_notebooks(self.root)}

    def page(self, path):
        "Return the page of a notebook, processed by whichever test needs it first"
        if path not in self.pages:
            self.pages[path] = Page(self, path, self.processed(path))
        return self.pages[path]

    def processed(self, path):
        "Read the result of processing a notebook; while another test process makes it, make others"
        for candidate in [path, *find_notebooks(self.root)]:
            if not self.stored(path).exists():
                self.store(candidate, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.store(path, fcntl.LOCK_EX)
        return json.loads(self.stored(path).read_text())

    def stored(self, path):
        "File with the result of processing a notebook"
        return self.cache/(page_id(path).replace('/', '+') + '.json')

    def store(self, path, how):
        "Process a notebook once; if another test process is at it, wait or leave it, as the lock says"
        result = self.stored(path)
        with open(result.with_suffix('.lock'), 'w') as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, how)
            if not result.exists():
                unfinished = result.with_suffix('.unfinished')
                unfinished.write_text(json.dumps(self.process(path, result.with_suffix('.ipynb'))))
                unfinished.rename(result)

    def process(self, path, destination):
        "Process a notebook as nbdev_docs does; if that stops, once more to find every cell that fails"
        log, noted = (destination.with_suffix(suffix) for suffix in ('.log', '.failures'))
        task = (self.root, path, destination, log)
        failures = []
        if fails(*task):
            message = log.read_text()
            unknown = [dict(id=None, source='', error=last_error(message))]
            failures = unknown if fails(*task, noted) else json.loads(noted.read_text()) or unknown
            log.write_text(message)
        cells = json.loads(destination.read_text())['cells'] if destination.exists() else []
        return dict(cells=cells, failures=failures, log=log.read_text()[-2000:])

class Page:
    "A notebook and the page that nbdev made of it"

    def __init__(self, site, path, processed):
        self.site = site
        self.path = path
        self.id = page_id(path)
        self.source = json.loads(path.read_text(encoding='utf-8'))['cells']
        self.cells = processed['cells']
        self.failures = processed['failures']
        self.log = processed['log']

    @functools.cached_property
    def front_matter(self):
        "Title, description and address that nbdev found"
        raw = [joined(cell['source']) for cell in self.cells[:1] if cell['cell_type'] == 'raw']
        return yaml.safe_load(raw[0].strip().strip('-')) if raw else {}

    @functools.cached_property
    def anchors(self):
        "Every id on the page that a link can name"
        texts = [text for cell in self.cells for text in markdown_texts(cell) + html_texts(cell)]
        labels = [options(cell).get('label') for cell in self.cells]
        return find_anchors(texts) | {label for label in labels if label}

    def where(self, cell):
        "Name a cell by its number in the notebook and its first line of code or text"
        lines = joined(cell['source']).splitlines()
        shown = [line for line in lines if line.strip() and not is_option(line)] or ['']
        numbers = [n for n, own in enumerate(self.source) if cell['id'] and own.get('id') == cell['id']]
        number = f'cell {numbers[0]}' if numbers else 'added by nbdev'
        return f'{number} ({shortened(shown[0].strip())})' if shown[0] else 'the notebook'

def shortened(line, width=70):
    "The beginning of a line"
    return line if len(line) <= width else line[:width] + '...'

# Cells

def is_option(line):
    "Return True for a line of code that is an option of nbdev or Quarto"
    return bool(re.match(r'\s*#\s*\|', line))

def option_lines(cell):
    "Options at the head of a code cell, without the comment sign"
    lines = joined(cell['source']).splitlines() if cell['cell_type'] == 'code' else []
    first = next((n for n, line in enumerate(lines) if not is_option(line)), len(lines))
    return [re.sub(r'^\s*#\s*\|\s?', '', line) for line in lines[:first]]

def options(cell):
    "Options of a cell as Quarto reads them; none if they are not YAML"
    try:
        found = yaml.safe_load('\n'.join(option_lines(cell)))
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}

def shows_source(cell):
    "Return True if the page shows the code of a cell"
    chosen = options(cell)
    return chosen.get('include') is not False and chosen.get('echo') is not False

def shows_output(cell):
    "Return True if the page shows the outputs of a cell"
    chosen = options(cell)
    return chosen.get('include') is not False and chosen.get('output') is not False

def shown_outputs(cell):
    "Outputs of a cell that the page shows"
    return cell.get('outputs', []) if cell['cell_type'] == 'code' and shows_output(cell) else []

def code_cells(page):
    "Code cells of a page"
    return [cell for cell in page.cells if cell['cell_type'] == 'code']

def output_texts(cell, mime):
    "Outputs of one kind that the page shows"
    return [joined(out['data'][mime]) for out in shown_outputs(cell) if mime in out.get('data', {})]

def markdown_texts(cell):
    "Markdown that a cell brings to the page"
    if cell['cell_type'] == 'markdown':
        return [joined(cell['source'])]
    texts = output_texts(cell, 'text/markdown')
    if options(cell).get('output') == 'asis':
        texts += [joined(out['text']) for out in shown_outputs(cell) if out['output_type'] == 'stream']
    return texts

def html_texts(cell):
    "HTML that a cell brings to the page as an output"
    return output_texts(cell, 'text/html')

def is_show_doc(cell):
    "Return True for a cell that shows the documentation of a function or a class"
    return bool(re.search(r'^show_doc\(', joined(cell['source']), re.M))

# Markdown

class Link(NamedTuple):
    "A link or a picture in a text"
    target: str              # Address, as written
    text: str                # Text of the link, or alternative text of the picture
    is_image: bool = False   # A picture
    attributes: str = ''     # Attributes in braces after it
    inner: tuple = ()        # Links and pictures inside the text

def masked(pattern, text):
    "Replace what matches by as many x, so that nothing in it is read as markdown"
    return re.sub(pattern, lambda found: re.sub(r'[^\n]', 'x', found[0]), text, flags=re.M | re.S)

def without_fences(text):
    "Blank out fenced code"
    return masked(r'^ *(```+|~~~+).*?^ *\1`*~* *$', text)

def without_code(text):
    "Blank out code, comments and formulas"
    text = without_fences(text)
    text = masked(r'<!--.*?-->', text)
    text = masked(r'(?<!`)(`+)(?!`)[^\n]*?(?<!`)\1(?!`)', text)
    text = masked(r'\$\$.*?\$\$', text)
    return masked(r'(?<![\\$])\$(?![\s$])[^$\n]*?(?<![\s\\])\$(?!\d)', text)

inline_link = re.compile(r'''
    (?<!\\)(!?)\[                                                   # a picture begins with !
    ((?:[^\[\]] | !?\[[^\[\]]*\](?:\([^()]*\)(?:\{[^{}]*\})?)?)*)   # text, with at most one level of links
    \]\(\s*<?([^()\s<>]*(?:\([^()]*\)[^()\s<>]*)*)>?                # target
    (?:\s+(?:"[^"]*"|'[^']*'))?\s*\)                                # title
    (\{[^{}]*\})?                                                   # attributes
    ''', re.X)
emphasis = re.compile(r'(?<!\w)(__?)(\w.*?)\1(?!\w)')
reference = re.compile(r'^ {0,3}\[(?!\^)([^\]]+)\]:\s*<?(\S+?)>?(?:\s|$)', re.M)

def inline_links(text):
    "Links and pictures that are written as [text](target)"
    for image, inner, target, attributes in inline_link.findall(text):
        yield Link(target, inner, bool(image), attributes, tuple(inline_links(inner)))

def html_links(text):
    "Links and pictures that are written as HTML"
    for tag, attributes in re.findall(r'<(a|img)\b([^>]*)>', text, re.I):
        written = re.findall(r'([\w-]+)=(["\'])(.*?)\2', attributes)
        values = {name.lower(): value for name, _, value in written}
        target = values.get('src' if tag.lower() == 'img' else 'href')
        if target:
            yield Link(target, values.get('alt', ''), tag.lower() == 'img')

def outer_links(cell):
    "Links and pictures of a cell, without those inside the text of another"
    links = []
    for text in map(without_code, markdown_texts(cell)):
        links += inline_links(text)
        links += html_links(text)
        links += [Link(target, name) for name, target in reference.findall(text)]
        links += [Link(target, target) for target in re.findall(r'<(https?://[^>\s]+)>', text)]
    for text in html_texts(cell):
        links += html_links(text)
    return links

def all_links(cell):
    "Links and pictures of a cell, also those inside the text of another"
    return [link for outer in outer_links(cell) for link in (outer, *outer.inner)]

def without_emphasis(text):
    "Remove the underscores that emphasise a word; those in code are part of a name"
    parts = re.split(r'(`[^`]*`)', text)
    return ''.join(part if part[:1] == '`' else emphasis.sub(r'\2', part) for part in parts)

def slug(heading):
    "Id that pandoc gives a heading"
    text = re.sub(r'!?\[([^\[\]]*)\](?:\([^()]*\))?(?:\{[^{}]*\})?', r'\1', heading)
    text = re.sub(r'</?[a-z][^<>]*>', '', text)
    text = re.sub(r'---|--|\.\.\.', '', without_emphasis(text)).lower()
    kept = ''.join(c for c in text if c.isalnum() or c.isspace() or c in '_-.')
    hyphenated = '-'.join(kept.split())
    letters = [n for n, c in enumerate(hyphenated) if c.isalpha()]
    return hyphenated[letters[0]:] if letters else 'section'

def find_anchors(texts):
    "Ids of the headings of a page, in their order, and ids that are written out"
    anchors = set()
    for text in map(without_fences, texts):
        for heading in re.findall(r'^ {0,3}#{1,6}\s+(.*?)[\s#]*$', text, re.M):
            if not re.search(r'\{[^}]*#[\w.:-]+[^}]*\}', heading):
                anchors.add(unused(slug(re.sub(r'\s*\{[^}]*\}$', '', heading)), anchors))
        anchors.update(re.findall(r'\{[^}\n]*?#([\w.:-]+)[^}\n]*\}', text))
        anchors.update(found[1] for found in re.findall(r'\b(?:id|name)=(["\'])(.*?)\1', text))
    return anchors

def unused(name, anchors):
    "Name of a heading, with a number if it is taken"
    names = [name, *(f'{name}-{n}' for n in range(1, len(anchors) + 2))]
    return next(candidate for candidate in names if candidate not in anchors)

# 1. Processing

def swallowed_errors(page, cell):
    "Errors in a cell that do not stop nbdev, but appear on the page"
    for out in shown_outputs(cell):
        if out['output_type'] == 'error':
            yield f'{page.where(cell)}: the output is an error, {out["ename"]}: {out["evalue"]}'
        elif 'Traceback (most recent call last)' in joined(out.get('text', '')):
            yield f'{page.where(cell)}: the output holds a traceback'
    shown = [out for out in shown_outputs(cell) if 'text/markdown' in out.get('data', {})]
    if is_show_doc(cell) and shown_outputs(cell) and not shown:
        yield f'{page.where(cell)}: no documentation is shown'

def text_outputs(cell):
    "Printed and returned text of a cell"
    outputs = cell.get('outputs', [])
    printed = [joined(out['text']) for out in outputs if out.get('name') == 'stdout']
    return printed + [joined(out['data'].get('text/plain', '')) for out in outputs if 'data' in out]

def is_replaced(page, cell):
    "Return True if nbdev has run a cell again, and the page shows another output than the notebook"
    stored = [own for own in page.source if own.get('id') == cell.get('id')]
    return bool(stored) and not is_show_doc(cell) and text_outputs(cell) != text_outputs(stored[0])

def is_readable(cell):
    "Return True if the options of a cell are YAML"
    try:
        yaml.safe_load('\n'.join(option_lines(cell)))
    except yaml.YAMLError:
        return False
    return True

def processing_faults(page):
    "Cells that fail when nbdev runs them, show an error, or have options that Quarto cannot read"
    faults = [f'{page.where(failure)}: {failure["error"]}' for failure in page.failures]
    for cell in code_cells(page):
        faults += swallowed_errors(page, cell)
        if shown_outputs(cell) and is_replaced(page, cell):
            faults.append(f'{page.where(cell)}: nbdev runs it again, with another output')
        if not is_readable(cell):
            faults.append(f'{page.where(cell)}: the options are not YAML; put quotation marks around texts')
    return faults

processing_advice = '''
For the site nbdev runs every exported cell and every cell that holds an import or show_doc, hidden or not,
from the project's root and without the cells between. Imports stand in cells with nothing but imports. No
such cell reads a file by a relative path. show_doc needs functions whose source can be found.'''

# 2. Introduction

def title_cell(page):
    "Text of the cell that nbdev turns into front matter"
    texts = [joined(cell['source']) for cell in page.source if cell['cell_type'] == 'markdown']
    return next((text for text in texts if re.search(r'^#\s+\S', text, re.M)), '')

def lost_lines(text):
    "Lines of the title cell that do not become front matter"
    lines = [line for line in text.splitlines() if line.strip()]
    kept = [next((line for line in lines if re.match(sign + r'\s+\S', line)), None) for sign in '#>']
    return [line for line in lines if line not in kept and not re.match(r'-\s+\S.*:.*\S', line)]

def without_comments(text):
    "Remove HTML comments, such as the warning that nbdev adds"
    return re.sub(r'<!--.*?-->', '', text, flags=re.S).strip()

def is_on_page(cell):
    "Return True for a cell of which the page shows anything"
    if cell['cell_type'] == 'code':
        return shows_source(cell) or bool(shown_outputs(cell))
    return cell['cell_type'] == 'markdown' and bool(without_comments(joined(cell['source'])))

def is_prose(cell):
    "Return True if a cell begins with a paragraph, not with code, a heading, a list, a picture or a formula"
    text = without_comments(joined(cell['source']))
    is_list = re.match(r'([*+-]|\d+[.)])\s', text)
    is_text = re.match(r'(?!```|\$\$)[\w*`$\["\'(]', text)
    return cell['cell_type'] == 'markdown' and bool(is_text) and not is_list

def introduction_faults(page):
    "Parts missing at the head of a page"
    faults = [f'no {name}' for name in ('title', 'description') if not page.front_matter.get(name)]
    lost = lost_lines(title_cell(page))
    if lost:
        faults.append(f'{len(lost)} lines of the title cell are lost, the first: {shortened(lost[0])}')
    first = next((cell for cell in page.cells if is_on_page(cell)), None)
    if first is None:
        faults.append('the page is empty')
    elif not is_prose(first):
        faults.append(f'the page begins with {page.where(first)}, not with a paragraph')
    return faults

introduction_advice = '''
nbdev makes front matter of the cell with the title and drops the rest of it. That cell holds `# Title` and
one line `> description`. The next cell is a paragraph that introduces the page.'''

# 3. Links

def file_of(page, path):
    "File that the path of a relative link means; a path that begins with / begins at nbs/"
    if not path:
        return page.path
    folder = page.site.nbs if path.startswith('/') else page.path.parent
    return (folder/path.lstrip('/')).resolve()

def broken_file(page, path, anchor):
    "Fault of a relative link, or None"
    target = file_of(page, path)
    if page.site.nbs not in target.parents:
        return 'the site holds only what is below nbs/: link to the file on GitHub'
    if path.endswith('.html') and target.relative_to(page.site.nbs).as_posix() in page.site.published:
        return 'Quarto does not check a link to a page: link to the .ipynb'
    if path.endswith('.html') and not target.is_file():
        return 'nbdev publishes no such page: link to the .ipynb'
    if not target.is_file():
        return 'no such file'
    if anchor and target.suffix == '.ipynb':
        return broken_anchor(page.site.page(target), anchor)
    return None

def broken_anchor(target, anchor):
    "Fault of the anchor of a link, or None"
    if anchor in target.anchors:
        return None
    similar = difflib.get_close_matches(anchor, target.anchors, n=1)
    return f'{target.id} has no such anchor' + (f', but #{similar[0]}' if similar else '')

def broken_address(site, address):
    "Fault of an absolute link to the site or to the files of this project, or None"
    path = unquote(address.partition('#')[0]).rstrip('/')
    files = '/'.join((site.settings['git_url'], 'blob', site.settings['branch'], ''))
    if path.startswith(site.host + '/') and path.removeprefix(site.host + '/') not in site.published:
        return 'the site has no such page; after moving a notebook, run nbdev_export'
    if path.startswith(files) and not (site.root/path.removeprefix(files)).exists():
        return 'the project has no such file'
    return None

def broken(page, link):
    "Fault of a link, or None"
    if re.match(r'https?://', link.target):
        return broken_address(page.site, link.target)
    if re.match(r'[a-z][a-z0-9+.-]*:|//', link.target, re.I):
        return None
    path, _, anchor = link.target.partition('#')
    return broken_file(page, unquote(path.partition('?')[0]), unquote(anchor))

def is_nested(link):
    "Return True if the text of a link holds another link: the inner one works, the outer one is lost"
    return not link.is_image and any(not inner.is_image for inner in link.inner)

def link_faults(page):
    "Links and pictures without their target, and links inside links"
    faults = []
    for cell in page.cells:
        for link in all_links(cell):
            reason = broken(page, link)
            if reason:
                faults.append(f'{page.where(cell)}: {link.target}: {reason}')
        for link in filter(is_nested, outer_links(cell)):
            faults.append(f'{page.where(cell)}: {link.target}: another link stands inside its text')
    return faults

link_advice = '''
Link to a notebook by its relative path with .ipynb, to a heading by its text in lower case with hyphens.
Put no back-ticks around a public name in the text of a link: nbdev makes a link of it.'''

# 4. Widths

def plain_text(out):
    "Plain text of an output, as the page shows it"
    if out['output_type'] == 'stream':
        return joined(out['text'])
    data = out.get('data', {})
    return joined(data['text/plain']) if list(data) == ['text/plain'] else ''

def widest(texts):
    "The widest line, without the signs that colour it"
    lines = [line for text in texts for line in re.sub(r'\x1b\[[0-9;]*m', '', text).splitlines()]
    return max(lines, key=len, default='')

def width_faults(page):
    "Cells with an output or code that is too wide, each with its widest line"
    faults = []
    for cell in code_cells(page):
        output = widest(plain_text(out) for out in shown_outputs(cell))
        lines = joined(cell['source']).splitlines() if shows_source(cell) else []
        source = widest(line for line in lines if not is_option(line))
        if len(output) > max_output_width:
            faults.append(f'{page.where(cell)}: output of {len(output)} characters: {shortened(output)}')
        if len(source) > max_source_width:
            faults.append(f'{page.where(cell)}: code of {len(source)} characters: {shortened(source)}')
    return faults

width_advice = f'''
The page cuts outputs off after {max_output_width} characters. Code has at most {max_source_width}. Print
fewer columns, or break the line.'''

# 5. Pictures

def has_picture(cell):
    "Return True for a cell that shows a picture as its output"
    kinds = [kind for out in shown_outputs(cell) for kind in out.get('data', {})]
    return any(kind.startswith('image/') for kind in kinds)

def has_alt_text(cell):
    "Return True if the option fig-alt of a cell describes its pictures"
    texts = options(cell).get('fig-alt')
    texts = texts if isinstance(texts, list) else [texts]
    return all(isinstance(text, str) and text.strip() for text in texts)

def picture_faults(page):
    "Pictures without alternative text"
    faults = []
    for cell in page.cells:
        if has_picture(cell) and not has_alt_text(cell):
            faults.append(f'{page.where(cell)}: the picture needs `#| fig-alt: "what is to be seen"`')
        for link in all_links(cell):
            if link.is_image and not link.text.strip() and 'fig-alt=' not in link.attributes:
                faults.append(f'{page.where(cell)}: write ![what is to be seen]({shortened(link.target)})')
    return faults

picture_advice = '''
Say in one sentence what is to be seen. The option stands on one line, in quotation marks: nbdev drops the
lines that continue it.'''

# 6. Headings

def headings(page):
    "Cell, level and text of each heading below the title, in their order"
    for cell in page.cells:
        for text in map(without_fences, markdown_texts(cell)):
            for signs, heading in re.findall(r'^ {0,3}(#{1,6})\s+(.*?)[\s#]*$', text, re.M):
                yield cell, len(signs), heading

def heading_faults(page):
    "Second titles, and headings that leave out a level, but for names that are documented before a section"
    faults = []
    above = 1
    for cell, level, heading in headings(page):
        if level == 1:
            faults.append(f'{page.where(cell)}: a second title: {shortened(heading)}')
        elif level > above + 1 and not (above == 1 and is_show_doc(cell)):
            faults.append(f'{page.where(cell)}: {"#"*level} after {"#"*above}: {shortened(heading)}')
        above = level
    return faults

heading_advice = '''
The title stands in the first cell alone. Sections begin with ##, their parts with ###. nbdev gives ### to
the names that it documents; #### stands below one of these, or below a part.'''

# The site as a whole

def read_yaml(path):
    "Read a YAML file; an absent one is empty"
    return yaml.safe_load(path.read_text(encoding='utf-8')) or {} if path.exists() else {}

def named_pages(entry):
    "Files that a navigation names, at any depth"
    if isinstance(entry, str):
        return [entry] if entry.endswith(page_suffixes) and '://' not in entry else []
    children = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else []
    return [name for child in children for name in named_pages(child)]

def navigation_faults(site):
    "Pages that the navigation names in vain, twice or not at all"
    website = read_yaml(site.root/'_quarto.yml').get('website', {})
    sidebar = named_pages(website.get('sidebar'))
    existing = [path.relative_to(site.nbs).as_posix() for path in find_notebooks(site.root)]
    every = sorted({*sidebar, *named_pages(website.get('navbar'))})
    absent = [name for name in every if not (site.nbs/name).is_file()]
    faults = [f'{name} is named, but nbs/ has no such file' for name in absent]
    faults += [f'{name} is named twice' for name in sorted(set(sidebar)) if sidebar.count(name) > 1]
    faults += [f'{name} is not in the sidebar' for name in existing if name not in sidebar]
    return faults

def address_faults(site):
    "Notebooks that nbdev publishes under the address of another"
    lost = [path for path in find_notebooks(site.root) if path not in site.published.values()]
    addresses = [published_name(path.relative_to(site.nbs)) for path in lost]
    return [f'{page_id(path)} becomes {name}, as another does' for path, name in zip(lost, addresses)]

def filter_faults(site):
    "Configurations that name a filter: Quarto would look for it and stop"
    paths = [site.root/'_quarto.yml', site.nbs/'_quarto.yml']
    return [f'{path.name} has `filters`: nbdev needs none' for path in paths if 'filters' in read_yaml(path)]

# Options of Quarto that this site uses; Quarto stops at one that it does not know
documented = {
    '': {'project', 'format', 'website'},
    'project': {'type', 'output-dir'},
    'format': {'html'},
    'format.html': {
        'theme', 'respect-user-color-scheme', 'css', 'toc', 'html-math-method', 'code-overflow',
        'canonical-url',
    },
    'format.html.theme': {'light', 'dark'},
    'website': {
        'title', 'site-url', 'description', 'favicon', 'repo-url', 'repo-branch', 'repo-subdir',
        'repo-actions', 'page-navigation', 'bread-crumbs', 'open-graph', 'twitter-card', 'navbar',
        'page-footer', 'sidebar',
    },
    'website.open-graph': {'image', 'image-alt'},
    'website.twitter-card': {'image', 'image-alt', 'card-style'},
    'website.navbar': {'background', 'search', 'left', 'right'},
    'website.page-footer': {'left', 'center', 'right'},
    'website.sidebar': {'style', 'collapse-level', 'contents'},
}
navigation_item = {'text', 'href', 'icon', 'aria-label', 'section', 'contents'}
largest_image = 60_000    # bytes

def mappings(value, path=''):
    "Every mapping of a configuration, with its place in it"
    if isinstance(value, dict):
        yield path, value
    for name, child in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(child, (dict, list)):
            yield from mappings(child, f'{path}.{name}'.lstrip('.'))

def option_faults(site):
    "Options that are not in the lists above"
    for path, mapping in mappings(read_yaml(site.root/'_quarto.yml')):
        is_item = re.search(r'\.\d+$', path)
        known = navigation_item if is_item else documented.get(path, set())
        for name in mapping:
            if name not in known:
                yield f'{path or "_quarto.yml"} has the option {name}, which `documented` does not'

def as_list(value):
    "A value that may be one or several"
    return value if isinstance(value, list) else [value] if value else []

def part(configuration, *names):
    "Value at a place of a configuration, or None"
    for name in names:
        configuration = configuration.get(name) if isinstance(configuration, dict) else None
    return configuration

def theme_faults(site):
    "Themes that are missing, name an absent file, or load letters from another host"
    themes = part(read_yaml(site.root/'_quarto.yml'), 'format', 'html', 'theme')
    for shade in ('light', 'dark'):
        named = as_list(part(themes, shade))
        files = [site.nbs/name for name in named if name.endswith('.scss')]
        if not named:
            yield f'there is no {shade} theme'
        if not any(path.exists() and '$web-font-path: false' in path.read_text() for path in files):
            yield f'the {shade} theme loads fonts from another host: set $web-font-path to false'
    if part(read_yaml(site.root/'_quarto.yml'), 'format', 'html', 'html-math-method') != 'mathml':
        yield 'formulas need a program from another host: html-math-method is mathml'

def png_size(path):
    "Width and height of a PNG"
    return tuple(int.from_bytes(path.read_bytes()[at:at + 4], 'big') for at in (16, 20))

def card_faults(site):
    "Faults of the pictures that are shown beside a link to the site"
    for card in ('open-graph', 'twitter-card'):
        chosen = part(read_yaml(site.root/'_quarto.yml'), 'website', card) or {}
        path = site.nbs/str(chosen.get('image', '')).lstrip('/')
        if not path.is_file():
            yield f'{card} has no image, or an absent one'
        elif png_size(path) != (1200, 630):
            yield f'the image of {card} is not of 1200 x 630 points, but of {png_size(path)}'
        elif not chosen.get('image-alt'):
            yield f'the image of {card} has no image-alt'

def file_faults(site):
    "Files that only Quarto uses and that are absent, or images that are too large"
    html = part(read_yaml(site.root/'_quarto.yml'), 'format', 'html') or {}
    website = part(read_yaml(site.root/'_quarto.yml'), 'website') or {}
    themes = [name for names in (html.get('theme') or {}).values() for name in as_list(names)]
    named = as_list(html.get('css')) + [name for name in themes if name.endswith('.scss')]
    images = [website.get('favicon') or 'no favicon', part(website, 'open-graph', 'image') or 'no card']
    for name in [*named, *images, '404.qmd']:
        path = site.nbs/name.lstrip('/')
        if not path.is_file():
            yield f'{name}: nbs/ has no such file'
        elif name in images and path.stat().st_size > largest_image:
            yield f'{name} has more than {largest_image} bytes'

def settings_faults(site):
    "Values of _quarto.yml that differ from settings.ini"
    website = part(read_yaml(site.root/'_quarto.yml'), 'website') or {}
    settings = site.settings
    expected = {'site-url': site.host, 'repo-branch': settings['branch'], 'repo-url': settings['git_url']}
    for name, value in expected.items():
        if website.get(name) != value:
            yield f'{name} is {website.get(name)}; settings.ini has {value}'
    footer = ' '.join(map(str, (website.get('page-footer') or {}).values()))
    if settings['version'] not in re.findall(r'\d+(?:\.\w+)+', re.sub(r'\(.*?\)', '', footer)):
        yield f'the footer does not name the version {settings["version"]} of settings.ini'
    for target in re.findall(r'\]\((.*?)\)', footer):
        if broken_address(site, target):
            yield f'{target} in the footer: {broken_address(site, target)}'

class QuartoPage(Page):
    "A page that is no notebook: nbdev copies it"

    def __init__(self, site, path):
        _, head, body = path.read_text(encoding='utf-8').split('---\n', 2)
        self.site, self.path, self.id = site, path, page_id(path)
        self.source = []
        self.cells = [
            dict(cell_type='raw', id=None, source=head),
            dict(cell_type='markdown', id=None, source=body),
        ]

    def where(self, cell):
        "Name the page"
        return self.id

def quarto_page_faults(site):
    "Faults of the pages that are no notebooks"
    checks = (introduction_faults, link_faults, picture_faults, heading_faults)
    pages = [QuartoPage(site, path) for path in sorted(site.nbs.rglob('*.qmd'))]
    return [fault for page in pages for check in checks for fault in check(page)]

site_checks = [
    navigation_faults, address_faults, filter_faults, option_faults, theme_faults, card_faults, file_faults,
    settings_faults, quarto_page_faults,
]

# Tests

def require_none(faults, what, where, advice=''):
    "Fail with a report if there are faults: how many, of what kind, on which page, and what to do"
    if faults:
        report = '\n  '.join([f'{len(faults)} {what} in {where}', *faults])
        pytest.fail(f'{report}{advice}', pytrace=False)

@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "This project; all processes of a test run share the processed notebooks"
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base
    return Site(root, shared/'site')

@pytest.fixture(params=find_notebooks(root), ids=page_id)
def page(site, request):
    "Each page of the site in turn"
    return site.page(request.param)

def test_nbdev_can_process_the_notebook(page):
    log = f'\nnbdev stopped with:\n{page.log}' if page.failures else ''
    require_none(processing_faults(page), 'failing cells', page.id, processing_advice + log)

def test_the_introduction_is_on_the_page(page):
    require_none(introduction_faults(page), 'faults of the introduction', page.id, introduction_advice)

def test_links_have_their_target(page):
    require_none(link_faults(page), 'dead links', page.id, link_advice)

def test_lines_fit_on_the_page(page):
    require_none(width_faults(page), 'lines too wide', page.id, width_advice)

def test_pictures_have_alternative_text(page):
    require_none(picture_faults(page), 'pictures without alternative text', page.id, picture_advice)

def test_headings_leave_out_no_level(page):
    require_none(heading_faults(page), 'faults of the headings', page.id, heading_advice)

@pytest.mark.parametrize('check', site_checks)
def test_the_site_as_a_whole(site, check):
    require_none(list(check(site)), 'faults', '_quarto.yml and the files that it names')


def make_the_readme(folder, settings):
    "Exit status and output of the part of nbdev_docs that makes a README, where the present one is old"
    (folder/'settings.ini').write_text(settings)
    (folder/'nbs').mkdir(exist_ok=True)
    (folder/'nbs'/'index.ipynb').write_bytes((root/'nbs'/'index.ipynb').read_bytes())
    (folder/'README.md').write_text('ours')
    os.utime(folder/'README.md', (0, 0))
    command = 'from nbdev.quarto import nbdev_readme; nbdev_readme.__wrapped__(chk_time=True)'
    done = subprocess.run([sys.executable, '-c', command], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr

def test_nbdev_docs_leaves_the_readme_alone(tmp_path):
    "README.md is made by tools/make_readme.py; in a fresh clone it may be older than the index"
    settings = (root/'settings.ini').read_text()
    status, out = make_the_readme(tmp_path, settings)
    assert status == 0, f'nbdev tried to make another README; readme_nb must name no notebook: {out}'
    assert (tmp_path/'README.md').read_text() == 'ours'
    status, out = make_the_readme(tmp_path, re.sub('^readme_nb.*$', '', settings, flags=re.M))
    assert status != 0 or (tmp_path/'README.md').read_text() != 'ours'

# Every fault is planted once, in a small project of its own

def markdown(text):
    "A cell of text"
    return dict(cell_type='markdown', metadata={}, source=text)

def raw(text):
    "A cell of front matter"
    return dict(cell_type='raw', metadata={}, source=text)

def code(text, *outputs):
    "A cell of code"
    return dict(cell_type='code', metadata={}, source=text, outputs=list(outputs), execution_count=None)

def printed(text):
    "Printed output of a cell"
    return dict(output_type='stream', name='stdout', text=[text])

def displayed(**data):
    "Displayed output of a cell: text_plain='1' for the kind text/plain"
    kinds = {kind.replace('_', '/'): value for kind, value in data.items()}
    return dict(output_type='display_data', metadata={}, data=kinds)

planted_settings = '''[DEFAULT]
repo = planted
lib_name = planted
lib_path = planted
nbs_path = nbs
doc_path = _docs
version = 0.1.0
recursive = True
branch = main
user = planted
doc_host = https://planted.org
doc_baseurl = /docs
git_url = https://github.com/planted/planted
'''
planted_configuration = '''format:
  html:
    theme:
      light: [cosmo, theme.scss]
      dark: [darkly, theme.scss]
    css: styles.css
    html-math-method: mathml
website:
  site-url: https://planted.org/docs
  favicon: images/icon.svg
  repo-url: https://github.com/planted/planted
  repo-branch: main
  open-graph:
    image: /images/card.png
    image-alt: A card
  twitter-card:
    image: /images/card.png
    image-alt: The card
  page-footer:
    left: "planted 0.1.0, [settings](https://github.com/planted/planted/blob/main/settings.ini)"
  sidebar:
    contents:
      - 01_page.ipynb
      - section: Layers
        contents: [layers/02a_target.ipynb]
'''
planted_files = {
    'styles.css': '',
    'theme.scss': '/*-- scss:defaults --*/\n$web-font-path: false !default;',
    'plain.scss': '/*-- scss:defaults --*/',
    '404.qmd': '---\ntitle: Lost\ndescription: No page\n---\n\nBack to [the page](01_page.ipynb).\n',
    'images/icon.svg': '<svg/>',
    'images/large.svg': '<svg/>' + ' '*largest_image,
    'images/loss.png': '',
    'images/card.png': '\0'*18 + '\4\xb0\0\0\2\x76',
    'images/square.png': '\0'*18 + '\4\xb0\0\0\4\xb0',
}

title = markdown('# A page\n> what it is for')
prose = markdown('This page introduces itself.')
definition = code("#| export\ndef double(\n    x:int, # A number\n):\n    'Double `x`'\n    return 2 * x")
head = [title, prose, definition]
target_page = [
    markdown('# Target\n> linked to'),
    markdown('Prose.\n\n## The *first* `log_det`: $x$ -- why?\n\n## Named {#name}\n\n## Twice\n\n## Twice'),
    definition,
]
picture = displayed(image_png='', text_plain='<Figure>')
wide_code = 'x = ' + '1' * (max_source_width - 4)

healthy_page = [
    *head,
    code('import math'),
    code("#| hide\nprint('x' * 200)", printed('x' * 200)),
    code("#| echo: false\nprint('x' * 90)", printed('x' * max_output_width)),
    code("#| output: false\nprint('x' * 91)", printed('x' * 91)),
    code(wide_code),
    code('#| fig-alt: "Loss: it falls"\nplot()', picture),
    markdown('## A heading\n\n![Loss](images/loss.png), [up](#a-heading), `[no](link.html)`, $f[x](y)$'),
    markdown('[one](layers/02a_target.ipynb#the-first-log_det-x-why), [two](layers/02a_target.ipynb#double)'),
    markdown('[three](/layers/02a_target.ipynb#name), [four](layers/02a_target.ipynb#twice-1)'),
    markdown('[five](https://planted.org/docs/layers/target.html), [six](https://quarto.org/nowhere)'),
    markdown('[seven](https://github.com/planted/planted/blob/main/settings.ini)'),
    markdown('[![Loss](images/loss.png)](layers/02a_target.ipynb)'),
]

failing_cells = [
    *head,
    code("from pathlib import Path\nPath('../settings.ini').read_text()"),
    code("#| export\nspace = {}\nexec('def unseen(): pass', space)\nunseen = space['unseen']"),
    code('show_doc(unseen)'),
    code('''#| export
from nbdev.showdoc import BasicMarkdownRenderer
class _Broken(BasicMarkdownRenderer):
    def _repr_markdown_(self): raise OSError'''),
    code('show_doc(double, renderer=_Broken)'),
    code('1/0', dict(output_type='error', ename='ZeroDivisionError', evalue='division', traceback=[])),
    code('import math\nprint(math.e > 3)', printed('True\n')),
    code('#| fig-alt: Loss: it falls\n1'),
]
failures = [
    'cell 3 .*: FileNotFoundError',
    'cell 5 .*: OSError: could not get source code',
    'cell 7 .*: the output holds a traceback',
    'cell 7 .*: no documentation is shown',
    'cell 8 .*: the output is an error, ZeroDivisionError: division',
    'cell 9 .*: nbdev runs it again, with another output',
    'cell 10 .*: the options are not YAML',
]

dead_links = {
    '[a](layers/02a_target.html)': 'layers/02a_target.html: nbdev publishes no such page: link to the .ipynb',
    '[a](layers/target.html)': 'layers/target.html: .* not check .*: link to the .ipynb',
    '[a](layers/target.ipynb)': 'layers/target.ipynb: no such file',
    '[a](../settings.ini)': '../settings.ini: .*below nbs/',
    '[a](layers/02a_target.ipynb#twices)': 'layers/02a_target has no such anchor, but #twice',
    '[a](#here)': '01_page has no such anchor',
    '[a](https://planted.org/docs/target.html)': 'the site has no such page',
    '[a](https://github.com/planted/planted/blob/main/a.py)': 'the project has no such file',
    '![a](images/gain.png)': 'images/gain.png: no such file',
    '<a href="nowhere.ipynb">a</a>': 'nowhere.ipynb: no such file',
    '[a [name](https://quarto.org) in it](layers/02a_target.ipynb)': 'another link stands inside',
}

wide_cells = [
    *head,
    code('f()', printed('short\n' + 'x' * 91)),
    code('g()', displayed(text_plain='x' * 99)),
    code(wide_code + '1'),
]
widths = [r'cell 3 \(f\(\)\): output of 91 ', r'cell 4 \(g\(\)\): output of 99 ', 'cell 5 .*: code of 111 ']

plain_pictures = [
    *head,
    code('plot()', picture),
    code('#| fig-alt: ""\nplot()', picture),
    markdown('![](images/loss.png)'),
    markdown('<img src="images/loss.png">'),
]
alternatives = ['cell 3 .*needs', 'cell 4 .*needs', 'cell 5 .*images/loss.png', 'cell 6 .*images/loss.png']

planted = {
    'cells that fail': (processing_faults, failing_cells, failures),
    'front matter that stops nbdev': (processing_faults, [raw('---\ntitle: a: b\n---')], ['mapping values']),
    'no title': (introduction_faults, [prose], ['no title', 'no description']),
    'no description': (introduction_faults, [markdown('# A page'), prose], ['no description']),
    'prose in the title cell': (
        introduction_faults,
        [markdown('# A page\n> for this\n> and that\n\nLost.'), prose],
        ['2 lines of the title cell are lost, the first: > and that'],
    ),
    'code first': (introduction_faults, [title, code('1 + 1'), prose], ['begins with cell 1']),
    'a heading first': (introduction_faults, [title, markdown('## One'), prose], ['begins with cell 1']),
    'dead links': (link_faults, [*head, *map(markdown, dead_links)], list(dead_links.values())),
    'wide lines': (width_faults, wide_cells, widths),
    'pictures': (picture_faults, plain_pictures, alternatives),
    'headings': (
        heading_faults,
        [*head, markdown('## Part\n\n#### Deep'), markdown('# Title\n\n### Deep')],
        ['cell 3 .*: #### after ##: Deep', 'cell 4 .*: a second title', 'cell 4 .*: ### after #: Deep'],
    ),
}
every_check = [
    processing_faults, introduction_faults, link_faults, width_faults, picture_faults, heading_faults,
]

def write_notebook(path, cells):
    "Write a notebook"
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [dict(cell, id=f'cell-{n}') for n, cell in enumerate(cells)]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))

def plant(folder, cells, configuration=planted_configuration):
    "Write a small project with a page of these cells and a page to link to; return where they are"
    (folder/'settings.ini').write_text(planted_settings)
    (folder/'_quarto.yml').write_text(configuration)
    write_notebook(folder/'nbs'/'01_page.ipynb', cells)
    write_notebook(folder/'nbs'/'layers'/'02a_target.ipynb', target_page)
    (folder/'nbs'/'images').mkdir()
    for name, text in planted_files.items():
        (folder/'nbs'/name).write_bytes(text.encode('latin-1'))
    site = Site(folder, folder/'cache')
    return site, site.nbs/'01_page.ipynb'

def test_a_healthy_page_passes(tmp_path):
    site, path = plant(tmp_path, healthy_page)
    assert [fault for check in every_check for fault in check(site.page(path))] == []
    assert [fault for check in site_checks for fault in check(site)] == []
    target = site.page(site.nbs/'layers'/'02a_target.ipynb')
    assert published_name(Path('layers/02a_target.ipynb')) == 'layers/' + target.front_matter['output-file']

@pytest.mark.parametrize('name', planted)
def test_planted_faults_are_seen(tmp_path, name):
    check, cells, expected = planted[name]
    site, path = plant(tmp_path, cells)
    page = site.page(path)
    found = sorted(check(page))
    unseen = [message for message in expected if not any(re.search(message, fault) for fault in found)]
    assert not unseen and len(found) == len(expected), '\n'.join(found)

@pytest.mark.parametrize('old, new, expected', [
    ('01_page', '03_page', ['03_page.ipynb is named, but nbs/', '01_page.ipynb is not in the sidebar']),
    ('[layers', '[01_page.ipynb, layers', ['01_page.ipynb is named twice']),
    ('website:', 'filters: [a]\nwebsite:', ['_quarto.yml has `filters`', '_quarto.yml has the option']),
    ('  sidebar:', '  sidebar:\n    fold: 1', ['website.sidebar has the option fold']),
    ('section:', 'part:', ['website.sidebar.contents.1 has the option part']),
    ('dark:', 'night:', ['format.html.theme has the option', 'there is no dark', 'the dark theme loads']),
    ('darkly, theme.scss', 'darkly', ['the dark theme loads fonts']),
    ('darkly, theme.scss', 'darkly, plain.scss', ['the dark theme loads fonts']),
    ('darkly, theme.scss', 'darkly, night.scss', ['the dark theme loads', 'night.scss: nbs/ has no such']),
    ('mathml', 'mathjax', ['formulas need a program']),
    ('css: styles.css', 'css: other.css', ['other.css: nbs/ has no such file']),
    ('images/icon', 'images/lost', ['images/lost.svg: nbs/ has no such file']),
    ('images/icon', 'images/large', ['images/large.svg has more than 60000 bytes']),
    ('  favicon: images/icon.svg\n', '', ['no favicon: nbs/ has no such file']),
    ('    image-alt: A card\n', '', ['the image of open-graph has no image-alt']),
    ('card.png\n    image-alt: The', 'lost.png\n    image-alt: The', ['twitter-card has no image, or an']),
    ('card.png\n    image-alt: The', 'square.png\n    image-alt: The', ['the image of twitter-card is not']),
    ('planted 0.1.0', 'planted 0.1.1', ['the footer does not name the version 0.1.0']),
    ('settings.ini', 'lost.ini', ['https://github.com/planted/planted/blob/main/lost.ini in the footer']),
    ('repo-branch: main', 'repo-branch: trunk', ['repo-branch is trunk; settings.ini has main']),
    ('planted.org', 'planted.com', ['site-url is https://planted.com/docs; settings.ini has']),
])
def test_planted_faults_of_the_configuration_are_seen(tmp_path, old, new, expected):
    assert old in planted_configuration
    site, _ = plant(tmp_path, head, planted_configuration.replace(old, new))
    found = [fault for check in site_checks for fault in check(site)]
    assert len(found) == len(expected) and all(map(str.startswith, found, expected)), found

@pytest.mark.parametrize('old, new, expected', [
    ('description: No page\n', '', 'no description'),
    ('01_page.ipynb', '02_page.ipynb', '404: 02_page.ipynb: no such file'),
    ('Back', '## Back', 'the page begins with 404'),
])
def test_planted_faults_of_a_page_that_is_no_notebook_are_seen(tmp_path, old, new, expected):
    site, _ = plant(tmp_path, head)
    text = planted_files['404.qmd']
    assert old in text
    (site.nbs/'404.qmd').write_text(text.replace(old, new))
    found = quarto_page_faults(site)
    assert len(found) == 1 and found[0].startswith(expected), found

def test_a_site_without_a_page_for_lost_addresses_is_seen(tmp_path):
    site, _ = plant(tmp_path, head)
    (site.nbs/'404.qmd').unlink()
    assert list(file_faults(site)) == ['404.qmd: nbs/ has no such file']

def test_two_notebooks_with_one_address_are_seen(tmp_path):
    site, path = plant(tmp_path, head)
    write_notebook(path.with_name('02_page.ipynb'), head)
    assert address_faults(site) == ['01_page becomes page.html, as another does']

def test_a_report_tells_how_many_faults_there_are_and_what_to_do():
    with pytest.raises(pytest.fail.Exception, match='2 dead links in page\n  one\n  two\nMend them.'):
        require_none(['one', 'two'], 'dead links', 'page', '\nMend them.')
