"""Every bijection before judges: checks in the manner of other libraries.

They share no code with `check_bijection`. Tests at the end plant faults that the judges must find."""
from copy import deepcopy
from functools import partial
from itertools import product
from typing import NamedTuple
import pytest, torch
from hypothesis import example, given, settings, strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.nn.attention import SDPBackend, sdpa_kernel
from bijdiff.layers.bijection import as_transform, BijectiveSequential
from bijdiff.layers.lattice import LatticeError, to_lattice
from bijdiff.layers.coupling import AdditiveCoupling, AffineCoupling, CouplingNet
from bijdiff.layers.linear import BijectiveLinear, LinearCoupling, PairRotation, Permutation, ShearedLinear
from bijdiff.layers.norm import ActNorm, InvertibleLayerNorm
from bijdiff.layers.attention_inverse import BijectiveMultiHeadAttention
from bijdiff.layers.block import BijectiveTransformer, BijectiveTransformerBlock
from bijdiff.layers.moe import BijectiveMoE
from bijdiff.layers.multiscale import MultiscaleTransformer
from helpers import assert_close, random_context, seeded_weights

couplings = ['additive', 'affine']
mixings = ['none', 'permutation', 'rotation']

# Maps. Fresh ones are the identity or nearly so, where most claims hold: all get random weights.

