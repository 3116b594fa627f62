"""The bound of a network as it is estimated, against all noisy texts of a tiny alphabet and a quadrature in time, written out from the definitions in numpy."""
import math
from functools import lru_cache
from itertools import combinations, product
import numpy as np, pytest, torch
from bijdiff.diffusion import objective
from bijdiff.likelihood import bounds
from bijdiff.model import predictions
from bijdiff.diffusion.schedules import Geometric, HalfCosine, low_discrepancy_times, Polynomial
from bijdiff.diffusion.corruption import Corruption, GIDDCorruption
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.likelihood.bounds import prior_nats, nelbo, nelbo_draws, reconstruction_nats, score_ids

L = 2
def half_cosine(t): return .05+.95*math.cos(math.pi/2*t)
def cubic(t): return .05+.95*(1-t**3)
def geometric(t): return math.exp(-.1*50**t)
def little(t): return math.exp(-.1*7**t)
def of(alpha, m, u, d=0.): return lambda t: np.array([alpha(t), *(o*(1-alpha(t)) for o in (m, u, d))])
def gidd(gamma):
    def at(t):
        odds = .3/.7*2**gamma*max(t*(1-t), 0)**(gamma/2)
        return np.array([1-t, t, odds, 0.])/(1+odds)
    return at
def own(m, u, d): return lambda t: (lambda hit: np.array([1-hit.sum(), *hit]))(np.array([m*(1-geometric(t)), u*(1-cubic(t)), d*(1-half_cosine(t))]))
half,cube,geo,few = HalfCosine(.05),Polynomial(3., .05),Geometric(.1, 5.),Geometric(.1, .7)                           # flat at 0, or noisy there: the variance of the estimate is finite
per_kind = dict(mask=geo, substitute=cube, delete=half)
# noise: (the noise, probabilities of kept, masked, substituted, deleted by hand, what else its network is, what nelbo is given)
NOISES = {'mask':(Corruption(3, schedule=half), of(half_cosine, 1, 0), {}, dict(schedule=half)), 'mask, geometric':(Corruption(2, schedule=geo), of(geometric, 1, 0), {}, dict(schedule=geo)), 'mask, told the time':(Corruption(2, schedule=cube), of(cubic, 1, 0), dict(time_conditioning=True), {}),
          'mask, 4 steps':(Corruption(2, schedule=half, T=4), of(half_cosine, 1, 0), {}, dict(schedule=half, T=4)), 'mask, scores':(Corruption(2, schedule=half), of(half_cosine, 1, 0), dict(score_head=True), dict(schedule=half)), 'mask, scores, told the time':(Corruption(2, schedule=geo), of(geometric, 1, 0), dict(score_head=True, time_conditioning=True), {}),
          'uniform':(Corruption(2, 0, 1, schedule=cube), of(cubic, 0, 1), {}, {}), 'uniform, geometric':(Corruption(2, 0, 1, schedule=geo), of(geometric, 0, 1), {}, {}), 'uniform, scores':(Corruption(2, 0, 1, schedule=cube), of(cubic, 0, 1), dict(score_head=True), {}), 'uniform, scores, geometric':(Corruption(2, 0, 1, schedule=geo), of(geometric, 0, 1), dict(score_head=True), {}),
          'uniform, 4 steps':(Corruption(2, 0, 1, schedule=cube, T=4), of(cubic, 0, 1), {}, {}), 'hybrid':(Corruption(2, .6, .4, schedule=cube), of(cubic, .6, .4), {}, {}), 'hybrid, geometric':(Corruption(2, .6, .4, schedule=geo), of(geometric, .6, .4), {}, {}), 'hybrid, 4 steps':(Corruption(2, .6, .4, schedule=geo, T=4), of(geometric, .6, .4), {}, {}),
          'hybrid, much left':(Corruption(2, .6, .4, schedule=few), of(little, .6, .4), {}, {}), 'all three, much left':(Corruption(2, .4, .3, .3, schedule=few), of(little, .4, .3, .3), {}, {}), 'hybrid, own schedules':(Corruption(2, .6, .4, 0., per_kind), own(.6, .4, 0.), {}, {}), 'gidd':(GIDDCorruption(2, .3, 2.), gidd(2.), {}, {}), 'gidd, gamma 1':(GIDDCorruption(2, .3, 1.), gidd(1.), {}, {}), 'gidd, 5 steps':(GIDDCorruption(2, .3, 1., T=5), gidd(1.), {}, {}), 'mask, delete':(Corruption(2, .5, 0, .5, schedule=half), of(half_cosine, .5, 0, .5), {}, {}), 'mask, delete, geometric':(Corruption(2, .5, 0, .5, schedule=geo), of(geometric, .5, 0, .5), {}, {}),
          'all three':(Corruption(2, .4, .3, .3, schedule=half), of(half_cosine, .4, .3, .3), {}, {}), 'all three, geometric':(Corruption(2, .4, .3, .3, schedule=geo), of(geometric, .4, .3, .3), {}, {}), 'all three, own schedules':(Corruption(2, .4, .3, .3, per_kind), own(.4, .3, .3), {}, {})}
