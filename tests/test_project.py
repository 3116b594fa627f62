"""The shape of the project: notebooks run, imports go down the staircase, generated files are up to date."""
import ast, io, json, os, re, shutil, subprocess, sys, tokenize
from collections import defaultdict
from configparser import ConfigParser
from functools import cache
from itertools import groupby
from pathlib import Path
import pytest, yaml
from filelock import FileLock
from IPython.core.inputtransformer2 import TransformerManager
import forks

# Folders in reading order, and what their exported cells may import. What may be imported there may be
# imported here as well. The other modules of the root may import whatever has a lower number.
folders = dict(layers=['checks'], diffusion=['checks'], data=['diffusion', 'display', 'files'],
               model=['layers', 'diffusion', 'data'], sampling=['model'], likelihood=['model', 'sampling'],
               training=['likelihood', 'pictures'])
may_be_imported = dict(folders, checks=[], display=[], files=[])
unnumbered = ['index.ipynb', 'tutorials', 'experiments']
not_loaded = dict.fromkeys(['layers', 'diffusion'], ['fastai', 'datasets', 'matplotlib', 'tokenizers'])
for place in ('checks', 'display', 'model', 'sampling', 'likelihood', 'pictures'):
    not_loaded[place] = ['fastai']
for place in ('files', 'console', 'cli'):
    not_loaded[place] = ['torch', 'numpy', 'fastai', 'datasets', 'matplotlib', 'tokenizers']
longest_module = 330

# Limits of the form
longest_line = 110
longest_function = 40
most_raises = 20    # in 1,000 lines of the package

# Notebooks and what is written in them

def all_notebooks(nbs):
    "Every notebook below a folder"
    return sorted(p for p in nbs.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)

def is_numbered(path):
    "Return True for a notebook whose name begins with a number"
    return re.match(r'\d\d_', path.name) is not None

def numbered_notebooks(nbs):
    "Numbered notebooks below a folder, in reading order"
    return sorted(filter(is_numbered, all_notebooks(nbs)), key=lambda p: p.name)

def module_name(path, nbs):
    "Module of a numbered notebook: `layers.block` for `layers/09_block.ipynb`"
    return '.'.join([*path.relative_to(nbs).parent.parts, path.stem[3:]])

def module_numbers(nbs):
    "Number of each module, in reading order"
    return {module_name(p, nbs): int(p.name[:2]) for p in numbered_notebooks(nbs)}

def sources(path, kinds=('code',)):
    "Text of each cell of a notebook"
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [''.join(c['source']) for c in cells if c['cell_type'] in kinds]

def is_exported(src):
    "Return True for a cell that goes into a module"
    return re.search(r'^\s*#\s*\|\s*export', src, re.M) is not None

def write_notebook(path, *cells):
    "Write a notebook with these code cells, and the folders above it"
    path.parent.mkdir(parents=True, exist_ok=True)
    rest = dict(cell_type='code', metadata={}, outputs=[], execution_count=None)
    written = [dict(rest, id=f'cell{i}', source=[src]) for i,src in enumerate(cells)]
    path.write_text(json.dumps(dict(cells=written, metadata={}, nbformat=4, nbformat_minor=5)))
    return path

def run(*args, cwd=None):
    "Exit status and output of a command, in the root of the project or in another folder"
    res = subprocess.run(args, cwd=cwd or root, capture_output=True, text=True)
    return res.returncode, res.stdout+res.stderr

root = Path(__file__).resolve().parent.parent
nbs = root/'nbs'
notebooks = all_notebooks(nbs)
numbers = module_numbers(nbs)
settings = ConfigParser(delimiters=['='], interpolation=None)
settings.read(root/'settings.ini', encoding='utf-8')
settings = settings['DEFAULT']
notebook_job = Path(__file__).with_name('notebook_job.py')

# Notebooks run, each in a fork of a server that has imported what most of them need. fastai changes tensors:
# notebooks that do not begin with it run without it.