def unit_determinant(n, seed=0):
    "A random matrix of determinant ±1, (n, n)"
    generator = torch.Generator().manual_seed(seed)
    a,b = torch.randn(2, n, n, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(a)[0] @ (torch.eye(n).double() + .3*b.triu(1))

def initialised(dim):
    "An ActNorm after its first batch"
    norm = ActNorm(dim).train()
    norm(3*torch.randn(50, 4, dim)+torch.arange(dim))
    return norm

def additive(d, bits=None): return AdditiveCoupling(CouplingNet(d), bits)
def affine(d, bound=2.): return AffineCoupling(CouplingNet(d, 8, dim_out=2*d), bound)
def block(n_heads=2, **kwargs): return BijectiveTransformerBlock(4, n_heads, **kwargs)
def transformer(n_layers=2, reversible=False, **kwargs):
    return BijectiveTransformer(n_layers, 4, 2, reversible=reversible, **kwargs)
def multiscale(): return MultiscaleTransformer(1, 4, 2, segment_length=2, reversible=False)
def affine_linear(dim): return BijectiveLinear(dim, coupling='affine', mixing='rotation')

def several():
    "Five maps of different kinds"
    return BijectiveSequential(seeded_weights(affine(3), .4), seeded_weights(affine_linear(6), .4),
                               initialised(6), Permutation(6), seeded_weights(additive(3), .4))

class Case(NamedTuple):
    "A bijection, and the states and contexts it is called with"
    make:object # Function that makes the map
    dim:int # Features of a state
    inputs:str='' # 'flat' for vectors in place of sequences; 'mask' and 't' for the context
    has_weights:bool=False # The weights are random already

def linear_cases():
    "Learned matrices of every kind: on vectors with a bias, and on sequences without"
    cases = {}
    for (dim,n),coupling,mixing in product([(2, 1), (5, 4), (8, 5)], couplings, mixings):
        make = partial(BijectiveLinear, dim, n, coupling, mixing)
        name = f'linear-{dim}-{n}-{coupling}-{mixing}'
        cases[name] = Case(partial(make, bias=True), dim, 'flat')
        cases[f'{name}-unbiased'] = Case(partial(make, bias=False), dim)
    return cases

CASES = linear_cases() | {
    'linear-mask': Case(lambda: affine_linear(5), 5, 'mask'),
    'coupling': Case(lambda: LinearCoupling(5), 5),
    'coupling-flip-affine': Case(lambda: LinearCoupling(5, flip=True, affine=True), 5, 'flat'),
    'permutation': Case(lambda: Permutation(5), 5, 'flat'),
    'rotation': Case(lambda: PairRotation(torch.tensor([.3, -2., 3.])), 6),
    'rotation-odd': Case(lambda: PairRotation(torch.tensor([1., -3.1])), 5, 'flat'),
    'sheared': Case(lambda: ShearedLinear(unit_determinant(5)), 5),
    'sheared-flat': Case(lambda: ShearedLinear(unit_determinant(2)), 2, 'flat'),
    'actnorm': Case(lambda: initialised(5), 5, has_weights=True),
    'actnorm-mask': Case(lambda: initialised(5), 5, 'mask', has_weights=True),
    'actnorm-1': Case(lambda: initialised(1), 1, 'flat', has_weights=True),
    'additive': Case(lambda: additive(3), 6, 'flat'),
    'additive-mask': Case(lambda: additive(3), 6, 'mask'),
    'affine': Case(lambda: affine(3), 6),
    'affine-mask': Case(lambda: affine(3), 6, 'mask'),
    'affine-flat': Case(lambda: affine(1), 2, 'flat'),
    'block': Case(block, 8),
    'block-mask': Case(lambda: block(1, local_window=0, coupling_depth=3), 8, 'mask'),
    'transformer': Case(transformer, 8),
    'transformer-mask-t': Case(lambda: transformer(time_conditioning=True), 8, 'mask t'),
    'transformer-reversible': Case(lambda: transformer(time_conditioning=True, reversible=True), 8, 'mask t'),
    'attention-coupling': Case(lambda: BijectiveMultiHeadAttention(4, 2), 8, 'mask'),
    'attention-mixing': Case(lambda: BijectiveMultiHeadAttention(4, 2, 'mixing'), 8),
    'attention-mixing-mask': Case(lambda: BijectiveMultiHeadAttention(4, 2, 'mixing'), 8, 'mask'),
    'multiscale': Case(multiscale, 8),
    'multiscale-mask': Case(multiscale, 8, 'mask'),
    'several': Case(several, 6, has_weights=True),
    'several-mask': Case(several, 6, 'mask', has_weights=True)}

def made(case):
    "The map of a case in float64, a state of two examples, and the context"
    torch.manual_seed(1)
    f = case.make()
    if not case.has_weights: seeded_weights(f, .4)
    inputs = case.inputs.split()
    shape = (2, case.dim) if 'flat' in inputs else (2, 3, case.dim)
    context = {}
    if 'mask' in inputs: context['mask'] = torch.tensor([[True, True, False], [False]*3])
    if 't' in inputs: context['t'] = torch.tensor([.2, .9])
    return f.double().eval(), torch.randn(shape, dtype=torch.float64), context

# Judges

def finite_differences(f, x, h=1e-5):
    "Jacobian by (f(x+h) - f(x-h)) / 2h, in the layout of `torch.func.jacrev`"
    steps = h*torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
    with torch.no_grad():
        columns = [(f(x+step)-f(x-step)).flatten()/(2*h) for step in steps]
    return torch.stack(columns, -1)

def dense_jacobian(f, x, method):
    "Derivative of every output by every input of the whole batch, (B, n, B, n)"
    n = x[0].numel()
    if method=='finite': J = finite_differences(f, x)
    elif method=='autograd': J = torch.autograd.functional.jacobian(f, x)
    else:
        # the fused kernel of attention has no forward derivative
        with sdpa_kernel(SDPBackend.MATH): J = getattr(torch.func, method)(f)(x)
    return J.reshape(len(x), n, len(x), n)

def judge_logdet(f, x, logdet, method):
    "Assert logdet = log |det dy_i/dx_i| and dy_i/dx_j = 0 for examples j != i, as for zuko's transforms"
    J = dense_jacobian(f, x, method)
    tol = 1e-5 if method=='finite' else 1e-8
    for i in range(len(x)):
        error = logdet[i]-torch.linalg.slogdet(J[i,:,i])[1]
        assert error.abs()<tol, f'log-determinant of example {i}, {method}'
        others = [J[i,:,j] for j in range(len(x)) if j!=i]
        assert not any(o.any() for o in others), f'example {i} depends on another one, {method}'

def judge_density(f, x, methods=('jacrev', 'jacfwd', 'finite'), **context):
    "Judge the log-determinants of both directions"
    y,logdet = f(x, **context)
    y = y.detach()
    inverse_logdet = f.inverse(y, **context)[1]
    for method in methods:
        judge_logdet(lambda o: f(o, **context)[0], x, logdet.detach(), method)
        judge_logdet(lambda o: f.inverse(o, **context)[0], y, inverse_logdet.detach(), method)

@torch.no_grad()
def judge_inverse(f, x, tol=1e-8, **context):
    "Assert x = inverse(forward(x)) = forward(inverse(x)), with log-determinants that cancel"
    for there,back in ((f, f.inverse), (f.inverse, f)):
        y,logdet = there(x, **context)
        restored,back_logdet = back(y, **context)
        assert_close(restored, x, tol, 'round trip')
        assert logdet.shape==back_logdet.shape==(len(x),), 'one log-determinant per example'
        assert_close(logdet, -back_logdet, tol, 'log-determinants cancel')

@torch.no_grad()
def judge_examples(f, x, tol=1e-8, **context):
    "Assert that no example depends on another one, or on its place in the batch"
    flipped_context = {k:v.flip(0) for k,v in context.items()}
    rest_context = {k:v[1:] for k,v in context.items()}
    other = torch.cat([x[:1], 2*x[1:]+1])
    for g in (f, f.inverse):
        result = g(x, **context)
        flipped = g(x.flip(0), **flipped_context)
        with_other = g(other, **context)
        rest = g(x[1:], **rest_context)
        for i,want in enumerate(result):
            assert_close(flipped[i], want.flip(0), tol, 'a flipped batch gives a flipped result')
            assert_close(with_other[i][:1], want[:1], tol, 'other examples do not matter')
            assert_close(rest[i], want[1:], tol, 'an example by itself')

def judge_roundtrip(f, x, tol=1e-8, **context):
    "Judge inverses and the independence of examples, as in nflows' tests"
    judge_inverse(f, x, tol, **context)
    judge_examples(f, x, tol, **context)

@torch.no_grad()
def judge_type(f, x, dtype, tol, **context):
    "Assert shapes, one type throughout, equal results of equal calls, and unchanged arguments and parameters"
    f,x = deepcopy(f).to(dtype),x.to(dtype)
    x_before,state_before = x.clone(),deepcopy(f.state_dict())
    for g,at in ((f, x), (f.inverse, f(x, **context)[0])):
        y,logdet = g(at, **context)
        assert y.shape==x.shape and logdet.shape==(len(x),), f'shapes, {dtype}'
        assert y.dtype==logdet.dtype==dtype, f'types, {dtype}'
        again,again_logdet = g(at, **context)
        assert torch.equal(y, again) and torch.equal(logdet, again_logdet), f'equal calls, {dtype}'
    assert_close(y, x, tol, f'inverse in {dtype}')
    assert torch.equal(x, x_before), f'argument, {dtype}'
    state = f.state_dict()
    assert all(torch.equal(v, state[k]) for k,v in state_before.items()), f'parameters, {dtype}'

def judge_types(f, x, **context):
    "Judge both precisions, as in FrEIA's tests"
    judge_type(f, x, torch.float32, 2e-3, **context)
    judge_type(f, x, torch.float64, 1e-8, **context)

@torch.no_grad()
def judge_integral(f, d, size=16., n=321):
    "Assert sum p(x) h^d = 1 over a grid of step h, with p(x) = 0 at its rim, for the density p of a flow"
    base = Independent(Normal(torch.zeros(d).double(), 1.), 1)
    flow = TransformedDistribution(base, as_transform(f))
    u = torch.linspace(-size, size, n).double()
    points = torch.cartesian_prod(*[u]*d).view(-1, d)
    p = flow.log_prob(points).exp().view([n]*d)
    assert (p.sum()*(u[1]-u[0])**d-1).abs()<1e-4, 'sums to 1'
    rim = [p.select(axis, i).max() for axis in range(d) for i in (0, -1)]
    assert max(rim)<1e-8, 'vanishes at the rim'

@pytest.mark.parametrize('name', CASES)
def test_density(name):
    f,x,context = made(CASES[name])
    # torch.func does not differentiate through the nodes of the reversible backward
    methods = ('autograd', 'finite') if 'reversible' in name else ('jacrev', 'jacfwd', 'finite')
    judge_density(f, x, methods, **context)

@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('judge', [judge_inverse, judge_examples, judge_types],
                         ids=['inverse', 'examples', 'types'])
def test_bijection(judge, name):
    f,x,context = made(CASES[name])
    judge(f, x, **context)

WITH_CONTEXT = [name for name,case in CASES.items() if {'mask', 't'}&set(case.inputs.split())]

@torch.no_grad()
@pytest.mark.parametrize('shape', [(), (5,), (2, 3)])
@pytest.mark.parametrize('name', WITH_CONTEXT)
def test_a_transform_repeats_its_context_for_every_sample(name, shape):
    "Compared with the map itself, called once for each sample of the batch"
    f,x,context = made(CASES[name])
    base = Independent(Normal(torch.zeros_like(x), 1.), 2)
    flow = TransformedDistribution(base, as_transform(f, event_dim=2, **context))
    torch.manual_seed(0)
    samples = flow.sample(shape)
    torch.manual_seed(0)
    batches = base.sample(shape).reshape(-1, *x.shape)
    mapped = [f(z, **context) for z in batches]
    assert_close(samples.reshape(-1, *x.shape), torch.stack([y for y,_ in mapped]), 1e-12, 'samples')
    by_hand = torch.stack([base.log_prob(z)-logdet for z,(_,logdet) in zip(batches, mapped)])
    assert_close(flow.log_prob(samples), by_hand.reshape(*shape, 2), 1e-8, 'densities')

@pytest.mark.parametrize('transform', [torch.func.grad, torch.func.jacrev, torch.func.vmap])
def test_transforms_of_functions_say_that_they_need_stored_activations(transform):
    reversible,_,context = made(CASES['transformer-reversible'])
    def f(x): return reversible(x.view(1, 3, 8), t=torch.tensor([.5]))[0].sum()
    with pytest.raises(RuntimeError, match='reversible=False'): transform(f)(torch.randn(1, 3, 8).double())

def test_derivatives_in_forward_mode_say_that_they_need_stored_activations():
    reversible,x,context = made(CASES['transformer-reversible'])
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match='reversible=False'):
        reversible(forward_ad.make_dual(x, x), **context)

