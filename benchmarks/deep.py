"""Memory, gradients and training of very deep reversible stacks, of this package and of others.

    python benchmarks/deep.py TEXT

A small language model (embedding, stack of width 64, output head) learns to fill in masked characters. It
is trained with exact gradients: by this package's reversible backward, or with the stored activations of
`plain streams`, whose weights are those of the other packages. After some steps the gradients of all stacks
of the same weights are compared with those of stored activations, on a batch that is never trained on.

The same is compared at random weights: matrices are normal, with a standard deviation of `scale` divided by
the root of the number of inputs. The larger they are, the more a function may enlarge a difference of its
input.

- `gradient_error`: norm of the difference, relative to the norm of the gradient of stored activations.
- `worst_tensor`: the same for the tensor where it is largest.
- `state_error`: the input of the first block as the backward pass rebuilds it, relative to the true one.
- `float64`: gradients of stored activations against those of the same network in float64: their own rounding.

Backward is called outside of autocast, as PyTorch advises; `bf16 inside` calls it inside. `trainings` use the
gradients of the row itself. The output head begins at random, since a head of zeros gives the blocks no
gradient. Every finished part is written; parts that are there are skipped."""
import copy
import hashlib
import statistics
import time
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
import torch
import torch.nn.functional as F
from torch import nn
from bijdiff.console import command
from bijdiff.layers.block import BijectiveTransformer
from bijdiff.layers.lattice import to_lattice, with_lattice
from common import add_row, check_peak, has_row, ints, n_params, peak_bytes, release, result_path
from common import resume, save, shared_run_record
from stacks import Attention, BITS, checkpointed, KINDS, mlp, state, Streams, version

PRECISIONS = 'float32', 'bf16', 'bf16 inside'
OTHERS = 'revtorch', 'reformer-pytorch', 'memcnn', 'revlib'
BY_OWN_GRADIENTS = 'plain', 'bijdiff', 'plain streams', 'revtorch' # The other packages compute the same

# Networks: a family is a set of stacks with the same weights

class Language(nn.Module):
    "Embedding, a stack of two streams and an output head"
    def __init__(self, vocab_size, d, weights):
        super().__init__()
        self.embed = nn.Embedding(vocab_size+1, d)
        self.weights = weights
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocab_size)

    def forward(self, ids, stack, grid):
        e = F.rms_norm(self.embed(ids), self.norm.normalized_shape)
        e = e.to(torch.promote_types(e.dtype, torch.float32)) # streams keep full precision under autocast
        if grid: e = to_lattice(e, BITS)
        y = state(stack(torch.cat([e, e], -1)))
        return self.head(self.norm(sum(y.chunk(2, -1))))

def blocks(s, depth):
    "Return a network of this package's blocks, with its stacks by name"
    torch.manual_seed(s.seed)
    weights = BijectiveTransformer(depth, s.d_model, s.n_heads, lattice_bits=BITS)
    def stack(bits=BITS, reversible=False):
        new = with_lattice(weights, bits)
        new.reversible = reversible
        return new
    stacks = {'plain':stack(), 'checkpoint':checkpointed(stack()), 'bijdiff':stack(reversible=True),
              'plain, no lattice':stack(None), 'bijdiff, no lattice':stack(None, reversible=True)}
    net = Language(s.vocab_size, s.d_model, weights)
    return SimpleNamespace(net=net, stacks=stacks, first=lambda stack: stack.blocks[0].f.mixer, grid=True)

def pairs_of_layers(s, depth):
    "Return a network of PyTorch's own layers, with the stacks of the other packages by name"
    torch.manual_seed(s.seed)
    pairs = [nn.ModuleList([Attention(s.d_model, s.n_heads), mlp(s.d_model)]) for _ in range(depth)]
    pairs = nn.ModuleList(pairs)
    stacks = {'plain streams':Streams(pairs)}
    for name in OTHERS:
        if version(name): stacks[name] = KINDS[name].build.keywords['wrap'](pairs)
    net = Language(s.vocab_size, s.d_model, pairs)
    return SimpleNamespace(net=net, stacks=stacks, first=lambda stack: pairs[0][0], grid=False)

FAMILIES = {'bijdiff':blocks, 'plain streams':pairs_of_layers}
FAMILY = dict.fromkeys(('plain streams', *OTHERS), pairs_of_layers)

def reference(name):
    "Return the row with stored activations and the same arithmetic"
    if name in FAMILY: return 'plain streams'
    return 'plain, no lattice' if name.endswith('no lattice') else 'plain'

# Steps

def draw_batch(s, generator):
    "Return ids and the places of their masks, half of all, (batch, seq_len) each"
    starts = torch.randint(len(s.ids)-s.seq_len, (s.batch,), generator=generator)
    ids = torch.stack([s.ids[i:i+s.seq_len] for i in starts.tolist()])
    return ids, torch.rand(ids.shape, generator=generator)<.5

