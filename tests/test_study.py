"""Grids of trainings that survive kills: workers are real processes that are really killed, at work on runs that only sleep and write a row. And one real training."""
import inspect, json, math, os, re, signal, subprocess, sys, time
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from bijdiff.layers.reversible import ChunkedUpdate
from bijdiff.data.corpora import pydoc_corpus
from bijdiff.data.loaders import text_dls
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser

BENCH = Path(__file__).parent.parent/'benchmarks'
sys.path.insert(0, str(BENCH))
import study

def config(lrs, seeds): return dict(lrs=lrs, seeds=seeds)
def row(n, lr, s, bits): return dict(name=n, lr=lr, seed=s, bits_per_char=bits)
AB = dict(a=config([.1, .2], [0, 1, 2]), b=config([.3], [0, 1]))

# What is missing

def test_rates_come_first_and_then_seeds_with_the_best_rate():
    first = [('a', .1, 0), ('a', .2, 0), ('b', .3, 0)]
    assert study.missing(AB, [])==first
    rows = [row(*k, bits) for k,bits in zip(first, (2., 1., 3.))]
    assert study.missing(AB, rows)==[('a', .2, 1), ('b', .3, 1), ('a', .2, 2)]
    assert study.missing(AB, rows+[row('a', .2, 1, 9.)])==[('b', .3, 1), ('a', .2, 2)]            # a bad second seed changes nothing
    assert study.missing(AB, [row('a', .1, 0, .5), *rows[1:], row('a', .2, 1, .1)])[:2]==[('a', .1, 1), ('b', .3, 1)]
    assert study.missing(AB, rows+[row('a', .2, s, 1.) for s in (1, 2)]+[row('b', .3, 1, 1.)])==[]

def judge_incomplete():
    "No further seeds while a rate is missing"
    for known in (0, 1):
        rows = [row('a', (.1, .2)[known], 0, 1.), row('b', .3, 0, 1.)]
        assert study.missing(AB, rows)==[('a', (.2, .1)[known], 0), ('b', .3, 1)]
    assert study.missing(AB, [row('a', .1, 1, 1.), row('a', .2, 1, 1.), row('c', .1, 0, 1.)])==study.missing(AB, [])
def test_incomplete_rates_schedule_no_further_seeds(): judge_incomplete()

def mutant(f, old, new):
    "A function with a line changed"
    source,there = inspect.getsource(f),{**f.__globals__}
    assert source.count(old)==1
    exec(source.replace(old, new), there)
    return there[f.__name__]
MUTANTS = [("len(grid)==len(c['lrs'])", 'grid'), ('min(grid', 'max(grid'), ('[k for k in todo if k not in bits]', 'todo'), ('i<len(c[\'seeds\'])', 'True'),
           ('(n, lr, first) in bits}', '(n, lr, first) in bits or bits.update({(n, lr, first):0.})}'), ("max(len(c['seeds']) for", "min(len(c['seeds']) for")]
@pytest.mark.parametrize('old,new', MUTANTS, ids=range(len(MUTANTS)))
def test_another_order_is_seen(old, new, monkeypatch):
    monkeypatch.setattr(study, 'missing', mutant(study.missing, old, new))
    with pytest.raises((AssertionError, IndexError)):
        judge_incomplete(); test_rates_come_first_and_then_seeds_with_the_best_rate()

def done_one_by_one(configs, bits):
    "What is done in which order, when each run is finished before the next"
    rows,order = [],[]
    while todo := study.missing(configs, rows):
        assert len(set(todo))==len(todo) and not set(todo)&set(order)
        order.append(todo[0]); rows.append(row(*todo[0], bits(*todo[0])))
    return order