STACKS = dict(
    transformer=lambda **kw: BijectiveTransformer(2, 4, 2, **kw),
    multiscale=lambda **kw: MultiscaleTransformer(1, 4, 2, **kw),
    sparse=lambda **kw: BijectiveMoE(2, 2, 1, k_active=1, balance=.1, z_loss=.1, **kw))

@pytest.mark.parametrize('bits', [None, 12])
@pytest.mark.parametrize('name', STACKS)
def test_with_stored_activations_transforms_give_the_gradients(name, bits):
    "Also on the lattice and with the terms of routers, which have derivatives of their own"
    m = seeded_weights(STACKS[name](reversible=False, lattice_bits=bits)).train()
    x = to_lattice(torch.randn(2, 5, 8), 12)
    def loss(x, params): return torch.func.functional_call(m, params, (x,))[0].sin().sum()
    params = dict(m.named_parameters())
    found_x,found = torch.func.grad(loss, argnums=(0, 1))(x, params)
    leaf = x.clone().requires_grad_()
    want_x,*want = torch.autograd.grad(loss(leaf, params), [leaf, *params.values()])
    assert torch.equal(found_x, want_x)
    assert all(torch.equal(a, b) for a,b in zip(found.values(), want, strict=True))

def test_a_reversible_stack_takes_the_parameters_of_a_functional_call():
    reversible,x,context = made(CASES['transformer-reversible'])
    scaled = {k:(2*p).detach().requires_grad_() for k,p in reversible.named_parameters()}
    y,_ = torch.func.functional_call(reversible, scaled, (x,), context)
    y.sum().backward()
    assert all(p.grad is None for p in reversible.parameters())
    with torch.no_grad():
        for p in reversible.parameters(): p.mul_(2)
    reversible(x, **context)[0].sum().backward()
    grads = [(scaled[k].grad, p.grad) for k,p in reversible.named_parameters()]
    assert all(a is b is None or torch.equal(a, b) for a,b in grads)

