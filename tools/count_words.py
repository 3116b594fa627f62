"""Count the words of tools/words.txt in prose and in code.

    python tools/count_words.py         the count, and where phrases that are never right stand in the package
    python tools/count_words.py share   every place of a phrase of the list

Prose is in the markdown cells of the notebooks and in the pages at the top. Code has docstrings, comments and
messages of errors, in cells, tests and benchmarks. Names in back-ticks do not count. The exit status is 1 if
a phrase that is never right stands in an exported cell.
"""
import ast, io, json, re, sys, tokenize
from pathlib import Path
from typing import NamedTuple

root = Path(__file__).resolve().parent.parent
pages = ['README.md', 'CHANGELOG.md', 'CONTRIBUTING.md']

def matches(phrase, text):
    "Count a phrase in a text; spaces in it are white space or hyphens, and a star stands for letters"
    words = [re.escape(word).replace(r'\*', r'\w*') for word in phrase.split()]
    return len(re.findall(r'(?<!\w)' + r'[\s-]+'.join(words) + r'(?!\w)', text, re.I))

class Word(NamedTuple):
    "A line of the list"
    phrase:str # One or more words
    exceptions:list # Phrases in which it is right
    instead:str # Words to be used instead
    is_never_right:bool # Rejected in docstrings, comments and error messages of the package

    def count(self, text):
        "Count the phrase in a text, outside the exceptions"
        return matches(self.phrase, text)-sum(matches(phrase, text) for phrase in self.exceptions)

class Text(NamedTuple):
    "A text of the project"
    place:str # File, and line or cell
    text:str # The text without names in back-ticks
    is_code:bool # A docstring, a comment or an error message
    is_exported:bool # In a cell that goes into the package

def read_words(path):
    "Read lines `phrase except another -> instead`, after [never right] or after [only counted]"
    words,is_never_right = [],True
    for line in path.read_text(encoding='utf-8').splitlines():
        if line.startswith('['):
            is_never_right = line=='[never right]'
        elif '->' in line:
            phrase,instead = (part.strip() for part in line.split('->'))
            phrase,_,exceptions = phrase.partition(' except ')
            exceptions = [other for other in exceptions.split(', ') if other]
            words.append(Word(phrase, exceptions, instead, is_never_right))
    return words

# What is read in code

def comments(source):
    "First line and text of each comment; directives of nbdev are none, and lines below each other are one"
    found,last = [],None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type!=tokenize.COMMENT or re.match(r'#\s*\|', token.string):
            continue
        line,text = token.start[0],token.string.lstrip('# ')
        has_own_line = token.line.strip()==token.string
        if has_own_line and last==line-1:
            found[-1] = found[-1][0], f'{found[-1][1]} {text}'
        else:
            found.append((line, text))
        last = line if has_own_line else None
    return found

def docstrings(tree):
    "Line and text of each docstring"
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    return [(node.body[0].lineno, text) for node in nodes if (text := ast.get_docstring(node, clean=False))]

def literal(node):
    "Text of a string, with {} for the values in it; None for other nodes"
    if isinstance(node, ast.JoinedStr):
        return ''.join(literal(part) or '{}' for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None

def strings(node):
    "Line and text of each string below a node"
    text = literal(node)
    if text is not None:
        return [(node.lineno, text)]
    return [found for child in ast.iter_child_nodes(node) for found in strings(child)]

def is_checked(call):
    "Return True for a call of a check or a warning, whose strings are shown to a user"
    name = getattr(call.func, 'id', getattr(call.func, 'attr', ''))
    return name.startswith('check') or name=='warn'

def messages(tree):
    "Line and text of each string of an error, an assertion, a check or a warning"
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) or isinstance(node, ast.Call) and is_checked(node):
            found += strings(node)
        if isinstance(node, ast.Assert) and node.msg:
            found += strings(node.msg)
    return found

def without_names(text):
    "Blank out what stands in back-ticks"
    return re.sub(r'```.*?```|`[^`\n]*`', '``', text, flags=re.S)

def code_texts(source, place, is_exported=False):
    "Texts of a piece of Python"
    source = re.sub(r'^\s*[%!].*$', '', source, flags=re.M)
    tree = ast.parse(source)
    found = sorted({*comments(source), *docstrings(tree), *messages(tree)})
    return [Text(f'{place}:{line}', without_names(text), True, is_exported) for line,text in found]

# What is read in the project

def notebook_texts(path, project):
    "Texts of a notebook"
    found = []
    for i,cell in enumerate(json.loads(path.read_text(encoding='utf-8'))['cells']):
        source,place = ''.join(cell['source']),f'{path.relative_to(project)} cell {i}'
        if cell['cell_type']=='markdown':
            found.append(Text(place, without_names(source), False, False))
        if cell['cell_type']=='code':
            is_exported = re.search(r'^#\s*\|\s*export', source, re.M) is not None
            found += code_texts(source, place, is_exported)
    return found

def all_texts(project):
    "Texts of all notebooks, pages, tests and benchmarks of a project"
    found = []
    for path in sorted((project/'nbs').rglob('*.ipynb')):
        if '.ipynb_checkpoints' not in path.parts:
            found += notebook_texts(path, project)
    for path in sorted([*(project/'tests').glob('*.py'), *(project/'benchmarks').glob('*.py')]):
        found += code_texts(path.read_text(encoding='utf-8'), path.relative_to(project))
    for path in filter(Path.exists, (project/name for name in pages)):
        found.append(Text(path.name, without_names(path.read_text(encoding='utf-8')), False, False))
    return found

# Reports

def count_table(words, texts):
    "Lines of a table: how often each phrase stands in prose and in code, and what to say instead"
    lines = [f"{'':17} {'prose':>6} {'code':>6}"]
    for word in words:
        prose,code = (sum(word.count(t.text) for t in texts if t.is_code==kind) for kind in (False, True))
        lines.append(f'{word.phrase:17} {prose:6} {code:6}  {word.instead}')
    return lines

def faults(words, texts):
    "Places of phrases that are never right, in docstrings, comments and error messages of the package"
    never = [word for word in words if word.is_never_right]
    return [f'{t.place}: "{word.phrase}": {word.instead}'
            for t in texts if t.is_exported for word in never if word.count(t.text)]

def main(phrase=None, project=root):
    "Print the count and the faults, or the places of one phrase; return the exit status"
    words,texts = read_words(project/'tools'/'words.txt'),all_texts(project)
    if phrase is not None:
        shown = [word for word in words if word.phrase==phrase] or [Word(phrase, [], '', False)]
        print(*(f'{t.place}: {t.text[:300]}' for t in texts if shown[0].count(t.text)), sep='\n')
        return 0
    found = faults(words, texts)
    print(*count_table(words, texts), sep='\n')
    print(*found, sep='\n', file=sys.stderr)
    return 1 if found else 0

if __name__=='__main__':
    sys.exit(main(*sys.argv[1:]))
