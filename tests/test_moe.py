"""Mixtures of experts against judges that share no code with them.

The judges are dense Jacobians, a slow mixture of loops over positions and experts, and closed forms.
At the end they must reject planted faults."""
import gc
import math
import re
from copy import deepcopy
from functools import cache, partial
from itertools import product
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch import nn
from bijdiff.layers import sparse_moe
from bijdiff.layers.lattice import LatticeError, to_lattice
from bijdiff.layers.coupling import AdditiveCoupling
from bijdiff.layers.reversible import ChunkedUpdate
from bijdiff.layers.block import BijectiveTransformer
from bijdiff.layers.coupled_experts import CouplerMixer, expert_streams, ExpertEntry, join_streams
from bijdiff.layers.sparse_moe import balance_term, choose_experts, Router, SparseCouplerNet, SparseMixer
from bijdiff.layers.sparse_moe import SparseNet, z_term
from bijdiff.layers.moe import BijectiveMoE, route_fractions
from helpers import assert_close, assert_equal, assert_on_lattice, draw_weights, first_tokens
from helpers import plant_fault, random_context, storage_bytes
from test_bijections import judge_density, judge_roundtrip, judge_types
from test_reversible import alike, differing, trial

# Two tokens before padding, and padding alone
PADDED = torch.tensor([[True, True, False], [False]*3])
REVERSIBLE = pytest.mark.parametrize('reversible', [True, False], ids=['reversible', 'stored'])

def mixture(n=3, d=4, heads=2, layers=1, std=.4, seed=0, **kw):
    "A mixture with random weights"
    return draw_weights(BijectiveMoE(n, d, heads, layers, **kw), std, seed)

def double_mixture(*args, **kw):
    "A mixture with random weights in float64, without dropout"
    return mixture(*args, **kw).double().eval()

def pair(**kw):
    "A reversible mixture, and one with its weights that stores activations"
    a = mixture(reversible=True, **kw)
    b = mixture(reversible=False, **kw)
    assert not differing(dict(a.named_parameters()), dict(b.named_parameters()))
    return a,b

def normal_state(m, B=2, L=3, seed=1, dtype=torch.float64):
    "A normally distributed state of a mixture"
    return torch.randn(B, L, m.state_dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)

def float_state(m, B=2, L=3): return normal_state(m, B, L, dtype=torch.float32)
def lattice_state(m, B=2, L=9, seed=1):
    "A state on the lattice of a mixture, or on that of 12 bits"
    return to_lattice(normal_state(m, B, L, seed, torch.float32), m.lattice_bits or 12)

def routers(m): return [f for f in m.modules() if isinstance(f, Router)]
def router_numbers(m):
    "Numbers of the couplings with a router"
    return [j for j,role in enumerate(m.roles) if role!='scales'] if m.k_active else []

def stream(i, d):
    "Features of expert i in one half of a state"
    return slice(i*d, (i+1)*d)

def positions(h):
    "All pairs of example and position"
    return product(range(h.shape[0]), range(h.shape[1]))

def call(m, x, back=False, bf16=False, routes=None, **context):
    "State and log-determinant of a call in one direction; `routes` is for sparse mixtures only"
    if m.k_active: context['routes'] = routes
    f = m.inverse if back else m
    with torch.autocast('cpu', torch.bfloat16, enabled=bf16): return f(x, **context)

# A slow mixture

def normalise(h, norm):
    "LayerNorm: (h-mean)/sqrt(variance+eps) * weight + bias"
    variance = h.var(-1, unbiased=False, keepdim=True)
    return (h-h.mean(-1, keepdim=True))/(variance+norm.eps).sqrt()*norm.weight + norm.bias

def gelu(v):
    "v * Phi(v), with the normal distribution function Phi"
    return v*(1+torch.erf(v/math.sqrt(2)))/2

def linear_layers(m): return [f for f in m.modules() if isinstance(f, nn.Linear)]
def mlp(net, v):
    "An MLP with GELU, for one vector"
    *hidden,last = linear_layers(net)
    for f in hidden: v = gelu(f.weight@v+f.bias)
    return last.weight@v + last.bias

def best_experts(z, k):
    "Numbers of the k largest logits in a list, the first of equal ones"
    return sorted(range(len(z)), key=lambda i: (-z[i].item(), i))[:k]

def slow_gates(router, h, mask):
    "Gates 2*sigmoid(z_i), z = R normalise(h), for the k largest z_i, else 0, and 0 at padding"
    gates = torch.zeros(*h.shape[:2], router.logits.out_features, dtype=h.dtype)
    for b,l in positions(h):
        if mask is not None and not mask[b,l]: continue
        z = [w@normalise(h[b,l], router.norm) for w in router.logits.weight]
        for i in best_experts(z, router.k): gates[b,l,i] = 2/(1+(-z[i]).exp())
    return gates

def slow_experts(f, h, gates, mask, cond):
    "g_i * (update of expert i), with every expert computed at every position"
    out = torch.zeros_like(h)
    d = h.shape[-1]//len(f.mixer.experts)
    for i,(mixer,net) in enumerate(zip(f.mixer.experts, f.pointwise.experts)):
        a,u = mixer(h[...,stream(i, d)], mask=mask, cond=cond)
        for b,l in positions(h): out[b,l,stream(i, d)] = gates[b,l,i]*(a[b,l]+mlp(net, u[b,l]))
    return out

def slow_adaptive_norm(norm, v, cond):
    "normalise(v) * (1+scale) + shift, with scale and shift from the conditioning vector if there is one"
    v = normalise(v, norm.norm)
    if cond is None: return v
    scale,shift = norm.to_scale_shift(cond).chunk(2)
    return v*(1+scale) + shift

def slow_message(f, h, acting, cond):
    "b_1 + sum of W_1^(i) N_i(h^(i)) over the acting experts i, at one position"
    first,_ = linear_layers(f.pointwise)
    d = len(h)//len(f.mixer.norms)
    message = first.bias
    for i in acting:
        v = slow_adaptive_norm(f.mixer.norms[i], h[stream(i, d)], cond)
        message = message + first.weight[:,stream(i, d)]@v
    return message