def flow_on_the_line():
    "Two normalisations of one feature"
    return seeded_weights(BijectiveSequential(ActNorm(1), ActNorm(1)), .4).double().eval()

def flow_in_the_plane():
    "Five affine maps of two features"
    maps = [affine(1, .5), BijectiveLinear(2, coupling='affine'), ActNorm(2), affine(1, .5), affine(1, .5)]
    return BijectiveSequential(*[seeded_weights(f, .4, i) for i,f in enumerate(maps)]).double().eval()

@pytest.mark.parametrize('make,d', [(flow_on_the_line, 1), (flow_in_the_plane, 2)], ids=['line', 'plane'])
def test_integral(make, d): judge_integral(make(), d)

# The lattice

KINDS = ['transformer', 'block', 'coupling', 'linear', 'rotation', 'sheared', 'permutation', 'mixed']

class Sizes(NamedTuple):
    "Sizes of a map on the lattice"
    d:int=8 # Features of a head, of a half, or one less than those of a state
    heads:int=1 # Heads of attention
    depth:int=4 # Blocks, or shears of a matrix
    window:int=7 # Width of the local coupling in a block; 0 for none
    bits:int=12 # Grid of the states
    seed:int=0 # Seed of the weights and of all random parts

def n_features(kind, s):
    "Features of the state of a map"
    if kind in ('transformer', 'block'): return 4*s.d*s.heads
    return 2*s.d if kind in ('coupling', 'mixed') else s.d+1

