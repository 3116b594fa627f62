"""The noise against references that share no code with it: counts of samples against closed forms, sequences
put together again, Kolmogorov's equation by another integrator, Bayes' rule with matrices."""
import math
from functools import lru_cache
from typing import Callable, NamedTuple
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.integrate import solve_ivp
from scipy.stats import chisquare, kstest, norm
from helpers import derivative, float64, seeded_generator
from bijdiff.diffusion import corruption
from bijdiff.diffusion.schedules import Cosine, CosineSquared, Geometric, get_schedule, HalfCosine, LogLinear
from bijdiff.diffusion.schedules import low_discrepancy_times, Polynomial, schedules
import bijdiff.diffusion.transitions # methods of the noise
from bijdiff.diffusion.packing import count_gaps, NoisyBatch, pack
from bijdiff.diffusion.corruption import Corruption, corruption_from_dict, GIDDCorruption

V = 3
KINDS = 'mask','substitute','delete'
half_pi = math.pi/2

# Schedules: alpha by hand, 1 at t=0 but for the geometric one

class ScheduleByHand(NamedTuple):
    "A schedule, and its alpha as a function of a number"
    schedule:object
    alpha:Callable

SCHEDULES = {
    'log_linear': ScheduleByHand(LogLinear(), lambda t: 1-.999*t),
    'log_linear, eps 0': ScheduleByHand(LogLinear(0.), lambda t: 1-t),
    'polynomial': ScheduleByHand(Polynomial(3., .01), lambda t: .01+.99*(1-t**3)),
    'cosine': ScheduleByHand(Cosine(), lambda t: 1-.999*math.cos(half_pi*(1-t))),
    'half_cosine': ScheduleByHand(HalfCosine(), lambda t: .001+.999*math.cos(half_pi*t)),
    'cosine_squared': ScheduleByHand(CosineSquared(), lambda t: .001+.999*math.cos(half_pi*t)**2),
    'geometric': ScheduleByHand(Geometric(.01, 8.), lambda t: math.exp(-.01*800**t)),
}

def test_every_schedule_has_a_formula_by_hand():
    assert {type(o.schedule) for o in SCHEDULES.values()}==set(schedules.values())

def central_difference(f, t, d=1e-6):
    "f'(t) as (f(t+d)-f(t-d)) / 2d"
    return (f(t+d)-f(t-d))/(2*d)

@pytest.mark.parametrize('name', SCHEDULES)
def test_schedules_by_hand(name):
    s,alpha_by_hand = SCHEDULES[name]
    t = torch.linspace(.001, .999, 97, dtype=torch.float64)
    alpha = float64(*[alpha_by_hand(o) for o in t.tolist()])
    dalpha = float64(*[central_difference(alpha_by_hand, o) for o in t.tolist()])
    cases = [
        (s.alpha(t), alpha, 1e-12),
        (s.dalpha(t), dalpha, 1e-7),
        (s.sigma(t), -alpha.log(), 1e-9),
        (s.dsigma(t)*alpha, -dalpha, 1e-7),
        (s.t(alpha), t, 1e-7),
        (s.alpha(t.float()), alpha, 1e-5),
    ]
    for got,expected,tolerance in cases:
        assert got.shape==t.shape
        assert (got-expected).abs().max()<tolerance
    assert s.alpha(t.float()).dtype==torch.float32
    assert (s.alpha(t).diff()<0).all()

# Noises: probabilities of the four states by hand

class NoiseByHand(NamedTuple):
    "A noise, and the probabilities of kept, masked, substituted and deleted as a function of a number"
    corruption:Corruption
    state_probs:Callable

def weighted_probs(weights, alphas):
    "State probabilities w_k (1-alpha_k(t)) of the kinds of noise, for normalised weights w; the rest is kept"
    weights = np.array(weights)
    def state_probs(t):
        corrupted = weights/weights.sum()*[1-alpha(t) for alpha in alphas]
        return np.array([1-corrupted.sum(), *corrupted])
    return state_probs

def gidd_probs(p_uniform, gamma):
    "State probabilities (1-t, t, c, 0)/(1+c) of GIDD, for c = p/(1-p) 2^gamma (t(1-t))^(gamma/2)"
    def state_probs(t):
        c = p_uniform/(1-p_uniform)*2**gamma*(t*(1-t))**(gamma/2)
        return np.array([1-t, t, c, 0.])/(1+c)
    return state_probs

