"""Interrupt small trainings at random moments, resume them, and compare their ends bit by bit.

    python benchmarks/interruptions.py --n 6

Five trainings (accumulated gradients; float16 with an average; several fits; the command with its report;
the command in steps on a folder that it tokenises, with accumulation, an average and dropout) are interrupted
in four ways: SIGKILL, SIGTERM, Ctrl-C, and a disk that is full from a random moment on. A training is resumed
until it ends, and may be interrupted again. Each run is a fork of this process, which has imported everything
and computed nothing. The moment is drawn from the time of an uninterrupted run."""
import hashlib
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1' # Before torch is imported
import torch
from fastai.callback.all import GradientAccumulation, SaveModelCallback
from bijdiff.console import command
from bijdiff.data.corpora import pydoc_corpus
from bijdiff.data.loaders import text_dls
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.model.headers import read_header
from bijdiff.model.saving import tensors_hash, write_atomically
import bijdiff.runs # before the forks: the command imports it when it is called
from bijdiff.cli import bijdiff_train
from bijdiff.training.callbacks import EMACallback
from bijdiff.training.checkpoint import CHECKPOINT, CheckpointCallback
from bijdiff.training.learner import diffusion_learner
from common import has_row, result_path, resume, run_record, save

torch.set_num_threads(1)

SIZE = dict(d_model=8, n_heads=2, n_layers=2)
KINDS = 'SIGKILL','SIGTERM','SIGINT','full disk'
MOST_INTERRUPTIONS = 3 # Of one training

# The trainings

def learner(folder, *cbs, **config):
    "Return a small learner that writes checkpoints, and goes on from one that is there"
    dls = text_dls(pydoc_corpus()[:3000], seq_len=16, bs=16, device='cpu')
    checkpoint = CheckpointCallback(folder, resume=(folder/CHECKPOINT).exists())
    return diffusion_learner(dls, config_kwargs=SIZE|config, cbs=[checkpoint, *cbs], path=folder)

def finish(folder, learn):
    "Write what a training ends with: hashes of weights, average, gradients, optimiser, and all losses"
    state = dict(learn.model.state_dict())
    for i,(p,_,s,_) in enumerate(learn.opt.all_params()):
        state |= {f'{i} {k}':torch.as_tensor(v) for k,v in s.items()}
        if p.grad is not None: state[f'{i} grad'] = p.grad
    if hasattr(learn, 'ema'): state |= {f'average {i}':a for i,a in enumerate(learn.ema.average)}
    values = [v[:-1] for v in learn.recorder.values]                              # without the speed
    end = dict(state=tensors_hash(state), losses=learn.oscillation.losses, values=repr(values))
    write_atomically(folder, {'end.json':json.dumps(end).encode()})

def accumulated(folder):
    learn = learner(folder, GradientAccumulation(56), dropout=.1)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(8, 1e-2)
    finish(folder, learn)

def half_precision(folder):
    learn = learner(folder, GradientAccumulation(40), EMACallback(.9)).to_fp16(init_scale=2.**14)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(8, 1e-2)
    finish(folder, learn)

def several_fits(folder):
    best = SaveModelCallback('bound', fname='best')
    learn = learner(folder, EMACallback(.9), best, GradientAccumulation(40))
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(3, 1e-2)
        learn.fit(3, 3e-3)
        learn.fit_one_cycle(2, 1e-2)
    finish(folder, learn)

def whole_command(folder):
    "Train as bijdiff_train does, with its report, on the first characters of a corpus"
    text = folder.parent/'text.txt'
    if not text.exists(): text.write_text(pydoc_corpus()[:6000], encoding='utf-8')
    run_command(folder, corpus=str(text), tokenizer='char', epochs=6)

def run_command(folder, **options):
    "Call bijdiff_train, to go on with a run where there is one"
    shared = dict(seq_len=16, bs=16, lr=1e-2, store_activations=True, device='cpu', dtype='float32')
    bijdiff_train(**SIZE, **shared, **options, out=folder, resume=(folder/CHECKPOINT).exists())

