"""The reversible backward against stored activations, inside everything that PyTorch puts around a model.

Gradients are equal to the bit, unless a test says otherwise."""
import gc, io, os, shutil
from copy import deepcopy
from functools import partial
from typing import NamedTuple
import pytest, torch
from hypothesis import example, given, settings, strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from bijdiff.layers.lattice import to_lattice
from bijdiff.layers.reversible import ChunkedUpdate
from bijdiff.layers.block import BijectiveTransformer
import forks
import reversible_job as job
from helpers import random_context, seeded_weights, storage_bytes

def pair(n_layers=3, d=8, heads=2, **kwargs):
    "A reversible stack with random weights, and one with the same weights that stores activations"
    make = partial(BijectiveTransformer, n_layers, d, heads, lattice_bits=12, **kwargs)
    reversible,stored = make(reversible=True),make(reversible=False)
    stored.load_state_dict(seeded_weights(reversible).state_dict())
    return reversible, stored

def state(B=2, L=9, d=8, seed=1):
    "A random state on the lattice, (B, L, 2*d)"
    return to_lattice(torch.randn(B, L, 2*d, generator=torch.Generator().manual_seed(seed)), 12)

def times(): return torch.tensor([.2, .7])

def trial(m, x, call=None, bf16=False, **context):
    "Result, gradient of the input and gradients of all parameters, by name; dropout is drawn from one seed"
    leaf = x.clone().requires_grad_()
    m.zero_grad()
    torch.manual_seed(5)
    with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
        y = (m if call is None else call)(leaf, **context)
    if isinstance(y, tuple): y = y[0]
    y.sin().sum().backward()
    return dict(y=y.detach(), x=leaf.grad) | job.gradients(m)

def same_bits(a, b):
    "Return True for equal tensors, and for None twice"
    if a is None or b is None: return a is b
    return torch.equal(a, b)

def differing(a, b):
    "Names of the tensors that differ in any bit"
    assert a.keys()==b.keys()
    return [name for name in a if not same_bits(a[name], b[name])]

def near(a, b, tol):
    "Return True if max |a-b| <= tol * max |b|, and for None twice"
    if a is None or b is None: return a is b
    return ((a-b).abs().max() <= tol*b.abs().max()).item()

def alike(a, b, tol=1e-4):
    "Return True if all tensors are near each other"
    return all(near(a[name], b[name], tol) for name in b)

class Sizes(NamedTuple):
    "Sizes of a stack and its state"
    n_layers:int=3 # Blocks
    heads:int=2 # Heads of attention
    d_head:int=4 # Features of a head
    B:int=4 # Examples
    L:int=40 # Positions
    window:int=7 # Width of the local coupling; 0 for none
    ratio:float=1. # Fraction of bijective blocks

class Mode(NamedTuple):
    "How a stack is called"
    dropout:float=.3 # Probability of dropping a feature
    min_chunk_rows:int=4 # Smallest chunk; 256 makes one chunk
    bf16:bool=False # Under autocast
    masked:bool=True # With padding
    timed:bool=True # With times
    train:bool=True # In training mode

any_sizes = st.builds(Sizes, n_layers=st.integers(1, 5), heads=st.sampled_from([1, 2]),
                      d_head=st.sampled_from([2, 4, 10]), B=st.integers(1, 4), L=st.integers(1, 40),
                      window=st.sampled_from([0, 3, 7]), ratio=st.sampled_from([1., .5, 0.]))
any_mode = st.builds(Mode, dropout=st.sampled_from([0., .3]), min_chunk_rows=st.sampled_from([4, 256]),
                     bf16=st.booleans(), masked=st.booleans(), timed=st.booleans(), train=st.booleans())

@settings(max_examples=80, deadline=None)
@given(sizes=any_sizes, mode=any_mode, seed=st.integers(0, 10**6))
@example(sizes=Sizes(), mode=Mode(), seed=0)
@example(sizes=Sizes(4, heads=1, d_head=10, ratio=.5), mode=Mode(bf16=True), seed=1)
def test_gradients_are_those_of_stored_activations(sizes, mode, seed):
    d = sizes.d_head*sizes.heads
    both = pair(sizes.n_layers, d, sizes.heads, local_window=sizes.window, bijective_ratio=sizes.ratio,
                dropout=mode.dropout, time_conditioning=mode.timed)
    x = state(sizes.B, sizes.L, d, seed)
    torch.manual_seed(seed)
    context = random_context(sizes.B, sizes.L, mode.masked, mode.timed)
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(ChunkedUpdate, 'min_chunk_rows', mode.min_chunk_rows)
        found,stored = (trial(m.train(mode.train), x, bf16=mode.bf16, **context) for m in both)
    assert not differing(found, stored)
    first_block = [g for name,g in found.items() if 'blocks.0.' in name]
    assert mode.masked or any(g is not None and g.any() for g in first_block)

