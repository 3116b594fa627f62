"""Estimates of the bound against sums over all noisy sequences of few tokens, and a quadrature in time."""
import math
from functools import lru_cache
from itertools import combinations, product
import numpy as np, pytest, torch
from helpers import derivative, fixed_weights, gidd_weights, Noise, plant_fault
from bijdiff.diffusion import objective
from bijdiff.diffusion.corruption import Corruption, GIDDCorruption
from bijdiff.diffusion.schedules import Geometric, HalfCosine, Polynomial
from bijdiff.likelihood import bounds
from bijdiff.likelihood.bounds import nelbo, nelbo_draws, prior_nats, reconstruction_nats, score_ids
from bijdiff.model import predictions, scoring
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser

# Functions of the package that planted faults replace, where they are looked up; and names inside the network
MASKED_NELBO,HYBRID_NELBO = (objective, 'masked_nelbo'),(objective, 'hybrid_nelbo')
INSERTION_NELBO,SCORE_ENTROPY = (scoring, 'insertion_nelbo'),(predictions, 'score_entropy')
RECONSTRUCTION,PRIOR_TERM = (bounds, 'reconstruction_nats'),(bounds, 'prior_term')
MASKED_NLL = bounds, 'masked_nll'
LENGTH_TERM,LENGTH_PRIOR = (bounds, 'length_term'),(bounds, 'binomial_log_prior')
INSERTION_JUMP,PUT_BACK = (bounds, 'insertion_jump'),(bounds, '_put_back')
CLEAN_LOGITS = bounds, 'clean_logits'
TIMES,INTEGRAND = (bounds, 'low_discrepancy_times'),(bounds, 'output_integrand')
CORRUPT,PURE_NOISE = (Corruption, 'corrupt'),(Corruption, 'pure_noise')
HEADS = 'output_head','gap_output'
def use_low_frequencies(m): m.backbone.time.exponents = 0.,1.

L = 2

# Schedules, and alpha(t) by hand. They are flat or noisy at t=0, so the variance of the estimate is finite

HALF,CUBIC,GEOMETRIC,WEAK = HalfCosine(.05),Polynomial(3., .05),Geometric(.1, 5.),Geometric(.1, .7)

def half_cosine(t): return .05+.95*math.cos(math.pi/2*t)
def cubic(t): return .05+.95*(1-t**3)
def geometric(t): return math.exp(-.1*50**t)
def weak(t): return math.exp(-.1*7**t)

ALPHA = {HALF: half_cosine, CUBIC: cubic, GEOMETRIC: geometric, WEAK: weak}

# Noises, and the probabilities of their states by hand

def constant(schedule, mask, substitute, delete=0., V=2, T=None, **config_kwargs):
    corruption = Corruption(V, mask, substitute, delete, schedule=schedule, T=T)
    return Noise(corruption, fixed_weights(ALPHA[schedule], mask, substitute, delete), config_kwargs)

def gidd(p_uniform, gamma, T=None):
    return Noise(GIDDCorruption(2, p_uniform, gamma, T=T), gidd_weights(p_uniform, gamma), {})

def per_kind(mask, substitute, delete):
    "Each kind of noise has a schedule of its own"
    def state_probs(t):
        lost = np.array([mask*(1-geometric(t)), substitute*(1-cubic(t)), delete*(1-half_cosine(t))])
        return np.array([1-lost.sum(), *lost])
    schedules = dict(mask=GEOMETRIC, substitute=CUBIC, delete=HALF)
    return Noise(Corruption(2, mask, substitute, delete, schedules), state_probs, {})