WEIGHTS = dict( # of masking, substitution and deletion
    mask=(1,0,0),
    uniform=(0,1,0),
    hybrid=(8,2,0),
    mask_delete=(1,0,1),
    mostly_delete=(1,0,9),
    all_three=(.5,.2,.3),
    delete=(0,0,1),
    uniform_delete=(0,2,3),
)
OWN_SCHEDULES = dict( # of masking, substitution and deletion
    hybrid=('cosine','log_linear','cosine'),
    mask_delete=('half_cosine','cosine','log_linear'),
    all_three=('cosine','half_cosine','log_linear'),
    uniform_delete=('cosine','polynomial','geometric'),
)
GIDD = (.1, 1.),(.3, 2.),(.6, .5) # p_uniform and gamma

def common_schedule(weights, schedule, alpha):
    "A noise whose kinds follow one schedule"
    return NoiseByHand(Corruption(V, *weights, schedule=schedule), weighted_probs(weights, [alpha]*3))

def own_schedules(weights, names):
    "A noise whose kinds follow schedules of their own"
    schedule = {kind:SCHEDULES[name].schedule for kind,name in zip(KINDS, names)}
    alphas = [SCHEDULES[name].alpha for name in names]
    return NoiseByHand(Corruption(V, *weights, schedule=schedule), weighted_probs(weights, alphas))

def all_noises():
    "Every noise by its name"
    noises = {}
    for kind,weights in WEIGHTS.items():
        for name,by_hand in SCHEDULES.items():
            noises[f'{kind}, {name}'] = common_schedule(weights, *by_hand)
    for kind,names in OWN_SCHEDULES.items():
        noises[f'own schedules, {kind}'] = own_schedules(WEIGHTS[kind], names)
    for p,gamma in GIDD:
        noises[f'gidd {p} {gamma}'] = NoiseByHand(GIDDCorruption(V, p, gamma), gidd_probs(p, gamma))
    return noises

NOISES = all_noises()
each_noise = pytest.mark.parametrize('name', NOISES)

def marginals(name, t):
    "Distributions q(z|x) of what each clean token x has become: kept [z=x] + substituted/V, masked, deleted"
    kept,masked,substituted,deleted = NOISES[name].state_probs(t)
    tokens = kept*np.eye(V)+substituted/V
    return np.hstack([tokens, np.full((V, 1), masked), np.full((V, 1), deleted)])

@each_noise
def test_state_probabilities_by_hand(name):
    c,by_hand = NOISES[name]
    ts = .01, .2, .5, .8, .99
    probs = torch.stack(c.state_probs(float64(*ts)), 1)
    assert np.abs(probs.numpy()-[by_hand(t) for t in ts]).max()<1e-12
    assert (probs.sum(1)-1).abs().max()<1e-12
    rates = torch.stack(c.state_prob_rates(float64(*ts)), 1)
    assert np.abs(rates.numpy()-[central_difference(by_hand, t) for t in ts]).max()<1e-6
    assert rates.sum(1).abs().max()<1e-9
    every_token = torch.arange(V).expand(len(ts), V)
    q = c.marginals(every_token, float64(*ts)).numpy()
    assert np.abs(q-[marginals(name, t) for t in ts]).max()<1e-12

def test_each_kind_follows_its_own_schedule():
    "A kind without a schedule of its own follows the default one"
    c = Corruption(V, 1, 1, 2, dict(mask=LogLinear(0.), delete=Polynomial(3., 0.)))
    t = float64(.3, .6)
    expected = torch.stack([t/4, (1-HalfCosine().alpha(t))/4, t**3/2])
    assert torch.allclose(torch.stack(c.state_probs(t)[1:]), expected, atol=1e-12)

def test_the_schedule_of_a_kind_without_weight_does_not_matter():
    t = float64(.3, .6)
    a,b = (Corruption(V, 1, 1, 0, dict(mask=LogLinear(), delete=s)) for s in (Geometric(), Cosine()))
    assert all(torch.equal(x, y) for x,y in zip(a.state_probs(t), b.state_probs(t)))

