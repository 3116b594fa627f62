"""Every bijection before judges in the manner of other libraries. They share no code with `check_bijection`, and are put to the test themselves at the end."""
from copy import deepcopy
from itertools import product
import pytest, torch
from hypothesis import example, given, settings, strategies as st
from torch import nn
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.nn.attention import SDPBackend, sdpa_kernel
from bijdiff.layers.bijection import as_transform, BijectiveSequential
from bijdiff.layers.lattice import LatticeError, to_lattice
from bijdiff.layers.coupling import AdditiveCoupling, AffineCoupling, CouplingNet
from bijdiff.layers.linear import BijectiveLinear, LinearCoupling, PairRotation, Permutation, ShearedLinear
from bijdiff.layers.norm import ActNorm, InvertibleLayerNorm
from bijdiff.layers.attention_inverse import BijectiveMultiHeadAttention
from bijdiff.layers.block import BijectiveTransformer, BijectiveTransformerBlock
from bijdiff.layers.multiscale import MultiscaleTransformer

def wild(m, std=.4, seed=0):
    "Random weights: at the identity initialisation nearly every claim holds"
    torch.manual_seed(seed)
    for p in m.parameters(): nn.init.normal_(p, std=std)
    return m

def of_determinant_one(n, seed=0):
    "A random matrix of determinant ±1"
    a,b = torch.randn(2, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(a)[0] @ (torch.eye(n).double() + .3*b.triu(1))

def initialised(norm):
    "An ActNorm that has seen its first batch"
    norm.train()(3*torch.randn(50, 4, norm.dim)+torch.arange(norm.dim))
    return norm

def affine(d, bound=2.): return AffineCoupling(CouplingNet(d, 8, dim_out=2*d), bound)
def transformer(n=2, **kw): return BijectiveTransformer(n, 4, 2, **{'reversible':False, **kw})
def several(): return BijectiveSequential(wild(affine(3)), wild(BijectiveLinear(6, coupling='affine', mixing='rotation')), initialised(ActNorm(6)), Permutation(6), wild(AdditiveCoupling(CouplingNet(3))))

# name: (how to make it, features, what it is conditioned on). Two texts of 3 positions; vectors where 'flat'.
CASES = {f'linear-{dim}-{n}-{coupling}-{mixing}{"" if bias else "-unbiased"}': (lambda a=(dim, n, coupling, mixing, bias): BijectiveLinear(*a), dim, 'flat' if bias else '')
         for (dim,n),coupling,mixing,bias in product([(2, 1), (5, 4), (8, 5)], ['additive', 'affine'], ['none', 'permutation', 'rotation'], [True, False])} | {
    'coupling':(lambda: LinearCoupling(5), 5, ''), 'coupling-flip-affine':(lambda: LinearCoupling(5, flip=True, affine=True), 5, 'flat'), 'permutation':(lambda: Permutation(5), 5, 'flat'),
    'rotation':(lambda: PairRotation(torch.tensor([.3, -2., 3.])), 6, ''), 'rotation-odd':(lambda: PairRotation(torch.tensor([1., -3.1])), 5, 'flat'),
    'sheared':(lambda: ShearedLinear(of_determinant_one(5)), 5, ''), 'sheared-flat':(lambda: ShearedLinear(of_determinant_one(2)), 2, 'flat'),
    'actnorm':(lambda: initialised(ActNorm(5)), 5, ''), 'actnorm-mask':(lambda: initialised(ActNorm(5)), 5, 'mask'), 'actnorm-1':(lambda: initialised(ActNorm(1)), 1, 'flat'),
    'additive':(lambda: AdditiveCoupling(CouplingNet(3)), 6, 'flat'), 'additive-mask':(lambda: AdditiveCoupling(CouplingNet(3)), 6, 'mask'), 'affine':(lambda: affine(3), 6, ''), 'affine-mask':(lambda: affine(3), 6, 'mask'), 'affine-flat':(lambda: affine(1), 2, 'flat'),
    'block':(lambda: BijectiveTransformerBlock(4, 2), 8, ''), 'block-mask':(lambda: BijectiveTransformerBlock(4, 1, local_window=0, coupling_depth=3), 8, 'mask'), 'transformer':(transformer, 8, ''),
    'transformer-mask-t':(lambda: transformer(time_conditioning=True), 8, 'mask t'), 'transformer-reversible':(lambda: transformer(reversible=True, time_conditioning=True), 8, 'mask t'),
    'attention-coupling':(lambda: BijectiveMultiHeadAttention(4, 2), 8, 'mask'), 'attention-mixing':(lambda: BijectiveMultiHeadAttention(4, 2, 'mixing'), 8, ''), 'attention-mixing-mask':(lambda: BijectiveMultiHeadAttention(4, 2, 'mixing'), 8, 'mask'),
    'multiscale':(lambda: MultiscaleTransformer(1, 4, 2, segment_length=2, reversible=False), 8, ''), 'multiscale-mask':(lambda: MultiscaleTransformer(1, 4, 2, segment_length=2, reversible=False), 8, 'mask'),
    'linear-mask':(lambda: BijectiveLinear(5, coupling='affine', mixing='rotation'), 5, 'mask'), 'several':(several, 6, ''), 'several-mask':(several, 6, 'mask')}

def case(name):
    "The map in float64, a state of two examples, and the context"
    torch.manual_seed(1); make,dim,how = CASES[name]
    m = make() if name.startswith(('actnorm', 'several')) else wild(make())              # those have random weights already
    x = torch.randn((2, dim) if 'flat' in how else (2, 3, dim), dtype=torch.float64)
    ctx = ({'mask':torch.tensor([[True, True, False], [False]*3])} if 'mask' in how else {}) | ({'t':torch.tensor([.2, .9])} if 't' in how.split() else {})
    return m.double().eval(), x, ctx

def dense(f, x, how):
    "Jacobian of every output with respect to every input of the whole batch, (B, n, B, n)"
    if how=='finite':
        with torch.no_grad(): J = torch.stack([(f(x+h)-f(x-h)).flatten()/2e-5 for h in 1e-5*torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)], -1)
    elif how=='autograd': J = torch.autograd.functional.jacobian(f, x)
    else:
        with sdpa_kernel(SDPBackend.MATH): J = getattr(torch.func, how)(f)(x)      # the fused kernel has no forward derivative
    return J.reshape(len(x), x[0].numel(), len(x), x[0].numel())

