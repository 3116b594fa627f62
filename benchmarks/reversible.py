"""Training memory, step time and exactness of reversible stacks, of this package and of others.

    python benchmarks/reversible.py                # writes benchmarks/results/reversible.json
    python benchmarks/reversible.py --preset gpu   # one GPU; also the largest batches; reversible_gpu.json

Compared are the stacks of stacks.py: of this package, with stored activations, with checkpointing and of four
other packages, which are optional.

Memory: most bytes that tensors hold during forward and backward, above what they hold before it, when
weights, their gradients and the input are there. Time: the networks of one depth take turns step by step;
ratios are quartiles over the turns, with the median in the middle."""
import math
import statistics
import warnings
from functools import partial
from types import SimpleNamespace
import torch
from bijdiff.checks import check_one_of
from bijdiff.console import command
from common import add_row, check_peak, ints, peak_bytes, ratio, release, result_path, run_record, save
from common import seconds_in_turns, spell_command, timed_step
from stacks import build, KINDS, make_input, NotInstalled, prepare_step, state, train_step, version

ALL_ROWS = ('plain;checkpoint;bijdiff;plain, compiled;bijdiff, compiled;'
            'plain streams;revtorch;reformer-pytorch;memcnn;revlib')
PRESETS = dict(
    cpu=dict(d_model=256, n_heads=8, seq_len=256, batch=8, bf16=0, device='cpu', depths='4,8,16,32', deep=128,
             time_depth='8', exact_depth=4, rows=ALL_ROWS),
    gpu=dict(d_model=1024, n_heads=16, seq_len=1024, batch=8, bf16=1, device='cuda', depths='12,24,48',
             deep=0, time_depth='12,24,48', exact_depth=12,
             rows='plain;checkpoint;bijdiff;plain, compiled;bijdiff, compiled'))

# Memory

def step_bytes(net, s, name, batch=None):
    "Return the peak of a training step"
    return peak_bytes(partial(prepare_step, net, s, name, batch), s.device)

def memory(s, name, depth):
    "Return the peak of a training step in MiB, and the number of weights"
    net,weights = build(s, name, depth)
    return dict(mib=round(step_bytes(net, s, name)/2**20, 1), weights=sum(p.numel() for p in weights))

# Time

def stepper(s, name, depth):
    "Return a function that takes a training step and returns its seconds"
    net,_ = build(s, name, depth)
    def prepare():
        net.zero_grad(set_to_none=False)
        return partial(train_step, net, make_input(s, name), s.bf16)
    step = timed_step(prepare, s.device)
    for _ in range(2): step()
    return step

def time_row(name, seconds):
    "Return median milliseconds, and ratios to the networks with stored activations"
    bases = [k for k in dict.fromkeys(['plain', KINDS[name].stored]) if k in seconds]
    ratios = {f'to {k}':ratio(seconds[name], seconds[k]) for k in bases}
    return dict(ms=round(1e3*statistics.median(seconds[name]), 1), **ratios)

# Exactness

def gradients(s, name, depth, **how):
    "Return the gradients of input and weights after one step; the input is not a leaf, like an embedding"
    net,weights = build(s, name, depth)
    x = make_input(s, name).requires_grad_()
    train_step(net, x.clone(), **how)
    found = [p.grad for p in (x, *weights)]
    if any(g is None for g in found): raise ValueError('some weights or the input get no gradient')
    return found

@torch.no_grad()
def inverse_error(s, name, depth, bf16):
    "Return the largest error of inverting the output of a network, None without an inverse"
    net,_ = build(s, name, depth)
    if not hasattr(net, 'inverse'): return None
    x = make_input(s, name)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        back = state(net.inverse(state(net(x))))
        return (back-x).abs().max().item()

def exactness(s, name, depth, **how):
    "Compare gradients with those of stored activations and the same weights"
    found,stored = (gradients(s, k, depth, **how) for k in (name, KINDS[name].stored))
    worst = max(((a-b).norm()/b.norm()).item() for a,b in zip(found, stored))
    return dict(gradient_error=float(f'{worst:.3g}'), bitwise_equal=all(map(torch.equal, found, stored)),
                inverse_error=inverse_error(s, name, depth, how['bf16']))

# Largest batch

def largest(fits, tolerance=0.):
    "Return the largest number that `fits`, within a relative tolerance: doubling, then bisecting"
    low,high = 0,1
    while fits(high): low,high = high,2*high
    while high-low>max(1, tolerance*low):
        mid = (low+high)//2
        if fits(mid): low = mid
        else: high = mid
    return low

