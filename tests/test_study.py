"""The scripts of benchmarks: grids of trainings that survive kills, one real training, records of runs.

Workers are real processes that are really killed; their runs only sleep and write a row (runs_job.py)."""
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
import pytest
import torch
from torch.nn.functional import rms_norm
from bijdiff.data.corpora import pydoc_corpus
from bijdiff.data.loaders import text_dls
from bijdiff.data.tokens import CharTokenizer
from bijdiff.layers.lattice import LatticeError
from bijdiff.layers.reversible import ChunkedUpdate
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent/'benchmarks'))
import common
import runs
import runs_job
import study

def config(lrs, seeds):
    "A configuration of a grid"
    return dict(lrs=lrs, seeds=seeds)

def row(name, lr, seed, bits):
    "The row of a finished run"
    return dict(name=name, lr=lr, seed=seed, bits_per_char=bits)

def keys_of(rows):
    "The keys of rows, in their order"
    return [(r['name'], r['lr'], r['seed']) for r in rows]

# Which runs are missing

AB = dict(a=config([.1, .2], [0, 1, 2]), b=config([.3], [0, 1]))
FIRST = [('a', .1, 0), ('a', .2, 0), ('b', .3, 0)]

def judge_seeds():
    "Every rate is tried with the first seed; the other seeds take the best rate"
    rows = [row(*key, bits) for key,bits in zip(FIRST, (2., 1., 3.))]
    assert runs.missing_runs(AB, [])==FIRST
    assert runs.missing_runs(AB, rows)==[('a', .2, 1), ('b', .3, 1), ('a', .2, 2)]
    bad_second_seed = row('a', .2, 1, 9.)
    assert runs.missing_runs(AB, [*rows, bad_second_seed])==[('b', .3, 1), ('a', .2, 2)]
    other_rate_is_best = [row('a', .1, 0, .5), *rows[1:], row('a', .2, 1, .1)]
    assert runs.missing_runs(AB, other_rate_is_best)[:2]==[('a', .1, 1), ('b', .3, 1)]
    others = [row('a', .2, 1, 1.), row('a', .2, 2, 1.), row('b', .3, 1, 1.)]
    assert runs.missing_runs(AB, rows+others)==[]

def judge_incomplete_rates():
    "A configuration has no further seeds while one of its rates is missing"
    for known,unknown in ((.1, .2), (.2, .1)):
        rows = [row('a', known, 0, 1.), row('b', .3, 0, 1.)]
        assert runs.missing_runs(AB, rows)==[('a', unknown, 0), ('b', .3, 1)]
    without_the_first_seed = [row('a', .1, 1, 1.), row('a', .2, 1, 1.), row('c', .1, 0, 1.)]
    assert runs.missing_runs(AB, without_the_first_seed)==FIRST

def test_rates_come_first_and_then_seeds_with_the_best_rate(): judge_seeds()
def test_incomplete_rates_schedule_no_further_seeds(): judge_incomplete_rates()

# Faults: wrong versions of a function of runs.py, with the right one as first argument

def seeds_before_all_rates(wanted, config, name, i, scores):
    "Go on with the best of those rates that are finished"
    finished = [lr for lr in config['lrs'] if (name, lr, config['seeds'][0]) in scores]
    if i==0 or not finished: return wanted(config, name, i, scores)
    return wanted(config | dict(lrs=finished), name, i, scores)

def worst_rate(wanted, config, name, i, scores):
    "Take the rate with the most bits"
    return wanted(config, name, i, {key:-bits for key,bits in scores.items()})

def a_seed_too_many(wanted, config, name, i, scores):
    "Go on after the last seed"
    return wanted(config | dict(seeds=[*config['seeds'], 9]), name, i, scores)

def missing_rates_count_as_finished(wanted, config, name, i, scores):
    "Give runs that are missing a score"
    found = wanted(config, name, i, scores)
    for lr in config['lrs']: scores.setdefault((name, lr, config['seeds'][0]), 0.)
    return found

def finished_runs_again(missing, configs, rows):
    "Do finished runs once more"
    return keys_of(rows) + missing(configs, rows)

def fewest_seeds(missing, configs, rows):
    "Stop at the number of seeds of the configuration with the fewest"
    n = min(len(c['seeds']) for c in configs.values())
    return missing({name:c | dict(seeds=c['seeds'][:n]) for name,c in configs.items()}, rows)

ORDER_FAULTS = [
    ('wanted_runs', seeds_before_all_rates),
    ('wanted_runs', worst_rate),
    ('missing_runs', finished_runs_again),
    ('wanted_runs', a_seed_too_many),
    ('wanted_runs', missing_rates_count_as_finished),
    ('missing_runs', fewest_seeds),
]

