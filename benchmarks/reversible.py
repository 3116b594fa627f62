"""Training memory, step time and exactness of reversible stacks, of this package and of others.

    python benchmarks/reversible.py                # writes benchmarks/results/reversible.json
    python benchmarks/reversible.py --preset gpu   # one GPU; also the largest batches; reversible_gpu.json

Compared are this package, stored activations, checkpointing and four other packages (pip: revtorch,
reformer-pytorch, memcnn, revlib), which are optional and get the same sub-networks, of PyTorch's own layers,
as `plain streams`.

Memory: most bytes that tensors hold during forward and backward, above what they hold before it, when
weights, their gradients and the input are there. Time: the networks of one depth take turns step by step;
ratios are quartiles over the turns, with the median in the middle."""
import gc
import importlib.metadata
import math
import statistics
import warnings
from functools import partial
from itertools import accumulate
from types import SimpleNamespace
from typing import Callable, NamedTuple
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import profile, ProfilerActivity, record_function
from torch.utils.checkpoint import checkpoint
from bijdiff.checks import check_one_of
from bijdiff.console import command
from bijdiff.layers.block import BijectiveTransformer
from bijdiff.layers.coupling import split_halves
from bijdiff.layers.lattice import to_lattice
from common import add_row, result_path, run_record, save, seconds_in_turns, spell_command, timed_step

BITS = 12
ALL_ROWS = ('plain;checkpoint;bijdiff;plain, compiled;bijdiff, compiled;'
            'plain streams;revtorch;reformer-pytorch;memcnn;revlib')
PRESETS = dict(
    cpu=dict(d_model=256, n_heads=8, seq_len=256, batch=8, bf16=0, device='cpu', depths='4,8,16,32', deep=128,
             time_depth='8', exact_depth=4, rows=ALL_ROWS),
    gpu=dict(d_model=1024, n_heads=16, seq_len=1024, batch=8, bf16=1, device='cuda', depths='12,24,48',
             deep=0, time_depth='12,24,48', exact_depth=12,
             rows='plain;checkpoint;bijdiff;plain, compiled;bijdiff, compiled'))

# Networks: each builder returns the network and its weights, in the same order for all networks of a family

class Attention(nn.Module):
    "Pre-norm multi-head attention of PyTorch's own layers"
    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3*d, bias=False)
        self.out = nn.Linear(d, d, bias=False)

    def forward(self, x):
        q,k,v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

def mlp(d):
    "Pre-norm MLP"
    return nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 4*d), nn.GELU(), nn.Linear(4*d, d))

class Streams(nn.Module):
    "Two streams that are updated in turn, with stored activations: the computation of the other packages"
    def __init__(self, pairs):
        super().__init__()
        self.pairs = pairs

    def forward(self, x):
        x1,x2 = split_halves(x)
        for f,g in self.pairs:
            x1 = x1+f(x2)
            x2 = x2+g(x1)
        return torch.cat([x1, x2], -1)

def checkpointed(stack):
    "Recompute each block of a stack in the backward pass"
    for b in stack.blocks: b.step = partial(checkpoint, b.step, use_reentrant=False)
    return stack

def compiled(stack):
    "Compile a stack"
    stack.compile()
    return stack

def by_revtorch(pairs):
    "Return the pairs as a reversible sequence of revtorch"
    from revtorch import ReversibleBlock, ReversibleSequence
    return ReversibleSequence(nn.ModuleList(ReversibleBlock(f, g, split_along_dim=-1) for f,g in pairs))

def by_reformer(pairs):
    "Return the pairs as a reversible sequence of reformer-pytorch"
    from reformer_pytorch.reversible import ReversibleSequence
    return ReversibleSequence(nn.ModuleList(pairs))

def by_memcnn(pairs):
    "Return the pairs as a reversible sequence of memcnn"
    from memcnn import AdditiveCoupling, InvertibleModuleWrapper
    return nn.Sequential(*[InvertibleModuleWrapper(AdditiveCoupling(f, g, split_dim=-1)) for f,g in pairs])

def by_revlib(pairs):
    "Return the pairs as a reversible sequence of revlib"
    from revlib import ReversibleSequential
    return ReversibleSequential(*[m for pair in pairs for m in pair], split_dim=-1)

@torch.no_grad()
def randomise(net):
    "Draw all weights at random; a fresh block would add nothing"
    for p in net.parameters():
        if p.ndim>1: p.normal_(std=.05)
        else: p.add_(torch.randn_like(p), alpha=.05)
    return net

def unchanged(stack):
    "Return a stack as it is"
    return stack

def bijective(s, depth, wrap=unchanged, reversible=False):
    "Build a stack of this package's blocks"
    stack = BijectiveTransformer(depth, s.d_model, s.n_heads, lattice_bits=BITS, reversible=reversible)
    stack = randomise(stack).to(s.device)
    return wrap(stack), list(stack.parameters())