NOISES = {
    'mask': constant(HALF, 1, 0, V=3),
    'mask, geometric': constant(GEOMETRIC, 1, 0),
    'mask, time-conditioned': constant(CUBIC, 1, 0, time_conditioning=True),
    'mask, 4 steps': constant(HALF, 1, 0, T=4),
    'mask, scores': constant(HALF, 1, 0, score_head=True),
    'mask, scores, time-conditioned': constant(GEOMETRIC, 1, 0, score_head=True, time_conditioning=True),
    'uniform': constant(CUBIC, 0, 1),
    'uniform, geometric': constant(GEOMETRIC, 0, 1),
    'uniform, scores': constant(CUBIC, 0, 1, score_head=True),
    'uniform, scores, geometric': constant(GEOMETRIC, 0, 1, score_head=True),
    'uniform, 4 steps': constant(CUBIC, 0, 1, T=4),
    'hybrid': constant(CUBIC, .6, .4),
    'hybrid, geometric': constant(GEOMETRIC, .6, .4),
    'hybrid, 4 steps': constant(GEOMETRIC, .6, .4, T=4),
    'hybrid, weak': constant(WEAK, .6, .4),
    'all three, weak': constant(WEAK, .4, .3, .3),
    'hybrid, schedule per kind': per_kind(.6, .4, 0.),
    'gidd': gidd(.3, 2.),
    'gidd, gamma 1': gidd(.3, 1.),
    'gidd, 5 steps': gidd(.3, 1., T=5),
    'mask, delete': constant(HALF, .5, 0, .5),
    'mask, delete, geometric': constant(GEOMETRIC, .5, 0, .5),
    'all three': constant(HALF, .4, .3, .3),
    'all three, geometric': constant(GEOMETRIC, .4, .3, .3),
    'all three, schedule per kind': per_kind(.4, .3, .3),
}
every_noise = pytest.mark.parametrize('name', NOISES)

@lru_cache(None)
def network(name):
    "A denoiser with random weights whose outputs change no faster with time than the quadrature can follow"
    noise,_,config_kwargs = NOISES[name]
    own = dict(noise=noise.to_dict(), gap_head=noise.deletes, time_conditioning=not noise.masks_only)
    own = dict(own, seq_len=L, d_model=4, n_heads=2, n_layers=1) | config_kwargs
    torch.manual_seed(7)
    m = BijectiveDenoiser(DenoiserConfig(noise.vocab_size, **own)).double()
    for k,p in m.named_parameters(): torch.nn.init.normal_(p, std=.2 if k.startswith(HEADS) else .5)
    if m.config.time_conditioning: use_low_frequencies(m)
    return m.eval()

def all_texts(name): return list(product(range(NOISES[name].corruption.vocab_size), repeat=L))

def nelbo_kwargs(name):
    "Keywords of `nelbo` where schedule and steps may be chosen: those of the noise"
    c = NOISES[name].corruption
    if network(name).config.time_conditioning or not c.masks_only: return {}
    return dict(schedule=c.schedule, T=c.T)

# The bound by hand, from the definitions, in numpy

def quadrature(n=60):
    "Nodes and weights over [0, 1], dense at both ends: Gauss-Legendre in u, with t = sin(pi u/2)^2"
    u,w = np.polynomial.legendre.leggauss(n)
    u = (u+1)/2
    return np.sin(np.pi*u/2)**2, w*np.pi/4*np.sin(np.pi*u)

def softmax(o): return np.exp(o)/np.exp(o).sum()

def missing(survivors):
    "Number of deleted tokens before each survivor, and after the last one"
    return np.diff([-1, *survivors, L])-1

def poisson_divergence(n, g):
    "g - n - n log g: of n missing tokens from g expected ones, up to a constant that has no influence"
    return g-n-n*math.log(g)

def poisson_nats(n, g):
    "Minus the log-probability of n under a Poisson distribution with mean g"
    return g-(n*math.log(g) if n else 0)+math.lgamma(n+1)

def divergence(p, q):
    "KL divergence of q from p: the sum of p log(p/q)"
    return sum(a*math.log(a/b) for a,b in zip(p, q) if a>0)

