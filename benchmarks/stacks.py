"""Stacks that are compared: of this package, with stored activations, with checkpointing, of other packages.

The other packages (pip: revtorch, reformer-pytorch, memcnn, revlib) are optional and get the same
sub-networks, of PyTorch's own layers, as `plain streams`."""
import gc
import importlib.metadata
from functools import partial
from typing import Callable, NamedTuple
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from bijdiff.layers.block import BijectiveTransformer
from bijdiff.layers.coupling import split_halves
from bijdiff.layers.lattice import to_lattice

BITS = 12

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
    stack = randomise(stack)
    return wrap(stack), list(stack.parameters())

def two_streams(s, depth, wrap=Streams):
    "Build pairs of attention and MLP in the arrangement of a package"
    pairs = [nn.ModuleList([Attention(s.d_model, s.n_heads), mlp(s.d_model)]) for _ in range(depth)]
    pairs = randomise(nn.ModuleList(pairs))
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
    with torch.device(s.device): return KINDS[name].build(s, depth)

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

def prepare_step(net, s, name, batch=None):
    "Return a training step, after one that has allocated the gradients"
    train_step(net, make_input(s, name, batch), s.bf16)
    net.zero_grad(set_to_none=False)
    x = make_input(s, name, batch)
    gc.collect()
    return partial(train_step, net, x, s.bf16)