@pytest.mark.parametrize('name', sorted(p.stem for p in study.STUDIES.glob('*.json')))
def test_order_of_the_real_studies(name):
    g = study.read_grid(name)
    order = done_one_by_one(g['configs'], lambda n, lr, s: abs(math.log(lr/.011))+(s>0))
    want = {(n, lr, c['seeds'][0]) for n,c in g['configs'].items() for lr in c['lrs']} | {(n, min(c['lrs'], key=lambda lr: abs(math.log(lr/.011))), s) for n,c in g['configs'].items() for s in c['seeds'][1:]}
    assert set(order)==want and len(order)==len(want) and [s for *_,s in order]==sorted(s for *_,s in order)
    for n,c in g['configs'].items():
        assert '/' not in n and c['learner'].keys()<={'lambda_likelihood', 'lambda_invert', 'schedule', 'T', 'objective'} and c['lrs'] and c['seeds']
        DenoiserConfig(65, g['seq_len'], **{**g['fields'], **{k:v for k,v in c.items() if k not in ('epochs','lrs','seeds','learner','standard_first','embed_scale')}})

def test_a_rate_that_diverged_is_not_the_best():
    rows = [row('a', .1, 0, math.nan), row('a', .2, 0, 2.), row('b', .3, 0, 1.)]
    assert ('a', .2, 1) in study.missing(AB, rows) and study.best_runs(rows)['a'][0]['lr']==.2

def test_best_runs_and_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, 'STUDIES', tmp_path)
    rows = [row('a', .1, 0, 2.), row('a', .2, 0, 1.), row('a', .2, 2, 3.), row('a', .2, 1, 2.), row('a', .2, 3, math.nan), row('b', .3, 0, 4.)]
    assert {k:[(r['lr'], r['seed']) for r in v] for k,v in study.best_runs(rows).items()}=={'a':[(.2, 0), (.2, 1), (.2, 2), (.2, 3)], 'b':[(.3, 0)]}
    for r in rows: study.append_row(tmp_path/'s.jsonl', r|dict(n_params=7, seconds=1.))
    (tmp_path/'s.json').write_text(json.dumps(dict(epochs=1, lrs=[.1, .2], seeds=[0, 1, 2, 3], configs=dict(a={}, b=dict(lrs=[.3])))))
    study.append_row(tmp_path/'s.jsonl', row('a', .4, 0, .5)|dict(n_params=7, seconds=1.))          # off the grid, so that it is not its best
    study.table('s')
    a,b = capsys.readouterr().out.splitlines()
    assert '2.0000 ± 1.0000 over 3 of 4 seeds' in a and '4.0000' in b and 'over 1 of 1 seeds' in b

def test_paired_takes_the_seeds_that_both_have_finished():
    a,b = [row('a', .1, s, v) for s,v in ((0, 3.), (1, 2.), (2, math.nan), (3, 5.))],[row('b', .1, s, v) for s,v in ((3, 1.), (1, math.nan), (0, 2.5), (4, 9.), (2, 1.))]
    assert study.paired(a, b)==[.5, 4.]

# The file of results

def judge_cut_off(file):
    rows = [row('a', .1, s, s/3) for s in range(3)]
    for r in rows: study.append_row(file, r)
    whole = file.read_bytes()
    assert study.read_rows(file)==rows and whole.count(b'\n')==3
    start = whole.rindex(b'\n', 0, -1)+1
    for cut in range(start, len(whole)):                                      # wherever the last line breaks off
        file.write_bytes(whole[:cut])
        assert study.read_rows(file)==rows[:2+(cut==len(whole)-1)]            # without its end of line a line is whole
        study.append_row(file, rows[0])
        assert study.read_rows(file)==rows[:2+(cut==len(whole)-1)]+rows[:1] and file.read_bytes().startswith(whole[:cut]) and file.read_bytes().endswith(b'}\n')
def test_a_line_that_was_cut_off(tmp_path): judge_cut_off(tmp_path/'s.jsonl')
def test_rows_of_no_file(tmp_path):
    assert study.read_rows(tmp_path/'none.jsonl')==[]
    (tmp_path/'empty.jsonl').touch()
    study.append_row(tmp_path/'empty.jsonl', dict(a=1))
    assert (tmp_path/'empty.jsonl').read_text()=='{"a": 1}\n'