names = pytest.mark.parametrize('name', NOISES)

@lru_cache(None)
def network(name):
    noise,_,kw,_ = NOISES[name]
    torch.manual_seed(7)
    m = BijectiveDenoiser(DenoiserConfig(noise.vocab_size, seq_len=L, d_model=4, n_heads=2, n_layers=1, noise=noise.to_dict(), gap_head=noise.deletes, **{'time_conditioning':not noise.masks_only, **kw})).double()
    for k,p in m.named_parameters(): torch.nn.init.normal_(p, std=.2 if 'output_head' in k else .5)
    if m.config.time_conditioning: m.backbone.time.freqs.clamp_(max=10)                          # no faster than a quadrature can follow
    return m.eval()
def texts(name): return list(product(range(NOISES[name][0].vocab_size), repeat=L))

# By hand
def slope(f, t, d=1e-6): return (f(t+d)-f(t-d))/(2*d)
def nodes(n=60):
    "Nodes and weights over [0, 1], dense at both ends"
    u,w = np.polynomial.legendre.leggauss(n)
    u = (u+1)/2
    return np.sin(np.pi*u/2)**2, w*np.pi/4*np.sin(np.pi*u)

class Exact:
    "The bound for every text of L tokens: expectations are sums over all ways to lose and to change tokens, the time integral is a quadrature"
    def __init__(self, name):
        self.noise,self.state_probs,_,_ = NOISES[name]
        self.model,self.V,self.texts,self.scores = network(name),self.noise.vocab_size,texts(name),network(name).config.score_head
        self.strings = [z for n in ((L,) if not self.noise.deletes else range(L+1)) for z in product(range(self.V+1), repeat=n)]
        self.at = {z:i for i,z in enumerate(self.strings)}
    def predict(self, t, padded=True):
        "Outputs for every string, (strings, L, V), and the expected gaps"
        z = torch.tensor([[*o, *[self.V]*(L-len(o))] for o in self.strings])
        text = torch.arange(L) < torch.tensor([len(o) for o in self.strings])[:,None]
        with torch.no_grad(): out = self.model(z, torch.full((len(z),), t, dtype=torch.float64), text if self.noise.deletes else None)
        if not self.noise.deletes: return out.numpy(), None
        m = self.state_probs(t)
        return out[0].numpy(), np.exp(out[1].numpy())*m[3]/(1-m[3])
    def q(self, p, m): return np.array([*(m[0]*np.asarray(p)+m[2]/self.V), m[1]])
    def clean(self, o, z, m):
        "What the network holds for the clean token; scores under substitution: the marginals they give, without the noise, if nothing gets below 0"
        if self.scores and not self.noise.masks_only:
            s = np.exp(o); s[z] = 1
            o = np.log(((s/s.sum()-m[2]/self.V)/m[0]).clip(1e-9))
        return np.exp(o)/np.exp(o).sum()
    def ways(self, x, m):
        "Every noisy text of x: survivors, symbols, probability"
        for n in range(L+1):
            for keep in combinations(range(L), n):
                if n<L and m[3]==0: continue
                for z in product(range(self.V+1), repeat=n):
                    p = m[3]**(L-n)*math.prod(self.q(np.eye(self.V)[x[k]], m)[a] for k,a in zip(keep, z))
                    if p>0: yield keep, z, p
    def token(self, o, x, z, m, rates):
        "Divergence of the reverse rates: of y having become z, at the rate of redraws as z"
        if rates[z]==0: return 0.
        q = self.q(np.eye(self.V)[x], m)
        if self.scores: hat = np.array([*((m[0]+m[2])/self.V/((m[0]+m[2])/self.V if z<self.V else m[1])*np.exp(o)), 0.])
        else: qhat = self.q(np.exp(o)/np.exp(o).sum(), m); hat = qhat/qhat[z]
        r = q/q[z]
        return rates[z]*sum(hat[y]-r[y]+(r[y]*math.log(r[y]/hat[y]) if r[y]>0 else 0.) for y in range(self.V+1) if y!=z)
    def inner(self, t):
        "Integrand for every text"
        m,d,(out,gaps) = self.state_probs(t),slope(self.state_probs, t),self.predict(t)
        to_token = (d[2]-d[0]/m[0]*m[2])/(1-m[3])
        rates = [to_token/self.V*(m[2]>0)]*self.V+[(-d[0]/m[0]-to_token)*(m[1]>0)]
        table = lru_cache(None)(lambda i, j, x: self.token(out[i,j], x, self.strings[i][j], m, rates))
        def each(x):
            total = 0.
            for keep,z,p in self.ways(x, m):
                i = self.at[z]
                total += p*sum(table(i, j, x[k]) for j,k in enumerate(keep))
                if gaps is not None: total += p*sum(d[3]/m[3]*(g-n-n*math.log(g)) for g,n in zip(gaps[i], self.missing(keep)))
            return total
        return np.array([each(x) for x in self.texts])
    def steps(self, T):
        "Sum of the divergences of the posteriors of all steps, by Bayes' rule"
        total = np.zeros(len(self.texts))
        for i in range(1, T+1):
            a,b,(out,_) = self.state_probs((i-1)/T),self.state_probs(i/T),self.predict(i/T)
            k = b[0]/a[0]
            P = k*np.eye(self.V+1)+self.q(np.zeros(self.V), b)-k*self.q(np.zeros(self.V), a)
            def kl(o, x, z):
                p,phat = (v*P[:,z]/(v*P[:,z]).sum() for v in (self.q(np.eye(self.V)[x], a), self.q(np.exp(o)/np.exp(o).sum(), a)))
                return sum(u*math.log(u/v) for u,v in zip(p, phat) if u>0)
            total += [sum(p*sum(kl(out[self.at[z],j], x[j], z[j]) for j in range(L)) for _,z,p in self.ways(x, b)) for x in self.texts]
        return total
    @staticmethod
    def missing(keep): return np.diff([-1, *keep, L])-1
    def start(self):
        "Time 0: insert what is missing, then say what each symbol was"
        m = self.state_probs(0.)
        if m[0]==1: return 0.
        out,gaps = self.predict(0.)
        def fill(x, keep, z):
            full = [self.V]*L
            for k,a in zip(keep, z): full[k] = a
            total = 0.
            for j,(a,b) in enumerate(zip(full, x)):
                p = self.clean(out[self.at[tuple(full)],j], a, m)
                if a<self.V: p = p*[self.q(e, m)[a] for e in np.eye(self.V)]
                total -= math.log(p[b]/p.sum())
            return total
        def jump(keep, z): return 0. if gaps is None else sum(g-(n*math.log(g) if n else 0)+math.lgamma(n+1) for g,n in zip(gaps[self.at[z]], self.missing(keep)))
        return np.array([sum(p*(jump(keep, z)+fill(x, keep, z)) for keep,z,p in self.ways(x, m)) for x in self.texts])
    def end(self):
        "Time 1: the jump to nothing but noise, and the number of symbols"
        m,(out,_) = self.state_probs(1.),self.predict(1.)
        noise = self.q(np.zeros(self.V), m)/(m[1]+m[2])
        def kl(o, x):
            o = np.zeros_like(o) if self.scores and not self.noise.masks_only else o
            q,qhat = self.q(np.eye(self.V)[x], m),self.q(np.exp(o)/np.exp(o).sum(), m)
            return sum(a*math.log(a/b) for a,b in zip(q, qhat) if a>0)/(1-m[3])
        def each(x):
            total = 0.
            for n in range(L+1):
                share = (1-m[3])**n*m[3]**(L-n)
                if share: total += share*sum(math.prod(noise[list(z)])*sum(kl(out[self.at[z],j], x[k]) for j,k in enumerate(keep)) for keep in combinations(range(L), n) for z in product(range(self.V+1), repeat=n))
                total -= share*math.comb(L, n)*math.log(math.comb(L, n))                          # paths tell tokens apart, the prior does not
            return total
        return np.array([each(x) for x in self.texts])
    def bound(self):
        if self.noise.T: inner = self.steps(self.noise.T)
        else: inner = sum(w*self.inner(t) for t,w in zip(*nodes()))
        return inner + self.start() + self.end()
