"""Samplers against the distributions they should have: chains over all texts of a tiny alphabet, written out from the papers in numpy, and 200,000 samples of each."""
import math
from functools import lru_cache
from itertools import combinations, product
import numpy as np, pytest, torch
from scipy.linalg import expm
from scipy.stats import binom, poisson
from torch.nn.functional import pad
from chi_square import chi_square
from bijdiff.sampling import generate, insertion, rules, samplers
from bijdiff.diffusion.schedules import Cosine, Geometric, HalfCosine, LogLinear
from bijdiff.diffusion.corruption import Corruption, GIDDCorruption, StepProbs
from bijdiff.diffusion.objective import masked_nelbo, score_entropy, uniform_nelbo
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser, DenoiserOutput
from bijdiff.model.predictions import output_integrand
from bijdiff.sampling.rules import reveal_counts, UnmaskingRule
from bijdiff.sampling.samplers import SamplerState
from bijdiff.sampling.insertion import VariableLengthBatch
from bijdiff.sampling.generate import sample, samplers_for
from bijdiff.sampling.repair import self_correct
from bijdiff.pictures import film_strip

V,L,N,STEPS = 3,3,200_000,4                                                                # tokens 0, 1, 2, the mask is 3
TESTS = 150                                                                                # chi-square tests in this file, at most

class Toy(BijectiveDenoiser):
    "A network whose answers are random numbers, one for each text it can be asked about, and move with time if it is told it"
    def __init__(self, V, L, noise, seed=0, **kw):
        super().__init__(DenoiserConfig(V, seq_len=L, d_model=2, n_heads=1, n_layers=1, noise=noise.to_dict(), gap_head=noise.deletes, **{'time_conditioning':not noise.masks_only, **kw}))
        g = torch.Generator().manual_seed(seed)
        self.table,self.gap_table = (1.5*torch.randn(2, (V+2)**L, *k, generator=g, dtype=torch.float64) for k in ((L, V), (L+1,)))
        self.double().eval()
    def forward(self, xt, t=None, mask=None):
        if not self.config.time_conditioning: t = None
        else: assert t is not None
        V,L,w = self.config.vocab_size,self.config.seq_len,xt.shape[1]
        code = pad(xt if mask is None else torch.where(mask, xt, V+1), (0, L-w), value=V+1)@(V+2)**torch.arange(L)
        at = lambda o: o[0][code] if t is None else o[0][code]+2*t.double().view(-1, *[1]*(o.ndim-2))*o[1][code]
        return DenoiserOutput((at(self.table)[:,:w], .3*at(self.gap_table)[:,:w+1])) if self.config.gap_head else at(self.table)[:,:w]

def of(alpha, m, u, d=0.): return lambda t: np.array([alpha(t), *(o*(1-alpha(t)) for o in (m, u, d))])
def cosine(t): return 1-.99*math.cos(math.pi/2*(1-t))
def half_cosine(t): return .01+.99*math.cos(math.pi/2*t)
def geometric(t): return math.exp(-.05*100**t)
def gidd(t):
    odds = .3/.7*2*math.sqrt(t*(1-t))
    return np.array([1-t, t, odds, 0.])/(1+odds)
# noise: (the noise, the probabilities of kept, masked, substituted and deleted by hand, what else its network is)
NOISES = {'mask':(Corruption(V, schedule=Cosine(.01)), of(cosine, 1, 0), {}), 'mask, told the time':(Corruption(V, schedule=LogLinear(0.)), of(lambda t: 1-t, 1, 0), dict(time_conditioning=True)), 'mask, scores':(Corruption(V, schedule=Cosine(.01)), of(cosine, 1, 0), dict(score_head=True)),
          'uniform':(Corruption(V, 0, 1, schedule=HalfCosine(.01)), of(half_cosine, 0, 1), {}), 'uniform, scores':(Corruption(V, 0, 1, schedule=Geometric(.05, 5.)), of(geometric, 0, 1), dict(score_head=True)),
          'hybrid':(Corruption(V, .6, .4, schedule=Geometric(.05, 5.)), of(geometric, .6, .4), {}), 'gidd':(GIDDCorruption(V, .3), gidd, {})}
ELSEWHERE = 'left_to_right','random','spread','block'                                             # tested with the likelihood
CASES = [(name, how) for name,(noise,_,kw) in NOISES.items() for how in samplers_for(Toy(V, 1, noise, **kw)) if how not in ELSEWHERE and how in {'mask, scores':('tweedie', 'euler'), 'mask, told the time':('ancestral', 'confidence', 'first_hitting')}.get(name, how)]

@lru_cache(None)
def toy(name): return Toy(V, L, NOISES[name][0], 34, **NOISES[name][2])

@pytest.fixture(autouse=True)
def quick(monkeypatch):
    "What is the same for all texts is computed once"
    monkeypatch.setattr(rules, 'reveal_counts', lru_cache(None)(reveal_counts))
    one = lru_cache(None)(lambda c, s, t, f=Corruption.step: f(c, torch.tensor([s], dtype=torch.float64), torch.tensor([t], dtype=torch.float64)))
    def step(self, s, t): return StepProbs(*(o.expand(len(s)) for o in one(self, s[0].item(), t[0].item()))) if len(s)>1 and (s==s[0]).all() and (t==t[0]).all() else Corruption_step(self, s, t)
    Corruption_step = Corruption.step
    monkeypatch.setattr(Corruption, 'step', step)

# Exact distributions
Z = np.array(list(product(range(V+1), repeat=L)))                                          # all texts of tokens and masks
OWN = Z[...,None]
own = lambda o: np.take_along_axis(o, OWN, -1)
def slope(f, t, d=1e-5): return (f(t+d)-f(t-d))/(2*d)
def tilt(o, temperature=1., top_p=1.):
    "Softmax, and of it the most probable until `top_p` is reached"
    p = np.exp(o/temperature)
    p /= p.sum(-1, keepdims=True)
    for q in p.reshape(-1, p.shape[-1]):
        total = 0.
        for i in np.argsort(-q, kind='stable'):
            if total>=top_p and top_p<1: q[i] = 0
            total += q[i]
    return p/p.sum(-1, keepdims=True)

def noise_of(m): return np.array([m[2]/V]*V+[m[1]])
def mixed(x, m): return np.concatenate([m[0]*x+m[2]/V, np.full((*x.shape[:-1], 1), m[1])], -1)
def between(a, b):
    "What a symbol becomes between two times, row: from"
    k = b[0]/a[0]
    return k*np.eye(V+1)+noise_of(b)-k*noise_of(a)
def redraws(state_probs, t):
    "Rate at which any symbol is redrawn as each one"
    (k,_,u,_),(dk,_,du,_) = state_probs(t),slope(state_probs, t)
    return np.array([(du-dk/k*u)/V]*V+[-dk/k*(1-u)-du])

def posterior(x, state_probs, s, t, last, first):
    "The ancestral sampler: Bayes' rule; what stands there at first says nothing"
    if first: return mixed(x, [1, 0, 0] if last else state_probs(s))
    if last: return np.pad(x*mixed(np.eye(V), state_probs(t)).T[Z], ((0, 0), (0, 0), (0, 1)))
    return mixed(x, state_probs(s))*between(state_probs(s), state_probs(t)).T[Z]

