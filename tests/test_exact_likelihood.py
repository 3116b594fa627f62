"""Exact likelihoods of unmasking rules: sums over all texts, a slow implementation in plain Python, 200,000 samples of each rule, and all orders one by one."""
import hashlib, math
from functools import lru_cache
from itertools import combinations, permutations, product
import numpy as np, pytest, torch
from torch.nn.functional import pad
from chi_square import chi_square
from bijdiff.likelihood import exact as likelihood
from bijdiff.sampling import rules
from bijdiff.diffusion.schedules import Cosine, HalfCosine, Polynomial
from bijdiff.diffusion.corruption import Corruption
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser, LatentDensity
from bijdiff.sampling.rules import UnmaskingRule
from bijdiff.sampling.generate import sample
from bijdiff.likelihood.exact import all_orders_nats, latent_nats, log_prob, order_bound, order_estimate
from bijdiff.likelihood.exact import order_nats, token_nll

V,L,N = 3,4,200_000                                                                        # tokens 0, 1, 2, the mask is 3
TESTS = 60                                                                                 # chi-square tests in this file, at most
ORDER = (3, 1, 0, 2)
EVERY_RULE = (*UnmaskingRule.names, ORDER)
X = torch.tensor(list(product(range(V), repeat=L)))                                        # all texts
real = {k:getattr(rules, k) for k in ('token_probs', 'confidence', 'reveal_ranks', 'reveal_counts', 'conditional_probs')}

class Toy(BijectiveDenoiser):
    "A network whose answers are random numbers, one for each text it can be asked about, and move with time if it is told it"
    def __init__(self, seed, noise=None, rows=None, **kw):
        super().__init__(DenoiserConfig(V, seq_len=L, d_model=2, n_heads=1, n_layers=1, noise=noise and noise.to_dict(), **kw))
        g = torch.Generator().manual_seed(seed)
        self.table = 1.5*torch.randn(2, (V+2)**L, L, V, generator=g, dtype=torch.float64)
        if rows is not None: self.table = torch.tensor(rows, dtype=torch.float64)[torch.randint(0, len(rows), self.table.shape[:3], generator=g)]
        self.double().eval()
    def forward(self, xt, t=None, mask=None):
        code = pad(xt if mask is None else torch.where(mask, xt, V+1), (0, L-xt.shape[1]), value=V+1)@(V+2)**torch.arange(L)
        out = self.table[0][code]
        if self.config.time_conditioning: out = out+2*t.double()[:,None,None]*self.table[1][code]
        return out[:,:xt.shape[1]]

def real_network(seed=0, std=.5, seq_len=L, vocab=V, d_model=8, **kw):
    "Random weights"
    torch.manual_seed(seed)
    m = BijectiveDenoiser(DenoiserConfig(vocab, seq_len=seq_len, d_model=d_model, n_heads=2, n_layers=2, **kw)).double()
    for p in m.parameters(): torch.nn.init.normal_(p, std=std)
    return m.eval()

@lru_cache(None)
def network(name):
    "Seeds by which all rules differ clearly"
    return dict(toy=lambda: Toy(30), network=lambda: real_network(15), timed=lambda: Toy(25, Corruption(V, schedule=HalfCosine(.01)), time_conditioning=True),
                ties=lambda: Toy(0, rows=[[0., 0., 0.], [2., 0., 1.], [0., 0., 2.5]]))[name]()

# A slow implementation: lists, tuples and math, from the network's answers alone
@lru_cache(None)
def answers(name, n=L):
    "Logits for every text of n tokens and masks, (n, V); a longer text is cut off"
    m,Z = network(name),list(product(range(V+1), repeat=n))
    def t(z): return 2/math.pi*math.acos(min(max((1-z.count(V)/n-.01)/.99, 0), 1))              # alpha = .01+.99 cos(pi/2 t) is what is seen
    text = torch.arange(L).expand(len(Z), -1)<n
    with torch.no_grad(): out = m(pad(torch.tensor(Z).view(len(Z), n), (0, L-n)), torch.tensor([t(z) for z in Z], dtype=torch.float64) if name=='timed' else None, None if n==L else text)
    return dict(zip(Z, out[:,:n].numpy()))

def tilt(o, temperature, top_p):
    "Softmax, and of it the most probable until `top_p` is reached"
    p = np.exp(o/temperature)
    p /= p.sum(-1, keepdims=True)
    for q in p:
        total = 0.
        for i in np.argsort(-q, kind='stable'):
            if total>=top_p and top_p<1: q[i] = 0
            else: total += q[i]
    return (p/p.sum(-1, keepdims=True)).tolist()
