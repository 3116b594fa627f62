"""Mixtures of experts before judges that share no code with them: dense Jacobians, a slow mixture of loops over positions and experts, closed forms. The judges are put to the test themselves at the end."""
import gc, math
from copy import deepcopy
from functools import cache
from itertools import product
import pytest, torch
from hypothesis import example, given, settings, strategies as st
from torch import nn
from bijdiff.layers import sparse_moe
from bijdiff.layers.lattice import LatticeError, to_lattice
from bijdiff.layers.coupling import AdditiveCoupling
from bijdiff.layers.reversible import ChunkedUpdate
from bijdiff.layers.block import BijectiveTransformer
from bijdiff.layers.coupled_experts import CouplerMixer, expert_streams, ExpertEntry, join_streams
from bijdiff.layers.sparse_moe import balance_term, choose_experts, Router, SparseMixer, SparseNet, z_term
from bijdiff.layers.moe import BijectiveMoE, route_fractions
from test_bijections import close, judge_density, judge_roundtrip, judge_types, wild
from test_reversible import alike, differing, trial

MASK = torch.tensor([[True, True, False], [False]*3])
def mixture(n=3, d=4, heads=2, layers=1, std=.4, seed=0, **kw): return wild(BijectiveMoE(n, d, heads, layers, **kw), std, seed)
def pair(**kw):
    "A reversible mixture, and one with its weights that stores activations"
    a,b = mixture(reversible=True, **kw),mixture(reversible=False, **kw)
    assert not differing(dict(a.named_parameters()), dict(b.named_parameters()))
    return a,b
def normal(m, B=2, L=3, seed=1, dtype=torch.float64): return torch.randn(B, L, m.state_dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)
def state(m, B=2, L=9, seed=1): return to_lattice(normal(m, B, L, seed, torch.float32), m.lattice_bits or 12)
def routers(m): return [f for f in m.modules() if isinstance(f, Router)]
def routed(m): return [j for j,role in enumerate(m.roles) if role!='scales'] if m.k_active else []
def of_stream(i, d): return slice(i*d, (i+1)*d)
def equal(a, b, what): assert a.shape==b.shape and torch.equal(a, b), what

# A slow mixture

def normed(h, f): return (h-h.mean(-1, keepdim=True))/(h.var(-1, unbiased=False, keepdim=True)+f.eps).sqrt()*f.weight + f.bias
def gelu(v): return v*(1+torch.erf(v/math.sqrt(2)))/2
def mlp(net, v):
    *hidden,last = [f for f in net if isinstance(f, nn.Linear)]
    for f in hidden: v = gelu(f.weight@v+f.bias)
    return last.weight@v + last.bias

def slow_gates(r, h, mask):
    "Gates of a router, 0 for those that do not act, from sorted lists"
    gates = torch.zeros(*h.shape[:2], r.logits.out_features, dtype=h.dtype)
    for b,l in product(*map(range, h.shape[:2])):
        z = [w@normed(h[b,l], r.norm) for w in r.logits.weight]
        for i in sorted(range(len(z)), key=lambda i: (-z[i].item(), i))[:r.k] if mask is None or mask[b,l] else []: gates[b,l,i] = 2/(1+(-z[i]).exp())
    return gates

def slow_experts(f, h, gates, mask, cond):
    "Every expert at every position, and then the gates"
    out,d = torch.zeros_like(h),h.shape[-1]//len(f.mixer.experts)
    for i,(mixer,net) in enumerate(zip(f.mixer.experts, f.pointwise.experts)):
        a,u = mixer(h[...,of_stream(i, d)], mask=mask, cond=cond)
        for b,l in product(*map(range, h.shape[:2])): out[b,l,of_stream(i, d)] = gates[b,l,i]*(a[b,l]+mlp(net, u[b,l]))
    return out

def slow_coupler(f, h, gates, mask, cond):
    "The message that the acting experts write, and what they read from it; gates stay as they are for a dense one"
    first,last = [w for w in f.pointwise.modules() if isinstance(w, nn.Linear)]
    n,out = gates.shape[-1],torch.zeros(*h.shape[:2], last.out_features, dtype=h.dtype)
    d,parts = h.shape[-1]//n,out.shape[-1]//h.shape[-1]                                     # two parts for an affine one: log-scales and shifts
    for b,l in product(*map(range, h.shape[:2])):
        message,acting = first.bias,[i for i in range(n) if gates[b,l,i]>0]
        for i in acting:
            v = normed(h[b,l,of_stream(i, d)], f.mixer.norms[i].norm)
            if cond is not None:
                scale,shift = f.mixer.norms[i].to_scale_shift(cond[b]).split(d)
                v = v*(1+scale) + shift
            message = message + first.weight[:,of_stream(i, d)]@v
        for i,s in product(acting, range(parts)):
            at = of_stream(s*n+i, d)
            out[b,l,at] = gates[b,l,i]*(last.weight[at]@gelu(message)+last.bias[at])
    return out

def slow(m, x, mask=None, t=None, back=False):
    "The whole mixture off the lattice, there or back: state, log-determinant, and gates by number"
    half,cond,logdet,found = m.n_experts*m.d_model,None if t is None else m.time(t),torch.zeros(len(x), dtype=x.dtype),{}
    a,b = x[...,:half],x[...,half:]
    for j in range(len(m.layers))[::-1 if back else 1]:
        f,h = m.layers[j].f,a if back else b
        on = torch.ones(*h.shape[:2], m.n_experts, dtype=h.dtype)
        if j in routed(m): on = found[j] = slow_gates(f.mixer.router, h, mask)
        u = (slow_coupler if m.roles[j]=='coupler' else slow_experts)(f, h, on, mask, cond)
        if mask is not None: u = u*mask[...,None]
        s,u = (2*torch.tanh(u[...,:half]/2), u[...,half:]) if u.shape[-1]==2*half else (0*u, u)
        logdet = logdet + (-s if back else s).sum((1, 2))
        a,b = ((b-u)*(-s).exp(), a) if back else (b, a*s.exp()+u)
    return torch.cat([a, b], -1), logdet, found

def judge_slow(m, x, **ctx):
    "The same result, log-determinant, choices and gradients as the slow mixture, in both directions"
    for back,f in ((False, m), (True, m.inverse)):
        routes,leaves = {},[x.clone().requires_grad_(), *m.parameters()]
        y,logdet = f(leaves[0], **ctx, **(dict(routes=routes) if m.k_active else {}))
        want,dets,gates = slow(m, leaves[0], back=back, **ctx)
        close(y, want, 1e-9, 'state'); close(logdet, dets, 1e-9, 'log-determinant')
        assert sorted(routes)==routed(m)==sorted(gates), 'every router is in routes'
        for j in routes: equal(routes[j], gates[j]>0, 'choices')
        grads = [torch.autograd.grad(y.sin().sum()+d.sum(), leaves, allow_unused=True) for y,d in ((y, logdet), (want, dets))]
        for a,b,p in zip(*grads, leaves): close(*(torch.zeros_like(p) if g is None else g for g in (a, b)), 1e-9, 'gradients')