@pytest.mark.parametrize('name, fault', ORDER_FAULTS)
def test_another_order_is_seen(name, fault, monkeypatch):
    right = getattr(runs, name)
    monkeypatch.setattr(runs, name, lambda *args: fault(right, *args))
    with pytest.raises(AssertionError):
        judge_incomplete_rates()
        judge_seeds()

# The grids of the studies

def distance_to_best(lr):
    "Bits of a rate in a made-up study, where the best rate is 0.011"
    return abs(math.log(lr/.011))

def done_one_by_one(configs):
    "Keys in the order in which they are done, when each run is finished before the next begins"
    rows = []
    while todo := runs.missing_runs(configs, rows):
        assert len(set(todo))==len(todo)
        assert not set(todo)&set(keys_of(rows))
        name,lr,seed = todo[0]
        rows.append(row(name, lr, seed, distance_to_best(lr)+(seed>0)))
    return keys_of(rows)

def expected_runs(name, c):
    "Keys of a configuration: all rates with the first seed, and the best rate with the others"
    first,*others = c['seeds']
    best = min(c['lrs'], key=distance_to_best)
    return {(name, lr, first) for lr in c['lrs']} | {(name, best, seed) for seed in others}

LEARNER_KEYWORDS = {'lambda_likelihood', 'lambda_invert', 'schedule', 'T', 'objective', 'optimizer', 'moms',
                    'ema', 'wd', 'betas', 'grad_clip'}
STUDY_NAMES = sorted(p.stem for p in study.STUDIES.glob('*.json'))

@pytest.mark.parametrize('name', STUDY_NAMES)
def test_order_of_the_real_studies(name):
    "All runs are done once, those of a seed before those of the next; the configurations are valid"
    grid = study.read_grid(name)
    order = done_one_by_one(grid['configs'])
    expected = set().union(*(expected_runs(k, c) for k,c in grid['configs'].items()))
    assert set(order)==expected
    assert len(order)==len(expected)
    seeds = [seed for *_,seed in order]
    assert seeds==sorted(seeds)
    for name,c in grid['configs'].items():
        assert '/' not in name
        assert c['learner'].keys()<=LEARNER_KEYWORDS
        assert c['lrs'] and c['seeds']
        DenoiserConfig(65, grid['seq_len'], **study.config_fields(grid, c))

def test_a_rate_that_diverged_is_not_the_best():
    rows = [row('a', .1, 0, math.nan), row('a', .2, 0, 2.), row('b', .3, 0, 1.)]
    assert ('a', .2, 1) in runs.missing_runs(AB, rows)
    assert runs.best_runs(rows)['a'][0]['lr']==.2

def test_best_runs_are_those_of_the_best_rate_by_seed():
    rows = [row('a', .1, 0, 2.), row('a', .2, 0, 1.), row('a', .2, 2, 3.), row('a', .2, 1, 2.),
            row('a', .2, 3, math.nan), row('b', .3, 0, 4.)]
    best = {name:keys_of(found) for name,found in runs.best_runs(rows).items()}
    assert best==dict(a=[('a', .2, 0), ('a', .2, 1), ('a', .2, 2), ('a', .2, 3)], b=[('b', .3, 0)])

def test_table_takes_the_rates_of_the_grid(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, 'STUDIES', tmp_path)
    off_the_grid = row('a', .4, 0, .5)
    rows = [row('a', .1, 0, 2.), row('a', .2, 0, 1.), row('a', .2, 2, 3.), row('a', .2, 1, 2.),
            row('a', .2, 3, math.nan), row('b', .3, 0, 4.), off_the_grid]
    for r in rows: runs.append_row(tmp_path/'s.jsonl', r | dict(n_params=7, seconds=1.))
    grid = dict(epochs=1, lrs=[.1, .2], seeds=[0, 1, 2, 3], configs=dict(a={}, b=dict(lrs=[.3])))
    (tmp_path/'s.json').write_text(json.dumps(grid))
    study.table('s')
    a,b = capsys.readouterr().out.splitlines()
    assert '2.0000 ± 1.0000 over 3 of 4 seeds' in a
    assert '4.0000' in b and 'over 1 of 1 seeds' in b

def test_paired_takes_the_seeds_that_both_have_finished():
    a = {0:3., 1:2., 2:math.nan, 3:5.}
    b = {3:1., 1:math.nan, 0:2.5, 4:9., 2:1.}
    a,b = ([row('x', .1, seed, bits) for seed,bits in o.items()] for o in (a, b))
    assert study.paired(a, b)==[3.-2.5, 5.-1.]