FILE_FAULTS = {'no new line':('append_row', lambda file, row: open(file, 'a').write(json.dumps(row)+'\n')), 'no patience':('read_rows', lambda file: [json.loads(l) for l in Path(file).read_text().splitlines()])}
@pytest.mark.parametrize('name', FILE_FAULTS)
def test_carelessness_with_lines_is_seen(name, tmp_path, monkeypatch):
    monkeypatch.setattr(study, *FILE_FAULTS[name])
    with pytest.raises((AssertionError, json.JSONDecodeError)): judge_cut_off(tmp_path/'s.jsonl')

# Workers: processes with the functions of the script and without its heavy imports, and runs that sleep

LIGHT = f"""
import __future__, ast, os, sys, time, types
from pathlib import Path
study,file = types.ModuleType('study'),{str(BENCH/'study.py')!r}
light = lambda o: isinstance(o, ast.FunctionDef) and not o.decorator_list or isinstance(o, (ast.Import, ast.ImportFrom)) and {{a.name for a in o.names if isinstance(o, ast.Import)}} | {{getattr(o, 'module', 'os')}} <= sys.stdlib_module_names
exec(compile(ast.Module([o for o in ast.parse(Path(file).read_text()).body if light(o)], []), file, 'exec', __future__.annotations.compiler_flag), study.__dict__)
"""
RUN = LIGHT + """
folder,n,lr,s,naps = Path(sys.argv[1]),sys.argv[2],float(sys.argv[3]),int(sys.argv[4]),float(sys.argv[5])
with open(folder/'started', 'a') as f: f.write(f'{n} {lr} {s} {os.getpid()} {os.getppid()}\\n')
time.sleep(naps)
while (folder/f'hold {n} {lr} {s}').exists(): time.sleep(.02)
if (folder/f'fail {n} {lr} {s}').exists(): sys.exit(3)
study.append_row(folder/'s.jsonl', dict(name=n, lr=lr, seed=s, bits_per_char=abs(lr-.2)+s, pid=os.getpid()))
"""
WORK = LIGHT + """
folder,configs = Path(sys.argv[1]),eval(sys.argv[2])
exec(sys.argv[4])
study.work(folder/'s.jsonl', configs, lambda n, lr, s: [sys.executable, '-c', (folder/'run.py').read_text(), str(folder), n, str(lr), str(s), sys.argv[3]])
"""
CLAIM = LIGHT + """
lock = study.claim(Path(sys.argv[1])/'s.jsonl', ('a', .1, 0))
print(lock is not None, flush=True)
if lock is not None and len(sys.argv)>2:
    import subprocess
    if sys.argv[2]=='child': print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], pass_fds=[lock.fileno()]).pid, flush=True)
    time.sleep(60)
"""
class Folder:
    "A place of work; its processes are ended with it, by their number"
    def __init__(self, path):
        self.path,self.processes,self.file = path,[],path/'s.jsonl'
        (path/'run.py').write_text(RUN)
        (path/'tmp').mkdir()
    def start(self, code, *args):
        p = subprocess.Popen([sys.executable, '-c', code, str(self.path), *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, 'TMPDIR':str(self.path/'tmp')})
        self.processes.append(p)
        return p
    def worker(self, configs, naps=.05, plant=''): return self.start(WORK, repr(configs), naps, plant)
    def started(self):
        "Key, own number and that of the worker, in order"
        lines = (self.path/'started').read_text().splitlines() if (self.path/'started').exists() else []
        return [((n, float(lr), int(s)), int(pid), int(parent)) for n,lr,s,pid,parent in map(str.split, lines)]
    def keys(self): return [k for k,*_ in self.started()]
    def rows(self): return study.read_rows(self.file)
    def mark(self, what, key): (self.path/' '.join([what, *map(str, key)])).touch()
    def unmark(self, what, key): (self.path/' '.join([what, *map(str, key)])).unlink()
    def end(self):
        for p in self.processes: p.kill(); p.wait()
        for _,pid,_ in self.started(): kill(pid)
