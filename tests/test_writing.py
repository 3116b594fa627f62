"""Writing in batches and with constraints: the same sequences at any batch size, in bounded memory, and with
probabilities that are those of the likelihood, enumerated over all sequences of a small language."""
from functools import lru_cache
from itertools import product
from types import SimpleNamespace
import numpy as np, pytest, torch
from helpers import assert_drawn_from, count_sequences, Largest, plant_fault, TableDenoiser
from bijdiff.diffusion.corruption import Corruption
from bijdiff.diffusion.draws import draw_categorical, Draws
from bijdiff.diffusion.schedules import LogLinear
from bijdiff.likelihood.exact import log_prob
from bijdiff.sampling import conditionals, rules, state
from bijdiff.sampling.generate import sample, sample_batches, samplers_for
from bijdiff.sampling.rules import UnmaskingRule
from bijdiff.testing import tiny_denoiser

# Random numbers

MASK64 = 2**64-1

def mix(z):
    "SplitMix64's mixing of 64 bits, in Python's whole numbers"
    z = ((z^(z>>30))*0xBF58476D1CE4E5B9) & MASK64
    z = ((z^(z>>27))*0x94D049BB133111EB) & MASK64
    return z^(z>>31)

def number(seed, stream, sequence, call, position):
    "A uniformly distributed number: keys of seed, sequence and call are mixed one after the other"
    gamma,key = 0x9E3779B97F4A7C15,mix((seed+stream*0x9E3779B97F4A7C15)&MASK64)
    key = mix((mix(key)+(sequence+1)*gamma)&MASK64)
    key = mix((key+call*gamma)&MASK64)
    return (mix((key+(position+1)*gamma)&MASK64)>>11)/2**53

@pytest.mark.parametrize('seed', [0, 1, 2**63, 2**64-1])
def test_random_numbers_are_those_of_whole_numbers(seed):
    got = Draws(seed, [0, 5, 2**40], stream=1)
    got.uniform(2)
    got = got.uniform(3)
    want = [[number(seed, 1, i, 2, j) for j in range(3)] for i in (0, 5, 2**40)]
    assert got.tolist()==want

def test_random_numbers_of_neighbours_are_independent():
    "Of sequences, positions, calls, seeds and streams: correlations of 10^6 pairs within 5 standard errors"
    def rows(seed, stream, first): return Draws(seed, range(first, first+1000), stream=stream)
    a = rows(0, 0, 0)
    x,second = a.uniform(1001),a.uniform(1001)
    others = dict(sequence=rows(0, 0, 1).uniform(1001), position=x.roll(1, 1), call=second,
                  seed=rows(1, 0, 0).uniform(1001), stream=rows(0, 1, 0).uniform(1001))
    for name,y in others.items():
        r = torch.corrcoef(torch.stack([x[:,1:].flatten(), y[:,1:].flatten()]))[0,1].item()
        assert abs(r)<5e-3, (name, r)

@pytest.mark.parametrize('K', [2, 300, 70_000])
def test_a_draw_is_where_the_sum_of_the_weights_exceeds_the_number(K):
    "Against NumPy's sum and search; and a weight of 0 is never drawn"
    g = np.random.default_rng(K)
    w = g.random((50, K))*(g.random((50, K))<.2)
    w[:,0] += 1e-9
    u = g.random(50)
    got = draw_categorical(torch.tensor(w), torch.tensor(u)).numpy()
    for row,target,i in zip(w, u, got):
        sums = row.cumsum()
        assert row[i]>0
        assert sums[i]>=target*sums[-1]*(1-1e-12) and sums[i]-row[i]<=target*sums[-1]*(1+1e-12)

def test_a_draw_at_the_very_end_is_a_possible_one():
    "Sums of a block and of its weights are rounded otherwise; no number leads beyond the last weight"
    g = np.random.default_rng(0)
    last = torch.tensor([1-2**-53]*500, dtype=torch.float64)
    for K,end in product((255, 257, 300, 511, 1000), (0., .7)):
        w = torch.tensor(g.random((500, K))*(g.random((500, K))<.5))
        w[:,-1] = end
        i = draw_categorical(w, last)
        assert (i<K).all() and (w.gather(1, i[:,None])>0).all()