SLOW = {f'{n}-{couple}-{k or "dense"}{"-"+coupler if coupler!="additive" else ""}':dict(n=n, couple=couple, k_active=k, coupler=coupler)
        for n,couple,k,coupler in [(2, 'final', None, 'additive'), (3, 'every', None, 'affine'), (2, 'final', 1, 'additive'), (3, 'final', 2, 'additive'), (4, 'every', 1, 'additive'), (4, 'every', 3, 'additive'), (3, 'every', 3, 'additive')]}
@pytest.mark.parametrize('name', SLOW)
def test_slow_mixture(name):
    m = mixture(layers=2, reversible=False, **SLOW[name]).double().eval()
    judge_slow(m, normal(m, 1, 3)); judge_slow(m, normal(m), mask=MASK)

@pytest.mark.parametrize('k', [None, 1, 2])
def test_slow_mixture_with_everything(k):
    m = mixture(k_active=k, time_conditioning=True, enable_multiscale=True, segment_length=2, coupler_dim=7, coupling_depth=3, local_window=3).double().eval()
    judge_slow(m, normal(m, 2, 4), t=torch.tensor([.2, .9]), mask=torch.tensor([[True]*3+[False], [False]+[True]*3]))

def test_roles():
    roles = lambda *a, **kw: ''.join(r[0] for r in BijectiveMoE(2, 4, 2, *a, **kw).roles)
    assert roles(3)=='bbbcc' and roles(2, couple='every')=='bccbcc' and roles(2, enable_multiscale=True)=='sssbsssbcc'

# Bijection

# name: keywords, and what the mixture is conditioned on
CASES = {f'{n}-{couple}-{k or "dense"}':(dict(n=n, couple=couple, k_active=k, layers=1+(couple=='every')), '') for n,couple,k in product([2, 3, 4], ['final', 'every'], [None, 1, 2])} | {
    'affine-final':(dict(n=2, coupler='affine'), ''), 'affine-every':(dict(n=2, coupler='affine', couple='every', layers=2), 'mask t'),
    'mask':(dict(), 'mask'), 'mask-sparse':(dict(k_active=2), 'mask'), 'time':(dict(n=2), 't'), 'time-sparse':(dict(k_active=1), 't'),
    'scales':(dict(n=2, enable_multiscale=True, segment_length=2), ''), 'scales-sparse':(dict(n=2, enable_multiscale=True, segment_length=2, k_active=1), 'mask t'),
    'reversible':(dict(n=2, reversible=True), ''), 'reversible-sparse':(dict(n=2, reversible=True, k_active=1), 'mask'),
    'reversible-affine':(dict(n=2, reversible=True, coupler='affine'), 't')}
def case(name):
    kw,how = CASES[name]
    m = mixture(**{'reversible':False, 'd':2, 'heads':1, **kw}, time_conditioning='t' in how.split()).double().eval()
    return m, normal(m), ({'mask':MASK} if 'mask' in how else {}) | ({'t':torch.tensor([.2, .9])} if 't' in how.split() else {})

@pytest.mark.parametrize('name', CASES)
def test_bijection(name):
    m,x,ctx = case(name)
    hows = ('autograd',) if m.reversible else ('jacrev', 'finite') if name in ('2-every-dense', 'affine-final') else ('jacrev',)      # torch.func does not see through the nodes
    some = slice(2 if hows==('jacrev',) else 1)                                                      # the others are slow
    judge_density(m, x[some], hows, **{k:v[some] for k,v in ctx.items()}); judge_roundtrip(m, x, **ctx)
    if not name[0].isdigit(): judge_types(m, x, **ctx)

@pytest.mark.parametrize('n,k', [(2, 1), (3, 2)])
def test_other_derivatives_with_routes_kept(n, k):
    m,routes = mixture(n, 2, 1, k_active=k, reversible=False).double().eval(),{}
    x = normal(m, 1, 2)
    m(x, routes=routes)
    judge_density(m, x, ('jacfwd', 'finite'), routes=routes)                   # finite differences across a change of choice mean nothing

def test_log_determinant_is_zero_unless_affine():
    for kw in (dict(), dict(k_active=1), dict(coupler='affine')):
        m = mixture(**kw)
        assert m(state(m))[1].any()==m.inverse(state(m))[1].any()==('coupler' in kw)

# The lattice