class ExactBound:
    """The bound for every sequence of L tokens, in nats

    Expectations are sums over all ways to delete and to change tokens, and the time integral is a quadrature.
    State probabilities m and their derivatives d are in the order kept, masked, substituted, deleted.
    """
    def __init__(self, name):
        self.noise,self.state_probs,_ = NOISES[name]
        self.model,self.V,self.texts = network(name),self.noise.vocab_size,all_texts(name)
        lengths = range(L+1) if self.noise.deletes else (L,)
        self.strings = [z for n in lengths for z in product(range(self.V+1), repeat=n)]
        self.index = {z:i for i,z in enumerate(self.strings)}
        self.one_hot = np.eye(self.V)
        self.scores = self.model.config.score_head
        self.uniform_scores = self.scores and not self.noise.masks_only

    def predict(self, t):
        "Outputs for every string, (strings, L, V), and expected gaps, (strings, L+1), or None"
        z = torch.tensor([[*o, *[self.V]*(L-len(o))] for o in self.strings])
        mask = torch.arange(L) < torch.tensor([len(o) for o in self.strings])[:,None]
        times = torch.full((len(z),), t, dtype=torch.float64)
        with torch.no_grad(): out = self.model(z, times, mask if self.noise.deletes else None)
        if not self.noise.deletes: return out.numpy(), None
        m = self.state_probs(t)
        return out[0].numpy(), np.exp(out[1].numpy())*m[3]/(1-m[3])

    def q(self, p, m):
        "Probabilities of tokens and mask, from those of the clean token: m_kept p + m_sub/V, and m_mask"
        return np.array([*(m[0]*np.asarray(p)+m[2]/self.V), m[1]])

    def ways(self, x, m):
        "Every noisy version of x: positions of survivors, symbols, probability"
        for n in range(L+1):
            if n<L and m[3]==0: continue
            for survivors,z in product(combinations(range(L), n), product(range(self.V+1), repeat=n)):
                q = [self.q(self.one_hot[x[k]], m)[a] for k,a in zip(survivors, z)]
                p = m[3]**(L-n)*math.prod(q)
                if p>0: yield survivors, z, p

    def expectation(self, m, f):
        "Mean of f(x, survivors, z) over the noisy versions of every x, (texts,)"
        return np.array([sum(p*f(x, survivors, z) for survivors,z,p in self.ways(x, m)) for x in self.texts])

    # The integral over time

    def resampling_rates(self, m, d):
        "Rate at which any symbol is resampled as each token, and as the mask, (V+1,)"
        to_token = (d[2]-d[0]/m[0]*m[2])/(1-m[3])
        to_mask = -d[0]/m[0]-to_token
        return [to_token/self.V*(m[2]>0)]*self.V+[to_mask*(m[1]>0)]

    def score(self, o, z, m):
        "The network's ratios of the probabilities of all symbols to that of z, (V+1,), from its outputs o"
        if not self.scores:
            q = self.q(softmax(o), m)
            return q/q[z]
        prior = (m[0]+m[2])/self.V
        return np.array([*(prior/(prior if z<self.V else m[1])*np.exp(o)), 0.])

    def token_integrand(self, o, x, z, m, rates):
        """Divergence of reverse rates for a token x seen as z: rate_z * sum of s_y - r_y + r_y log(r_y/s_y)

        The sum is over all symbols y other than z, with r_y = q(y|x)/q(z|x) and s_y the network's score.
        """
        if rates[z]==0: return 0.
        q,s = self.q(self.one_hot[x], m),self.score(o, z, m)
        r = q/q[z]
        def term(y): return s[y]-r[y]+(r[y]*math.log(r[y]/s[y]) if r[y]>0 else 0.)
        return rates[z]*sum(term(y) for y in range(self.V+1) if y!=z)

    def integrand(self, t):
        "Integrand of the bound at a time, (texts,); that of a gap is d_delete/m_delete * divergence"
        m,d = self.state_probs(t),derivative(self.state_probs, t, 1e-6)
        (out,gaps),rates = self.predict(t),self.resampling_rates(m, d)
        @lru_cache(None)
        def of_token(i, j, x): return self.token_integrand(out[i,j], x, self.strings[i][j], m, rates)
        def of_gap(g, n): return d[3]/m[3]*poisson_divergence(n, g)
        def f(x, survivors, z):
            i = self.index[z]
            total = sum(of_token(i, j, x[k]) for j,k in enumerate(survivors))
            if gaps is None: return total
            return total+sum(of_gap(g, n) for g,n in zip(gaps[i], missing(survivors)))
        return self.expectation(m, f)

    def transition(self, a, b):
        "Probabilities of the symbols at a later time with state probabilities b, row: from"
        kept,nothing = b[0]/a[0],np.zeros(self.V)
        return kept*np.eye(self.V+1)+self.q(nothing, b)-kept*self.q(nothing, a)

    def steps(self, T):
        "Sum of the divergences of the posteriors of T steps, by Bayes' rule, (texts,)"
        return sum(self.step((i-1)/T, i/T) for i in range(1, T+1))

    def step(self, s, t):
        "Divergence of the posteriors at time s given symbols at time t, (texts,)"
        a,b,(out,_) = self.state_probs(s),self.state_probs(t),self.predict(t)
        P = self.transition(a, b)
        def posterior(clean, z):
            p = self.q(clean, a)*P[:,z]
            return p/p.sum()
        def of_token(o, x, z): return divergence(posterior(self.one_hot[x], z), posterior(softmax(o), z))
        def f(x, survivors, z): return sum(of_token(out[self.index[z],j], x[j], z[j]) for j in range(L))
        return self.expectation(b, f)

    # The terms at both ends

    def clean_probs(self, o, z, m):
        "The network's distribution of the clean token; from uniform scores s, (s/sum(s) - m_sub/V)/m_kept"
        if not self.uniform_scores: return softmax(o)
        s = np.exp(o)
        s[z] = 1
        return softmax(np.log(((s/s.sum()-m[2]/self.V)/m[0]).clip(1e-9)))

    def token_posterior(self, o, a, m):
        "Distribution of the clean token given its own symbol a, by Bayes' rule"
        p = self.clean_probs(o, a, m)
        if a<self.V: p = p*[self.q(e, m)[a] for e in self.one_hot]
        return p/p.sum()

    def reconstruction(self, out, x, survivors, z, m):
        "Nats of x, given its symbols at time 0 at their places and masks where they are missing"
        full = [self.V]*L
        for k,a in zip(survivors, z): full[k] = a
        o = out[self.index[tuple(full)]]
        return sum(-math.log(self.token_posterior(o[j], full[j], m)[x[j]]) for j in range(L))

    def start(self):
        "Time 0: insert what is missing, then reconstruct each token, (texts,)"
        m = self.state_probs(0.)
        if m[0]==1: return 0.
        out,gaps = self.predict(0.)
        def f(x, survivors, z):
            nats = self.reconstruction(out, x, survivors, z, m)
            if gaps is None: return nats
            return nats+sum(poisson_nats(n, g) for g,n in zip(gaps[self.index[z]], missing(survivors)))
        return self.expectation(m, f)

    def end(self):
        "Time 1: the jump to pure noise, and the number of symbols, (texts,)"
        return np.array([self.prior(x)+self.length(x) for x in self.texts])

    def prior(self, x):
        "Mean divergence of the symbols of x at time 1 from the network's prediction, called on pure noise"
        m,(out,_) = self.state_probs(1.),self.predict(1.)
        pure_noise = self.q(np.zeros(self.V), m)/(m[1]+m[2])
        def of_token(o, a):
            if self.uniform_scores: o = np.zeros_like(o)
            return divergence(self.q(self.one_hot[a], m), self.q(softmax(o), m))/(1-m[3])
        total = 0.
        for n in range(L+1):
            p_survivors = (1-m[3])**n*m[3]**(L-n)
            if p_survivors==0: continue
            for survivors,z in product(combinations(range(L), n), product(range(self.V+1), repeat=n)):
                nats = sum(of_token(out[self.index[z],j], x[k]) for j,k in enumerate(survivors))
                total += p_survivors*math.prod(pure_noise[list(z)])*nats
        return total

    def length(self, x):
        "Minus the mean of log binom(L, n): the process knows the survivors, the prior only their number n"
        deleted = self.state_probs(1.)[3]
        def term(n): return (1-deleted)**n*deleted**(L-n)*math.comb(L, n)*math.log(math.comb(L, n))
        return -sum(term(n) for n in range(L+1))

    def bound(self):
        T = self.noise.T
        inner = self.steps(T) if T else sum(w*self.integrand(t) for t,w in zip(*quadrature()))
        return inner+self.start()+self.end()