@cache
def modules_with_fastai():
    "Modules of the package that import fastai, themselves or through others"
    found = set()
    for path in numbered_notebooks(nbs):
        if any(imports_fastai(src, found) for src in sources(path) if is_exported(src)):
            found.add(module_name(path, nbs))
    return found

def imports_fastai(src, with_fastai):
    "Return True if a cell imports fastai, or a module that does"
    is_direct = re.search(r'^(?:from|import)\b.*\bfastai\b', src, re.M)
    return bool(is_direct) or not with_fastai.isdisjoint(imported_modules(src, numbers))

def begins_with_fastai(path):
    "Return True if the first imports of a notebook import fastai"
    importing = [src for src in sources(path) if re.search(r'^(?:from|import)\b', src, re.M)]
    return any(imports_fastai(src, modules_with_fastai()) for src in importing[:1])

@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.relative_to(nbs).with_suffix('').as_posix())
def test_notebook(path):
    "Every cell runs, but for those marked slow, cuda or network"
    name = 'all' if begins_with_fastai(path) else 'lower'
    status,out,err = forks.run([notebook_job, path, *settings['tst_flags'].split()], timeout=600, name=name)
    advice = f'{path.name} does not run; run it in jupyter and mend the cell that fails:\n{(out+err)[-6000:]}'
    assert status==0, advice

def test_a_notebook_that_fails_is_seen(tmp_path):
    folder = tmp_path/'nbs'/'layers'
    for src in ('1+1', '#| slow\nassert False', 'import os\nassert os.path.exists("good.ipynb")'):
        test_notebook(write_notebook(folder/'good.ipynb', src))
    with pytest.raises(AssertionError, match='bad.ipynb does not run'):
        test_notebook(write_notebook(folder/'bad.ipynb', '1+1', 'assert 1+1==3'))

# Folders, numbers and modules agree

def target_fault(path, nbs):
    "Reason why the name and the export target of a notebook do not fit its folder, or None"
    directive = r'^\s*#\s*\|\s*(?:default_exp|export[is]?)[ \t]+(\S+)'
    targets = set(re.findall(directive, '\n'.join(sources(path)), re.M))
    if path.relative_to(nbs).parts[0] in unnumbered:
        exports = targets or any(map(is_exported, sources(path)))
        return 'must have no number and export nothing' if exports or is_numbered(path) else None
    if not is_numbered(path):
        return 'must begin with a number of two digits'
    expected = module_name(path, nbs)
    return None if targets=={expected} else f'must export to {expected} alone'

def layout_faults(nbs):
    "Faults of the names, the targets and the order of the notebooks below a folder"
    found = [f'{p.relative_to(nbs)} {fault}' for p in all_notebooks(nbs) if (fault := target_fault(p, nbs))]
    in_order = numbered_notebooks(nbs)
    if len({p.name[:2] for p in in_order})<len(in_order):
        found.append('two notebooks have the same number')
    visited = [folder.relative_to(nbs).as_posix() for folder,_ in groupby(p.parent for p in in_order)]
    if [o for o in visited if o!='.']!=list(folders):
        found.append(f'read by number, the folders come as {visited}; expected {list(folders)}')
    return found

def test_notebooks_stand_in_reading_order_and_export_their_own_module():
    assert len(numbers)>10
    assert not layout_faults(nbs)

@pytest.mark.parametrize('name, target, fault', [
    ('layers/11_b', None, 'must export to layers.b'), ('layers/11_b', 'b', 'must export to layers.b'),
    ('layers/b', 'layers.b', 'must begin with a number'), ('tutorials/b', 'b', 'export nothing'),
    ('layers/10_b', 'layers.b', 'the same number'), ('layers/25_b', 'layers.b', 'read by number'),
    ('other/99_b', 'other.b', 'read by number')])
def test_a_notebook_in_the_wrong_place_is_seen(tmp_path, name, target, fault):
    for i,folder in enumerate(folders, 1):
        write_notebook(tmp_path/folder/f'{i}0_a.ipynb', f'#| default_exp {folder}.a')
    assert not layout_faults(tmp_path)
    write_notebook(tmp_path/f'{name}.ipynb', f'#| default_exp {target}' if target else '1+1')
    assert fault in layout_faults(tmp_path)[0]