# The file of rows

def judge_cut_off(file):
    "Wherever the last line breaks off, the rows before it are read and a new one is written on its own line"
    rows = [row('a', .1, seed, seed/3) for seed in range(3)]
    for r in rows: runs.append_row(file, r)
    whole = file.read_bytes()
    assert runs.read_rows(file)==rows
    assert whole.count(b'\n')==3
    start_of_last = whole.rindex(b'\n', 0, -1)+1
    for cut in range(start_of_last, len(whole)):
        file.write_bytes(whole[:cut])
        is_complete = cut==len(whole)-1 # Only the end of the line is missing
        readable = rows if is_complete else rows[:2]
        assert runs.read_rows(file)==readable
        runs.append_row(file, rows[0])
        assert runs.read_rows(file)==[*readable, rows[0]]
        written = file.read_bytes()
        assert written.startswith(whole[:cut]) and written.endswith(b'}\n')

def test_a_line_that_was_cut_off(tmp_path): judge_cut_off(tmp_path/'s.jsonl')

def test_rows_of_a_missing_and_of_an_empty_file(tmp_path):
    assert runs.read_rows(tmp_path/'missing.jsonl')==[]
    empty = tmp_path/'empty.jsonl'
    empty.touch()
    runs.append_row(empty, dict(a=1))
    assert empty.read_text()=='{"a": 1}\n'

def append_to_the_last_line(file, row):
    "Append a row without looking whether the last line is complete"
    with open(file, 'a') as f: f.write(json.dumps(row)+'\n')

def read_complete_lines_only(file):
    "Read rows, and stop with an error at a line that was cut off"
    return [json.loads(line) for line in Path(file).read_text().splitlines()]

FILE_FAULTS = [('append_row', append_to_the_last_line), ('read_rows', read_complete_lines_only)]

@pytest.mark.parametrize('name, fault', FILE_FAULTS)
def test_carelessness_with_lines_is_seen(name, fault, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, name, fault)
    with pytest.raises((AssertionError, json.JSONDecodeError)): judge_cut_off(tmp_path/'s.jsonl')

# Workers

def kill(pid):
    "Kill a process of runs_job.py by its number, if it is still there"
    try:
        if b'runs_job.py' in Path(f'/proc/{pid}/cmdline').read_bytes(): os.kill(pid, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError): pass

class Place:
    "A folder in which workers work; `end` kills the processes that were started for it"
    def __init__(self, path):
        self.path,self.file,self.processes = path,path/'s.jsonl',[]
        self.env = {**os.environ, 'TMPDIR':str(path/'tmp')} # The folder of the locks
        (path/'tmp').mkdir()

    def start(self, job, *args):
        "Start a function of runs_job.py"
        words = [sys.executable, str(HERE/'runs_job.py'), job, str(self.path), *map(json.dumps, args)]
        p = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.env)
        self.processes.append(p)
        return p

    def worker(self, configs, nap=.05, has_locks=True):
        "Start a worker, whose runs sleep for some seconds"
        return self.start('work', configs, nap, has_locks)

    def started(self):
        "Key, number of the process and number of its worker for each run, in order"
        path = self.path/'started'
        lines = path.read_text().splitlines() if path.exists() else []
        return [((name, lr, seed), pid, parent) for name,lr,seed,pid,parent in map(json.loads, lines)]

    def started_keys(self):
        "Keys of the runs that were started, in order"
        return [key for key,*_ in self.started()]

    def rows(self):
        "Rows of the runs that have ended"
        return runs.read_rows(self.file)

    def mark(self, what, key): runs_job.mark(self.path, what, *key).touch()
    def unmark(self, what, key): runs_job.mark(self.path, what, *key).unlink()

    def end(self):
        for p in self.processes:
            p.kill()
            p.wait()
        for _,pid,_ in self.started(): kill(pid)

@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path)
    yield place
    place.end()

@pytest.fixture
def same_locks(place, monkeypatch):
    "Let this process use the locks of the place"
    monkeypatch.setattr(runs.tempfile, 'tempdir', str(place.path/'tmp'))

def until(f, seconds=60):
    "Wait until a function returns something true, and return it"
    end = time.time()+seconds
    while not (value := f()):
        assert time.time()<end, f'it did not happen within {seconds} seconds'
        time.sleep(.02)
    return value

def finish(p, code=0):
    "Wait for the end of a process; return its stderr"
    _,err = p.communicate(timeout=120)
    assert p.returncode==code, err[-2000:]
    return err

def kill_and_wait(p):
    os.kill(p.pid, signal.SIGKILL)
    p.wait()

# The lock

KEY = 'a',.1,0