@lru_cache(None)
def exact_bound(name): return ExactBound(name).bound()

# Estimates

def enough_draws(name):
    few = name.startswith('mask') and 'delete' not in name
    return 10_000 if few or 'geometric' in name or 'weak' in name else 20_000

def draws(name, n=None, seed=0):
    "Draws of the estimate for every sequence, (draws, texts)"
    x,n = torch.tensor(all_texts(name)),n or enough_draws(name)
    nats = nelbo_draws(network(name), x.repeat(n//4, 1), 4, seed=seed, **nelbo_kwargs(name))
    return nats.view(-1, len(x)).double().numpy()

def judge(name):
    """Means within four standard errors of the bound, for each sequence and for their sum

    Standard errors are so small that an error of a twentieth is seen in all sequences together.
    """
    d,want = draws(name),exact_bound(name)
    se = d.std(0, ddof=1)/len(d)**.5
    se_of_sum = np.sqrt((se**2).sum())
    assert (se<.03*want).all(), f'standard errors {se/want}'
    assert se_of_sum<.0125*want.sum(), f'standard error {se_of_sum/want.sum()} of the sum'
    of_each,of_sum = (d.mean(0)-want)/se,(d.mean()-want.mean())*len(se)/se_of_sum
    assert np.abs(of_each).max()<4, f'{of_each} standard errors off'
    assert abs(of_sum)<4, f'{of_sum:.1f} standard errors off, all together'

def to_the_fourth(low_discrepancy_times): return lambda *args: low_discrepancy_times(*args)**4

def weighted(output_integrand):
    "The integrand times 4 t^(3/4), which is dt/du for t = u^4"
    return lambda model, out, noisy, t, c: output_integrand(model, out, noisy, t, c)*4*t**.75

@pytest.fixture
def finite_variance(request, monkeypatch):
    "Times dense at 0 and a weighted integrand, for noise whose estimate has no finite variance"
    if request.node.callspec.params['name'] not in ('gidd', 'gidd, gamma 1'): return
    plant_fault(monkeypatch, TIMES, to_the_fourth)
    plant_fault(monkeypatch, INTEGRAND, weighted)

@every_noise
def test_estimates_are_the_bound(name, finite_variance): judge(name)

def end_draws(name, n):
    "Draws of both end terms for every sequence, (n, texts)"
    m,c = network(name),NOISES[name].corruption
    x,g = torch.tensor(all_texts(name)),torch.Generator().manual_seed(1)
    repeated = x.repeat(n, 1)
    with torch.no_grad(): terms = reconstruction_nats(m, repeated, c, g),prior_nats(m, repeated, c, g)
    return [o.view(-1, len(x)).double().numpy() for o in terms]

def judge_ends(name, n=4000):
    "Both end terms by themselves, within four standard errors, or the precision of a network in float32"
    exact,(start,end) = ExactBound(name),end_draws(name, n)
    for d,want in ((start, exact.start()), (end, exact.end())):
        z = (d.mean(0)-want)/(d.std(0)/len(d)**.5+1e-6)
        assert np.abs(z).max()<4, f'{z} standard errors off'

@every_noise
def test_end_terms(name): judge_ends(name)

@every_noise
def test_no_probability_is_given_twice(name):
    "The sum of exp(-bound) over all sequences of a known length is at most 1"
    p = np.exp(-exact_bound(name)).sum()
    assert .1<p<=1+1e-6, p

@pytest.mark.parametrize('mask, substitute', [(1, 0), (.6, .4), (0, 1)])
def test_tight_for_independent_tokens(mask, substitute):
    "The bound of a network with constant logits is minus the log-probability"
    noise,logits = Corruption(3, mask, substitute, schedule=Geometric(.1, 3.)),torch.tensor([.7, -.5, 0.])
    config = DenoiserConfig(3, seq_len=L, d_model=4, n_heads=2, n_layers=1, noise=noise.to_dict())
    m = BijectiveDenoiser(config).eval()
    with torch.no_grad(): m.output_head.bias.copy_(logits)
    x = torch.tensor(list(product(range(3), repeat=L)))
    schedule = noise.schedule if noise.masks_only else None
    d = nelbo_draws(m, x.repeat(1500, 1), 4, schedule=schedule).view(-1, 9).double()
    logp = logits.log_softmax(0).double()[x].sum(1)
    assert (d.mean(0)+logp).abs().max()<4*(d.std(0)/len(d)**.5).max()

@pytest.mark.parametrize('name', ['mask', 'hybrid, geometric', 'mask, delete, geometric'])
def test_error_bars_are_honest(name):
    "Of 200 estimates of each sequence about one in twenty misses the bound by more than two standard errors"
    x,want = torch.tensor(all_texts(name)),torch.tensor(exact_bound(name))
    b = nelbo(network(name), x.repeat(200, 1), 32, seed=5, **nelbo_kwargs(name))
    z = (b.mean.view(200, -1)-want)/b.se.view(200, -1)
    assert .02<(z.abs()>2).double().mean()<.12

@pytest.mark.parametrize('name', ['mask', 'hybrid, geometric', 'all three, geometric'])
def test_a_long_text_is_the_sum_of_its_chunks(name):
    chunks = (0, 1),(1, 1),(1, 0),(0, 0)
    ids = torch.tensor(chunks).flatten().repeat(250)
    want = sum(exact_bound(name)[all_texts(name).index(o)] for o in chunks)/8
    got = score_ids(network(name), ids, 16, bs=400, schedule=nelbo_kwargs(name).get('schedule'))
    assert abs(got.mean-want)<4*got.se<.1*want
    assert got.n_tokens==2000
    assert got.bits(1000)[0]==pytest.approx(got.mean*2/math.log(2))

@pytest.mark.parametrize('name', ['mask', 'hybrid', 'all three'])
def test_seeds_fix_the_draws(name):
    a = draws(name, 400)
    torch.rand(1)
    assert (a==draws(name, 400)).all()
    assert (a!=draws(name, 400, seed=1)).any()

# Faults: each takes the right function and returns a wrong one

def scaled(f, by=1.08): return lambda *a, **kw: f(*a, **kw)*by
def scaled_more(f): return scaled(f, 1.1)
def left_out(f): return scaled(f, 0.)
def of_another_time(corrupt): return lambda self, x, t, g=None, **given: corrupt(self, x, t*.8, g, **given)
def masks_alone(pure_noise): return lambda self, text, g: torch.full(text.shape, self.mask_id)
def missing_at_the_end(put_back): return lambda noisy, mask_id: noisy.xt
def scores_as_logits(clean_logits): return lambda model, out, xt, state_probs: out
def free_length(binomial_log_prior): return lambda n, c: torch.zeros(n+1).double()

def fault_id(o): return o if isinstance(o, str) else o[1] if isinstance(o, tuple) else o.__name__

FAULTS = [
    # name of a noise, function of the package, wrong version
    ('mask', MASKED_NELBO, scaled),
    ('mask, geometric', MASKED_NELBO, scaled),
    ('mask, 4 steps', MASKED_NELBO, scaled),
    ('hybrid, geometric', HYBRID_NELBO, scaled),
    ('all three, geometric', HYBRID_NELBO, scaled),
    ('hybrid, 4 steps', HYBRID_NELBO, scaled),
    ('mask, scores, time-conditioned', SCORE_ENTROPY, scaled),
    ('uniform, scores, geometric', SCORE_ENTROPY, scaled),
    ('mask, delete, geometric', INSERTION_NELBO, scaled_more),
    ('mask, geometric', RECONSTRUCTION, left_out),
    ('hybrid, geometric', RECONSTRUCTION, left_out),
    ('uniform, scores, geometric', RECONSTRUCTION, left_out),
    ('all three, geometric', RECONSTRUCTION, left_out),
    ('mask', MASKED_NLL, left_out),
    ('hybrid, weak', PRIOR_TERM, left_out),
    ('all three, weak', PRIOR_TERM, left_out),
    ('mask, delete', LENGTH_TERM, left_out),
    ('all three', LENGTH_TERM, left_out),
    ('mask, delete, geometric', INSERTION_JUMP, left_out),
    ('mask, geometric', CORRUPT, of_another_time),
    ('uniform, geometric', CORRUPT, of_another_time),
    ('mask, delete, geometric', CORRUPT, of_another_time),
]

@pytest.mark.parametrize('name, target, fault', FAULTS, ids=fault_id)
def test_the_judge_notices(name, target, fault, monkeypatch):
    plant_fault(monkeypatch, target, fault)
    with pytest.raises(AssertionError, match='standard errors off'): judge(name)

END_FAULTS = [
    ('hybrid, weak', PURE_NOISE, masks_alone),
    ('all three, weak', PURE_NOISE, masks_alone),
    ('all three, weak', PUT_BACK, missing_at_the_end),
    ('uniform, scores, geometric', CLEAN_LOGITS, scores_as_logits),
    ('mask, delete', LENGTH_PRIOR, free_length),
]

@pytest.mark.parametrize('name, target, fault', END_FAULTS, ids=fault_id)
def test_the_judge_of_ends_notices(name, target, fault, monkeypatch):
    plant_fault(monkeypatch, target, fault)
    with pytest.raises(AssertionError, match='standard errors off'): judge_ends(name, 16_000)

# Rejected input: the argument that the error names, the name of a noise, and arguments of `nelbo`

X = torch.tensor([[0, 1]])
REJECTED = {
    'one draw': ('n', 'mask', X, dict(n=1)),
    'a mask': ('x', 'mask', X+2, {}),
    'negative id': ('x', 'hybrid', X-1, {}),
    'too long': ('seq_len', 'all three', torch.zeros(1, 3).long(), {}),
    'no batch': ('x', 'uniform', X[0], {}),
    'schedule of another noise': ('schedule', 'hybrid', X, dict(schedule=HALF)),
    'schedule of a time-conditioned network': ('schedule', 'mask, time-conditioned', X, dict(schedule=HALF)),
    'steps for deletion': ('T', 'all three', X, dict(T=5)),
    'steps for scores': ('T', 'mask, scores', X, dict(T=5)),
}

@pytest.mark.parametrize('case', REJECTED)
def test_bad_input_is_an_error(case):
    argument,name,x,kwargs = REJECTED[case]
    with pytest.raises(ValueError, match=rf'\b{argument}\b'): nelbo(network(name), x, **kwargs)

def test_an_empty_text_is_an_error():
    with pytest.raises(ValueError, match='tokens'): score_ids(network('mask'), [])