def test_three_equal_schedules_are_one():
    t = float64(.3, .6)
    one = Corruption(V, 1, 1, 1, LogLinear())
    three = Corruption(V, 1, 1, 1, dict.fromkeys(KINDS, LogLinear()))
    assert all(torch.allclose(x, y) for x,y in zip(one.state_probs(t), three.state_probs(t)))
    assert all(torch.allclose(x, y) for x,y in zip(one.event_rates(t), three.event_rates(t)))

def test_weights_are_normalised():
    assert Corruption(V, 2, 1, 1).weights==dict(mask=.5, substitute=.25, delete=.25)
    assert Corruption(V).masks_only
    assert not Corruption(V).deletes
    assert Corruption(V, 1, 0, 1e-9).deletes

# Frequencies of samples

DELETED = V+1 # the symbol of a deleted token
TIMES = .05, .3, .7, .95
N = 20_000 # tokens of each kind at each time
N_TESTS = len(NOISES)*len(TIMES)*(V*(V+2)+2)

def corrupted_tokens(c, t, seed):
    "Tokens 0 0 1 1 2 2 0 0 ..., N of each, and what each has become at time t"
    x0 = torch.arange(V).repeat_interleave(2).repeat(N//2)
    noisy = c.corrupt(x0[None], float64(t), seeded_generator(seed))
    n_left = int(noisy.lengths[0])
    position = noisy.position[0,:n_left]
    assert torch.equal(noisy.x0[0,:n_left], x0[position])
    z = torch.full_like(x0, DELETED)
    z[position] = noisy.xt[0,:n_left]
    return x0,z

def z_scores(name, c, t, seed):
    """Standard scores (k-np)/sqrt(np(1-p)) of all frequencies k of a sample

    Counted are the symbols that each clean token has become, and pairs of neighbours that are both masked or
    both deleted, of probability p^2 if tokens are independent. A frequency is exact if it is certain.
    """
    x0,z = corrupted_tokens(c, t, seed)
    table = torch.zeros(V, V+2).index_put_((x0, z), torch.ones(V*N), accumulate=True).numpy()
    pairs = [((z[0::2]==symbol)&(z[1::2]==symbol)).sum().item() for symbol in (V, DELETED)]
    _,masked,_,deleted = NOISES[name].state_probs(t)
    k = np.array([*table.ravel(), *pairs])
    n = np.array([N]*table.size+[len(z)//2]*2)
    p = np.array([*marginals(name, t).ravel(), masked**2, deleted**2])
    certain = (p<1e-12)|(p>1-1e-12)
    assert (k[certain]==(n*p)[certain].round()).all(), 'impossible'
    return ((k-n*p)[~certain]/np.sqrt(n*p*(1-p))[~certain])

def assert_frequencies(name):
    "A z-test of every frequency, at the level of 1/1000 for all tests of all noises together (Bonferroni)"
    c = NOISES[name].corruption
    worst = max(np.abs(z_scores(name, c, t, seed)).max(initial=0.) for seed,t in enumerate(TIMES))
    assert worst<norm.isf(1e-3/2/N_TESTS), f'{worst:.1f} standard errors off'

@each_noise
def test_frequencies_are_the_state_probabilities(name): assert_frequencies(name)

# Planted faults: wrong versions of draw(x0, state_probs, vocab_size, generator), which draws all symbols

def too_little_noise(draw):
    "All noise is 2% less likely"
    def wrong(x0, p, V, g):
        kept = p.kept+.02*(1-p.kept)
        return draw(x0, type(p)(kept, *[.98*o for o in p[1:]]), V, g)
    return wrong

def masks_for_substitutes(draw):
    "Masks and substitutes change places"
    return lambda x0, p, V, g: draw(x0, p._replace(mask=p.substitute, substitute=p.mask), V, g)

def last_token_never_drawn(draw):
    "The clean token takes the place of token V-1"
    def wrong(x0, p, V, g):
        z = draw(x0, p, V, g)
        return torch.where(z==V-1, x0, z)
    return wrong

def dependent_neighbours(draw):
    "Two neighbours are masked or deleted together"
    def wrong(x0, p, V, g):
        z = draw(x0[:,::2], p, V, g).repeat_interleave(2, 1)
        return torch.where(z<V, x0, z)
    return wrong

def shifted_tokens(draw):
    "Clean tokens are shifted by one"
    return lambda x0, p, V, g: draw(x0.roll(1, 1), p, V, g)

FAULTS = {
    too_little_noise: 'all_three, log_linear',
    masks_for_substitutes: 'hybrid, cosine',
    last_token_never_drawn: 'uniform, log_linear',
    dependent_neighbours: 'mask_delete, cosine',
    shifted_tokens: 'hybrid, log_linear',
}
@pytest.mark.parametrize('fault', FAULTS, ids=lambda f: f.__name__)
def test_frequencies_show_a_fault(fault, monkeypatch):
    monkeypatch.setattr(corruption, '_draw_symbols', fault(corruption._draw_symbols))
    with pytest.raises(AssertionError, match='standard errors off|impossible'):
        assert_frequencies(FAULTS[fault])

# Alignment and gaps

def slow_gaps(positions, n):
    "Numbers of tokens missing before each of these positions of n, and after the last"
    return [b-a-1 for a,b in zip([-1, *positions], [*positions, n])]

def put_together(left, gaps, missing):
    "Put tokens that are left and missing ones together, gap by gap"
    missing = iter(missing)
    sequence = []
    for gap,token in zip(gaps, [*left, None]):
        sequence += [next(missing) for _ in range(gap)]
        if token is not None: sequence.append(token)
    return sequence

def assert_possible(c, symbol, token):
    "Assert that a noise can turn a token into a symbol"
    if symbol==c.mask_id: assert c.weights['mask'], 'a mask without a weight'
    elif c.weights['substitute']: assert 0<=symbol<c.vocab_size, 'not a token'
    else: assert symbol==token, 'neither kept nor masked'

def assert_row_aligned(c, clean, row, n_left):
    "Assert that a row of a noisy batch, as lists, fits the clean sequence"
    padding = len(row.xt)-n_left
    position = row.position[:n_left]
    x0 = row.x0[:n_left]
    xt = row.xt[:n_left]
    assert row.attention_mask==[True]*n_left+[False]*padding
    assert row.xt[n_left:]==[c.mask_id]*padding
    assert row.x0[n_left:]==[0]*padding
    assert row.position[n_left:]==[0]*padding
    assert position==sorted(set(position)), 'out of order'
    assert all(0<=p<len(clean) for p in position)
    assert row.gaps==slow_gaps(position, len(clean))+[0]*padding
    assert sum(row.gaps)+n_left==len(clean), 'tokens are lost'
    assert c.deletes or n_left==len(clean), 'deleted without a weight'
    missing = [token for i,token in enumerate(clean) if i not in set(position)]
    assert put_together(x0, row.gaps, missing)==clean
    for symbol,token in zip(xt, x0): assert_possible(c, symbol, token)

def assert_aligned(c, x0, lengths, noisy):
    "Assert that a noisy batch fits the clean one, token by token"
    B,L = x0.shape
    assert all(o.shape==(B, L) for o in (noisy.xt, noisy.x0, noisy.attention_mask, noisy.position))
    assert noisy.gaps.shape==(B, L+1)
    assert noisy.attention_mask.dtype==torch.bool
    rows = zip(*(o.tolist() for o in noisy))
    for clean,n,row,n_left in zip(x0.tolist(), lengths.tolist(), rows, noisy.lengths.tolist()):
        assert_row_aligned(c, clean[:n], NoisyBatch(*row), n_left)

any_weight = st.sampled_from([0., 0., .1, 1., 3.])
@st.composite
def any_noise(draw):
    "A noise with weights, schedules and a vocabulary of any kind"
    V = draw(st.integers(1, 7))
    mask_substitute_delete = draw(st.tuples(any_weight, any_weight, any_weight).filter(any))
    if draw(st.integers(0, 7))==0: return GIDDCorruption(V, draw(st.floats(.05, .9)), draw(st.floats(.2, 2.)))
    schedule = st.sampled_from(sorted(schedules)).map(get_schedule)
    own = st.fixed_dictionaries({kind:schedule for kind in KINDS})
    return Corruption(V, *mask_substitute_delete, schedule=draw(st.one_of(schedule, own)))

def random_batch(c, L, seed, ragged, B):
    "B sequences of L tokens, or of 0 to L if ragged, their lengths, and a noisy batch at times from 0 to 1"
    g = seeded_generator(seed)
    x0 = torch.randint(0, c.vocab_size, (B, L), generator=g)
    t = torch.rand(B, generator=g, dtype=torch.float64)
    lengths = torch.randint(0, L+1, (B,), generator=g) if ragged else torch.full((B,), L)
    t[0] = 0
    t[-1] = 1
    return x0, lengths, c.corrupt(x0, t, g, lengths if ragged else None)
batches = dict(L=st.integers(0, 24), seed=st.integers(0, 2**32), ragged=st.booleans())

@settings(max_examples=100, deadline=None)
@given(c=any_noise(), **batches)
def test_sequences_can_be_put_together_again(c, L, seed, ragged):
    assert_aligned(c, *random_batch(c, L, seed, ragged, B=100))

@settings(max_examples=200, deadline=None)
@given(surviving=st.lists(st.booleans(), max_size=12), n=st.integers(0, 12))
def test_packing_and_gaps(surviving, n):
    L = len(surviving)
    n = min(n, L)
    left = [i for i in range(n) if surviving[i]]
    mask = torch.tensor([[i in left for i in range(L)]], dtype=torch.bool).view(1, L)
    padding = L-len(left)
    assert pack(torch.arange(L)[None], mask, 99).tolist()==[left+[99]*padding]
    assert count_gaps(mask, torch.arange(L)[None]<n).tolist()==[slow_gaps(left, n)+[0]*padding]

WRONG_FIELDS = dict(
    gaps=lambda o: o.roll(1),
    position=lambda o: o.roll(1),
    x0=lambda o: (o+1)%5,
    xt=lambda o: (o+1)%6,
    attention_mask=lambda o: o.roll(1),
)
@pytest.mark.parametrize('field', WRONG_FIELDS)
def test_a_wrong_alignment_is_seen(field):
    c = Corruption(5, 1, 0, 1, schedule=LogLinear())
    x0,lengths,noisy = random_batch(c, 20, 0, True, 50)
    assert_aligned(c, x0, lengths, noisy)
    some_left_and_some_missing = (noisy.lengths>2)&(noisy.lengths<lengths)
    i = int(some_left_and_some_missing.nonzero()[0])
    wrong = getattr(noisy, field).clone()
    wrong[i] = WRONG_FIELDS[field](wrong[i])
    with pytest.raises(AssertionError): assert_aligned(c, x0, lengths, noisy._replace(**{field:wrong}))

# Seeds and files

@settings(max_examples=50, deadline=None)
@given(c=any_noise(), **batches)
def test_a_seed_fixes_a_batch(c, L, seed, ragged):
    "Whatever the state of the global generator"
    noisy = random_batch(c, L, seed, ragged, 8)[2]
    torch.rand(1)
    assert all(torch.equal(a, b) for a,b in zip(noisy, random_batch(c, L, seed, ragged, 8)[2]))

@settings(max_examples=50, deadline=None)
@given(c=any_noise())
def test_a_noise_comes_back_from_plain_values(c):
    d = corruption_from_dict(c.vocab_size, c.to_dict())
    assert type(d) is type(c)
    assert d.T==c.T
    t = float64(.2, .7)
    assert all(torch.allclose(a, b, atol=1e-12) for a,b in zip(d.state_probs(t), c.state_probs(t)))

def test_other_seeds_give_other_sequences():
    c = Corruption(9, 1, 1, 1)
    x0 = torch.zeros(4, 50, dtype=torch.long)
    t = float64(.2, .4, .6, .8)
    def by_default_generator(seed):
        torch.manual_seed(seed)
        return c(x0, t)
    assert not torch.equal(c(x0, t, seeded_generator(0)), c(x0, t, seeded_generator(1)))
    assert torch.equal(by_default_generator(0), by_default_generator(0))
    assert not torch.equal(by_default_generator(0), by_default_generator(1))

def test_a_call_gives_the_ids_of_a_corrupted_batch_and_leaves_its_input():
    c = Corruption(9, 1, 1, 1)
    x0 = torch.zeros(4, 50, dtype=torch.long)
    before = x0.clone()
    t = float64(.2, .4, .6, .8)
    assert torch.equal(c(x0, t, seeded_generator(0)), c.corrupt(x0, t, seeded_generator(0)).xt)
    assert torch.equal(x0, before)

# The process

@each_noise
def test_the_generator_has_the_marginals(name):
    "Kolmogorov's equation q' = qQ, for q by hand"
    c = NOISES[name].corruption
    for t in (.1, .4, .8):
        Q = c.rate_matrix(float64(t))[0].numpy()
        dq = derivative(lambda s: marginals(name, s), t)
        assert np.abs(dq-marginals(name, t)@Q).max()<1e-7

@each_noise
def test_the_generator_is_one(name):
    """Rows sum to 0, other rates are not negative, nothing leaves the deleted state

    Where there are masks, only masks are deleted. Tokens 0 and 1 may change places.
    """
    c = NOISES[name].corruption
    for t in (.1, .4, .8):
        Q = c.rate_matrix(float64(t))[0].numpy()
        assert np.abs(Q.sum(1)).max()<1e-9
        assert (Q-np.diag(np.diag(Q))>=-1e-12).all()
        assert not Q[DELETED].any()
        assert not Q[:V, DELETED if c.weights['mask'] else V].any()
        swapped = [1, 0, *range(2, V+2)]
        assert np.allclose(Q, Q[swapped][:,swapped])

@settings(max_examples=150, deadline=None)
@given(c=any_noise(), t=st.floats(1e-4, 1-1e-4))
def test_rates_are_never_negative(c, t):
    for rate in c.event_rates(float64(t)):
        assert (rate>=-1e-9).all()
        assert rate.isfinite().all()

@pytest.mark.parametrize('gamma', [2.5, 4.])
def test_gidd_whose_rates_would_be_negative_is_rejected(gamma):
    "Above gamma=2 the probability of substitution falls faster than resampling can make it fall"
    with pytest.raises(ValueError, match='gamma'): GIDDCorruption(V, .2, gamma)

@lru_cache(None)
def integrated(name, s, t):
    "Transition probabilities from s to t, (V+2, V+2), as the solution of P' = PQ by SciPy"
    c = NOISES[name].corruption
    def dP(time, P): return (P.reshape(V+2, V+2)@c.rate_matrix(float64(time))[0].numpy()).ravel()
    solution = solve_ivp(dP, (s, t), np.eye(V+2).ravel(), method='DOP853', rtol=1e-9, atol=1e-12)
    return solution.y[:,-1].reshape(V+2, V+2)

INTERVALS = (.1, .5),(.3, .6),(.6, .95)
@each_noise
def test_the_transition_is_the_integral_of_the_generator(name):
    c = NOISES[name].corruption
    for s,t in INTERVALS:
        P = c.transition(float64(s), float64(t))[0].numpy()
        assert np.abs(P-integrated(name, s, t)).max()<(3e-4 if c.deletes else 1e-7), (s, t)
        assert np.abs(P.sum(1)-1).max()<1e-12
        assert np.abs(marginals(name, s)@P-marginals(name, t)).max()<(3e-4 if c.deletes else 1e-9)
    assert np.abs(c.transition(float64(.4), float64(.4))[0].numpy()-np.eye(V+2)).max()<1e-12

@each_noise
def test_transitions_are_probabilities(name):
    "Up to the ends of time; impossible transitions have probability 0"
    c = NOISES[name].corruption
    substitutes = c.weights['substitute'] or 'gidd' in name
    last = 1-1e-9 if 'eps 0' in name or 'gidd' in name else 1.
    for s,t in ((0., .5), (.2, .3), (.5, last), (.9, last), (0., last)):
        P = c.transition(float64(s), float64(t))[0]
        assert P.isfinite().all(), (s, t)
        assert P.min()>-1e-9, (s, t)
        assert (P.sum(1)-1).abs().max()<1e-9, (s, t)
        if not substitutes:
            assert (P[:V,:V]-torch.diag(P.diag()[:V])).abs().max()<1e-9, (s, t, 'a token becomes another one')
            assert P[V,:V].abs().max()<1e-9, (s, t, 'a mask becomes a token')
        if not c.weights['mask']: assert P[:V,V].abs().max()<1e-9, (s, t, 'a token becomes a mask')

@each_noise
def test_the_reverse_posterior_is_bayes_rule(name):
    """q(z_s | z_t) = q(z_s) P(z_t | z_s) / q(z_t), for one-hot and for soft distributions of the clean token

    Symbols z_t that are impossible are left out.
    """
    c,by_hand = NOISES[name]
    soft = np.random.default_rng(0).dirichlet(np.ones(V), 3)
    probs = np.concatenate([np.eye(V), soft])
    for s,t in INTERVALS:
        q_s = (probs@marginals(name, s))[:,:V+1]
        joint = q_s[:,:,None]*integrated(name, s, t)[:V+1,:V+1] # (clean, at s, at t)
        masked = by_hand(t)[1]
        symbols = [*range(V), V] if masked>0 else [*range(V)]
        expected = (joint/joint.sum(1, keepdims=True).clip(1e-300)).transpose(0, 2, 1)[:,symbols]
        possible = joint.sum(1)[:,symbols]>1e-9
        n = len(probs)
        p = torch.tensor(probs)[:,None].expand(-1, len(symbols), -1)
        xt = torch.tensor(symbols).expand(n, len(symbols))
        got = c.reverse_posterior(p, xt, float64(*[s]*n), float64(*[t]*n)).numpy()
        assert np.abs(got-expected)[possible].max()<(2e-3 if c.deletes else 1e-7), (s, t)
        assert np.abs(got.sum(-1)-1)[possible].max()<1e-9

@pytest.mark.parametrize('name', [k for k,o in NOISES.items() if not o.corruption.weights['substitute']])
def test_a_token_that_can_only_have_been_kept_was_kept(name):
    "Without substitution a token at t was the same token at s, whatever the network predicts; also from t=1"
    c = NOISES[name].corruption
    xt = torch.arange(V)[None]
    p = float64(.2, .3, .5).expand(1, V, V)
    for s,t in (*INTERVALS, (.5, .999), (.5, 1.), (.99, 1.)):
        no_tokens_left = t==1 and 'eps 0' in name
        if no_tokens_left: continue
        got = c.reverse_posterior(p, xt, float64(s), float64(t))[0]
        assert (got-torch.eye(V, V+1)).abs().max()<1e-6, (s, t, got)

def simulated_pairs(name, s, t, n, steps=400):
    "Counts of (symbol at s, symbol at t) for n copies of token 1, which follow the rates in small steps"
    c = NOISES[name].corruption
    g = np.random.default_rng(1)
    dt = (t-s)/steps
    pairs = np.diag(g.multinomial(n, marginals(name, s)[1]))
    for i in range(steps):
        Q = c.rate_matrix(float64(s+(t-s)*(i+.5)/steps))[0].numpy()
        P = np.eye(V+2)+Q*dt
        pairs = np.stack([sum(g.multinomial(k, p) for k,p in zip(row, P)) for row in pairs])
    return pairs

SIMULATED = 'uniform, cosine','gidd 0.1 1.0','all_three, log_linear','mask_delete, cosine'
@pytest.mark.parametrize('name', SIMULATED)
def test_the_reverse_posterior_is_what_a_simulation_counts(name):
    c = NOISES[name].corruption
    s,t = .3,.6
    pairs = simulated_pairs(name, s, t, n=10**6)
    one = float64(0., 1., 0.).expand(1, 1, V)
    for symbol,n in enumerate(pairs.sum(0)[:V+1]):
        if not n: continue
        q = c.reverse_posterior(one, torch.tensor([[symbol]]), float64(s), float64(t))[0,0].numpy()
        frequencies = pairs[:V+1,symbol]/n
        assert (np.abs(frequencies-q)<=5*np.sqrt(q*(1-q)/n)+1e-3).all(), (symbol, frequencies, q)

# Bad input: an argument, and its value where it can be shown

x = torch.zeros(2, 4, dtype=torch.long)
uniform_guess = torch.full((2, 4, V), 1/3)
nan = math.nan
BAD = {
    'negative weight': (lambda: Corruption(V, -1.), 'mask is -1'),
    'nan weight': (lambda: Corruption(V, substitute=nan), 'substitute is nan'),
    'infinite weight': (lambda: Corruption(V, delete=math.inf), 'delete is inf'),
    'all weights 0': (lambda: Corruption(V, 0, 0, 0), 'mask.*0'),
    'no vocabulary': (lambda: Corruption(0), 'vocab_size is 0'),
    'T 0': (lambda: Corruption(V, T=0), 'T is 0'),
    'T negative': (lambda: GIDDCorruption(V, T=-3), 'T is -3'),
    'unknown kind': (lambda: Corruption(V, schedule=dict(insert=Cosine())), 'schedule.*insert'),
    'p_uniform 0': (lambda: GIDDCorruption(V, 0.), 'p_uniform is 0'),
    'p_uniform 1': (lambda: GIDDCorruption(V, 1.), 'p_uniform is 1'),
    'p_uniform nan': (lambda: GIDDCorruption(V, nan), 'p_uniform is nan'),
    'gamma 0': (lambda: GIDDCorruption(V, .1, 0.), 'gamma is 0'),
    'gamma nan': (lambda: GIDDCorruption(V, .1, nan), 'gamma is nan'),
    'eps 1': (lambda: LogLinear(1.), 'eps is 1'),
    'eps negative': (lambda: Cosine(-.1), 'eps is -0.1'),
    'eps nan': (lambda: HalfCosine(nan), 'eps is nan'),
    'power 0': (lambda: Polynomial(0.), 'power is 0'),
    'power nan': (lambda: Polynomial(nan), 'power is nan'),
    'sigmas': (lambda: Geometric(1., 1.), 'sigma_max is 1.*sigma_min=1'),
    'sigma nan': (lambda: Geometric(nan), 'sigma_min is nan'),
    'schedule': (lambda: get_schedule('linear'), "schedule is 'linear'"),
    'id too large': (lambda: Corruption(V)(x+V, float64(.5, .5)), '^x0 has ids from 3 to 3'),
    'mask as clean token': (lambda: Corruption(V).corrupt(torch.full((1, 1), V), float64(.5)), '^x0 has ids'),
    'negative id': (lambda: Corruption(V)(x-1, float64(.5, .5)), '^x0 has ids from -1'),
    'no batch': (lambda: Corruption(V)(x[0], float64(.5)), r'^x0 has shape \(4,\)'),
    't above 1': (lambda: Corruption(V)(x, float64(.5, 1.01)), '^t has values from 0.5 to 1.01'),
    't below 0': (lambda: Corruption(V)(x, float64(-.01, .5)), '^t has values from -0.01'),
    't nan': (lambda: Corruption(V)(x, float64(nan, .5)), '^t has values'),
    'too few t': (lambda: Corruption(V)(x, float64(.5)), r'^t has shape \(1,\)'),
    't not one a sequence': (lambda: Corruption(V)(x, torch.full((2, 1), .5)), r'^t has shape \(2, 1\)'),
    's after t': (lambda: Corruption(V).transition(float64(.5), float64(.4)), r'\bs is .*0\.5.*\bt\b'),
    'posterior of s after t': (
        lambda: Corruption(V).reverse_posterior(uniform_guess, x, float64(.5, .6), float64(.4, .7)),
        r'\bs is .*0\.5, 0\.6.*\bt\b'),
}
@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_rejected(name):
    f,argument = BAD[name]
    with pytest.raises(ValueError, match=argument): f()

# Times

@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 300), T=st.one_of(st.none(), st.integers(1, 2000)), seed=st.integers(0, 2**32))
def test_times_are_even_and_on_the_grid(n, T, seed):
    "Continuous times have distance 1/n; of T steps each is as often as the others, give or take one"
    t = low_discrepancy_times(n, T, seeded_generator(seed))
    assert t.shape==(n,)
    assert t.dtype==torch.float64
    assert torch.equal(t, low_discrepancy_times(n, T, seeded_generator(seed)))
    if T is None:
        assert ((t>=0)&(t<1)).all()
        assert n==1 or (t.sort()[0].diff()-1/n).abs().max()<1e-12
        return
    steps = (t*T).round()
    assert torch.equal(t, steps/T)
    assert ((steps>=1)&(steps<=T)).all()
    counts = torch.bincount(steps.long(), minlength=T+1)[1:]
    assert (counts.double()-n/T).abs().max()<1+1e-9

def test_times_are_uniform():
    "Each time by itself, by the test of Kolmogorov and Smirnov; each of T steps as often as the others"
    g = seeded_generator(0)
    t = torch.stack([low_discrepancy_times(8, generator=g) for _ in range(3000)]).numpy()
    assert min(kstest(o, 'uniform').pvalue for o in t.T)>1e-4
    steps = torch.stack([low_discrepancy_times(8, 5, g) for _ in range(3000)]).numpy()*5
    counts = [np.bincount(o.round().astype(int), minlength=6)[1:] for o in steps.T]
    assert min(chisquare(o).pvalue for o in counts)>1e-4
