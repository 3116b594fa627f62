"""Samplers against the distributions they should have, and against the samplers of other papers.

Distributions are chains over all sequences of few tokens, written out from the papers in numpy, and are
compared with 200,000 samples of each sampler.
"""
import math
from functools import lru_cache, partial
from itertools import combinations, product
from typing import NamedTuple
import numpy as np, pytest, torch
from scipy.stats import binom
from helpers import assert_drawn_from, assert_given_kept, count_sequences, derivative, fixed_weights
from helpers import gidd_weights, HandmadeDenoiser, Noise, of_sampled_tokens, plant_fault, record_calls
from helpers import TableDenoiser, tempered_probs, warmer
from bijdiff.diffusion.corruption import Corruption, GIDDCorruption
from bijdiff.diffusion.draws import sample_categorical
from bijdiff.diffusion.schedules import Cosine, Geometric, HalfCosine, LogLinear
from bijdiff.model.adapters import MDLMAdapter, SEDDAdapter
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.predictions import LogitOutputs, output_kind, ScoreOutputs
from bijdiff.model.scoring import output_integrand
from bijdiff.pictures import film_strip
from bijdiff.sampling import conditionals, generate, repair, samplers, state
from bijdiff.sampling.generate import sample, samplers_for
from bijdiff.sampling.repair import self_correct
from bijdiff.sampling.rules import UnmaskingRule
from bijdiff.sampling.samplers import reveal_probs
from bijdiff.sampling.state import planned_step, SamplerState
from bijdiff.testing import tiny_denoiser

# Functions of the package that planted faults replace, where they are looked up
TOKEN_PROBS,REVEAL_PROBS = (state, 'token_probs'),(samplers, 'reveal_probs')
CLEAN_LOGITS,SCORES = (LogitOutputs, 'clean_logits'),(ScoreOutputs, 'scores')
ON_OBSERVED,TWEEDIE = (samplers, 'observed_probs'),(samplers, '_tweedie')
DRAW_CATEGORICAL,PREDICT = (state, 'draw_categorical'),(SamplerState, 'predict')
CONFIDENCE,FIRST_HITTING = (conditionals, 'confidence'),(generate, 'first_hitting')
EVENT_RATES = Corruption, 'event_rates'
REMASK_PROBS,NOISIER = (repair, 'remask_probs'),(repair, '_noisier')
DRAW_EARLIER = samplers, 'draw_earlier'
SEDD_OUTPUTS,SEDD_FORWARD = (SEDDAdapter, 'outputs'),(SEDDAdapter, 'forward')
MDLM_FORWARD = MDLMAdapter, 'forward'

V,L = 3,3 # tokens are 0, 1, 2, and the mask is 3
N,STEPS = 200_000,4
STRENGTH = .4 # of samplers that take tokens back
N_TESTS = 200 # chi-square tests in this file, at most
ALL_MASKS = (V,)*L
assert_fits = partial(assert_drawn_from, n_tests=N_TESTS)

# Noises, and the probabilities of their states by hand

def cosine(t): return 1-.99*math.cos(math.pi/2*(1-t))
def half_cosine(t): return .01+.99*math.cos(math.pi/2*t)
def geometric(t): return math.exp(-.05*100**t)
def log_linear(t): return 1-t

COSINE,HALF,GEOMETRIC,LINEAR = Cosine(.01),HalfCosine(.01),Geometric(.05, 5.),LogLinear(0.)
ALPHA = {COSINE: cosine, HALF: half_cosine, GEOMETRIC: geometric, LINEAR: log_linear}

def constant(schedule, mask, substitute, **config_kwargs):
    corruption = Corruption(V, mask, substitute, schedule=schedule)
    return Noise(corruption, fixed_weights(ALPHA[schedule], mask, substitute), config_kwargs)

NOISES = {
    'mask': constant(COSINE, 1, 0),
    'mask, time-conditioned': constant(LINEAR, 1, 0, time_conditioning=True),
    'mask, scores': constant(COSINE, 1, 0, score_head=True),
    'uniform': constant(HALF, 0, 1),
    'uniform, scores': constant(GEOMETRIC, 0, 1, score_head=True),
    'hybrid': constant(GEOMETRIC, .6, .4),
    'gidd': Noise(GIDDCorruption(V, .3), gidd_weights(.3, 1.), {}),
}

@lru_cache(None)
def denoiser(name):
    noise,_,config_kwargs = NOISES[name]
    return TableDenoiser(V, L, noise, 34, **config_kwargs)

TESTED_WITH_LIKELIHOODS = 'left_to_right','random','spread','block'
ONLY = {
    'mask, scores': ('tweedie', 'euler'),
    'mask, time-conditioned': ('ancestral', 'confidence', 'first_hitting', 'remask_rescale'),
}

def samplers_here(name):
    own = [o for o in samplers_for(denoiser(name)) if o not in TESTED_WITH_LIKELIHOODS]
    return [o for o in own if o in ONLY.get(name, own)]

CASES = [(name, sampler) for name in NOISES for sampler in samplers_here(name)]
every_case = pytest.mark.parametrize('name, sampler', CASES)

# Exact distributions. Arrays (texts, L, V+1) hold, for each text and position, a probability of every symbol

Z = np.array(list(product(range(V+1), repeat=L))) # all sequences of tokens and masks
IS_OWN = Z[...,None]==np.arange(V+1) # where a symbol is the one at its position, (texts, L, V+1)
IS_MASKED = (Z==V)[...,None]
UNCHANGED = IS_OWN.astype(float) # probabilities of staying as it is

def at_own(o):
    "Entries of (texts, L, V+1) at the symbols themselves, (texts, L, 1)"
    return np.take_along_axis(o, Z[...,None], -1)

def with_mask(o):
    "Put a column of zeros for the mask after those of the tokens"
    return np.pad(o, [(0, 0)]*(o.ndim-1)+[(0, 1)])

def resampled_probs(m):
    "Probabilities of tokens and mask that do not depend on the clean token, (V+1,)"
    return np.array([m[2]/V]*V+[m[1]])

def marginal(x, m):
    "Probabilities of the symbols, m_kept x + m_sub/V and m_mask, from those of the clean tokens, (..., V)"
    return m[0]*with_mask(x)+resampled_probs(m)

def transition(a, b):
    "Probabilities of what a symbol becomes between times with state probabilities a and b; row: from"
    kept = b[0]/a[0]
    return kept*np.eye(V+1)+resampled_probs(b)-kept*resampled_probs(a)

def resampling_rates(state_probs, t):
    "Rate at which any symbol is resampled as each one, (V+1,)"
    (kept,_,sub,_),(d_kept,_,d_sub,_) = state_probs(t),derivative(state_probs, t, 1e-5)
    to_token = d_sub-d_kept/kept*sub
    to_mask = -d_kept/kept*(1-sub)-d_sub
    return np.array([to_token/V]*V+[to_mask])