def start_claim(place, *hold):
    "Start a process that claims KEY; return it, and whether the run was free"
    p = place.start('claim', *hold)
    return p, p.stdout.readline()=='True\n'

def is_free(place):
    "Return True if another process can claim KEY"
    return start_claim(place)[1]

def test_one_key_one_holder(place, same_locks, monkeypatch):
    holder,is_claimed = start_claim(place, 'here')
    assert is_claimed
    assert runs.claim_run(place.file, KEY) is None
    assert not is_free(place)
    of_other_runs = [runs.claim_run(place.file, key) for key in (('a', .1, 1), ('a', .2, 0), ('b', .1, 0))]
    of_another_study = runs.claim_run(place.path/'t.jsonl', KEY)
    for lock in (*of_other_runs, of_another_study):
        assert lock is not None
        lock.close()
    kill_and_wait(holder)
    lock = runs.claim_run(place.file, KEY)
    assert lock is not None
    assert not is_free(place)
    assert runs.claim_run(place.file, KEY) is None
    monkeypatch.chdir(place.path)
    assert runs.claim_run('s.jsonl', KEY) is None # The same file by another name
    lock.close()
    assert is_free(place)

def claim_and_close(file, key):
    "Return True if a run is free"
    lock = runs.claim_run(file, key)
    if lock: lock.close()
    return lock is not None

def test_a_child_keeps_the_lock(place, same_locks):
    holder,is_claimed = start_claim(place, 'child')
    child = int(holder.stdout.readline())
    kill_and_wait(holder)
    try:
        assert is_claimed
        assert not claim_and_close(place.file, KEY)
    finally: os.kill(child, signal.SIGKILL)
    until(lambda: claim_and_close(place.file, KEY))

# The work

GRID = dict(a=config([.1, .2], [0, 1]), b=config([.3], [0, 1]))
ALL = [('a', .1, 0), ('a', .2, 0), ('b', .3, 0), ('a', .2, 1), ('b', .3, 1)]

def judge_two_workers(place, grid, keys, **kwargs):
    "Two workers at once do all runs, and each of them once"
    for p in [place.worker(grid, .3, **kwargs) for _ in range(2)]: finish(p)
    assert sorted(place.started_keys())==sorted(keys)
    assert len({parent for *_,parent in place.started()})==2
    assert set(keys_of(place.rows()))==set(keys)
    assert len(place.rows())==len(place.file.read_text().splitlines())==len(keys)

def test_two_workers_do_everything_once(place): judge_two_workers(place, GRID, ALL)

def test_work_without_locks_is_seen(place):
    with pytest.raises(AssertionError):
        judge_two_workers(place, dict(a=config([.1, .2], [0])), ALL[:2], has_locks=False)

def test_a_finished_grid_is_left_alone(place):
    grid = dict(b=config([.3], [0, 1]))
    keys = [('b', .3, 0), ('b', .3, 1)]
    finish(place.worker(grid))
    before = place.file.read_bytes()
    assert place.started_keys()==keys
    finish(place.worker(grid))
    assert place.started_keys()==keys
    assert place.file.read_bytes()==before
    grown = dict(b=config([.3], [0, 1, 2]))
    finish(place.worker(grown))
    assert place.started_keys()==[*keys, ('b', .3, 2)]
    assert place.file.read_bytes().startswith(before)