def two_streams(s, depth, wrap=Streams):
    "Build pairs of attention and MLP in the arrangement of a package"
    pairs = [nn.ModuleList([Attention(s.d_model, s.n_heads), mlp(s.d_model)]) for _ in range(depth)]
    pairs = randomise(nn.ModuleList(pairs)).to(s.device)
    return wrap(pairs), list(pairs.parameters())

class Row(NamedTuple):
    "One row of the tables"
    build:Callable # Function of setting and depth, returns network and weights
    stored:str # Row of the same weights with stored activations
    needs_grad:bool=False # Whether weights get gradients only if the input requires them
    package:str|None=None # Package that must be installed

def other_package(wrap, package, needs_grad=True):
    "Return the row of another package"
    return Row(partial(two_streams, wrap=wrap), 'plain streams', needs_grad, package)

KINDS = {
    'plain': Row(bijective, 'plain'),
    'checkpoint': Row(partial(bijective, wrap=checkpointed), 'plain'),
    'bijdiff': Row(partial(bijective, reversible=True), 'plain'),
    'plain, compiled': Row(partial(bijective, wrap=compiled), 'plain, compiled'),
    'bijdiff, compiled': Row(partial(bijective, wrap=compiled, reversible=True), 'plain, compiled'),
    'plain streams': Row(two_streams, 'plain streams'),
    'revtorch': other_package(by_revtorch, 'revtorch'),
    'reformer-pytorch': other_package(by_reformer, 'reformer-pytorch'),
    'memcnn': other_package(by_memcnn, 'memcnn', needs_grad=False),
    'revlib': other_package(by_revlib, 'revlib'),
}

class NotInstalled(ImportError):
    "A package of a row is missing"

def version(package):
    "Return the installed version of a package, or None"
    try: return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError: return None

def build(s, name, depth):
    "Build network and weights of a row, the same weights at each call"
    package = KINDS[name].package
    if package and not version(package): raise NotInstalled('not installed')
    torch.manual_seed(s.seed)
    return KINDS[name].build(s, depth)

# Steps

def state(out):
    "Return the state in the output of a network"
    return out[0] if isinstance(out, tuple) else out

def make_input(s, name, batch=None):
    "Return a fresh input, the same numbers at each call; on the lattice for this package's blocks"
    torch.manual_seed(s.seed)
    x = torch.randn(batch or s.batch, s.seq_len, 2*s.d_model, device=s.device)
    if KINDS[name].stored!='plain streams': x = to_lattice(x, BITS)
    return x.requires_grad_(KINDS[name].needs_grad)

def train_step(net, x, bf16, inside=False):
    "Run forward and backward; PyTorch advises to call backward outside of autocast"
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bool(bf16)):
        loss = state(net(x)).square().mean()
        if inside: loss.backward()
    if not inside: loss.backward()

# Memory

def peak_cuda(prepare):
    "Return the peak by the allocator of the GPU"
    step = prepare()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()-before

def peak_cpu(prepare):
    "Return the peak by the allocations and releases in the profiler's record"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step = prepare()
        with record_function('measured'): step()
    events = sorted(prof.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    start = next(i for i,e in enumerate(events) if e.name()=='measured')
    return max(accumulate(e.nbytes() for e in events[start:] if e.name()=='[memory]'), default=0)

def peak_bytes(prepare, device):
    "Return the most bytes that tensors hold during the step from `prepare`, above those they hold before it"
    return peak_cuda(prepare) if torch.device(device).type=='cuda' else peak_cpu(prepare)

def check_peak(device, n=2**18, k=5):
    "Measure three steps of known memory: stored results, no stored results, a tensor that is freed"
    x = torch.zeros(n, device=device, requires_grad=True)
    x.grad = torch.zeros_like(x)
    def chain(held=()):
        if held: held.pop()
        h = x
        for _ in range(k): h = h.sin()
        return h.sum()
    def stored(): return lambda: chain().backward()
    def not_stored(): return torch.no_grad()(chain)
    def freed(): return partial(torch.no_grad()(chain), [torch.zeros(n, device=device)])
    # k results and the gradient in hand; two results; two results less the one that is freed
    for prepare,tensors in ((stored, k+1), (not_stored, 2), (freed, 1)):
        found = peak_bytes(prepare, device)
        assert 0<=found-4*n*tensors<4096, f'{found} bytes measured, expected {4*n*tensors}'

def prepare_step(net, s, name, batch=None):
    "Return a training step, after one that has allocated the gradients"
    train_step(net, make_input(s, name, batch), s.bf16)
    net.zero_grad(set_to_none=False)
    x = make_input(s, name, batch)
    gc.collect()
    return partial(train_step, net, x, s.bf16)

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

def ratio(a, b):
    "Return the quartiles of the ratio turn by turn, the median in the middle"
    return [round(q, 3) for q in statistics.quantiles((x/y for x,y in zip(a, b)), n=4, method='inclusive')]

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

def release(device):
    "Free memory without references"
    gc.collect()
    if torch.device(device).type=='cuda': torch.cuda.empty_cache()

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

def ints(text):
    "Return the whole numbers between commas"
    return [int(o) for o in text.split(',') if o]

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