def kill(pid):
    "A run of ours, if it is still there"
    try:
        if b'started' in Path(f'/proc/{pid}/cmdline').read_bytes() or b'time.sleep(60)' in Path(f'/proc/{pid}/cmdline').read_bytes(): os.kill(pid, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError): pass
@pytest.fixture
def place(tmp_path):
    f = Folder(tmp_path)
    yield f
    f.end()
def until(f, seconds=60):
    "Wait for something to become true"
    end = time.time()+seconds
    while not (v := f()):
        assert time.time()<end, 'it did not happen'
        time.sleep(.02)
    return v
def finished(p, code=0):
    out,err = p.communicate(timeout=120)
    assert p.returncode==code, err[-2000:]
    return err

# The lock

def claimed(place, *how):
    p = place.start(CLAIM, *how)
    return p, p.stdout.readline()=='True\n'
def in_place(place, monkeypatch): monkeypatch.setattr(study.tempfile, 'tempdir', str(place.path/'tmp'))

def test_one_key_one_holder(place, monkeypatch):
    in_place(place, monkeypatch)
    key = 'a',.1,0
    p,got = claimed(place, 'hold')
    assert got and study.claim(place.file, key) is None and not claimed(place)[1]
    others = [study.claim(place.file, k) for k in (('a', .1, 1), ('a', .2, 0), ('b', .1, 0))] + [study.claim(place.path/'t.jsonl', key)]
    assert None not in others                                                 # other runs, and the same of another study
    for o in others: o.close()
    os.kill(p.pid, signal.SIGKILL); p.wait()
    lock = study.claim(place.file, key)
    assert lock is not None and not claimed(place)[1] and study.claim(place.file, key) is None
    monkeypatch.chdir(place.path)
    assert study.claim('s.jsonl', key) is None                                # the same file by another name
    lock.close()
    assert claimed(place)[1]

def test_a_child_keeps_the_lock(place, monkeypatch):
    in_place(place, monkeypatch)
    p,got = claimed(place, 'child')
    child = int(p.stdout.readline())
    os.kill(p.pid, signal.SIGKILL); p.wait()
    try: assert got and study.claim(place.file, ('a', .1, 0)) is None
    finally: os.kill(child, signal.SIGKILL)
    until(lambda: (lock := study.claim(place.file, ('a', .1, 0))) and not lock.close())

# Work

GRID = dict(a=config([.1, .2], [0, 1]), b=config([.3], [0, 1]))
ALL = [('a', .1, 0), ('a', .2, 0), ('b', .3, 0), ('a', .2, 1), ('b', .3, 1)]
def judge_two(place, grid=GRID, keys=ALL, plant=''):
    "Two workers at once do everything, and nothing twice"
    a,b = (place.worker(grid, .3, plant) for _ in range(2))
    finished(a); finished(b)
    assert sorted(place.keys())==sorted(keys) and len({parent for *_,parent in place.started()})==2
    assert {(r['name'], r['lr'], r['seed']) for r in place.rows()}==set(keys) and len(place.rows())==len(place.file.read_text().splitlines())==len(keys)
def test_two_workers_do_everything_once(place): judge_two(place)
def test_work_without_locks_is_seen(place):
    with pytest.raises(AssertionError): judge_two(place, dict(a=config([.1, .2], [0])), ALL[:2], "study.claim = lambda file, key: open(file.parent/'x', 'w')")

def test_a_finished_grid_is_left_alone(place):
    grid,keys = dict(b=config([.3], [0, 1])),[('b', .3, 0), ('b', .3, 1)]
    finished(place.worker(grid))
    before = place.file.read_bytes()
    assert place.keys()==keys
    finished(place.worker(grid))
    assert place.keys()==keys and place.file.read_bytes()==before
    finished(place.worker(dict(b=config([.3], [0, 1, 2]))))                   # a grid that has grown
    assert place.keys()==[*keys, ('b', .3, 2)] and place.file.read_bytes().startswith(before)

