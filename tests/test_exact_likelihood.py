"""Exact likelihoods of unmasking rules, judged by three things that share no code with them.

The probabilities of all sequences sum to 1; an implementation in plain Python gives the same numbers; and
counts of samples fit. Means over orders are compared with all orders, one by one.
"""
import hashlib, math
from functools import lru_cache, partial
from itertools import combinations, permutations, product
from typing import NamedTuple
import numpy as np, pytest, torch
from torch.nn.functional import pad
from helpers import assert_drawn_from, assert_given_kept, count_sequences, of_sampled_tokens, plant_fault
from helpers import TableDenoiser, tempered_probs, warmer
from bijdiff.diffusion.corruption import Corruption
from bijdiff.diffusion.schedules import Cosine, HalfCosine, Polynomial
from bijdiff.likelihood import exact as likelihood
from bijdiff.likelihood.exact import all_orders_nats, latent_nats, log_prob, order_bound, order_estimate
from bijdiff.likelihood.exact import order_nats, token_nll
from bijdiff.model.config import DenoiserConfig
from bijdiff.layers.latent import LatentDensity
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.sampling import conditionals, rules
from bijdiff.sampling.generate import sample
from bijdiff.sampling.rules import reveal_counts, UnmaskingRule
from bijdiff.testing import random_weights, tiny_denoiser

# Functions of the package that planted faults replace, where they are looked up
TOKEN_PROBS,CONFIDENCE = (conditionals, 'token_probs'),(conditionals, 'confidence')
FEATURES,LIKELIHOOD_PROBS = (conditionals, '_features'),(likelihood, 'known_probs')
RULE_RANKS,LIKELIHOOD_RANKS = (rules, 'reveal_ranks'),(likelihood, 'reveal_ranks')
RULE_COUNTS,LIKELIHOOD_COUNTS = (rules, 'reveal_counts'),(likelihood, 'reveal_counts')
LATENT_NOISE,LATENT_FORWARD = (LatentDensity, 'noise'),(LatentDensity, 'forward')

V,L = 3,4 # tokens are 0, 1, 2, and the mask is 3
X = torch.tensor(list(product(range(V), repeat=L))) # all sequences
N = 200_000 # samples
N_TESTS = 60 # chi-square tests in this file, at most
ORDER = (3, 1, 0, 2)
EVERY_RULE = (*UnmaskingRule.names, ORDER)
assert_fits = partial(assert_drawn_from, n_tests=N_TESTS)

# Denoisers; the seeds are such that all rules differ clearly

NETWORKS = {
    'toy': lambda: TableDenoiser(V, L, seed=7),
    'network': lambda: tiny_denoiser(V, L, seed=15),
    'timed': lambda: TableDenoiser(V, L, Corruption(V, schedule=HalfCosine(.01)), 123,
                                   time_conditioning=True),
    'ties': lambda: TableDenoiser(V, L, choices=[[0., 0., 0.], [2., 0., 1.], [0., 0., 2.5]]),
}

@lru_cache(None)
def network(name): return NETWORKS[name]()

def time_of(n_masks, n):
    "Time at which so many of n tokens are masked, where the others are alpha(t) = .01+.99 cos(pi/2 t)"
    alpha = (1-n_masks/n-.01)/.99
    return 2/math.pi*math.acos(min(max(alpha, 0), 1))

@lru_cache(None)
def all_logits(name, n=L):
    "Logits, (n, V), by sequence of n tokens and masks; they are padded to L"
    sequences = list(product(range(V+1), repeat=n))
    ids = pad(torch.tensor(sequences).view(len(sequences), n), (0, L-n))
    mask = None if n==L else (torch.arange(L)<n).expand(len(sequences), -1)
    times = None
    if name=='timed': times = torch.tensor([time_of(z.count(V), n) for z in sequences], dtype=torch.float64)
    with torch.no_grad(): logits = network(name)(ids, times, mask)
    return dict(zip(sequences, logits[:,:n].numpy()))

@lru_cache(None)
def all_probs(name, temperature=1., top_p=1., n=L):
    "Probabilities, lists (n, V), by sequence of n tokens and masks"
    logits = all_logits(name, n)
    return {z: tempered_probs(o, temperature, top_p).tolist() for z,o in logits.items()}

# A slow implementation of rules and likelihoods: lists, tuples and math

REVEALED = {Cosine: lambda u: 1-math.cos(math.pi/2*u), Polynomial: lambda u: 1-(1-u)**3}