def rotation_on_lattice(d, bits): return PairRotation(torch.rand(d)*6.2-3.1, bits)
def linear_on_lattice(D, s):
    "A learned matrix, with mixings and a bias for some seeds"
    mixing,bias = mixings[s.seed%3],s.seed%2==0
    return BijectiveLinear(D, s.depth, mixing=mixing, bias=bias, lattice_bits=s.bits, seed=s.seed)

def mixed_on_lattice(D, s):
    "Five maps of different kinds"
    maps = [additive(s.d, s.bits), linear_on_lattice(D, s), rotation_on_lattice(s.d, s.bits), Permutation(D)]
    return BijectiveSequential(*maps, additive(s.d, s.bits))

def fresh_on_lattice(kind, D, s):
    "A map on the lattice with fresh weights"
    kwargs = dict(lattice_bits=s.bits, local_window=s.window)
    if kind=='transformer':
        return BijectiveTransformer(s.depth, D//2, s.heads, time_conditioning=s.seed%2==0, **kwargs)
    if kind=='block': return BijectiveTransformerBlock(D//2, s.heads, **kwargs)
    if kind=='coupling': return additive(s.d, s.bits)
    if kind=='linear': return linear_on_lattice(D, s)
    if kind=='rotation': return rotation_on_lattice(D//2, s.bits)
    if kind=='sheared': return ShearedLinear(unit_determinant(D, s.seed), s.bits)
    return Permutation(D) if kind=='permutation' else mixed_on_lattice(D, s)

def on_lattice(kind, s, std=.3):
    "A map on the lattice with random weights, and the features of its state"
    torch.manual_seed(s.seed)
    D = n_features(kind, s)
    return seeded_weights(fresh_on_lattice(kind, D, s), std, s.seed).eval(), D

any_sizes = st.builds(Sizes, d=st.integers(1, 9), heads=st.integers(1, 3), depth=st.integers(1, 6),
                      window=st.sampled_from([0, 1, 7]), bits=st.integers(3, 12), seed=st.integers(0, 10**6))

@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(KINDS), sizes=any_sizes, std=st.sampled_from([.3, .3, 30.]), B=st.integers(1, 4),
       L=st.integers(1, 40), double=st.booleans(), masked=st.booleans(), bf16=st.booleans())
@example(kind='linear', sizes=Sizes(d=9, depth=6, window=0, seed=1), std=30., B=4, L=40,
         double=False, masked=False, bf16=False) # An update leaves the lattice
def test_inverse_is_exact_on_the_lattice(kind, sizes, std, B, L, double, masked, bf16):
    "inverse(forward(x)) = x and forward(inverse(x)) = x to the bit, and results are on the lattice"
    dtype = torch.float64 if double else torch.float32
    bits = sizes.bits+15 if double else sizes.bits
    f,D = on_lattice(kind, sizes._replace(bits=bits), std)
    f.to(dtype)
    x = to_lattice(torch.randn(B, L, D, dtype=dtype), bits)
    context = random_context(B, L, masked, timed=getattr(f, 'time', None) is not None)
    try:
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=bf16 and not double):
            y,z = f(x, **context)[0],f.inverse(x, **context)[0]
            assert y.dtype==z.dtype==dtype
            assert torch.equal((y*2**bits).round(), y*2**bits)
            assert torch.equal(f.inverse(y, **context)[0], x)
            assert torch.equal(f(z, **context)[0], x)
    except LatticeError:
        # too large for the grid: an error, and not a wrong inverse
        assert kind=='sheared' or std>1

LAYOUTS = ['transformer', 'block', 'coupling', 'sheared', 'rotation', 'permutation', 'linear',
           'linear after sheared', 'coupling after sheared'] # results of a sheared layer are transposed

@pytest.mark.parametrize('name', LAYOUTS)
def test_inverse_is_exact_whatever_the_layout_of_the_state(name):
    kind = name.split()[0]
    f,D = on_lattice(kind, Sizes(15 if kind in ('linear', 'sheared', 'rotation') else 8))
    x = to_lattice(torch.randn(D, 64, 50), 12).movedim(0, -1)
    if 'after' in name:
        f = BijectiveSequential(ShearedLinear(unit_determinant(D), 12), f)
        x = x.contiguous()
    context = dict(t=torch.rand(64)) if kind=='transformer' else {}
    with torch.no_grad(): assert torch.equal(f.inverse(f(x, **context)[0], **context)[0], x)

# Off the lattice

def off_lattice(name, d, n, seed):
    "A map off the lattice, and the features of its state"
    if name=='linear': return BijectiveLinear(d+1, n, couplings[seed%2], mixings[seed%3]), d+1
    if name=='additive': return additive(d), 2*d
    if name=='affine': return affine(d), 2*d
    return (ActNorm(d), d) if name=='actnorm' else (transformer(n, time_conditioning=True), 8)

@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(['linear', 'additive', 'affine', 'actnorm', 'transformer']), d=st.integers(1, 4),
       n=st.integers(1, 4), B=st.integers(2, 3), L=st.integers(1, 3), seed=st.integers(0, 10**6),
       masked=st.booleans())