@pytest.mark.parametrize('cut', [False, True])
def test_killed_and_started_again(place, cut):
    stop = ALL[2]
    place.mark('hold', stop)
    p = place.worker(GRID)
    until(lambda: stop in place.keys())
    pid = place.started()[-1][1]
    before = place.file.read_bytes()
    assert before.count(b'\n')==2 and place.keys()==ALL[:3]
    os.kill(p.pid, signal.SIGKILL); os.kill(pid, signal.SIGKILL); p.wait()
    if cut: place.file.write_bytes(before+b'{"name": "b", "lr": 0.3, "se')     # killed while it wrote
    place.unmark('hold', stop)
    finished(place.worker(GRID))
    assert place.file.read_bytes().startswith(before) and place.keys()==[*ALL[:3], *ALL[2:]]
    assert [(r['name'], r['lr'], r['seed']) for r in place.rows()]==ALL and len(place.file.read_text().splitlines())==5+cut

def test_a_run_whose_worker_was_killed_is_not_done_again(place):
    first = ALL[0]
    place.mark('hold', first)
    p = place.worker(GRID)
    until(lambda: place.keys()==[first])
    os.kill(p.pid, signal.SIGKILL); p.wait()
    second = place.worker(GRID, plant='study.time.sleep = lambda s, nap=time.sleep: nap(.05)')
    until(lambda: len(place.rows())==3)                                       # does what it can: without the first rate of a no further seeds of a
    assert place.keys()==[first, *[k for k in ALL if k[0]=='b' or k==ALL[1]]] and first not in [(r['name'], r['lr'], r['seed']) for r in place.rows()]
    place.unmark('hold', first)
    finished(second)                                                          # waited for the orphan
    assert sorted(place.keys())==sorted(ALL) and len(place.rows())==5

def test_a_run_that_fails_is_an_error(place, monkeypatch):
    in_place(place, monkeypatch)
    grid = dict(a=config([.1, .2], [0]))
    place.mark('fail', ALL[1])
    assert 'CalledProcessError' in finished(place.worker(grid), 1)
    assert place.keys()==ALL[:2] and len(place.rows())==1
    study.claim(place.file, ALL[1]).close()                                   # its lock is free
    place.unmark('fail', ALL[1])
    finished(place.worker(grid))
    assert place.keys()==[*ALL[:2], ALL[1]] and len(place.rows())==2

def test_rows_written_at_once_do_not_mix(place):
    "Rows of a long run are longer than a buffer"
    code = LIGHT + "for i in range(40): study.append_row(Path(sys.argv[1])/'s.jsonl', dict(who=sys.argv[2], i=i, losses=[1.2345]*4000))"
    for p in [place.start(code, k) for k in 'ab']: finished(p)
    rows = place.rows()
    assert sorted((r['who'], r['i']) for r in rows)==[(k, i) for k in 'ab' for i in range(40)]

# One training

TINY = dict(steps=64, epochs=2, seq_len=16, bs=8, lrs=[.01, .02], seeds=[0, 1], fields=dict(d_model=8, n_heads=2, n_layers=2, reversible=False),
            configs={'plain':{}, 'front':dict(n_bijective_layers=1), 'behind':dict(n_bijective_layers=1, standard_first=True), 'terms':dict(epochs=1, lrs=[.02], learner=dict(lambda_likelihood=.1, lambda_invert=.1))})
