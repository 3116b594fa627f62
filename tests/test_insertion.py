"""Insertion against the distributions it should have: chains over all sequences of few tokens, in numpy."""
import math
from functools import lru_cache, partial
from itertools import combinations, product
import numpy as np, pytest, torch
from scipy.linalg import expm
from scipy.stats import binom, poisson
from helpers import assert_drawn_from, derivative, fixed_weights, HandmadeDenoiser, plant_fault
from helpers import TableDenoiser, tempered_probs, warmer
from bijdiff.diffusion.corruption import Corruption
from bijdiff.diffusion.schedules import Cosine, Geometric, HalfCosine, LogLinear
from bijdiff.sampling import insertion
from bijdiff.sampling.generate import sample
from bijdiff.sampling.insertion import VariableLengthBatch
from bijdiff.sampling.state import SamplerState

# Functions of the package that planted faults replace, where they are looked up; and one tested by itself
POISSON,TOKEN_PROBS = (insertion, '_poisson'),(insertion, 'token_probs')
EXPECTED_GAPS,DELETE = (insertion, 'expected_gaps'),(VariableLengthBatch, 'delete')
DRAW_EARLIER = insertion, 'draw_earlier'
find_lengths = insertion._find_lengths

V,L = 2,3 # tokens are 0 and 1, and the mask is 2; longest text
N,STEPS = 200_000,4
N_TESTS = 50 # chi-square tests in this file, at most
assert_fits = partial(assert_drawn_from, n_tests=N_TESTS)

# Noises, and the probabilities of their states by hand

def cosine(t): return 1-.99*math.cos(math.pi/2*(1-t))
def half_cosine(t): return .01+.99*math.cos(math.pi/2*t)
def geometric(t): return math.exp(-.05*100**t)

COSINE,HALF,GEOMETRIC = Cosine(.01),HalfCosine(.01),Geometric(.05, 5.)
ALPHA = {COSINE: cosine, HALF: half_cosine, GEOMETRIC: geometric}

def constant(schedule, mask, substitute, delete):
    "A corruption, and its state probabilities by hand"
    corruption = Corruption(V, mask, substitute, delete, schedule=schedule)
    return corruption, fixed_weights(ALPHA[schedule], mask, substitute, delete)

NOISES = {
    'mask, delete': constant(COSINE, .5, 0, .5),
    'all three': constant(HALF, .4, .3, .3),
    'mostly deletion': constant(GEOMETRIC, .2, .1, .7),
}
every_noise = pytest.mark.parametrize('name', NOISES)

@lru_cache(None)
def denoiser(name): return TableDenoiser(V, L, NOISES[name][0], 3)

# Exact distributions

STRINGS = [z for n in range(L+1) for z in product(range(V+1), repeat=n)]
INDEX = {z:i for i,z in enumerate(STRINGS)}

def padded(sequences, fill, n=L):
    "Sequences of different lengths as one array, (sequences, n)"
    return np.array([[*o, *[fill]*(n-len(o))] for o in sequences])

LENGTHS = np.array([len(z) for z in STRINGS])
IDS,TEXT = torch.tensor(padded(STRINGS, V)),torch.tensor(np.arange(L)<LENGTHS[:,None])

def marginal(x, m):
    "Probabilities of tokens and mask, m_kept x + m_sub/V and m_mask, from those of the clean token, (..., V)"
    return np.concatenate([m[0]*x+m[2]/V, np.full((*x.shape[:-1], 1), m[1])], -1)

def generator(state_probs, t):
    "Rates of resampling as any token and as the mask, and of deleting masks, (V+2, V+2); row: from"
    (kept,mask,sub,delete),(d_kept,_,d_sub,d_delete) = state_probs(t),derivative(state_probs, t, 1e-5)
    to_token = (d_sub-d_kept/kept*sub)/(1-delete)
    Q = np.zeros((V+2, V+2))
    Q[:V+1,:V] = to_token/V
    Q[:V+1,V] = -d_kept/kept-to_token
    Q[V,V+1] = d_delete/mask
    return Q-np.diag(Q.sum(1))

@lru_cache(None)
def transition(name, s, t, n=200):
    "Probabilities that symbols become others between two times: a product of n matrix exponentials"
    P,grid = np.eye(V+2),s+(t-s)*np.linspace(0, 1, n+1)**2
    for a,b in zip(grid, grid[1:]): P = P@expm((b-a)*generator(NOISES[name][1], (a+b)/2))
    return P[:V+1,:V+1]