@pytest.mark.parametrize('is_cut', [False, True])
def test_killed_and_started_again(place, is_cut):
    "What is finished is not repeated; the run that was killed is, also if it was killed while it wrote"
    killed = ALL[2]
    place.mark('hold', killed)
    worker = place.worker(GRID)
    until(lambda: killed in place.started_keys())
    _,pid,_ = place.started()[-1]
    before = place.file.read_bytes()
    assert before.count(b'\n')==2
    assert place.started_keys()==ALL[:3]
    os.kill(worker.pid, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    worker.wait()
    if is_cut: place.file.write_bytes(before+b'{"name": "b", "lr": 0.3, "se')
    place.unmark('hold', killed)
    finish(place.worker(GRID))
    assert place.file.read_bytes().startswith(before)
    assert place.started_keys()==[*ALL[:3], *ALL[2:]]
    assert keys_of(place.rows())==ALL
    assert len(place.file.read_text().splitlines())==5+is_cut

def test_a_run_whose_worker_was_killed_is_not_repeated(place):
    "The next worker does what it can, and waits for the run that lives on"
    orphan = ALL[0]
    place.mark('hold', orphan)
    first = place.worker(GRID)
    until(lambda: place.started_keys()==[orphan])
    kill_and_wait(first)
    second = place.worker(GRID)
    until(lambda: len(place.rows())==3)
    without_seeds_of_a = [key for key in ALL if key[0]=='b' or key==ALL[1]] # They need its first rate
    assert place.started_keys()==[orphan, *without_seeds_of_a]
    assert orphan not in keys_of(place.rows())
    place.unmark('hold', orphan)
    finish(second)
    assert sorted(place.started_keys())==sorted(ALL)
    assert len(place.rows())==5

def test_a_run_that_fails_is_an_error(place, same_locks):
    grid = dict(a=config([.1, .2], [0]))
    place.mark('fail', ALL[1])
    assert 'CalledProcessError' in finish(place.worker(grid), 1)
    assert place.started_keys()==ALL[:2]
    assert len(place.rows())==1
    assert claim_and_close(place.file, ALL[1])
    place.unmark('fail', ALL[1])
    finish(place.worker(grid))
    assert place.started_keys()==[*ALL[:2], ALL[1]]
    assert len(place.rows())==2

def test_rows_written_at_once_do_not_mix(place):
    for p in [place.start('write', writer) for writer in 'ab']: finish(p)
    written = sorted((r['writer'], r['i']) for r in place.rows())
    assert written==[(writer, i) for writer in 'ab' for i in range(40)]

# One training

SIZES = dict(d_model=8, n_heads=2, n_layers=2, reversible=False)
TERMS = dict(lambda_likelihood=.1, lambda_invert=.1)
CONFIGS = {
    'plain':{},
    'bijective first':dict(n_bijective_layers=1),
    'standard first':dict(n_bijective_layers=1, standard_first=True),
    'terms':dict(epochs=1, lrs=[.02], learner=TERMS),
}
TINY = dict(steps=64, epochs=2, seq_len=16, bs=8, lrs=[.01, .02], seeds=[0, 1], fields=SIZES, configs=CONFIGS)
SHORT = TINY | dict(steps=12, epochs=1)
RESULTS = {'study', 'name', 'seed', 'lr', 'bits_per_char', 'se', 'error', 'n_params', 'epochs', 'seconds',
           'peak_mib', 'valid_bits_by_epoch', 'losses', 'probe_every', 'probe', 'lattice_usage', 'log_det',
           'inverse_error', 'norms', 'terms', 'last_terms', 'config', 'fields'}
RECORD = {'machine', 'threads', 'python', 'torch', 'fastai', 'bijdiff', 'command'}
TIMES = {'seconds', 'peak_mib'}

@pytest.fixture
def tiny(tmp_path, monkeypatch):
    "A folder with two studies and a text"
    monkeypatch.setattr(study, 'STUDIES', tmp_path)
    monkeypatch.setattr(ChunkedUpdate, 'min_chunk_rows', ChunkedUpdate.min_chunk_rows) # A training changes it
    (tmp_path/'tiny.json').write_text(json.dumps(TINY))
    (tmp_path/'short.json').write_text(json.dumps(SHORT))
    (tmp_path/'text.txt').write_text(pydoc_corpus()[:20_000])
    return tmp_path

@pytest.fixture
def result(tiny, capsys):
    "The row of one training by the command"
    study.study('one', 'tiny', str(tiny/'text.txt'), name='plain', lr=.02, seed=1)
    found, = runs.read_rows(tiny/'tiny.jsonl')
    return found

def tiny_data():
    "The data of TINY: text for 32 steps an epoch, a ninth more for what is held out"
    return text_dls(pydoc_corpus()[:int(64/2*16*8/.9)+1], seq_len=16, bs=8)

def train_short(folder, name, seed=0):
    "Train one configuration of SHORT"
    return study.train_one('short', folder/'text.txt', name, .02, seed)

def is_same(a, b):
    "Return True for equal values; NaN equals NaN"
    return a==b or (a!=a and b!=b)

def test_a_run_by_the_command(result):
    "The row says what was trained, how, and how well"
    r = result
    assert set(r)==RESULTS|RECORD
    assert (r['study'], *keys_of([r])[0], r['epochs'])==('tiny', 'plain', .02, 1, 2)
    assert r['fields']==SIZES
    assert r['config']==dict(epochs=2, learner={})
    dls = tiny_data()
    network = BijectiveDenoiser(DenoiserConfig(dls.tokenizer.vocab_size, 16, **SIZES))
    assert r['n_params']==sum(p.numel() for p in network.parameters())
    n_epoch = len(dls.train)
    assert 30<=n_epoch<=32
    assert len(r['losses'])==2*n_epoch
    assert sum(r['losses'][-9:])<sum(r['losses'][:9])
    assert len(r['valid_bits_by_epoch'])==2
    assert 1<r['bits_per_char']<8
    assert r['bits_per_char']==pytest.approx(r['valid_bits_by_epoch'][-1], abs=.5)
    assert r['se']>0
    arguments = 'one tiny tinyshakespeare.txt --name plain --lr 0.02 --seed 1'
    assert r['command']==f'python benchmarks/study.py {arguments}'

def test_a_run_keeps_what_callbacks_have_seen(result):
    r = result
    assert r['probe_every']==10
    assert len(r['probe'])==len(r['losses'])//10
    assert r['probe'][-1]<r['probe'][0]
    usage, = r['lattice_usage']
    assert len(usage)==2
    assert 0<max(usage)<1
    assert r['log_det']==r['inverse_error']==0
    norms, = r['norms']
    assert norms['step']==50
    assert list(norms['gradient'])==['embed', 'layer 0', 'layer 1', 'norm', 'output_head']
    assert r['terms'] is None and r['last_terms'] is None

def test_a_run_with_terms_and_again(tiny):
    "The same seed gives the same row, another one other losses; the loss is the weighted sum of its terms"
    r,of_another_seed = (train_short(tiny, 'terms', seed) for seed in (0, 1))
    runs.append_row(tiny/'again.jsonl', train_short(tiny, 'terms'))
    again, = runs.read_rows(tiny/'again.jsonl')
    assert all(is_same(again[k], r[k]) for k in RESULTS-TIMES)
    assert not set(r['losses'])&set(of_another_seed['losses'][1:])
    assert 10<=len(r['losses'])<=12
    assert len(r['probe'])==1
    assert r['epochs']==1
    assert r['config']==dict(epochs=1, learner=TERMS)
    assert sum(r['terms'].values())==pytest.approx(1)
    last = r['last_terms']
    assert list(r['terms'])==list(last)==['denoise', 'likelihood', 'invert']
    assert r['terms']['invert']==last['invert']==0
    assert r['losses'][-1]==pytest.approx(last['denoise']+.1*last['likelihood'], abs=1e-3)

def test_both_orders_of_blocks_are_trained(tiny):
    a,b = train_short(tiny, 'bijective first'),train_short(tiny, 'standard first')
    assert a['n_params']==b['n_params']
    assert b['config']['standard_first']
    assert a['losses']!=b['losses']
    assert a['losses'][0]==pytest.approx(b['losses'][0], abs=1e-3)
    assert a['lattice_usage']==b['lattice_usage']==[]
    assert math.isnan(a['log_det'])

DIT = dict(d_model=8, n_heads=2, n_layers=1, cond_dim=4)
SPECIAL = {
    'half the embedding':dict(embed_scale=.5),
    'pairs of masks':dict(mask_pairs=True),
    'a number of steps':dict(fit=dict(steps=9, eval_every=5)),
    'MDLM':dict(dit=DIT|dict(dropout=.1), fit=dict(constant_after=5), learner=dict(ema=.9)),
    'byte pairs':dict(tokenizer='bpe'),
    'twin':dict(next_token=True, n_bijective_layers=0, learner=dict(optimizer='muon')),
}

def train_special(folder, name, **common):
    "Train the network of one special configuration for a few steps"
    grid = SHORT | dict(configs={name:SPECIAL[name]}, exact=3) | common
    (folder/'short.json').write_text(json.dumps(grid))
    return train_short(folder, name)

@pytest.mark.parametrize('name', SPECIAL)
def test_special_configurations_are_trained(tiny, name):
    "Each has losses of its own; the exact likelihood is near the bound, and alone for the twin"
    plain = train_short(tiny, 'plain')
    r,again = train_special(tiny, name),train_short(tiny, name)
    assert r['losses']==again['losses']!=plain['losses']
    assert all(0<loss<9 for loss in r['losses'])
    assert 2<r['bits_per_char']<8
    assert len(r['probe'])==len(r['losses'])//10
    assert (r['lattice_usage'] is None)==(name=='MDLM')
    assert set(r['exact'])==({'exact'} if name=='twin' else {'exact', 'bound'})
    for o in r['exact'].values(): assert 0<o['se']<o['mean']/4
    for o in r['exact'].values(): assert abs(o['mean']-r['bits_per_char'])<1

def test_a_study_in_half_precision_has_other_losses(tiny):
    "Networks are trained in bfloat16 where the grid says so: near those in float32, and not the same"
    a,b = (train_special(tiny, 'half the embedding', bf16=o)['losses'] for o in (False, True))
    assert a!=b
    assert a==pytest.approx(b, abs=.1)

def test_a_study_says_how_often_the_noise_is_drawn(tiny):
    "More draws have other noise and a smaller error; the training is the same"
    few,many = (train_special(tiny, 'half the embedding', draws=n) for n in (4, 64))
    assert few['losses']==many['losses']
    assert few['bits_per_char']!=many['bits_per_char']
    assert many['se']<few['se']

def test_a_constant_rate_rises_and_stays(tiny):
    grid = study.read_grid('short')
    learn = study.make_learner(grid, grid['configs']['plain'], tiny/'text.txt', 0)
    study.fit(learn, 2, .1, constant_after=4)
    rates = learn.recorder.lrs
    n = len(rates)
    assert all(a<b for a,b in zip(rates[:4], rates[1:4]))
    assert rates[5:]==[.1]*(n-5)
    assert n>8

def test_a_training_that_leaves_the_lattice_is_a_result():
    "The other runs of a study go on; any other error stops them"
    class Learn:
        no_bar,dls = nullcontext,SimpleNamespace(device=torch.device('cpu'))
        def __init__(self, error): self.error = error
        def fit_one_cycle(self, *args): raise self.error
    left = LatticeError('an update of size 2000 leaves the lattice')
    seconds,memory,error = study.fit(Learn(left), 1, 1.)
    assert error==str(left)
    assert seconds>=0 and memory>=0
    assert all(math.isnan(v) for v in study.held_out_bits(None, error))
    other = Learn(ValueError('something else'))
    with pytest.raises(ValueError, match='something else'): study.fit(other, 1, 1.)

# Standard blocks first

def normal_weights(m, std=.3):
    "Draw all parameters from N(0, std^2) by a generator of their own"
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in m.parameters(): p.copy_(torch.randn(p.shape, generator=g)*std)
    return m

def in_order(model, blocks, xt):
    "The logits of a model with its blocks called in another order"
    h = model.state(xt)
    context = model.backbone._context(h, None, None)
    for block in blocks: h,_ = block(h, **context)
    return model.head(model.sum_streams(h))

def gradients_of(model, out):
    "Gradients of the sum of sin(out), by the name of the parameter"
    out.sin().sum().backward()
    return {name:p.grad for name,p in model.named_parameters()}

def judge_order(n_layers, n_bijective):
    "`standard_first` is the network with its blocks in that order, one after another: values and gradients"
    model = normal_weights(BijectiveDenoiser(DenoiserConfig(
        20, 16, d_model=8, n_heads=2, n_layers=n_layers, n_bijective_layers=n_bijective, reversible=True)))
    original = deepcopy(model)
    xt = torch.arange(48).view(3, 16)%20
    before = model(xt).detach()
    study.standard_first(model)
    order = [*original.backbone.blocks[n_bijective:], *original.backbone.blocks[:n_bijective]]
    kinds = [False]*(n_layers-n_bijective) + [True]*n_bijective
    assert [b.is_bijective for b in model.backbone.blocks]==kinds==[b.is_bijective for b in order]
    expected,found = in_order(original, order, xt),model(xt)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, before, atol=1e-3)
    def name_before(name):
        "The name of a parameter in the original network"
        return re.sub(r'blocks\.(\d+)', lambda m: f'blocks.{(int(m[1])+n_bijective)%n_layers}', name)
    expected,found = gradients_of(original, expected),gradients_of(model, found)
    assert len(found)==len(expected)
    for name,g in found.items():
        assert torch.allclose(g, expected[name_before(name)], rtol=1e-4, atol=1e-5), name
    assert model.backbone.n_bijective_layers==0