def reveal(x, state_probs, s, t, last, first):
    "The ancestral sampler for masks"
    a,b = 0. if first else state_probs(t)[0],1. if last else state_probs(s)[0]
    r = (b-a)/(1-a)
    return np.where(OWN==V, mixed(r*x, [1, 1-r, 0]), np.eye(V+1)[Z])

def ratios(model, out, x, m):
    "Scores: of the network's distribution of clean tokens; or its outputs, as factors on those of one that knows nothing"
    q = mixed(np.full_like(x, 1/V) if model.config.score_head else x, m)
    s = q/np.where(own(q)>0, own(q), 1)                                                        # texts that cannot be
    if not model.config.score_head: return s
    return np.where(OWN==np.arange(V+1), s, s*np.exp(np.pad(out, ((0, 0), (0, 0), (0, 1)))))

def tweedie(score, state_probs, s, t, last):
    "SEDD's analytic sampler, theorem 4.2, with matrices: one step of the noise is inverted"
    P = between(state_probs(s), state_probs(t))
    p = (score@np.linalg.inv(P)).clip(0)*P.T[Z]
    return np.where((np.arange(V+1)==V)&last, 0, p)

def euler(score, state_probs, s, t, last):
    "SEDD's Euler sampler: reverse rates times the step"
    p = np.where(OWN==np.arange(V+1), 0., (t-s)*redraws(state_probs, t)[OWN]*score)
    return np.where(OWN==np.arange(V+1), (1-p.sum(-1, keepdims=True)).clip(0), p)

def walk(dist, K, free):
    "One step of the chain over texts in which each symbol that is free goes its way, (texts, L, V+1)"
    with np.errstate(invalid='ignore'): K = np.nan_to_num(K/K.sum(-1, keepdims=True))           # texts that cannot be
    K = np.where(free[:,None], K, np.eye(V+1)[Z])
    return dist@(K[:,0,:,None,None]*K[:,1,None,:,None]*K[:,2,None,None,:]).reshape(len(Z), len(Z))

def surest(x, rule):
    "Each row reveals the mask with the highest probability or lowest entropy, the leftmost of equals"
    K = np.eye(V+1)[Z]
    for k,(z,p) in enumerate(zip(Z, x)):
        sure = [max(o) if rule=='confidence' else sum(a*math.log(a) for a in o if a>0) for o in p]
        for i in sorted((i for i in range(L) if z[i]==V), key=lambda i: -sure[i])[:1]: K[k,i] = [*p[i], 0.]
    return K

def one_by_one(predict, template, rule):
    "One mask a step; the network is told the share that is hidden"
    dist,free = (Z==np.array(template)).all(1)*1.,np.array(template)==V
    for hidden in range(free.sum(), 0, -1): dist = walk(dist, surest(predict(hidden), rule), free)
    return dist

def exact(name, how, template=(V,)*L, steps=STEPS, **kw):
    "Distribution over all texts"
    (noise,state_probs,_),model,free = NOISES[name],toy(name),np.array(template)==V
    def predict(t):
        out = model(torch.tensor(Z), torch.full((len(Z),), t, dtype=torch.float64) if model.config.time_conditioning else None).numpy()
        return out, tilt(out, **kw)
    if how in UnmaskingRule.names: return one_by_one(lambda hidden: predict(hidden/L)[1], template, how)
    if how=='first_hitting': return hitting(lambda t: predict(t)[1], tuple(template), model.config.time_conditioning)
    start = noise_of(state_probs(1.))
    dist = np.array([np.prod([start[a] if f else a==b for a,f,b in zip(z, free, template)]) for z in Z])/start.sum()**free.sum()
    ts = np.linspace(1, 0, steps+1)
    if how in ('tweedie', 'euler'): ts[0] = max(i for i in range(100_001) if state_probs(i*1e-5)[0]>=1e-4)*1e-5        # later there are no scores to speak of
    for i,(t,s) in enumerate(zip(ts, ts[1:])):
        (out,x),last = predict(t),i==steps-1
        if how=='ancestral': K = (reveal if noise.masks_only else posterior)(x, state_probs, s, t, last, i==0)
        else:
            score = ratios(model, out, x, state_probs(t))
            K = (tweedie if how=='tweedie' or last else euler)(score, state_probs, s, t, last)
            if noise.masks_only: K = np.where(OWN==V, K, np.eye(V+1)[Z])
        dist = walk(dist, K, free)
    return dist

def hitting(predict, template, timed, n=8):
    "The mean over all orders of the products of conditionals; if the network is told the time, over the times 1-alpha = t of n masks, which fall by a factor u^(1/n)"
    us,ws = np.polynomial.legendre.leggauss(n) if timed else ([1.], [2.])
    predict,empty = lru_cache(None)(predict),np.eye(len(Z))
    def f(z, hidden):
        masks = [i for i in range(L) if z[i]==V]
        if not masks: return empty[index(z)]
        out = 0.
        for u,w in zip(us, ws):
            t = hidden*(u+1)/2                                                                     # density k t^(k-1)/hidden^k of the largest of k
            p,weight = predict(t)[index(z)],w/2*(((u+1)/2)**(len(masks)-1) if timed else 1/len(masks))
            out = out+weight*sum(p[i,v]*f((*z[:i], v, *z[i+1:]), t) for i in masks for v in range(V))
        return out
    return f(template, 1.)
def index(z): return int(np.dot(z, (V+1)**np.arange(L)[::-1]))

def judge(counts, p):
    value = chi_square(counts, p)
    assert value>1e-3/TESTS, f'p-value {value:.1e}'

def written(name, how, template=(V,)*L, n=N, seed=0, steps=STEPS, **kw):
    "How often each text is written"
    noise,_,model = *NOISES[name][:2],toy(name)
    if noise.masks_only and not model.config.time_conditioning: kw['schedule'] = noise.schedule
    x = sample(model, n, steps, template=torch.tensor(template), sampler=how, seed=seed, **kw)
    assert x.shape==(n, L) and (x<V).all() and all((x[:,i]==o).all() for i,o in enumerate(template) if o<V), 'what is given stays'
    return np.bincount((x@(V+1)**torch.arange(L).flip(0)).numpy(), minlength=len(Z))

@pytest.mark.parametrize('name, how', CASES)
def test_samplers_sample_the_model(name, how): judge(written(name, how), exact(name, how))

@pytest.mark.parametrize('name, how', CASES)
def test_around_a_prompt(name, how):
    "The conditional distribution, at another temperature and without the improbable tokens where the sampler knows them"
    kw = {} if 'scores' in name else dict(temperature=.7, top_p=.9)
    judge(written(name, how, (V, 1, V), 50_000, 1, **kw), exact(name, how, (V, 1, V), **kw))

