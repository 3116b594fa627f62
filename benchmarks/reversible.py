"""Training memory, step time and exactness of reversible stacks: this package, stored activations, checkpointing, other packages.

    python benchmarks/reversible.py                # writes benchmarks/results/reversible.json
    python benchmarks/reversible.py --preset gpu   # one GPU; also the largest batches; writes benchmarks/results/reversible_gpu.json

Memory: most bytes that tensors hold during forward and backward, above what they hold before it, when weights, their gradients and the input are there. Time:
the networks of one depth take turns step by step; ratios are quartiles over the turns, with the median in the middle. The other packages (pip: revtorch,
reformer-pytorch, memcnn, revlib) are optional and get the same sub-networks, of PyTorch's own layers, as `plain streams`."""
import gc, importlib.metadata, json, math, os, platform, statistics, time, warnings
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple
import torch, torch.nn.functional as F
from torch import nn
from torch.profiler import profile, record_function, ProfilerActivity
from torch.utils.checkpoint import checkpoint
from fastcore.script import call_parse
import bijdiff
from bijdiff.layers.lattice import to_lattice
from bijdiff.layers.coupling import split_halves
from bijdiff.layers.block import BijectiveTransformer

bits = 12
presets = dict(
    cpu=dict(d_model=256, n_heads=8, seq_len=256, batch=8, bf16=0, device='cpu', depths='4,8,16,32', deep=128, time_depth='8', exact_depth=4,
             rows='plain;checkpoint;bijdiff;plain, compiled;bijdiff, compiled;plain streams;revtorch;reformer-pytorch;memcnn;revlib'),
    gpu=dict(d_model=1024, n_heads=16, seq_len=1024, batch=8, bf16=1, device='cuda', depths='12,24,48', deep=0, time_depth='12,24,48', exact_depth=12,
             rows='plain;checkpoint;bijdiff;plain, compiled;bijdiff, compiled'))

# Networks: each builder gives the network and its weights, in an order that is the same for all networks of a family

class Attention(nn.Module):
    "Pre-norm multi-head attention of PyTorch's own layers"
    def __init__(self, d, heads):
        super().__init__()
        self.heads,self.norm,self.qkv,self.out = heads,nn.LayerNorm(d),nn.Linear(d, 3*d, bias=False),nn.Linear(d, d, bias=False)
    def forward(self, x):
        q,k,v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

def mlp(d):
    "Pre-norm MLP"
    return nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 4*d), nn.GELU(), nn.Linear(4*d, d))

class Streams(nn.Module):
    "Two streams that take turns, with stored activations: what the other packages compute"
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
    "The same stack, each block recomputed in the backward pass"
    for b in stack.blocks: b.step = partial(checkpoint, b.step, use_reentrant=False)
    return stack

def compiled(stack):
    "The same stack, compiled"
    stack.compile()
    return stack

def by_revtorch(pairs):
    "The pairs as a reversible sequence of revtorch"
    from revtorch import ReversibleBlock, ReversibleSequence
    return ReversibleSequence(nn.ModuleList(ReversibleBlock(f, g, split_along_dim=-1) for f,g in pairs))

def by_reformer(pairs):
    "The pairs as a reversible sequence of reformer-pytorch"
    from reformer_pytorch.reversible import ReversibleSequence
    return ReversibleSequence(nn.ModuleList(pairs))

def by_memcnn(pairs):
    "The pairs as a reversible sequence of memcnn"
    from memcnn import AdditiveCoupling, InvertibleModuleWrapper
    return nn.Sequential(*[InvertibleModuleWrapper(AdditiveCoupling(f, g, split_dim=-1)) for f,g in pairs])

def by_revlib(pairs):
    "The pairs as a reversible sequence of revlib"
    from revlib import ReversibleSequential
    return ReversibleSequential(*[m for pair in pairs for m in pair], split_dim=-1)

@torch.no_grad()
def randomise(net):
    "Random weights everywhere: a fresh block would add nothing"
    for p in net.parameters(): p.normal_(std=.05) if p.ndim>1 else p.add_(torch.randn_like(p), alpha=.05)
    return net