@pytest.mark.parametrize('n_layers, n_bijective', [(2, 1), (4, 2), (3, 1), (3, 2)])
def test_standard_first_is_the_blocks_in_that_order(n_layers, n_bijective): judge_order(n_layers, n_bijective)

def blocks_left_where_they_were(model):
    "Say that no block is bijective, and move none"
    model.backbone.n_bijective_layers = 0

def test_blocks_left_where_they_were_are_seen(monkeypatch):
    monkeypatch.setattr(study, 'standard_first', blocks_left_where_they_were)
    with pytest.raises(AssertionError): judge_order(2, 1)

# A smaller embedding

@pytest.mark.parametrize('bits', [12, 3, None])
def test_scaled_embedding(bits):
    "State = rms_norm(embedding)/4 in both streams, rounded to the lattice before and after the division"
    model = BijectiveDenoiser(DenoiserConfig(20, 16, d_model=8, n_heads=2, n_layers=1, lattice_bits=bits))
    xt = torch.arange(48).view(3, 16)%20
    e = rms_norm(model.embed(xt), (8,))
    model.entry = study.ScaledEntry(.25, bits)
    h = model.state(xt)
    step = 0 if bits is None else 2.**-bits
    assert torch.allclose(h, torch.cat([e, e], -1)/4, atol=.25*step/2+step/2+1e-6)
    if bits is not None: assert torch.equal((h*2**bits).round(), h*2**bits)
    h.sum().backward()
    assert model.embed.weight.grad[:20].any()
    assert torch.isfinite(model(xt)).all()