def slow_counts(n, steps=None, schedule=None):
    "Number of masks that each step reveals; `REVEALED` are the fractions after a fraction u of the steps"
    if steps is None: return [1]*n
    if schedule is None: return [n*(i+1)//steps-n*i//steps for i in range(steps)]
    steps = min(steps, n)
    revealed = REVEALED[type(schedule)]
    done = [i+math.floor((n-steps)*revealed(i/steps)+.500001) for i in range(steps+1)] # half is rounded up
    return [b-a for a,b in zip(done, done[1:])]

def van_der_corput(i):
    "The binary digits of i in reverse, after the point"
    return sum((i>>k&1)/2**(k+1) for k in range(20))

def slow_order(rule, n, seed):
    "All n positions in the order of a rule that does not look at probabilities"
    def digest(i): return hashlib.sha256(f'{seed} {n} {i}'.encode()).digest()
    if isinstance(rule, tuple): return list(rule)
    keys = dict(spread=van_der_corput, random=digest)
    assert rule in keys, f'write an order for the rule {rule} here, without code of the package'
    return sorted(range(n), key=keys[rule])

def entropy(p): return -sum(a*math.log(a) for a in p if a>0)

def sort_key(rule, i, p, n, seed, block_length):
    "What masks are sorted by, smallest first, for the mask at i with probabilities p; the leftmost of equals"
    if rule=='left_to_right': return (i,)
    if rule=='entropy': return (entropy(p), i)
    if rule=='confidence': return (-max(p), i)
    if rule=='margin': return (sorted(p)[-2]-max(p), i)
    if rule=='block': return (i//block_length, -max(p), i)
    return (slow_order(rule, n, seed).index(i),)

def neg_log(p): return -math.log(p) if p else math.inf

def slow_token_nll(name, x, rule, steps=None, seed=0, template=None, temperature=1., top_p=1., schedule=None,
                   block_length=2):
    "Minus the log-probability of each token of one sequence, at the moment it is revealed"
    n,probs = len(x),all_probs(name, temperature, top_p, len(x))
    z,nats = list(template or [V]*n),[0.]*n
    for count in slow_counts(z.count(V), steps, schedule):
        p = probs[tuple(z)]
        masks = [i for i in range(n) if z[i]==V]
        masks.sort(key=lambda i: sort_key(rule, i, p[i], n, seed, block_length))
        for i in masks[:count]:
            z[i],nats[i] = x[i],neg_log(p[i][x[i]])
    assert tuple(z)==tuple(x)
    return nats

def float64(values): return torch.tensor(values, dtype=torch.float64)

def slow_log_prob(name, x=X, **kw):
    "Log-probability of each sequence, (B,)"
    return float64([-sum(slow_token_nll(name, row, **kw)) for row in x.tolist()])

def assert_same(a, b, eps=1e-9):
    "Assert that log-probabilities are equal up to rounding, infinities included"
    assert a.shape==b.shape
    assert torch.equal(a.isinf(), b.isinf()), 'log-probabilities differ: infinities'
    assert (a-b)[~a.isinf()].abs().max()<eps, 'log-probabilities differ'

def assert_sums_to_one(logp):
    assert abs(logp.exp().sum().item()-1)<1e-9, 'the sum is not 1'

# Sums over all sequences, and the slow implementation

def with_rule(rule, **kw):
    "Keywords of `log_prob`: a rule, blocks of two positions where it has blocks, and others"
    return dict(kw, rule=rule, block_length=2) if rule=='block' else dict(kw, rule=rule)

SETTINGS = {
    'plain': {},
    'cold': dict(temperature=.6),
    'top-p': dict(top_p=.8),
    'hot, top-p': dict(temperature=1.7, top_p=.6),
    'prompt': dict(template=(1, 2, V, V)),
    'infill': dict(template=(V, V, 0, V), temperature=.8),
    'cosine': dict(schedule=Cosine()),
    'cubic': dict(schedule=Polynomial(3.)),
    'all': dict(template=(V, 1, V, V), temperature=1.3, top_p=.85, schedule=Polynomial(3.), seed=5),
}
FEWER_SETTINGS = 'plain','top-p','infill','all'
CASES = [(name, setting) for name in ('toy', 'network') for setting in SETTINGS]
CASES += [(name, setting) for name in ('timed', 'ties') for setting in FEWER_SETTINGS]
every_setting = pytest.mark.parametrize('name, setting', CASES)

def fitting(template=None):
    "All sequences that agree with a template"
    if template is None: return X
    t = torch.tensor(template)
    return X[((X==t)|(t==V)).all(1)]

def sequences_of(setting): return fitting(SETTINGS[setting].get('template'))

@lru_cache(None)
def exact_log_probs(name, setting):
    "log_prob of all sequences, by rule and steps"
    def f(rule, steps):
        kw = with_rule(rule, **SETTINGS[setting])
        return log_prob(network(name), sequences_of(setting), steps=steps, bs=512, **kw)
    return {(rule, steps): f(rule, steps) for rule in EVERY_RULE for steps in (None, 1, 2, 3, 4)}

@every_setting
def test_the_sum_over_all_texts_is_one(name, setting):
    for logp in exact_log_probs(name, setting).values():
        assert logp.dtype==torch.float64
        assert len(logp)==len(sequences_of(setting))
        assert_sums_to_one(logp)

@every_setting
def test_agrees_with_the_slow_implementation(name, setting):
    x = sequences_of(setting)
    for (rule,steps),logp in exact_log_probs(name, setting).items():
        assert_same(logp, slow_log_prob(name, x, steps=steps, **with_rule(rule, **SETTINGS[setting])))

@pytest.mark.parametrize('name', ['toy', 'network', 'timed'])
def test_rules_and_steps_differ(name):
    "Else the comparisons above could not tell them apart"
    logp = exact_log_probs(name, 'plain')
    for a,b in combinations(EVERY_RULE, 2):
        assert .5*(logp[a,None].exp()-logp[b,None].exp()).abs().sum()>.01, (a, b)
    for rule in EVERY_RULE:
        assert torch.equal(logp[rule,None], logp[rule,4])
        for i,j in combinations((1, 2, 3, 4), 2): assert (logp[rule,i]-logp[rule,j]).abs().max()>.01

def test_top_p_makes_some_texts_impossible():
    logps = exact_log_probs('toy', 'top-p').values()
    assert any(o.isinf().any() and o.isfinite().any() for o in logps)

def test_seeds_of_random_orders_differ():
    a,b = (slow_log_prob('toy', rule='random', seed=seed) for seed in (0, 1))
    assert (a-b).abs().max()>.1
    assert_same(log_prob(network('toy'), X, 'random', seed=1), b)

def test_blocks_of_other_lengths():
    "Blocks of one position are revealed left to right, and one block of all positions by confidence"
    m,plain = network('toy'),exact_log_probs('toy', 'plain')
    for block_length in (1, 3):
        slow = slow_log_prob('toy', rule='block', steps=2, block_length=block_length)
        assert_same(log_prob(m, X, 'block', 2, block_length=block_length), slow)
    assert_same(log_prob(m, X, 'block', block_length=1), plain['left_to_right',None], 1e-12)
    assert_same(log_prob(m, X, 'block', block_length=4), plain['confidence',None], 1e-12)

def test_tokens_a_step():
    "Two tokens a step are two steps for four tokens; of three tokens the last one has a step of its own"
    m,template = network('toy'),(1, V, V, V)
    assert reveal_counts(3, tokens=2)==[2, 1]
    for rule in EVERY_RULE:
        assert_same(log_prob(m, X, tokens=2, **with_rule(rule)), log_prob(m, X, steps=2, **with_rule(rule)))
        kw = with_rule(rule, template=template)
        by_tokens = log_prob(m, fitting(template), tokens=2, **kw)
        by_steps = log_prob(m, fitting(template), steps=2, **kw)
        assert_sums_to_one(by_tokens)
        assert (by_tokens-by_steps).abs().max()>.01

def padded_texts():
    "All sequences of 0 to L tokens with random tokens after their ends, (B, L), and their lengths"
    texts = [x for n in range(L+1) for x in product(range(V), repeat=n)] # the first has no tokens
    padded = torch.randint(0, V, (len(texts), L), generator=torch.Generator().manual_seed(3))
    for row,x in zip(padded, texts): row[:len(x)] = torch.tensor(x)
    return texts, padded, torch.tensor([len(x) for x in texts])

@pytest.mark.parametrize('name', ['toy', 'network', 'timed'])
def test_shorter_texts(name):
    texts,padded,lengths = padded_texts()
    for rule,steps,kw in product(UnmaskingRule.names, (None, 2), ({}, dict(temperature=.7, top_p=.9))):
        kw = with_rule(rule, steps=steps, **kw)
        logp = log_prob(network(name), padded, lengths=lengths, bs=50, **kw)
        for n in range(L+1): assert_sums_to_one(logp[lengths==n])
        assert_same(logp[1:], float64([-sum(slow_token_nll(name, x, **kw)) for x in texts[1:]]))

def test_padding_changes_nothing():
    m,(_,padded,lengths) = network('network'),padded_texts()
    x = padded[lengths==2]
    for rule in UnmaskingRule.names:
        assert_same(log_prob(m, x, rule, lengths=[2]*9), log_prob(m, x[:,:2], rule))

def test_nats_of_each_token():
    template = (V, 2, V, V)
    for rule,kw in product(EVERY_RULE, ({}, dict(template=template, temperature=.8))):
        x,kw = fitting(kw.get('template'))[5:25],with_rule(rule, steps=2, **kw)
        got = token_nll(network('toy'), x, **kw)
        slow = float64([slow_token_nll('toy', row, **kw) for row in x.tolist()])
        assert (got-slow).abs().max()<1e-12
        if 'template' in kw: assert not got[:,1].any()

def test_a_template_of_each_text():
    templates = [(0, V, V, 1), (V, V, V, V), (2, 1, 0, 0)]
    x = [(0, 1, 2, 1), (2, 2, 0, 1), (2, 1, 0, 0)]
    for rule in EVERY_RULE:
        kw = with_rule(rule)
        slow = float64([-sum(slow_token_nll('toy', row, template=t, **kw)) for row,t in zip(x, templates)])
        got = log_prob(network('toy'), torch.tensor(x), template=torch.tensor(templates), **kw)
        assert_same(got, slow, 1e-12)

# Samples

class Case(NamedTuple):
    "A rule, its steps, the name of a denoiser, and further keywords of both `sample` and `log_prob`"
    rule:str|tuple
    steps:int|None = None
    name:str = 'toy'
    kwargs:dict = {}

def sample_counts(case, n=N, seed=1):
    "How often each sequence is sampled, in the order of X"
    rule,steps,name,kwargs = case
    kwargs = dict(kwargs, steps=steps, rule=rule, seed=seed)
    template = kwargs.pop('template', None)
    if rule=='block': kwargs = dict(rule=UnmaskingRule(block_length=2, **kwargs), seed=seed)
    if template is not None: kwargs['template'] = torch.tensor(template)
    x = sample(network(name), n, **kwargs)
    assert x.shape==(n, L)
    assert_given_kept(x, template or (), V)
    return count_sequences(x, V)

def distribution(case, log_prob_of, seed=1):
    "Probability of each sequence, in the order of X, by a function of sequences and keywords"
    x,p = fitting(case.kwargs.get('template')),np.zeros(len(X))
    logp = log_prob_of(x, steps=case.steps, seed=seed, **with_rule(case.rule, **case.kwargs))
    p[x@V**torch.arange(L).flip(0)] = logp.exp()
    return p

def slow_distribution(case): return distribution(case, partial(slow_log_prob, case.name))
def exact_distribution(case, seed=1): return distribution(case, partial(log_prob, network(case.name)), seed)

AROUND = dict(template=(V, 1, V, V), temperature=1.4, top_p=.9)
COLD_TOP_P = dict(temperature=.6, top_p=.8)
SAMPLED = {}
for rule in EVERY_RULE:
    SAMPLED[f'{rule}, 4 steps'] = Case(rule)
    SAMPLED[f'{rule}, 2 steps'] = Case(rule, 2)
for rule in ('random', 'block', 'confidence'):
    SAMPLED[f'{rule}, 2 steps, around a token'] = Case(rule, 2, kwargs=AROUND)
SAMPLED |= {
    'confidence, cubic': Case('confidence', 2, kwargs=dict(schedule=Polynomial(3.))),
    'random, cold, top-p': Case('random', kwargs=COLD_TOP_P),
    'confidence, cold, top-p': Case('confidence', kwargs=COLD_TOP_P),
    'entropy, time-conditioned': Case('entropy', 2, 'timed'),
    'confidence, ties': Case('confidence', 2, 'ties'),
}

@pytest.mark.parametrize('name', SAMPLED)
def test_samples(name):
    case = SAMPLED[name]
    assert_fits(sample_counts(case), slow_distribution(case))

# Faults of the sampler: each takes the right function and returns a wrong one

def of_another_rule(confidence): return lambda p, rule: confidence(p, 'confidence')

def without_top_p(token_probs):
    return lambda logits, temperature=1., top_p=1.: token_probs(logits, temperature)

def backwards(reveal_ranks):
    def wrong(masked, order_keys, sure=None):
        if sure is None: return reveal_ranks(masked, -order_keys)
        return reveal_ranks(masked, order_keys, -sure)
    return wrong

def rightmost_of_equals(reveal_ranks):
    def wrong(masked, order_keys, sure=None):
        return reveal_ranks(masked.flip(1), order_keys.flip(1), sure.flip(1)).flip(1)
    return wrong

def few_first(reveal_counts):
    "One mask a step, and all others in the last one"
    return lambda n, steps=None, schedule=None, tokens=1: [1]*(steps-1)+[n-steps+1]

class Fault(NamedTuple):
    "A function of the package, a wrong version of it, and a case where that is noticed"
    target:tuple
    fault:object
    case:Case

TOP_P = dict(top_p=.8)
SAMPLER_FAULTS = {
    'confidence of the sampled token': Fault(CONFIDENCE, of_sampled_tokens, Case('confidence')),
    'confidence of another rule': Fault(CONFIDENCE, of_another_rule, Case('entropy')),
    'too warm, left_to_right': Fault(TOKEN_PROBS, warmer, Case('left_to_right', 2)),
    'too warm, confidence': Fault(TOKEN_PROBS, warmer, Case('confidence', 2)),
    'top-p left out': Fault(TOKEN_PROBS, without_top_p, Case('random', kwargs=TOP_P)),
    'backwards, left_to_right': Fault(RULE_RANKS, backwards, Case('left_to_right')),
    'backwards, confidence': Fault(RULE_RANKS, backwards, Case('confidence')),
    'backwards, entropy': Fault(RULE_RANKS, backwards, Case('entropy')),
    'backwards, block': Fault(RULE_RANKS, backwards, Case('block')),
    'rightmost of equals': Fault(RULE_RANKS, rightmost_of_equals, Case('confidence', name='ties')),
    'other counts, random': Fault(RULE_COUNTS, few_first, Case('random', 2)),
    'other counts, confidence': Fault(RULE_COUNTS, few_first, Case('confidence', 2)),
}

@pytest.mark.parametrize('name', SAMPLER_FAULTS)
def test_the_chi_square_notices(name, monkeypatch):
    target,fault,case = SAMPLER_FAULTS[name]
    p = slow_distribution(case)
    assert_fits(sample_counts(case, N//4), p)
    plant_fault(monkeypatch, target, fault)
    with pytest.raises(AssertionError, match='p-value|impossible'): assert_fits(sample_counts(case, N//4), p)

@pytest.mark.parametrize('rule', ['random', 'confidence'])
def test_the_chi_square_tells_rules_and_settings_apart(rule):
    case = Case(rule)
    counts = sample_counts(case, N//4)
    assert_fits(counts, exact_distribution(case))
    for other in EVERY_RULE:
        if other==rule: continue
        p = exact_distribution(Case(other))
        with pytest.raises(AssertionError, match='p-value'): assert_fits(counts, p)
    wrong = [exact_distribution(Case(rule, 2))]
    wrong += [exact_distribution(case._replace(kwargs=kw)) for kw in (dict(temperature=1.1), dict(top_p=.9))]
    if rule=='random': wrong.append(exact_distribution(case, seed=2))
    for p in wrong:
        with pytest.raises(AssertionError, match='p-value|impossible'): assert_fits(counts, p)

# Faults of the likelihood alone

def one_token_too_many_hidden(known_probs):
    def wrong(model, x, *args):
        visible = x<V
        first = visible&(visible.cumsum(1)==1)
        return known_probs(model, x.masked_fill(first, V), *args)
    return wrong

def one_step_late(reveal_ranks):
    return lambda masked, order_keys, sure=None: reveal_ranks(masked, order_keys, sure).clamp(min=1)

LIKELIHOOD_FAULTS = {
    'top-p left out, left_to_right': Fault(TOKEN_PROBS, without_top_p, Case('left_to_right', kwargs=TOP_P)),
    'top-p left out, confidence': Fault(TOKEN_PROBS, without_top_p, Case('confidence', kwargs=TOP_P)),
    'one token too many hidden': Fault(LIKELIHOOD_PROBS, one_token_too_many_hidden, Case('random')),
    'one token too few in a step': Fault(LIKELIHOOD_RANKS, one_step_late, Case('left_to_right')),
    'other counts': Fault(LIKELIHOOD_COUNTS, few_first, Case('random', 2)),
    'too warm': Fault(TOKEN_PROBS, warmer, Case('entropy', 2)),
}

@pytest.mark.parametrize('name', LIKELIHOOD_FAULTS)
def test_faults_of_the_likelihood_are_noticed(name, monkeypatch):
    "Their sum is 1 nevertheless: by the samples, and by the slow implementation"
    target,fault,case = LIKELIHOOD_FAULTS[name]
    counts = sample_counts(case, N//4)
    assert_fits(counts, exact_distribution(case))
    plant_fault(monkeypatch, target, fault)
    p = exact_distribution(case)
    assert abs(p.sum()-1)<1e-9
    with pytest.raises(AssertionError, match='p-value|impossible'): assert_fits(counts, p)
    kw = with_rule(case.rule, steps=case.steps, **case.kwargs)
    with pytest.raises(AssertionError, match='differ'):
        assert_same(log_prob(network('toy'), X, **kw), slow_log_prob('toy', **kw))

def assert_total_is_one(rule='confidence', **kw):
    "Texts come one by one"
    assert_sums_to_one(log_prob(network('toy'), X, rule, bs=1, **kw))

class Peeking:
    "Faults of a rule whose confidence is the probability of the token to be scored: it knows the text"
    def __init__(self): self.texts = iter(X) # each begins when all of its tokens are masked
    def remember_places(self, features):
        def right(model, x, lengths):
            if (x==V).all(): self.text = next(self.texts)
            self.where = x[0]==V
            return features(model, x, lengths)
        return right
    def of_true_token(self, confidence):
        return lambda p, rule: p.gather(-1, self.text[self.where][:,None])[:,0]

def test_the_sum_notices_a_rule_that_knows_the_text(monkeypatch):
    peeking = Peeking()
    plant_fault(monkeypatch, FEATURES, peeking.remember_places)
    assert_total_is_one()
    peeking.texts = iter(X)
    plant_fault(monkeypatch, CONFIDENCE, peeking.of_true_token)
    with pytest.raises(AssertionError, match='the sum is not 1'): assert_total_is_one()

def not_normalised(token_probs):
    "Top-p whose probabilities do not sum to 1"
    def wrong(logits, temperature, top_p):
        return torch.where(token_probs(logits, temperature, top_p)>0, token_probs(logits, temperature), 0.)
    return wrong

def last_step_left_out(reveal_counts): return lambda *args: reveal_counts(*args)[:-1]

SUM_FAULTS = {
    'confidence of a sampled token': Fault(CONFIDENCE, of_sampled_tokens, Case('confidence')),
    'top-p that is not normalised': Fault(TOKEN_PROBS, not_normalised, Case('confidence', kwargs=TOP_P)),
    'a token that is not counted': Fault(LIKELIHOOD_COUNTS, last_step_left_out, Case('random')),
}

@pytest.mark.parametrize('name', SUM_FAULTS)
def test_the_sum_notices(name, monkeypatch):
    target,fault,case = SUM_FAULTS[name]
    assert_total_is_one(case.rule, **case.kwargs)
    plant_fault(monkeypatch, target, fault)
    with pytest.raises(AssertionError, match='the sum is not 1'):
        assert_total_is_one(case.rule, **case.kwargs)

# Orders

ORDERS = list(permutations(range(L)))
SOME = X[[0, 7, 22, 40, 53, 80]]

@lru_cache(None)
def nats_by_order(name, steps=None):
    "Minus the log-probability of some sequences for every order, (24, 6)"
    return torch.stack([-slow_log_prob(name, SOME, rule=order, steps=steps) for order in ORDERS])

def nats_of_mean(nats):
    "Minus the logarithm of the mean of exp(-nats) over the first axis"
    return math.log(len(nats))-(-nats).logsumexp(0)

with_and_without_time = pytest.mark.parametrize('name', ['toy', 'network', 'timed'])

@with_and_without_time
def test_all_orders(name):
    for steps in (None, 1, 2, 3, 9):
        want = nats_of_mean(nats_by_order(name, steps))
        assert (all_orders_nats(network(name), SOME, steps)-want).abs().max()<1e-9
    assert (nats_of_mean(nats_by_order(name))-nats_of_mean(nats_by_order(name, 2))).abs().max()>.01

@pytest.mark.parametrize('name', ['toy', 'timed'])
def test_the_sum_over_all_texts_and_orders_is_one(name):
    for steps in (None, 2): assert_sums_to_one(-all_orders_nats(network(name), X, steps))

def masked_bound(name, x):
    """Bound of masked diffusion: the sum over all sets of masks of w*sum(-log p(x_i | x without the set))

    The weight w of a set of k masks is (k-1)! (L-k)!/L!. No time and no order occurs in it.
    """
    p,total = all_probs(name),0.
    for k in range(1, L+1):
        weight = math.factorial(k-1)*math.factorial(L-k)/math.factorial(L)
        for masks in combinations(range(L), k):
            q = p[tuple(V if i in masks else a for i,a in enumerate(x))]
            total -= weight*sum(math.log(q[i][x[i]]) for i in masks)
    return total

@with_and_without_time
def test_the_mean_over_orders_is_the_bound_of_masked_diffusion(name):
    want = float64([masked_bound(name, x) for x in SOME.tolist()])
    assert (nats_by_order(name).mean(0)-want).abs().max()<1e-9
    assert (torch.stack([-log_prob(network(name), SOME, o) for o in ORDERS]).mean(0)-want).abs().max()<1e-9
    assert (all_orders_nats(network(name), SOME)<want-1e-3).all()

def random_order_nats(name, steps, seed):
    return order_nats(network(name), SOME[:2], 2400, steps, seed, bs=4096)

def which_order(nats, values):
    "Number of the order that each of some nats belongs to, where all orders give different values"
    assert values.diff().min()>1e-6, 'orders cannot be told apart'
    distance = (nats[:,None]-values).abs()
    assert distance.min(1).values.max()<1e-9
    return distance.argmin(1).numpy()

@with_and_without_time
@pytest.mark.parametrize('steps, n_different', [(None, 24), (2, 6)])
def test_random_orders(name, steps, n_different):
    "Each order comes equally often"
    nats = random_order_nats(name, steps, seed=2 if steps else 1)
    assert nats.shape==(2400, 2)
    assert nats.dtype==torch.float64
    for j in range(2):
        values = nats_by_order(name, steps)[:,j].sort().values[::24//n_different]
        counts = np.bincount(which_order(nats[:,j], values), minlength=n_different)
        assert_fits(counts, np.full(n_different, 1/n_different))

@with_and_without_time
def test_random_orders_of_two_texts_are_independent(name):
    nats,values = random_order_nats(name, 2, seed=2),nats_by_order(name, 2).sort(0).values[::4]
    a,b = (which_order(nats[:,j], values[:,j]) for j in range(2))
    assert_fits(np.bincount(a*6+b, minlength=36), np.full(36, 1/36))

@with_and_without_time
def test_seeds_fix_random_orders(name):
    nats = random_order_nats(name, 2, seed=2)
    assert torch.equal(nats, random_order_nats(name, 2, seed=2))
    assert not torch.equal(nats, random_order_nats(name, 2, seed=3))

def all_means_of_two(nats):
    "Minus the logarithm of the mean probability of every pair of orders, (576, 6)"
    return torch.stack([nats_of_mean(torch.stack([a, b])) for a in nats for b in nats])

def relative_error(got, want): return (got/want-1).abs()

@lru_cache(None)
def many_order_nats(steps): return order_nats(network('toy'), SOME, 4000, steps, seed=4, bs=10_000)

every_step_or_two = pytest.mark.parametrize('steps', [None, 2])

@every_step_or_two
def test_bounds_from_orders(steps):
    "Against their expectations and standard errors: over all orders, and all pairs of orders"
    nats,each = many_order_nats(steps),nats_by_order('toy', steps)
    value = nats_of_mean(each)
    for k,want in ((1, each), (2, all_means_of_two(each))):
        bound = order_bound(nats, k)
        assert ((bound.mean-want.mean(0)).abs()<4*bound.se).all()
        assert (bound.mean>value-4*bound.se).all()
        assert (relative_error(bound.se, want.std(0, unbiased=False)/(len(nats)//k)**.5)<.1).all()
        assert (want.mean(0)>value+6*bound.se).any(), 'the gap is too small to be seen'
    for k in (5, 40):
        bound = order_bound(nats, k)
        assert (bound.mean>value-4*bound.se).all()

@every_step_or_two
def test_estimates_from_orders(steps):
    nats,each = many_order_nats(steps),nats_by_order('toy', steps)
    estimate,p = order_estimate(nats),(-each).exp()
    assert ((estimate.mean-nats_of_mean(each)).abs()<4*estimate.se).all()
    assert (relative_error(estimate.se, p.std(0, unbiased=False)/p.mean(0)/len(nats)**.5)<.1).all()
    assert_same(estimate.mean, nats_of_mean(nats), 1e-12)

@every_step_or_two
def test_probabilities_of_orders_below_the_range_of_float64(steps):
    nats = many_order_nats(steps)
    assert_same(order_estimate(nats+2000).mean, order_estimate(nats).mean+2000)
    assert_same(order_bound(nats+2000, 2).mean, order_bound(nats, 2).mean+2000)

@every_step_or_two
def test_bounds_leave_out_orders_that_fill_no_group(steps):
    nats = many_order_nats(steps)
    assert_same(order_bound(nats[:7], 3).mean, order_bound(nats[:6], 3).mean, 1e-12)

# States

def normalised(e):
    "Vectors with a root mean square of 1"
    return e/((e**2).mean(-1, keepdim=True)+torch.finfo(e.dtype).eps)**.5

def dense_jacobian(y, h):
    "Derivatives of y, (n, D), by h, (n, D), sample by sample, (n, D, D)"
    def row(i): return torch.autograd.grad(y[:,i].sum(), h, retain_graph=True)[0]
    return torch.stack([row(i) for i in range(y.shape[1])], 1)

def noisy_state_nats(m, x, n, seed):
    """Minus the log-density of n noisy states of one sequence, (n,)

    It is -log N(y; mu, s^2) - log |det dy/dh|, with y the output of the backbone and h the noisy state.
    """
    g,D = torch.Generator().manual_seed(seed),2*m.config.d_model
    e = normalised(m.embed.weight.detach()[x])
    noise = .1*torch.randn(n, len(x)*D, generator=g, dtype=torch.float64)
    h = (torch.cat([e, e], -1).flatten()+noise).requires_grad_()
    y = m.backbone(h.view(n, len(x), D))[0].flatten(1)
    J = dense_jacobian(y, h)
    assert (J-torch.eye(y.shape[1])).abs().max()>.1, 'the backbone is the identity'
    mu,log_s = (o.detach().repeat(len(x)) for o in (m.latent.mu, m.latent.log_s))
    normal_nats = .5*((y.detach()-mu)*(-log_s).exp())**2+log_s+.5*math.log(2*math.pi)
    return normal_nats.sum(1)-J.slogdet()[1]

def judge_latent(m, x, want, copies=25, n=40):
    "Compare means and standard errors of `latent_nats` with those of draws (n, B)"
    got = latent_nats(m, x.repeat(copies, 1), n)
    mean,variance = (o.view(copies, len(x)).mean(0) for o in (got.mean, got.se**2))
    se = (variance/copies+want.var(0)/len(want))**.5
    assert ((mean-want.mean(0)).abs()<4*se).all(), 'densities differ'
    assert (relative_error((variance*n)**.5, want.std(0))<.15).all(), 'errors differ'

@lru_cache(None)
def latent_model():
    "A model with a density on its states, without a lattice, and random weights"
    torch.manual_seed(0)
    config = DenoiserConfig(V, seq_len=2, d_model=4, n_heads=2, n_layers=2,
                            lattice_bits=None, latent_density=True, reversible=False)
    return random_weights(BijectiveDenoiser(config).double(), .4).eval()

@lru_cache(None)
def latent_draws():
    "Two sequences, and 1,000 draws of the nats of their noisy states, (1000, 2)"
    x = torch.tensor([[2, 0], [1, 1]])
    return x, torch.stack([noisy_state_nats(latent_model(), row, 1000, 7+i) for i,row in enumerate(x)], 1)

def test_density_of_states(): judge_latent(latent_model(), *latent_draws())

def test_seeds_fix_the_density_of_states():
    "And the mode of the model does not matter"
    m,(x,_) = latent_model(),latent_draws()
    a,c = latent_nats(m, x, 5),latent_nats(m, x, 5, seed=1)
    b = latent_nats(m.train(), x, 5)
    assert m.training
    m.eval()
    assert torch.equal(a.mean, b.mean)
    assert not torch.equal(a.mean, c.mean)

def too_little_noise(noise): return .08
def too_much_noise(noise): return .12
def without_the_scale(forward): return lambda self, y: forward(self, y)-self.log_s.sum(-1)

LATENT_FAULTS = {
    'too little noise': (LATENT_NOISE, too_little_noise),
    'too much noise': (LATENT_NOISE, too_much_noise),
    'the scale is left out': (LATENT_FORWARD, without_the_scale),
}

@pytest.mark.parametrize('name', LATENT_FAULTS)
def test_faults_of_the_density_of_states_are_noticed(name, monkeypatch):
    plant_fault(monkeypatch, *LATENT_FAULTS[name])
    with pytest.raises(AssertionError, match='differ'): judge_latent(latent_model(), *latent_draws())

# Modes, batches, bad input

def log_prob_by(rule): return lambda m, x, **kw: log_prob(m, x, steps=2, **with_rule(rule, **kw))

LIKELIHOODS = {f'log_prob, {rule}': log_prob_by(rule) for rule in EVERY_RULE} | {
    'order_nats': lambda m, x, **kw: order_nats(m, x, 5, **kw),
    'all_orders_nats': lambda m, x, bs=None: all_orders_nats(m, x),
}

def interrupted(*args, **kwargs): raise KeyboardInterrupt

@pytest.mark.parametrize('name', LIKELIHOODS)
def test_mode_and_batches(name, monkeypatch):
    "Dropout does nothing, the mode is kept, also after an error, and any batch size gives the same"
    m,f,x = tiny_denoiser(V, L, dropout=.5),LIKELIHOODS[name],X[::9]
    want = f(m, x)
    assert not m.training
    assert (m.train()(x)-m.eval()(x)).abs().max()>.01
    m.train()
    got = f(m, x)
    assert torch.equal(got, want)
    assert m.training
    assert not want.requires_grad
    m.eval()
    for bs in (1, 7, 64): assert (f(m, x, bs=bs)-want).abs().max()<1e-12
    m.train()
    monkeypatch.setattr(*FEATURES, interrupted)
    with pytest.raises(KeyboardInterrupt): f(m, x)
    assert m.training

@pytest.mark.parametrize('rule', UnmaskingRule.names)
def test_nothing_to_score(rule):
    "Texts of no tokens, and texts that are given"
    m = network('toy')
    assert log_prob(m, X[:2], rule, lengths=[0, 0]).tolist()==[0., 0.]
    assert log_prob(m, X[5:6], rule, template=X[5]).tolist()==[0.]

@pytest.mark.parametrize('rule', UnmaskingRule.names)
def test_arguments_are_not_changed(rule):
    before = X.clone()
    log_prob(network('toy'), X, rule, template=X)
    assert torch.equal(X, before)

@pytest.mark.parametrize('rule', EVERY_RULE)
def test_no_texts(rule):
    assert log_prob(network('toy'), X[:0], rule).shape==(0,)
    assert token_nll(network('toy'), X[:0], rule).shape==(0, L)

# Keywords of log_prob for two sequences, or others, and the argument that the error names
REJECTED_BY_LOG_PROB = {
    'rule': ('rule', dict(rule='best')),
    'twice the same position': ('rule', dict(rule=(0, 1, 1, 2))),
    'position from 1': ('rule', dict(rule=(1, 2, 3, 4))),
    'too few positions': ('rule', dict(rule=(0, 2, 1))),
    'positions of a longer text': ('rule', dict(rule=ORDER, lengths=[4, 3])),
    'steps 0': ('steps', dict(steps=0)),
    'negative steps': ('steps', dict(steps=-1)),
    'steps of a fraction': ('steps', dict(steps=1.5)),
    'steps true': ('steps', dict(steps=True)),
    'rule and steps': ('steps', dict(rule=UnmaskingRule('random'), steps=2)),
    'tokens 0': ('tokens', dict(tokens=0)),
    'steps and tokens': ('steps', dict(steps=2, tokens=3)),
    'top_p 0': ('top_p', dict(top_p=0.)),
    'top_p above 1': ('top_p', dict(top_p=1.01)),
    'top_p nan': ('top_p', dict(top_p=math.nan)),
    'temperature 0': ('temperature', dict(temperature=0)),
    'temperature nan': ('temperature', dict(temperature=math.nan)),
    'block_length 0': ('block_length', dict(rule='block', block_length=0)),
    'unknown schedule': ('schedule', dict(schedule='linear')),
    'a mask': ('x', dict(x=[[0, V, 0, 0]])),
    'negative id': ('x', dict(x=[[0, -1, 0, 0]])),
    'one axis': ('x', dict(x=[0, 1, 2, 0])),
    'too long': ('seq_len', dict(x=[[0]*5])),
    'template disagrees': ('template', dict(template=(V, V, 2, V))),
    'second template disagrees': ('template', dict(template=torch.tensor([[V]*4, [V, V, V, 2]]))),
    'template too short': ('template', dict(template=(V, V))),
    'templates of other texts': ('template', dict(template=torch.full((3, 4), V))),
    'template of too many axes': ('template', dict(template=torch.full((1, 2, 4), V))),
    'lengths too large': ('lengths', dict(lengths=[4, 5])),
    'negative length': ('lengths', dict(lengths=[-1, 2])),
    'too few lengths': ('lengths', dict(lengths=[4])),
}

@pytest.mark.parametrize('name', REJECTED_BY_LOG_PROB)
def test_log_prob_rejects_bad_input(name):
    argument,kw = REJECTED_BY_LOG_PROB[name]
    kw = dict(kw, x=torch.as_tensor(kw.get('x', X[:2])))
    with pytest.raises(ValueError, match=rf'\b{argument}\b'): log_prob(network('toy'), **kw)

@pytest.mark.parametrize('name', LIKELIHOODS)
def test_other_noise_than_masking_is_an_error(name):
    hybrid = tiny_denoiser(V, L, noise=Corruption(V, 1, 1))
    with pytest.raises(ValueError, match='noise'): LIKELIHOODS[name](hybrid, X[:2])

MASKS,THIRTEEN = torch.full((1, 4), V),torch.zeros(1, 13, dtype=torch.long)
REJECTED = {
    'too long for all orders': ('12', lambda: all_orders_nats(tiny_denoiser(V, 13), THIRTEEN)),
    'all orders of a mask': ('x', lambda: all_orders_nats(network('toy'), MASKS)),
    'all orders in no steps': ('steps', lambda: all_orders_nats(network('toy'), X[:1], 0)),
    'no orders': ('n', lambda: order_nats(network('toy'), X[:1], 0)),
    'orders in no steps': ('steps', lambda: order_nats(network('toy'), X[:1], 2, 0)),
    'k 0': ('k', lambda: order_bound(torch.zeros(4, 1), 0)),
    'k more than half': ('k', lambda: order_bound(torch.zeros(5, 1), 3)),
    'one order': ('k', lambda: order_bound(torch.zeros(1, 1))),
    'estimate of one order': ('orders', lambda: order_estimate(torch.zeros(1, 1))),
    'no latent density': ('latent_density', lambda: latent_nats(network('toy'), X[:1])),
    'one draw of a density': ('n', lambda: latent_nats(latent_model(), X[:1,:2], 1)),
    'density of a mask': ('x', lambda: latent_nats(latent_model(), MASKS[:,:2])),
}

@pytest.mark.parametrize('name', REJECTED)
def test_bad_input_is_an_error(name):
    argument,f = REJECTED[name]
    with pytest.raises(ValueError, match=rf'\b{argument}\b'): f()