def bijective(s, depth, wrap=lambda stack: stack, reversible=False):
    "A stack of this package's blocks"
    stack = randomise(BijectiveTransformer(depth, s.d_model, s.n_heads, lattice_bits=bits, reversible=reversible)).to(s.device)
    return wrap(stack),list(stack.parameters())

def two_streams(s, depth, wrap=Streams):
    "Pairs of attention and MLP in a package's arrangement"
    pairs = nn.ModuleList(nn.ModuleList([Attention(s.d_model, s.n_heads), mlp(s.d_model)]) for _ in range(depth))
    return wrap(randomise(pairs).to(s.device)),list(pairs.parameters())

class Row(NamedTuple):
    "One row of the tables"
    build:Callable # From setting and depth to network and weights
    stored:str # Row of the same weights with stored activations
    needs_grad:bool=False # Without an input that requires gradients the weights get none
    package:str|None=None # What must be installed

kinds = {
    'plain': Row(bijective, 'plain'),
    'checkpoint': Row(partial(bijective, wrap=checkpointed), 'plain'),
    'bijdiff': Row(partial(bijective, reversible=True), 'plain'),
    'plain, compiled': Row(partial(bijective, wrap=compiled), 'plain, compiled'),
    'bijdiff, compiled': Row(partial(bijective, wrap=compiled, reversible=True), 'plain, compiled'),
    'plain streams': Row(two_streams, 'plain streams'),
    'revtorch': Row(partial(two_streams, wrap=by_revtorch), 'plain streams', True, 'revtorch'),
    'reformer-pytorch': Row(partial(two_streams, wrap=by_reformer), 'plain streams', True, 'reformer-pytorch'),
    'memcnn': Row(partial(two_streams, wrap=by_memcnn), 'plain streams', False, 'memcnn'),
    'revlib': Row(partial(two_streams, wrap=by_revlib), 'plain streams', True, 'revlib'),
}

def version(package):
    "Installed version of a package, or None"
    try: return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError: return None

def build(s, name, depth):
    "Network and weights of a row, the same weights at each call"
    if kinds[name].package and not version(kinds[name].package): raise ImportError('not installed')
    torch.manual_seed(s.seed)
    return kinds[name].build(s, depth)

# Steps

def state(out):
    "The state among what a network gives"
    return out[0] if isinstance(out, tuple) else out

def make_input(s, name, batch=None):
    "A fresh input, the same numbers at each call; on the lattice for this package's blocks"
    torch.manual_seed(s.seed)
    x = torch.randn(batch or s.batch, s.seq_len, 2*s.d_model, device=s.device)
    return (x if kinds[name].stored=='plain streams' else to_lattice(x, bits)).requires_grad_(kinds[name].needs_grad)

def train_step(net, x, bf16, inside=False):
    "Forward and backward; PyTorch advises to call backward outside of autocast"
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bool(bf16)):
        loss = state(net(x)).square().mean()
        if inside: loss.backward()
    if not inside: loss.backward()

def synchronise(device):
    "Wait for the device"
    if torch.device(device).type=='cuda': torch.cuda.synchronize()

# Memory

def peak_cuda(prepare):
    "Peak by the allocator of the GPU"
    step = prepare()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()-before

