"""Memory and speed of large corpora, measured in child processes of the command.

    python benchmarks/corpora.py memory --corpus FOLDER     # a folder with splits train and validation
    python benchmarks/corpora.py large                      # a file of 600 MB whose words are all distinct
    python benchmarks/corpora.py rate --corpus FOLDER

`memory` trains the same network on the corpus and on its first million characters, and samples the
anonymous memory (RssAnon: without pages of mapped files) of the process and its children ten times a second.
`large` does so for a generated file, and starts a second time to see how long the kept tokens take. `rate`
compares `tokenise` with `encode_batch` of the tokenizers library on the same texts with the same threads."""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
from bijdiff.checks import check_one_of
from bijdiff.console import command
from bijdiff.data.sources import open_source
from bijdiff.data.stores import tokenise
from bijdiff.data.subwords import train_tokenizer
from common import load, Param, result_path, run_record, save

VOCAB = 16_384
TRAINING = dict(
    tokenizer='bpe', vocab_size=VOCAB, seq_len=512, bs=2, steps=300, eval_every=300, eval_tokens=4096,
    d_model=64, n_heads=2, n_layers=2, dtype='float32', num_workers=0)
MB = 2**20

# Memory of a command

def children(pid):
    "Return the numbers of a process and of all processes below it"
    try: below = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    except OSError: return [pid]
    return [pid, *(o for child in below for o in children(int(child)))]

def anonymous(pid):
    "Return the anonymous memory of a process in MiB; 0 if it has ended"
    try: status = Path(f'/proc/{pid}/status').read_text()
    except OSError: return 0
    found = re.search(r'RssAnon:\s+(\d+) kB', status)
    return int(found[1])/1024 if found else 0

def phase_of(printed):
    "Return what a run that has printed this is doing"
    if '── the model' in printed: return 'report'
    return 'training' if 'tokens for training' in printed else 'data'

def watch(args, log):
    "Run a command up to its report; return peaks of memory, MiB, and times since the start, seconds"
    peaks,times,start = {},{},time.perf_counter()
    environment = os.environ | {'PYTHONUNBUFFERED':'1'}
    with open(log, 'w') as f:
        process = subprocess.Popen(args, stdout=f, stderr=subprocess.STDOUT, env=environment)
    while process.poll() is None:
        phase = phase_of(Path(log).read_text())
        times[phase] = round(time.perf_counter()-start, 1)
        if phase=='report': process.kill()
        peaks[phase] = max(peaks.get(phase, 0), sum(map(anonymous, children(process.pid))))
        time.sleep(.1)
    printed = Path(log).read_text()
    if phase_of(printed)!='report': raise SystemExit(f'status {process.returncode}: {printed[-2000:]}')
    phases = 'data','training'
    return {f'{o}_mib':round(peaks[o], 1) for o in phases} | {f'{o}_s':times[o] for o in phases}

def trained(corpus, folder, cache, **options):
    "Train on a corpus, and return peaks and times"
    shutil.rmtree(folder/'model', ignore_errors=True)
    options = TRAINING | options | dict(corpus=corpus, out=folder/'model', cache_dir=cache)
    args = [sys.executable, '-c', 'import sys; sys.argv[0]="bijdiff_train"; from bijdiff.cli import *; '
            'bijdiff_train()']
    for name,value in options.items(): args += [f'--{name}', str(value)]
    return watch(args, folder/'log.txt')

# Corpora

def distinct_words(path, n_bytes, seed=0, width=7):
    "Write a text of different words of seven letters, twelve a line"
    rng,n_letters = np.random.default_rng(seed),26
    factor,offset = 5_354_228_881,int(rng.integers(n_letters**width)) # coprime: no word comes twice
    n_words = n_bytes//(width+1)
    powers = n_letters**np.arange(width)
    with open(path, 'wb') as f:
        for first in range(0, n_words, 2**20):
            i = np.arange(first, min(first+2**20, n_words), dtype=np.uint64)
            numbers = (i*np.uint64(factor%n_letters**width)+np.uint64(offset)) % np.uint64(n_letters**width)
            letters = (numbers[:,None]//powers.astype(np.uint64))%np.uint64(n_letters)+np.uint64(97)
            ends = np.where(i%np.uint64(12)==11, 10, 32)
            f.write(np.column_stack([letters, ends]).astype(np.uint8).tobytes())

def first_million(corpus, path):
    "Write the first million characters of a corpus into a file"
    parts = islice(open_source(corpus).parts(), 10)
    Path(path).write_text(''.join(o.text for o in parts)[:10**6], encoding='utf-8', newline='')

# The measurements

def memory(corpus):
    "Peaks of memory on the corpus and on a million characters of it"
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        first_million(corpus, tmp/'small.txt')
        rows = {}
        for name,o in (('small', tmp/'small.txt'), ('corpus', corpus)):
            given = dict(valid_split='validation') if name=='corpus' else {}
            rows[name] = trained(o, tmp, tmp/'cache', **given)
            print(name, rows[name], flush=True)
    more = {k:round(rows['corpus'][k]-rows['small'][k], 1) for k in ('data_mib', 'training_mib')}
    print(f'more anonymous memory than with a million characters: {more}')
    return rows | dict(more=more)

def large(n_mb):
    "Peaks of memory on a large file of distinct words, and the time of a second start"
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        distinct_words(tmp/'large.txt', n_mb*10**6)
        rows = {}
        for name in ('first', 'second'):
            rows[name] = trained(tmp/'large.txt', tmp, tmp/'cache', steps=30, eval_every=30)
            print(name, rows[name], flush=True)
    return dict(megabytes=n_mb, **rows)

def texts_of(corpus):
    "Return all documents of a corpus"
    return [o.text for o in open_source(corpus).parts()]

def rate(corpus, turns=5):
    "Rates of tokenising, bytes per second, in turns with the library's own encoding"
    source = open_source(corpus)
    tok = train_tokenizer('bpe', source.sample(16*10**6, 0), VOCAB).with_eod()
    texts = texts_of(corpus)
    n = sum(len(o.encode()) for o in texts)
    rows = []
    for _ in range(turns):
        start = time.perf_counter()
        tok.library.encode_batch(texts)
        library = n/(time.perf_counter()-start)
        with tempfile.TemporaryDirectory() as cache:
            start = time.perf_counter()
            tokenise(source, tok, cache)
            ours = n/(time.perf_counter()-start)
        rows.append(dict(library=round(library), ours=round(ours), ratio=round(ours/library, 3)))
        print(rows[-1], flush=True)
    median = sorted(o['ratio'] for o in rows)[turns//2]
    print(f'median ratio {median}')
    return dict(turns=rows, median_ratio=median, bytes=n)

@command
def corpora(
    what:Param('memory, large or rate', str),
    corpus:Param('Folder with Parquet files in splits', str)='',
    n_mb:Param('Size of the large file in megabytes', int)=600,
    out:Param('Result file; that of this script if not given', str)=None,
):
    "Measure memory and speed of large corpora"
    check_one_of('what', what, ('memory', 'large', 'rate'))
    result = large(n_mb) if what=='large' else dict(memory=memory, rate=rate)[what](corpus)
    path = result_path(__file__, out)
    old = load(path) if path.exists() else {}
    record = run_record(__file__, old=old.get('run'), training=TRAINING)
    save(path, old | dict(run=record) | {what:result})

if __name__=='__main__': corpora()