def posterior_step(x, state_probs, s, t, is_last, is_first):
    """The ancestral sampler, by Bayes' rule: p(z_s) is proportional to sum_x p(z_t|z_s) p(z_s|x) p(x)

    The first symbols are pure noise, on which nothing is conditioned; the last ones are clean tokens.
    """
    if is_first and is_last: return with_mask(x)
    if is_first: return marginal(x, state_probs(s))
    if is_last: return with_mask(x*marginal(np.eye(V), state_probs(t)).T[Z])
    return marginal(x, state_probs(s))*transition(state_probs(s), state_probs(t)).T[Z]

def masked_step(x, state_probs, s, t, is_last, is_first):
    "The ancestral sampler for masks: one is revealed with probability (alpha(s)-alpha(t))/(1-alpha(t))"
    a = 0. if is_first else state_probs(t)[0]
    b = 1. if is_last else state_probs(s)[0]
    p = (b-a)/(1-a)
    return np.where(IS_MASKED, marginal(p*x, [1, 1-p, 0]), UNCHANGED)

def scores(model, out, x, m):
    """Ratios of the probability of every symbol to that at its position

    They follow from the network's clean tokens; scores are factors on the ratios of uniform clean tokens.
    """
    from_scores = model.config.score_head
    q = marginal(np.full_like(x, 1/V) if from_scores else x, m)
    s = q/np.where(at_own(q)>0, at_own(q), 1) # texts that cannot be
    return np.where(IS_OWN, s, s*np.exp(with_mask(out))) if from_scores else s

def tweedie_step(score, state_probs, s, t, is_last):
    "SEDD's analytic sampler, theorem 4.2, with matrices: one step of the noise is inverted"
    P = transition(state_probs(s), state_probs(t))
    p = (score@np.linalg.inv(P)).clip(0)*P.T[Z]
    if is_last: p[...,V] = 0
    return p

def euler_step(score, state_probs, s, t):
    "SEDD's Euler sampler: reverse rates times the step"
    p = np.where(IS_OWN, 0., (t-s)*resampling_rates(state_probs, t)[Z][...,None]*score)
    return np.where(IS_OWN, (1-p.sum(-1, keepdims=True)).clip(0), p)

def is_remasking(sampler): return sampler.startswith('remask')

def inverse(f, value):
    "The time at which a falling function has a value, by bisection"
    low,high = 0.,1.
    for _ in range(60):
        middle = (low+high)/2
        low,high = (middle, high) if f(middle)>value else (low, middle)
    return low

def remask_times(state_probs, sampler, steps):
    "Times of a sampler that masks tokens again: 45% of a loop until alpha is 0.9, half of it there"
    if sampler!='remask_loop': return np.linspace(1, 0, steps+1)
    on,first,last = inverse(lambda t: state_probs(t)[0], .9),round(.45*steps),max(1, round(.05*steps))
    return [*np.linspace(1, on, first+1), *[on]*(steps-first-last), *np.linspace(on, 0, last+1)[1:]]

def remask_step(x, state_probs, s, t, is_last, is_first, kind):
    "ReMDM, section 3: a token is masked with probability sigma, and masks are revealed as often as it takes"
    a = 0. if is_first else state_probs(t)[0]
    b = 1. if is_last else state_probs(s)[0]
    most = min(1., (1-b)/a) if a else 0.
    sigma = STRENGTH*most if kind=='rescale' else min(STRENGTH, most)
    if kind=='loop' and s!=t: sigma = 0.
    p = (b-(1-sigma)*a)/(1-a)
    of_token = (1-sigma)*UNCHANGED + sigma*(np.arange(V+1)==V)
    return np.where(IS_MASKED, marginal(p*x, [1, 1-p, 0]), of_token)

def by_remasking(name, sampler, template, steps, **kw):
    "Distribution over all texts of a sampler that masks tokens again"
    (_,state_probs,_),free = NOISES[name],np.array(template)==V
    dist,ts = start_from_noise(state_probs, template),remask_times(state_probs, sampler, steps)
    for i,(t,s) in enumerate(zip(ts, ts[1:])):
        _,x = predict(name, t, **kw)
        kind = sampler.removeprefix('remask_')
        dist = advance(dist, remask_step(x, state_probs, s, t, i==steps-1, i==0, kind), free)
    return dist