# The staircase

def imported_modules(src, known):
    "Modules of the package that a cell imports, without `bijdiff.`"
    names = []
    for node in ast.walk(ast.parse(TransformerManager().transform_cell(src))):
        if isinstance(node, ast.Import):
            names += [a.name for a in node.names]
        if isinstance(node, ast.ImportFrom) and node.module:
            is_module = node.module.removeprefix('bijdiff.') in known
            names += [node.module] if is_module else [f'{node.module}.{a.name}' for a in node.names]
    ours = [n for n in names if n.startswith('bijdiff.') and n!='bijdiff.__version__']
    return [n.removeprefix('bijdiff.') for n in ours]

def may_import(place, other):
    "Return True where a folder, or a module of the root, may import from another"
    if place==other or place not in may_be_imported:
        return True
    return any(may_import(o, other) for o in may_be_imported[place])

def import_fault(module, other, in_module, known):
    "Reason why the notebook of a module may not import another, in the module or in a test, or None"
    place,source = module.split('.')[0],other.split('.')[0]
    if other not in known:
        return 'there is no such module'
    if not in_module:
        is_allowed = other=='testing' or known[other]<=known[module]
        return None if is_allowed else 'of higher numbers, tests may import testing alone'
    if known[other]>=known[module]:
        return 'its number is not lower'
    return None if may_import(place, source) else f'{place} may not import from {source}'

def forbidden_imports(nbs):
    "Imports of the numbered notebooks below a folder that the staircase does not allow"
    known = module_numbers(nbs)
    found = []
    for path in numbered_notebooks(nbs):
        for src in sources(path):
            for other in imported_modules(src, known):
                if fault := import_fault(module_name(path, nbs), other, is_exported(src), known):
                    found.append(f'{path.relative_to(nbs)} imports {other}: {fault}')
    return found

def test_staircase():
    "A module imports from lower numbers alone, and from the folders its own may import"
    assert not forbidden_imports(nbs)

@pytest.fixture
def small_tree(tmp_path):
    "Folder of notebooks that import nothing; data and likelihood have lower numbers than they should"
    for name in ('00_checks', 'data/04_tokens', 'layers/05_norm', 'layers/06_block', 'likelihood/07_bounds',
                 'sampling/08_rules', 'likelihood/09_codec', '29_display', '91_testing', '99_all'):
        write_notebook(tmp_path/f'{name}.ipynb', '1+1')
    return tmp_path

@pytest.mark.parametrize('name, src, fault', [
    ('layers/05_norm', 'from bijdiff.layers.block import *', 'layers.block: its number'),
    ('layers/05_norm', 'from bijdiff.layers.norm import f', 'layers.norm: its number'),
    ('layers/05_norm', 'from bijdiff.layers import block', 'layers.block: its number'),
    ('layers/05_norm', 'import torch, bijdiff.layers.block as b', 'layers.block: its number'),
    ('layers/05_norm', 'from bijdiff import checks, all', 'all: its number'),
    ('layers/05_norm', 'def f():\n    if 1: import bijdiff.layers.block', 'layers.block: its number'),
    ('layers/05_norm', '%matplotlib inline\nfrom bijdiff.testing import f', 'testing: its number'),
    ('layers/06_block', 'from bijdiff.data.tokens import f', 'data.tokens: layers may not import from data'),
    ('layers/06_block', 'def f():\n    from bijdiff.data import tokens', 'data.tokens: layers may not'),
    ('sampling/08_rules', 'from bijdiff.likelihood.bounds import f', 'likelihood.bounds: sampling may not'),
    ('sampling/08_rules', 'from bijdiff.likelihood.codec import f', 'likelihood.codec: its number'),
    ('29_display', 'from bijdiff.checks import f', 'checks: display may not'),
    ('99_all', 'from bijdiff.norm import f', 'norm.f: there is no such module'),
    ('99_all', 'import bijdiff.layers', 'layers: there is no such module')])