# Memory

def live_tensors():
    "Tensors that any Python object holds"
    gc.collect()
    return [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter) and o.device.type=='cpu']

def bytes_held(depth, reversible, dropout=0.):
    "Bytes that a forward pass leaves for the backward pass: saved by autograd, or held by a Python object"
    m = pair(depth, 16, dropout=dropout)[0 if reversible else 1]
    x = state(4, 32, 16).requires_grad_()
    before = storage_bytes([*live_tensors(), *m.parameters()])
    saved = {}
    def save(t):
        saved.update(storage_bytes([t]))
        return t
    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t): y,_ = m(x)
    held = saved | storage_bytes(live_tensors())
    assert y.requires_grad
    return sum(n for address,n in held.items() if address not in before)

@pytest.mark.parametrize('dropout', [0., .3])
def test_memory_does_not_grow_with_depth(dropout):
    "With dropout, each of six more blocks keeps two random states: those at its start and before its chunk"
    rng_states = 6*2*torch.get_rng_state().nbytes if dropout else 0
    shallow,deep = (bytes_held(depth, True, dropout) for depth in (2, 8))
    stored_shallow,stored_deep = (bytes_held(depth, False, dropout) for depth in (2, 8))
    assert deep<=shallow+rng_states
    assert stored_deep>3.5*stored_shallow
    assert shallow<stored_shallow/5

# Processes

@pytest.fixture(scope='module')
def processes(tmp_path_factory):
    "Results of the job on two processes: [rank][reversible] = one batch, two batches, the first of the two"
    folder = tmp_path_factory.mktemp('gradients')
    status,_,err = forks.run_in_two([job.__file__, folder])
    assert status==0, err[-3000:]
    return [torch.load(folder/f'{rank}.pt') for rank in range(2)]

def used(grads): return {k:g for k,g in grads.items() if not k.startswith('unused.')}
def unused(grads): return {k:g for k,g in grads.items() if k.startswith('unused.')}

@pytest.mark.parametrize('n', [1, 2], ids=['one batch', 'accumulated with no_sync'])
def test_two_processes_give_the_gradients_of_the_joint_batch(processes, n):
    "The joint batch has another size than its parts: its sums differ in their last digits"
    joint,_ = job.accumulate(job.Model(True), job.batches()[:n])
    for rank in processes:
        found = rank[True][n-1]
        assert alike(used(found), used(joint), 1e-3)
        assert not differing(found, rank[False][n-1])
        assert not differing(found, processes[0][True][n-1])
        assert not any(g is not None and g.any() for g in unused(found).values())

@pytest.fixture
def one_thread():
    "The number of threads that the processes have: others have other last bits"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def test_processes_do_not_synchronise_under_no_sync(processes, one_thread):
    for i,rank in enumerate(processes):
        one_batch,_,first_of_two = rank[True]
        alone,_ = job.accumulate(job.Model(True), [job.part_of(job.batches()[0], i, 2)])
        assert not differing(first_of_two, alone)
        assert not alike(used(first_of_two), used(one_batch), .1)

# Checkpoints and copies

@pytest.mark.parametrize('reentrant', [True, False], ids=['reentrant', 'not reentrant'])
def test_checkpoint_around(reentrant):
    reversible,stored = pair(dropout=.3)
    x = state()
    checkpointed = partial(checkpoint, reversible, use_reentrant=reentrant)
    assert not differing(trial(reversible, x, checkpointed), trial(stored, x))

def sandwich(stack):
    "A layer, a stack, another layer and dropout"
    return nn.Sequential(seeded_weights(nn.Linear(16, 16)), stack, seeded_weights(nn.Linear(16, 16), seed=1),
                         nn.Dropout(.3))

def call_sandwich(m, call, x):
    "The result of a sandwich, with the layers around the stack called by `call(layer, x)`"
    x = to_lattice(call(m[0], x), 12)
    return call(m[2:], m[1](x)[0])

