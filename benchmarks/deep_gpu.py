"""Largest batch and tokens per second of deep stacks on one GPU: plain, checkpointed and reversible ones.

    python benchmarks/deep_gpu.py    # at most about eight minutes; writes benchmarks/results/deep_gpu.json
    python benchmarks/deep_gpu.py --device cpu --limit .01 --d_model 32 --n_heads 4 --seq_len 64 --depths 2,4

A row takes training steps (forward and backward; weights and gradients are there, an optimiser is not) at
growing batches. Their memory is linear in the batch, which leads to the largest one that fits. A row has its
part of the time: where the largest batch would take longer, it is an estimate (null after one batch), and the
speed is that of the largest batch that was run. The file is written after every row; rows that no time is
left for say so."""
import time
import warnings
from functools import partial
from types import SimpleNamespace
import torch
from bijdiff.checks import check
from bijdiff.console import command
from common import add_row, ints, peak_bytes, release, result_path, run_record, save, timed
from stacks import build, prepare_step

EAGER = 'plain', 'checkpoint', 'bijdiff'
COMPILED = 'plain, compiled', 'bijdiff, compiled'

def free_bytes(s):
    "Return the bytes that a step may take"
    if s.limit is not None: return s.limit*2**30
    release(s.device)
    return .97*torch.cuda.mem_get_info()[0] # The rest is left for fragments

def run_step(net, s, name, batch):
    "Return memory in bytes and seconds of a training step, or None if it does not fit"
    seconds = []
    def prepare():
        step = prepare_step(net, s, name, batch)
        return lambda: seconds.append(timed(step, s.device)[1])
    try: memory = peak_bytes(prepare, s.device)
    except torch.OutOfMemoryError: return None
    finally: release(s.device)
    return (memory, seconds[0]) if s.limit is None or memory<=s.limit*2**30 else None

# Largest batch

def predict(points, available):
    "Return the largest batch that fits, by a line through the two largest that were run; None without two"
    if len(points)<2: return None
    (a,low,_),(b,high,_) = points[-2:]
    return int(b+(available-high)/max((high-low)/(b-a), 1))

def next_batch(points, too_large, available):
    "Return the batch to run next, None at the end: at most eight times the last one, and less than failed"
    last = points[-1][0] if points else 0
    predicted = predict(points, available)
    guess = last+1 if predicted is None else min(predicted, 8*last)
    if too_large: guess = min(guess, int(.95*too_large))
    return guess if guess>1.02*last else None

def search(run, available, end):
    "Run growing batches; return batch, bytes and seconds of each, and True if the last is the largest"
    points,too_large = [],None
    while batch := next_batch(points, too_large, available):
        if points and time.perf_counter()+2.5*points[-1][2]*batch/points[-1][0]>end: return points, False
        found = run(batch)
        if found: points.append((batch, *found))
        else: too_large = batch
    return points, True

def row_of(s, name, depth, end):
    "Measure a row until its largest batch is found or its time is over"
    net,weights = build(s, name, depth)
    for p in weights: p.grad = torch.zeros_like(p)
    available = free_bytes(s)
    points,is_found = search(partial(run_step, net, s, name), available, end)
    if not points: return dict(error='a batch of 1 does not fit')
    batch,_,seconds = points[-1]
    largest = batch if is_found else predict(points, available)
    return dict(weights=sum(p.numel() for p in weights), largest_batch=largest, estimated=not is_found,
                batch=batch, tokens_per_second=round(batch*s.seq_len/seconds),
                points=[[b, round(m/2**20, 1), round(t, 4)] for b,m,t in points])

# Table

def attempt(*args):
    "Return a row, or its error in one line"
    try: return row_of(*args)
    except torch.OutOfMemoryError: return dict(error='weights and gradients do not fit')
    except Exception as e: return dict(error=f'{type(e).__name__}: {e}'.splitlines()[0][:150])

def all_rows(depths, compiled_depths):
    "Return names and depths of the rows in their order"
    return [(o, d) for d in depths for o in EAGER]+[(o, d) for d in compiled_depths for o in COMPILED]

def measure(s, rows, end, write):
    "Measure rows one after another, and give each an equal part of the time that is left"
    table = []
    for i,(name,depth) in enumerate(rows):
        now = time.perf_counter()
        found = dict(error='no time left')
        if now<end: found = attempt(s, name, depth, now+(end-now)/(len(rows)-i))
        add_row(table, dict(row=name, depth=depth, **found, row_seconds=round(time.perf_counter()-now, 1)))
        write(table)
        torch.compiler.reset()
        release(s.device)

@command
def deep_gpu(
    depths:str='24,96,384', # Numbers of blocks, separated by commas
    compiled:str='24', # Numbers of blocks of compiled stacks
    seconds:float=440., # Time of all rows; the last step of a row may run over it
    d_model:int=1024, # Width of one stream
    n_heads:int=16, # Attention heads
    seq_len:int=1024, # Positions
    bf16:int=1, # 1 for autocast to bfloat16, 0 for float32
    device:str='cuda', # cuda, or cpu for a trial
    limit:float=None, # GiB of a step; the free memory of the GPU if None
    seed:int=0, # Seed of weights and input
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Measure the largest batch and the speed of deep stacks"
    end = time.perf_counter()+seconds
    settings = dict(d_model=d_model, n_heads=n_heads, seq_len=seq_len, bf16=bf16, seed=seed, limit=limit)
    check(device=='cuda' or limit is not None, 'limit', limit, f'GiB of a step on {device}')
    warnings.simplefilter('ignore')
    torch._dynamo.config.fail_on_recompile_limit_hit = True # Instead of going on uncompiled
    s = SimpleNamespace(batch=1, device=device, **settings)
    record = run_record(__file__, device, seconds=seconds, **settings)
    def write(table): save(result_path(__file__, out), dict(rows=table) | record)
    measure(s, all_rows(ints(depths), ints(compiled)), end, write)

if __name__=='__main__': deep_gpu()