def step(family, name, batch, vocab_size, precision='float32'):
    "Run forward and backward of one stack, and return the loss"
    ids,masked = batch
    with torch.autocast('cpu', torch.bfloat16, enabled=precision!='float32'):
        logits = family.net(ids.masked_fill(masked, vocab_size), family.stacks[name], family.grid)
        loss = F.cross_entropy(logits[masked].to(family.net.embed.weight), ids[masked])
        if precision=='bf16 inside': loss.backward()
    if precision!='bf16 inside': loss.backward()
    return loss.item()

@contextmanager
def first_inputs(f):
    "Collect the inputs of a function; some packages call `forward`, past all hooks"
    found,forward = [],f.forward
    def collect(x, *args, **kwargs):
        found.append(x.detach().clone())
        return forward(x, *args, **kwargs)
    f.forward = collect
    try: yield found
    finally: del f.forward

def gradients(family, name, *args, **kwargs):
    "Return the gradients of all weights, and the first and the last input of the first function"
    family.net.zero_grad()
    with first_inputs(family.first(family.stacks[name])) as inputs: step(family, name, *args, **kwargs)
    found = [p.grad for p in family.net.parameters()]
    family.net.zero_grad()
    return found, inputs[0], inputs[-1]

def distance(found, true):
    "Return the norm of a difference, relative to the norm of the second; over all tensors and the largest"
    off = torch.stack([(a.double()-b.double()).norm() for a,b in zip(found, true)])
    size = torch.stack([b.double().norm() for b in true])
    worst = torch.where(size>0, off/size, torch.where(off>0, torch.inf, 0.)).max()
    return (off.norm()/size.norm()).item(), worst.item()

def rounded(x): return float(f'{x:.3g}')

def error_row(found, true):
    "Return the errors of some gradients as entries of a row"
    total,worst = distance(found, true)
    return dict(gradient_error=rounded(total), worst_tensor=rounded(worst),
                bitwise_equal=all(map(torch.equal, found, true)))

# Gradients of the same weights

def compare(s, family, **key):
    "Yield a row for each stack of a family and each precision"
    batch = draw_batch(s, torch.Generator().manual_seed(s.seed+1))
    for precision in PRECISIONS:
        how = dict(batch=batch, vocab_size=s.vocab_size, precision=precision)
        stored = {}
        for name in family.stacks:
            found,first,last = gradients(family, name, **how)
            if name==reference(name): stored[name] = found
            else:
                row = error_row(found, stored[reference(name)])
                off,_ = distance([last], [first])
                yield dict(row=name, **key, precision=precision, **row, state_error=rounded(off))
        if 'plain streams' not in stored: continue
        row = rounding(s, family, stored['plain streams'], batch)
        yield dict(row='float64', **key, precision=precision, **row)

def rounding(s, family, stored, batch):
    "Compare stored gradients with those of the network in float64"
    net = copy.deepcopy(family.net).double()
    double = SimpleNamespace(net=net, stacks={'plain streams':Streams(net.weights)}, grid=False,
                             first=lambda stack: net.weights[0][0])
    true,*_ = gradients(double, 'plain streams', batch=batch, vocab_size=s.vocab_size)
    return error_row([a.double() for a in stored], true)

@torch.no_grad()
def randomise(s, net, scale):
    "Draw the matrices between embedding and head at random, with variance scale**2 divided by the inputs"
    torch.manual_seed(s.seed)
    for p in net.weights.parameters():
        if p.ndim>1: p.normal_(std=scale*p[0].numel()**-.5)

def compare_random(s, name, depth, scale):
    "Return the rows of one family at random weights"
    family = FAMILIES[name](s, depth)
    randomise(s, family.net, scale)
    rows = []
    for row in compare(s, family, depth=depth, scale=scale): add_row(rows, row)
    return dict(random=rows)

# Training

def optimiser(s, net):
    "Return an optimiser, and a schedule that warms up over ten steps"
    opt = torch.optim.AdamW(net.parameters(), s.lr)
    return opt, torch.optim.lr_scheduler.LambdaLR(opt, lambda i: min(1., (i+1)/10))

def weights_hash(net):
    "Return the sha256 of all weights"
    h = hashlib.sha256()
    for p in net.parameters(): h.update(p.detach().numpy().tobytes())
    return h.hexdigest()[:16]