def by_correcting(name, template, steps, **kw):
    "Distribution over all texts of ancestral steps, after each of which a part of the noise comes and goes"
    (_,state_probs,_),free = NOISES[name],np.array(template)==V
    dist,ts = start_from_noise(state_probs, template),np.linspace(1, 0, (steps+1)//2+1)
    for i,(t,s) in enumerate(zip(ts, ts[1:])):
        x = predict(name, t, **kw)[1]
        dist = advance(dist, posterior_step(x, state_probs, s, t, s==0, i==0), free)
        if s==0: return dist
        back = s+STRENGTH*(t-s)
        dist = advance(dist, transition(state_probs(s), state_probs(back))[Z], free)
        x = predict(name, back, **kw)[1]
        dist = advance(dist, posterior_step(x, state_probs, s, back, False, False), free)

def advance(dist, K, free):
    "Distribution over all texts after a step in which each free symbol changes by its row of K"
    with np.errstate(invalid='ignore'): K = np.nan_to_num(K/K.sum(-1, keepdims=True)) # texts that cannot be
    K = np.where(free[:,None], K, UNCHANGED)
    together = K[:,0,:,None,None]*K[:,1,None,:,None]*K[:,2,None,None,:]
    return dist@together.reshape(len(Z), len(Z))

def predict(name, t, **kw):
    "Outputs for all texts, (texts, L, V), and the probabilities they mean at a temperature and top_p"
    times = torch.full((len(Z),), t, dtype=torch.float64)
    out = denoiser(name)(torch.tensor(Z), times).numpy()
    return out, tempered_probs(out, **kw)

def start_from_noise(state_probs, template):
    "Distribution over all texts where free symbols are pure noise, (texts,)"
    noise = resampled_probs(state_probs(1.))
    noise /= noise.sum()
    def p(a, given): return noise[a] if given==V else a==given
    return np.array([math.prod(p(a, given) for a,given in zip(z, template)) for z in Z])

@lru_cache(None)
def last_time_of_scores(name):
    "The last time at which a ten-thousandth of the tokens is kept; later there are no scores to speak of"
    return max(i for i in range(100_001) if NOISES[name].state_probs(i*1e-5)[0]>=1e-4)*1e-5

def by_steps(name, sampler, template, steps, **kw):
    "Distribution over all texts of the ancestral, tweedie and euler samplers"
    (noise,state_probs,_),free = NOISES[name],np.array(template)==V
    dist,ts = start_from_noise(state_probs, template),np.linspace(1, 0, steps+1)
    if sampler!='ancestral': ts[0] = last_time_of_scores(name)
    for i,(t,s) in enumerate(zip(ts, ts[1:])):
        (out,x),is_last = predict(name, t, **kw),i==steps-1
        score = scores(denoiser(name), out, x, state_probs(t))
        if sampler=='ancestral' and noise.masks_only: K = masked_step(x, state_probs, s, t, is_last, i==0)
        elif sampler=='ancestral': K = posterior_step(x, state_probs, s, t, is_last, i==0)
        elif sampler=='tweedie' or is_last: K = tweedie_step(score, state_probs, s, t, is_last)
        else: K = euler_step(score, state_probs, s, t)
        if noise.masks_only: K = np.where(IS_MASKED, K, UNCHANGED)
        dist = advance(dist, K, free)
    return dist

def entropy(p): return -sum(a*math.log(a) for a in p if a>0)

def reveal_surest(x, rule):
    "Each text reveals the mask of the highest probability, or lowest entropy, the leftmost of equals"
    K = UNCHANGED.copy()
    for k,(z,p) in enumerate(zip(Z, x)):
        masks = [i for i in range(L) if z[i]==V]
        keys = dict(confidence=lambda i: -max(p[i]), entropy=lambda i: entropy(p[i]),
                    margin=lambda i: np.diff(np.sort(p[i])[-2:]).item()*-1)
        masks.sort(key=keys[rule])
        for i in masks[:1]: K[k,i] = [*p[i], 0.]
    return K

def by_rule(name, rule, template, **kw):
    "Distribution over all texts of a rule that reveals one mask a step; the time is the masked fraction"
    dist,free = (Z==np.array(template)).all(1)*1.,np.array(template)==V
    for masks in range(free.sum(), 0, -1):
        _,x = predict(name, masks/L, **kw)
        dist = advance(dist, reveal_surest(x, rule), free)
    return dist

def index(z):
    "Number of a text in Z"
    return int(np.dot(z, (V+1)**np.arange(L)[::-1]))

def by_first_hitting(name, template, n=8, **kw):
    """Distribution over all texts of the first-hitting sampler

    Each of k masks is revealed next with probability 1/k. A time-conditioned network is called at times that
    fall by a factor u^(1/k) each, as here 1-alpha(t) = t: their density is k t^(k-1)/(time before)^k. The
    quadrature over them has n nodes; with top-p, which jumps between times, it needs many.
    """
    timed = denoiser(name).config.time_conditioning
    nodes = list(zip(*np.polynomial.legendre.leggauss(n))) if timed else [(1., 2.)]
    @lru_cache(None)
    def probs(t): return predict(name, t, **kw)[1]
    def finish(z, before):
        masks = [i for i in range(L) if z[i]==V]
        if not masks: return np.eye(len(Z))[index(z)]
        dist = 0.
        for u,w in nodes:
            fraction = (u+1)/2
            t,p = before*fraction,probs(before*fraction)[index(z)]
            weight = w/2*(fraction**(len(masks)-1) if timed else 1/len(masks))
            for i,token in product(masks, range(V)):
                dist = dist+weight*p[i,token]*finish((*z[:i], token, *z[i+1:]), t)
        return dist
    return finish(tuple(template), 1.)

def exact_distribution(name, sampler, template=ALL_MASKS, steps=STEPS, **kw):
    "Probability of each text in Z"
    if sampler in UnmaskingRule.names: return by_rule(name, sampler, template, **kw)
    if is_remasking(sampler): return by_remasking(name, sampler, template, steps, **kw)
    if sampler=='forward_backward': return by_correcting(name, template, steps, **kw)
    if sampler=='first_hitting': return by_first_hitting(name, template, 64 if 'top_p' in kw else 8, **kw)
    return by_steps(name, sampler, template, steps, **kw)

def sample_counts(name, sampler, template=ALL_MASKS, n=N, seed=0, **kw):
    "How often each text in Z is sampled"
    model,noise = denoiser(name),NOISES[name].corruption
    if noise.masks_only and not model.config.time_conditioning: kw['schedule'] = noise.schedule
    if is_remasking(sampler) or sampler=='forward_backward': kw['revise'] = STRENGTH
    x = sample(model, n, STEPS, template=torch.tensor(template), sampler=sampler, seed=seed, **kw)
    assert x.shape==(n, L)
    assert_given_kept(x, template, V)
    return count_sequences(x, V+1)

@every_case
def test_samplers_sample_the_model(name, sampler):
    assert_fits(sample_counts(name, sampler), exact_distribution(name, sampler))

@every_case
def test_around_a_prompt(name, sampler):
    "The conditional distribution, with a temperature and top-p where the sampler knows them"
    kw,template = {} if 'scores' in name else dict(temperature=.7, top_p=.9),(V, 1, V)
    counts = sample_counts(name, sampler, template, 50_000, 1, **kw)
    assert_fits(counts, exact_distribution(name, sampler, template, **kw))

# One step, with points that are evenly spread in place of random numbers

def step_frequencies(name, z, step, n=2**16):
    "How often a step makes each symbol of a sequence, (L, V+1), by a Sobol sequence in several dimensions"
    run = SamplerState(denoiser(name), torch.tensor(z).expand(n, -1), NOISES[name].corruption)
    columns = iter(torch.quasirandom.SobolEngine(4, scramble=True, seed=1).draw(n, dtype=torch.float64).T)
    run.uniform = lambda index: next(columns)[index//L].clamp(max=1-2**-53)
    with torch.no_grad(): ids = step(run, torch.arange(n*L)).view(n, L)
    return torch.nn.functional.one_hot(ids, V+1).double().mean(0).numpy()

def one_step(name, sampler, t, s):
    "The function that makes a step, and its probabilities for all texts, by hand"
    state_probs,(out,x) = NOISES[name].state_probs,predict(name, t)
    if sampler=='ancestral':
        K = posterior_step(x, state_probs, s, t, s==0, False)
        return lambda run, index: samplers.earlier_symbols(run, index, t, s, first=False), K
    score = scores(denoiser(name), out, x, state_probs(t))
    if sampler=='euler' and s: K = euler_step(score, state_probs, s, t)
    else: K = tweedie_step(score, state_probs, s, t, s==0)
    outputs = output_kind(denoiser(name))
    return lambda run, index: outputs.draw_by_scores(run, t, s, index, sampler), K

ONE_STEP = [(name, sampler) for name,sampler in CASES
            if sampler in ('ancestral', 'tweedie', 'euler') and not NOISES[name].corruption.masks_only]

@pytest.mark.parametrize('t, s', [(.7, .45), (.3, 0.)])
@pytest.mark.parametrize('name, sampler', ONE_STEP)
def test_one_step_has_the_probabilities_of_its_formula(name, sampler, t, s):
    step,K = one_step(name, sampler, t, s)
    has_masks = NOISES[name].state_probs(t)[1]>0
    for z in ([0, 1, 2], [1, 1, 0], *([[V, 2, V]] if has_masks else [])):
        want = K[index(z)]/K[index(z)].sum(-1, keepdims=True)
        assert np.abs(step_frequencies(name, z, step)-want).max()<2e-4

# What follows from the definitions without a chain

def total_variation(p, q): return .5*np.abs(p-q).sum()

@pytest.mark.parametrize('sampler', samplers_here('mask'))
def test_one_mask_has_the_conditional_distribution_of_the_network(sampler):
    want = tempered_probs(denoiser('mask')(torch.tensor([[2, V, 1]])).numpy())[0,1]
    p = exact_distribution('mask', sampler, (2, V, 1)).reshape([V+1]*L)[2,:V,1]
    assert np.abs(p-want).max()<1e-12

@pytest.mark.parametrize('sampler', ['ancestral', 'tweedie', 'euler'])
def test_very_many_steps_are_the_mean_over_orders(sampler):
    limit = exact_distribution('mask', 'first_hitting')
    assert total_variation(exact_distribution('mask', sampler, steps=400), limit)<2e-3
    assert total_variation(exact_distribution('mask', sampler), limit)>2e-3

def test_each_rule_has_its_own_distribution():
    dists = [exact_distribution('mask', o) for o in ('confidence', 'entropy', 'first_hitting')]
    for p,q in combinations(dists, 2): assert total_variation(p, q)>.02

# Faults: each takes the right function and returns a wrong one

def of_another_schedule(reveal_probs): return lambda steps, schedule: reveal_probs(steps, HalfCosine())
def not_conditioned(observed_probs): return lambda own, z, state_probs, V: 0*own
def too_large(output_scores): return lambda *args: 1.05*output_scores(*args)
def at_another_time(predict): return lambda self, t, index=None: predict(self, .8*t, index)
def without_entropy(confidence): return lambda probs, rule: probs.max(-1).values

def of_the_posterior(clean_logits):
    "Clean tokens conditioned on their own symbols, in place of the leave-one-out distribution"
    def wrong(self, out, xt, m, noise):
        kept,sub = (o[:,None,None] for o in (m.kept, m.substitute))
        likelihood = torch.where(xt[...,None]==V, 1., kept*(xt[...,None]==torch.arange(V))+sub/V)
        return clean_logits(self, out, xt, m, noise)+likelihood.clamp(min=1e-9).log()
    return wrong

def score_not_taken_back(tweedie):
    def wrong(score, z, step, V):
        return tweedie(score, z, step._replace(token_to_token=.9*step.token_to_token), V)
    return wrong

def faster(event_rates):
    "All rates a fifth too high"
    def wrong(self, t):
        rates = event_rates(self, t)
        return type(rates)(*(1.2*o for o in rates))
    return wrong

def left_to_right(first_hitting):
    def wrong(run, steps):
        order = run.free.cumsum(1)-1
        run.follow([planned_step(.5, run.free & (order==k)) for k in range(L)])
    return wrong

def in_pairs(draw_categorical):
    "Two samples of each draw: they are not independent"
    return lambda weights, u: draw_categorical(weights, u)[torch.arange(len(weights))//2*2]

def never_back(remask_probs):
    "Tokens are never masked again, but masks are revealed as if they were"
    def wrong(*args):
        t,p,again = remask_probs(*args)
        return t, p, 0*again
    return wrong

def not_made_up_for(remask_probs):
    "Tokens are masked again, and no more masks are revealed for that"
    def wrong(steps, schedule, kind, strength):
        t,_,again = remask_probs(steps, schedule, kind, strength)
        return t, reveal_probs(steps, schedule), again
    return wrong

def no_noise(noisier): return lambda run, index, s, t: run.x.flatten()[index]

def masks_alone(draw_earlier):
    "An earlier symbol is never another token than the clean one"
    def wrong(noise, x0, z, s, t, u): return draw_earlier(noise, x0, z, s, t, u).where(u[0]<.9, x0)
    return wrong

class Fault(NamedTuple):
    "A noise and a sampler, a function of the package, and a wrong version of it"
    name:str
    sampler:str
    target:tuple
    fault:object

FAULTS = {
    'too warm: mask, ancestral': Fault('mask', 'ancestral', TOKEN_PROBS, warmer),
    'too warm: mask, tweedie': Fault('mask', 'tweedie', TOKEN_PROBS, warmer),
    'too warm: mask, first_hitting': Fault('mask', 'first_hitting', TOKEN_PROBS, warmer),
    'too warm: uniform, tweedie': Fault('uniform', 'tweedie', TOKEN_PROBS, warmer),
    'too warm: hybrid, ancestral': Fault('hybrid', 'ancestral', TOKEN_PROBS, warmer),
    'too warm: gidd, euler': Fault('gidd', 'euler', TOKEN_PROBS, warmer),
    'revealed by another schedule': Fault('mask', 'ancestral', REVEAL_PROBS, of_another_schedule),
    'not conditioned in the end': Fault('uniform', 'ancestral', ON_OBSERVED, not_conditioned),
    'posterior, not leave-one-out: uniform': Fault('uniform', 'ancestral', CLEAN_LOGITS, of_the_posterior),
    'posterior, not leave-one-out: hybrid': Fault('hybrid', 'tweedie', CLEAN_LOGITS, of_the_posterior),
    'score not taken back': Fault('uniform, scores', 'tweedie', TWEEDIE, score_not_taken_back),
    'scores too large': Fault('uniform, scores', 'tweedie', SCORES, too_large),
    'rates too high': Fault('hybrid', 'euler', EVENT_RATES, faster),
    'rates of masks too high': Fault('mask', 'euler', EVENT_RATES, faster),
    'confidence of the sampled token': Fault('mask', 'confidence', CONFIDENCE, of_sampled_tokens),
    'rules swapped': Fault('mask', 'entropy', CONFIDENCE, without_entropy),
    'from left to right': Fault('mask', 'first_hitting', FIRST_HITTING, left_to_right),
    'called at another time': Fault('gidd', 'ancestral', PREDICT, at_another_time),
    'never masked again': Fault('mask', 'remask_cap', REMASK_PROBS, never_back),
    'masked again for nothing': Fault('mask', 'remask_rescale', REMASK_PROBS, not_made_up_for),
    'no noise in the corrector': Fault('hybrid', 'forward_backward', NOISIER, no_noise),
    'wrong earlier symbols': Fault('gidd', 'ancestral', DRAW_EARLIER, masks_alone),
    'samples not independent': Fault('mask', 'ancestral', DRAW_CATEGORICAL, in_pairs),
}

@pytest.mark.parametrize('case', FAULTS)
def test_the_chi_square_notices(case, monkeypatch):
    name,sampler,target,fault = FAULTS[case]
    p = exact_distribution(name, sampler)
    plant_fault(monkeypatch, target, fault)
    counts = sample_counts(name, sampler, n=N//2)
    with pytest.raises(AssertionError, match='p-value|impossible'): assert_fits(counts, p)

# What every sampler does, with networks of random weights; the mask is 5

def of_five(mask, substitute, delete=0., schedule=None):
    return Corruption(5, mask, substitute, delete, schedule=schedule or Cosine())

MODELS = {
    'mask': (of_five(1, 0), {}),
    'mask, time-conditioned': (of_five(1, 0), dict(time_conditioning=True)),
    'mask, scores': (of_five(1, 0), dict(score_head=True)),
    'uniform': (of_five(0, 1), {}),
    'uniform, scores': (of_five(0, 1), dict(score_head=True)),
    'hybrid': (of_five(.6, .4), {}),
    'mask, delete': (of_five(1, 0, 1), {}),
    'all three': (of_five(.4, .3, .3), {}),
    'gidd': (GIDDCorruption(5, .3), {}),
    'schedule per kind': (of_five(1, 1, 0, dict(mask=Cosine(), substitute=HalfCosine())), {}),
    'mask in a dictionary': (of_five(1, 0, 0, dict(mask=LogLinear())), dict(time_conditioning=True)),
}

@lru_cache(None)
def network(name):
    noise,config_kwargs = MODELS[name]
    return tiny_denoiser(5, 12, noise=noise, **config_kwargs)

EVERY = [(name, sampler) for name in MODELS for sampler in samplers_for(network(name))]
every_sampler = pytest.mark.parametrize('name, sampler', EVERY)
NO_TEMPLATE = (5,)*12

def samples(*args, **kwargs): return [o.tolist() for o in sample(*args, **kwargs)]

@every_sampler
def test_seeds_fix_everything(name, sampler):
    m = network(name).train()
    a = samples(m, 4, 6, sampler=sampler, seed=3)
    torch.rand(1) # the global generator has no influence
    assert a==samples(m, 4, 6, sampler=sampler, seed=3)
    assert a!=samples(m, 4, 6, sampler=sampler, seed=4)
    assert m.training

@every_sampler
def test_samples_are_tokens_and_as_many_as_asked_for(name, sampler):
    m = network(name)
    x = samples(m, 4, 6, sampler=sampler, seed=3)
    assert all(len(o)<=12 and set(o)<=set(range(5)) for o in x)
    if sampler=='insertion': return
    assert {len(o) for o in x}=={12}
    assert {len(o) for o in samples(m, 2, 3, length=7, sampler=sampler)}=={7}
    assert len(samples(m, 1, 1, length=1, sampler=sampler)[0])==1

def contains_in_order(ids, *parts):
    "Return True if the parts occur in a sequence, each unbroken, one after the other"
    for part in parts:
        starts = [i for i in range(len(ids)) if ids[i:i+len(part)]==part]
        if not starts: return False
        ids = ids[starts[0]+len(part):]
    return True

# A beginning, an end and a token between blanks; blanks around two parts; nothing to write
TEMPLATE = [[1, 2, 5, 5, 3, 5, 5, 4, 0], [5, 5, 1, 4, 5, 0, 0, 5, 5], [0, 1, 2, 3, 4, 3, 2, 1, 0]]

def assert_template_kept(x, sampler):
    assert x[2]==TEMPLATE[2]
    if sampler!='insertion':
        for row,template in zip(x, TEMPLATE): assert all(a==b or b==5 for a,b in zip(row, template))
        return
    assert x[0][:2]==[1, 2]
    assert x[0][-2:]==[4, 0]
    assert 3 in x[0][2:-2]
    assert contains_in_order(x[1], [1, 4], [0, 0])

def knows_temperature(name, sampler): return 'scores' not in name or sampler not in ('tweedie', 'euler')

@every_sampler
@pytest.mark.parametrize('steps', [1, 7])
def test_given_tokens_are_never_changed(name, sampler, steps):
    m = network(name)
    assert_template_kept(samples(m, 3, steps, template=TEMPLATE, sampler=sampler), sampler)
    if knows_temperature(name, sampler):
        x = samples(m, 3, steps, template=TEMPLATE, sampler=sampler, top_p=.5, temperature=.3)
        assert_template_kept(x, sampler)
    assert samples(m, 1, 5, template=[0, 3, 1], sampler=sampler)==[[0, 3, 1]]

def ids_and_times(xt, t): return xt.tolist(), None if t is None else t.tolist()

@lru_cache(None)
def traced_sample(name, sampler, **kw):
    "Samples, ids and times of all calls of the network, and frames"
    frames = []
    with pytest.MonkeyPatch.context() as patches:
        calls = record_calls(patches, network(name), ids_and_times)
        x = samples(network(name), sampler=sampler, frames=frames, **kw)
    return x, calls, frames

# Number of texts, steps, template
RUNS = [(1, 40, None), (1, 3, None), (3, 9, (5, 1, 5, 5, 5, 2))]
every_run = pytest.mark.parametrize('n, steps, template', RUNS)

@every_sampler
@every_run
def test_function_evaluations(name, sampler, n, steps, template):
    """At most one a step, and one more for insertion; for first hitting as many as masks

    The network is never called twice with the same ids and times. Where times have no influence, one sequence
    takes at most as many calls as it has masks.
    """
    m,masks = network(name),(template or NO_TEMPLATE).count(5)
    _,calls,_ = traced_sample(name, sampler, n=n, steps=steps, template=template)
    if sampler=='insertion':
        assert 0<len(calls)<=steps+1
        return
    if sampler=='first_hitting': assert len(calls)==masks
    else: assert 0<len(calls)<=steps
    assert len({str(o) for o in calls})==len(calls)
    once = m.noise.masks_only and not m.config.time_conditioning and not is_remasking(sampler)
    if n==1 and once: assert len(calls)<=masks

@pytest.mark.parametrize('name', ['mask, delete', 'all three'])
def test_function_evaluations_that_find_lengths(name, monkeypatch):
    calls = record_calls(monkeypatch, network(name))
    sample(network(name), 2, 5, length_steps=4)
    assert len(calls)<=4+5+1

class Numbers:
    "In the place of a tokenizer: ids as numbers"
    def decode(self, ids): return ' '.join(map(str, ids))

@every_sampler
@every_run
def test_frames_lead_from_the_template_to_the_samples(name, sampler, n, steps, template):
    x,_,frames = traced_sample(name, sampler, n=n, steps=steps, template=template)
    assert frames[0].tolist()==[list(template or NO_TEMPLATE)]*n
    assert [o.tolist() for o in frames[-1]]==x
    assert len(film_strip(frames, Numbers()).split('\n'))==min(6, len(frames))
    if sampler=='insertion': return
    assert all((a!=b).any() for a,b in zip(frames[1:], frames[2:])), 'a frame shows no change'

class ConstantDenoiser(HandmadeDenoiser):
    "A time-conditioned denoiser whose logits are always the same; all gap logits are 0"
    def __init__(self, logits, seq_len, noise):
        super().__init__(noise.vocab_size, seq_len, noise, time_conditioning=True)
        self.logits = logits
    def outputs(self, xt, t, mask):
        logits = self.logits.expand(*xt.shape, self.config.vocab_size)
        return logits, torch.zeros(len(xt), xt.shape[1]+1) if self.config.gap_head else None

P = np.array([.05, .3, .1, .4, .15])

def constant_counts(name, sampler, **kw):
    "How often each token is sampled from a denoiser whose probabilities are always P"
    m = ConstantDenoiser(torch.tensor(P).float().log(), 12, MODELS[name][0])
    x = sample(m, 2000, 8, sampler=sampler, length=8, **kw)
    return np.bincount(torch.cat(list(x)).numpy(), minlength=5)

@pytest.mark.parametrize('name, sampler', [(name, sampler) for name,sampler in EVERY if 'scores' not in name])
def test_temperature_and_top_p(name, sampler):
    "Tokens of a constant network have its distribution, but for the Euler sampler, whose steps are too large"
    plain = constant_counts(name, sampler)
    cold = constant_counts(name, sampler, temperature=.5)
    top = constant_counts(name, sampler, top_p=.6)
    assert not top[[0, 2, 4]].any()
    assert top[[1, 3]].all()
    if sampler=='euler': return
    assert_fits(plain, P)
    assert_fits(cold, P**2/(P**2).sum())
    assert_fits(top[[1, 3]], np.array([3/7, 4/7]))

@pytest.mark.parametrize('sampler', ['tweedie', 'euler'])
def test_temperature_matters_or_is_rejected(sampler):
    m = network('mask, scores')
    plain = sample(m, 50, 8, sampler=sampler)
    try: cold = sample(m, 50, 8, sampler=sampler, temperature=1e-3)
    except ValueError: return
    assert not torch.equal(cold, plain), 'a temperature is ignored'
    assert len(cold.unique(dim=0))<len(plain.unique(dim=0)), 'a temperature is ignored'

# Large vocabularies and tiny steps (Zheng et al. 2024, section 4)

BIG = 50_000

def time_and_masks(xt, t): return t[0].item(), (xt==BIG).sum().item()

def test_ancestral_reveals_on_schedule_with_a_large_vocabulary(monkeypatch):
    "At time t of 1000 steps a fraction t of 12 x 128 positions is masked, within 4 standard errors"
    m = ConstantDenoiser(torch.zeros(1), 128, Corruption(BIG, schedule=LogLinear(0.)))
    calls = record_calls(monkeypatch, m, time_and_masks)
    x,n = sample(m, 12, 1000, sampler='ancestral'),12*128
    assert len(x.unique())>.95*n
    assert len(calls)>500
    for when in (.98, .9, .7, .5, .2, .05):
        t,masks = next(o for o in calls if o[0]<=when) # seen before the step from t
        assert abs(masks-n*t)<4*math.sqrt(n*t*(1-t)), (t, masks/n)

class EnoughSteps(Exception): pass

def stop_after(n, probs):
    "Note the probabilities of the first n samples, and stop at the last of them"
    def fault(draw_categorical):
        def f(p, u):
            probs.append(p)
            if len(probs)==n: raise EnoughSteps
            return draw_categorical(p, u)
        return f
    return fault

def test_tweedie_reveals_on_schedule_with_a_large_vocabulary(monkeypatch):
    "The sample that decides is in float64, from probabilities that are the schedule's to nine digits"
    probs,m = [],ConstantDenoiser(torch.zeros(1), 4, Corruption(BIG, schedule=LogLinear()))
    plant_fault(monkeypatch, (samplers, 'draw_categorical'), stop_after(12, probs))
    with pytest.raises(EnoughSteps): sample(m, 1, 1000, sampler='tweedie')
    for i,(tokens,weights) in enumerate(zip(probs[::2], probs[1::2])):
        a,b = 1-.999*(1-i/1000),1-.999*(1-(i+1)/1000)
        weights = weights/weights.sum(-1, keepdim=True)    # of clean token, symbol, mask, any token
        assert tokens.dtype==weights.dtype==torch.float64
        assert tokens.shape[-1]==BIG and (tokens*BIG-1).abs().max()<1e-6
        assert (weights[:,0]-(b-a)/(1-a)).abs().max()<1e-9
        assert (weights[:,[1, 3]]==0).all()

def test_samples_of_tiny_probabilities():
    "Rare tokens are sampled as often as they should, though float32 cannot resolve the probability of one"
    n,p = 8000,1e-3 # samples, and the probability of all rare tokens together
    probs = torch.full((50, BIG+1), p/BIG, dtype=torch.float64)
    probs[:,-1] = 1-p
    g = torch.Generator().manual_seed(1)
    count = sum((sample_categorical(probs, g)<BIG).sum().item() for _ in range(n//50))
    assert binom.ppf(.05, n, p)<=count<=binom.isf(5e-4, n, p)

# Repair

WORDS = torch.tensor([[i]*8 for i in range(4)]+[[(i+j)%4 for j in range(8)] for i in range(4)])

class WordDenoiser(HandmadeDenoiser):
    "Knows eight words: the distribution of each token given all others, by Bayes' rule"
    def __init__(self, noise):
        super().__init__(4, 8, noise)
        self.double()
    def outputs(self, xt, t, mask):
        kept,mask,sub,_ = (o[:,None,None].double() for o in self.noise.state_probs(t.double()))
        likelihood = torch.where(xt[:,None]==4, mask, kept*(xt[:,None]==WORDS)+sub/4) # (B, words, L)
        log_likelihood = likelihood.log()
        of_others = (log_likelihood.sum(-1, keepdim=True)-log_likelihood).softmax(1)
        p = torch.einsum('bwl,wlv->blv', of_others, torch.nn.functional.one_hot(WORDS, 4).double())
        return p.clamp(min=1e-300).log(), None

REPAIRED = {
    'uniform': Corruption(4, 0, 1, schedule=Cosine()),
    'hybrid': Corruption(4, .8, .2, schedule=Cosine()),
    'gidd': GIDDCorruption(4, .2),
}

def words_with_errors():
    "Every word with any two wrong tokens, and the words, each (8*28*9, 8)"
    errors = list(product(combinations(range(8), 2), (1, 2, 3), (1, 2, 3)))
    right = WORDS.repeat_interleave(len(errors), 0)
    wrong = right.clone()
    for k,((i,j),a,b) in enumerate(errors):
        rows = wrong[k::len(errors)]
        rows[:,i] = (rows[:,i]+a)%4
        rows[:,j] = (rows[:,j]+b)%4
    return wrong, right

@pytest.mark.parametrize('name', REPAIRED)
def test_self_correction_repairs(name):
    "Any two wrong tokens of any word; nothing where nothing is wrong"
    m,(wrong,right) = WordDenoiser(REPAIRED[name]),words_with_errors()
    before = wrong.clone()
    assert torch.equal(self_correct(m, WORDS), WORDS)
    assert torch.equal(self_correct(m, wrong), right)
    assert torch.equal(wrong, before)
    assert torch.equal(self_correct(m, wrong, per_step=1), right)

@pytest.mark.parametrize('name', REPAIRED)
def test_self_correction_never_changes_fixed_tokens(name):
    m,(wrong,_) = WordDenoiser(REPAIRED[name]),words_with_errors()
    fixed = (torch.arange(8)<4).expand_as(wrong)
    assert torch.equal(self_correct(m, wrong, fixed=fixed)[:,:4], wrong[:,:4])

@pytest.mark.parametrize('name', REPAIRED)
def test_one_correction_is_of_a_wrong_token(name):
    m,(wrong,right) = WordDenoiser(REPAIRED[name]),words_with_errors()
    x = self_correct(m, wrong, steps=1, per_step=1)
    assert ((x!=wrong).sum(1)==1).all()
    assert ((x!=right).sum(1)==1).all()

SOME = torch.randint(0, 5, (20, 12), generator=torch.Generator().manual_seed(0))

@pytest.mark.parametrize('name', ['mask', 'mask, time-conditioned', 'mask, scores', 'mask in a dictionary'])
def test_a_model_of_masks_corrects_nothing(name):
    assert torch.equal(self_correct(network(name), SOME), SOME)

@pytest.mark.parametrize('name', ['uniform', 'uniform, scores', 'hybrid', 'gidd'])
def test_a_model_of_substitutions_corrects_something(name):
    assert (self_correct(network(name), SOME, error_rate=.8)!=SOME).any()

# Rejected input

# The argument that the error names, the name of a model, and keywords of `sample`
REJECTED_BY_SAMPLE = {
    'no steps': ('steps', 'mask', dict(steps=0)),
    'negative steps': ('steps', 'mask, delete', dict(steps=-3)),
    'steps of a fraction': ('steps', 'uniform', dict(steps=2.5)),
    'no steps by scores': ('steps', 'hybrid', dict(steps=0, sampler='tweedie')),
    'no steps by confidence': ('steps', 'mask', dict(steps=0, sampler='confidence')),
    'negative steps of first hitting': ('steps', 'mask', dict(steps=-3, sampler='first_hitting')),
    'length beside a template': ('length', 'mask', dict(template=[5]*4, length=3)),
    'unknown schedule': ('schedule', 'mask', dict(schedule='linear')),
    'schedule of another noise': ('schedule', 'hybrid', dict(schedule=Cosine())),
    'schedule though time-conditioned': ('schedule', 'mask, time-conditioned', dict(schedule=Cosine())),
    'id too large': ('template', 'mask', dict(template=[0, 6])),
    'negative id': ('template', 'all three', dict(template=[-1, 5])),
    'template too long': ('seq_len', 'mask', dict(template=[5]*13)),
    'too long': ('seq_len', 'hybrid', dict(length=13)),
    'too long to insert': ('seq_len', 'mask, delete', dict(length=13)),
    'template of other texts': ('template', 'mask', dict(n=2, template=torch.full((3, 4), 5))),
    'template of too many axes': ('template', 'mask', dict(template=torch.full((1, 1, 4), 5))),
    'unknown sampler': ('sampler', 'mask', dict(sampler='beam')),
    'temperature 0': ('temperature', 'mask', dict(temperature=0)),
    'temperature nan': ('temperature', 'mask', dict(temperature=math.nan)),
    'negative temperature': ('temperature', 'all three', dict(temperature=-1.)),
    'temperature of scores': ('temperature', 'uniform, scores', dict(temperature=.5)),
    'top_p 0': ('top_p', 'uniform', dict(top_p=0)),
    'top_p above 1': ('top_p', 'mask', dict(top_p=1.1)),
    'top_p nan': ('top_p', 'mask, delete', dict(top_p=math.nan)),
    'length steps without insertion': ('length_steps', 'hybrid', dict(length_steps=1)),
}
ALL_SAMPLERS = 'ancestral','tweedie','euler','confidence','entropy','first_hitting','insertion'
for name,sampler in product(MODELS, ALL_SAMPLERS):
    if (name, sampler) not in EVERY:
        REJECTED_BY_SAMPLE[f'{sampler} for {name}'] = ('sampler', name, dict(sampler=sampler))

@pytest.mark.parametrize('case', REJECTED_BY_SAMPLE)
def test_sample_rejects_bad_input(case):
    argument,name,kwargs = REJECTED_BY_SAMPLE[case]
    with pytest.raises(ValueError, match=rf'\b({argument})\b'): sample(network(name), **kwargs)

CLEAN,MASKS = torch.zeros(1, 12).long(),torch.full((1, 12), 5)
# The argument that the error names, the name of a model, and arguments of `self_correct`
REJECTED_BY_SELF_CORRECT = {
    'error rate 0': ('error_rate', 'hybrid', (CLEAN, 0.)),
    'error rate nan': ('error_rate', 'hybrid', (CLEAN, math.nan)),
    'deletion': ('model', 'all three', (CLEAN,)),
    'a mask': ('x', 'hybrid', (MASKS,)),
    'negative id': ('x', 'uniform', (-1-CLEAN,)),
    'too long': ('seq_len', 'uniform', (torch.zeros(1, 13).long(),)),
}

@pytest.mark.parametrize('case', REJECTED_BY_SELF_CORRECT)
def test_self_correct_rejects_bad_input(case):
    argument,name,args = REJECTED_BY_SELF_CORRECT[case]
    with pytest.raises(ValueError, match=rf'\b{argument}\b'): self_correct(network(name), *args)

# The argument that the error names, the name of a model, ids and times
REJECTED_BY_NETWORKS = {
    'time after 1': ('t', 'hybrid', [[0, 0]], [1.5]),
    'time before 0': ('t', 'all three', [[0, 0]], [-.1]),
    'id too large': ('xt', 'mask', [[6]], None),
}

@pytest.mark.parametrize('case', REJECTED_BY_NETWORKS)
def test_networks_reject_bad_input(case):
    argument,name,ids,t = REJECTED_BY_NETWORKS[case]
    with pytest.raises(ValueError, match=rf'\b{argument}\b'):
        network(name)(torch.tensor(ids), None if t is None else torch.tensor(t))

REJECTED_BY_CONFIG = {
    'no gap head': ('gap_head', of_five(1, 0, 1), {}),
    'scores of a hybrid': ('score_head', of_five(1, 1), dict(score_head=True)),
}

@pytest.mark.parametrize('case', REJECTED_BY_CONFIG)
def test_configurations_reject_heads_that_do_not_fit(case):
    argument,noise,kwargs = REJECTED_BY_CONFIG[case]
    with pytest.raises(ValueError, match=rf'\b{argument}\b'):
        DenoiserConfig(5, noise=noise.to_dict(), **kwargs)

# Adapters: losses and samplers of SEDD (Lou et al. 2024), with matrices of its graphs, and of MDLM (Sahoo et
# al. 2024), as their papers have them. Networks are called with the total noise sigma; alpha is exp(-sigma)

ADAPTED = 'mask','mask, time-conditioned','mask, scores','uniform','uniform, scores'

class Graph:
    "Rates Q of absorbing or uniform noise, row: from"
    def __init__(self, name):
        self.absorbs = NOISES[name].corruption.masks_only
        n = V+1 if self.absorbs else V
        self.Q = torch.zeros(n, n, dtype=torch.float64)
        if self.absorbs: self.Q[:,V] = 1
        else: self.Q[:] = 1/V
        self.Q -= torch.diag(self.Q.sum(1))
    def transition(self, sigma): return torch.matrix_exp(sigma*self.Q)

def score_divergence(log_s, r):
    "s - r log s + r (log r - 1) of a score s and the true ratio r"
    return log_s.exp()-r*log_s+(r*(r.log()-1) if r>0 else 0)

def sedd_loss(network, graph, x0, xt, sigma, dsigma):
    "Denoising score entropy, definition 3.4 with the rates of equation 5, and its constant, per text"
    log_s = network(xt, sigma)
    def of_token(P, x, z, log_s):
        others = [y for y in range(len(P)) if y!=z and graph.Q[y,z]]
        return sum(graph.Q[y,z]*score_divergence(log_s[y], P[x,y]/P[x,z]) for y in others)
    def of_text(b):
        P = graph.transition(sigma[b])
        return dsigma[b]*sum(of_token(P, x0[b,i], xt[b,i], log_s[b,i]) for i in range(x0.shape[1]))
    return torch.stack([of_text(b) for b in range(len(x0))])

def sedd_step(graph, score, x, sigma, s, t, kind):
    "Probabilities of the symbols at time s: by the analytic step of theorem 4.2, or an Euler step"
    if kind=='tweedie' or s==0:
        d = sigma(t)-sigma(s)
        p = (score@graph.transition(-d))*graph.transition(d).T[x]
    else:
        p = (t-s)*derivative(sigma, t, 1e-5)*graph.Q.T[x]*score
        p = p.scatter(-1, x[...,None], 0.)
        p = p.scatter(-1, x[...,None], 1-p.sum(-1, keepdim=True))
    if s==0 and graph.absorbs: p[...,V] = 0
    return p.clamp(min=0)

def sedd_sample(network, graph, sigma, steps, kind, n, g):
    "Analytic or Euler steps, and an analytic one to the end"
    x = torch.full((n, L), V) if graph.absorbs else torch.randint(0, V, (n, L), generator=g)
    for i in range(steps, 0, -1):
        t,s = i/steps,(i-1)/steps
        score = network(x, torch.full((n, 1), sigma(t), dtype=torch.float64)).double().exp()
        p = sedd_step(graph, score, x, sigma, s, t, kind)
        x = torch.multinomial(p.flatten(0, 1), 1, generator=g).view(n, L)
    return x

def mdlm_log_probs(logits, x):
    "MDLM's log-probabilities: the mask is impossible, and a visible token is certain"
    logits = logits.clone()
    logits[...,V] = -math.inf
    certain = torch.where(torch.arange(V+1)==x[...,None], 0., -math.inf)
    return torch.where((x==V)[...,None], logits.log_softmax(-1), certain)

def mdlm_loss(network, x0, xt, sigma, dsigma):
    "dsigma/(exp(sigma)-1) times the sum of -log p(x), per text"
    nats = -mdlm_log_probs(network(xt, sigma), xt).gather(-1, x0[...,None])[...,0]
    return dsigma/sigma.expm1()*nats.sum(1)

def mdlm_sample(network, sigma, steps, n, g):
    "Of a mask p(x) times (masked at t - masked at s) is a token, and masked at s stays"
    x = torch.full((n, L), V)
    def masked(t): return 1-math.exp(-sigma(t))
    for i in range(steps, 0, -1):
        t,s = i/steps,(i-1)/steps
        logits = network(x, torch.full((n,), sigma(t), dtype=torch.float64))
        p = mdlm_log_probs(logits, x).exp()*(masked(t)-masked(s))
        p[...,V] = masked(s)
        new = torch.multinomial(p.flatten(0, 1), 1, generator=g).view(n, L)
        x = torch.where(x==V, new, x)
    return x

def total_noise(name):
    "sigma(t) = -log(alpha(t))"
    return lambda t: -math.log(max(NOISES[name].state_probs(t)[0], 1e-300))

def noisy_texts(name, B=40):
    "Clean ids, times and noisy texts"
    g = torch.Generator().manual_seed(1)
    x0 = torch.randint(0, V, (B, L), generator=g)
    t = torch.rand(B, generator=g, dtype=torch.float64)*.98+.01
    return x0, t, NOISES[name].corruption.corrupt(x0, t, g)

def each(f, t): return torch.tensor([f(o) for o in t.tolist()], dtype=torch.float64)

def losses(name):
    "The package's integrand of the bound, and the losses of the papers for adapted models, with the network"
    noise,_,config_kwargs = NOISES[name]
    m,(x0,t,noisy) = tiny_denoiser(V, L, noise=noise, **config_kwargs),noisy_texts(name)
    sigma = total_noise(name)
    dsigma = partial(derivative, sigma, d=1e-5)
    args = x0, noisy.xt, each(sigma, t), each(dsigma, t)
    theirs = [sedd_loss(m.as_sedd(), Graph(name), *args)]
    if noise.masks_only and not m.config.score_head: theirs.append(mdlm_loss(m.as_mdlm(), *args))
    return m, output_integrand(m, m(noisy.xt, t), noisy, t, noise), theirs

def assert_close(got, want): assert (got-want).abs().max()<1e-4*want.abs().max(), 'losses differ'

def judge_losses(name):
    "Losses and their gradients are the package's"
    m,own,theirs = losses(name)
    def gradient(loss): return torch.autograd.grad(loss.sum(), m.output_head.weight, retain_graph=True)[0]
    for loss in theirs:
        assert loss.std()>.1
        assert_close(loss, own)
        assert_close(gradient(loss), gradient(own))

@pytest.mark.parametrize('name', ADAPTED)
def test_losses_of_other_code(name): judge_losses(name)

@torch.no_grad()
def counts_of_other_code(name, kind):
    "How often each text in Z is sampled from an adapted model by the samplers of the papers"
    m,sigma,g = denoiser(name),total_noise(name),torch.Generator().manual_seed(5)
    if kind=='mdlm': x = mdlm_sample(m.as_mdlm(), sigma, STEPS, N, g)
    else: x = sedd_sample(m.as_sedd(), Graph(name), sigma, STEPS, kind, N, g)
    return count_sequences(x, V+1)

def judge_other_code(name, kind):
    p = exact_distribution(name, 'tweedie' if kind=='mdlm' else kind)
    assert_fits(counts_of_other_code(name, kind), p)

OTHER_SAMPLERS = [(name, kind) for name in ADAPTED if 'time' not in name for kind in ('tweedie', 'euler')]
OTHER_SAMPLERS.append(('mask', 'mdlm'))

@pytest.mark.parametrize('name, kind', OTHER_SAMPLERS)
def test_samplers_of_other_code(name, kind): judge_other_code(name, kind)

def of_more_noise(outputs): return lambda self, x, sigma: outputs(self, x, sigma*1.03)
def larger(forward): return lambda self, x, sigma: 1.1*forward(self, x, sigma)

@pytest.mark.parametrize('name', ADAPTED)
def test_a_loss_of_another_time_is_noticed(name, monkeypatch):
    plant_fault(monkeypatch, SEDD_OUTPUTS, of_more_noise)
    with pytest.raises(AssertionError): judge_losses(name)

def test_a_loss_of_larger_logits_is_noticed(monkeypatch):
    plant_fault(monkeypatch, MDLM_FORWARD, larger)
    with pytest.raises(AssertionError): judge_losses('mask')

@pytest.mark.parametrize('name, kind', [('mask', 'euler'), ('uniform', 'euler'), ('mask', 'mdlm')])
def test_samples_of_larger_outputs_are_noticed(name, kind, monkeypatch):
    plant_fault(monkeypatch, MDLM_FORWARD if kind=='mdlm' else SEDD_FORWARD, larger)
    with pytest.raises(AssertionError, match='p-value'): judge_other_code(name, kind)