def judge_density(f, x, hows=('jacrev', 'jacfwd', 'finite'), **ctx):
    "As for zuko's transforms: log|det| from dense Jacobians of both directions; blocks between examples are zero"
    for g,at in ((f, x), (f.inverse, f(x, **ctx)[0].detach())):
        logdet = g(at, **ctx)[1].detach()
        for how in hows:
            J,tol = dense(lambda o: g(o, **ctx)[0], at, how),1e-5 if how=='finite' else 1e-8
            for i in range(len(x)):
                assert (logdet[i]-torch.linalg.slogdet(J[i,:,i])[1]).abs()<tol, f'log-determinant of example {i}, {how}'
                assert all(not J[i,:,j].any() for j in range(len(x)) if j!=i), f'example {i} depends on another one, {how}'

def close(a, b, tol, what): assert a.shape==b.shape and (a-b).abs().max()<tol, what
@torch.no_grad()
def judge_roundtrip(f, x, tol=1e-8, **ctx):
    "As in nflows' tests: both round trips, log-determinants that cancel, examples that do not see each other"
    (y,a),(z,b) = f(x, **ctx),f.inverse(x, **ctx)
    (back,c),(forth,d) = f.inverse(y, **ctx),f(z, **ctx)
    close(back, x, tol, 'inverse after forward'); close(forth, x, tol, 'forward after inverse')
    assert all(l.shape==(len(x),) for l in (a, b, c, d)), 'one log-determinant per example'
    close(a, -c, tol, 'log-determinants cancel'); close(b, -d, tol, 'log-determinants cancel')
    turned,last,others = {k:v.flip(0) for k,v in ctx.items()},{k:v[1:] for k,v in ctx.items()},torch.cat([x[:1], 2*x[1:]+1])
    for g,y,l in ((f, y, a), (f.inverse, z, b)):
        for got,want in zip(g(x.flip(0), **turned), (y, l)): close(got, want.flip(0), tol, 'a turned batch gives a turned result')
        for got,want in zip(g(others, **ctx), (y, l)): close(got[:1], want[:1], tol, 'other examples do not matter')
        for got,want in zip(g(x[1:], **last), (y, l)): close(got, want[1:], tol, 'an example by itself')