def command_in_steps(folder):
    "Train as bijdiff_train does on a folder of documents, whose tokens are made in the run"
    books = folder.parent/'books'
    books.mkdir(exist_ok=True)
    for i in range(6): (books/f'{i}.txt').write_text(pydoc_corpus()[i*3000:(i+1)*3000], encoding='utf-8')
    often = dict(steps=24, eval_every=9, save_every='4')
    run_command(folder, corpus=str(books), tokenizer='bpe', vocab_size=300, cache_dir=str(folder/'cache'),
                accumulate=2, ema=.9, dropout=.1, **often)

COMMANDS = whole_command, command_in_steps
JOBS = {f.__name__:f for f in (accumulated, half_precision, several_fits, *COMMANDS)}
COMMANDS = {f.__name__ for f in COMMANDS}

def is_finished(folder, job):
    "Return True where a training has come to its end"
    if job in COMMANDS: return (folder/'model.safetensors').exists() and not (folder/CHECKPOINT).exists()
    return (folder/'end.json').exists()

def content(path):
    "Return the content of a file; the names in the header of a safetensors file are sorted, as it does not"
    data = path.read_bytes()
    if path.suffix!='.safetensors': return data
    n = 8+int.from_bytes(data[:8], 'little')
    return json.dumps(json.loads(data[8:n]), sort_keys=True).encode()+data[n:]

def end_of(folder, job):
    "Return what a training has ended with, as one hash; the command leaves a model and two pictures"
    names = ['end.json'] if job not in COMMANDS else [
        'model.safetensors', 'config.json', 'tokenizer.json', 'film_strip.png', 'training.png']
    contents = [content(folder/name) for name in names]
    return hashlib.sha256(b''.join(hashlib.sha256(c).digest() for c in contents)).hexdigest()

# Runs in forks

def fill_disk(n):
    "Let files grow to n bytes at most from now on, as on a disk with this much left"
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

def run_job(job, folder, full_after=None, left=0):
    "Run a training in this process; return its exit status, 1 after an error that is not expected"
    if full_after is not None:
        signal.signal(signal.SIGALRM, lambda *args: fill_disk(left))
        signal.setitimer(signal.ITIMER_REAL, full_after)
    try:
        with open(os.devnull, 'w') as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            warnings.simplefilter('ignore')
            JOBS[job](folder)
        return 0
    except KeyboardInterrupt as e: return getattr(e, 'status', 130)
    except BaseException as e:
        # torch.save, within SaveModelCallback, has errors of its own for a full disk
        if isinstance(e, OSError) or 'SaveModelCallback' in str(e): return 2
        traceback.print_exc()
        return 1

def start(job, folder, **kwargs):
    "Start a training in a fork; return its process id"
    folder.mkdir(parents=True, exist_ok=True)
    if pid := os.fork(): return pid
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if job not in COMMANDS: signal.signal(signal.SIGTERM, signal.default_int_handler)
    status = 1
    try: status = run_job(job, folder, **kwargs)
    finally: os._exit(status)