def insertions(means, room):
    "Every way to insert masks into gaps, from left to right while there is room, with its probability"
    if not means:
        yield (),1.
        return
    for k in range(room+1):
        p = poisson.pmf(k, means[0]) if k<room else poisson.sf(k-1, means[0])
        for rest,q in insertions(means[1:], room-k): yield (k, *rest),p*q

def insert_masks(z, numbers):
    "Put so many masks before each symbol, and at the end"
    out = ()
    for i,k in enumerate(numbers): out += (V,)*k+z[i:i+1]
    return out

def predict(name, t, **kw):
    "Probabilities of clean tokens, (strings, L, V), and expected gaps, (strings, L+1), for all strings"
    state_probs = NOISES[name][1]
    times = torch.full((len(STRINGS),), t)
    logits,gap_logits = denoiser(name)(IDS, times, TEXT)
    with np.errstate(divide='ignore'): odds = state_probs(t)[3]/(1-state_probs(t)[3])
    return tempered_probs(logits.numpy(), **kw), np.exp(gap_logits.numpy())*odds

def start(state_probs, n_given):
    "Distribution over all strings of given zeros and pure noise, whose length is binomial"
    m,dist = state_probs(1.),np.zeros(len(STRINGS))
    noise = np.array([m[2]/V]*V+[m[1]])/(m[1]+m[2])
    for z in STRINGS:
        n = len(z)-n_given
        if n<0 or any(z[:n_given]): continue
        dist[INDEX[z]] = binom.pmf(n, L-n_given, 1-m[3])*np.prod(noise[list(z[n_given:])])
    return dist

def advance(dist, ways):
    "Distribution over all strings after a step; `ways` of a string are strings and their probabilities"
    out = np.zeros(len(STRINGS))
    for z,p in zip(STRINGS, dist):
        if p==0: continue
        for y,q in ways(z): out[INDEX[y]] += p*q
    return out

def symbol_posterior(before, P, a):
    "Bayes' rule: the distribution `before` times P[:,a], for a symbol a; impossible symbols stay as they are"
    p = before*P[:,a]
    p = np.append(p, [0.]*(V+1-len(p)))
    return p/p.sum() if p.sum()>0 else np.eye(V+1)[a]

def step(name, x, gaps, t, s, n_given):
    "Ways of a string from time t to s: symbols from their posteriors, and masks inserted into the gaps"
    state_probs = NOISES[name][1]
    if s>0:
        P,before = transition(name, s, t),marginal(x, state_probs(s))
        returning = 1-state_probs(s)[3]/state_probs(t)[3]
    else: P,before,returning = marginal(np.eye(V), state_probs(t)),x,1. # the last step gives clean tokens
    def ways(z):
        i,free = INDEX[z],range(n_given, len(z))
        posteriors = [symbol_posterior(before[i,j], P, z[j]) for j in free]
        means = [(j>=n_given)*gap*returning for j,gap in enumerate(gaps[i,:len(z)+1])]
        inserted = list(insertions(means, L-len(z)))
        for y in product(range(V+1), repeat=len(free)):
            p = math.prod(posterior[a] for posterior,a in zip(posteriors, y))
            for numbers,q in inserted: yield insert_masks((*z[:n_given], *y), numbers),p*q
    return ways

def fill_masks(x):
    "Ways of a string whose masks become tokens"
    def ways(z):
        for y in product(*[range(V) if a==V else [a] for a in z]):
            filled = [(i, b) for i,(a,b) in enumerate(zip(z, y)) if a==V]
            yield y,math.prod(x[INDEX[z],i,b] for i,b in filled)
    return ways

def exact_distribution(name, n_given=0, steps=STEPS, **kw):
    "Probability of each string; the first ones are given zeros, and there is no gap before a given token"
    dist,ts = start(NOISES[name][1], n_given),np.linspace(1, 0, steps+1)
    for t,s in zip(ts, ts[1:]):
        x,gaps = predict(name, t, **kw)
        dist = advance(dist, step(name, x, gaps, t, s, n_given))
    return advance(dist, fill_masks(x))

def sample_counts(name, n_given=0, n=N, seed=0, **kw):
    "How often each string is sampled"
    template = torch.tensor([0]*n_given+[V]*(L-n_given))
    texts = sample(denoiser(name), n, STEPS, template=template, seed=seed, **kw)
    ids = torch.nn.utils.rnn.pad_sequence([*texts, template], True, V)[:-1] # (n, L), V after the ends
    codes,counts = (ids@(V+1)**torch.arange(L)).unique(return_counts=True)
    index = {sum(a*(V+1)**i for i,a in enumerate(row)):k for k,row in enumerate(padded(STRINGS, V).tolist())
             if V not in STRINGS[k]}
    return np.bincount([index[c] for c in codes.tolist()], counts, len(STRINGS))