@torch.no_grad()
def judge_types(f, x, **ctx):
    "As in FrEIA's tests: both precisions, shapes, the same twice, and nothing is changed in passing"
    for dtype,tol in ((torch.float32, 2e-3), (torch.float64, 1e-8)):
        m,o = deepcopy(f).to(dtype),x.to(dtype)
        kept,state = o.clone(),deepcopy(m.state_dict())
        for g,at in ((m, o), (m.inverse, m(o, **ctx)[0])):
            (a,la),(b,lb) = g(at, **ctx),g(at, **ctx)
            assert a.shape==x.shape and a.dtype==la.dtype==dtype and la.shape==(len(x),), f'shape and dtype, {dtype}'
            assert torch.equal(a, b) and torch.equal(la, lb), f'twice the same, {dtype}'
        close(a, o, tol, f'inverse in {dtype}')
        assert torch.equal(o, kept) and all(torch.equal(v, m.state_dict()[k]) for k,v in state.items()), f'input and parameters are as before, {dtype}'

@torch.no_grad()
def judge_integral(f, d, size=16., n=321):
    "A density sums to 1 over a grid"
    flow = TransformedDistribution(Independent(Normal(torch.zeros(d).double(), 1.), 1), as_transform(f))
    u = torch.linspace(-size, size, n).double()
    p = flow.log_prob(torch.cartesian_prod(*[u]*d).view(-1, d)).exp()
    assert (p.sum()*(u[1]-u[0])**d-1).abs()<1e-4 and max(p.view(n, -1)[[0,-1]].max(), p.view(-1, n)[:,[0,-1]].max() if d>1 else 0)<1e-8, 'sums to 1, and vanishes at the rim'

@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('judge', [judge_density, judge_roundtrip, judge_types], ids=['density', 'roundtrip', 'types'])
def test_bijection(judge, name):
    f,x,ctx = case(name)
    judge(f, x, *([('autograd', 'finite')] if judge is judge_density and 'reversible' in name else []), **ctx)   # torch.func does not see through its nodes

def affine_flow(): return BijectiveSequential(*[wild(m, .4, i) for i,m in enumerate([affine(1, .5), BijectiveLinear(2, coupling='affine'), ActNorm(2), affine(1, .5), affine(1, .5)])]).double().eval()
@pytest.mark.parametrize('make,d', [(lambda: wild(BijectiveSequential(ActNorm(1), ActNorm(1))).double().eval(), 1), (affine_flow, 2)], ids=['line', 'plane'])
def test_integral(make, d): judge_integral(make(), d)