def wait_until(pid, deadline):
    "Wait for the end of a process; return its status, None if it still runs at the deadline"
    while time.monotonic()<deadline:
        done,status = os.waitpid(pid, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(status)
        time.sleep(.002)

def interrupt(job, folder, kind, delay, rng):
    "Run a training and interrupt it after some seconds; return its exit status"
    if kind=='full disk':
        return wait_until(start(job, folder, full_after=delay, left=rng.choice([0, 0, 1000, 20_000])), 1e12)
    pid = start(job, folder)
    status = wait_until(pid, time.monotonic()+delay)
    if status is not None: return status
    os.kill(pid, getattr(signal, kind))
    return wait_until(pid, 1e12)

def is_evaluating(folder):
    "Return True where the checkpoint was written after the last batch of a leg, before its evaluation"
    meta = json.loads(read_header(folder/CHECKPOINT, most=10**8).strings['bijdiff_checkpoint'])
    fit,at = meta['fits'][-1],meta['position']
    if not fit['steps'] or not at['batch']: return False
    steps = min(fit['eval_every'], fit['steps']-meta['done']*fit['eval_every'])
    return at['batch']==steps*fit['batches_per_step']

def phase(folder, job):
    "Say how far an interrupted training has come, by its files"
    if is_finished(folder, job): return 'finished'
    if (folder/'model.safetensors').exists(): return 'report'
    if next(folder.glob('.saving-*'), None): return 'saving'
    if (folder/CHECKPOINT).exists(): return 'evaluating' if is_evaluating(folder) else 'training'
    if job=='command_in_steps' and len([*folder.glob('cache/tokens-*/info.json')])<2: return 'tokenising'
    return 'before the first checkpoint'

def expected_status(job, kind):
    "Return the exit status of a training that was interrupted"
    if kind=='SIGTERM': return 75 if job in COMMANDS else 130
    return {'SIGKILL':-9, 'SIGINT':130, 'full disk':2}[kind]

def check_interrupted(folder, job, kind, status):
    "Check the exit status, that nothing half-written is in its place, and that a model can be loaded"
    assert status==expected_status(job, kind), (kind, status)
    if (folder/'model.safetensors').exists(): BijectiveDenoiser.from_pretrained(folder)

def trial(job, kind, seed, reference, seconds):
    "Interrupt a training at most MOST_INTERRUPTIONS times, finish it, and compare its end"
    rng = random.Random(f'{job} {kind} {seed}')
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)/'run'
        phases = []
        for _ in range(rng.randint(1, MOST_INTERRUPTIONS)):
            first,last = (0, .3) if kind=='SIGKILL' and seed%2 else (.05, 1)   # in the beginning, or anywhere
            status = interrupt(job, folder, kind, rng.uniform(first, last)*seconds, rng)
            if status==0: break
            pid = os.fork()                          # the parent never computes
            if not pid: os._exit(checked(folder, job, kind, status))
            assert wait_until(pid, 1e12)==0
            phases.append(phase(folder, job))
        while not is_finished(folder, job):
            assert wait_until(start(job, folder), 1e12)==0
        equal = end_of(folder, job)==reference
    return dict(job=job, kind=kind, seed=seed, interruptions=len(phases), phases=phases, equal=equal)

def checked(*args):
    "Return 0 where check_interrupted passes"
    try: check_interrupted(*args)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

def uninterrupted(job):
    "Return the end of a training without interruption, and its seconds; it is run twice and must repeat"
    ends,seconds = [],[]
    for _ in range(2):
        with tempfile.TemporaryDirectory() as d:
            folder,begin = Path(d)/'run',time.monotonic()
            assert wait_until(start(job, folder), 1e12)==0
            seconds.append(time.monotonic()-begin)
            ends.append(end_of(folder, job))
    assert ends[0]==ends[1], f'{job} does not repeat itself'
    return ends[0],min(seconds)

def summary(rows):
    "Count trainings, interruptions by kind and phase, and ends with other bits"
    kinds = {k:sum(r['interruptions'] for r in rows if r['kind']==k) for k in KINDS}
    phases = {}
    for p in (p for r in rows for p in r['phases']): phases[p] = phases.get(p, 0)+1
    return dict(trainings=len(rows), interruptions=sum(kinds.values()), by_kind=kinds, by_phase=phases,
                other_bits=sum(not r['equal'] for r in rows))

@command
def interruptions(
    n:int=6, # Trials of each training and each kind of interruption
    jobs:str=','.join(JOBS), # Trainings, separated by commas
    kinds:str=','.join(KINDS), # Kinds of interruption, separated by commas
    out:str=None, # JSON file for the results
):
    "Interrupt small trainings at random moments and compare their ends"
    path = result_path(__file__, out)
    rows = resume(path, {}).get('rows', [])
    for job in jobs.split(','):
        reference,seconds = uninterrupted(job)
        for seed in range(n):
            for kind in kinds.split(','):
                if has_row(rows, job=job, kind=kind, seed=seed): continue
                row = trial(job, kind, seed, reference, seconds)
                rows.append(row)
                print(json.dumps(row), flush=True)
                save(path, run_record(__file__, n=n) | dict(summary=summary(rows), rows=rows))
    print(json.dumps(summary(rows)))
    if not all(r['equal'] for r in rows): sys.exit('some trainings have ended with other bits')

if __name__=='__main__': interruptions()