def test_staircase_sees_a_climb(small_tree, name, src, fault):
    write_notebook(small_tree/f'{name}.ipynb', '2+2', f'#| export\n{src}')
    found, = forbidden_imports(small_tree)
    assert found.startswith(f'{name}.ipynb imports {fault}')

def test_what_stands_below_may_be_imported(small_tree):
    below = 'from bijdiff.checks import f\nfrom bijdiff.layers import norm, block\nimport bijdiff.data.tokens'
    for name in ('sampling/08_rules', 'likelihood/09_codec', '99_all'):
        write_notebook(small_tree/f'{name}.ipynb', f'#| export\n{below}\nfrom bijdiff import __version__')
    assert not forbidden_imports(small_tree)

def test_tests_may_climb_to_testing_alone(small_tree):
    path = small_tree/'layers'/'05_norm.ipynb'
    write_notebook(path, 'from bijdiff.testing import f\nfrom bijdiff.layers.norm import g')
    assert not forbidden_imports(small_tree)
    write_notebook(path, '#| hide\nfrom bijdiff.all import *')
    found, = forbidden_imports(small_tree)
    assert found.endswith('imports all: of higher numbers, tests may import testing alone')

# What is loaded with a folder

probe = """
import importlib, json, sys
modules, watched, blocked = json.loads(sys.argv[1])
sys.modules.update(dict.fromkeys(blocked))
found = {}
for module in modules:
    importlib.import_module('bijdiff.'+module)
    for package in set(watched)&set(sys.modules):
        found.setdefault(package, module+' loads '+package)
sys.exit(', '.join(found.values()) or 0)
"""

def import_in_order(modules, watched=(), blocked=(), cwd=None):
    "Import modules in a new process: 0, or 1 and the module that loads a watched or needs a blocked package"
    return run(sys.executable, '-c', probe, json.dumps([modules, list(watched), list(blocked)]), cwd=cwd)

def modules_of(place):
    "Modules of a folder in reading order, or the one module of the root with this name"
    return [m for m in numbers if m.split('.')[0]==place]

@pytest.mark.parametrize('place', not_loaded)
def test_a_folder_loads_only_what_it_is_about(place):
    "The network loads no fastai, layers and noise load no texts and pictures, commands load no PyTorch"
    modules = modules_of(place)
    status,out = import_in_order(modules, watched=not_loaded[place])
    assert modules and status==0, out

def test_layers_need_torch_and_fastcore_alone():
    required = {re.match(r'[\w-]+', o)[0].replace('-', '_') for o in settings['requirements'].split()}
    assert {'torch', 'fastcore'}<required
    status,out = import_in_order(modules_of('layers'), blocked=required-{'torch', 'fastcore'})
    assert status==0, out

def test_a_package_that_is_loaded_is_seen(tmp_path):
    layers = tmp_path/'bijdiff'/'layers'
    layers.mkdir(parents=True)
    (tmp_path/'bijdiff'/'__init__.py').touch()
    for name,src in dict(norm='', block='import fastai', moe='import fastai').items():
        (layers/f'{name}.py').write_text(src)
    modules = ['layers.norm', 'layers.block', 'layers.moe']
    seen = import_in_order(modules, watched=['datasets', 'fastai'], cwd=tmp_path)
    assert seen==(1, 'layers.block loads fastai\n')
    status,out = import_in_order(modules, blocked=['fastai'], cwd=tmp_path)
    assert status==1 and 'block.py' in out and 'import of fastai halted' in out

# The package is what the notebooks say

def module_texts(package):
    "Text of each module, by its path in the package"
    return {p.relative_to(package).as_posix(): p.read_text(encoding='utf-8') for p in package.rglob('*.py')}

def differences(package, other):
    "Modules that two copies of the package do not share"
    texts,others = module_texts(package),module_texts(other)
    return sorted(k for k in texts|others if texts.get(k)!=others.get(k))