SHORT = {**TINY, 'steps':12, 'epochs':1}
FIELDS = {'study', 'name', 'seed', 'lr', 'bits_per_char', 'se', 'error', 'n_params', 'epochs', 'seconds', 'peak_mib', 'valid_bits_by_epoch', 'losses', 'probe_every', 'probe', 'lattice_usage', 'log_det', 'inverse_error', 'norms', 'terms', 'last_terms', 'config', 'fields', 'machine', 'torch', 'fastai', 'command'}
@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(study, 'STUDIES', tmp_path)
    monkeypatch.setattr(ChunkedUpdate, 'min_chunk_rows', ChunkedUpdate.min_chunk_rows)              # run changes it
    for k,g in dict(tiny=TINY, short=SHORT).items(): (tmp_path/f'{k}.json').write_text(json.dumps(g))
    (tmp_path/'text.txt').write_text(pydoc_corpus()[:20_000])
    return tmp_path
def short(folder, name, seed=0): return study.run('short', folder/'text.txt', name, .02, seed)
def same(a, b): return all(a[k]==b[k] or a[k]!=a[k] for k in FIELDS-{'seconds', 'peak_mib'})

def test_a_run_by_the_command(tiny, capsys):
    study.main('one', 'tiny', str(tiny/'text.txt'), name='plain', lr=.02, seed=1)
    r, = study.read_rows(tiny/'tiny.jsonl')
    assert set(r)==FIELDS and (r['study'], r['name'], r['lr'], r['seed'], r['epochs'])==('tiny', 'plain', .02, 1, 2)
    per_epoch = len(r['losses'])//2
    assert len(r['losses'])==2*per_epoch and 30<=per_epoch<=32 and sum(r['losses'][-9:])<sum(r['losses'][:9])
    assert r['probe_every']==10 and len(r['probe'])==2*per_epoch//10 and r['probe'][-1]<r['probe'][0]
    assert len(r['valid_bits_by_epoch'])==2 and 1<r['bits_per_char']<8 and abs(r['bits_per_char']-r['valid_bits_by_epoch'][-1])<.5 and r['se']>0
    assert len(r['lattice_usage'][0])==2 and 0<max(r['lattice_usage'][0])<1 and r['log_det']==r['inverse_error']==0
    assert r['norms'][0]['step']==50 and list(r['norms'][0]['gradient'])==['embed', 'layer 0', 'layer 1', 'norm', 'output_head']
    assert r['terms'] is r['last_terms'] is None and r['fields']==TINY['fields'] and r['config']==dict(epochs=2, learner={})
    dls = text_dls(pydoc_corpus()[:int(64/2*16*8/.9)+1], seq_len=16, bs=8)
    assert r['n_params']==sum(p.numel() for p in BijectiveDenoiser(DenoiserConfig(dls.tokenizer.vocab_size, 16, **TINY['fields'])).parameters()) and len(dls.train)==per_epoch
    command = re.match(r"python benchmarks/study.py one tiny tinyshakespeare.txt --name '(.*)' --lr (.*) --seed (.*)$", r['command'])
    assert command.groups()==('plain', '0.02', '1')

def test_a_run_with_terms_and_again(tiny):
    r,other = (short(tiny, 'terms', seed=s) for s in (0, 1))
    study.append_row(tiny/'again.jsonl', short(tiny, 'terms'))
    assert same(study.read_rows(tiny/'again.jsonl')[0], r) and not set(r['losses'])&set(other['losses'][1:])
    assert 10<=len(r['losses'])<=12 and len(r['probe'])==1 and r['epochs']==1 and r['config']==dict(epochs=1, learner=dict(lambda_likelihood=.1, lambda_invert=.1))
    assert sum(r['terms'].values())==pytest.approx(1) and list(r['terms'])==list(r['last_terms'])==['denoise', 'likelihood', 'invert'] and r['terms']['invert']==r['last_terms']['invert']==0
    assert r['losses'][-1]==pytest.approx(r['last_terms']['denoise']+.1*r['last_terms']['likelihood'], abs=1e-3)

def test_front_and_behind_are_trained(tiny):
    a,b = short(tiny, 'front'),short(tiny, 'behind')
    assert a['n_params']==b['n_params'] and a['losses']!=b['losses'] and b['config']['standard_first'] and a['losses'][0]==pytest.approx(b['losses'][0], abs=1e-3)
    assert a['lattice_usage']==b['lattice_usage']==[] and math.isnan(a['log_det'])