def peak_cpu(prepare):
    "Peak by the allocations and releases that the profiler sees"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step = prepare()
        with record_function('measured'): step()
    events = sorted(prof.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    start = next(i for i,e in enumerate(events) if e.name()=='measured')
    return max(accumulate(e.nbytes() for e in events[start:] if e.name()=='[memory]'), default=0)

def peak_bytes(prepare, device):
    "Most bytes that tensors hold during the step that `prepare` gives, above what they hold before it"
    return peak_cuda(prepare) if torch.device(device).type=='cuda' else peak_cpu(prepare)

def check_peak(device, n=2**18, k=5):
    "Known answers: k stored results and the gradient in hand; two tensors when nothing is stored; one less when one held before is freed"
    x = torch.zeros(n, device=device, requires_grad=True)
    x.grad = torch.zeros_like(x)
    def chain(held=()):
        if held: held.pop()
        h = x
        for _ in range(k): h = h.sin()
        return h.sum()
    free = torch.no_grad()(chain)
    for prepare,tensors in ((lambda: lambda: chain().backward(), k+1), (lambda: free, 2), (lambda: partial(free, [torch.zeros(n, device=device)]), 1)):
        seen = peak_bytes(prepare, device)
        assert 0<=seen-4*n*tensors<4096, f'{seen} bytes measured, expected {4*n*tensors}'

def prepare_step(net, s, name, batch=None):
    "A training step, after one that has allocated the gradients"
    train_step(net, make_input(s, name, batch), s.bf16)
    net.zero_grad(set_to_none=False)
    x = make_input(s, name, batch)
    gc.collect()
    return partial(train_step, net, x, s.bf16)

def step_bytes(net, s, name, batch=None):
    "Peak of a training step"
    return peak_bytes(partial(prepare_step, net, s, name, batch), s.device)

def memory(s, name, depth):
    "Peak of a training step in MiB, and the number of weights"
    net,ps = build(s, name, depth)
    return dict(mib=round(step_bytes(net, s, name)/2**20, 1), weights=sum(p.numel() for p in ps))

# Time

def stepper(s, name, depth):
    "A function that takes a training step and gives its seconds"
    net,_ = build(s, name, depth)
    def step():
        net.zero_grad(set_to_none=False)
        x = make_input(s, name)
        synchronise(s.device)
        start = time.perf_counter()
        train_step(net, x, s.bf16)
        synchronise(s.device)
        return time.perf_counter()-start
    for _ in range(2): step()
    return step

def times(steppers, steps):
    "Seconds of each of the steps; the networks take turns"
    seconds = {name:[] for name in steppers}
    for _ in range(steps):
        for name,step in steppers.items(): seconds[name].append(step())
    return seconds

def ratio(a, b):
    "Quartiles of the ratio turn by turn, the median in the middle"
    return [round(q, 3) for q in statistics.quantiles((x/y for x,y in zip(a, b)), n=4, method='inclusive')]

def time_row(name, seconds):
    "Median milliseconds, and ratios to the networks with stored activations"
    bases = [k for k in dict.fromkeys(['plain', kinds[name].stored]) if k in seconds]
    ratios = {f'to {k}':ratio(seconds[name], seconds[k]) for k in bases}
    return dict(ms=round(1e3*statistics.median(seconds[name]), 1), **ratios)

# Exactness

def gradients(s, name, depth, **how):
    "Gradients of input and weights after one step; the input wants one and is no leaf, like that of an embedding"
    (net,ps),x = build(s, name, depth),make_input(s, name).requires_grad_()
    train_step(net, x.clone(), **how)
    if any(p.grad is None for p in (x, *ps)): raise ValueError('some weights or the input get no gradient')
    return [p.grad for p in (x, *ps)]

@torch.no_grad()
def inverse_error(s, name, depth, bf16):
    "Largest error of inverting the network's result; None where there is no inverse"
    net,_ = build(s, name, depth)
    if not hasattr(net, 'inverse'): return None
    x = make_input(s, name)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16): return (state(net.inverse(state(net(x))))-x).abs().max().item()

def exactness(s, name, depth, **how):
    "Gradients against those of stored activations with the same weights"
    g,g0 = (gradients(s, k, depth, **how) for k in (name, kinds[name].stored))
    worst = max(((a-b).norm()/b.norm()).item() for a,b in zip(g, g0))
    return dict(gradient_error=float(f'{worst:.3g}'), bitwise_equal=all(map(torch.equal, g, g0)), inverse_error=inverse_error(s, name, depth, how['bf16']))

# Largest batch

def largest(fits, tolerance=0.):
    "Largest number that `fits`, within a relative tolerance: doubling, then bisecting"
    lo,hi = 0,1
    while fits(hi): lo,hi = hi,2*hi
    while hi-lo>max(1, tolerance*lo):
        mid = (lo+hi)//2
        lo,hi = (mid, hi) if fits(mid) else (lo, mid)
    return lo

def check_largest():
    "The search where the answer is known"
    for n in (0, 1, 2, 3, 7, 8, 100): assert largest(lambda b: b<=n)==n
    assert 97<=largest(lambda b: b<=100, .03)<=100