def slow_coupler(f, h, gates, mask, cond):
    "g_i * (W_2 gelu(message)+b_2)^(i) for acting experts i; of affine couplers log-scales, then shifts"
    _,last = linear_layers(f.pointwise)
    out = torch.zeros(*h.shape[:2], last.out_features, dtype=h.dtype)
    n,width = gates.shape[-1],h.shape[-1]
    for b,l in positions(h):
        acting = [i for i in range(n) if gates[b,l,i]>0]
        message = slow_message(f, h[b,l], acting, None if cond is None else cond[b])
        for start,i in product(range(0, last.out_features, width), acting):
            at = slice(start+i*width//n, start+(i+1)*width//n)
            out[b,l,at] = gates[b,l,i]*(last.weight[at]@gelu(message)+last.bias[at])
    return out

def slow_coupling(m, j, h, mask, cond):
    "Log-scales and shifts of coupling j for its passive half h, and the gates of the experts"
    f = m.layers[j].f
    gates = torch.ones(*h.shape[:2], m.n_experts, dtype=h.dtype)
    if j in router_numbers(m): gates = slow_gates(f.mixer.router, h, mask)
    update = slow_coupler if m.roles[j]=='coupler' else slow_experts
    u = update(f, h, gates, mask, cond)
    if mask is not None: u = u*mask[...,None]
    if u.shape[-1]==h.shape[-1]: return 0*u, u, gates
    r,shift = u.chunk(2, -1)
    return 2*torch.tanh(r/2), shift, gates

def slow_mixture(m, x, mask=None, t=None, back=False):
    """State, log-determinant, and gates by number of the coupling

    Each coupling is (a, b) -> (b, a*exp(s(b))+u(b)), or the inverse."""
    a,b = x.chunk(2, -1)
    cond = None if t is None else m.time(t)
    logdet,found = torch.zeros(len(x), dtype=x.dtype),{}
    numbers = range(len(m.layers))
    for j in reversed(numbers) if back else numbers:
        s,u,gates = slow_coupling(m, j, a if back else b, mask, cond)
        if j in router_numbers(m): found[j] = gates
        logdet = logdet + (-s if back else s).sum((1, 2))
        a,b = ((b-u)*(-s).exp(), a) if back else (b, a*s.exp()+u)
    return torch.cat([a, b], -1), logdet, found

def gradients(y, logdet, leaves):
    "Gradients of sum(sin(y)) + sum(logdet), 0 for leaves that are not used"
    grads = torch.autograd.grad(y.sin().sum()+logdet.sum(), leaves, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g,p in zip(grads, leaves)]

def judge_slow_direction(m, x, back, **ctx):
    routes = {}
    leaves = [x.clone().requires_grad_(), *m.parameters()]
    y,logdet = call(m, leaves[0], back, routes=routes, **ctx)
    want_y,want_logdet,gates = slow_mixture(m, leaves[0], back=back, **ctx)
    assert_close(y, want_y, 1e-9, 'state')
    assert_close(logdet, want_logdet, 1e-9, 'log-determinant')
    assert sorted(routes)==router_numbers(m)==sorted(gates), 'every router is in routes'
    for j in routes: assert_equal(routes[j], gates[j]>0, 'choices')
    for got,want in zip(gradients(y, logdet, leaves), gradients(want_y, want_logdet, leaves)):
        assert_close(got, want, 1e-9, 'gradients')

def judge_slow(m, x, **ctx):
    "Results, log-determinants, choices and gradients of the slow mixture, in both directions"
    for back in (False, True): judge_slow_direction(m, x, back, **ctx)

SLOW = {
    '2-final-dense':         dict(n=2, couple='final'),
    '3-every-dense-affine':  dict(n=3, couple='every', coupler='affine'),
    '2-final-1':             dict(n=2, couple='final', k_active=1),
    '3-final-2':             dict(n=3, couple='final', k_active=2),
    '4-every-1':             dict(n=4, couple='every', k_active=1),
    '4-every-3':             dict(n=4, couple='every', k_active=3),
    '3-every-3':             dict(n=3, couple='every', k_active=3),
}
@pytest.mark.parametrize('name', SLOW)
def test_slow_mixture(name):
    m = double_mixture(layers=2, reversible=False, **SLOW[name])
    judge_slow(m, normal_state(m, 1, 3))
    judge_slow(m, normal_state(m), mask=PADDED)

@pytest.mark.parametrize('k', [None, 1, 2])
def test_slow_mixture_with_everything(k):
    scales = dict(enable_multiscale=True, segment_length=2)
    sizes = dict(coupler_dim=7, coupling_depth=3, local_window=3)
    m = double_mixture(k_active=k, time_conditioning=True, **scales, **sizes)
    mask = torch.tensor([[True]*3+[False], [False]+[True]*3])
    judge_slow(m, normal_state(m, 2, 4), t=torch.tensor([.2, .9]), mask=mask)

def initials_of_roles(*args, **kw):
    "Roles of the couplings of two experts, each by its first letter"
    return ''.join(role[0] for role in BijectiveMoE(2, 4, 2, *args, **kw).roles)

def test_roles():
    assert initials_of_roles(3)=='bbbcc'
    assert initials_of_roles(2, couple='every')=='bccbcc'
    assert initials_of_roles(2, enable_multiscale=True)=='sssbsssbcc'

# Bijection

SCALES = dict(enable_multiscale=True, segment_length=2)
SIZES = product([2, 3, 4], ['final', 'every'], [None, 1, 2])
PLAIN = {f'{n}-{couple}-{k or "dense"}': dict(n=n, couple=couple, k_active=k, layers=1+(couple=='every'))
         for n,couple,k in SIZES}
# Keywords, and the context in words
CASES = {name:(kw, '') for name,kw in PLAIN.items()} | {
    'affine-final':       (dict(n=2, coupler='affine'), ''),
    'affine-every':       (dict(n=2, coupler='affine', couple='every', layers=2), 'mask t'),
    'mask':               (dict(), 'mask'),
    'mask-sparse':        (dict(k_active=2), 'mask'),
    'time':               (dict(n=2), 't'),
    'time-sparse':        (dict(k_active=1), 't'),
    'scales':             (dict(n=2, **SCALES), ''),
    'scales-sparse':      (dict(n=2, k_active=1, **SCALES), 'mask t'),
    'reversible':         (dict(n=2, reversible=True), ''),
    'reversible-sparse':  (dict(n=2, reversible=True, k_active=1), 'mask'),
    'reversible-affine':  (dict(n=2, reversible=True, coupler='affine'), 't'),
}
def case(name):
    "Mixture, state and context of a case"
    kw,words = CASES[name]
    words = words.split()
    small = dict(d=2, heads=1, reversible=False)
    m = double_mixture(**(small|kw), time_conditioning='t' in words)
    context = dict(mask=PADDED, t=torch.tensor([.2, .9]))
    return m, normal_state(m), {k:v for k,v in context.items() if k in words}

def derivatives(name, m):
    "Ways to compute Jacobians: torch.func does not see through the nodes of the reversible backward"
    if m.reversible: return ('autograd',)
    return ('jacrev', 'finite') if name in ('2-every-dense', 'affine-final') else ('jacrev',)

@pytest.mark.parametrize('name', CASES)
def test_bijection(name):
    m,x,ctx = case(name)
    ways = derivatives(name, m)
    n = 2 if ways==('jacrev',) else 1 # The others are slow
    judge_density(m, x[:n], ways, **{k:v[:n] for k,v in ctx.items()})
    judge_roundtrip(m, x, **ctx)
    if name not in PLAIN: judge_types(m, x, **ctx)

@pytest.mark.parametrize('n,k', [(2, 1), (3, 2)])
def test_other_derivatives_with_given_routes(n, k):
    m = double_mixture(n, 2, 1, k_active=k, reversible=False)
    x,routes = normal_state(m, 1, 2),{}
    m(x, routes=routes)
    # without given routes, a finite difference may be taken across a change of choice
    judge_density(m, x, ('jacfwd', 'finite'), routes=routes)

@pytest.mark.parametrize('kw', [dict(), dict(k_active=1), dict(coupler='affine')])
def test_log_determinant_is_zero_unless_affine(kw):
    m = mixture(**kw)
    x = lattice_state(m)
    assert m(x)[1].any()==m.inverse(x)[1].any()==('coupler' in kw)

# The lattice

@torch.no_grad()
def call_with_routes(m, x, back=False, bf16=False, **ctx):
    "State of a call and the choices it made"
    routes = {}
    return call(m, x, back, bf16, routes, **ctx)[0],routes

def swapped(x, n):
    "A state whose halves have changed places n times"
    return x.roll(x.shape[-1]//2*(n%2), -1)

def judge_exact(m, x, bf16=False, both=True, **ctx):
    "Both round trips are exact to the last bit, on the lattice, with the same choices and padding as it was"
    y,routes = call_with_routes(m, x, False, bf16, **ctx)
    back,again = call_with_routes(m, y, True, bf16, **ctx)
    assert y.dtype==back.dtype==x.dtype and not y.isnan().any()
    assert_on_lattice(y, m.lattice_bits)
    assert_equal(back, x, 'inverse after forward')
    if both:
        z,_ = call_with_routes(m, x, True, bf16, **ctx)
        assert_equal(call_with_routes(m, z, False, bf16, **ctx)[0], x, 'forward after inverse')
    assert sorted(routes)==sorted(again)==router_numbers(m), 'every router is in routes'
    for j in routes: assert_equal(routes[j], again[j], 'the inverse makes the choices of the forward pass')
    if 'mask' in ctx:
        padding = ~ctx['mask']
        assert_equal(y[padding], swapped(x, len(m.layers))[padding], 'padding only changes halves')
    return y

@pytest.mark.parametrize('n,couple,k', product([2, 4, 8], ['final', 'every'], [None, 1, 2]))
def test_inverse_of_eight_layers_with_random_weights(n, couple, k):
    m = mixture(n, 8, 2, 8, couple=couple, k_active=k, lattice_bits=12).eval()
    x = lattice_state(m, 2, 7)
    for bf16 in (False, True):
        y = judge_exact(m, x, bf16, both=False)
        assert (y!=x).float().mean()>.3

LATTICE_MIXTURES = st.fixed_dictionaries(dict(
    n=st.integers(2, 5),
    k=st.sampled_from([None, 1, 2]),
    half_d_head=st.integers(1, 5),
    heads=st.integers(1, 2),
    layers=st.integers(1, 2),
    couple=st.sampled_from(['final', 'every']),
    scales=st.booleans(),
    window=st.sampled_from([0, 1, 7]),
    bits=st.integers(3, 12),
    masked=st.booleans(),
    timed=st.booleans(),
    bf16=st.booleans(),
    double=st.booleans(),
    min_chunk_rows=st.sampled_from([4, 256]), # Several chunks, or one
    B=st.integers(1, 4),
    L=st.integers(1, 24),
    seed=st.integers(0, 10**6),
))
LARGE_LATTICE_MIXTURE = dict(
    n=3, k=2, half_d_head=2, heads=2, layers=2, couple='every', scales=True, window=7, bits=12,
    masked=True, timed=True, bf16=True, double=False, min_chunk_rows=4, B=4, L=24, seed=0)

@settings(max_examples=15, deadline=None)
@given(LATTICE_MIXTURES)
@example(LARGE_LATTICE_MIXTURE)
def test_inverse_is_exact_on_the_lattice(o):
    dtype = torch.float64 if o['double'] else torch.float32
    bits = o['bits']+15*o['double']
    d = 2*o['half_d_head']*o['heads']
    m = mixture(o['n'], d, o['heads'], o['layers'], .3, o['seed'], couple=o['couple'], k_active=o['k'],
                lattice_bits=bits, enable_multiscale=o['scales'], segment_length=3,
                local_window=o['window'], time_conditioning=o['timed'])
    m = m.to(dtype).eval()
    x = to_lattice(normal_state(m, o['B'], o['L'], o['seed'], dtype), bits)
    ctx = random_context(o['B'], o['L'], o['masked'], o['timed'])
    if o['masked']: ctx['mask'][0,0] = True
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(ChunkedUpdate, 'min_chunk_rows', o['min_chunk_rows'])
        judge_exact(m, x, o['bf16'] and not o['double'], **ctx)

@pytest.mark.parametrize('n,d,B,L', [(2, 4, 5, 7), (3, 8, 8, 16), (4, 8, 3, 33)])
def test_dense_inverse_of_a_batch_in_another_order(n, d, B, L):
    """The last bits of a sparse mixture change with the order of the rows

    So may those of a dense one in bfloat16 or in several chunks."""
    m = mixture(n, d, 2, 4, couple='every', lattice_bits=12).eval()
    x = lattice_state(m, B, L)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(): assert_equal(m.inverse(m(x)[0][order])[0], x[order], 'another order')

@pytest.mark.parametrize('k', [None, 1])
def test_moved_to_the_lattice_and_off_it(k):
    m = mixture(layers=2, couple='every', k_active=k).eval()
    m.set_lattice(10)
    x = to_lattice(float_state(m), 10)
    judge_exact(m, x)
    m.set_lattice(None)
    with torch.no_grad(): y,_ = m(x)
    assert not torch.equal((y*2**10).round(), y*2**10)

@pytest.mark.parametrize('k', [None, 2])
def test_values_at_padding_do_not_matter(k):
    m = mixture(layers=2, couple='every', k_active=k, **SCALES).eval()
    x,mask = float_state(m, 2, 5),first_tokens(5, 5, 3)
    for f,junk in product((m, m.inverse), (1e3, float('nan'))):
        with torch.no_grad():
            other,_ = f(torch.where(mask[...,None], x, junk), mask)
            assert_equal(other[mask], f(x, mask)[0][mask], 'padding')

# Routes

def judge_number_of_experts(m, routes, mask, x):
    "k experts act at each token and none at padding"
    count = torch.full(x.shape[:2], m.k_active) if mask is None else m.k_active*mask.int()
    for chosen in routes.values(): assert_equal(chosen.sum(-1).int(), count.int(), 'k experts')

def judge_given_routes(m, x, y, mask, wrong):
    """Return the result for wrong routes

    They are used, not changed, and make another map with another inverse."""
    given = {j:c.clone() for j,c in wrong.items()}
    other,_ = m(x, mask, routes=given)
    assert sorted(given)==router_numbers(m) and not torch.equal(other, y), 'wrong routes, another map'
    assert not torch.equal(m.inverse(y, mask, routes=given)[0], x), 'not the inverse of the first map'
    assert not torch.equal(m.inverse(other, mask)[0], x), 'not the inverse of the other map'
    assert_equal(m.inverse(other, mask, routes=given)[0], x, 'the inverse of the other map')
    for j in wrong: assert_equal(given[j], wrong[j], 'given routes are not changed')
    return other

def judge_partly_given_routes(m, x, mask, wrong):
    "Routers whose choices are not given make them"
    first = router_numbers(m)[0]
    some = {first:wrong[first]}
    y,_ = m(x, mask, routes=some)
    assert sorted(some)==router_numbers(m)
    assert_equal(m.inverse(y, mask, routes=dict(some))[0], x, 'some choices given, the others made')

def judge_streams_of_coupling(m, x, z, chosen):
    "A coupling from x to z changes the streams of the chosen experts, and no others by a single bit"
    half,d = m.n_experts*m.d_model,m.d_model
    for i in range(m.n_experts):
        new,old = z[...,half:][...,stream(i, d)],x[...,:half][...,stream(i, d)]
        acts = chosen[...,i]
        assert_equal(new[~acts], old[~acts], 'not chosen, not changed')
        assert (new!=old).any(-1)[acts].all(), 'chosen, and changed'

@torch.no_grad()
def judge_routes(m, x, mask=None):
    "The routes of a call, of calls with given routes, and of one coupling after another"
    routes = {}
    y,_ = m(x, mask, routes=routes)
    judge_number_of_experts(m, routes, mask, x)
    wrong = {j:c.roll(1, -1) for j,c in routes.items()}
    other = judge_given_routes(m, x, y, mask, wrong)
    judge_partly_given_routes(m, x, mask, wrong)
    for j,coupling in enumerate(m.layers):
        kw = dict(routes=dict(wrong)) if j in wrong else {}
        z,_ = coupling(x, mask=mask, **kw)
        if j in wrong: judge_streams_of_coupling(m, x, z, wrong[j])
        x = z
    assert_equal(x, other, 'the couplings are the mixture')

@pytest.mark.parametrize('n,k,couple,scales', [
    (2, 1, 'final', False),
    (3, 2, 'every', False),
    (4, 1, 'every', True),
    (5, 3, 'final', False),
])
def test_routes(n, k, couple, scales):
    m = mixture(n, layers=2, couple=couple, k_active=k, lattice_bits=12, enable_multiscale=scales).eval()
    x = lattice_state(m)
    judge_routes(m, x)
    judge_routes(m, x, first_tokens(9, 9, 4))

def test_choices_are_made_in_full_precision():
    m = mixture(4, 16, layers=1, k_active=1, seed=3)
    x = float_state(m, 4, 200)
    _,plain = call_with_routes(m, x)
    _,under_autocast = call_with_routes(m, x, bf16=True)
    assert_equal(plain[0], under_autocast[0], 'a router computes the same under autocast')

def test_choose():
    "Logits of three values are full of ties"
    for z,k in product(torch.randint(0, 3, (60, 5)).float(), range(1, 6)):
        assert choose_experts(z, k).nonzero().flatten().tolist()==sorted(best_experts(z, k))

def slow_fractions(chosen, mask):
    "Number of positions at which each expert acts, over the number of positions"
    real = [(b, l) for b,l in positions(chosen) if mask is None or mask[b,l]]
    return [sum(chosen[b,l,i].item() for b,l in real)/len(real) for i in range(chosen.shape[-1])]

def test_route_fractions():
    m,routes = mixture(4, layers=2, k_active=2),{}
    mask = first_tokens(9, 9, 4)
    m(lattice_state(m), mask, routes=routes)
    for where in (None, mask):
        fractions = route_fractions(routes, where)
        for j in router_numbers(m):
            assert fractions[j].tolist()==pytest.approx(slow_fractions(routes[j], where))

def constant_gates(m):
    "Set the weights of routers to zero: all gates are 1, whatever the state"
    for r in routers(m): nn.init.zeros_(r.logits.weight)
    return m

def dependence(m, j, x, chosen):
    """True where the update of coupling j depends on its input

    (position, expert) of the update by (position, expert) of the input, (L, n, L, n)."""
    def f(h): return m.layers[j].f(h, routes={j:chosen})
    J = torch.autograd.functional.jacobian(f, x)[0,:,:,0]
    n = m.n_experts
    return J.unflatten(1, (n, -1)).unflatten(4, (n, -1)).abs().amax((2, 5))>0

def test_a_sparse_expert_reads_every_position():
    m = constant_gates(double_mixture(3, k_active=1))
    x = normal_state(m, 1, 4)[...,12:]
    chosen = torch.tensor([[[0, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]]).bool()
    depends = dependence(m, 0, x, chosen)
    for l,i,q,e in product(range(4), range(3), range(4), range(3)):
        assert depends[l,i,q,e]==(i==e and chosen[0,l,i])

def test_a_sparse_coupler_joins_the_acting_experts():
    m = constant_gates(double_mixture(4, k_active=2))
    x = normal_state(m, 1, 3)[...,16:]
    chosen = torch.tensor([[[0, 1, 0, 1], [1, 0, 1, 0], [1, 1, 0, 0]]]).bool()
    for j in (1, 2):
        depends = dependence(m, j, x, chosen)
        for l,i,q,e in product(range(3), range(4), range(3), range(4)):
            assert depends[l,i,q,e]==(l==q and chosen[0,l,i] and chosen[0,l,e])

# Gradients

def judge_gradients(kw, B=2, L=9, seed=0, bf16=False, masked=False, timed=False, train=True,
                    min_chunk_rows=256):
    "Gradients are the bits of stored activations, and not all zero"
    a,b = pair(lattice_bits=12, time_conditioning=timed, seed=seed, **kw)
    x = lattice_state(a, B, L, seed)
    ctx = random_context(B, L, masked, timed)
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(ChunkedUpdate, 'min_chunk_rows', min_chunk_rows)
        got,want = (trial(m.train(train), x, bf16=bf16, **ctx) for m in (a, b))
    assert not differing(got, want), 'the same bits'
    if masked or kw.get('dropout'): return
    always_used = [n for n in got if kw.get('k_active') is None or 'router' in n or n=='x']
    assert all(got[n] is not None and got[n].any() for n in always_used), 'a gradient for everything'

TRAINED_MIXTURES = st.fixed_dictionaries(dict(
    n=st.integers(2, 3),
    k=st.sampled_from([None, 1, 2]),
    d=st.sampled_from([4, 8]),
    layers=st.integers(1, 2),
    couple=st.sampled_from(['final', 'every']),
    scales=st.booleans(),
    dropout=st.sampled_from([0., .3]),
    terms=st.sampled_from([(0., 0.), (.3, 0.), (0., .1), (.3, .1)]), # Weights of the balance and the z-term
    masked=st.booleans(),
    timed=st.booleans(),
    bf16=st.booleans(),
    min_chunk_rows=st.sampled_from([4, 256]),
    train=st.booleans(),
    B=st.integers(1, 3),
    L=st.integers(2, 16),
    seed=st.integers(0, 10**6),
))
FULL = dict(layers=2, dropout=.3, masked=True, timed=True, min_chunk_rows=4, train=True, B=3, L=16)
TWO_OF_THREE = FULL | dict(n=3, k=2, d=4, couple='every', scales=True, terms=(.3, .1), bf16=False, seed=0)
ONE_OF_FOUR = FULL | dict(n=4, k=1, d=8, couple='final', scales=False, terms=(.3, .1), bf16=True, seed=1)
BOTH_OF_TWO = FULL | dict(n=2, k=None, d=8, couple='every', scales=True, terms=(0., 0.), bf16=True, seed=2)

@settings(max_examples=8, deadline=None)
@given(TRAINED_MIXTURES)
@example(TWO_OF_THREE)
@example(ONE_OF_FOUR)
@example(BOTH_OF_TWO)
def test_gradients_are_those_of_stored_activations(o):
    kw = {k:o[k] for k in ('n', 'd', 'layers', 'couple', 'dropout')}
    kw |= dict(enable_multiscale=o['scales'], segment_length=3)
    if o['k'] is not None: kw |= dict(k_active=o['k'], balance=o['terms'][0], z_loss=o['terms'][1])
    batch = {k:o[k] for k in ('B', 'L', 'bf16', 'min_chunk_rows', 'masked', 'timed', 'train', 'seed')}
    judge_gradients(kw, **batch)

def test_gradients_with_affine_couplers():
    "Off the lattice rebuilt states are a little different"
    a,b = pair(layers=4, coupler='affine', dropout=.3)
    x = float_state(a, 2, 9)
    assert alike(trial(a, x), trial(b, x), 1e-2)

@pytest.mark.parametrize('k', [None, 2])
def test_results_with_and_without_a_graph_are_the_same_bits(k):
    a,b = pair(layers=2, couple='every', k_active=k)
    x = float_state(a, 2, 9)
    for bf16 in (False, True):
        with torch.no_grad(): want,_ = call(a, x, bf16=bf16)
        for m in (a, b): assert_equal(trial(m, x, bf16=bf16)['y'], want, 'the bits of a call without a graph')

def is_output_weight(name):
    "True for the weights of an expert that write its updates: they have a gradient wherever it acts"
    ends = 'out.weight', 'pointwise.experts.0.0.weight', 'pointwise.experts.1.0.weight'
    return '.experts.' in name and name.endswith(ends)

@REVERSIBLE
def test_an_idle_expert_has_gradients_of_zero(reversible):
    "None in place of zeros would stop training on several processes"
    m = mixture(layers=2, k_active=1, reversible=reversible)
    only_first = torch.tensor([True, False, False]).expand(2, 3, 3)
    got = trial(m, float_state(m), routes={j:only_first for j in router_numbers(m)})
    assert all(g is not None and g.isfinite().all() for g in got.values())
    for n in filter(is_output_weight, got): assert got[n].any()==('.experts.0.' in n)

def undecided(m):
    "Make all logits nearly equal, so that choices made again from rebuilt states differ"
    g = torch.Generator().manual_seed(3)
    for r in routers(m):
        w = r.logits.weight
        w.data = w.data[:1] + 1e-7*torch.randn(w.shape, generator=g)
    return m

def judge_kept_choices(seed=0):
    """The backward pass uses the choices of the forward pass

    Off the lattice, rebuilt states are a little different, so new choices would differ."""
    a,b = (undecided(m) for m in pair(layers=3, k_active=1, couple='every', seed=seed))
    x,routes = float_state(a, 4, 24),{}
    got = trial(a, x, routes=routes)
    want = trial(b, x)
    assert_equal(got['y'], want['y'], 'result')
    assert alike(got, want, 1e-2), 'gradients'
    _,found = call_with_routes(a, x)
    assert sorted(routes)==router_numbers(a)
    for j in found: assert_equal(routes[j], found[j], 'choices of the forward pass')

@pytest.mark.parametrize('seed', [0, 1])
def test_backward_off_the_lattice_keeps_the_choices(seed): judge_kept_choices(seed)

def gradients_of_two_calls(m, x, other_x, routes, other_routes):
    "Gradients of the sum of two calls, and choices of the first; `other_routes` is emptied between them"
    m.zero_grad()
    y,_ = m(x, routes=routes)
    choices = dict(routes)
    other_routes.clear()
    z,_ = m(other_x, routes=other_routes)
    (y.sin().sum()+z.sin().sum()).backward()
    grads = {n:p.grad.clone() for n,p in m.named_parameters()}
    return grads | {f'choice {j}':c for j,c in choices.items()}

@REVERSIBLE
def test_a_call_does_not_change_the_choices_of_another(reversible):
    "One dictionary is used again before the backward pass"
    m = mixture(layers=2, k_active=1, reversible=reversible, lattice_bits=12)
    states = lattice_state(m),lattice_state(m, seed=2)
    routes = {}
    shared = gradients_of_two_calls(m, *states, routes, routes)
    assert not differing(shared, gradients_of_two_calls(m, *states, {}, {}))

@pytest.mark.parametrize('bits', [None, 12])
def test_choices_are_made_once(bits, monkeypatch):
    calls = []
    def counted(z, k):
        calls.append(k)
        return choose_experts(z, k)
    monkeypatch.setattr(sparse_moe, 'choose_experts', counted)
    m = mixture(layers=3, k_active=2, lattice_bits=bits)
    trial(m, lattice_state(m))
    assert calls==[2]*len(routers(m))==[2]*5

# Memory

def cpu_tensors():
    "All tensors on the CPU that a Python object holds"
    return [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter) and o.device.type=='cpu']

def bytes_held(reversible, layers, B=4, L=32, **kw):
    """Bytes that a forward pass leaves for the backward pass, and the bytes of its routes

    Saved by autograd, or held by any Python object; the input and the parameters do not count."""
    m = mixture(2, 16, 2, layers, std=.1, lattice_bits=12, reversible=reversible, **kw)
    x = lattice_state(m, B, L).requires_grad_()
    found = {}
    def note(t):
        found.update(storage_bytes([t]))
        return t
    gc.freeze() # Existing objects are not searched
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t): y,_ = m(x)
    gc.collect()
    found.update(storage_bytes(cpu_tensors()))
    gc.unfreeze()
    assert y.requires_grad
    before = storage_bytes([x, *m.parameters()])
    return sum(n for address,n in found.items() if address not in before), 2*B*L*len(routers(m))

MEMORY = {
    'dense':         dict(),
    'dense every':   dict(couple='every'),
    'sparse':        dict(k_active=1),
    'sparse every':  dict(k_active=1, couple='every', balance=.1),
}
@pytest.mark.parametrize('kind', MEMORY)
def test_memory_does_not_grow_with_depth(kind):
    kw = MEMORY[kind]
    rebuilt_2,routes_2 = bytes_held(True, 2, **kw)
    rebuilt_6,routes_6 = bytes_held(True, 6, **kw)
    stored_2,_ = bytes_held(False, 2, **kw)
    stored_6,_ = bytes_held(False, 6, **kw)
    assert rebuilt_6-rebuilt_2<=routes_6-routes_2
    assert stored_6>2.2*stored_2
    assert rebuilt_2<stored_2/3
    assert ('k_active' in kw)==(routes_6>routes_2)

# Balance

def tokens_where_experts_act(z, chosen):
    "Pairs of logits, (n,), and choices, (n,), of all positions at which an expert acts"
    return [(v, c) for v,c in zip(z.flatten(0, -2), chosen.flatten(0, -2)) if c.any()]

def slow_balance(z, chosen):
    "n * sum of f_i*P_i: fraction of the choices that are expert i, and mean softmax probability of expert i"
    tokens = tokens_where_experts_act(z, chosen)
    n,total = z.shape[-1],sum(c.sum().item() for _,c in tokens)
    f = [sum(c[i].item() for _,c in tokens)/total for i in range(n)]
    P = [sum(v[i].exp()/v.exp().sum() for v,_ in tokens)/len(tokens) for i in range(n)]
    return n*sum(fi*Pi for fi,Pi in zip(f, P))

def slow_z_term(z, chosen):
    "Mean of (log sum of exp(z_i))^2"
    tokens = tokens_where_experts_act(z, chosen)
    return sum(v.exp().sum().log()**2 for v,_ in tokens)/len(tokens)

TERMS = [(balance_term, slow_balance), (z_term, slow_z_term)]

@pytest.mark.parametrize('k', [1, 2, 4])
def test_terms_are_their_formulas(k):
    z = torch.randn(2, 7, 4, dtype=torch.float64)
    chosen = choose_experts(z, k)
    for c,(term,slow) in product((chosen, chosen&first_tokens(7, 7, 3)[...,None]), TERMS):
        assert_close(term(z, c), slow(z, c), 1e-12, 'term')

def test_terms_have_their_closed_forms():
    in_turn = torch.arange(14)[:,None]%4==torch.arange(4)
    first = torch.tensor([True, False, False, False]).expand(28, 1, 4)
    assert balance_term(torch.zeros(14, 4).double(), in_turn).item()==pytest.approx(1)
    assert balance_term(50.*first, first).item()==pytest.approx(4)
    assert z_term(torch.full((3, 4), 2.), first[:3,0]).item()==pytest.approx((2+math.log(4))**2)

@pytest.mark.parametrize('term', [balance_term, z_term])
def test_terms_of_padding_alone_are_zero(term):
    z = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    value = term(z, torch.zeros(2, 7, 4).bool())
    assert value.item()==0
    assert not torch.autograd.grad(value, z)[0].any()

def logits_by_number(m):
    "A dictionary that the routers of a mixture fill with their logits"
    logits = {}
    def keep(number):
        def hook(module, inputs, output): logits[number] = output
        return hook
    for r in routers(m): r.logits.register_forward_hook(keep(r.number))
    return logits

def gradients_with_terms(m, x, mask, balance, z_loss):
    """Result, gradient of the input, and gradients of the parameters by name

    The loss is sum(sin(y)) + sum over routers of the weighted slow terms."""
    logits,routes = logits_by_number(m),{}
    leaf = x.clone().requires_grad_()
    y,_ = m(leaf, mask, routes=routes)
    terms = [balance*slow_balance(logits[j], routes[j])+z_loss*slow_z_term(logits[j], routes[j])
             for j in router_numbers(m)]
    (y.sin().sum()+sum(terms)).backward()
    grads = {n:torch.zeros_like(p) if p.grad is None else p.grad for n,p in m.named_parameters()}
    return y.detach(), leaf.grad, grads

def judge_balance(reversible=False, masked=True, balance=.3, z_loss=.1, k=1):
    "Gradients are those of a loss that contains the terms, while the result is the same without them"
    kw = dict(n=3, layers=2, k_active=k, couple='every')
    m = mixture(reversible=reversible, balance=balance, z_loss=z_loss, **kw).double()
    plain = mixture(reversible=False, **kw).double()
    mask = first_tokens(5, 5, 3) if masked else None
    x = normal_state(m, 2, 5)
    got = trial(m, x, mask=mask)
    y,input_grad,grads = gradients_with_terms(plain, x, mask, balance, z_loss)
    assert_equal(got['y'], y, 'the result does not depend on the terms')
    assert_close(got['x'], input_grad, 1e-9, 'gradient of the input')
    for n,g in grads.items(): assert_close(got[n], g, 1e-9, f'gradient of {n}')

@REVERSIBLE
@pytest.mark.parametrize('masked,balance,z_loss,k', [
    (True, .3, .1, 1),
    (False, .3, .1, 2),
    (True, .3, 0., 2),
    (False, 0., .1, 1),
])
def test_terms_reach_every_gradient(reversible, masked, balance, z_loss, k):
    judge_balance(reversible, masked, balance, z_loss, k)

@REVERSIBLE
def test_no_terms_in_eval_mode_or_without_weights(reversible):
    kw = dict(k_active=1, layers=2, reversible=reversible, lattice_bits=12)
    weighted = mixture(balance=.3, z_loss=.1, **kw)
    default = mixture(**kw)
    zero = mixture(balance=0., z_loss=0., **kw)
    x = lattice_state(weighted)
    assert not differing(trial(weighted.eval(), x), trial(default.eval(), x))
    assert not differing(trial(default.train(), x), trial(zero.train(), x))
    changed = set(differing(trial(weighted.train(), x), trial(default.train(), x)))
    assert 'y' not in changed
    assert {n for n,_ in weighted.named_parameters() if n.endswith('logits.weight')}<=changed

def favour_first_expert(m):
    "Change the routers so that they choose expert 0 nearly everywhere"
    for r in routers(m):
        nn.init.ones_(r.norm.weight)
        nn.init.ones_(r.norm.bias)
        r.logits.weight.data.mul_(.5)[0] += .3
    return m

def judge_evens_out(balance=1., steps=40):
    "Expert 0 acts nearly everywhere at first, and all experts act after training with the balance term"
    m = favour_first_expert(mixture(3, k_active=1, balance=balance, std=.3, seed=2, reversible=False))
    x = float_state(m, 4, 16)
    opt = torch.optim.Adam(m.parameters(), 2e-2)
    fractions = []
    for i in range(steps+1):
        routes = {}
        loss = (m(x, routes=routes)[0]-x.flip(-1)).square().mean()
        fractions.append(route_fractions(routes))
        if i==steps: break
        opt.zero_grad()
        loss.backward()
        opt.step()
    first,*_,last = fractions
    assert all(f.argmax()==0 and f.max()>.9 for f in first.values()), 'one expert has nearly all positions'
    assert all(f.max()<.5 for f in last.values()), 'all experts have their fraction'

def test_balance_evens_out():
    judge_evens_out()
    with pytest.raises(AssertionError, match='all experts have their fraction'): judge_evens_out(0.)

# Experts

@pytest.mark.parametrize('n,d', product((2, 3), (1, 4)))
def test_streams_are_split_and_joined(n, d):
    x = torch.randn(2, 3, 2*n*d)
    s = expert_streams(x, n)
    assert s.shape==(2, 3, n, 2*d)
    for i in range(n):
        both = torch.cat([x[...,stream(i, d)], x[...,n*d:][...,stream(i, d)]], -1)
        assert_equal(s[:,:,i], both, 'first and second stream of an expert')
    assert_equal(join_streams(s), x, 'joined')

@pytest.mark.parametrize('bits', [None, 12])
def test_entry_copies_the_state(bits):
    "Feature j of expert i is feature (j//2)*6 + 2*i + j%2 of the mixture, for 3 experts of width 2"
    entry = draw_weights(ExpertEntry(3, 2, bits))
    h = to_lattice(torch.randn(2, 5, 4), 12).requires_grad_()
    x,w = entry(h),torch.randn(2, 5, 12)
    offset = entry.offset.detach()
    if bits is not None: offset = (offset*2**bits).round()/2**bits
    (x*w).sum().backward()
    for i,j in product(range(3), range(4)):
        at = (j//2)*6+2*i+j%2
        assert_equal(x[...,at].detach(), (h[...,j]+offset[i,j]).detach(), 'a copy of its own')
        assert entry.offset.grad[i,j].item()==pytest.approx(w[...,at].sum().item(), abs=1e-4)

def test_offsets_of_the_entry_start_at_zero(): assert not ExpertEntry(2, 2).offset.any()

def uncoupled(m):
    "Set the MLPs of the couplers to zero"
    for c,role in zip(m.layers, m.roles):
        if role!='coupler': continue
        for p in c.f.pointwise.parameters(): nn.init.zeros_(p)
    return m

def influence(m, x):
    "Largest derivative of the result of each expert by the state of each expert, (n, n)"
    def f(s): return expert_streams(m(join_streams(s))[0], m.n_experts)
    J = torch.autograd.functional.jacobian(f, expert_streams(x, m.n_experts))
    return J.abs().amax((0, 1, 3, 4, 5, 7))

def off_diagonal(J): return J-J.diag().diag()

CONNECTED = {
    'final':   dict(),
    'every':   dict(layers=2, couple='every'),
    'scales':  SCALES,
    'affine':  dict(coupler='affine'),
}
@pytest.mark.parametrize('kind', CONNECTED)
def test_only_couplers_connect_the_experts(kind):
    m = mixture(3, 2, 1, reversible=False, **CONNECTED[kind]).double()
    x = normal_state(m, 1)
    assert (influence(m, x)>0).all()
    J = influence(uncoupled(m), x)
    assert (J.diag()>0).all() and not off_diagonal(J).any()

@pytest.mark.parametrize('kind', [k for k in CONNECTED if k!='affine'])
def test_a_mixture_without_couplers_is_its_experts(kind):
    m = uncoupled(mixture(3, 2, 1, reversible=False, **CONNECTED[kind]).double())
    x = normal_state(m, 1)
    states = expert_streams(x, 3).unbind(-2)
    forward = torch.stack([m.expert(i)(s)[0] for i,s in enumerate(states)], -2)
    inverse = torch.stack([m.expert(i).inverse(s)[0] for i,s in enumerate(states)], -2)
    assert_close(m(x)[0], join_streams(forward), 1e-12, 'the experts by themselves')
    assert_close(m.inverse(x)[0], join_streams(inverse), 1e-12, 'the inverses of the experts by themselves')

def test_an_expert_shares_its_weights():
    m = mixture(3, layers=2, k_active=1, enable_multiscale=True, lattice_bits=12)
    a,b,c = ({p.data_ptr() for p in m.expert(i).parameters()} for i in range(3))
    assert not a&b and not a&c and not b&c
    assert a|b|c=={p.data_ptr() for n,p in m.named_parameters() if '.experts.' in n}
    expert,x = m.expert(1),to_lattice(torch.randn(2, 5, 8), 12)
    with torch.no_grad(): assert_equal(expert.inverse(expert(x)[0])[0], x, 'on the lattice by itself')

@pytest.mark.parametrize('k', [None, 1])
def test_copies_and_state_dicts(k):
    kw = dict(layers=2, k_active=k, lattice_bits=12, dropout=.3)
    m = mixture(**kw)
    x = lattice_state(m)
    want = trial(m, x)
    other = mixture(seed=1, **kw)
    other.load_state_dict(m.state_dict())
    assert not differing(trial(deepcopy(m), x), want)
    assert not differing(trial(other, x), want)
    assert set(m.state_dict())=={n for n,_ in m.named_parameters()}

# Rejected input

def rejects(message=None, error=ValueError):
    "Expect an error whose message contains these words"
    return pytest.raises(error, match=message and re.escape(message))

WRONG_ARGUMENTS = [
    (dict(n_experts=1), 'n_experts is 1'),
    (dict(n_experts=0), 'n_experts is 0'),
    (dict(n_experts=-2), 'n_experts is -2'),
    (dict(n_experts=2.), 'n_experts is 2.0'),
    (dict(n_experts=True), 'n_experts is True'),
    (dict(k_active=4), 'k_active is 4; expected a whole number from 1 to n_experts=3'),
    (dict(k_active=0), 'k_active is 0'),
    (dict(k_active=True), 'k_active is True'),
    (dict(n_layers=0), 'n_layers is 0'),
    (dict(couple='first'), "couple is 'first'"),
    (dict(coupler='spline'), "coupler is 'spline'"),
    (dict(coupler='affine', lattice_bits=12), "lattice_bits is 12; expected None for coupler='affine'"),
    (dict(coupler='affine', k_active=1), "k_active is 1; expected None for coupler='affine'"),
    (dict(coupler_dim=0), 'coupler_dim is 0'),
    (dict(coupler_dim=2.5), 'coupler_dim is 2.5'),
    (dict(d_model=True), 'd_model is True'),
    (dict(attention='standard'), "attention is 'standard'"),
    (dict(ffn='standard'), "ffn is 'standard'"),
    (dict(balance=.1), 'balance is 0.1; expected 0 without k_active'),
    (dict(z_loss=.1), 'z_loss is 0.1; expected 0 without k_active'),
    (dict(k_active=1, balance=-1.), 'balance is -1.0'),
    (dict(k_active=1, z_loss=float('nan')), 'z_loss is nan'),
    (dict(n_heads=3), 'n_heads is 3'),
    (dict(segment_length=0, enable_multiscale=True), 'segment_length is 0'),
    (dict(local_window=2), 'local_window is 2'),
]
@pytest.mark.parametrize('kw,message', WRONG_ARGUMENTS)
def test_wrong_arguments_are_rejected(kw, message):
    with rejects(message): BijectiveMoE(**(dict(n_experts=3, d_model=4, n_heads=2)|kw))

DENSE_AND_SPARSE = pytest.mark.parametrize('k', [None, 1], ids=['dense', 'sparse'])
DIRECTIONS = pytest.mark.parametrize('back', [False, True], ids=['forward', 'inverse'])
SHAPE = 'expected (B, L, 24), 6 streams of d_model=4'
# Change of a state of shape (2, 9, 24), type of the error, words of its message
WRONG_STATES = {
    'few features':  (lambda x: x[...,:8], ValueError, SHAPE),
    'no batch':      (lambda x: x[0], ValueError, SHAPE),
    'many features': (lambda x: torch.cat([x, x], -1), ValueError, SHAPE),
    'off lattice':   (lambda x: x+2**-13, LatticeError, None),
    'float16':       (lambda x: x.half(), LatticeError, None),
    'not a number':  (lambda x: x*float('nan'), LatticeError, None),
}
@DENSE_AND_SPARSE
@DIRECTIONS
@pytest.mark.parametrize('name', WRONG_STATES)
def test_wrong_states_are_rejected(k, back, name):
    m = mixture(k_active=k, lattice_bits=12)
    change,error,message = WRONG_STATES[name]
    with rejects(message, error): call(m, change(lattice_state(m)), back)

# Is the mixture conditioned on time? Context of a state of shape (2, 9, 24), words of the message
WRONG_CONTEXTS = {
    'long mask':      (False, dict(mask=torch.ones(2, 8).bool()), 'mask is'),
    'mask of floats': (False, dict(mask=torch.ones(2, 9)), 'mask is'),
    'time':           (False, dict(t=torch.rand(2)), 'without time_conditioning'),
    'no time':        (True, dict(), 't is None'),
    'three times':    (True, dict(t=torch.rand(3)), 't has shape'),
}
@DENSE_AND_SPARSE
@DIRECTIONS
@pytest.mark.parametrize('name', WRONG_CONTEXTS)
def test_wrong_contexts_are_rejected(k, back, name):
    timed,context,message = WRONG_CONTEXTS[name]
    m = mixture(k_active=k, time_conditioning=timed)
    with rejects(message): call(m, lattice_state(m), back, **context)

# Routes made from the right choices c of coupling 1, words of the message
WRONG_ROUTES = {
    'few examples':  (lambda c: {1:c[:1]}, 'routes[1] has shape'),
    'few experts':   (lambda c: {1:c[...,:2]}, 'routes[1] has shape'),
    'few positions': (lambda c: {1:c[:,1:]}, 'routes[1] has shape'),
    'no router':     (lambda c: {3:c}, 'routes has a key 3'),
    'name':          (lambda c: {'1':c}, "routes has a key '1'"),
    'int':           (lambda c: {1:c.int()}, 'routes[1] is a torch.int32 tensor'),
    'list in dict':  (lambda c: {1:[True]}, 'routes[1] is [True]'),
    'list':          (lambda c: [c], 'routes is a list'),
}
@DIRECTIONS
@pytest.mark.parametrize('name', WRONG_ROUTES)
def test_wrong_routes_are_rejected(back, name):
    m,routes = mixture(k_active=1, lattice_bits=12),{}
    x = lattice_state(m)
    m(x, routes=routes)
    change,message = WRONG_ROUTES[name]
    bad = change(routes[1])
    if isinstance(bad, dict): bad = routes|bad
    with rejects(message): call(m, x, back, routes=bad)

@DIRECTIONS
def test_routes_of_a_dense_mixture_are_rejected(back):
    m = mixture(lattice_bits=12)
    f = m.inverse if back else m
    with rejects('routes is {}; expected None without k_active'): f(lattice_state(m), routes={})

@pytest.mark.parametrize('i', [-1, 3])
def test_missing_experts_are_rejected(i):
    with rejects(f'i is {i}; expected the number of an expert, 0 to 2'): mixture().expert(i)

def test_a_lattice_for_affine_couplers_is_rejected():
    with rejects('bits is 12; expected None'): mixture(coupler='affine').set_lattice(12)

def test_states_that_leave_the_lattice_are_rejected():
    m = mixture(lattice_bits=12)
    nn.init.constant_(m.layers[1].f.pointwise[-1].bias, 2e3)
    with rejects('leaves the lattice in layer 1', LatticeError): m(lattice_state(m))

@pytest.mark.parametrize('strict', [True, False])
def test_weights_of_a_transformer_are_rejected(strict):
    single = BijectiveTransformer(2, 4, 2).state_dict()
    for m in (mixture(layers=2), mixture(layers=2, k_active=1), nn.Sequential(mixture())):
        with rejects('not of a mixture'): m.load_state_dict(single, strict=strict)

OTHER_MIXTURES = [dict(k_active=1), dict(n=2), dict(layers=2)]
@pytest.mark.parametrize('kw', OTHER_MIXTURES, ids=['sparse', 'two experts', 'two layers'])
def test_weights_of_another_mixture_are_rejected(kw):
    a,b = mixture(),mixture(**kw)
    with pytest.raises(RuntimeError): a.load_state_dict(b.state_dict())
    with pytest.raises(RuntimeError): b.load_state_dict(a.state_dict())

# Edges

@DENSE_AND_SPARSE
def test_an_empty_batch(k):
    m = mixture(k_active=k).eval()
    assert m(torch.zeros(0, 5, m.state_dim))[0].shape==(0, 5, m.state_dim)

@DENSE_AND_SPARSE
def test_states_in_half_precision(k):
    m = mixture(k_active=k).eval()
    x = float_state(m, 2, 5).bfloat16()
    with torch.no_grad(): assert call(m, x, bf16=True)[0].dtype==torch.bfloat16

# Planted faults: each function replaces a part of the mixture by a wrong one

def reads_active_half(cls, read):
    """Let `cls` see read(passive, active) in place of the passive half

    The active half is what it was in the forward direction, and what it has become in the inverse."""
    active = {}
    def remember_before(step):
        def faulty(self, x1, x2, **context):
            active['half'] = x1
            return step(self, x1, x2, **context)
        return faulty
    def remember_after(uncouple):
        def faulty(self, y1, y2, **context):
            active['half'] = y2
            return uncouple(self, y1, y2, **context)
        return faulty
    def misread(forward):
        def faulty(self, h, *args, **kwargs): return forward(self, read(h, active['half']), *args, **kwargs)
        return faulty
    def plant(monkeypatch):
        plant_fault(monkeypatch, (AdditiveCoupling, 'step'), remember_before)
        plant_fault(monkeypatch, (AdditiveCoupling, 'uncouple'), remember_after)
        plant_fault(monkeypatch, (cls, 'forward'), misread)
    return plant

def only_active(passive, active): return active
def both_halves(passive, active): return passive+.5*active
def a_little_of_both(passive, active): return passive+.1*active

def in_place_of(target):
    "Make a planted fault of a function from the right version of `target`, owner and name, to a wrong one"
    def decorate(fault): return partial(plant_fault, target=target, fault=fault)
    return decorate

@in_place_of((Router, 'forward'))
def routes_ignored(forward):
    "Routers do not get the given routes"
    return lambda self, h, mask=None, routes=None: forward(self, h, mask=mask)

@in_place_of((Router, 'forward'))
def mask_ignored(forward):
    "Routers do not get the mask"
    return lambda self, h, mask=None, routes=None: forward(self, h, routes=routes)

@in_place_of((BijectiveMoE, 'inverse'))
def inverse_without_routes(inverse):
    "The inverse does not use the given routes"
    return lambda self, y, mask=None, t=None, routes=None: inverse(self, y, mask, t)

@in_place_of((Router, 'forward'))
def noise_in_routers(forward):
    "Routers read a state with noise, another one in each direction"
    return lambda self, h, *args: forward(self, h+1e-1*torch.randn_like(h), *args)

@in_place_of((Router, 'forward'))
def detached_gates(forward):
    "Gates have no gradient"
    def faulty(self, h, *args):
        chosen,gates = forward(self, h, *args)
        return chosen, gates.detach()
    return faulty

@in_place_of((SparseMixer, 'forward'))
def attention_without_gates(forward):
    "The attention of acting experts is not multiplied by their gates"
    def faulty(self, h, mask=None, routes=None, **context):
        a,u = forward(self, h, mask, routes, **context)
        n = len(self.experts)
        gates = u[...,-n:].repeat_interleave(h.shape[-1]//n, -1)
        return torch.where(gates>0, a/gates.clamp_min(1e-9), 0.), u
    return faulty

@in_place_of((SparseNet, 'forward'))
def mlps_without_gates(forward):
    "The MLPs of acting experts are not multiplied by their gates"
    def faulty(self, u):
        n = len(self.experts)
        ones = (u[...,-n:]>0).to(u)
        return forward(self, torch.cat([u[...,:-n], ones], -1))
    return faulty

@in_place_of((SparseMixer, '_mix_chosen'))
def only_chosen_positions_read(mix_chosen):
    "An expert reads only the positions that chose it"
    def faulty(self, mixer, h, chosen, mask, context):
        return mix_chosen(self, mixer, h, chosen, chosen if mask is None else mask&chosen, context)
    return faulty

@in_place_of((sparse_moe, 'chosen_rows'))
def half_capacity(chosen_rows):
    "An expert updates at most half of the positions"
    return lambda chosen: tuple(t[:,:chosen.shape[1]//2] for t in chosen_rows(chosen))

@in_place_of((SparseCouplerNet, 'forward'))
def all_experts_write(forward):
    "All experts write into the message, those that do not act as well"
    def faulty(self, u):
        n = self.n_experts
        streams,gates = u[...,:-n],u[...,-n:]
        acts = gates.repeat_interleave(streams.shape[-1]//n, -1)>0
        return torch.where(acts, forward(self, torch.cat([streams, gates.clamp_min(1e-30)], -1)), 0.)
    return faulty

@in_place_of((BijectiveMoE, '_context'))
def routes_not_copied(context):
    "The backward pass reads the caller's dictionary"
    return lambda self, x, mask, t, routes: context(self, x, mask, t, routes) | dict(routes=routes)

@in_place_of((sparse_moe, 'choose_experts'))
def one_expert(choose): return lambda z, k: choose(z, 1)

@in_place_of((sparse_moe, 'choose_experts'))
def worst_experts(choose): return lambda z, k: choose(-z, k)

@in_place_of((sparse_moe._AddGradient, 'apply'))
def no_terms(apply): return lambda z, *args: z

@in_place_of((sparse_moe._AddGradient, 'apply'))
def terms_at_padding(apply):
    "Terms count padding"
    return lambda z, chosen, *weights: apply(z, chosen|~chosen.any(-1, keepdim=True), *weights)

@in_place_of((sparse_moe, 'balance_term'))
def no_balance(term): return lambda z, chosen: z.sum()*0

@in_place_of((sparse_moe, 'z_term'))
def z_term_without_square(term): return lambda z, chosen: z[chosen.any(-1)].logsumexp(-1).mean()

# Judges without arguments

def sparse_on_lattice(): return mixture(3, layers=2, couple='every', k_active=2, lattice_bits=12).eval()
def sparse_is_exact():
    m = sparse_on_lattice()
    judge_exact(m, lattice_state(m, 2, 12))

def dense_is_exact():
    m = mixture(lattice_bits=12).eval()
    judge_exact(m, lattice_state(m))

def density_of(**kw):
    m = double_mixture(2, 2, 1, reversible=False, **kw)
    judge_density(m, normal_state(m), ('jacrev',))

def dense_density(): density_of()
def sparse_density(): density_of(k_active=1)
def sparse_roundtrip():
    m = double_mixture(k_active=1)
    judge_roundtrip(m, normal_state(m))

def routes_are_used():
    m = sparse_on_lattice()
    judge_routes(m, lattice_state(m), first_tokens(9, 9, 4))

def sparse_is_slow_mixture():
    m = double_mixture(k_active=2, reversible=False)
    judge_slow(m, normal_state(m, 2, 4), mask=first_tokens(4, 4, 2))

def sparse_gradients(): judge_gradients(dict(k_active=2, layers=2, balance=.3))
def balance(): judge_balance()
def reversible_balance(): judge_balance(True)
def choices_are_kept(): judge_kept_choices()
def calls_are_separate(): test_a_call_does_not_change_the_choices_of_another(True)
def experts_read_all(): test_a_sparse_expert_reads_every_position()

# A fault, how to plant it, and the judges that must reject it
FAULTS = [
    ('router reads the active half', reads_active_half(Router, only_active),
     [sparse_is_exact, routes_are_used]),
    ('router reads both halves', reads_active_half(Router, both_halves),
     [sparse_is_exact, sparse_density, sparse_roundtrip]),
    ('message reads the active half', reads_active_half(CouplerMixer, a_little_of_both),
     [dense_is_exact, sparse_is_exact, dense_density, sparse_roundtrip]),
    ('noise in routers', noise_in_routers, [sparse_is_exact, routes_are_used, choices_are_kept]),
    ('inverse without routes', inverse_without_routes, [routes_are_used]),
    ('router ignores routes', routes_ignored, [routes_are_used, choices_are_kept, sparse_is_slow_mixture]),
    ('router ignores the mask', mask_ignored, [routes_are_used, sparse_is_slow_mixture]),
    ('attention without gates', attention_without_gates, [sparse_is_slow_mixture]),
    ('MLPs without gates', mlps_without_gates, [sparse_is_slow_mixture]),
    ('gates without a gradient', detached_gates, [sparse_is_slow_mixture, sparse_gradients]),
    ('half of the positions at most', half_capacity, [sparse_is_slow_mixture]),
    ('all experts write', all_experts_write, [sparse_is_slow_mixture]),
    ('routes are not copied', routes_not_copied, [calls_are_separate]),
    ('only chosen positions are read', only_chosen_positions_read,
     [sparse_is_slow_mixture, experts_read_all]),
    ('one expert acts', one_expert, [routes_are_used, sparse_is_slow_mixture]),
    ('the worst experts act', worst_experts, [sparse_is_slow_mixture]),
    ('no terms', no_terms, [balance, reversible_balance]),
    ('terms count padding', terms_at_padding, [balance]),
    ('no balance', no_balance, [balance]),
    ('z-term without its square', z_term_without_square, [balance]),
]
@cache
def accepts_the_right_mixture(judge):
    judge()
    return True

PLANTED = [pytest.param(plant, judge, id=f'{name}-{judge.__name__}')
           for name,plant,judges in FAULTS for judge in judges]
@pytest.mark.parametrize('plant,judge', PLANTED)
def test_judges_reject_a_fault(plant, judge, monkeypatch):
    assert accepts_the_right_mixture(judge)
    plant(monkeypatch)
    with pytest.raises(AssertionError): judge()