def test_chains_of_masks_are_the_models_conditionals():
    "What follows from the definition without a chain: with one mask, what the network says; with very many steps, the mean over the orders"
    p = tilt(toy('mask')(torch.tensor([[2, V, 1]])).numpy())[0,1]
    for how in samplers_for(toy('mask')): assert np.abs(exact('mask', how, (2, V, 1)).reshape([V+1]*L)[2,:V,1]-p).max()<1e-12
    hit = exact('mask', 'first_hitting')
    for how in ('ancestral', 'tweedie', 'euler'): assert .5*np.abs(exact('mask', how, steps=400)-hit).sum()<2e-3<.5*np.abs(exact('mask', how)-hit).sum()
    kinds = [exact('mask', how) for how in ('confidence', 'entropy', 'first_hitting')]
    assert all(.5*np.abs(a-b).sum()>.02 for a,b in combinations(kinds, 2)), 'each rule has its own'

def left_to_right(run):
    while (masked := run.x==V).any():
        first = masked & (masked.cumsum(1)==1)
        run.write(first, samplers.draw(run.probs(.5, first), run.g))
def by_drawn_token(probs, rule): return probs.gather(-1, torch.multinomial(probs, 1))[...,0]
def with_evidence_twice(f):
    "Clean tokens of which the symbol itself is evidence, as in a posterior"
    def g(model, out, xt, m):
        kept,sub = (o[:,None,None] for o in (m.kept, m.substitute))
        return f(model, out, xt, m)+torch.where(xt[...,None]==V, 1., kept*(xt[...,None]==torch.arange(V))+sub/V).clamp(min=1e-9).log()
    return g
def faster(f): return lambda self, t: type(r := f(self, t))(*(1.2*o for o in r))
real = {k:getattr(samplers, k) for k in ('token_probs', 'reveal_probs', '_tweedie', 'sample_categorical')}
def warm(module):
    "Too high a temperature wherever a module draws tokens"
    return module, 'token_probs', lambda o, temperature=1., top_p=1.: real['token_probs'](o, 1.1*temperature, top_p)