def on_lattice(kind, d, heads, depth, window, bits, seed, std=.3):
    "Some map on the lattice, and the features of its state"
    torch.manual_seed(seed)
    D = {'transformer':4*d*heads, 'block':4*d*heads, 'coupling':2*d, 'mixed':2*d}.get(kind, d+1)
    linear = lambda D: BijectiveLinear(D, depth, mixing=('none', 'permutation', 'rotation')[seed%3], bias=seed%2==0, lattice_bits=bits, seed=seed)
    make = dict(transformer=lambda: BijectiveTransformer(depth, D//2, heads, lattice_bits=bits, local_window=window, time_conditioning=seed%2==0),
                block=lambda: BijectiveTransformerBlock(D//2, heads, lattice_bits=bits, local_window=window), coupling=lambda: AdditiveCoupling(CouplingNet(d), bits),
                linear=lambda: linear(D), rotation=lambda: PairRotation(torch.rand(D//2)*6.2-3.1, bits), sheared=lambda: ShearedLinear(of_determinant_one(D, seed), bits), permutation=lambda: Permutation(D),
                mixed=lambda: BijectiveSequential(AdditiveCoupling(CouplingNet(d), bits), linear(D), PairRotation(torch.rand(d)*6.2-3.1, bits), Permutation(D), AdditiveCoupling(CouplingNet(d), bits)))
    return wild(make[kind](), std, seed).eval(), D

@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(['transformer', 'block', 'coupling', 'linear', 'rotation', 'sheared', 'permutation', 'mixed']), d=st.integers(1, 9), heads=st.integers(1, 3), depth=st.integers(1, 6),
       window=st.sampled_from([0, 1, 7]), bits=st.integers(3, 12), std=st.sampled_from([.3, .3, 30.]), seed=st.integers(0, 10**6), B=st.integers(1, 4), L=st.integers(1, 40), double=st.booleans(), masked=st.booleans(), bf16=st.booleans())
@example(kind='linear', d=9, heads=1, depth=6, window=0, bits=12, std=30., seed=1, B=4, L=40, double=False, masked=False, bf16=False)      # leaves the lattice
def test_inverse_is_exact_on_the_lattice(kind, d, heads, depth, window, bits, std, seed, B, L, double, masked, bf16):
    dtype,bits = (torch.float64, bits+15) if double else (torch.float32, bits)
    f,D = on_lattice(kind, d, heads, depth, window, bits, seed, std)
    x = to_lattice(torch.randn(B, L, D, dtype=dtype), bits)
    ctx = (dict(mask=torch.rand(B, L)<torch.rand(B, 1)*1.5-.25) if masked else {}) | (dict(t=torch.rand(B)) if getattr(f, 'time', None) else {})     # some rows are padding only
    try:
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=bf16 and not double):
            y,z = f.to(dtype)(x, **ctx)[0],f.inverse(x, **ctx)[0]
            assert y.dtype==z.dtype==dtype and torch.equal((y*2**bits).round(), y*2**bits)
            assert torch.equal(f.inverse(y, **ctx)[0], x) and torch.equal(f(z, **ctx)[0], x)
    except LatticeError: assert kind=='sheared' or std>1                                # too large for the grid: an error, and no wrong inverse

@pytest.mark.parametrize('kind', ['transformer', 'block', 'coupling', 'sheared', 'rotation', 'permutation', 'linear', 'linear behind sheared', 'coupling behind sheared'])
def test_inverse_is_exact_whatever_the_layout_of_the_state(kind):
    f,D = on_lattice(kind.split()[0], 15 if kind in ('linear', 'sheared', 'rotation') else 8, 1, 4, 7, 12, 0)
    x = to_lattice(torch.randn(D, 64, 50), 12).movedim(0, -1)
    if 'behind' in kind: f,x = BijectiveSequential(ShearedLinear(of_determinant_one(D), 12), f),x.contiguous()   # whose result is transposed
    ctx = dict(t=torch.rand(64)) if kind=='transformer' else {}
    with torch.no_grad(): assert torch.equal(f.inverse(f(x, **ctx)[0], **ctx)[0], x)

@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(['linear', 'additive', 'affine', 'actnorm', 'transformer']), d=st.integers(1, 4), n=st.integers(1, 4), B=st.integers(2, 3), L=st.integers(1, 3), seed=st.integers(0, 10**6), masked=st.booleans())
def test_judges_agree_off_the_lattice(name, d, n, B, L, seed, masked):
    make,D = dict(linear=(lambda: BijectiveLinear(d+1, n, ('additive', 'affine')[seed%2], ('none', 'permutation', 'rotation')[seed%3]), d+1), additive=(lambda: AdditiveCoupling(CouplingNet(d)), 2*d),
                  affine=(lambda: affine(d), 2*d), actnorm=(lambda: ActNorm(d), d), transformer=(lambda: transformer(n, time_conditioning=True), 8))[name]
    f = wild(make(), .4, seed).double().eval()
    ctx = (dict(mask=torch.rand(B, L)<.6) if masked else {}) | (dict(t=torch.rand(B)) if name=='transformer' else {})
    x = torch.randn(B, L, D, dtype=torch.float64)
    judge_roundtrip(f, x, **ctx); judge_density(f, x, ('jacrev',), **ctx)

@pytest.mark.parametrize('eps', [0., 1e-3, 1.])
@pytest.mark.parametrize('dim', [2, 3, 8])
def test_volume_of_invertible_layer_norm(dim, eps):
    f = wild(InvertibleLayerNorm(dim, eps)).double()
    x,mask = 2+3*torch.randn(2, 3, dim).double(),torch.tensor([[True, False, True], [False]*3])
    flat = lambda o: torch.cat(f(o[None,None])[:2], -1).flatten()                           # one token into R^(d+2)
    want = torch.stack([torch.logdet(J.T@J)/2 for J in map(torch.func.jacfwd(flat), x.flatten(0, 1))]).view(2, 3)
    close(f(x)[2], want.sum(1), 1e-8, 'all tokens'); close(f(x, mask=mask)[2], (want*mask).sum(1), 1e-8, 'real tokens')
    back,inverse_logdet = f.inverse(*f(x, mask=mask)[:2], mask=mask)
    close(back, x, 1e-8, 'inverse'); close(f(x, mask=mask)[2], -inverse_logdet, 1e-8, 'log-determinants cancel')

class Sabotaged(nn.Module):
    "An honest affine coupling, but for one thing"
    is_bijective = True
    def __init__(self, there=None, back=None):
        super().__init__(); self.register_buffer('calls', torch.zeros(()))
        self.f,self.there,self.back = wild(affine(1, .5)),there,back
    def forward(self, x): return self.f(x) if self.there is None else self.there(self, x, *self.f(x))
    def inverse(self, y): return self.f.inverse(y) if self.back is None else self.back(self, y, *self.f.inverse(y))

def leak(passive): return torch.cat([0*passive, 1e-3*passive.roll(1, 0)], -1)             # from the next example; still invertible, with the right log-determinant
def counts(s, x, y, l): s.calls += 1; return y,l
# fault: (forward or None, inverse or None), each from (the map, its input, its honest output, its honest log-determinant); judges that must refuse it
SABOTAGE = {'inverse a millionth off':((None, lambda s, y, x, l: (x*(1+1e-6), l)), 'roundtrip types'), 'inverse a percent off':((None, lambda s, y, x, l: (1.01*x, l)), 'density roundtrip types integral'),
    'nan':((None, lambda s, y, x, l: (x*float('nan'), l)), 'density roundtrip types'), 'noise':((lambda s, x, y, l: (y+1e-7*torch.randn_like(y), l), None), 'roundtrip types'),
    'log-determinant off':((lambda s, x, y, l: (y, l+1e-3), lambda s, y, x, l: (x, l-1e-3)), 'density integral'), 'log-determinant of one position':((lambda s, x, y, l: (y, l/3), lambda s, y, x, l: (x, l/3)), 'density'),
    'sign of the inverse':((None, lambda s, y, x, l: (x, -l)), 'density roundtrip'), 'one log-determinant for all':((lambda s, x, y, l: (y, l.sum()), None), 'roundtrip types'),
    'examples see each other':((lambda s, x, y, l: (y+leak(x[...,1:]), l), lambda s, y, x, l: (s.f.inverse(y-leak(y[...,:1]))[0], l)), 'density roundtrip'),
    'float32 in between':((lambda s, x, y, l: (y.float().to(y), l), None), 'roundtrip types'), 'always float64':((lambda s, x, y, l: (y.double(), l), None), 'types'), 'another shape':((lambda s, x, y, l: (y.flatten(1), l), None), 'types'),
    'edits its input':((lambda s, x, y, l: (y, (l, x.add_(1))[0]), None), 'types'), 'counts its calls':((counts, None), 'types')}
JUDGES = dict(density=lambda f, x: judge_density(f, x, ('jacrev',)), roundtrip=judge_roundtrip, types=judge_types, integral=lambda f, x: judge_integral(f, x.shape[-1]))
@pytest.mark.parametrize('judge,fault', [(j, k) for k,(_,judges) in SABOTAGE.items() for j in judges.split()])
def test_judges_refuse_a_fault(judge, fault):
    x = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    JUDGES[judge](Sabotaged().double().eval(), x)                                           # what is honest is accepted
    with pytest.raises(AssertionError): JUDGES[judge](Sabotaged(*SABOTAGE[fault][0]).double().eval(), x)