# Batches

MODELS = dict(
    mask=(Corruption(3, schedule=LogLinear(0.)), {}),
    timed=(Corruption(3, schedule=LogLinear(0.)), dict(time_conditioning=True)),
    hybrid=(Corruption(3, .6, .4), {}),
    scores=(Corruption(3, 0, 1), dict(score_head=True)),
    deletion=(Corruption(3, .4, .3, .3), {}),
)

@lru_cache(None)
def table(name):
    noise,kwargs = MODELS[name]
    return TableDenoiser(3, 4, noise, 5, **kwargs)

EVERY = [(name, sampler) for name in MODELS for sampler in samplers_for(table(name))]

def written(name, sampler, n, **kwargs):
    rules = dict(steps=2) if sampler in UnmaskingRule.names else dict(steps=6)
    return [o.tolist() for o in sample(table(name), n, sampler=sampler, seed=7, **rules, **kwargs)]

@pytest.mark.parametrize('name, sampler', EVERY)
def test_the_same_sequences_at_any_batch_size(name, sampler):
    want = written(name, sampler, 23)
    for bs in (1, 5, 23, 100): assert written(name, sampler, 23, bs=bs)==want
    assert written(name, sampler, 9, bs=4)==want[:9], 'more sequences change those before them'
    assert len({str(o) for o in want})>2

def test_many_sequences_go_by_batches_with_a_progress_bar():
    sizes,steps = [],[]
    model = tiny_denoiser(5, 256)
    for batch in sample_batches(model, 150, 1, progress=lambda o: [steps.append(len(o)), o][1]):
        sizes.append(len(batch))
    assert sizes==[64, 64, 22] and steps==[3]
    assert sample(model, 100, 1, bs=99).shape==(100, 256)

@pytest.mark.parametrize('sampler', ['ancestral', 'spread', 'insertion'])
def test_frames_are_those_of_the_first_batch(sampler):
    name,shown,all_shown = 'deletion' if sampler=='insertion' else 'mask',[],[]
    x = written(name, sampler, 7, bs=3, frames=shown)
    assert written(name, sampler, 3, frames=all_shown)==x[:3]
    same = [[o.tolist() for o in a]==[o.tolist() for o in b] for a,b in zip(shown, all_shown)]
    assert len(shown)==len(all_shown)>1 and all(same)

@pytest.mark.parametrize('kwargs, name', [
    (dict(bs=0), 'bs'), (dict(bs=1.5), 'bs'), (dict(revise=0), 'revise'),
    (dict(revise=1.1), 'revise'),
    (dict(revise=.1, rule='random'), 'revise'), (dict(revise=.1, sampler='ancestral'), 'sampler')])
def test_bad_options_are_named_before_any_work(kwargs, name, monkeypatch):
    model = table('mask')
    monkeypatch.setattr(model, 'hidden', lambda *args: pytest.fail('the network is called'))
    with pytest.raises(ValueError, match=name): sample_batches(model, 2, **kwargs)
    with pytest.raises(ValueError, match='revise'): sample_batches(table('deletion'), 2, revise=.1)

def test_revise_chooses_a_sampler_that_takes_tokens_back():
    for name,sampler in dict(mask='remask_cap', hybrid='forward_backward').items():
        a,b = (sample(table(name), 20, 6, sampler=o, revise=.7) for o in (None, sampler))
        assert torch.equal(a, b)

# Memory, and what goes through the head

LARGE = 30_000 # four distributions have more numbers than the times at which scores are tried

@pytest.mark.parametrize('noise', [
    Corruption(LARGE), Corruption(LARGE, .5, .5), Corruption(LARGE, .4, .3, .3)])
def test_no_sampler_has_more_numbers_than_a_chunk_or_a_part(noise, monkeypatch):
    "128 positions of a large vocabulary in two steps"
    model = tiny_denoiser(LARGE, 32, noise=noise).float()
    monkeypatch.setattr(state, 'chunk_rows', lambda n, V: 32)
    monkeypatch.setattr(state, '_part', 4*LARGE)
    for sampler in samplers_for(model):
        if sampler in UnmaskingRule.names: continue    # see test_conditionals
        with Largest() as largest: sample(model, 4, 2, sampler=sampler, length=32)
        assert largest.numbers[torch.float64]<=4*LARGE, sampler
        assert largest.numbers[torch.float32]<=32*LARGE, sampler

