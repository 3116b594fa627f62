"""The shape of the project: notebooks run, the staircase holds, what is generated is up to date."""
import ast, json, multiprocessing, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
notebooks = sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)

def cells(path): return [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code']

def run(*args, cwd=root, **kw):
    res = subprocess.run(args, cwd=cwd, capture_output=True, text=True, **kw)
    return res.returncode, res.stdout+res.stderr

context = multiprocessing.get_context('forkserver')                       # a server imports once what all notebooks import, and each of them runs in a fork of it
context.set_forkserver_preload(['nbdev.test', 'torch', 'fastcore.test', 'matplotlib.pyplot', 'bijdiff.codec', 'bijdiff.sampling'])       # not fastai, which changes tensors: the lower notebooks must run without it

def run_notebook(path, log):
    "Run the cells of a notebook as nbdev_test does, for exit status 0 or 1; its output goes to a file"
    with open(log, 'w') as f:
        for fd in (1, 2): os.dup2(f.fileno(), fd)
    from nbdev.config import get_config
    from nbdev.test import test_nb
    ok,_ = test_nb(path, skip_flags=get_config(path=path.parent).tst_flags.split(), basepath=root)
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(0 if ok else 1)

@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_notebook(path, tmp_path):
    "Every cell runs, but for those marked slow, cuda or network"
    p = context.Process(target=run_notebook, args=(path, tmp_path/'log'))
    p.start(); p.join(600)
    if p.is_alive(): p.kill(); p.join()
    out = (tmp_path/'log').read_text() if (tmp_path/'log').exists() else ''
    assert p.exitcode==0, f'{path.name} does not run; run it in jupyter and mend the cell that fails:\n{out[-6000:]}'

def test_a_notebook_that_fails_is_seen(tmp_path):
    shutil.copy(root/'settings.ini', tmp_path)
    (tmp_path/'nbs').mkdir()
    for name,src in dict(good='1+1', bad='assert 1+1==3', skipped='#| slow\nassert False').items():
        (tmp_path/'nbs'/f'{name}.ipynb').write_text(json.dumps(dict(cells=[dict(cell_type='code', source=[src], metadata={}, outputs=[], id=name, execution_count=None)], metadata={}, nbformat=4, nbformat_minor=5)))
    for name in ('good', 'skipped'): test_notebook(tmp_path/'nbs'/f'{name}.ipynb', tmp_path)
    with pytest.raises(AssertionError, match='bad.ipynb does not run'): test_notebook(tmp_path/'nbs'/'bad.ipynb', tmp_path)

def number(path):
    "What stands before the underscore: 04, or 04a for the second half of a split notebook"
    return path.name.split('_')[0]

def module_numbers():
    "Number of the notebook each module comes from"
    res = {}
    for p in notebooks:
        for src in cells(p):
            if m := re.search(r'^#\|\s*default_exp\s+(\S+)', src, re.M): res[m[1]] = number(p)
    return res

def imported_modules(src):
    "Modules of the package that a cell imports"
    tree = ast.parse('\n'.join(l for l in src.splitlines() if not l.lstrip().startswith(('%','!'))))
    for n in ast.walk(tree):
        if isinstance(n, ast.ImportFrom) and n.module and n.module.split('.')[0]=='bijdiff':
            yield from (n.module.split('.')[1:2] or [a.name for a in n.names])
        if isinstance(n, ast.Import): yield from (a.name.split('.')[1] for a in n.names if a.name.startswith('bijdiff.'))

def climbs(path, numbers):
    "Imports of a notebook that come from the same or a later one"
    own = [src for src in cells(path) if re.search(r'^#\|\s*export', src, re.M)]
    return [m for src in own for m in imported_modules(src) if m in numbers and numbers[m]>=number(path)]

def test_staircase():
    "A notebook imports only from notebooks with a lower number"
    numbers = module_numbers()
    assert len(numbers)>10
    bad = {p.name:c for p in notebooks if p.name[:2].isdigit() and (c := climbs(p, numbers))}
    assert not bad, f'these imports climb the staircase (the higher-numbered notebook must import the lower): {bad}'

def test_staircase_sees_a_climb(tmp_path):
    p = tmp_path/'01_low.ipynb'
    p.write_text(json.dumps(dict(cells=[dict(cell_type='code', source=['#| export\n', 'from bijdiff.high import f'])])))
    assert climbs(p, {'high':'07'})==['high']

def test_mathematics_needs_no_fastai():
    "Notebooks 00 to 14 can be used without the training loop"
    low = [m for m,n in module_numbers().items() if n<'15']
    code = f"import sys; sys.modules['fastai']=None\nfor m in {low}: __import__('bijdiff.'+m)"
    status,out = run(sys.executable, '-c', code)
    assert status==0, out

def test_readme_is_the_index():
    status,out = run(sys.executable, 'tools/make_readme.py', '--check')
    assert status==0, out

def test_modules_are_exported(tmp_path):
    "bijdiff/ is what nbdev_export makes of nbs/, tried on a copy"
    for name in ('nbs', 'bijdiff'): shutil.copytree(root/name, tmp_path/name, ignore=shutil.ignore_patterns('.ipynb_checkpoints', '__pycache__'))
    for name in ('settings.ini', '_quarto.yml'): shutil.copy(root/name, tmp_path/name)
    status,out = run('nbdev_export', cwd=tmp_path)
    texts = lambda folder: {p.name:p.read_text(encoding='utf-8') for p in sorted((folder/'bijdiff').glob('*.py'))}
    before,after = texts(root),texts(tmp_path)
    changed = [k for k in before|after if before.get(k)!=after.get(k)]
    assert status==0 and len(after)>15 and not changed, f'{changed} differ from the notebooks: edit the notebooks, run nbdev_export and commit {out}'

def test_results_that_are_quoted_exist():
    "Every result file a notebook names is there"
    named = {m for p in notebooks for m in re.findall(r'benchmarks/\w+\.jsonl?', p.read_text(encoding='utf-8'))}
    missing = [n for n in named if not (root/n).exists()]
    assert named and not missing, f'{missing} are quoted in notebooks: run the script of the same name and commit its result'