def test_judges_agree_off_the_lattice(name, d, n, B, L, seed, masked):
    torch.manual_seed(seed)
    f,D = off_lattice(name, d, n, seed)
    f = seeded_weights(f, .4, seed).double().eval()
    context = dict(mask=torch.rand(B, L)<.6) if masked else {}
    if name=='transformer': context['t'] = torch.rand(B)
    x = torch.randn(B, L, D, dtype=torch.float64)
    judge_roundtrip(f, x, **context)
    judge_density(f, x, ('jacrev',), **context)

def token_volume(f, x):
    "1/2 log det J'J for the map of one token, (d,), to its normalised features, mean and log std, (d+2,)"
    J = torch.func.jacfwd(lambda o: torch.cat(f(o[None,None])[:2], -1).flatten())(x)
    return torch.logdet(J.T@J)/2

@pytest.mark.parametrize('eps', [0., 1e-3, 1.])
@pytest.mark.parametrize('dim', [2, 3, 8])
def test_volume_of_invertible_layer_norm(dim, eps):
    torch.manual_seed(0)
    f = seeded_weights(InvertibleLayerNorm(dim, eps), .4).double()
    x = 2+3*torch.randn(2, 3, dim).double()
    mask = torch.tensor([[True, False, True], [False]*3])
    volumes = torch.stack([token_volume(f, o) for o in x.flatten(0, 1)]).view(2, 3)
    assert_close(f(x)[2], volumes.sum(1), 1e-8, 'all tokens')
    y,stats,logdet = f(x, mask=mask)
    assert_close(logdet, (volumes*mask).sum(1), 1e-8, 'real tokens')
    back,inverse_logdet = f.inverse(y, stats, mask=mask)
    assert_close(back, x, 1e-8, 'inverse')
    assert_close(logdet, -inverse_logdet, 1e-8, 'log-determinants cancel')