@pytest.mark.parametrize('n_given', [0, 1])
@every_noise
def test_insertion_samples_the_model(name, n_given):
    n = 50_000 if n_given else N//2 if name=='mostly deletion' else N
    assert_fits(sample_counts(name, n_given, n), exact_distribution(name, n_given))

@every_noise
def test_insertion_at_another_temperature(name):
    kw = dict(temperature=.7, top_p=.8)
    assert_fits(sample_counts(name, n=50_000, **kw), exact_distribution(name, **kw))

# Faults: each takes the right function and returns a wrong one

def too_many(poisson): return lambda mean, run: poisson(1.1*mean, run)
def too_few(expected_gaps): return lambda *args: expected_gaps(*args)-.1
def not_always(delete): return lambda self, which: delete(self, which&(torch.rand(which.shape)<.95))
def at_another_time(draw_earlier):
    return lambda noise, x0, z, s, t, u: draw_earlier(noise, x0, z, .9*s, t, u)

FAULTS = {
    'too many come back': (POISSON, too_many),
    'too warm': (TOKEN_PROBS, warmer),
    'expects too few': (EXPECTED_GAPS, too_few),
    'starts too long': (DELETE, not_always),
    'symbols from another time': (DRAW_EARLIER, at_another_time),
}

@pytest.mark.parametrize('name', FAULTS)
def test_the_chi_square_of_insertion_notices(name, monkeypatch):
    plant_fault(monkeypatch, *FAULTS[name])
    counts = sample_counts('all three', n=60_000)
    with pytest.raises(AssertionError, match='p-value'): assert_fits(counts, exact_distribution('all three'))

# A random language of words of zero to three tokens, and all that can be known about it

WORDS = [z for z in STRINGS if V not in z]
LANGUAGE = dict(zip(WORDS, np.random.default_rng(0).dirichlet(.7*np.ones(15))))
# Every word, positions of its surviving tokens, and what they have become
HISTORIES = [(w, survivors, z) for w in WORDS for n in range(len(w)+1)
             for survivors in combinations(range(len(w)), n) for z in product(range(V+1), repeat=n)]

class BestDenoiser(HandmadeDenoiser):
    """The best that a network can be: expected gaps, and leave-one-out distributions of the clean tokens

    Both are means over all histories with the same noisy text, weighted with their probabilities. The number
    `wrong` is added to gap logits.
    """
    word_probs = np.array([LANGUAGE[w] for w,_,_ in HISTORIES])
    clean = padded([[w[i] for i in survivors] for w,survivors,_ in HISTORIES], 0)
    noisy = padded([z for _,_,z in HISTORIES], V)
    present = padded([[1]*len(z) for _,_,z in HISTORIES], 0)
    n_deleted = np.array([len(w)-len(z) for w,_,z in HISTORIES])
    missing = padded([np.diff([-1, *survivors, len(w)])-1 for w,survivors,_ in HISTORIES], 0, L+1)
    index = np.array([INDEX[z] for _,_,z in HISTORIES])

    def __init__(self, name, wrong=0.):
        noise,self.state_probs = NOISES[name]
        super().__init__(V, L, noise)
        self.wrong,self.tables = wrong,lru_cache(None)(self.outputs_at)
        self.string_of = torch.zeros((V+2)**L, dtype=torch.long)
        self.string_of[self.code(IDS, TEXT)] = torch.arange(len(STRINGS))
        self.double()

    def outputs_at(self, t):
        "Logits, (strings, L, V), and gap logits, (strings, L+1), of all strings at a time"
        m = self.state_probs(t)
        likelihood = np.where(self.present, marginal(np.eye(V), m)[self.clean,self.noisy], 1.)
        prior = self.word_probs*m[3]**self.n_deleted
        total,gaps = np.zeros(len(STRINGS)),np.zeros((len(STRINGS), L+1))
        p = likelihood.prod(1)*prior
        np.add.at(total, self.index, p)
        np.add.at(gaps, self.index, p[:,None]*self.missing)
        clean = np.zeros((len(STRINGS), L, V))
        for i in range(L):
            of_others = np.delete(likelihood, i, 1).prod(1)*prior*self.present[:,i]
            np.add.at(clean, (self.index, i, self.clean[:,i]), of_others)
        with np.errstate(all='ignore'): expected = torch.tensor(gaps/total[:,None])
        gap_logits = expected.clamp(min=1e-300).log()+self.wrong-math.log(m[3]/(1-m[3]))
        return torch.tensor(clean).clamp(min=1e-300).log(), gap_logits

    def outputs(self, xt, t, mask):
        i,n = self.string_of[self.code(xt, mask)],xt.shape[1]
        logits,gap_logits = self.tables(t[0].item())
        return logits[i,:n], gap_logits[i,:n+1]