@lru_cache(None)
def tables(name, temperature=1., top_p=1., n=L): return {z:tilt(o, temperature, top_p) for z,o in answers(name, n).items()}

SHAPES = {Cosine:lambda u: 1-math.cos(math.pi/2*u), Polynomial:lambda u: 1-(1-u)**3}             # share that is seen after a share u of the steps
def slow_counts(n, steps=None, schedule=None):
    if steps is None: return [1]*n
    if schedule is None: return [n*(i+1)//steps-n*i//steps for i in range(steps)]
    steps = min(steps, n)
    done = [i+math.floor((n-steps)*SHAPES[type(schedule)](i/steps)+.500001) for i in range(steps+1)]             # half is rounded up
    return [b-a for a,b in zip(done, done[1:])]

def van_der_corput(i): return sum((i>>k&1)/2**(k+1) for k in range(20))
def slow_order(rule, n, seed): return list(rule) if isinstance(rule, tuple) else sorted(range(n), key=van_der_corput) if rule=='spread' else sorted(range(n), key=lambda i: hashlib.sha256(f'{seed} {n} {i}'.encode()).digest())
def line(rule, i, p, n, seed, block):
    "What a mask is sorted by, smallest first; the leftmost of equals"
    if rule=='left_to_right': return (i,)
    if rule=='entropy': return (-sum(a*math.log(a) for a in p if a>0), i)
    if rule=='confidence': return (-max(p), i)
    if rule=='block': return (i//block, -max(p), i)
    return (slow_order(rule, n, seed).index(i),)

def slow(name, x, rule, steps=None, seed=0, template=None, temperature=1., top_p=1., schedule=None, block_length=2):
    "log p(x), and minus the log-probability of each token"
    n,p = len(x),tables(name, temperature, top_p, len(x))
    z,nats = list(template or [V]*n),[0.]*n
    for c in slow_counts(z.count(V), steps, schedule):
        q = p[tuple(z)]
        now = sorted((i for i in range(n) if z[i]==V), key=lambda i: line(rule, i, q[i], n, seed, block_length))[:c]
        for i in now: z[i],nats[i] = x[i],-math.log(q[i][x[i]]) if q[i][x[i]] else math.inf
    assert tuple(z)==tuple(x)
    return -sum(nats), nats
def slow_all(name, x=X, **kw): return torch.tensor([slow(name, o, **kw)[0] for o in x.tolist()], dtype=torch.float64)

def same(a, b, eps=1e-9):
    "Equal up to rounding, infinities included"
    assert a.shape==b.shape and torch.equal(a.isinf(), b.isinf()), 'infinities'
    assert (a-b)[~a.isinf()].abs().max()<eps, 'log-probabilities differ'
def sums_to_one(logp): assert abs(logp.exp().sum().item()-1)<1e-9, 'the sum is not 1'

# Sums over all texts, and the slow implementation
def of_rule(rule, **kw): return dict(rule=rule, **kw, **{k:2 for k in ('block_length',) if rule=='block'})
SETTINGS = {'plain':{}, 'cold':dict(temperature=.6), 'top-p':dict(top_p=.8), 'hot, top-p':dict(temperature=1.7, top_p=.6), 'prompt':dict(template=(1, 2, V, V)), 'infill':dict(template=(V, V, 0, V), temperature=.8),
            'cosine':dict(schedule=Cosine()), 'cubic':dict(schedule=Polynomial(3.)), 'all':dict(template=(V, 1, V, V), temperature=1.3, top_p=.85, schedule=Polynomial(3.), seed=5)}
def fitting(template=None): return X if template is None else X[torch.tensor([all(a in (b, V) for a,b in zip(template, x)) for x in X.tolist()])]

@lru_cache(None)
def exact(name, setting):
    "log_prob of all texts, by rule and steps"
    kw = SETTINGS[setting]
    return {(rule, steps):log_prob(network(name), fitting(kw.get('template')), steps=steps, bs=512, **of_rule(rule, **kw)) for rule in EVERY_RULE for steps in (None, 1, 2, 3, 4)}
asked = pytest.mark.parametrize('name, setting', [(n, s) for n in ('toy', 'network', 'timed', 'ties') for s in SETTINGS if n in ('toy', 'network') or s in ('plain', 'top-p', 'infill', 'all')])

@asked
def test_the_sum_over_all_texts_is_one(name, setting):
    for logp in exact(name, setting).values():
        assert logp.dtype==torch.float64 and len(logp)==len(fitting(SETTINGS[setting].get('template')))
        sums_to_one(logp)

@asked
def test_agrees_with_the_slow_implementation(name, setting):
    kw = SETTINGS[setting]
    for (rule,steps),logp in exact(name, setting).items(): same(logp, slow_all(name, fitting(kw.get('template')), steps=steps, **of_rule(rule, **kw)))

def test_rules_and_settings_differ():
    "Else the comparisons above could not tell them apart"
    for name in ('toy', 'network', 'timed'):
        e = exact(name, 'plain')
        for a,b in combinations(EVERY_RULE, 2): assert .5*(e[a,None].exp()-e[b,None].exp()).abs().sum()>.01, (a, b)
        for rule in EVERY_RULE: assert torch.equal(e[rule,None], e[rule,4]) and all((e[rule,i]-e[rule,j]).abs().max()>.01 for i,j in combinations((1, 2, 3, 4), 2))
    assert any(o.isinf().any() and o.isfinite().any() for o in exact('toy', 'top-p').values())
    a,b = (slow_all('toy', rule='random', seed=s) for s in (0, 1))
    assert (a-b).abs().max()>.1
    same(log_prob(network('toy'), X, 'random', seed=1), b)
    for block in (1, 3): same(log_prob(network('toy'), X, 'block', 2, block_length=block), slow_all('toy', rule='block', steps=2, block_length=block))
    same(log_prob(network('toy'), X, 'block', block_length=1), exact('toy', 'plain')['left_to_right',None], 1e-12)
    same(log_prob(network('toy'), X, 'block', block_length=4), exact('toy', 'plain')['confidence',None], 1e-12)

def test_tokens_a_pass():
    "Two tokens a pass are two passes of four tokens; of three tokens the last one has a pass of its own"
    m,given = network('toy'),(1, V, V, V)
    for rule in EVERY_RULE:
        same(log_prob(m, X, tokens=2, **of_rule(rule)), log_prob(m, X, steps=2, **of_rule(rule)))
        sums_to_one(p := log_prob(m, fitting(given), template=given, tokens=2, **of_rule(rule)))
        assert (p-log_prob(m, fitting(given), template=given, steps=2, **of_rule(rule))).abs().max()>.01 and rules.reveal_counts(3, tokens=2)==[2, 1]
    with pytest.raises(ValueError, match='tokens is 0'): log_prob(m, X, tokens=0)
    with pytest.raises(ValueError, match='steps is 2 and tokens is 3'): log_prob(m, X, steps=2, tokens=3)

@pytest.mark.parametrize('name', ['toy', 'network', 'timed'])
def test_shorter_texts(name):
    "Texts of 0 to 4 tokens in one batch, with anything behind their ends"
    texts = [x for n in range(L+1) for x in product(range(V), repeat=n)]                           # the first has no tokens
    lengths = torch.tensor([len(o) for o in texts])
    padded = torch.randint(0, V, (len(texts), L), generator=torch.Generator().manual_seed(3))
    for row,x in zip(padded, texts): row[:len(x)] = torch.tensor(x)
    for rule,steps,kw in product(UnmaskingRule.names, (None, 2), ({}, dict(temperature=.7, top_p=.9))):
        logp = log_prob(network(name), padded, steps=steps, lengths=lengths, bs=50, **of_rule(rule, **kw))
        for n in range(L+1): sums_to_one(logp[lengths==n])
        same(logp[1:], torch.tensor([slow(name, x, steps=steps, **of_rule(rule, **kw))[0] for x in texts[1:]], dtype=torch.float64))
    if name=='network':                                                                            # alone it says the same
        for rule in UnmaskingRule.names: same(log_prob(network(name), padded[lengths==2], rule, lengths=[2]*9), log_prob(network(name), padded[lengths==2][:,:2], rule))

def test_nats_of_each_token():
    for rule in EVERY_RULE:
        for kw in ({}, dict(template=(V, 2, V, V), temperature=.8)):
            x = fitting(kw.get('template'))[5:25]
            got = token_nll(network('toy'), x, steps=2, **of_rule(rule, **kw))
            assert (got-torch.tensor([slow('toy', o, steps=2, **of_rule(rule, **kw))[1] for o in x.tolist()], dtype=torch.float64)).abs().max()<1e-12
            if 'template' in kw: assert not got[:,1].any()
    rows = torch.tensor([(0, V, V, 1), (V, V, V, V), (2, 1, 0, 0)])                                # a template of each text
    x = torch.tensor([(0, 1, 2, 1), (2, 2, 0, 1), (2, 1, 0, 0)])
    for rule in EVERY_RULE: same(log_prob(network('toy'), x, template=rows, **of_rule(rule)), torch.tensor([slow('toy', a, template=b, **of_rule(rule))[0] for a,b in zip(x.tolist(), rows.tolist())], dtype=torch.float64), 1e-12)

# Samples
def judge(counts, p):
    value = chi_square(counts, p)
    assert value>1e-3/TESTS, f'p-value {value:.1e}'

def written(rule, steps=None, n=N, name='toy', template=None, seed=1, **kw):
    "How often each text is written"
    if rule=='block': kw,rule,steps = {},UnmaskingRule(rule, steps, seed, block_length=2, **kw),None
    x = sample(network(name), n, steps, rule=rule, seed=seed, template=template and torch.tensor(template), **kw)
    assert x.shape==(n, L) and (x<V).all() and all((x[:,i]==o).all() for i,o in enumerate(template or ()) if o<V), 'what is given stays'
    return np.bincount((x@V**torch.arange(L).flip(0)).numpy(), minlength=len(X))
def probabilities(rule, steps=None, name='toy', seed=1, f=None, **kw):
    "By the slow implementation, or by another"
    x = fitting(kw.get('template'))
    p = np.zeros(len(X))
    p[x@V**torch.arange(L).flip(0)] = (f or (lambda x, **kw: slow_all(name, x, **kw)))(x, steps=steps, seed=seed, **of_rule(rule, **kw)).exp()
    return p
def by_log_prob(x, **kw): return log_prob(network('toy'), x, **kw)

around = dict(template=(V, 1, V, V), temperature=1.4, top_p=.9)
SAMPLED = {f'{rule}, {steps or 4} steps{", around a letter"*bool(kw)}':(rule, steps, kw) for rule in EVERY_RULE for steps,kw in ((None, {}), (2, {}), (2, around)) if not kw or rule in ('random', 'block', 'confidence')}
SAMPLED |= {'confidence, cubic':('confidence', 2, dict(schedule=Polynomial(3.))), 'random, cold, top-p':('random', None, dict(temperature=.6, top_p=.8)), 'confidence, cold, top-p':('confidence', None, dict(temperature=.6, top_p=.8)), 'entropy, told the time':('entropy', 2, dict(name='timed')), 'confidence, ties':('confidence', 2, dict(name='ties'))}
@pytest.mark.parametrize('name', SAMPLED)
def test_samples(name):
    rule,steps,kw = SAMPLED[name]
    judge(written(rule, steps, **kw), probabilities(rule, steps, **kw))

# Faults
def of_drawn_tokens(p, rule): return p.gather(-1, torch.multinomial(p, 1))[...,0]
def warm(o, temperature=1., top_p=1.): return real['token_probs'](o, 1.1*temperature, top_p)
def without_top_p(o, temperature=1., top_p=1.): return real['token_probs'](o, temperature)
def backwards(masked, order_keys, sure=None): return real['reveal_ranks'](masked, -order_keys if sure is None else order_keys, None if sure is None else -sure)
def rightmost(masked, order_keys, sure=None): return real['reveal_ranks'](masked.flip(1), order_keys.flip(1), sure.flip(1)).flip(1)
def few_first(n, steps=None, schedule=None, tokens=1): return [1]*(steps-1)+[n-steps+1]
# in the sampler alone
IN_THE_SAMPLER = {'certainty of the drawn token':('confidence', of_drawn_tokens, 'confidence', None, {}), 'certainty of another rule':('confidence', lambda p, rule: real['confidence'](p, 'confidence'), 'entropy', None, {}),
    **{f'too warm, {rule}':('token_probs', warm, rule, 2, {}) for rule in ('left_to_right', 'confidence')}, 'top-p left out':('token_probs', without_top_p, 'random', None, dict(top_p=.8)),
    **{f'backwards, {rule}':('reveal_ranks', backwards, rule, None, {}) for rule in ('left_to_right', 'confidence', 'entropy', 'block')}, 'rightmost of equals':('reveal_ranks', rightmost, 'confidence', None, dict(name='ties')),
    **{f'other counts, {rule}':('reveal_counts', few_first, rule, 2, {}) for rule in ('random', 'confidence')}}
@pytest.mark.parametrize('name', IN_THE_SAMPLER)
def test_the_chi_square_refuses(name, monkeypatch):
    what,fault,rule,steps,kw = IN_THE_SAMPLER[name]
    p = probabilities(rule, steps, **kw)
    judge(written(rule, steps, N//4, **kw), p)
    monkeypatch.setattr(rules, what, fault)
    with pytest.raises(AssertionError, match='p-value|impossible'): judge(written(rule, steps, N//4, **kw), p)

def test_the_chi_square_refuses_other_rules():
    for rule in ('random', 'confidence'):
        counts = written(rule, None, N//4)
        judge(counts, probabilities(rule, f=by_log_prob))
        for o in EVERY_RULE:
            if o==rule: continue
            with pytest.raises(AssertionError, match='p-value'): judge(counts, probabilities(o, f=by_log_prob))
        for other in (dict(steps=2), dict(seed=2), dict(temperature=1.1), dict(top_p=.9)):
            if rule=='confidence' and 'seed' in other: continue
            with pytest.raises(AssertionError, match='p-value|impossible'): judge(counts, probabilities(rule, f=by_log_prob, **other))

def forgetful(model, x, where, rule, lengths):
    "One token too many is hidden"
    seen = x<V
    return real['conditional_probs'](model, x.masked_fill(seen&(seen.cumsum(1)==1), V), where, rule, lengths)
def one_step_late(masked, order_keys, sure=None): return real['reveal_ranks'](masked, order_keys, sure).clamp(min=1)
# in the likelihood alone
IN_THE_LIKELIHOOD = {**{f'top-p left out, {rule}':(rules, 'token_probs', without_top_p, rule, None, dict(top_p=.8)) for rule in ('left_to_right', 'confidence')}, 'one token too many hidden':(likelihood, 'conditional_probs', forgetful, 'random', None, {}),
    'one token too few in a step':(likelihood, 'reveal_ranks', one_step_late, 'left_to_right', None, {}), 'other counts':(likelihood, 'reveal_counts', few_first, 'random', 2, {}), 'too warm':(rules, 'token_probs', warm, 'entropy', 2, {})}
@pytest.mark.parametrize('name', IN_THE_LIKELIHOOD)
def test_faults_of_the_likelihood_are_refused(name, monkeypatch):
    "Their sum is 1 nevertheless: by the samples, and by the slow implementation"
    module,what,fault,rule,steps,kw = IN_THE_LIKELIHOOD[name]
    counts = written(rule, steps, N//4, **kw)
    judge(counts, probabilities(rule, steps, f=by_log_prob, **kw))
    monkeypatch.setattr(module, what, fault)
    p = probabilities(rule, steps, f=by_log_prob, **kw)
    assert abs(p.sum()-1)<1e-9
    with pytest.raises(AssertionError, match='p-value|impossible'): judge(counts, p)
    with pytest.raises(AssertionError, match='differ|infinities'): same(by_log_prob(X, steps=steps, **of_rule(rule, **kw)), slow_all('toy', steps=steps, **of_rule(rule, **kw)))

def test_the_sum_refuses(monkeypatch):
    "A rule that peeks at the text, certainties by chance, top-p that is not normalised, a token that is not counted"
    m = network('toy')
    def total(rule='confidence', **kw): return sums_to_one(log_prob(m, X, rule, bs=1, **kw))
    total()
    where,seen = [],iter(())
    def note(model, x, w, rule, lengths):
        "Certainty of the letter that stands there: the text is known, as the texts come one by one"
        if not (x<V).any(): where[:] = [next(seen)]
        where[1:] = [w]
        return real['conditional_probs'](model, x, w, rule, lengths)
    with monkeypatch.context() as mp:
        seen = iter(X)
        mp.setattr(rules, 'conditional_probs', note)
        total()
        seen = iter(X)
        mp.setattr(rules, 'confidence', lambda p, rule: p.gather(-1, where[0][where[1][0]][:,None])[:,0])
        with pytest.raises(AssertionError, match='the sum is not 1'): total()
    for what,fault,kw in (('confidence', of_drawn_tokens, {}), ('token_probs', lambda o, temperature, top_p: torch.where(real['token_probs'](o, temperature, top_p)>0, real['token_probs'](o, temperature), 0.), dict(top_p=.8))):
        total(**kw)
        with monkeypatch.context() as mp:
            mp.setattr(rules, what, fault)
            with pytest.raises(AssertionError, match='the sum is not 1'): total(**kw)
    monkeypatch.setattr(likelihood, 'reveal_counts', lambda *a: real['reveal_counts'](*a)[:-1])
    with pytest.raises(AssertionError, match='the sum is not 1'): total('random')

# Orders
ORDERS = list(permutations(range(L)))
SOME = X[[0, 7, 22, 40, 53, 80]]
@lru_cache(None)
def by_order(name, steps=None): return torch.tensor([[-slow(name, x, o, steps)[0] for x in SOME.tolist()] for o in ORDERS], dtype=torch.float64)       # (24, 6)
def mean_of(nats): return math.log(len(nats))-(-nats).logsumexp(0)                              # minus the log of the mean probability
timed_too = pytest.mark.parametrize('name', ['toy', 'network', 'timed'])

@timed_too
def test_all_orders(name):
    for steps in (None, 1, 2, 3, 9):
        assert (all_orders_nats(network(name), SOME, steps)-mean_of(by_order(name, steps))).abs().max()<1e-9
        if steps in (None, 2) and name!='network': sums_to_one(-all_orders_nats(network(name), X, steps))
    assert (mean_of(by_order(name))-mean_of(by_order(name, 2))).abs().max()>.01

@timed_too
def test_the_mean_over_orders_is_the_bound_of_masked_diffusion(name):
    "Each set of k masks weighs (k-1)! (L-k)!/L!: no time, no orders"
    p = tables(name)
    def bound(x):
        total = 0.
        for k in range(1, L+1):
            for masks in combinations(range(L), k):
                q = p[tuple(V if i in masks else v for i,v in enumerate(x))]
                total -= math.factorial(k-1)*math.factorial(L-k)/math.factorial(L)*sum(math.log(q[i][x[i]]) for i in masks)
        return total
    want = torch.tensor([bound(x) for x in SOME.tolist()], dtype=torch.float64)
    assert (by_order(name).mean(0)-want).abs().max()<1e-9
    assert (torch.stack([-log_prob(network(name), SOME, o) for o in ORDERS]).mean(0)-want).abs().max()<1e-9
    assert (all_orders_nats(network(name), SOME)<want-1e-3).all()

@timed_too
def test_random_orders(name):
    "Each order comes equally often, independently for each text"
    nats = order_nats(network(name), SOME[:2], 2400, seed=1, bs=4096)
    assert nats.shape==(2400, 2) and nats.dtype==torch.float64
    for steps,n in ((None, 24), (2, 6)):
        if steps: nats = order_nats(network(name), SOME[:2], 2400, steps, seed=2, bs=4096)
        which = []
        for j in range(2):
            values = by_order(name, steps)[:,j].sort().values[::24//n]
            assert values.diff().min()>1e-6, 'orders can be told apart'
            off = (nats[:,j,None]-values).abs()
            assert off.min(1).values.max()<1e-9
            which.append(off.argmin(1).numpy())
            judge(np.bincount(which[-1], minlength=n), np.full(n, 1/n))
        if steps: judge(np.bincount(which[0]*n+which[1], minlength=n*n), np.full(n*n, 1/n**2))
    assert torch.equal(nats, order_nats(network(name), SOME[:2], 2400, 2, seed=2, bs=4096)) and not torch.equal(nats, order_nats(network(name), SOME[:2], 2400, 2, seed=3, bs=4096))

@pytest.mark.parametrize('steps', [None, 2])
def test_bounds_and_estimates_from_orders(steps):
    "Against their expectations and standard errors: over all orders, and all pairs of orders"
    n,each = 4000,by_order('toy', steps)
    nats,value = order_nats(network('toy'), SOME, n, steps, seed=4, bs=10_000),mean_of(each)
    pairs = torch.stack([math.log(2)-(-torch.stack([a, b])).logsumexp(0) for a in each for b in each])
    for k,want in ((1, each), (2, pairs)):
        b = order_bound(nats, k)
        assert ((b.mean-want.mean(0)).abs()<4*b.se).all() and (b.mean>value-4*b.se).all()
        assert ((b.se/(want.std(0, unbiased=False)/(n//k)**.5)-1).abs()<.1).all()
        assert (want.mean(0)>value+6*b.se).any(), 'the gap can be seen'
    for k in (5, 40): assert (order_bound(nats, k).mean>value-4*order_bound(nats, k).se).all()
    est,p = order_estimate(nats),(-each).exp()
    assert ((est.mean-value).abs()<4*est.se).all() and ((est.se/(p.std(0, unbiased=False)/p.mean(0)/n**.5)-1).abs()<.1).all()
    same(est.mean, math.log(n)-(-nats).logsumexp(0), 1e-12)
    far = order_estimate(nats+2000)                                                                # probabilities below what float64 can express
    same(far.mean, est.mean+2000)
    same(order_bound(nats+2000, 2).mean, order_bound(nats, 2).mean+2000)
    same(order_bound(nats[:7], 3).mean, order_bound(nats[:6], 3).mean, 1e-12)                      # what is left over is left out

# States
def own_latent(m, x, n, seed):
    "Minus the log-density of noisy states, n draws: a normal distribution behind the backbone, and a dense Jacobian"
    g,D = torch.Generator().manual_seed(seed),2*m.config.d_model
    e = m.embed.weight.detach()[x]
    e = e/((e**2).mean(-1, keepdim=True)+torch.finfo(e.dtype).eps)**.5
    h = torch.cat([e, e], -1).flatten()+.1*torch.randn(n, len(x)*D, generator=g, dtype=torch.float64)
    h.requires_grad_()
    y = m.backbone(h.view(n, len(x), D))[0].flatten(1)
    J = torch.stack([torch.autograd.grad(y[:,i].sum(), h, retain_graph=True)[0] for i in range(y.shape[1])], 1)
    mu,log_s = (o.detach().repeat(len(x)) for o in (m.latent.mu, m.latent.log_s))
    assert (J-torch.eye(y.shape[1])).abs().max()>.1, 'no identity'
    return (.5*((y.detach()-mu)*(-log_s).exp())**2+log_s+.5*math.log(2*math.pi)).sum(1)-J.slogdet()[1]
def judge_latent(m, x, want, copies=25, n=40):
    got = latent_nats(m, x.repeat(copies, 1), n)
    mean,var = (o.view(copies, len(x)).mean(0) for o in (got.mean, got.se**2))
    assert ((mean-want.mean(0)).abs()<4*(var/copies+want.var(0)/len(want))**.5).all(), 'densities differ'
    assert (((var*n)**.5/want.std(0)-1).abs()<.15).all(), 'errors differ'
def test_density_of_states(monkeypatch):
    m = real_network(std=.4, seq_len=2, d_model=4, lattice_bits=None, latent_density=True, reversible=False)
    x = torch.tensor([[2, 0], [1, 1]])
    want = torch.stack([own_latent(m, o, 1000, 7+i) for i,o in enumerate(x)], 1)
    judge_latent(m, x, want)
    a,b,c = latent_nats(m, x, 5), latent_nats(m.train(), x, 5), latent_nats(m, x, 5, seed=1)
    assert m.training and torch.equal(a.mean, b.mean) and not torch.equal(a.mean, c.mean)
    for what,fault in (('noise', .08), ('noise', .12), ('forward', lambda self, y, f=LatentDensity.forward: f(self, y)-self.log_s.sum(-1))):
        with monkeypatch.context() as mp:
            mp.setattr(LatentDensity, what, fault)
            with pytest.raises(AssertionError, match='differ'): judge_latent(m.eval(), x, want)

# Modes, batches, bad input
EVERYTHING = {**{f'log_prob, {rule}':lambda m, x, rule=rule, **kw: log_prob(m, x, steps=2, **of_rule(rule, **kw)) for rule in EVERY_RULE}, 'order_nats':lambda m, x, **kw: order_nats(m, x, 5, **kw), 'all_orders_nats':lambda m, x, bs=None: all_orders_nats(m, x)}
@pytest.mark.parametrize('name', EVERYTHING)
def test_mode_and_batches(name, monkeypatch):
    "Dropout does nothing, the mode is as it was, also after an error; any batch size gives the same"
    m,f = real_network(dropout=.5),EVERYTHING[name]
    x = X[::9]
    want = f(m, x)
    assert not m.training and (m.train()(x)-m.eval()(x)).abs().max()>.01
    m.train()
    assert torch.equal(f(m, x), want) and m.training and not want.requires_grad
    m.eval()
    for bs in (1, 7, 64): assert (f(m, x, bs=bs)-want).abs().max()<1e-12
    def broken(*a, **kw): raise KeyboardInterrupt
    m.train()
    for module in (rules, likelihood): monkeypatch.setattr(module, 'conditional_probs', broken)
    with pytest.raises(KeyboardInterrupt): f(m, x)
    assert m.training

def test_nothing_at_all():
    "Texts of no tokens, and texts that are given"
    m = network('toy')
    for rule in UnmaskingRule.names:
        assert log_prob(m, X[:2], rule, lengths=[0, 0]).tolist()==[0., 0.]
        assert log_prob(m, X[5:6], rule, template=X[5]).tolist()==[0.]
        before = X.clone()
        log_prob(m, X, rule, template=X)
        assert torch.equal(X, before)

@pytest.mark.parametrize('rule', EVERY_RULE)
def test_no_texts(rule): assert log_prob(network('toy'), X[:0], rule).shape==(0,) and token_nll(network('toy'), X[:0], rule).shape==(0, L)

def score(x=X[:2], *a, **kw): return lambda: log_prob(network('toy'), torch.as_tensor(x), *a, **kw)
hybrid = lru_cache(None)(lambda: real_network(noise=Corruption(V, 1, 1).to_dict(), time_conditioning=True))
BAD = {'rule':(score(rule='best'), "rule is 'best'"), 'steps 0':(score(steps=0), 'steps is 0'), 'negative steps':(score(steps=-1), 'steps is -1'), 'steps of a fraction':(score(steps=1.5), 'steps is 1.5'), 'steps true':(score(steps=True), 'steps is True'),
       'twice the same position':(score(rule=(0, 1, 1, 2)), 'expected each of the positions 0 to 3 once'), 'position from 1':(score(rule=(1, 2, 3, 4)), 'expected each of the positions'), 'too few positions':(score(rule=(0, 2, 1)), 'the rule orders 3 positions, but the text has 4 tokens'), 'positions of a longer text':(score(rule=ORDER, lengths=[4, 3]), 'the text has 3 tokens'),
       'top_p 0':(score(top_p=0.), 'top_p is 0'), 'top_p above 1':(score(top_p=1.01), 'top_p is 1.01'), 'top_p nan':(score(top_p=math.nan), 'top_p is nan'), 'temperature 0':(score(temperature=0), 'temperature is 0'), 'temperature nan':(score(temperature=math.nan), 'temperature is nan'), 'block_length 0':(score(rule='block', block_length=0), 'block_length is 0'), 'schedule that there is not':(score(schedule='linear'), "schedule is 'linear'"),
       'a mask':(score([[0, V, 0, 0]]), 'ids from 0 to 3; expected 0 to 2'), 'negative id':(score([[0, -1, 0, 0]]), 'ids from -1'), 'one axis':(score([0, 1, 2, 0]), 'x has shape'), 'too long':(score([[0]*5]), 'the texts have 5 tokens; the model takes at most seq_len=4'),
       'template disagrees':(score(template=(V, V, 2, V)), r'x differs from the template at position \[0, 2\]'), 'template disagrees behind':(score(template=torch.tensor([[V]*4, [V, V, V, 2]])), r'position \[1, 3\]'), 'template too short':(score(template=(V, V)), r'template has shape \(2,\)'), 'templates of other texts':(score(template=torch.full((3, 4), V)), r'template has shape \(3, 4\)'), 'template of too many axes':(score(template=torch.full((1, 2, 4), V)), 'template has shape'),
       'lengths too large':(score(lengths=[4, 5]), 'lengths is'), 'negative length':(score(lengths=[-1, 2]), 'lengths is'), 'too few lengths':(score(lengths=[4]), 'expected 2 whole numbers'), 'rule and steps':(score(rule=UnmaskingRule('random'), steps=2), 'given beside an UnmaskingRule'),
       **{f'hybrid noise, {k}':(lambda f=f: f(hybrid(), X[:2]), 'unmasking rules are for masking alone') for k,f in EVERYTHING.items()},
       'too long for all orders':(lambda: all_orders_nats(real_network(seq_len=13), torch.zeros(1, 13).long()), '13 tokens; expected at most 12'), 'all orders of a mask':(lambda: all_orders_nats(network('toy'), torch.full((1, 4), V)), 'expected 0 to 2'), 'all orders in no steps':(lambda: all_orders_nats(network('toy'), X[:1], 0), 'steps is 0'),
       'no orders':(lambda: order_nats(network('toy'), X[:1], 0), 'n is 0'), 'orders in no steps':(lambda: order_nats(network('toy'), X[:1], 2, 0), 'steps is 0'), 'k 0':(lambda: order_bound(torch.zeros(4, 1), 0), 'k is 0'), 'k more than half':(lambda: order_bound(torch.zeros(5, 1), 3), 'k is 3; expected 1 to 2'), 'one order':(lambda: order_bound(torch.zeros(1, 1)), 'k is 1'), 'estimate of one order':(lambda: order_estimate(torch.zeros(1, 1)), 'at least 2'),
       'no latent density':(lambda: latent_nats(network('toy'), X[:1]), 'no latent density'), 'one draw of a density':(lambda: latent_nats(real_network(latent_density=True), X[:1], 1), 'n is 1'), 'density of a mask':(lambda: latent_nats(real_network(latent_density=True), torch.full((1, 4), V)), 'expected 0 to 2')}
@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_an_error(name):
    f,message = BAD[name]
    with pytest.raises(ValueError, match=message): f()
