"""Random files that are compressed under one setting and decompressed under another: how many come back.

    python benchmarks/portable_files.py

Half of the files belong to a small stack, half to a small mixture with routing, both of random weights, which
are saved and loaded, since PyTorch's normal random numbers differ between processors. One process compresses
half of the files, with random rules, contexts and streams, in portable arithmetic and in that of the machine;
another one, with the instructions of an older processor, the other half. A process for each setting
decompresses its part of both: other threads, other switches of PyTorch, or the older processor.

Writes benchmarks/results/portable_files.json."""
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
import torch
from bijdiff.console import command
from bijdiff.data.tokens import ByteTokenizer
from bijdiff.likelihood.codec import compress, decompress
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.sampling.rules import UnmaskingRule
from common import random_weights, result_path, run_record, save

NETWORKS = dict(stack={}, mixture=dict(n_experts=4, k_active=2, couple='every'))
OLD = dict(ATEN_CPU_CAPABILITY='default', ONEDNN_MAX_CPU_ISA='SSE41', MKL_ENABLE_INSTRUCTIONS='SSE4_2')
WRITERS = {},OLD # Environments of the processes that compress
SETTINGS = { # Environment of a process that decompresses, and its switches
    'the same': ({}, ()),
    'two threads': ({}, ('threads',)),
    'float64 as default type': ({}, ('dtype',)),
    'matrix products of medium precision': ({}, ('matmul',)),
    'no oneDNN': ({}, ('mkldnn',)),
    'no subnormal numbers': ({}, ('flush',)),
    'SSE4, emulated': (OLD, ()),
    'SSE4, emulated, all of these switches': (OLD, ('threads', 'dtype', 'matmul', 'mkldnn', 'flush')),
}

def turn(switches):
    "Turn switches of PyTorch"
    if 'threads' in switches: torch.set_num_threads(2)
    if 'dtype' in switches: torch.set_default_dtype(torch.float64)
    if 'matmul' in switches: torch.set_float32_matmul_precision('medium')
    if 'mkldnn' in switches: torch.backends.mkldnn.enabled = False
    if 'flush' in switches: torch.set_flush_denormal(True)

def save_networks(folder):
    "Save the networks"
    torch.manual_seed(0)
    for name,fields in NETWORKS.items():
        config = DenoiserConfig(256, seq_len=32, d_model=16, n_heads=2, n_layers=2, **fields)
        model = random_weights(BijectiveDenoiser(config), .3)
        model.tokenizer = ByteTokenizer()
        model.save_pretrained(folder/name)

def random_data(rng):
    "Return random bytes, words, or zeros, up to 100 of them"
    n = rng.randrange(101)
    words = ' '.join(rng.choice(['to', 'be', 'or', 'not', 'that', 'is']) for _ in range(n)).encode()[:n]
    return rng.choice([rng.randbytes(n), words, bytes(n)])

def random_options(rng):
    "Return random options of compress"
    return dict(rule=rng.choice(UnmaskingRule.names), steps=rng.randint(1, 4), seed=rng.randrange(100),
                context=rng.choice([0, 5, 12]), streams=rng.randint(1, 8))

def write_files(folder, n, seed, writer):
    "Compress the files of a process, one of each pair of n random files, in both arithmetics"
    models = {k:BijectiveDenoiser.from_pretrained(folder/k) for k in NETWORKS}
    for i in range(writer, n, len(WRITERS)):
        rng,name = random.Random(f'{seed} {i}'),[*NETWORKS][i//2%len(NETWORKS)]
        data,options = random_data(rng),random_options(rng)
        (folder/f'{i}.{name}').write_bytes(data)
        for kind in ('portable','fast'):
            blob = compress(models[name], data, fast=kind=='fast', **options)
            (folder/f'{i}.{name}.{kind}').write_bytes(blob)

def comes_back(model, blob, data):
    "Return True for a file that comes back"
    try: return decompress(model, blob)==data
    except ValueError: return False

def read_files(folder, first, step):
    "Return how many files of this process there are, and how many come back, by arithmetic"
    models = {k:BijectiveDenoiser.from_pretrained(folder/k) for k in NETWORKS}
    counts = Counter()
    for path in folder.glob('*.portable'):
        i,name,_ = path.name.split('.')
        if int(i)//len(WRITERS)%step!=first: continue
        data = (folder/f'{i}.{name}').read_bytes()
        counts['files'] += 1
        for kind in ('portable','fast'):
            counts[kind] += comes_back(models[name], (folder/f'{i}.{name}.{kind}').read_bytes(), data)
    return counts

def in_process(environment, **options):
    "Run this script in another process, and return what it prints"
    words = [sys.executable, __file__, *(f'--{k}={v}' for k,v in options.items())]
    return subprocess.run(words, env=os.environ|environment, stdout=subprocess.PIPE, check=True).stdout

def read_elsewhere(folder, number):
    "Return the counts of a process for a setting"
    printed = in_process([*SETTINGS.values()][number][0], folder=folder, number=number)
    return dict(setting=[*SETTINGS][number], **json.loads(printed))

@command
def portable_files(
    n:int=304, # Files
    seed:int=0, # Seed of the files
    folder:str=None, # Of another process: where the files are
    writer:int=None, # Of a process that compresses: its number
    number:int=None, # Of a process that decompresses: its setting
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Count the files that come back"
    torch.set_num_threads(1)
    if writer is not None: return write_files(Path(folder), n, seed, writer)
    if number is not None:
        turn([*SETTINGS.values()][number][1])
        print(json.dumps(read_files(Path(folder), number, len(SETTINGS))))
        return
    with tempfile.TemporaryDirectory() as d:
        save_networks(Path(d))
        def write(k): in_process(WRITERS[k], folder=d, writer=k, n=n, seed=seed)
        with ThreadPool(2) as pool:
            pool.map(write, range(len(WRITERS)))
            rows = pool.map(partial(read_elsewhere, Path(d)), range(len(SETTINGS)))
    total = {k:sum(r[k] for r in rows) for k in ('files','portable','fast')}
    print(*rows, total, sep='\n')
    save(result_path(__file__, out), dict(total=total, rows=rows) | run_record(__file__, n=n, seed=seed))

if __name__=='__main__': portable_files()