def language_after_start(name):
    """Distribution over all strings of words whose number of survivors is binomial

    The sampler starts with Binomial(L, 1-m_delete) symbols of noise, whatever the language would have there;
    then it writes words that so many survivors belong to.
    """
    p_survive,dist = 1-NOISES[name][1](1.)[3],0.
    for n in range(L+1):
        p = np.array([LANGUAGE.get(z, 0.)*binom.pmf(n, len(z), p_survive) for z in STRINGS])
        dist = dist+binom.pmf(n, L, p_survive)*p/p.sum()
    return dist

def distance_from_the_language(name, n=5000, **kw):
    "Total variation distance of the frequencies of n samples in 200 steps"
    counts = np.zeros(len(STRINGS))
    for o in sample(BestDenoiser(name, **kw), n, 200): counts[INDEX[tuple(o.tolist())]] += 1
    return .5*np.abs(counts/n-language_after_start(name)).sum()

@pytest.mark.parametrize('name', ['all three', 'mask, delete'])
def test_insertion_with_the_best_network_writes_the_language(name):
    "Up to the size of steps and that of the sample"
    assert distance_from_the_language(name)<.03

def test_other_expectations_do_not_write_the_language():
    assert distance_from_the_language('mask, delete', wrong=.2)>.04

# Lengths of blanks

class PoissonDenoiser(HandmadeDenoiser):
    """Knows a language whose texts have a Poisson number of tokens

    Then a Poisson number is missing, wherever the others are, and its expectation is mean*m_delete.
    """
    def __init__(self, noise, mean):
        super().__init__(V, 60, noise)
        self.mean,self.p_survive = mean,float(1-noise.state_probs(torch.ones(1)).delete)
        self.double()
    def outputs(self, xt, t, mask):
        p_survive = self.noise.state_probs(t[:1].double()).surviving.item()
        per_gap = math.log(self.mean*p_survive)-torch.log(mask.sum(1, keepdim=True)+1.)
        return torch.zeros(*xt.shape, V), per_gap.expand(-1, xt.shape[1]+1)

BLANKS = {
    'mask, delete': Corruption(V, .4, 0, .6, schedule=LogLinear(0.)),
    'all three': Corruption(V, .3, .3, .4, schedule=LogLinear(0.)),
}
every_blank = pytest.mark.parametrize('name', BLANKS)

def assert_poisson(lengths, mean):
    "Assert that lengths fit a Poisson distribution cut off at 60"
    p = np.append(poisson.pmf(np.arange(60), mean), poisson.sf(59, mean))
    assert_fits(np.bincount(lengths, minlength=61), p)

@every_blank
@pytest.mark.parametrize('passes', [1, 3, 10])
def test_true_noise_keeps_its_distribution_while_lengths_are_found(name, passes):
    model = PoissonDenoiser(BLANKS[name], 12.)
    mean = 12*model.p_survive
    lengths = torch.poisson(torch.full((20_000,), mean), generator=torch.Generator().manual_seed(passes))
    batch = VariableLengthBatch(torch.full((20_000, 40), V), V, 60)
    batch.delete(torch.arange(61)>=lengths[:,None])
    assert torch.equal(batch.lengths, lengths.long().clamp(max=40))
    state = SamplerState(model, batch.x, model.noise, seed=passes)
    with torch.no_grad(): find_lengths(state, batch, passes)
    assert_poisson(batch.lengths.numpy(), mean)

@every_blank
@pytest.mark.parametrize('length', [2, 50])
def test_a_blank_of_a_wrong_length_finds_its_length(name, length):
    "Texts have the lengths of the language after 40 length steps, and after 0 they do not"
    model = PoissonDenoiser(BLANKS[name], 12.)
    def lengths(length_steps):
        return [len(o) for o in sample(model, 5000, 3, length=length, length_steps=length_steps)]
    found,not_found = lengths(40),lengths(0)
    assert_poisson(found, 12.)
    with pytest.raises(AssertionError, match='p-value|impossible'): assert_poisson(not_found, 12.)