@lru_cache(None)
def exact(name): return Exact(name).bound()

def draws(name, each=None, seed=0):
    "Draws of the estimate for every text, (draws, texts)"
    x,each = torch.tensor(texts(name)),each or (10_000 if 'geometric' in name or 'much' in name or name.startswith('mask') and 'delete' not in name else 20_000)
    return nelbo_draws(network(name), x.repeat(each//4, 1), 4, seed=seed, **NOISES[name][3]).view(-1, len(x)).double().numpy()
def judge(name, **kw):
    "Means within four standard errors, which are small enough for an error of a twentieth to be seen in all texts together"
    d,want = draws(name, **kw),exact(name)
    se = d.std(0, ddof=1)/len(d)**.5
    each,all_ = (d.mean(0)-want)/se,(d.mean()-want.mean())*len(se)/np.sqrt((se**2).sum())
    assert (se<.03*want).all() and np.sqrt((se**2).sum())<.0125*want.sum(), f'standard errors {se/want}'
    assert max(np.abs(each).max(), abs(all_))<4, f'{each} and {all_:.1f} standard errors off'

GIDD = 'gidd', 'gidd, gamma 1'
@pytest.fixture
def bent(request, monkeypatch):
    "For noise whose estimate has no finite variance: times dense at 0, and the integrand weighed with that"
    if request.node.callspec.params['name'] not in GIDD: return
    monkeypatch.setattr(bounds, 'low_discrepancy_times', lambda *a: low_discrepancy_times(*a)**4)
    monkeypatch.setattr(bounds, 'output_integrand', lambda model, out, noisy, t, c: predictions.output_integrand(model, out, noisy, t, c)*4*t**.75)

@names
def test_estimates_are_the_bound(name, bent): judge(name)

def judge_ends(name, n=4000):
    "Both end terms by themselves, within four standard errors; what is not random to the digits of a network in float32"
    e,m,c = Exact(name),network(name),NOISES[name][0]
    x,g = torch.tensor(texts(name)).repeat(n, 1),torch.Generator().manual_seed(1)
    with torch.no_grad(): got = dict(start=reconstruction_nats(m, x, c, g), end=prior_nats(m, x, c, g))
    for k,want in dict(start=e.start(), end=e.end()).items():
        d = got[k].view(-1, len(e.texts)).double().numpy()
        z = (d.mean(0)-want)/(d.std(0)/len(d)**.5+1e-6)
        assert np.abs(z).max()<4, f'{k}: {z} standard errors off'
@names
def test_end_terms(name): judge_ends(name)

@names
def test_no_probability_is_given_twice(name):
    "A bound on minus the log-probability: over all texts (of a length that is known) the probabilities it promises do not sum to more than 1"
    p = np.exp(-exact(name)).sum()
    assert .1<p<=1+1e-6, p

def test_tight_for_letters_by_themselves():
    "For a network that knows nothing but how probable each letter is, the bound is minus the log-probability"
    for noise in (Corruption(3, *c, schedule=Geometric(.1, 3.)) for c in ((1, 0), (.6, .4), (0, 1))):
        m = BijectiveDenoiser(DenoiserConfig(3, seq_len=L, d_model=4, n_heads=2, n_layers=1, noise=noise.to_dict())).eval()
        with torch.no_grad(): m.output_head.bias.copy_(torch.tensor([.7, -.5, 0.]))
        x = torch.tensor(list(product(range(3), repeat=L)))
        kw = dict(schedule=noise.schedule) if noise.masks_only else {}
        d = nelbo_draws(m, x.repeat(1500, 1), 4, **kw).view(-1, 9).double()
        p = torch.tensor([.7, -.5, 0.]).log_softmax(0).double()
        assert (d.mean(0)+p[x].sum(1)).abs().max()<4*(d.std(0)/len(d)**.5).max()

@pytest.mark.parametrize('name', ['mask', 'hybrid, geometric', 'mask, delete, geometric'])
def test_error_bars_are_honest(name):
    "Of 200 estimates of each text about one in twenty misses the bound by more than two standard errors"
    x,want = torch.tensor(texts(name)),torch.tensor(exact(name))
    b = nelbo(network(name), x.repeat(200, 1), 32, seed=5, **NOISES[name][3])
    z = (b.mean.view(200, -1)-want)/b.se.view(200, -1)
    assert .02<(z.abs()>2).double().mean()<.12

def test_a_long_text_is_the_sum_of_its_pieces():
    for name in ('mask', 'hybrid, geometric', 'all three, geometric'):
        ids = torch.tensor([0, 1, 1, 1, 1, 0, 0, 0]).repeat(250)
        want = sum(exact(name)[texts(name).index(o)] for o in ((0, 1), (1, 1), (1, 0), (0, 0)))/8
        got = score_ids(network(name), ids, 16, bs=400, schedule=NOISES[name][3].get('schedule'))
        assert abs(got.nats-want)<4*got.se<.1*want and got.n_tokens==2000 and got.bits(1000)[0]==pytest.approx(got.nats*2/math.log(2))

def test_seeds_fix_the_draws():
    for name in ('mask', 'hybrid', 'all three'):
        a = draws(name, 400)
        torch.rand(1)
        assert (a==draws(name, 400)).all() and (a!=draws(name, 400, seed=1)).any()

def scaled(f, by=1.08): return lambda *a, **kw: f(*a, **kw)*by
def without(f): return scaled(f, 0.)
FAULTS = {'weight of masks':(objective, 'masked_nelbo', scaled, 'mask', 'mask, geometric', 'mask, 4 steps'), 'weight of hybrids':(objective, 'hybrid_nelbo', scaled, 'hybrid, geometric', 'all three, geometric', 'hybrid, 4 steps'), 'weight of scores':(predictions, 'score_entropy', scaled, 'mask, scores, told the time', 'uniform, scores, geometric'),
          'weight of insertions':(objective, 'insertion_nelbo', lambda f: scaled(f, 1.1), 'mask, delete, geometric'), 'no reconstruction':(bounds, 'reconstruction_nats', without, 'mask, geometric', 'hybrid, geometric', 'uniform, scores, geometric', 'all three, geometric'),
          'no closing':(bounds, 'prior_term', without, 'mask', 'hybrid, much left', 'all three, much left'), 'no cost of the length':(bounds, 'length_term', without, 'mask, delete', 'all three'), 'no jump':(bounds, 'insertion_jump', without, 'mask, delete, geometric'),
          'noise of another time':(Corruption, 'corrupt', lambda f: lambda self, x, t, g=None: f(self, x, t*.8, g), 'mask, geometric', 'uniform, geometric', 'mask, delete, geometric')}
@pytest.mark.parametrize('fault', FAULTS)
def test_judge_refuses(fault, monkeypatch):
    where,what,how,*names = FAULTS[fault]
    monkeypatch.setattr(where, what, how(getattr(where, what)))
    for name in names:
        with pytest.raises(AssertionError, match='standard errors off'): judge(name)

END_FAULTS = {'starts from masks alone':(Corruption, 'pure_noise', lambda f: lambda self, text, g: torch.full(text.shape, self.mask_id), 'hybrid, much left', 'all three, much left'), 'missing tokens at the end':(bounds, '_put_back', lambda f: lambda noisy, mask: noisy.xt, 'all three, much left'),
              'scores taken for logits':(bounds, 'clean_logits', lambda f: lambda model, out, xt, m: out, 'uniform, scores, geometric'), 'length not paid':(bounds, 'binomial_log_prior', lambda f: lambda n, c: torch.zeros(n+1).double(), 'mask, delete')}
@pytest.mark.parametrize('fault', END_FAULTS)
def test_judge_of_ends_refuses(fault, monkeypatch):
    where,what,how,*names = END_FAULTS[fault]
    monkeypatch.setattr(where, what, how(getattr(where, what)))
    for name in names:
        with pytest.raises(AssertionError, match='standard errors off'): judge_ends(name, 16_000)

x = torch.tensor([[0, 1]])
BAD = {'one draw':(lambda: nelbo(network('mask'), x, 1), 'n is 1'), 'the mask is no text':(lambda: nelbo(network('mask'), x+2), 'expected 0 to 2'), 'negative id':(lambda: nelbo(network('hybrid'), x-1), 'ids from -1'), 'too long':(lambda: nelbo(network('all three'), torch.zeros(1, 3).long()), 'at most seq_len=2'),
       'no batch':(lambda: nelbo(network('uniform'), x[0]), 'expected \\(B, L\\)'), 'a schedule for another noise':(lambda: nelbo(network('hybrid'), x, schedule=half), 'schedule is .* leave it out'), 'steps for deletion':(lambda: nelbo(network('all three'), x, T=5), 'T is 5, .* leave it out'), 'an empty text':(lambda: score_ids(network('mask'), []), 'empty'),
       'a schedule for a network that knows the time':(lambda: nelbo(network('mask, told the time'), x, schedule=half), 'schedule is .* leave it out'), 'steps for scores':(lambda: nelbo(network('mask, scores'), x, T=5), 'leave T out')}
@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_an_error(name):
    f,message = BAD[name]
    with pytest.raises(ValueError, match=message): f()