FAULTS = {f'too warm: {name}, {how}':(name, how, warm(samplers)) for name,how in (('mask', 'ancestral'), ('mask', 'tweedie'), ('mask', 'first_hitting'), ('uniform', 'tweedie'), ('hybrid', 'ancestral'), ('gidd', 'euler'))} | {
    'revealed as another schedule says':('mask', 'ancestral', (samplers, 'reveal_probs', lambda n, _: real['reveal_probs'](n, HalfCosine()))), 'symbols say nothing in the end':('uniform', 'ancestral', (samplers, 'condition_on_observed', lambda probs, z, state_probs, V: probs)),
    'posterior, not leave-one-out: uniform':('uniform', 'ancestral', (samplers, 'clean_logits', with_evidence_twice(samplers.clean_logits))), 'posterior, not leave-one-out: hybrid':('hybrid', 'tweedie', (samplers, 'clean_logits', with_evidence_twice(samplers.clean_logits))), 'score not taken back':('hybrid', 'tweedie', (samplers, '_tweedie', lambda score, z, step, V: real['_tweedie'](score, z, step._replace(token_to_token=.9*step.token_to_token), V))),
    'scores too large':('uniform, scores', 'tweedie', (samplers, 'output_scores', lambda *a, f=samplers.output_scores: 1.05*f(*a))), 'rates too high':('hybrid', 'euler', (Corruption, 'event_rates', faster(Corruption.event_rates))), 'rates of masks too high':('mask', 'euler', (Corruption, 'event_rates', faster(Corruption.event_rates))),
    'confidence of the drawn token':('mask', 'confidence', (rules, 'confidence', by_drawn_token)), 'rules swapped':('mask', 'entropy', (rules, 'confidence', lambda p, rule: p.max(-1).values)), 'from left to right':('mask', 'first_hitting', (generate, 'first_hitting', left_to_right)),
    'told another time':('gidd', 'ancestral', (SamplerState, 'predict', lambda self, t, f=SamplerState.predict: f(self, .9*t))), 'draws not independent':('mask', 'ancestral', (samplers, 'sample_categorical', lambda p, g: real['sample_categorical'](p, g)[torch.arange(p.shape[0])//2*2]))}
@pytest.mark.parametrize('name', FAULTS)
def test_the_chi_square_refuses(name, monkeypatch):
    noise,how,fault = FAULTS[name]
    p = exact(noise, how)
    monkeypatch.setattr(*fault)
    with pytest.raises(AssertionError, match='p-value|impossible'): judge(written(noise, how, n=N//2), p)

# Insertion and deletion
W,ROOM = 2,3                                                                               # tokens 0 and 1, the mask is 2; longest text
STRINGS = [z for n in range(ROOM+1) for z in product(range(W+1), repeat=n)]
AT = {z:i for i,z in enumerate(STRINGS)}
GROWING = {'mask, delete':(Corruption(W, .5, 0, .5, schedule=Cosine(.01)), of(cosine, .5, 0, .5)), 'all three':(Corruption(W, .4, .3, .3, schedule=HalfCosine(.01)), of(half_cosine, .4, .3, .3)),
           'mostly deletion':(Corruption(W, .2, .1, .7, schedule=Geometric(.05, 5.)), of(geometric, .2, .1, .7))}

def generator(state_probs, t):
    "Redraws as any token and as the mask, and masks that vanish; row: from"
    (k,m,u,d),(dk,_,du,dd) = state_probs(t),slope(state_probs, t)
    token = (du-dk/k*u)/(1-d)
    Q = np.zeros((W+2, W+2))
    Q[:W+1,:W],Q[:W+1,W],Q[W,W+1] = token/W,-dk/k-token,dd/m
    return Q-np.diag(Q.sum(1))

def symbols(x, m): return np.concatenate([m[0]*x+m[2]/W, np.full((*x.shape[:-1], 1), m[1])], -1)
def pad_to(p, z):
    "A distribution over tokens and the mask; what cannot be stays as it is"
    p = np.append(p, [0.]*(W+1-len(p)))
    return p/p.sum() if p.sum()>0 else np.eye(W+1)[z]

@lru_cache(None)
def passage(name, s, t, n=200):
    P,grid = np.eye(W+2),s+(t-s)*np.linspace(0, 1, n+1)**2
    for a,b in zip(grid, grid[1:]): P = P@expm((b-a)*generator(GROWING[name][1], (a+b)/2))
    return P[:W+1,:W+1]

def inserted(means, room):
    "Every way to insert masks into the gaps while there is room, from left to right, with its probability"
    if not means: yield (),1.; return
    for k in range(room+1):
        p = poisson.pmf(k, means[0]) if k<room else poisson.sf(k-1, means[0])
        for rest,q in inserted(means[1:], room-k): yield (k, *rest),p*q

@lru_cache(None)
def grower(name): return Toy(W, ROOM, GROWING[name][0], 3)

def exact_growth(name, given=0, steps=STEPS, **kw):
    "Distribution over all texts; the first `given` symbols are given zeros, with no gap before them"
    state_probs = GROWING[name][1]
    def predict(t):
        z = torch.tensor([[*z, *[W]*(ROOM-len(z))] for z in STRINGS])
        logits,gaps = grower(name)(z, torch.full((len(z),), t), torch.arange(ROOM) < torch.tensor([len(z) for z in STRINGS])[:,None])
        with np.errstate(divide='ignore'): return tilt(logits.numpy(), **kw), np.exp(gaps.numpy())*state_probs(t)[3]/(1-state_probs(t)[3])
    m = state_probs(1.)
    start,dist = np.array([m[2]/W]*W+[m[1]])/(m[1]+m[2]),np.zeros(len(STRINGS))
    for z in STRINGS:
        n = len(z)-given
        if n>=0 and not any(z[:given]): dist[AT[z]] = binom.pmf(n, ROOM-given, 1-m[3])*np.prod(start[list(z[given:])])
    def spread(K):
        "Each text goes to others with probabilities"
        out = np.zeros(len(STRINGS))
        for z,p in zip(STRINGS, dist):
            if p>0:
                for y,q in K(z): out[AT[y]] += p*q
        return out
    ts = np.linspace(1, 0, steps+1)
    for t,s in zip(ts, ts[1:]):
        x,gaps = predict(t)
        if s>0: P,before = passage(name, s, t),symbols(x, state_probs(s))
        else: P,before = symbols(np.eye(W), state_probs(t)),x                                              # the last step gives clean tokens
        back = 1-state_probs(s)[3]/state_probs(t)[3] if s>0 else 1.
        def K(z):
            free = range(given, len(z))
            post = [pad_to(before[AT[z],i]*P[:,z[i]], z[i]) for i in free]
            ways = list(inserted([(j>=given)*g*back for j,g in enumerate(gaps[AT[z],:len(z)+1])], ROOM-len(z)))
            for y in product(range(W+1), repeat=len(free)):
                p = math.prod(o[a] for o,a in zip(post, y))
                full = (*z[:given], *y)
                for counts,q in ways: yield sum(((W,)*c+full[j:j+1] for j,c in enumerate(counts)), ()), p*q
        dist = spread(K)
    def fill(z):
        for y in product(*[range(W) if a==W else [a] for a in z]): yield y,math.prod(x[AT[z],i,b] for i,(a,b) in enumerate(zip(z, y)) if a==W)
    return spread(fill)

def grown(name, given=0, n=N, seed=0, steps=STEPS, **kw):
    texts = sample(grower(name), n, steps, template=torch.tensor([0]*given+[W]*(ROOM-given)), seed=seed, **kw)
    lengths = torch.tensor([len(o) for o in texts])
    code = torch.nn.utils.rnn.pad_sequence(texts, True, W)@(W+1)**torch.arange(max(lengths))
    where = {sum(a*(W+1)**i for i,a in enumerate([*z, *[W]*(ROOM-len(z))])):i for z,i in AT.items() if W not in z}
    found,counts = (code+sum(W*(W+1)**i for i in range(max(lengths), ROOM))).unique(return_counts=True)
    return np.bincount([where[c] for c in found.tolist()], counts, len(STRINGS))

@pytest.mark.parametrize('given', [0, 1])
@pytest.mark.parametrize('name', GROWING)
def test_insertion_samples_the_model(name, given): judge(grown(name, given, 50_000 if given else N//2 if name=='mostly deletion' else N), exact_growth(name, given))

@pytest.mark.parametrize('name', GROWING)
def test_insertion_at_another_temperature(name): judge(grown(name, n=50_000, temperature=.7, top_p=.8), exact_growth(name, temperature=.7, top_p=.8))

# A random language of texts of no to three letters, and all that can be known about it
LANGUAGE = {w:p for w,p in zip([z for z in STRINGS if W not in z], np.random.default_rng(0).dirichlet(.7*np.ones(15)))}
HISTORIES = [(w, keep, z) for w in LANGUAGE for m in range(len(w)+1) for keep in combinations(range(len(w)), m) for z in product(range(W+1), repeat=m)]
def rows(seqs, fill, n=ROOM): return np.array([[*o, *[fill]*(n-len(o))] for o in seqs])

class Oracle(Toy):
    "In the place of a network: the expected gaps, and the distribution of each clean token given all but its own symbol"
    word,clean,seen = [LANGUAGE[w] for w,_,_ in HISTORIES],rows([[w[i] for i in keep] for w,keep,_ in HISTORIES], 0),rows([z for *_,z in HISTORIES], W)
    there,lost = rows([[1]*len(z) for *_,z in HISTORIES], 0),np.array([len(w)-len(z) for w,_,z in HISTORIES])
    missing = rows([np.diff([-1, *keep, len(w)])-1 for w,keep,_ in HISTORIES], 0, ROOM+1)
    at = np.array([AT[z] for *_,z in HISTORIES])
    place = torch.zeros((W+2)**ROOM, dtype=torch.long).index_put_((torch.tensor(rows(STRINGS, W+1)@(W+2)**np.arange(ROOM)),), torch.arange(len(STRINGS)))
    def __init__(self, name, wrong=0.):
        super().__init__(W, ROOM, GROWING[name][0])
        self.state_probs,self.wrong,self.tables = GROWING[name][1],wrong,lru_cache(None)(self.at_time)
    def at_time(self, t):
        m = self.state_probs(t)
        like = np.where(self.there, symbols(np.eye(W), m)[self.clean,self.seen], 1.)
        others = np.stack([np.delete(like, i, 1).prod(1) for i in range(ROOM)], 1)*(self.word*m[3]**self.lost)[:,None]*self.there
        total,gaps,clean = np.zeros(len(STRINGS)),np.zeros((len(STRINGS), ROOM+1)),np.zeros((len(STRINGS), ROOM, W))
        weight = like.prod(1)*self.word*m[3]**self.lost
        np.add.at(total, self.at, weight)
        np.add.at(gaps, self.at, weight[:,None]*self.missing)
        for i in range(ROOM): np.add.at(clean, (self.at, i, self.clean[:,i]), others[:,i])
        with np.errstate(all='ignore'): return torch.tensor(clean).clamp(min=1e-300).log(), torch.tensor(gaps/total[:,None]).clamp(min=1e-300).log()+self.wrong-math.log(m[3]/(1-m[3]))
    def forward(self, xt, t=None, mask=None):
        i = self.place[pad(torch.where(mask, xt, W+1), (0, ROOM-xt.shape[1]), value=W+1)@(W+2)**torch.arange(ROOM)]
        logits,gaps = self.tables(t[0].item())
        return DenoiserOutput((logits[i,:xt.shape[1]], gaps[i,:xt.shape[1]+1]))

def language_after_start(name):
    "Three binomial symbols of noise at the start, whatever the language would have there; then the texts that so many belong to"
    A,out = 1-GROWING[name][1](1.)[3],0.
    for k in range(ROOM+1):
        p = np.array([LANGUAGE.get(z, 0.)*binom.pmf(k, len(z), A) for z in STRINGS])
        out = out+binom.pmf(k, ROOM, A)*p/p.sum()
    return out
def distance_from_the_language(name, n=5000, **kw):
    counts = np.zeros(len(STRINGS))
    for o in sample(Oracle(name, **kw), n, 200): counts[AT[tuple(o.tolist())]] += 1
    return .5*np.abs(counts/n-language_after_start(name)).sum()

def test_insertion_with_the_best_network_writes_the_language():
    "In 200 steps, up to the size of steps and that of the sample; other expectations are farther off"
    assert distance_from_the_language('all three')<.03>distance_from_the_language('mask, delete')
    assert distance_from_the_language('mask, delete', wrong=.2)>.04

GROWTH_FAULTS = {'too many come back':(insertion, '_poisson', lambda mean, run, f=insertion._poisson: f(1.05*mean, run)), 'too warm':warm(insertion), 'expects too few':(insertion, 'expected_gaps', lambda *a, f=insertion.expected_gaps: f(*a)-.05),
                 'starts too long':(VariableLengthBatch, 'delete', lambda self, which, f=VariableLengthBatch.delete: f(self, which&(torch.rand(which.shape)<.95))), 'symbols from another time':(Corruption, 'reverse_posterior', lambda self, p, z, s, t, f=Corruption.reverse_posterior: f(self, p, z, .9*s, t))}
@pytest.mark.parametrize('name', GROWTH_FAULTS)
def test_the_chi_square_of_texts_that_grow_refuses(name, monkeypatch):
    monkeypatch.setattr(*GROWTH_FAULTS[name])
    with pytest.raises(AssertionError, match='p-value'): judge(grown('all three', n=60_000), exact_growth('all three'))

# The length of blanks: texts of a Poisson number of tokens miss a Poisson number, wherever they are, so all is known exactly
class Poisson(Toy):
    def __init__(self, noise, mean):
        super().__init__(W, 1, noise)
        self.config.seq_len,self.mean,self.surviving = 60,mean,float(1-noise.state_probs(torch.ones(1))[3])
    def forward(self, xt, t=None, mask=None):
        n = mask.sum(1, keepdim=True)
        m = self.corruption.state_probs(t[:1].double())
        gaps = math.log(self.mean*m.surviving.item())-torch.log(n+1.)
        return DenoiserOutput((torch.zeros(*xt.shape, W), gaps.expand(-1, xt.shape[1]+1)))
BLANKS = {'mask, delete':Corruption(W, .4, 0, .6, schedule=LogLinear(0.)), 'all three':Corruption(W, .3, .3, .4, schedule=LogLinear(0.))}
def judge_lengths(lengths, mean): judge(np.bincount(lengths, minlength=61), np.append(poisson.pmf(np.arange(60), mean), poisson.sf(59, mean)))

@pytest.mark.parametrize('name', BLANKS)
def test_settling_leaves_true_noise_as_it_is(name):
    model = Poisson(BLANKS[name], 12.)
    n,mean = 20_000,12*model.surviving
    for passes in (1, 3, 10):
        lengths = torch.poisson(torch.full((n,), mean), generator=torch.Generator().manual_seed(passes))
        w = VariableLengthBatch(torch.full((n, 40), W), W, 60)
        w.delete(torch.arange(61)>=lengths[:,None])
        assert torch.equal(w.lengths, lengths.long().clamp(max=40))
        with torch.no_grad(): insertion._find_lengths(SamplerState(model, w.x, model.corruption, seed=passes), w, passes)
        judge_lengths(w.lengths.numpy(), mean)

@pytest.mark.parametrize('name', BLANKS)
def test_a_blank_of_a_wrong_length_settles(name):
    "Far too long or too short: when it has settled, texts have the lengths of the language, in however many steps; before, they do not"
    model = Poisson(BLANKS[name], 12.)
    for length in (2, 50):
        settled,not_ = ([len(o) for o in sample(model, 5000, 3, length=length, length_steps=k)] for k in (40, 0))
        judge_lengths(settled, 12.)
        with pytest.raises(AssertionError, match='p-value|impossible'): judge_lengths(not_, 12.)

# What every sampler does
def tiny(V, L, noise, seed=0, **kw):
    "A real network with random weights"
    torch.manual_seed(seed)
    m = BijectiveDenoiser(DenoiserConfig(V, seq_len=L, d_model=8, n_heads=2, n_layers=2, noise=noise.to_dict(), gap_head=noise.deletes, **{'time_conditioning':not noise.masks_only, **kw})).double()
    for p in m.parameters(): torch.nn.init.normal_(p, std=.5)
    return m
MODELS = {k:(Corruption(5, *c), kw) for k,(c,kw) in {'mask':((1, 0, 0), {}), 'mask, told the time':((1, 0, 0), dict(time_conditioning=True)), 'mask, scores':((1, 0, 0), dict(score_head=True)), 'uniform':((0, 1, 0), {}), 'uniform, scores':((0, 1, 0), dict(score_head=True)),
          'hybrid':((.6, .4, 0), {}), 'mask, delete':((1, 0, 1), {}), 'all three':((.4, .3, .3), {})}.items()} | {'gidd':(GIDDCorruption(5, .3), {}), 'own schedules':(Corruption(5, 1, 1, 0, dict(mask=Cosine(), substitute=HalfCosine())), {}), 'mask in a dictionary':(Corruption(5, schedule=dict(mask=LogLinear())), dict(time_conditioning=True))}
EVERY = [(name, how) for name,(noise,kw) in MODELS.items() for how in samplers_for(tiny(5, 1, noise, **kw))]
every = pytest.mark.parametrize('name, how', EVERY)
@lru_cache(None)
def real_network(name): return tiny(5, 12, MODELS[name][0], **MODELS[name][1])
def lists(x): return [o.tolist() for o in x]

@every
def test_seeds_fix_everything(name, how):
    m = real_network(name).train()
    a = lists(sample(m, 4, 6, sampler=how, seed=3))
    torch.rand(1)                                                                            # the global generator plays no part
    assert a==lists(sample(m, 4, 6, sampler=how, seed=3))!=lists(sample(m, 4, 6, sampler=how, seed=4)) and m.training
    assert all(len(o)<=12 and set(o)<=set(range(5)) for o in a) and (how=='insertion' or {*map(len, a)}=={12})
    assert how=='insertion' or {*map(len, lists(sample(m, 2, 3, length=7, sampler=how)))}=={7}

@every
def test_what_is_given_stays(name, how):
    "A beginning, an end, tokens between blanks; each text with its own; a text with nothing to write; one token, one step"
    m,template = real_network(name),torch.tensor([[1, 2, 5, 5, 3, 5, 5, 4, 0], [5, 5, 1, 4, 5, 0, 0, 5, 5], [0, 1, 2, 3, 4, 3, 2, 1, 0]])
    for kw in ({}, dict(top_p=.5, temperature=.3)) if 'scores' not in name or how not in ('tweedie', 'euler') else ({},):
        for steps in (1, 7):
            out = lists(sample(m, 3, steps, template=template, sampler=how, **kw))
            assert out[2]==template[2].tolist()
            if how!='insertion': assert all(a==b or b==5 for x,t in zip(out, template.tolist()) for a,b in zip(x, t))
            else:
                assert out[0][:2]==[1, 2] and out[0][-2:]==[4, 0] and 3 in out[0][2:-2]
                assert any(out[1][i:i+2]==[1, 4] and [0, 0] in (out[1][j:j+2] for j in range(i+2, len(out[1]))) for i in range(len(out[1]))), 'in order, and unbroken'
    assert lists(sample(m, 1, 5, template=[0, 3, 1], sampler=how))==[[0, 3, 1]]
    if how!='insertion': assert len(lists(sample(m, 1, 1, length=1, sampler=how))[0])==1

@every
def test_passes_and_frames(name, how, monkeypatch):
    "No more passes than steps; first hitting as many as masks; where the time does not matter, no text is asked about twice. Frames lead from the template to the text"
    m,asked = real_network(name),[]
    forward = m.forward
    def spy(x, t=None, mask=None):
        asked.append((x.tolist(), None if t is None else t.tolist()))
        return forward(x, t, mask)
    monkeypatch.setattr(m, 'forward', spy)
    for n,steps,template in ((1, 40, None), (1, 3, None), (3, 9, [5, 1, 5, 5, 5, 2])):
        asked.clear(); frames = []
        out = sample(m, n, steps, template=template, sampler=how, frames=frames)
        masks = 12 if template is None else 4
        assert len(asked)==masks if how=='first_hitting' else 0<len(asked)<=steps+(how=='insertion')
        assert len({*map(str, asked)})==len(asked) or how=='insertion'
        if n==1 and 'time' not in name and name.startswith('mask') and how!='insertion' and 'dictionary' not in name: assert len(asked)<=masks
        assert frames[0].tolist()==[template or [5]*12]*n and lists(frames[-1])==lists(out) and len(film_strip(frames, type('', (), dict(decode=lambda self, o: ' '.join(map(str, o))))()).split('\n'))==min(6, len(frames))
        if how!='insertion': assert all((a!=b).any() for a,b in zip(frames[1:], frames[2:])), 'each shows a change'
    if how=='insertion':
        asked.clear(); sample(m, 2, 5, length_steps=4)
        assert len(asked)<=5+1+4

def constant(V, L, logits, noise=None, **kw):
    "A network that always says the same"
    m = BijectiveDenoiser(DenoiserConfig(V, seq_len=L, d_model=2, n_heads=1, n_layers=1, noise=noise and noise.to_dict(), gap_head=bool(noise and noise.deletes), time_conditioning=bool(noise), **kw)).eval()
    def forward(x, t=None, mask=None):
        out = logits.expand(*x.shape, V)
        return DenoiserOutput((out, torch.zeros(len(x), x.shape[1]+1))) if m.config.gap_head else out
    m.forward = forward
    return m

@pytest.mark.parametrize('name, how', [(n, h) for n,h in EVERY if 'scores' not in n])
def test_temperature_and_top_p(name, how):
    "Of a network that always says the same every token has its distribution (where the size of steps makes no error); those outside of top-p are never drawn"
    p = torch.tensor([.05, .3, .1, .4, .15])
    m,freqs = constant(5, 12, p.log(), MODELS[name][0]),lambda x: np.bincount(torch.cat(list(x)).numpy(), minlength=5)
    one = freqs(sample(m, 2000, 8, sampler=how, length=8))
    cold,top = freqs(sample(m, 2000, 8, sampler=how, length=8, temperature=.5)),freqs(sample(m, 2000, 8, sampler=how, length=8, top_p=.6))
    assert not top[[0, 2, 4]].any() and top[[1, 3]].all()
    for counts,q in ((one, p), (cold, p**2/(p**2).sum()), (top[[1, 3]], torch.tensor([3/7, 4/7]))) if how!='euler' else (): judge(counts, q.double().numpy()/q.double().sum().item())

def test_temperature_matters_or_is_refused():
    for how in ('tweedie', 'euler'):
        try: a,b = (sample(real_network('mask, scores'), 50, 8, sampler=how, temperature=t) for t in (1e-3, 1.))
        except ValueError: continue
        assert not torch.equal(a, b) and len(a.unique(dim=0))<len(b.unique(dim=0)), 'a temperature that is silently ignored'

# Large vocabularies and tiny steps (Zheng et al. 2024, section 4)
BIG = 50_000
def test_ancestral_reveals_on_schedule_with_a_large_vocabulary():
    "After so many of 1000 steps so many of 12 x 128 positions are revealed, within 4 standard errors"
    asked,schedule = [],LogLinear(0.)
    m = constant(BIG, 128, torch.zeros(1), Corruption(BIG, schedule=schedule))
    forward = m.forward
    def spy(x, t, mask=None): asked.append((t[0].item(), (x==BIG).sum().item())); return forward(x)
    m.forward = spy
    x,n = sample(m, 12, 1000, sampler='ancestral'),12*128
    assert len(x.unique())>.95*n and len(asked)>500
    for when in (.98, .9, .7, .5, .2, .05):
        t,masks = next(o for o in asked if o[0]<=when)                                      # seen before the step from t
        assert abs(masks-n*t)<4*math.sqrt(n*t*(1-t)), (t, masks/n)

class Enough(Exception): pass
def test_tweedie_reveals_on_schedule_with_a_large_vocabulary(monkeypatch):
    "The draw that decides is in float64, among probabilities that are the schedule's to nine digits"
    seen = []
    def spy(probs, n, generator):
        seen.append(probs)
        if len(seen)==6: raise Enough
        return multinomial(probs, n, generator=generator)
    multinomial = torch.multinomial
    monkeypatch.setattr(torch, 'multinomial', spy)
    m = constant(BIG, 4, torch.zeros(1), Corruption(BIG, schedule=LogLinear()))
    with pytest.raises(Enough): sample(m, 1, 1000, sampler='tweedie')
    for i,p in enumerate(seen):
        a,b = (1-.999*(1-j/1000) for j in (i, i+1))
        p = p/p.sum(-1, keepdim=True)
        assert p.dtype==torch.float64 and p.shape[-1]==BIG+1 and (1-p[:,-1]-(b-a)/(1-a)).abs().max()<1e-9 and (p[:,:-1]/((b-a)/(1-a)/BIG)-1).abs().max()<1e-6

def draw_in_float32(probs, g): return (probs.float().log()-(-torch.rand(probs.shape, generator=g).clamp(min=1e-30).log()).log()).argmax(-1)
def count_draws(draw, rows, p=1e-3, seed=0):
    "How often anything but the last is drawn from many probabilities far below the resolution of float32"
    probs,g = torch.cat([torch.full((BIG,), p/BIG, dtype=torch.float64), torch.tensor([1-p], dtype=torch.float64)]).expand(50, -1),torch.Generator().manual_seed(seed)
    return sum((sample_categorical(probs, g)<BIG).sum().item() for _ in range(rows//50))
def test_draws_of_tiny_probabilities(): assert binom.ppf(.05, 8000, 1e-3)<=count_draws(samplers.draw, 8000, seed=1)<=binom.isf(5e-4, 8000, 1e-3)

# Repair
WORDS = [[i]*8 for i in range(4)]+[[(i+j)%4 for j in range(8)] for i in range(4)]
class Speller(Toy):
    "Knows eight words: the distribution of each token given all others, by Bayes' rule"
    def __init__(self, noise):
        super().__init__(4, 1, noise)
        self.config.seq_len,self.words = 8,torch.tensor(WORDS)
    def forward(self, xt, t=None, mask=None):
        k,m,u,_ = (o[:,None,None].to(torch.float64) for o in self.corruption.state_probs(t.double()))
        like = torch.where(xt[:,None]==4, m, k*(xt[:,None]==self.words)+u/4).log()           # (B, words, L)
        others = (like.sum(-1, keepdim=True)-like).softmax(1)
        return torch.einsum('bwl,wlv->blv', others, torch.nn.functional.one_hot(self.words, 4).double()).clamp(min=1e-300).log()

@pytest.mark.parametrize('noise', [Corruption(4, 0, 1), Corruption(4, .8, .2), GIDDCorruption(4, .2)], ids=['uniform', 'hybrid', 'gidd'])
def test_self_correction_repairs(noise):
    "Any two wrong tokens of any word; nothing where nothing is wrong; only what may change, and only so many a pass"
    m,words = Speller(noise),torch.tensor(WORDS)
    assert torch.equal(self_correct(m, words), words)
    wrong = words.repeat_interleave(28*9, 0)
    for k,((i,j),a,b) in enumerate(product(combinations(range(8), 2), (1, 2, 3), (1, 2, 3))):
        wrong[k::252,i] = (wrong[k::252,i]+a)%4
        wrong[k::252,j] = (wrong[k::252,j]+b)%4
    right,before = words.repeat_interleave(252, 0),wrong.clone()
    assert torch.equal(self_correct(m, wrong), right) and torch.equal(wrong, before)
    fixed = torch.arange(8)<4
    assert torch.equal(self_correct(m, wrong, fixed=fixed.expand_as(wrong))[:,:4], wrong[:,:4])
    some = self_correct(m, wrong, passes=1, per_pass=1)
    assert ((some!=wrong).sum(1)==1).all() and ((some!=right).sum(1)==1).all(), 'one a pass, and a wrong one'
    assert torch.equal(self_correct(m, wrong, per_pass=1), right)

def test_a_model_of_masks_corrects_nothing():
    x = torch.randint(0, 5, (20, 12), generator=torch.Generator().manual_seed(0))
    for name in ('mask', 'mask, told the time', 'mask, scores', 'mask in a dictionary'): assert torch.equal(self_correct(real_network(name), x), x)
    assert all((self_correct(real_network(name), x, wrong=.8)!=x).any() for name in ('uniform', 'uniform, scores', 'hybrid', 'gidd'))

# Bad input
def from_(name, *a, **kw): return lambda: sample(real_network(name), *a, **kw)
BAD = {'no steps':(from_('mask', steps=0), 'steps is 0'), 'negative steps':(from_('mask, delete', steps=-3), 'steps is -3'), 'steps of a fraction':(from_('uniform', steps=2.5), 'steps is 2.5'), 'no steps by scores':(from_('hybrid', steps=0, sampler='tweedie'), 'steps is 0'), 'no steps by confidence':(from_('mask', steps=0, sampler='confidence'), 'steps is 0'), 'negative steps of first hitting':(from_('mask', steps=-3, sampler='first_hitting'), 'steps is -3'), 'length beside a template':(from_('mask', template=[5]*4, length=3), 'length is 3, beside a template'), 'schedule that there is not':(from_('mask', schedule='linear'), "schedule is 'linear'"),
       'id too large':(from_('mask', template=[0, 6]), 'ids from 0 to 6; expected 0 to 5'), 'negative id':(from_('all three', template=[-1, 5]), 'ids from -1'), 'template too long':(from_('mask', template=[5]*13), 'at most seq_len=12'), 'too long':(from_('hybrid', length=13), 'at most seq_len=12'), 'too long to insert':(from_('mask, delete', length=13), 'at most seq_len=12'),
       'template of another number of texts':(from_('mask', 2, template=torch.full((3, 4), 5)), 'template has shape'), 'template of too many axes':(from_('mask', 1, template=torch.full((1, 1, 4), 5)), 'template has shape'), 'not even a sampler':(from_('mask', sampler='beam'), "sampler is 'beam'"),
       'temperature 0':(from_('mask', temperature=0), 'temperature is 0'), 'temperature nan':(from_('mask', temperature=math.nan), 'temperature is nan'), 'negative temperature':(from_('all three', temperature=-1.), 'temperature is -1'), 'top_p 0':(from_('uniform', top_p=0), 'top_p is 0'), 'top_p above 1':(from_('mask', top_p=1.1), 'top_p is 1.1'), 'top_p nan':(from_('mask, delete', top_p=math.nan), 'top_p is nan'),
       'temperature of scores':(from_('uniform, scores', temperature=.5), 'the scores of this model know neither'), 'settling without insertion':(from_('hybrid', length_steps=1), 'settle is 1'), 'schedule of another noise':(from_('hybrid', schedule=Cosine()), 'leave it out'), 'schedule though told the time':(from_('mask, told the time', schedule=Cosine()), 'leave it out'),
       'no gap head':(lambda: DenoiserConfig(5, noise=Corruption(5, 1, 0, 1).to_dict()), 'gap_head is False'), 'scores of a hybrid':(lambda: DenoiserConfig(5, noise=Corruption(5, 1, 1).to_dict(), score_head=True), 'score_head is True'),
       'wrong 0':(lambda: self_correct(real_network('hybrid'), torch.zeros(1, 12).long(), 0.), 'expected a number between 0 and 1'), 'wrong nan':(lambda: self_correct(real_network('hybrid'), torch.zeros(1, 12).long(), math.nan), 'expected a number between 0 and 1'), 'correcting texts that grow':(lambda: self_correct(real_network('all three'), torch.zeros(1, 12).long()), 'deletes'),
       'correcting a mask':(lambda: self_correct(real_network('hybrid'), torch.full((1, 12), 5)), 'ids from 5'), 'correcting what is no id':(lambda: self_correct(real_network('uniform'), torch.full((1, 12), -1)), 'ids from -1'), 'correcting a text too long':(lambda: self_correct(real_network('uniform'), torch.zeros(1, 13).long()), 'at most seq_len=12'),
       'asked at a time after 1':(lambda: real_network('hybrid')(torch.zeros(1, 2).long(), torch.tensor([1.5])), 't has values'), 'asked at a time before 0':(lambda: real_network('all three')(torch.zeros(1, 2).long(), torch.tensor([-.1])), 't has values'), 'asked about no id':(lambda: real_network('mask')(torch.tensor([[6]])), 'ids from 6')}
BAD |= {f'{how} for {name}':(from_(name, sampler=how), 'expected one of') for name,(noise,kw) in MODELS.items() for how in ('ancestral', 'tweedie', 'euler', 'confidence', 'entropy', 'first_hitting', 'insertion') if (name, how) not in EVERY}
@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_an_error(name):
    f,message = BAD[name]
    with pytest.raises(ValueError, match=message): f()

# Guests in other code: SEDD (Lou et al. 2024) with matrices of its graphs, and MDLM (Sahoo et al. 2024), as their papers have them; networks are called with the total noise
class Graph:
    "The rates of absorbing or uniform noise, row: from"
    def __init__(self, name):
        self.absorbs,n = name.startswith('mask'),V+name.startswith('mask')
        self.Q = torch.zeros(n, n, dtype=torch.float64)
        self.Q[:,V if self.absorbs else slice(None)] = 1 if self.absorbs else 1/V
        self.Q -= torch.diag(self.Q.sum(1))
    def after(self, sigma): return torch.matrix_exp(sigma*self.Q)

def sedd_loss(network, graph, x0, xt, sigma, dsigma):
    "Denoising score entropy, definition 3.4 with the rates of equation 5, and its constant, per text"
    log_s,out = network(xt, sigma),[]
    for b in range(len(x0)):
        P,total = graph.after(sigma[b]),0.
        for i in range(x0.shape[1]):
            x,z = x0[b,i],xt[b,i]
            for y in range(len(P)):
                if y==z or not graph.Q[y,z]: continue
                r = P[x,y]/P[x,z]
                total = total+graph.Q[y,z]*(log_s[b,i,y].exp()-r*log_s[b,i,y]+(r*(r.log()-1) if r>0 else 0))
        out.append(dsigma[b]*total)
    return torch.stack(out)

def sedd_sample(network, graph, sigma, steps, kind, n, g):
    "Euler steps, or the analytic ones of theorem 4.2, and the analytic one to the end"
    x = torch.full((n, L), V) if graph.absorbs else torch.randint(0, V, (n, L), generator=g)
    ts = [i/steps for i in range(steps, -1, -1)]
    for t,s in zip(ts, ts[1:]):
        score,a,b = network(x, torch.full((n, 1), sigma(t), dtype=torch.float64)).double().exp(),sigma(t),sigma(s)
        if kind=='tweedie' or s==0: p = (score@graph.after(b-a))*graph.after(a-b).T[x]
        else:
            p = (t-s)*slope(sigma, t)*graph.Q.T[x]*score
            p = p.scatter(-1, x[...,None], 0.)
            p = p.scatter(-1, x[...,None], 1-p.sum(-1, keepdim=True))
        if s==0 and graph.absorbs: p[...,V] = 0
        x = torch.multinomial(p.clamp(min=0).flatten(0, 1), 1, generator=g).view(n, L)
    return x

def subs(logits, x):
    "MDLM's processing: the mask is impossible, what is seen stays"
    o = logits.clone()
    o[...,V] -= math.inf
    o = o.log_softmax(-1)
    return torch.where((x==V)[...,None], o, torch.where(torch.arange(V+1)==x[...,None], 0., -math.inf))
def mdlm_loss(network, x0, xt, sigma, dsigma): return (dsigma/sigma.expm1()*-subs(network(xt, sigma), xt).gather(-1, x0[...,None])[...,0].T).sum(0)
def mdlm_sample(network, sigma, steps, n, g):
    x,hidden = torch.full((n, L), V),lambda t: 1-math.exp(-sigma(t))
    for i in range(steps, 0, -1):
        t,s = hidden(i/steps),hidden((i-1)/steps)
        p = subs(network(x, torch.full((n,), sigma(i/steps), dtype=torch.float64)), x).exp()*(t-s)
        p[...,V] = s
        new = torch.multinomial(p.flatten(0, 1), 1, generator=g).view(n, L)
        x = torch.where(x==V, new, x)
    return x

GUESTS = {k:NOISES[k] for k in ('mask', 'mask, told the time', 'mask, scores', 'uniform', 'uniform, scores')}
def total_noise(name): return lambda t: -math.log(max(GUESTS[name][1](t)[0], 1e-300))
def noisy_texts(name, B=40):
    "Texts, times and noisy texts"
    g = torch.Generator().manual_seed(1)
    x0,t = torch.randint(0, V, (B, L), generator=g),torch.rand(B, generator=g, dtype=torch.float64)*.98+.01
    return x0, t, GUESTS[name][0].sample(x0, t, g)
def judge_guest_losses(name):
    noise,_,kw = GUESTS[name]
    m = tiny(V, L, noise, **kw)
    x0,t,noisy = noisy_texts(name)
    sigma,dsigma = (torch.tensor([f(o) for o in t.tolist()], dtype=torch.float64) for f in (total_noise(name), lambda o: slope(total_noise(name), o)))
    want = output_integrand(m, m(noisy.xt, t), noisy, t, noise)
    losses = [sedd_loss(m.as_sedd(), Graph(name), x0, noisy.xt, sigma, dsigma)]
    if name in ('mask', 'mask, told the time'): losses.append(mdlm_loss(m.as_mdlm(), x0, noisy.xt, sigma, dsigma))
    for loss in losses:
        assert (loss-want).abs().max()<1e-4*want.abs().max() and loss.std()>.1
        a,b = (torch.autograd.grad(o.sum(), m.output_head.weight, retain_graph=True)[0] for o in (loss, want))
        assert (a-b).abs().max()<1e-4*b.abs().max()
@pytest.mark.parametrize('name', GUESTS)
def test_losses_of_other_code(name): judge_guest_losses(name)

def guest_counts(name, how):
    model,g = toy(name),torch.Generator().manual_seed(5)
    with torch.no_grad(): x = mdlm_sample(model.as_mdlm(), total_noise(name), STEPS, N, g) if how=='mdlm' else sedd_sample(model.as_sedd(), Graph(name), total_noise(name), STEPS, how, N, g)
    return np.bincount((x@(V+1)**torch.arange(L).flip(0)).numpy(), minlength=len(Z))
@pytest.mark.parametrize('name, how', [(k, how) for k in GUESTS if k!='mask, told the time' for how in ('tweedie', 'euler', *['mdlm']*(k=='mask'))])
def test_samplers_of_other_code(name, how): judge(guest_counts(name, how), exact(name, 'tweedie' if how=='mdlm' else how))

def test_a_guest_who_misreads_is_noticed(monkeypatch):
    "Scores relative to another time, clean tokens relative to others"
    from bijdiff.model.adapters import MDLMAdapter, SEDDAdapter
    monkeypatch.setattr(SEDDAdapter, 'outputs', lambda self, x, sigma, f=SEDDAdapter.outputs: f(self, x, sigma*1.03))
    for name in GUESTS:
        with pytest.raises(AssertionError): judge_guest_losses(name)
    monkeypatch.setattr(SEDDAdapter, 'forward', lambda self, x, sigma, f=SEDDAdapter.forward: 1.1*f(self, x, sigma))
    for name in ('mask', 'uniform'):
        with pytest.raises(AssertionError, match='p-value'): judge(guest_counts(name, 'euler'), exact(name, 'euler'))
    monkeypatch.undo()
    monkeypatch.setattr(MDLMAdapter, 'forward', lambda self, x, sigma, f=MDLMAdapter.forward: 1.1*f(self, x, sigma))
    with pytest.raises(AssertionError): judge_guest_losses('mask')
    with pytest.raises(AssertionError, match='p-value'): judge(guest_counts('mask', 'mdlm'), exact('mask', 'tweedie'))