@pytest.mark.parametrize('sampler', ['ancestral', 'first_hitting', 'remask_cap', 'remask_loop', 'random'])
def test_only_positions_that_are_revealed_go_through_the_head(sampler, monkeypatch):
    model,rows = tiny_denoiser(5, 12),[]
    head = model.head
    monkeypatch.setattr(model, 'head', lambda h: [rows.append(h.numel()//h.shape[-1]), head(h)][1])
    frames = []
    sample(model, 3, 6, sampler=sampler, frames=frames)
    revealed = sum(((a==5)&(b!=5)).sum().item() for a,b in zip(frames, frames[1:]))
    assert sum(rows)==revealed

# Constraints

END = 2

class EndingDenoiser(TableDenoiser):
    "Random logits for four tokens, of which one is the end token"
    def __init__(self, seed=0):
        super().__init__(4, 4, seed=seed)
        self.tokenizer = SimpleNamespace(eod_id=END, vocab_size=4)

@lru_cache(None)
def ending(): return EndingDenoiser()

ALL = np.array([*product(range(4), repeat=4)])

def is_allowed(z, forbid=(), stop_at_end=False, min_length=0, max_length=None):
    "Whether a rule allows a sequence"
    n = next((i for i,o in enumerate(z) if o==END), len(z))
    if {*z} & {*forbid}: return False
    if not stop_at_end: return True
    if max_length is not None and n>max_length: return False
    return all(o==END for o in z[n:]) and n>=min_length

CONSTRAINTS = dict(
    forbid=dict(forbid=(1,)),
    stop=dict(stop_at_end=True),
    shortest=dict(stop_at_end=True, min_length=2),
    longest=dict(stop_at_end=True, max_length=3),
    all=dict(stop_at_end=True, min_length=1, max_length=3, forbid=(3,)),
)
RULES = [('left_to_right', {}), ('random', dict(steps=2)), ('spread', dict(steps=1)),
         ('block', dict(steps=3)), ('confidence', dict(steps=2)), ('entropy', dict(budget=1.)),
         ('margin', dict(top_p=.8, temperature=.7))]
every_constraint = pytest.mark.parametrize('name', CONSTRAINTS)
every_rule = pytest.mark.parametrize('rule, options', RULES, ids=[rule for rule,_ in RULES])
N_TESTS = 100

def probabilities(rule, **options):
    return log_prob(ending(), torch.tensor(ALL), rule, **options).exp().numpy()

@every_constraint
@every_rule
def test_probabilities_of_allowed_sequences_sum_to_one(name, rule, options):
    options = options | CONSTRAINTS[name]
    p = probabilities(rule, **options)
    allowed = np.array([is_allowed(z, **CONSTRAINTS[name]) for z in ALL.tolist()])
    assert abs(p.sum()-1)<1e-12
    assert (p[~allowed]==0).all()
    if not options.get('top_p'): assert (p[allowed]>0).all()

@every_constraint
@every_rule
def test_sequences_are_written_with_their_probabilities(name, rule, options):
    options = options | CONSTRAINTS[name]
    x = sample(ending(), 40_000, rule=rule, **options)
    assert_drawn_from(count_sequences(x, 4), probabilities(rule, **options), N_TESTS)

def by_hand(z):
    """Probability of a sequence that stops at its end, in two steps of the order 2 0 3 1

    A token is drawn from its logits; after an end token come end tokens, and none before another token."""
    z,p,seen = list(z),1.,[4]*4
    for step in ((0, 2), (1, 3)):
        logits = ending()(torch.tensor([seen]))[0].numpy()
        before = [*seen]
        for i in step:
            w = np.exp(logits[i])
            if any(o==END for o in seen[:i]): w = np.eye(4)[END]
            elif any(o not in (END, 4) for o in before[i+1:]): w[END] = 0.
            p *= w[z[i]]/w.sum()
            seen[i] = z[i]
    return p

def test_the_likelihood_of_a_text_that_stops_is_that_of_its_definition():
    p = probabilities((0, 2, 1, 3), steps=2, stop_at_end=True)
    want = [by_hand(z) for z in ALL.tolist()]
    assert np.abs(p-want).max()<1e-12

def never_forced(ends_in_pass): return lambda ids, now, end: torch.zeros_like(now)
def never_free(has_before): return lambda o: torch.zeros_like(o)

@pytest.mark.parametrize('target, fault', [((rules, 'ends_in_pass'), never_forced),
                                           ((conditionals, '_has_before'), never_free)])
def test_the_chi_square_notices(target, fault, monkeypatch):
    p = probabilities('spread', steps=2, stop_at_end=True)
    plant_fault(monkeypatch, target, fault)
    x = sample(ending(), 20_000, rule='spread', steps=2, stop_at_end=True)
    with pytest.raises(AssertionError): assert_drawn_from(count_sequences(x, 4), p, N_TESTS)

def test_given_tokens_are_scored_and_kept_with_constraints():
    template = torch.tensor([4, 1, 4, 4])
    options = dict(rule='random', steps=2, stop_at_end=True)
    x = sample(ending(), 20_000, template=template, **options)
    some = ALL[ALL[:,1]==1]
    p = np.zeros(len(ALL))
    p[ALL[:,1]==1] = log_prob(ending(), torch.tensor(some), template=template, **options).exp().numpy()
    assert abs(p.sum()-1)<1e-12 and (p[ALL[:,0]==END]==0).all()
    assert_drawn_from(count_sequences(x, 4), p, N_TESTS)

@pytest.mark.parametrize('options, name', [
    (dict(min_length=5), 'min_length'), (dict(min_length=3, max_length=2), 'min_length'),
    (dict(max_length=0), 'max_length'), (dict(forbid=(0, 1, 3)), 'forbid'), (dict(forbid=(END,)), 'forbid'),
    (dict(forbid=(-1,)), 'forbid'), (dict(forbid='ab'), 'forbid'), (dict(stop_at_end=1), 'stop_at_end'),
    (dict(stop_at_end=False, min_length=1), 'stop_at_end'), (dict(template=[END, 0, 4, 4]), 'given token'),
    (dict(template=[END, 4, 4, 4], min_length=2), 'given token'),
    (dict(template=[0, 0, 4, 4], max_length=1), 'given token')])
def test_constraints_that_cannot_be_met_are_named_before_any_work(options, name, monkeypatch):
    model = ending()
    monkeypatch.setattr(model, 'hidden', lambda *args: pytest.fail('the network is called'))
    options = dict(stop_at_end=True) | options
    with pytest.raises(ValueError, match=name): sample_batches(model, 2, rule='spread', **options)

def test_a_model_without_an_end_token_cannot_stop_at_it():
    with pytest.raises(ValueError, match='stop_at_end'):
        sample(table('mask'), rule='spread', stop_at_end=True)

def test_all_forbidden_tokens_are_too_many():
    with pytest.raises(ValueError, match='forbid'): sample(table('mask'), rule='spread', forbid=(0, 1, 2))

def test_a_function_that_leaves_no_allowed_token_is_named():
    def alone(logits, x, where):
        return torch.full_like(logits, -torch.inf).index_fill(-1, torch.tensor(1), 0.)
    assert (sample(ending(), 2, rule='spread', adjust=alone)==1).all()
    with pytest.raises(ValueError, match='adjust'):
        sample(ending(), 2, rule='spread', adjust=alone, forbid=[1])

def test_functions_that_choose_tokens_see_no_end():
    rule,choose = UnmaskingRule(stop_at_end=True),lambda p, where: p.argmax(-1)
    with pytest.raises(ValueError, match='stop_at_end'):
        rules.unmask(ending(), torch.full((1, 4), 4), rule, choose)

def test_rules_with_constraints_are_written_into_files():
    rule = UnmaskingRule('spread', forbid=[3, 1, 3], stop_at_end=True, min_length=1, max_length=9)
    assert rule.forbid==(1, 3)
    assert rules.rule_from_dict(rule.to_dict())==rule
