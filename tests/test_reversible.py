"""The reversible backward against stored activations, inside everything that PyTorch puts around a model. Equal means equal bits, unless it says otherwise."""
import gc, io, os, shutil, subprocess, sys
from copy import deepcopy
from pathlib import Path
import pytest, torch
from hypothesis import example, given, settings, strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from bijdiff.layers.lattice import to_lattice
from bijdiff.layers.reversible import ChunkedUpdate
from bijdiff.layers.block import BijectiveTransformer
import reversible_job as job

def wild(m, seed=0):
    "Random weights: fresh blocks add nothing"
    torch.manual_seed(seed)
    for p in m.parameters(): nn.init.normal_(p, std=.3)
    return m

def pair(n=3, d=8, heads=2, **kw):
    "A reversible stack, and one with its weights that stores activations"
    a,b = (BijectiveTransformer(n, d, heads, lattice_bits=12, reversible=r, **kw) for r in (True, False))
    b.load_state_dict(wild(a).state_dict())
    return a,b

def state(B=2, L=9, d=8, seed=1): return to_lattice(torch.randn(B, L, 2*d, generator=torch.Generator().manual_seed(seed)), 12)

def trial(m, x, call=None, bf16=False, **ctx):
    "Result and gradients of the input and of all parameters, by name, with dropout drawn from one seed"
    leaf = x.clone().requires_grad_()
    m.zero_grad(); torch.manual_seed(5)
    with torch.autocast('cpu', torch.bfloat16, enabled=bf16): y = (m if call is None else call)(leaf, **ctx)
    y = y[0] if isinstance(y, tuple) else y
    y.sin().sum().backward()
    return dict(y=y.detach(), x=leaf.grad) | {n:None if p.grad is None else p.grad.clone() for n,p in m.named_parameters()}

def differing(a, b):
    "Names of the results that are not the same bits"
    assert a.keys()==b.keys()
    return [n for n in a if (a[n] is None)!=(b[n] is None) or a[n] is not None and not torch.equal(a[n], b[n])]

def alike(a, b, tol=1e-4): return all((a[n] is b[n] is None) or (a[n]-b[n]).abs().max() <= tol*b[n].abs().max() for n in b)

@settings(max_examples=80, deadline=None)
@given(n=st.integers(1, 5), heads=st.sampled_from([1, 2]), d=st.sampled_from([2, 4, 10]), B=st.integers(1, 4), L=st.integers(1, 40), window=st.sampled_from([0, 3, 7]), dropout=st.sampled_from([0., .3]), min_chunk_rows=st.sampled_from([4, 256]),
       bf16=st.booleans(), masked=st.booleans(), timed=st.booleans(), ratio=st.sampled_from([1., .5, 0.]), train=st.booleans(), seed=st.integers(0, 10**6))
@example(n=3, heads=2, d=4, B=4, L=40, window=7, dropout=.3, min_chunk_rows=4, bf16=False, masked=True, timed=True, ratio=1., train=True, seed=0)
@example(n=4, heads=1, d=10, B=4, L=40, window=7, dropout=.3, min_chunk_rows=4, bf16=True, masked=True, timed=True, ratio=.5, train=True, seed=1)
def test_gradients_are_those_of_stored_activations(n, heads, d, B, L, window, dropout, min_chunk_rows, bf16, masked, timed, ratio, train, seed):
    a,b = pair(n, d*heads, heads, local_window=window, dropout=dropout, time_conditioning=timed, bijective_ratio=ratio)
    x = state(B, L, d*heads, seed)
    ctx = (dict(mask=torch.rand(B, L)<torch.rand(B, 1)*1.5-.25) if masked else {}) | (dict(t=torch.rand(B)) if timed else {})
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(ChunkedUpdate, 'min_chunk_rows', min_chunk_rows)                                                      # several portions, or one
        got,want = (trial(m.train(train), x, bf16=bf16, **ctx) for m in (a, b))
    assert not differing(got, want)
    assert masked or any(g is not None and g.any() for k,g in got.items() if 'blocks.0.' in k)

# Memory

def bytes_held(depth, reversible, dropout=0.):
    "Bytes that a forward pass leaves behind for the backward pass: saved by autograd, or held by any Python object"
    m,x,found = pair(depth, 16, dropout=dropout)[not reversible],state(4, 32, 16).requires_grad_(),{}
    def note(t): found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(); return t
    def live(): return [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter) and o.device.type=='cpu']
    gc.collect()
    before = {t.untyped_storage().data_ptr() for t in live()} | {p.untyped_storage().data_ptr() for p in m.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t): y,_ = m(x)
    gc.collect()
    for t in live(): note(t)
    assert y.requires_grad
    return sum(n for ptr,n in found.items() if ptr not in before)

@pytest.mark.parametrize('dropout', [0., .3])
def test_memory_does_not_grow_with_depth(dropout):
    held = {r:[bytes_held(depth, r, dropout) for depth in (2, 8)] for r in (True, False)}
    rng = 6*2*torch.get_rng_state().nbytes if dropout else 0                                          # the six more blocks note random states: one each, and one per portion
    assert held[True][1]<=held[True][0]+rng and held[False][1]>3.5*held[False][0]
    assert held[True][0]<held[False][0]/5

# Processes

@pytest.fixture(scope='module')
def processes(tmp_path_factory):
    "What the job found on two processes: [rank][reversible] = one batch, two batches, the first of the two"
    folder = tmp_path_factory.mktemp('gradients')
    res = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', job.__file__, str(folder)],
                         capture_output=True, text=True, timeout=300, env={**os.environ, 'OMP_NUM_THREADS':'1', 'CUDA_VISIBLE_DEVICES':''})
    assert res.returncode==0, res.stderr[-3000:]
    return [torch.load(folder/f'{rank}.pt') for rank in range(2)]