@torch.no_grad()
def judge_exact(m, x, bf16=False, both=True, **ctx):
    "There and back, and back and there, to the last bit, on the grid, padding as it was, and the same choices"
    def run(f, x):
        routes = {}
        with torch.autocast('cpu', torch.bfloat16, enabled=bf16): return f(x, **ctx, **(dict(routes=routes) if m.k_active else {}))[0],routes
    y,there = run(m, x)
    back,again = run(m.inverse, y)
    assert y.dtype==back.dtype==x.dtype and not y.isnan().any()
    equal((y*2.**m.lattice_bits).round(), y*2.**m.lattice_bits, 'on the grid')
    equal(back, x, 'inverse after forward')
    if both: equal(run(m, run(m.inverse, x)[0])[0], x, 'forward after inverse')
    assert sorted(there)==sorted(again)==routed(m), 'every router is in routes'
    for j in there: equal(there[j], again[j], 'the inverse makes the choices of the forward pass')
    if 'mask' in ctx: equal(y[~ctx['mask']], x.roll(x.shape[-1]//2*(len(m.layers)%2), -1)[~ctx['mask']], 'padding passes through')
    return y

@pytest.mark.parametrize('n,couple,k', product([2, 4, 8], ['final', 'every'], [None, 1, 2]))
def test_inverse_of_eight_wild_layers(n, couple, k):
    m = mixture(n, 8, 2, 8, couple=couple, k_active=k, lattice_bits=12).eval()
    for bf16 in (False, True): assert (judge_exact(m, state(m, 2, 7), bf16, both=False)!=state(m, 2, 7)).float().mean()>.3

@settings(max_examples=15, deadline=None)
@given(n=st.integers(2, 5), k=st.sampled_from([None, 1, 2]), half_d=st.integers(1, 5), heads=st.integers(1, 2), layers=st.integers(1, 2), couple=st.sampled_from(['final', 'every']),
       scales=st.booleans(), window=st.sampled_from([0, 1, 7]), bits=st.integers(3, 12),
       B=st.integers(1, 4), L=st.integers(1, 24), min_chunk_rows=st.sampled_from([4, 256]), masked=st.booleans(), timed=st.booleans(), bf16=st.booleans(), double=st.booleans(), seed=st.integers(0, 10**6))
@example(n=3, k=2, half_d=2, heads=2, layers=2, couple='every', scales=True, window=7, bits=12, B=4, L=24, min_chunk_rows=4, masked=True, timed=True, bf16=True, double=False, seed=0)
def test_inverse_is_exact_on_the_lattice(n, k, half_d, heads, layers, couple, scales, window, bits, B, L, min_chunk_rows, masked, timed, bf16, double, seed):
    dtype,bits = (torch.float64, bits+15) if double else (torch.float32, bits)
    m = mixture(n, 2*half_d*heads, heads, layers, .3, seed, couple=couple, k_active=k, lattice_bits=bits, enable_multiscale=scales, segment_length=3, local_window=window, time_conditioning=timed).to(dtype).eval()
    x = to_lattice(normal(m, B, L, seed, dtype), bits)
    ctx = (dict(mask=torch.rand(B, L)<torch.rand(B, 1)*1.5-.25) if masked else {}) | (dict(t=torch.rand(B)) if timed else {})           # some texts are padding only
    if masked: ctx['mask'][0,0] = True
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(ChunkedUpdate, 'min_chunk_rows', min_chunk_rows)                                                  # several portions, or one
        judge_exact(m, x, bf16 and not double, **ctx)

@pytest.mark.parametrize('n,d,B,L', [(2, 4, 5, 7), (3, 8, 8, 16), (4, 8, 3, 33)])
def test_dense_inverse_of_a_batch_in_another_order(n, d, B, L):
    m = mixture(n, d, 2, 4, couple='every', lattice_bits=12).eval()                                 # a sparse one has other last bits when rows change places, and so may a dense one in bfloat16 or in several portions
    x,perm = state(m, B, L),torch.randperm(B, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(): equal(m.inverse(m(x)[0][perm])[0], x[perm], 'another order')

@pytest.mark.parametrize('k', [None, 1])
def test_moved_to_the_lattice_and_off_it(k):
    m = mixture(layers=2, couple='every', k_active=k).eval()
    m.set_lattice(10)
    x = to_lattice(normal(m, dtype=torch.float32), 10)
    judge_exact(m, x)
    m.set_lattice(None)
    with torch.no_grad(): y,_ = m(x)
    assert not torch.equal((y*2**10).round(), y*2**10)

@pytest.mark.parametrize('k', [None, 2])
def test_what_stands_in_the_padding_does_not_matter(k):
    m,mask = mixture(layers=2, couple='every', k_active=k, enable_multiscale=True, segment_length=2).eval(),torch.arange(5)<torch.tensor([[5], [3]])
    x = normal(m, 2, 5, dtype=torch.float32)
    for f,junk in product((m, m.inverse), (1e3, float('nan'))):
        with torch.no_grad(): equal(f(torch.where(mask[...,None], x, junk), mask)[0][mask], f(x, mask)[0][mask], 'padding')

# Routes

@torch.no_grad()
def judge_routes(m, x, mask=None):
    "k experts at each position and none at padding; routes that are given are kept to; streams that were not chosen stay bit for bit"
    d,half,routes = m.d_model,m.n_experts*m.d_model,{}
    y,_ = m(x, mask, routes=routes)
    count = torch.full(x.shape[:2], m.k_active) if mask is None else m.k_active*mask.int()
    for c in routes.values(): equal(c.sum(-1).int(), count.int(), 'k experts')
    wrong = {j:c.roll(1, -1) for j,c in routes.items()}
    given = {j:c.clone() for j,c in wrong.items()}
    other,_ = m(x, mask, routes=given)
    assert sorted(given)==routed(m) and not torch.equal(other, y), 'wrong routes, another map'
    assert not torch.equal(m.inverse(y, mask, routes=given)[0], x) and not torch.equal(m.inverse(other, mask)[0], x), 'of which this is no inverse'
    equal(m.inverse(other, mask, routes=given)[0], x, 'the inverse of the other map')
    for j in wrong: equal(given[j], wrong[j], 'routes stay as they were given')
    some = {routed(m)[0]:wrong[routed(m)[0]]}
    equal(m.inverse(m(x, mask, routes=some)[0], mask, routes=dict(some))[0], x, 'some are given, the others made')
    assert sorted(some)==routed(m)
    for c,chosen in zip(m.layers, (wrong.get(j) for j in range(len(m.layers)))):                    # one coupling after another, in wrong routes
        z = c(x, mask=mask, **({} if chosen is None else dict(routes=given)))[0]
        for i in range(m.n_experts if chosen is not None else 0):
            on,new,old = chosen[...,i],z[...,half:][...,of_stream(i, d)],x[...,:half][...,of_stream(i, d)]
            equal(new[~on], old[~on], 'not chosen, not changed')
            assert (new!=old).any(-1)[on].all(), 'chosen, and changed'
        x = z
    equal(x, other, 'the couplings are the mixture')

@pytest.mark.parametrize('n,k,couple,scales', [(2, 1, 'final', False), (3, 2, 'every', False), (4, 1, 'every', True), (5, 3, 'final', False)])
def test_routes(n, k, couple, scales):
    m = mixture(n, layers=2, couple=couple, k_active=k, lattice_bits=12, enable_multiscale=scales).eval()
    judge_routes(m, state(m)); judge_routes(m, state(m), torch.arange(9)<torch.tensor([[9], [4]]))

def test_choices_are_made_in_full_precision():
    m = mixture(4, 16, layers=1, k_active=1, seed=3)
    x,plain,cast = normal(m, 4, 200, dtype=torch.float32),{},{}
    with torch.no_grad():
        m(x, routes=plain)
        with torch.autocast('cpu', torch.bfloat16): m(x, routes=cast)
    equal(plain[0], cast[0], 'autocast does not matter to a router')

def test_choose():
    for z,k in product(torch.randint(0, 3, (60, 5)).float(), range(1, 6)):                           # full of ties
        assert choose_experts(z, k).nonzero().flatten().tolist()==sorted(sorted(range(5), key=lambda i: (-z[i], i))[:k])

def test_shares():
    m,mask,routes = mixture(4, layers=2, k_active=2),torch.arange(9)<torch.tensor([[9], [4]]),{}
    m(state(m), mask, routes=routes)
    for shares,where in ((route_fractions(routes), [(b, l) for b in range(2) for l in range(9)]), (route_fractions(routes, mask), [(b, l) for b in range(2) for l in range(9) if mask[b,l]])):
        for j in routed(m): assert shares[j].tolist()==pytest.approx([sum(routes[j][b,l,i].item() for b,l in where)/len(where) for i in range(4)])

def free(m):
    "Routers without an opinion: gates of 1, whatever the state"
    for r in routers(m): nn.init.zeros_(r.logits.weight)
    return m

def test_a_sparse_expert_reads_every_position():
    m,x = free(mixture(3, k_active=1).double()),normal(mixture(3), 1, 4)[...,12:]
    chosen = torch.tensor([[[0, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]]).bool()
    J = torch.autograd.functional.jacobian(lambda h: m.layers[0].f(h, routes={0:chosen}), x)[0,:,:,0].unflatten(1, (3, 4)).unflatten(4, (3, 4)).abs().amax((2, 5))   # (position, expert) from (position, expert)
    for l,i,q,e in product(range(4), range(3), range(4), range(3)): assert (J[l,i,q,e]>0)==(i==e and chosen[0,l,i].item())

def test_a_sparse_coupler_joins_those_that_act():
    m,x = free(mixture(4, k_active=2).double()),normal(mixture(4), 1, 3)[...,16:]
    chosen = torch.tensor([[[0, 1, 0, 1], [1, 0, 1, 0], [1, 1, 0, 0]]]).bool()
    for j in (1, 2):
        J = torch.autograd.functional.jacobian(lambda h: m.layers[j].f(h, routes={j:chosen}), x)[0,:,:,0].unflatten(1, (4, 4)).unflatten(4, (4, 4)).abs().amax((2, 5))
        for l,i,q,e in product(range(3), range(4), range(3), range(4)): assert (J[l,i,q,e]>0)==(l==q and chosen[0,l,i].item() and chosen[0,l,e].item())

# Gradients

def judge_gradients(kw, B=2, L=9, bf16=False, min_chunk_rows=256, masked=False, timed=False, train=True, seed=0):
    "The bits of stored activations"
    a,b = pair(lattice_bits=12, time_conditioning=timed, seed=seed, **kw)
    x = state(a, B, L, seed)
    ctx = (dict(mask=torch.rand(B, L)<torch.rand(B, 1)*1.5-.25) if masked else {}) | (dict(t=torch.rand(B)) if timed else {})
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(ChunkedUpdate, 'min_chunk_rows', min_chunk_rows)
        got,want = (trial(m.train(train), x, bf16=bf16, **ctx) for m in (a, b))
    assert not differing(got, want), 'the same bits'
    assert masked or kw.get('dropout') or all(g is not None and g.any() for n,g in got.items() if kw.get('k_active') is None or 'router' in n or n=='x'), 'something for everyone'

@settings(max_examples=8, deadline=None)
@given(n=st.integers(2, 3), k=st.sampled_from([None, 1, 2]), d=st.sampled_from([4, 8]), layers=st.integers(1, 2), couple=st.sampled_from(['final', 'every']),
       scales=st.booleans(), dropout=st.sampled_from([0., .3]), terms=st.sampled_from([(0., 0.), (.3, 0.), (0., .1), (.3, .1)]),
       B=st.integers(1, 3), L=st.integers(2, 16), bf16=st.booleans(), min_chunk_rows=st.sampled_from([4, 256]), masked=st.booleans(), timed=st.booleans(), train=st.booleans(), seed=st.integers(0, 10**6))
@example(n=3, k=2, d=4, layers=2, couple='every', scales=True, dropout=.3, terms=(.3, .1), B=3, L=16, bf16=False, min_chunk_rows=4, masked=True, timed=True, train=True, seed=0)
@example(n=4, k=1, d=8, layers=2, couple='final', scales=False, dropout=.3, terms=(.3, .1), B=3, L=16, bf16=True, min_chunk_rows=4, masked=True, timed=True, train=True, seed=1)
@example(n=2, k=None, d=8, layers=2, couple='every', scales=True, dropout=.3, terms=(0., 0.), B=3, L=16, bf16=True, min_chunk_rows=4, masked=True, timed=True, train=True, seed=2)
def test_gradients_are_those_of_stored_activations(n, k, d, layers, couple, scales, dropout, terms, B, L, bf16, min_chunk_rows, masked, timed, train, seed):
    kw = {} if k is None else dict(k_active=k, balance=terms[0], z_loss=terms[1])
    judge_gradients(dict(n=n, d=d, layers=layers, couple=couple, enable_multiscale=scales, segment_length=3, dropout=dropout, **kw), B, L, bf16, min_chunk_rows, masked, timed, train, seed)

def test_gradients_with_affine_couplers():
    a,b = pair(layers=4, coupler='affine', dropout=.3)
    x = normal(a, 2, 9, dtype=torch.float32)
    assert alike(trial(a, x), trial(b, x), 1e-2)                                                    # off the lattice, rebuilt states are a little different

@pytest.mark.parametrize('k', [None, 2])
def test_a_graph_does_not_matter(k):
    a,b = pair(layers=2, couple='every', k_active=k)
    x = normal(a, 2, 9, dtype=torch.float32)
    for bf16 in (False, True):
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=bf16): want,_ = a(x)
        for m in (a, b): equal(trial(m, x, bf16=bf16)['y'], want, 'the bits of a call without gradients')

@pytest.mark.parametrize('reversible', [True, False], ids=['reversible', 'stored'])
def test_an_idle_expert_has_gradients_of_zero(reversible):
    m = mixture(layers=2, k_active=1, reversible=reversible)
    got = trial(m, normal(m, dtype=torch.float32), routes={j:torch.tensor([True, False, False]).expand(2, 3, 3) for j in routed(m)})
    assert all(g is not None and g.isfinite().all() for g in got.values())                          # None would stop training on several processes
    assert all(got[n].any()==('.experts.0.' in n) for n in got if '.experts.' in n and n.endswith(('out.weight', 'pointwise.experts.0.0.weight', 'pointwise.experts.1.0.weight')))

def torn(m):
    "Routers that last bits decide: what is computed again is chosen otherwise"
    g = torch.Generator().manual_seed(3)
    for r in routers(m): r.logits.weight.data = r.logits.weight.data[:1] + 1e-7*torch.randn(r.logits.weight.shape, generator=g)
    return m

def judge_kept_choices(seed=0):
    "Off the lattice, where states come back a little different, the backward pass goes where the forward pass went"
    a,b = (torn(m) for m in pair(layers=3, k_active=1, couple='every', seed=seed))
    x,routes = normal(a, 4, 24, dtype=torch.float32),{}
    got,want = trial(a, x, routes=routes),trial(b, x)
    equal(got['y'], want['y'], 'result')
    assert alike(got, want, 1e-2), 'gradients'
    found = {}
    with torch.no_grad(): a(x, routes=found)
    assert sorted(routes)==routed(a)
    for j in found: equal(routes[j], found[j], 'choices of the forward pass')

@pytest.mark.parametrize('seed', [0, 1])
def test_backward_off_the_lattice_keeps_to_the_choices(seed): judge_kept_choices(seed)

@pytest.mark.parametrize('reversible', [True, False], ids=['reversible', 'stored'])
def test_a_call_does_not_change_the_choices_of_another(reversible):
    m = mixture(layers=2, k_active=1, reversible=reversible, lattice_bits=12)
    x,o = state(m),state(m, seed=2)
    def both(routes, other):
        m.zero_grad()
        y = m(x, routes=routes)[0]
        kept = dict(routes)
        other.clear()
        z = m(o, routes=other)[0]
        (y.sin().sum()+z.sin().sum()).backward()
        return {n:p.grad.clone() for n,p in m.named_parameters()} | {f'choice {j}':c for j,c in kept.items()}
    routes = {}
    assert not differing(both(routes, routes), both({}, {}))                                         # the same dictionary, used again before the backward pass

@pytest.mark.parametrize('bits', [None, 12])
def test_choices_are_made_once(bits, monkeypatch):
    calls = []
    monkeypatch.setattr(sparse_moe, 'choose_experts', lambda z, k: calls.append(k) or choose_experts(z, k))
    m = mixture(layers=3, k_active=2, lattice_bits=bits)
    trial(m, state(m))
    assert calls==[2]*len(routers(m))==[2]*5

# Memory

def bytes_held(reversible, layers, B=4, L=32, **kw):
    "Bytes that a forward pass leaves behind for the backward pass: saved by autograd, or held by any Python object"
    m,found = mixture(2, 16, 2, layers, std=.1, lattice_bits=12, reversible=reversible, **kw),{}
    x = state(m, B, L).requires_grad_()
    def note(t): found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(); return t
    gc.freeze()                                                                       # what is here already is not looked at
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t): y,_ = m(x)
    gc.collect()
    for o in gc.get_objects():
        if type(o) in (torch.Tensor, nn.Parameter) and o.device.type=='cpu': note(o)
    gc.unfreeze()
    before = {t.untyped_storage().data_ptr() for t in (x, *m.parameters())}
    assert y.requires_grad
    return sum(n for ptr,n in found.items() if ptr not in before), 2*B*L*len(routers(m))            # and the bytes of its routes

@pytest.mark.parametrize('kw', [dict(), dict(couple='every'), dict(k_active=1), dict(k_active=1, couple='every', balance=.1)], ids=['dense', 'dense every', 'sparse', 'sparse every'])
def test_memory_does_not_grow_with_depth(kw):
    (few,routes),(many,more) = (bytes_held(True, n, **kw) for n in (2, 6))
    (stored,_),(much,_) = (bytes_held(False, n, **kw) for n in (2, 6))
    assert many-few<=more-routes and much>2.2*stored and few<stored/3
    assert ('k_active' in kw)==(more>routes)

# Balance

def slow_terms(z, chosen):
    "Balance and z-term of a list of positions, as lists of numbers"
    real = [(v, c) for v,c in zip(z.flatten(0, -2), chosen.flatten(0, -2)) if c.any()]
    n,total = z.shape[-1],sum(c.sum().item() for _,c in real)
    share = [sum(c[i].item() for _,c in real)/total for i in range(n)]
    prob = [sum(v[i].exp()/v.exp().sum() for v,_ in real)/len(real) for i in range(n)]
    return n*sum(f*p for f,p in zip(share, prob)), sum(v.exp().sum().log()**2 for v,_ in real)/len(real)

@pytest.mark.parametrize('k', [1, 2, 4])
def test_terms_have_their_closed_forms(k):
    z = torch.randn(2, 7, 4, dtype=torch.float64)
    for chosen in (choose_experts(z, k), choose_experts(z, k)&(torch.arange(7)<torch.tensor([[7], [3]]))[...,None]):
        for got,want in zip((balance_term(z, chosen), z_term(z, chosen)), slow_terms(z, chosen)): close(got, want, 1e-12, 'term')
    even,one = (torch.arange(28).view(-1, 1)%4==torch.arange(4))[:,None],torch.tensor([True, False, False, False]).expand(28, 1, 4)
    assert balance_term(0*z.flatten(0, 1), even[:14,0]).item()==pytest.approx(1) and balance_term(50.*one, one).item()==pytest.approx(4) and z_term(torch.full((3, 4), 2.), one[:3,0]).item()==pytest.approx((2+math.log(4))**2)
    nobody = torch.zeros(2, 7, 4).bool()
    for f in (balance_term, z_term):
        z.requires_grad_()
        assert f(z, nobody).item()==0 and not torch.autograd.grad(f(z, nobody), z)[0].any()         # a batch of padding

def judge_balance(reversible=False, masked=True, balance=.3, z_loss=.1, k=1):
    "The gradients of a loss that has the terms in it, without a trace of them in the result"
    kw = dict(n=3, layers=2, k_active=k, couple='every', reversible=reversible)
    (m,plain),mask = (mixture(**kw, **w).double() for w in (dict(balance=balance, z_loss=z_loss), {})),torch.arange(5)<torch.tensor([[5], [3]]) if masked else None
    x,routes,seen = normal(m, 2, 5),{},{}
    got = trial(m, x, mask=mask)
    for r in routers(plain): r.logits.register_forward_hook(lambda s, i, z, j=r.number: seen.update({j:z}))
    plain.reversible = False
    leaf = x.clone().requires_grad_()
    y,_ = plain(leaf, mask, routes=routes)
    equal(got['y'], y.detach(), 'the result does not know of the terms')
    terms = [slow_terms(seen[j], routes[j]) for j in routed(m)]
    (y.sin().sum() + sum(balance*b+z_loss*z for b,z in terms)).backward()
    close(got['x'], leaf.grad, 1e-9, 'gradient of the input')
    for n,p in plain.named_parameters(): close(got[n], torch.zeros_like(p) if p.grad is None else p.grad, 1e-9, f'gradient of {n}')

@pytest.mark.parametrize('reversible', [True, False], ids=['reversible', 'stored'])
@pytest.mark.parametrize('masked,balance,z_loss,k', [(True, .3, .1, 1), (False, .3, .1, 2), (True, .3, 0., 2), (False, 0., .1, 1)])
def test_terms_reach_every_gradient(reversible, masked, balance, z_loss, k): judge_balance(reversible, masked, balance, z_loss, k)

@pytest.mark.parametrize('reversible', [True, False], ids=['reversible', 'stored'])
def test_no_terms_in_eval_mode_or_without_weights(reversible):
    kw = dict(k_active=1, layers=2, reversible=reversible, lattice_bits=12)
    a,b,c = mixture(balance=.3, z_loss=.1, **kw),mixture(**kw),mixture(balance=0., z_loss=0., **kw)
    x = state(a)
    assert not differing(trial(a.eval(), x), trial(b.eval(), x)) and not differing(trial(b.train(), x), trial(c.train(), x))
    changed = set(differing(trial(a.train(), x), trial(b.train(), x)))
    assert 'y' not in changed and {n for n,_ in a.named_parameters() if n.endswith('logits.weight')}<=changed

def judge_evens_out(balance=1., steps=40):
    "Nearly all go to expert 0 at first, and in the end all get their share"
    m = mixture(3, k_active=1, balance=balance, std=.3, seed=2, reversible=False)
    for r in routers(m):
        nn.init.ones_(r.norm.weight); nn.init.ones_(r.norm.bias)
        r.logits.weight.data.mul_(.5)[0] += .3
    x,opt,first,last = normal(m, 4, 16, dtype=torch.float32),torch.optim.Adam(m.parameters(), 2e-2),{},{}
    for i in range(steps):
        routes = {}
        loss = (m(x, routes=routes)[0]-x.flip(-1)).square().mean()
        opt.zero_grad(); loss.backward(); opt.step()
        if i==0: first = route_fractions(routes)
    m(x, routes=last)
    assert all(s.argmax()==0 and s.max()>.9 for s in first.values()), 'one has it all'
    assert all(s.max()<.5 for s in route_fractions(last).values()), 'all have their share'
def test_balance_evens_out():
    judge_evens_out()
    with pytest.raises(AssertionError, match='all have their share'): judge_evens_out(0.)

# Experts

def test_streams_are_taken_apart_and_put_together():
    for n,d in product((2, 3), (1, 4)):
        x = torch.randn(2, 3, 2*n*d)
        s = expert_streams(x, n)
        assert s.shape==(2, 3, n, 2*d)
        for i in range(n): equal(s[:,:,i], torch.cat([x[...,of_stream(i, d)], x[...,n*d:][...,of_stream(i, d)]], -1), 'first and second stream of an expert')
        equal(join_streams(s), x, 'and back')

@pytest.mark.parametrize('bits', [None, 12])
def test_entry_copies_the_state(bits):
    entry,h = wild(ExpertEntry(3, 2, bits)),to_lattice(torch.randn(2, 5, 4), 12).requires_grad_()
    x,w = entry(h),torch.randn(2, 5, 12)
    move = entry.offset.detach() if bits is None else (entry.offset.detach()*2**bits).round()/2**bits
    for i,j in product(range(3), range(4)): equal(x[...,(j//2)*6+2*i+j%2].detach(), (h[...,j]+move[i,j]).detach(), 'a copy of its own')
    (x*w).sum().backward()
    for i,j in product(range(3), range(4)): assert entry.offset.grad[i,j].item()==pytest.approx(w[...,(j//2)*6+2*i+j%2].sum().item(), abs=1e-4)
    assert not nn.Parameter(ExpertEntry(2, 2).offset).any()

def uncoupled(m):
    "Experts with random weights behind couplers that say nothing yet"
    for c,r in zip(m.layers, m.roles):
        for p in c.f.pointwise.parameters() if r=='coupler' else (): nn.init.zeros_(p)
    return m

def influence(m, x):
    "Who depends on whom: the largest entry of the Jacobian from expert to expert, (n, n)"
    J = torch.autograd.functional.jacobian(lambda s: expert_streams(m(join_streams(s))[0], m.n_experts), expert_streams(x, m.n_experts))
    return J.abs().amax((0, 1, 3, 4, 5, 7))

@pytest.mark.parametrize('kw', [dict(), dict(layers=2, couple='every'), dict(enable_multiscale=True, segment_length=2)], ids=['final', 'every', 'scales'])
def test_only_couplers_connect_the_experts(kw):
    m = mixture(3, 2, 1, reversible=False, **kw).double()
    x = normal(m, 1)
    assert (influence(m, x)>0).all()
    uncoupled(m)
    J = influence(m, x)
    assert (J.diag()>0).all() and not (J-J.diag().diag()).any()
    for g,f in ((m, lambda e: e), (m.inverse, lambda e: e.inverse)):
        want = [f(m.expert(i))(s)[0] for i,s in enumerate(expert_streams(x, 3).unbind(-2))]
        close(g(x)[0], join_streams(torch.stack(want, -2)), 1e-12, 'the experts by themselves')

def test_an_affine_coupler_connects_too():
    m = mixture(3, 2, 1, reversible=False, coupler='affine').double()
    assert (influence(m, normal(m, 1))>0).all() and not (lambda J: J-J.diag().diag())(influence(uncoupled(m), normal(m, 1))).any()

def test_an_expert_shares_its_weights():
    m = mixture(3, layers=2, k_active=1, enable_multiscale=True, lattice_bits=12)
    mine = [{p.data_ptr() for p in m.expert(i).parameters()} for i in range(3)]
    assert not mine[0]&mine[1] and not mine[0]&mine[2] and not mine[1]&mine[2]
    assert set.union(*mine)=={p.data_ptr() for n,p in m.named_parameters() if '.experts.' in n}
    e,x = m.expert(1),to_lattice(torch.randn(2, 5, 8), 12)
    with torch.no_grad(): equal(e.inverse(e(x)[0])[0], x, 'on the lattice by itself')

@pytest.mark.parametrize('k', [None, 1])
def test_copies_and_files(k):
    m = mixture(layers=2, k_active=k, lattice_bits=12, dropout=.3)
    want = trial(m, state(m))
    twin,other = deepcopy(m),mixture(layers=2, k_active=k, lattice_bits=12, dropout=.3, seed=1)
    other.load_state_dict(m.state_dict())
    assert not differing(trial(twin, state(m)), want) and not differing(trial(other, state(m)), want)
    assert set(m.state_dict())=={n for n,_ in m.named_parameters()}

# What does not fit

@pytest.mark.parametrize('kw,error', [(dict(n_experts=1), 'n_experts is 1'), (dict(n_experts=0), 'n_experts is 0'), (dict(n_experts=-2), 'n_experts is -2'), (dict(n_experts=2.), 'n_experts is 2.0'), (dict(n_experts=True), 'n_experts is True'),
    (dict(k_active=4), 'k_active is 4; expected a whole number from 1 to n_experts=3'), (dict(k_active=0), 'k_active is 0'), (dict(k_active=True), 'k_active is True'), (dict(n_layers=0), 'n_layers is 0'), (dict(couple='first'), "couple is 'first'"),
    (dict(coupler='spline'), "coupler is 'spline'"), (dict(coupler='affine', lattice_bits=12), 'has no lattice'), (dict(coupler='affine', k_active=1), "expected coupler='additive'"),
    (dict(coupler_dim=0), 'coupler_dim is 0'), (dict(coupler_dim=2.5), 'coupler_dim is 2.5'), (dict(d_model=True), 'd_model is True'),
    (dict(attention='standard'), "attention is 'standard'"), (dict(ffn='standard'), "ffn is 'standard'"), (dict(balance=.1), 'no router'), (dict(z_loss=.1), 'no router'),
    (dict(k_active=1, balance=-1.), 'balance is -1.0'), (dict(k_active=1, z_loss=float('nan')), 'z_loss is nan'),
    (dict(n_heads=3), 'n_heads is 3'), (dict(segment_length=0, enable_multiscale=True), 'segment_length is 0'), (dict(local_window=2), 'local_window is 2')])
def test_mixtures_that_are_refused(kw, error):
    with pytest.raises(ValueError, match=error): BijectiveMoE(**{**dict(n_experts=3, d_model=4, n_heads=2), **kw})

@pytest.mark.parametrize('k', [None, 1])
def test_states_and_contexts_that_are_refused(k):
    m,timed = mixture(k_active=k, lattice_bits=12),mixture(k_active=k, time_conditioning=True)
    x = state(m)
    for f,g in ((m, timed), (m.inverse, timed.inverse)):
        for bad in (x[...,:8], x[0], torch.cat([x, x], -1)):
            with pytest.raises(ValueError, match=r'expected \(B, L, 24\), 6 streams of d_model=4'): f(bad)
        for bad in (x+2**-13, x.half(), x*float('nan')):
            with pytest.raises(LatticeError): f(bad)
        for kw,error in ((dict(mask=torch.ones(2, 8).bool()), 'mask is'), (dict(mask=torch.ones(2, 9)), 'mask is'), (dict(t=torch.rand(2)), 'without time_conditioning')):
            with pytest.raises(ValueError, match=error): f(x, **kw)
        for kw,error in ((dict(), 't is missing'), (dict(t=torch.rand(3)), 't has shape')):
            with pytest.raises(ValueError, match=error): g(x, **kw)
        routes = {}
        if k:
            m(x, routes=routes)
            for bad in (lambda c: c[:1], lambda c: c[...,:2], lambda c: c[:,1:]):
                with pytest.raises(ValueError, match=r'routes\[1\] has shape'): f(x, routes={**routes, 1:bad(routes[1])})
            for bad,error in (({3:routes[1]}, 'has a key 3'), ({'1':routes[1]}, "has a key '1'"), ({1:routes[1].int()}, r'routes\[1\] is torch.int32'), ({1:[True]}, r'routes\[1\] is list'), ([routes[1]], 'routes is a list')):
                with pytest.raises(ValueError, match=error): f(x, routes=bad)
        else:
            with pytest.raises(ValueError, match='all experts act'): f(x, routes=routes)
    for i in (-1, 3):
        with pytest.raises(ValueError, match=f'expert {i} is not there'): m.expert(i)
    with pytest.raises(ValueError, match='have no lattice'): mixture(coupler='affine').set_lattice(12)

def test_states_that_leave_the_lattice_are_refused():
    m = mixture(lattice_bits=12)
    nn.init.constant_(m.layers[1].f.pointwise[-1].bias, 2e3)
    with pytest.raises(LatticeError, match='leaves the lattice in layer 1'): m(state(m))

def test_weights_of_something_else_are_refused():
    single = BijectiveTransformer(2, 4, 2).state_dict()
    for m in (mixture(layers=2), mixture(layers=2, k_active=1), nn.Sequential(mixture())):
        with pytest.raises(ValueError, match='not of a mixture'): m.load_state_dict(single)
        with pytest.raises(ValueError, match='not of a mixture'): m.load_state_dict(single, strict=False)
    for a,b in ((mixture(), mixture(k_active=1)), (mixture(), mixture(2)), (mixture(), mixture(layers=2))):
        for m,o in ((a, b), (b, a)):
            with pytest.raises(RuntimeError): m.load_state_dict(o.state_dict())

# The judges before planted faults

def reads_active(mp, cls, of):
    "Something sees the half that is about to change: there, what it was; back, what it has become"
    held,step,uncouple,forward = {},AdditiveCoupling.step,AdditiveCoupling.uncouple,cls.forward
    mp.setattr(AdditiveCoupling, 'step', lambda s, x1, x2, **c: (held.update(h=x1), step(s, x1, x2, **c))[1])
    mp.setattr(AdditiveCoupling, 'uncouple', lambda s, y1, y2, **c: (held.update(h=y2), uncouple(s, y1, y2, **c))[1])
    mp.setattr(cls, 'forward', lambda s, h, *a, **kw: forward(s, of(h, held['h']), *a, **kw))

def without(cls, *names):
    "A method that does not get some of its keywords"
    def plant(mp, f=cls.forward): mp.setattr(cls, 'forward', lambda s, h, mask=None, routes=None, **kw: f(s, h, **{k:v for k,v in dict(mask=mask, routes=routes, **kw).items() if k not in names}))
    return plant

def forgetful(mp):
    inverse = BijectiveMoE.inverse
    mp.setattr(BijectiveMoE, 'inverse', lambda s, y, mask=None, t=None, routes=None: inverse(s, y, mask, t))

def ungated(mp):
    "The attention of experts that act is not multiplied by their gates"
    forward = SparseMixer.forward
    def fault(s, h, mask=None, routes=None, **ctx):
        a,u = forward(s, h, mask, routes, **ctx)
        each = u[...,-len(s.experts):].repeat_interleave(h.shape[-1]//len(s.experts), -1)
        return torch.where(each>0, a/each.clamp_min(1e-9), 0.), u
    mp.setattr(SparseMixer, 'forward', fault)

def ungated_net(mp):
    forward = SparseNet.forward
    mp.setattr(SparseNet, 'forward', lambda s, u: forward(s, torch.cat([u[...,:-len(s.experts)], (u[...,-len(s.experts):]>0).to(u)], -1)))

def narrow(mp):
    "An expert sees only what was dealt to it"
    act = SparseMixer._act
    mp.setattr(SparseMixer, '_act', lambda s, mixer, h, chosen, mask, ctx: act(s, mixer, h, chosen, chosen if mask is None else mask&chosen, ctx))

def full(mp):
    "An expert takes no more than half of the positions"
    rows = sparse_moe.chosen_rows
    mp.setattr(sparse_moe, 'chosen_rows', lambda chosen: tuple(t[:,:chosen.shape[1]//2] for t in rows(chosen)))

def talkative(mp):
    "All write into the message, whether they act or not"
    mp.setattr(sparse_moe.SparseCouplerNet, 'forward', lambda s, u, f=sparse_moe.SparseCouplerNet.forward: (lambda n: torch.where(u[...,-n:].repeat_interleave((u.shape[-1]-n)//n, -1)>0, f(s, torch.cat([u[...,:-n], u[...,-n:].clamp_min(1e-30)], -1)), 0.))(s.n_experts))

def shared(mp):
    "The caller's dictionary is the one that the backward pass reads"
    context = BijectiveMoE._context
    mp.setattr(BijectiveMoE, '_context', lambda s, x, mask, t, routes: {**context(s, x, mask, t, routes), 'routes':routes})

def detached(mp):
    forward = Router.forward
    mp.setattr(Router, 'forward', lambda s, h, *a: (lambda chosen, gates: (chosen, gates.detach()))(*forward(s, h, *a)))

def noisy(mp):
    "A router that is not sure, there or back"
    forward = Router.forward
    mp.setattr(Router, 'forward', lambda s, h, *a: forward(s, h+1e-1*torch.randn_like(h), *a))

class NoTerms:
    apply = staticmethod(lambda z, *a: z)

class AllPositions:
    "Terms that count padding"
    real = sparse_moe._AddGradient
    @classmethod
    def apply(cls, z, chosen, *w): return cls.real.apply(z, chosen|~chosen.any(-1, keepdim=True), *w)

def sparse_on_lattice(): return mixture(3, layers=2, couple='every', k_active=2, lattice_bits=12).eval()
def exact_sparse(): judge_exact(sparse_on_lattice(), state(sparse_on_lattice(), 2, 12))
def exact_dense(): judge_exact(mixture(lattice_bits=12).eval(), state(mixture()))
def density_dense(): (lambda m: judge_density(m, normal(m), ('jacrev',)))(mixture(2, 2, 1, reversible=False).double().eval())
def density_sparse(): (lambda m: judge_density(m, normal(m), ('jacrev',)))(mixture(2, 2, 1, k_active=1, reversible=False).double().eval())
def roundtrip_sparse(): (lambda m: judge_roundtrip(m, normal(m)))(mixture(k_active=1).double().eval())
def routes_kept(): judge_routes(sparse_on_lattice(), state(sparse_on_lattice()), torch.arange(9)<torch.tensor([[9], [4]]))
def slow_sparse(): (lambda m: judge_slow(m, normal(m, 2, 4), mask=torch.arange(4)<torch.tensor([[4], [2]])))(mixture(k_active=2, reversible=False).double().eval())
def gradients_sparse(): judge_gradients(dict(k_active=2, layers=2, balance=.3))
def balance_rebuilt(): judge_balance(True)
def calls_apart(): test_a_call_does_not_change_the_choices_of_another(True)
def sees_all(): test_a_sparse_expert_reads_every_position()

# fault: (how to plant it, judges that must refuse it)
FAULTS = {'router reads the active half':(lambda mp: reads_active(mp, Router, lambda h, active: active), [exact_sparse, routes_kept]),
    'router reads both halves':(lambda mp: reads_active(mp, Router, lambda h, active: h+.5*active), [exact_sparse, density_sparse, roundtrip_sparse]),
    'message reads the active half':(lambda mp: reads_active(mp, CouplerMixer, lambda h, active: h+.1*active), [exact_dense, exact_sparse, density_dense, roundtrip_sparse]),
    'router is not sure':(noisy, [exact_sparse, routes_kept, judge_kept_choices]),
    'inverse forgets the routes':(forgetful, [routes_kept]), 'router forgets the routes':(without(Router, 'routes'), [routes_kept, judge_kept_choices, slow_sparse]),
    'router does not know of padding':(without(Router, 'mask'), [routes_kept, slow_sparse]),
    'attention has no gate':(ungated, [slow_sparse]), 'MLPs have no gate':(ungated_net, [slow_sparse]), 'gates without a gradient':(detached, [slow_sparse, gradients_sparse]),
    'an expert has room for half':(full, [slow_sparse]), 'all write the message':(talkative, [slow_sparse]), 'calls share a dictionary':(shared, [calls_apart]),
    'an expert sees only its own':(narrow, [slow_sparse, sees_all]),
    'one expert too few':(lambda mp: mp.setattr(sparse_moe, 'choose_experts', lambda z, k: choose_experts(z, 1)), [routes_kept, slow_sparse]),
    'the worst are chosen':(lambda mp: mp.setattr(sparse_moe, 'choose_experts', lambda z, k: choose_experts(-z, k)), [slow_sparse]),
    'no terms':(lambda mp: mp.setattr(sparse_moe, '_AddGradient', NoTerms), [judge_balance, balance_rebuilt]), 'terms count padding':(lambda mp: mp.setattr(sparse_moe, '_AddGradient', AllPositions), [judge_balance]),
    'no balance':(lambda mp: mp.setattr(sparse_moe, 'balance_term', lambda z, c: z.sum()*0), [judge_balance]),
    'square forgotten':(lambda mp: mp.setattr(sparse_moe, 'z_term', lambda z, c: z[c.any(-1)].logsumexp(-1).mean()), [judge_balance])}
@cache
def accepts_what_is_honest(judge): judge(); return True

@pytest.mark.parametrize('fault,judge', [pytest.param(k, j, id=f'{k}-{j.__name__}') for k,(_,judges) in FAULTS.items() for j in judges])
def test_judges_refuse_a_fault(fault, judge, monkeypatch):
    assert accepts_what_is_honest(judge)
    FAULTS[fault][0](monkeypatch)
    with pytest.raises(AssertionError): judge()

@pytest.mark.parametrize('k', [None, 1])
def test_no_text_at_all_and_states_in_half_precision(k):
    m = mixture(k_active=k).eval()
    assert m(torch.zeros(0, 5, m.state_dim))[0].shape==(0, 5, m.state_dim)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): assert m(normal(m, 2, 5, dtype=torch.float32).bfloat16())[0].dtype==torch.bfloat16