# The judges before planted faults

class Faulty(nn.Module):
    "A correct affine coupling, with functions that change the results of its two directions"
    is_bijective = True
    def __init__(self, forward_fault=None, inverse_fault=None):
        super().__init__()
        self.register_buffer('calls', torch.zeros(()))
        self.f = seeded_weights(affine(1, .5), .4)
        self.forward_fault,self.inverse_fault = forward_fault,inverse_fault
    def forward(self, x):
        y,logdet = self.f(x)
        return (y, logdet) if self.forward_fault is None else self.forward_fault(self, x, y, logdet)
    def inverse(self, y):
        x,logdet = self.f.inverse(y)
        return (x, logdet) if self.inverse_fault is None else self.inverse_fault(self, y, x, logdet)

def leak(passive):
    "An amount that depends on another example: the map is still invertible, with the right log-determinant"
    return torch.cat([0*passive, 1e-3*passive.roll(1, 0)], -1)
def leaking_forward(f, x, y, logdet): return y+leak(x[...,1:]), logdet
def leaking_inverse(f, y, x, logdet): return f.f.inverse(y-leak(y[...,:1]))[0], logdet

def count_calls(f, x, y, logdet):
    f.calls += 1
    return y, logdet
def edit_argument(f, x, y, logdet):
    x.add_(1)
    return y, logdet
def on_state(g): return lambda f, x, y, logdet: (g(y), logdet)
def on_logdet(g): return lambda f, x, y, logdet: (y, g(logdet))

class Fault(NamedTuple):
    "The judges that must find a fault, and what it makes of the results of the two directions"
    judges:str
    forward:object=None # From the map, its argument, its correct result and log-determinant to wrong ones
    inverse:object=None

FAULTS = {
    'inverse a millionth off': Fault('inverse types', inverse=on_state(lambda x: x*(1+1e-6))),
    'inverse a percent off': Fault('density inverse types integral', inverse=on_state(lambda x: 1.01*x)),
    'nan': Fault('density inverse types', inverse=on_state(lambda x: x*float('nan'))),
    'noise': Fault('inverse types', on_state(lambda y: y+1e-7*torch.randn_like(y))),
    'wrong log-determinant':
        Fault('density integral', on_logdet(lambda l: l+1e-3), on_logdet(lambda l: l-1e-3)),
    'log-determinant of one position': Fault('density', on_logdet(lambda l: l/3), on_logdet(lambda l: l/3)),
    'sign of the inverse': Fault('density inverse', inverse=on_logdet(lambda l: -l)),
    'one log-determinant for all': Fault('inverse types', on_logdet(lambda l: l.sum())),
    'examples see each other': Fault('density examples', leaking_forward, leaking_inverse),
    'float32 in between': Fault('inverse types', on_state(lambda y: y.float().to(y))),
    'always float64': Fault('types', on_state(lambda y: y.double())),
    'another shape': Fault('types', on_state(lambda y: y.flatten(1))),
    'edits its argument': Fault('types', edit_argument),
    'counts its calls': Fault('types', count_calls)}

JUDGES = dict(
    density=partial(judge_density, methods=('jacrev',)), inverse=judge_inverse, examples=judge_examples,
    types=judge_types, integral=lambda f, x: judge_integral(f, x.shape[-1]))
FOUND_BY = [(judge, name) for name,fault in FAULTS.items() for judge in fault.judges.split()]

@pytest.mark.parametrize('judge,fault', FOUND_BY)
def test_judges_find_a_fault(judge, fault):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 2, dtype=torch.float64)
    JUDGES[judge](Faulty().double().eval(), x)
    faulty = Faulty(FAULTS[fault].forward, FAULTS[fault].inverse).double().eval()
    with pytest.raises(AssertionError): JUDGES[judge](faulty, x)