def check_largest():
    "Search where the answer is known"
    for n in (0, 1, 2, 3, 7, 8, 100): assert largest(lambda b: b<=n)==n
    assert 97<=largest(lambda b: b<=100, .03)<=100

def fits(net, s, name, batch, limit):
    "Return True if there is memory for a training step with this batch, and it stays within `limit` MiB"
    try: return step_bytes(net, s, name, batch)<=limit*2**20
    except torch.OutOfMemoryError: return False
    finally: release(s.device)

def largest_batch(s, name, depth, limit=math.inf, tolerance=.03):
    "Return the largest batch of a row"
    net,_ = build(s, name, depth)
    return dict(batch=largest(lambda b: fits(net, s, name, b, limit), tolerance))

# Tables

def attempt(f, *args, **kwargs):
    "Return the result of a function, or its error in one line"
    try: return f(*args, **kwargs)
    except NotInstalled as e: return dict(error=str(e))
    except Exception as e: return dict(error=f'{type(e).__name__}: {e}'.splitlines()[0][:150])

def measure(f, table, s, name, depth, **extra):
    "Add a row to a table by one function; free compiled code and memory"
    add_row(table, dict(row=name, depth=depth, **extra, **attempt(f, s, name, depth, **extra)))
    torch.compiler.reset()
    release(s.device)

def measure_times(table, s, names, depth, steps):
    "Add rows of times at one depth"
    steppers = {name:attempt(stepper, s, name, depth) for name in names}
    seconds = seconds_in_turns({name:f for name,f in steppers.items() if callable(f)}, steps)
    for name,f in steppers.items():
        found = time_row(name, seconds) if callable(f) else f
        add_row(table, dict(row=name, depth=depth, **found))
    torch.compiler.reset()
    release(s.device)

def all_tables(s, steps, fit_limit):
    "Measure memory, time, exactness and largest batches of all rows"
    names = s.rows.split(';')
    tables = dict(memory=[], time=[], exactness=[], largest_batch=[])
    for depth in ints(s.depths):
        for name in names: measure(memory, tables['memory'], s, name, depth)
    if s.deep: measure(memory, tables['memory'], s, 'bijdiff', s.deep)
    for depth in ints(s.time_depth): measure_times(tables['time'], s, names, depth, steps)
    compared = [name for name in names if name!=KINDS[name].stored]
    for how in (dict(bf16=False), dict(bf16=True), dict(bf16=True, inside=True)):
        for name in compared: measure(exactness, tables['exactness'], s, name, s.exact_depth, **how)
    if torch.device(s.device).type=='cuda' or fit_limit<math.inf:
        search = partial(largest_batch, limit=fit_limit)
        for depth in ints(s.depths):
            for name in names: measure(search, tables['largest_batch'], s, name, depth)
    return tables

@command
def reversible(
    preset:str='cpu', # Source of the defaults: cpu or gpu
    rows:str=None, # Names of rows, separated by semicolons
    depths:str=None, # Depths at which memory is measured
    time_depth:str=None, # Depths at which time is measured
    steps:int=15, # Turns per time
    exact_depth:int=None, # Depth at which gradients are compared
    deep:int=None, # Depth at which the memory of bijdiff alone is measured; 0 for none
    d_model:int=None, # Width of one stream
    n_heads:int=None, # Attention heads
    seq_len:int=None, # Positions
    batch:int=None, # Examples of a step
    bf16:int=None, # 1 for autocast to bfloat16 in memory, time and largest batch
    device:str=None, # cpu or cuda
    fit_limit:float=math.inf, # MiB of a step in the search for the largest batch; none on a CPU without it
    seed:int=0, # Seed of weights and input
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Measure memory, time and exactness of reversible stacks"
    given = {k:v for k,v in locals().items() if v not in (None, math.inf) and k!='out'}
    check_one_of('preset', preset, PRESETS)
    s = SimpleNamespace(**PRESETS[preset] | given)
    warnings.simplefilter('ignore')
    torch._dynamo.config.fail_on_recompile_limit_hit = True # Instead of going on uncompiled
    check_peak(s.device)
    check_largest()
    tables = all_tables(s, steps, fit_limit)
    packages = dict.fromkeys(k.package for k in KINDS.values() if k.package)
    record = run_record(__file__, s.device, spell_command(__file__, **given), setting=vars(s),
                        needs_input_gradient=[k for k in s.rows.split(';') if KINDS[k].needs_grad],
                        versions={k:version(k) for k in packages})
    save(result_path(__file__, out, '.json' if preset=='cpu' else f'_{preset}.json'), tables | record)

if __name__=='__main__': reversible()