@pytest.mark.parametrize('reentrant', [True, False], ids=['reentrant', 'not reentrant'])
def test_checkpoint_beside(reentrant):
    with_checkpoints,plain = map(sandwich, pair(dropout=.3))
    x = state()
    checkpointed = partial(call_sandwich, with_checkpoints, partial(checkpoint, use_reentrant=reentrant))
    directly = partial(call_sandwich, plain, lambda f, x: f(x))
    assert not differing(trial(with_checkpoints, x, checkpointed), trial(plain, x, directly))

def test_deepcopy_is_another_stack_with_the_same_gradients():
    m,_ = pair(dropout=.3, time_conditioning=True)
    x,t = state(),times()
    grads = trial(m, x, t=t)
    copy_of_used = deepcopy(m)
    assert not differing(trial(copy_of_used, x, t=t), grads)
    seeded_weights(copy_of_used, seed=1)
    assert not differing(trial(m, x, t=t), grads)
    assert not alike(trial(copy_of_used, x, t=t), grads, .1)

@pytest.mark.parametrize('source', ['reversible', 'stored'])
def test_state_dict_comes_back_without_pickle(source):
    both = pair(time_conditioning=True)
    m,other = both if source=='reversible' else reversed(both)
    file = io.BytesIO()
    torch.save(m.state_dict(), file)
    file.seek(0)
    seeded_weights(other, seed=1)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert set(m.state_dict())=={name for name,_ in m.named_parameters()}
    assert not differing(trial(m, state(), t=times()), trial(other, state(), t=times()))

# Compilers

@pytest.fixture
def dynamo():
    "A compiler without cached code"
    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()

def n_graphs(dynamo): return dynamo.utils.counters['stats']['unique_graphs']

def scaling(gm, inputs):
    "A compiler whose code without a graph has other last digits, like inductor's, here by a percent"
    scale = 1.02 if torch.is_grad_enabled() else 1.01
    def scaled(o): return o*scale if isinstance(o, torch.Tensor) and o.is_floating_point() else o
    return lambda *args: tuple(map(scaled, gm(*args)))

has_compiler = shutil.which('g++') or shutil.which('clang++')
wants_slow = os.environ.get('BIJDIFF_SLOW')
slow = [pytest.mark.skipif(not wants_slow, reason='set BIJDIFF_SLOW=1: compiles for a minute'),
        pytest.mark.skipif(not has_compiler, reason='no C++ compiler')]
backends = ['aot_eager', scaling, pytest.param('inductor', marks=slow)]

def inverse_errors(m, x, **context):
    "max |inverse(y) - x| for a result y that is computed with a graph, and for one without"
    with_graph = m(x, **context)[0].detach()
    with torch.no_grad():
        results = with_graph, m(x, **context)[0]
        return [(m.inverse(y, **context)[0]-x).abs().max().item() for y in results]

@pytest.mark.parametrize('backend', backends, ids=['aot_eager', 'scaling', 'inductor'])
def test_compiled_blocks(dynamo, backend):
    reversible,stored = pair(2)
    x = state()
    plain = trial(reversible, x)
    limit = 'recompile_limit' if hasattr(dynamo.config, 'recompile_limit') else 'cache_size_limit'
    with dynamo.config.patch({limit: 64}):
        for m in (reversible, stored): m.compile(backend=backend)
        found,want = trial(reversible, x),trial(stored, x)
        assert n_graphs(dynamo)>=2
        assert alike(found, plain, 1e-3)==(backend is not scaling), 'was compiled'
        assert not differing(found, want)
        assert inverse_errors(reversible, x)==[0., 0.]

def test_compiled_blocks_within_the_recompile_limit(dynamo):
    m,_ = pair(2)
    x = state()
    m.compile(backend=scaling)
    trial(m, x)
    assert inverse_errors(m, x)==[0., 0.]
    assert inverse_errors(m.eval(), x)==[0., 0.]

@pytest.mark.parametrize('reversible', [True, False], ids=['reversible', 'stored'])
def test_compiled_stack(dynamo, reversible):
    m = pair(2)[0 if reversible else 1]
    x = state()
    plain = trial(m, x)
    assert alike(trial(m, x, torch.compile(m, backend='aot_eager')), plain, 1e-3)
    assert n_graphs(dynamo)