def used(grads): return {k:g for k,g in grads.items() if not k.startswith('unused.')}

@pytest.mark.parametrize('n', [1, 2], ids=['one batch', 'accumulated with no_sync'])
def test_two_processes_give_the_gradients_of_the_joint_batch(processes, n):
    want,_ = job.accumulate(job.Model(True), job.batches()[:n])
    for rank in processes:
        got = rank[True][n-1]
        assert alike(used(got), used(want), 1e-3)                                                      # another batch size: other sums
        assert not differing(got, rank[False][n-1]) and not differing(got, processes[0][True][n-1])
        assert not any(g is not None and g.any() for k,g in got.items() if k.startswith('unused.'))

@pytest.fixture
def one_thread():
    "As many threads as the processes have: other numbers of threads have other last bits"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def test_processes_do_not_meet_under_no_sync(processes, one_thread):
    for rank,share in zip(processes, zip(*(o.chunk(2) for o in job.batches()[0]))):
        alone,_ = job.accumulate(job.Model(True), [share])
        assert not differing(rank[True][2], alone) and not alike(used(rank[True][2]), used(rank[True][0]), .1)

# Checkpoints and copies

@pytest.mark.parametrize('reentrant', [True, False], ids=['reentrant', 'not reentrant'])
def test_checkpoint_around(reentrant):
    (a,b),x = pair(dropout=.3),state()
    assert not differing(trial(a, x, lambda x: checkpoint(a, x, use_reentrant=reentrant)), trial(b, x))

@pytest.mark.parametrize('reentrant', [True, False], ids=['reentrant', 'not reentrant'])
def test_checkpoint_beside(reentrant):
    def model(stack, keep):
        m = nn.Sequential(wild(nn.Linear(16, 16)), stack, wild(nn.Linear(16, 16), 1), nn.Dropout(.3))
        part = (lambda f, x: f(x)) if keep else (lambda f, x: checkpoint(f, x, use_reentrant=reentrant))
        return m, lambda x: part(m[2:], m[1](to_lattice(part(m[0], x), 12))[0])
    (a,b),x = pair(dropout=.3),state()
    m,run = model(a, False)
    assert not differing(trial(m, x, run), trial(*(lambda m, run: (m, x, run))(*model(b, True))))

def test_deepcopy_is_another_stack_with_the_same_gradients():
    (a,_),x,t = pair(dropout=.3, time_conditioning=True),state(),torch.tensor([.2, .7])
    want = trial(a, x, t=t)
    copy = deepcopy(a)                                                                                # of a stack that has been used
    assert not differing(trial(copy, x, t=t), want)
    wild(copy, 1)
    assert not differing(trial(a, x, t=t), want) and not alike(trial(copy, x, t=t), want, .1)

def test_state_dict_comes_back_without_pickle():
    for a,b in (pair(time_conditioning=True), pair(time_conditioning=True)[::-1]):
        file = io.BytesIO()
        torch.save(a.state_dict(), file); file.seek(0)
        b = wild(b, 1)
        b.load_state_dict(torch.load(file, weights_only=True))
        x,t = state(),torch.tensor([.2, .7])
        assert set(a.state_dict())=={n for n,_ in a.named_parameters()}
        assert not differing(trial(a, x, t=t), trial(b, x, t=t))

# Compilers

@pytest.fixture
def dynamo():
    "A compiler that has seen nothing yet"
    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()

def bending(gm, inputs):
    "A compiler whose code without a graph has other last digits, as inductor's has; only more so"
    scale = 1.02 if torch.is_grad_enabled() else 1.01
    return lambda *args: tuple(o*scale if isinstance(o, torch.Tensor) and o.is_floating_point() else o for o in gm(*args))

slow = [pytest.mark.skipif(not os.environ.get('BIJDIFF_SLOW'), reason='set BIJDIFF_SLOW=1: compiles for a minute'), pytest.mark.skipif(not (shutil.which('g++') or shutil.which('clang++')), reason='no C++ compiler')]
backends = pytest.mark.parametrize('backend', ['aot_eager', bending, pytest.param('inductor', marks=slow)], ids=['aot_eager', 'bending', 'inductor'])

def inverse_errors(m, x, **ctx):
    "Of a result computed with a graph, and of one without"
    y = m(x, **ctx)[0].detach()
    with torch.no_grad(): return [(m.inverse(o, **ctx)[0]-x).abs().max().item() for o in (y, m(x, **ctx)[0])]

@backends
def test_compiled_blocks(dynamo, backend):
    (a,b),x = pair(2),state()
    plain = trial(a, x)
    with dynamo.config.patch({'recompile_limit' if hasattr(dynamo.config, 'recompile_limit') else 'cache_size_limit':64}):
        for m in (a, b): m.compile(backend=backend)
        got,want = (trial(m, x) for m in (a, b))
        assert dynamo.utils.counters['stats']['unique_graphs']>=2 and alike(got, plain, 1e-3)==(backend is not bending)   # compiled, indeed
        assert not differing(got, want)
        assert inverse_errors(a, x)==[0., 0.]

def test_compiled_blocks_within_the_recompile_limit(dynamo):
    (a,_),x = pair(2),state()
    a.compile(backend=bending)
    trial(a, x)
    assert inverse_errors(a, x)==[0., 0.] and inverse_errors(a.eval(), x)==[0., 0.]

@pytest.mark.parametrize('reversible', [True, False], ids=['reversible', 'stored'])
def test_compiled_stack(dynamo, reversible):
    m,x = pair(2)[not reversible],state()
    want = trial(m, x)
    assert alike(trial(m, x, torch.compile(m, backend='aot_eager')), want, 1e-3) and dynamo.utils.counters['stats']['unique_graphs']