# What a result file records

def test_a_command_is_spelled_as_it_is_typed():
    options = dict(name='2 experts', lr=.02, seed=0, fp32=True, out=None, bf16=False)
    line = "python benchmarks/study.py one --name '2 experts' --lr 0.02 --seed 0 --fp32"
    assert common.spell_command('/x/study.py', 'one', **options)==line

def test_a_given_command_has_no_folders_of_this_machine(monkeypatch):
    paths = ['/home/me/x.py', '/data/text.txt', 'models/', '--models=/data/a,/data/b']
    monkeypatch.setattr(sys, 'argv', [*paths, '--rules', 'spread,block'])
    line = 'python benchmarks/x.py text.txt models --models=a,b --rules spread,block'
    assert common.given_command('/home/me/x.py')==line

def test_a_record_has_settings_machine_versions_and_commands():
    record = common.run_record('x.py', command='new', seed=3)
    assert set(record)=={'seed', *RECORD}
    assert record['seed']==3 and record['command']=='new' and record['threads']==torch.get_num_threads()
    record = common.run_record('x.py', command='new', old=dict(commands=['first', 'new', 'second']))
    assert record['commands']==['first', 'second', 'new']

def test_results_of_other_settings_are_not_resumed(tmp_path):
    file = tmp_path/'x.json'
    assert common.resume(file, dict(n=1))=={}
    common.save(file, dict(n=1, rows=[2]))
    assert common.resume(file, dict(n=1))==dict(n=1, rows=[2])
    with pytest.raises(ValueError, match='n is 2; expected 1 as in x.json'): common.resume(file, dict(n=2))