@pytest.fixture(scope='session')
def exported(tmp_path_factory):
    "Package that nbdev_export makes of the notebooks in an empty folder; made once for all workers"
    base = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        base = base.parent
    tree = base/'exported'
    with FileLock(base/'exported.lock'):
        if not tree.exists():
            shutil.copytree(nbs, tree/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
            for name in ('settings.ini', '_quarto.yml'):
                shutil.copy(root/name, tree)
            (tree/'log').write_text(json.dumps(run('nbdev_export', cwd=tree)))
    status,out = json.loads((tree/'log').read_text())
    assert status==0, f'nbdev_export stopped; mend the notebook it names: {out}'
    return tree/'bijdiff'

def test_modules_are_exported(exported):
    "bijdiff/ is what nbdev_export makes of nbs/: nothing older, nothing less"
    assert len(module_texts(exported))>15
    changed = differences(root/'bijdiff', exported)
    assert not changed, f'{changed} differ from the notebooks: edit these, nbdev_export, commit the result'

def test_a_stale_a_changed_and_a_missing_module_are_seen(exported, tmp_path):
    package = shutil.copytree(exported, tmp_path/'bijdiff')
    changed,missing,*_ = (m.replace('.', '/')+'.py' for m in modules_of('layers'))
    steps = {'coupling.py': lambda p: p.touch(), changed: lambda p: p.write_text('1'),
             missing: Path.unlink, 'layers/__init__.py': Path.unlink}
    for i,(name,alter) in enumerate(steps.items()):
        assert differences(package, exported)==sorted([*steps][:i])
        alter(package/name)
    assert differences(package, exported)==sorted(steps)

def test_no_old_flat_module_is_left():
    "At the top of the package stand the modules of notebooks at the top alone"
    flat = {p.stem for p in (root/'bijdiff').glob('*.py')}
    assert flat=={'__init__', '_modidx', *(m for m in numbers if '.' not in m)}

# The form of the code

modules = {k: v for k,v in module_texts(root/'bijdiff').items() if k!='_modidx.py'}

def test_no_module_is_too_long():
    lines = {k: len(v.splitlines()) for k,v in modules.items()}
    long = {k: n for k,n in lines.items() if n>longest_module}
    assert not long, f'{long} have more than {longest_module} lines: split their notebooks'

def without_magics(src):
    "Blank out lines that are not Python: %magics, !commands, and the list that nbdev makes of public names"
    src = re.sub(r'^\s*[%!].*$', '', src, flags=re.M)
    return re.sub(r'^__all__ = \[.*?\]$', lambda m: '\n'*m[0].count('\n'), src, flags=re.M|re.S)

def tokens(src):
    "Tokens of a piece of Python"
    return list(tokenize.generate_tokens(io.StringIO(without_magics(src)).readline))

def string_widths(src):
    "Columns of each string that stands on one line, by line"
    widths,begin,depth = defaultdict(list),None,0
    for token in tokens(src):
        kind = tokenize.tok_name[token.type]
        if kind in ('STRING', 'FSTRING_START') and depth==0:
            begin = token.start
        depth += (kind=='FSTRING_START')-(kind=='FSTRING_END')  # several tokens from 3.12 on
        if kind in ('STRING', 'FSTRING_END') and depth==0 and begin[0]==token.end[0]:
            widths[begin[0]].append(token.end[1]-begin[1])
    return widths

def long_lines(src):
    "Lines that are too long, unless a single string is: it could not be broken off"
    widths = string_widths(src)
    for n,line in enumerate(without_magics(src).splitlines(), 1):
        indent = len(line)-len(line.lstrip())
        is_string = any(indent+w>longest_line>=len(line)-w for w in widths[n])
        is_option = line.startswith('#|')
        if len(line)>longest_line and not is_string and not is_option:
            yield f'line {n} has {len(line)} columns'

def joined_statements(src):
    "Lines with a semicolon between statements; one at the end hides the output of a cell"
    found = tokens(src)
    for token,after in zip(found, found[1:]):
        if token.string==';' and after.type not in (tokenize.NEWLINE, tokenize.COMMENT):
            yield f'line {token.start[0]} has several statements'

def long_functions(src):
    "Functions that are too long"
    for node in ast.walk(ast.parse(src)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            n = node.end_lineno-node.lineno+1
            if n>longest_function:
                yield f'{node.name} has {n} lines'

def count_raises(src):
    "Count raise statements"
    return sum(isinstance(node, ast.Raise) for node in ast.walk(ast.parse(src)))

def code_of_project():
    "Every piece of Python by its place: code cells, modules, tests, benchmarks, tools, setup.py"
    found = {f'bijdiff/{k}': v for k,v in modules.items()}
    for path in notebooks:
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        code = {i: ''.join(c['source']) for i,c in enumerate(cells) if c['cell_type']=='code'}
        found |= {f'{path.relative_to(root)} cell {i}': src for i,src in code.items()}
    scripts = [path for folder in ('tests', 'benchmarks', 'tools') for path in (root/folder).glob('*.py')]
    for path in sorted([*scripts, root/'setup.py']):
        found[path.relative_to(root).as_posix()] = path.read_text(encoding='utf-8')
    return found

def faults_of(check, code):
    "Faults that a check finds in pieces of Python, each with its place"
    return [f'{place}: {fault}' for place,src in code.items() for fault in check(src)]

@pytest.mark.parametrize('check, advice', [
    (long_lines, f'break lines after {longest_line} columns'),
    (joined_statements, 'write one statement a line')])
def test_form_of_all_code(check, advice):
    found = faults_of(check, code_of_project())
    assert not found, '\n'.join([f'{len(found)} faults; {advice}', *found])

def test_functions_of_the_package_are_short():
    found = faults_of(long_functions, modules)
    assert not found, '\n'.join([f'{len(found)} functions have more than {longest_function} lines', *found])

def test_the_package_checks_in_one_place():
    "At most 20 `raise` in 1,000 lines; bijdiff.checks raises for the others"
    lines = sum(len(src.splitlines()) for src in modules.values())
    raises = {k: n for k,src in modules.items() if (n := count_raises(src))}
    allowed = most_raises*lines//1000
    most = dict(sorted(raises.items(), key=lambda o: -o[1])[:8])
    total = sum(raises.values())
    assert total<=allowed, f'{total} raise in {lines} lines, {allowed} allowed; use bijdiff.checks: {most}'

prose = "'" + 'x'*longest_line + "'"

@pytest.mark.parametrize('check, right, wrong', [
    (long_lines, 'x'*longest_line, 'x'*longest_line+'y'),
    (long_lines, f'f({prose})', f'f({prose[2:-50]!r}, {prose[-50:-1]!r})'),
    (long_lines, f'def f():\n    return f{prose}', f'def f():\n    return 1{prose}  # {"y"*longest_line}'),
    (long_lines, f'#| fig-alt: {prose}', f'# {prose}'),
    (long_lines, f'__all__ = ["a",\n{" "*longest_line}"b"]', f'names = ["a",\n{" "*longest_line}"b"]'),
    (joined_statements, 'f();', 'f(); g()'),
    (joined_statements, "f(';') # ; ;", 'if x: f(); g()'),
    (long_functions, 'def f():' + '\n    1'*39, 'def f():' + '\n    1'*40)])
def test_faults_of_the_form_are_seen(check, right, wrong):
    assert not [*check(right)] and len([*check(wrong)])==1

def test_every_raise_counts():
    assert count_raises('def f():\n    if x: raise ValueError("raise")\n    raise\n# raise')==2

# The words

def count_words(folder):
    "Exit status and output of tools/count_words.py in a folder with these tools"
    return run(sys.executable, str(folder/'tools'/'count_words.py'), cwd=folder)

def test_no_phrase_that_is_never_right_stands_in_the_package():
    status,out = count_words(root)
    assert status==0, out

@pytest.mark.parametrize('src', [
    '#| export\ndef f():\n    "Return a portion"',
    '#| export\ndef f(\n    x, # Portions of x\n): ...',
    '#| exports\nx = 1 # one of\n# two\n# portions',
    '#| export\nif x: raise ValueError(f"{x} in front  of {y}")',
    '#| export\ncheck(x, "n", n, "what is no portion")',
    '#| export\n# this is no mask, and there is no other',
    '#| export\n@patch\nclass A:\n    "A network pass"'])
def test_a_phrase_that_is_never_right_is_seen(tmp_path, src):
    shutil.copytree(root/'tools', tmp_path/'tools')
    exported = '#| export\nportion = f("portion") # `portion`, there is no other'
    harmless = exported, '# a portion', '%portion\n1'
    path = write_notebook(tmp_path/'nbs'/'01_a.ipynb', *harmless)
    status,out = count_words(tmp_path)
    assert status==0 and re.search(r'portion\* +0 +1 ', out), out
    write_notebook(path, *harmless, src)
    status,out = count_words(tmp_path)
    assert status==1 and 'nbs/01_a.ipynb cell 3:' in out, out

# The files beside the package

def test_scripts_are_valid_and_the_workflow_runs_them():
    for path in ('.ci/run', *(p.relative_to(root) for p in (root/'tools').glob('*.sh'))):
        assert run('bash', '-n', str(path))==(0, '')
    workflow = yaml.safe_load((root/'.github'/'workflows'/'test.yml').read_text(encoding='utf-8'))
    assert any(step.get('run')=='.ci/run' for step in workflow['jobs']['test']['steps'])

def test_the_citation_agrees_with_the_settings():
    citation = yaml.safe_load((root/'CITATION.cff').read_text(encoding='utf-8'))
    assert citation['version']==settings['version'] and citation['repository-code']==settings['git_url']
    assert [author['name'] for author in citation['authors']]==[settings['author']]

# What the texts refer to

def test_readme_is_the_index():
    status,out = run(sys.executable, 'tools/make_readme.py', '--check')
    assert status==0, out

def quoted_results(text):
    "Result files that a text names, from the root of the project"
    return set(re.findall(r'benchmarks/(?:[\w-]+/)*[\w-]+\.jsonl?\b', text))

def test_results_that_are_quoted_exist():
    "Every result file a notebook names is there"
    quoted = quoted_results('`benchmarks/studies/a.jsonl`, benchmarks/b.json. benchmarks/c.py')
    assert quoted=={'benchmarks/studies/a.jsonl', 'benchmarks/b.json'}
    named = set().union(*(quoted_results(p.read_text(encoding='utf-8')) for p in notebooks))
    missing = sorted(n for n in named if not (root/n).exists())
    assert named and not missing, f'{missing} are quoted in notebooks: run the script, commit its result'

def lost_paths(path, base):
    "Paths written with `../`, or opened, that do not lead from the folder of a notebook into benchmarks"
    pattern = r"""(?:(?:Path|open)\(f?['"]|(?=\.\./))((?:\.\./)*benchmarks[\w./-]*)"""
    written = re.findall(pattern, '\n'.join(sources(path, ['code', 'markdown'])))
    found = {o: (path.parent/o.rstrip('.')).resolve() for o in written}
    return [k for k,v in found.items() if not (v.exists() and v.is_relative_to(base/'benchmarks'))]

def test_paths_to_benchmarks_lead_there():
    "Notebooks find results from their own folder, which is their working directory"
    lost = {p.name: found for p in notebooks if (found := lost_paths(p, root))}
    assert not lost, f'{lost} do not exist, seen from the folder of the notebook'

def test_a_path_that_leads_elsewhere_is_seen(tmp_path):
    results = tmp_path/'benchmarks'/'studies'
    results.mkdir(parents=True)
    (results/'a.jsonl').touch()
    right = "f'../../benchmarks/{x}.json', '../../benchmarks/studies/a.jsonl', 'python benchmarks/b.py'"
    wrong = "Path('../benchmarks/studies/a.jsonl'), open('benchmarks/a'), '../../benchmarks/b.json'"
    path = write_notebook(tmp_path/'nbs'/'layers'/'01_a.ipynb', right, wrong)
    expected = ['../benchmarks/studies/a.jsonl', 'benchmarks/a', '../../benchmarks/b.json']
    assert lost_paths(path, tmp_path)==expected