def train(s, family, name, precision='float32', visit=None):
    "Train by the gradients of one stack; call `visit` with the number of steps, also before the first"
    opt,schedule = optimiser(s, family.net)
    generator = torch.Generator().manual_seed(s.seed)
    losses,seconds = [],[]
    for i in range(s.steps+1):
        if visit: visit(i)
        if i==s.steps: break
        start = time.perf_counter()
        opt.zero_grad()
        losses.append(step(family, name, draw_batch(s, generator), s.vocab_size, precision))
        nn.utils.clip_grad_norm_(family.net.parameters(), 1.)
        opt.step()
        schedule.step()
        seconds.append(time.perf_counter()-start)
        if i%10==0: print(name, i, round(losses[-1], 3), f'{seconds[-1]:.1f} s', flush=True)
    means = dict(first_losses=statistics.mean(losses[:10]), last_losses=statistics.mean(losses[-10:]))
    return dict(**{k:round(o, 4) for k,o in means.items()}, losses=[round(o, 4) for o in losses],
                seconds=round(statistics.median(seconds), 2), parameters=n_params(family.net),
                weights=weights_hash(family.net))

def compare_and_train(s, name, depth, at):
    "Return the rows of one family and depth: gradients at some steps, and the training"
    family = FAMILIES[name](s, depth)
    rows = []
    def visit(i):
        if i not in at: return
        for row in compare(s, family, depth=depth, steps=i): add_row(rows, row)
    training = dict(row=name, depth=depth, precision='float32', **train(s, family, name, visit=visit))
    return dict(gradients=rows, training=[training])

def train_alone(s, row, depth, precision):
    "Return the row of a training by the gradients of one stack"
    family = FAMILY.get(row, blocks)(s, depth)
    found = train(s, family, row, precision)
    return dict(training=[dict(row=row, depth=depth, precision=precision, **found)])

# Memory

def memory(s, name, depth):
    "Return the peak of a training step in MiB above weights and gradients"
    family = FAMILY.get(name, blocks)(s, depth)
    batch = draw_batch(s, torch.Generator().manual_seed(s.seed))
    def prepare():
        step(family, name, batch, s.vocab_size)
        family.net.zero_grad(set_to_none=False)
        release('cpu')
        return partial(step, family, name, batch, s.vocab_size)
    row = dict(row=name, depth=depth, mib=round(peak_bytes(prepare, 'cpu')/2**20, 2),
               weights_mib=round(n_params(family.net)*4/2**20, 1))
    return dict(memory=[row])

# Tables

def trainable(name):
    "Return True unless a row needs a package that is not installed"
    return name not in OTHERS or version(name)

def parts(s, depths, at, scales, own_depths):
    "Yield table, key and function of every part; functions return rows by table"
    for depth in depths:
        for name in ('plain', 'checkpoint', 'bijdiff'):
            yield 'memory', dict(row=name, depth=depth), partial(memory, s, name, depth)
    for depth in depths:
        for name,row in (('bijdiff', 'bijdiff'), ('plain streams', 'float64')):
            key = dict(row=name, depth=depth, precision='float32')
            yield 'training', key, partial(compare_and_train, s, name, depth, at)
            for scale in scales:
                key = dict(row=row, depth=depth, scale=scale)
                yield 'random', key, partial(compare_random, s, name, depth, scale)
    for depth in own_depths:
        for name in filter(trainable, BY_OWN_GRADIENTS):
            key = dict(row=name, depth=depth, precision='bf16')
            yield 'training', key, partial(train_alone, s, **key)

@command
def deep(
    text:str, # Path of a text
    depths:str='64,256,1024', # Numbers of blocks, separated by commas
    steps:int=100, # Training steps
    at:str='0,25,100', # Steps after which gradients are compared
    scales:str='1,2,4', # Scales of random weights
    own_depths:str='64', # Blocks of the trainings in bf16, each row by its own gradients
    d_model:int=64, # Width of one stream
    n_heads:int=4, # Attention heads
    seq_len:int=64, # Characters of a sequence
    batch:int=4, # Sequences of a step
    lr:float=1e-3, # Learning rate
    seed:int=0, # Seed of weights and batches
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Measure memory, gradients and training of deep reversible stacks"
    warnings.simplefilter('ignore')
    check_peak('cpu')
    settings = dict(steps=steps, d_model=d_model, n_heads=n_heads, seq_len=seq_len, batch=batch, lr=lr,
                    seed=seed)
    path = result_path(__file__, out)
    old = resume(path, settings)
    result = {table:old.get(table, []) for table in ('memory', 'training', 'gradients', 'random')}
    letters = Path(text).read_text(encoding='utf-8')
    vocab = {c:i for i,c in enumerate(sorted(set(letters)))}
    s = SimpleNamespace(ids=torch.tensor([vocab[c] for c in letters]), vocab_size=len(vocab), **settings)
    for table,key,make in parts(s, *map(ints, (depths, at, scales, own_depths))):
        if has_row(result[table], **key): continue
        for name,rows in make().items(): result[name] += rows
        packages = {k:version(k) for k in OTHERS}
        save(path, result | shared_run_record(__file__, old=old, **settings) | dict(packages=packages))
        release('cpu')

if __name__=='__main__': deep()