# Standard blocks in front

def judge_order(kinds, n, reversible=True):
    "The network against its blocks one after another, and its gradients"
    m = BijectiveDenoiser(DenoiserConfig(20, 16, d_model=8, n_heads=2, n_layers=kinds, n_bijective_layers=n, reversible=reversible))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in m.parameters(): p.copy_(torch.randn(p.shape, generator=g)*.3)
    own,xt = deepcopy(m),torch.arange(48).view(3, 16)%20
    before = m(xt).detach()
    study.standard_first(m)
    order = [*own.backbone.blocks[n:], *own.backbone.blocks[:n]]
    assert [b.is_bijective for b in m.backbone.blocks]==[False]*(kinds-n)+[True]*n==[b.is_bijective for b in order]
    h = own.state(xt)
    context = own.backbone._context(h, None, None)
    for b in order: h,_ = b(h, **context)
    want,got = own.read(h),m(xt)
    assert torch.allclose(got, want, atol=1e-5) and (0<n<kinds)==(not torch.allclose(got, before, atol=1e-3))
    for o in (got, want): o.sin().sum().backward()
    names = {id(p):k for k,p in own.named_parameters()}
    grads = {k:p.grad for k,p in own.named_parameters()}
    place = lambda k: re.sub(r'blocks\.(\d+)', lambda i: f'blocks.{(int(i[1])+n)%kinds}', k)
    for k,p in m.named_parameters(): assert torch.allclose(p.grad, grads[place(k)], rtol=1e-4, atol=1e-5), k
    assert len(names)==len(list(m.parameters())) and m.backbone.n_bijective_layers==0
@pytest.mark.parametrize('kinds,n', [(2, 1), (4, 2), (3, 1), (3, 2)])
def test_standard_first_is_the_blocks_in_that_order(kinds, n): judge_order(kinds, n)
def test_blocks_left_where_they_were_are_seen(monkeypatch):
    monkeypatch.setattr(study, 'standard_first', lambda m: setattr(m.backbone, 'n_bijective_layers', 0))
    with pytest.raises(AssertionError): judge_order(2, 1)

# A smaller embedding

@pytest.mark.parametrize('bits', [12, 3, None])
def test_scaled_embedding(bits):
    m = BijectiveDenoiser(DenoiserConfig(20, 16, d_model=8, n_heads=2, n_layers=1, lattice_bits=bits))
    xt = torch.arange(48).view(3, 16)%20
    e = torch.nn.functional.rms_norm(m.embed(xt), (8,))
    m.entry = study.Scaled(.25, bits)
    h = m.state(xt)
    step = 0 if bits is None else .25*2.**-bits/2+2.**-bits/2                 # rounded before and after
    assert torch.allclose(h, torch.cat([e, e], -1)/4, atol=step+1e-6) and (bits is None or torch.equal((h*2**bits).round(), h*2**bits))
    h.sum().backward()
    assert m.embed.weight.grad[:20].any() and torch.isfinite(m(xt)).all()

def test_a_training_that_leaves_the_lattice_is_a_result():
    "The others of a study go on; any other error is ours and stops"
    from contextlib import nullcontext
    from bijdiff.layers.lattice import LatticeError
    class Learn:
        no_bar,dls = nullcontext,SimpleNamespace(device=torch.device('cpu'))
        def __init__(self, error): self.error = error
        def fit_one_cycle(self, *args): raise self.error
    seconds,memory,error = study.fit(Learn(LatticeError('an update of size 2000 leaves the lattice')), 1, 1.)
    assert error=='an update of size 2000 leaves the lattice' and seconds>=0 and memory>=0
    assert all(math.isnan(v) for v in study.held_out(None, error))
    with pytest.raises(ValueError, match='something else'): study.fit(Learn(ValueError('something else')), 1, 1.)