def test_steps_take_turns():
    order = []
    def step(name): return lambda: order.append(name) or len(order)
    seconds = common.seconds_in_turns(dict(a=step('a'), b=step('b')), 2, warmup=1)
    assert order==['a', 'b']*3
    assert seconds==dict(a=[3, 5], b=[4, 6])

def test_chunks_are_spread_over_a_text():
    tokenizer = CharTokenizer('abcdefghij')
    chunks = common.spread_chunks('abcdefghij', tokenizer, 3, 2)
    assert [tokenizer.decode(c) for c in chunks]==['ab', 'ef', 'ij']
    with pytest.raises(ValueError, match='tokens of the text is 10'):
        common.spread_chunks('abcdefghij', tokenizer, 3, 4)

# The table of benchmarks/README.md

BENCHMARKS = HERE.parent/'benchmarks'

def links_of(text):
    "Targets of the relative links of a text"
    return set(re.findall(r'\]\((?!https?:)([^)]*)\)', text))

def readme_faults(text):
    "Return links that lead nowhere, and scripts and results that the table leaves out"
    links = links_of(text)
    lost = [o for o in links if not (BENCHMARKS/o).exists()]
    files = [*BENCHMARKS.glob('*.py'), *(BENCHMARKS/'results').rglob('*.json*')]
    left_out = [o for p in files if (o := p.relative_to(BENCHMARKS).as_posix()) not in links]
    return sorted(lost+left_out)

def pages_that_quote(rows):
    "Pages by their path, with the scripts and results that rows of the table say they quote"
    found = []
    for row in rows:
        script,result,pages,*_ = row.split(' | ')
        found += [(page, links_of(script)|links_of(result)) for page in links_of(pages)]
    return found

def is_quoted(text, files):
    "Return True if a page names one of these scripts and results, a study as a string"
    return any(Path(o).name in text or f"'{Path(o).stem}'" in text for o in files)

def test_readme_leads_from_scripts_to_results_and_pages():
    text = (BENCHMARKS/'README.md').read_text(encoding='utf-8')
    assert readme_faults(text)==[]
    rows = [line for line in text.splitlines() if line.startswith('| [')]
    quotes = pages_that_quote(rows)
    assert len(rows)>20 and len(quotes)>30
    for page,files in quotes:
        is_named = is_quoted((BENCHMARKS/page).read_text(encoding='utf-8'), files)
        assert is_named, f'{page} does not name {files}'

def test_a_file_that_the_readme_leaves_out_is_seen():
    text = (BENCHMARKS/'README.md').read_text(encoding='utf-8')
    assert readme_faults(text.replace('(results/codec.json)', '(results/code.json)'))==[
        'results/code.json', 'results/codec.json']