def fits(net, s, name, batch, limit):
    "Whether a training step with this batch has room, and stays within `limit` MiB"
    try: return step_bytes(net, s, name, batch)<=limit*2**20
    except torch.OutOfMemoryError: return False
    finally: release(s.device)

def largest_batch(s, name, depth, limit=math.inf, tolerance=.03):
    "Largest batch of a row"
    net,_ = build(s, name, depth)
    return dict(batch=largest(lambda b: fits(net, s, name, b, limit), tolerance))

# All together

def release(device):
    "Free memory that nothing refers to"
    gc.collect()
    if torch.device(device).type=='cuda': torch.cuda.empty_cache()

def attempt(f, *args, **kw):
    "The result, or what went wrong in one line"
    try: return f(*args, **kw)
    except Exception as e: return dict(error=str(e) if str(e)=='not installed' else f'{type(e).__name__}: {e}'.splitlines()[0][:150])

def tell(table, **row):
    "Add a row to a table and print it"
    table.append(row)
    print(row, flush=True)

def measure(f, table, s, name, depth, **extra):
    "A row of a table by one function; compiled code and memory are given back"
    tell(table, row=name, depth=depth, **extra, **attempt(f, s, name, depth, **extra))
    torch.compiler.reset()
    release(s.device)

def measure_times(table, s, names, depth, steps):
    "Rows of times at one depth"
    ready = {name:attempt(stepper, s, name, depth) for name in names}
    seconds = times({k:f for k,f in ready.items() if callable(f)}, steps)
    for name,f in ready.items(): tell(table, row=name, depth=depth, **(time_row(name, seconds) if callable(f) else f))
    torch.compiler.reset()
    release(s.device)

def write(path, res):
    "Write all at once"
    part = path.with_suffix('.part')
    part.write_text(json.dumps(res, indent=1)+'\n')
    os.replace(part, path)

def ints(text):
    "Whole numbers between commas"
    return [int(o) for o in text.split(',') if o]

@call_parse
def main(
    preset:str='cpu', # Where the defaults come from: cpu or gpu
    rows:str=None, # Names of rows between semicolons
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
    fit_limit:float=math.inf, # MiB a step may take when the largest batch is sought, besides what the device has; on cpu nothing is sought without it
    seed:int=0, # Of weights and input
    out:str=None, # Where to write
):
    given = {k:v for k,v in locals().items() if v not in (None, math.inf) and k!='out'}
    s = SimpleNamespace(**{**presets[preset], **given})
    names,gpu = s.rows.split(';'),torch.device(s.device).type=='cuda'
    warnings.simplefilter('ignore')
    torch._dynamo.config.fail_on_recompile_limit_hit = True # Instead of going on uncompiled
    check_peak(s.device); check_largest()
    tables = dict(memory=[], time=[], exactness=[], largest_batch=[])
    for depth in ints(s.depths):
        for name in names: measure(memory, tables['memory'], s, name, depth)
    if s.deep: measure(memory, tables['memory'], s, 'bijdiff', s.deep)
    for depth in ints(s.time_depth): measure_times(tables['time'], s, names, depth, steps)
    for how in (dict(bf16=False), dict(bf16=True), dict(bf16=True, inside=True)):
        for name in names:
            if name!=kinds[name].stored: measure(exactness, tables['exactness'], s, name, s.exact_depth, **how)
    if gpu or fit_limit<math.inf:
        for depth in ints(s.depths):
            for name in names: measure(partial(largest_batch, limit=fit_limit), tables['largest_batch'], s, name, depth)
    versions = {k:version(k) for k in ('torch', *dict.fromkeys(k.package for k in kinds.values() if k.package))}
    machine = f'{platform.machine()}, {torch.get_num_threads()} threads' + (f', {torch.cuda.get_device_name()}' if gpu else '')
    command = ' '.join(['python benchmarks/reversible.py', *(f'--{k} "{v}"' for k,v in given.items())])
    res = dict(**tables, setting=vars(s), needs_input_gradient=[k for k in names if kinds[k].needs_grad],
               versions=dict(bijdiff=bijdiff.__version__, **versions), machine=machine, command=command)
    write(Path(out) if out else Path(__file__).parent.joinpath('results').joinpath('reversible.json' if preset=='cpu' else f'reversible_{preset}.json'), res)
