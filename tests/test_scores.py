"""Which scores are probabilities: sums over all sequences of small languages, against enumerated orders.

The enumeration of the package is compared with one that shares no code with it: softmax of the logits of a
network, masked sequence by masked sequence, and all permutations one by one."""
import math
from functools import lru_cache, partial
from itertools import permutations, product
import pytest, torch
from helpers import TableDenoiser
from bijdiff.diffusion.corruption import Corruption
from bijdiff.diffusion.schedules import HalfCosine, LogLinear
from bijdiff.likelihood import scores
from bijdiff.likelihood.bounds import mean_and_error, nelbo_draws, score_ids
from bijdiff.likelihood.exact import all_orders_nats, document_nll, log_prob, order_nats
from bijdiff.likelihood.scores import format_scores, llada_draws, mixture_nats, pseudo_nll, score_table
from bijdiff.likelihood.scores import small_scores, SmallLanguage, total_probability
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.model.foreign import ForeignDenoiser
from bijdiff.sampling.rules import public_order
from bijdiff.testing import random_weights, tiny_denoiser

V,L = 3,4
X = torch.tensor(list(product(range(V), repeat=L))) # all sequences
SIZES = (2, 6), (3, 4), (4, 3), (1, 2), (2, 1)
SOME = X[[0, 7, 33, 80]].tolist()

def float32_network(vocab_size, seq_len, seed):
    "A network in float32, as trained ones are"
    torch.manual_seed(seed)
    config = DenoiserConfig(vocab_size, seq_len=seq_len, d_model=8, n_heads=2, n_layers=2)
    return random_weights(BijectiveDenoiser(config), .5).eval()

NETWORKS = dict(table=lambda V, L, seed: TableDenoiser(V, L, seed=seed), network=tiny_denoiser,
                float32=float32_network)
MODELS = [(name, *size, seed) for name in NETWORKS for size in SIZES for seed in (1, 2)]

@lru_cache(None)
def network(name='table', V=V, L=L, seed=30): return NETWORKS[name](V, L, seed)

@lru_cache(None)
def language(*args): return SmallLanguage(network(*args), args[2] if args else L)

@lru_cache(None)
def table(*args): return small_scores(language(*args), k=3, T=5)

# An enumeration that shares no code with the package

@lru_cache(None)
def token_nats(x, hidden, i):
    "Nats of token i of a sequence whose hidden positions are masked"
    masked = [V if j in hidden else token for j,token in enumerate(x)]
    logits = network()(torch.tensor([masked]))[0,i].tolist()
    return math.log(sum(math.exp(o) for o in logits))-logits[x[i]]

def nats_in_order(x, order):
    "Nats of a sequence, token by token in an order"
    hidden = [frozenset(order[j:]) for j in range(len(order))]
    return sum(token_nats(tuple(x), h, i) for h,i in zip(hidden, order))

@lru_cache(None)
def nats_in_all_orders(x): return [nats_in_order(x, order) for order in permutations(range(L))]

def mean(x): return sum(nats_in_all_orders(x))/math.factorial(L)
def mixture(x): return -math.log(sum(math.exp(-o) for o in nats_in_all_orders(x))/math.factorial(L))
def best(x): return min(nats_in_all_orders(x))
def pseudo(x): return sum(token_nats(x, frozenset([i]), i) for i in range(L))
def from_left(x): return nats_in_order(x, range(L))
def some_orders(x): return [nats_in_order(x, public_order(L, seed)) for seed in range(3)]

def by_levels(x):
    "Mean over numbers of masks n, and over all sets of n masks, of L/n times the nats of the masked tokens"
    levels = []
    for n in range(1, L+1):
        sets = [frozenset(s) for s in permutations(range(L), n)]
        levels += [sum(L/n*token_nats(x, s, i) for s in sets for i in s)/len(sets)]
    return sum(levels)/L

def in_discrete_time(x, T=5):
    "Sum over steps of the probability of all sets of masks, times the nats of tokens that a step reveals"
    alpha = [1e-3+(1-1e-3)*math.cos(math.pi/2*i/T) for i in range(T+1)]
    nats = alpha[T]*sum(token_nats(x, frozenset(range(L)), i) for i in range(L))
    for a,later in zip(alpha, alpha[1:]):
        for masked in product([False, True], repeat=L):
            hidden = frozenset(i for i in range(L) if masked[i])
            p = math.prod(1-later if o else later for o in masked)
            nats += p*(a-later)/(1-later)*sum(token_nats(x, hidden, i) for i in hidden)
    return nats

BY_HAND = {
    'Monte-Carlo bound': by_levels, 'discrete-time bound, 5 steps': in_discrete_time,
    'mean over 3 orders': lambda x: sum(some_orders(x))/3, 'left to right': from_left,
    'mixture of 3 orders': lambda x: -math.log(sum(math.exp(-o) for o in some_orders(x))/3),
    'mixture of all orders': mixture, 'pseudo-log-likelihood': pseudo,
    'best of 3 orders': lambda x: min(some_orders(x)), 'best of all orders': best}

@pytest.mark.parametrize('name', BY_HAND)
def test_each_score_is_that_of_an_enumeration_by_hand(name):
    nats = table()[name][1]
    expected = [BY_HAND[name](tuple(x)) for x in SOME]
    found = [nats[X.tolist().index(x)].item() for x in SOME]
    assert found==pytest.approx(expected, abs=1e-9)

def test_random_masks_have_the_mean_over_orders_as_expectation():
    "By the weights of sets in LLaDA, by permutations, and by the recursion over sets"
    for x in SOME:
        assert by_levels(tuple(x))==pytest.approx(mean(tuple(x)), abs=1e-9)
    recursion = language().over_all_orders(scores.order_rules['mean'])
    assert torch.allclose(language().monte_carlo_bound(), recursion, atol=1e-9)

# The sums

@pytest.mark.parametrize('model', MODELS, ids=lambda o: '-'.join(map(str, o)))
def test_probabilities_sum_to_1_and_bounds_to_no_more(model):
    """Within 1e-9. In float32 too, for conditionals are softmaxes in float64 of one evaluation; adaptive
    rules are evaluated again in other batches, and have rounding errors of float32."""
    for name,(kind,nats) in table(*model).items():
        again = name in ('confidence', 'entropy') and model[0]=='float32'
        total,tol = total_probability(nats),1e-5 if again else 1e-9
        if kind=='probability': assert total==pytest.approx(1, abs=tol), name
        if kind=='bound': assert total<=1+1e-9, name

@pytest.mark.parametrize('name', [o for o,(kind,_) in table().items() if kind=='bound'])
def test_each_bound_has_a_gap_for_some_model(name):
    assert total_probability(table()[name][1])<.99

@pytest.mark.parametrize('name', [o for o,(kind,_) in table().items() if kind=='no probability'])
def test_each_score_that_is_no_probability_exceeds_1_for_some_model(name):
    assert max(total_probability(table(*o)[name][1]) for o in MODELS[:10])>1.01

def test_every_score_is_one_of_three_kinds():
    assert {kind for kind,_ in table().values()}=={'probability', 'bound', 'no probability'}

def test_a_mixture_is_no_longer_than_the_best_order_with_the_number_of_the_order():
    for k in (1, 2, 5):
        found = small_scores(language(), k)
        best,mixture = (found[f'{o} of {k} orders'][1] for o in ('best', 'mixture'))
        assert (best<=mixture+1e-12).all() and (mixture<=best+math.log(k)+1e-12).all()

def test_a_copying_network_has_a_pseudo_log_likelihood_of_two_certain_sequences():
    def copy(ids):
        found = [(ids==v).any(1, keepdim=True).expand(ids.shape) for v in range(3)]
        return 50.*torch.stack(found, -1)
    nats = SmallLanguage(ForeignDenoiser(copy, 3, 2, 3), 3).pseudo_log_likelihood()
    assert nats[[0, 7]].abs().max()<1e-9 and total_probability(nats)==pytest.approx(2, abs=1e-6)

# Against the functions of the package

@pytest.mark.parametrize('steps', [None, 1, 2, 3])
def test_fixed_orders_have_the_likelihood_of_their_rule(steps):
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        expected = -log_prob(network(), X, order, steps)
        assert torch.allclose(language().in_order(order, steps), expected, atol=1e-9)

def test_all_orders_have_the_likelihood_of_a_random_order():
    assert torch.allclose(language().over_all_orders(mixture_nats), all_orders_nats(network(), X), atol=1e-9)

def errors(draws, expected):
    "Differences of means to what is expected, in standard errors"
    mean,se = mean_and_error(draws.double())
    return (mean-expected)/se

@pytest.mark.parametrize('draw, expected', [
    (llada_draws, lambda o: o.monte_carlo_bound()),
    (partial(nelbo_draws, schedule=HalfCosine(0.)), lambda o: o.monte_carlo_bound()),
    (partial(nelbo_draws, schedule=LogLinear(0.)), lambda o: o.monte_carlo_bound()),
    (partial(nelbo_draws, schedule='half_cosine', T=3), lambda o: o.discrete_bound(3)),
    (partial(nelbo_draws, schedule=LogLinear(.2), T=1), lambda o: o.discrete_bound(1, LogLinear(.2)))],
    ids=['LLaDA', 'half_cosine', 'log_linear', 'three steps', 'one step'])
def test_draws_agree_with_the_expectation(draw, expected):
    "16 sequences, ten times; by chance a mean is off by 4.5 standard errors in one of 10,000 runs"
    draws = draw(network(), X[:80:5].repeat(10, 1), 300, seed=1).view(300, 10, 16).mean(1)
    assert errors(draws, expected(language())[:80:5]).abs().max()<4.5

def test_draws_are_those_of_their_seed_whatever_the_batch():
    a,b,c = (llada_draws(network(), X[:5], 7, seed, bs) for seed,bs in ((1, 64), (1, 3), (2, 64)))
    assert a.shape==(7, 5) and torch.allclose(a, b, atol=1e-9) and not torch.allclose(a, c)

def test_pseudo_log_likelihood_of_tokens_whatever_the_batch():
    for bs in (64, 3):
        nats = pseudo_nll(network(), X, bs)
        assert nats.shape==X.shape
        assert torch.allclose(nats.sum(1), language().pseudo_log_likelihood(), atol=1e-9)

# The table of a document

IDS = torch.randint(V, (26,), generator=torch.Generator().manual_seed(0)) # six chunks and a rest of two

def special_tokens():
    "The table denoiser with its ids in another order, and two ids that are never written"
    inner,order = network(),torch.tensor([4, 0, 2])
    def f(ids):
        known = torch.full((6,), V).scatter(0, order, torch.arange(V))
        logits = torch.full((*ids.shape, 6), -9., dtype=torch.float64)
        logits[...,order] = inner(known[ids])
        return logits
    return ForeignDenoiser(f, 6, 5, L, never_written=(1, 3)), order

def rows_by_name(model, ids, **kwargs):
    options = dict(n=8, k=3, T=4, steps=2, seed=5)
    return {o.name:o for o in score_table(model, ids, **options | kwargs)}

def test_the_table_has_the_scores_of_the_package():
    rows,per_nat = rows_by_name(network(), IDS),1/(26*math.log(2))
    for name,rule,steps in (('left to right', 'left_to_right', None), ('confidence', 'confidence', None),
                            ('entropy', 'entropy', None), ('spread, 2 passes', 'spread', 2)):
        expected = document_nll(network(), IDS, rule, steps).sum().item()*per_nat
        assert rows[name].bits==pytest.approx(expected, abs=1e-9) and rows[name].se==0
    for name,T in (('Monte-Carlo bound, MDLM', None), ('discrete-time bound, 4 steps', 4)):
        o = score_ids(network(), IDS, 8, T=T, seed=5, bs=64)
        assert rows[name][2:4]==pytest.approx(o.bits(), abs=1e-9)
    chunks = IDS[:24].view(6, 4)
    pseudo = pseudo_nll(network(), chunks).sum()+pseudo_nll(network(), IDS[None,24:]).sum()
    assert rows['pseudo-log-likelihood'].bits==pytest.approx(pseudo.item()*per_nat, abs=1e-9)

def test_orders_are_combined_chunk_by_chunk():
    "Batches of three chunks, with orders by their seed and number"
    ids,per_nat = IDS[:24],1/(24*math.log(2))
    chunks = ids.view(2, 3, 4)
    nats = torch.cat([order_nats(network(), x, 3, seed=5*100003+i) for i,x in enumerate(chunks)], 1)
    expected = dict(mean=nats.mean(0), best=nats.min(0).values, mixture=-(-nats).exp().mean(0).log())
    rows = rows_by_name(network(), ids, bs=3)
    for name,value in expected.items():
        row = rows[f"{'mean over' if name=='mean' else name+' of'} 3 orders"]
        assert row.bits==pytest.approx(value.sum().item()*per_nat, abs=1e-9)
    assert rows['mean over 3 orders'].se==pytest.approx((nats.sum(1).std()/3**.5).item()*per_nat, abs=1e-9)

def test_each_row_says_what_it_is():
    kinds = {name:o.kind for name,o in rows_by_name(network(), IDS).items()}
    neither = {o for o,kind in kinds.items() if kind=='no probability'}
    bounds = {o for o,kind in kinds.items() if kind=='bound'}
    assert neither=={'best of 3 orders', 'pseudo-log-likelihood'}
    assert bounds=={o for o in kinds if 'bound' in o or 'mean' in o}

def test_a_foreign_network_with_special_tokens_has_the_same_table():
    model,order = special_tokens()
    ours,theirs = rows_by_name(network(), IDS),rows_by_name(model, order[IDS])
    assert list(ours)==list(theirs)
    for name,o in ours.items(): assert theirs[name][:5]==pytest.approx(o[:5], abs=1e-9), name

def test_forward_passes_are_those_of_the_network(monkeypatch):
    "Of one chunk; scores of orders share theirs, and both bounds of MDLM's kind have one more for the prior"
    calls,inner = [],network().hidden
    monkeypatch.setattr(network(), 'hidden', lambda x,*args: (calls.append(len(x)), inner(x, *args))[1])
    passes = {name:o.passes for name,o in rows_by_name(network(), IDS[:4]).items()}
    orders = dict.fromkeys(('mean over 3 orders', 'mixture of 3 orders', 'best of 3 orders'), 12)
    bounds = ('Monte-Carlo bound, LLaDA', 'Monte-Carlo bound, MDLM', 'discrete-time bound, 4 steps')
    alone = dict.fromkeys(bounds, 8) | {'left to right': 4, 'confidence': 4, 'entropy': 4,
                                        'spread, 2 passes': 2, 'pseudo-log-likelihood': 4}
    assert passes==orders|alone and sum(calls)==sum(alone.values())+12+2

def test_a_time_conditioned_network_is_scored_in_its_own_noise():
    noise = Corruption(V, schedule=HalfCosine(.01))
    model = TableDenoiser(V, L, noise, 25, time_conditioning=True)
    rows = rows_by_name(model, IDS)
    assert 'Monte-Carlo bound, own noise' in rows and not any('discrete' in o for o in rows)
    assert rows['left to right'].bits==pytest.approx(document_nll(model, IDS).sum().item()/26/math.log(2))

def test_bits_are_divided_by_the_units():
    a,b = (rows_by_name(network(), IDS, units=o) for o in (None, 13))
    for name in a: assert b[name][2:4]==pytest.approx([2*o for o in a[name][2:4]], abs=1e-9)

def test_a_table_fits_on_the_page_and_has_all_rows():
    rows = score_table(network(), IDS, n=2, k=2, T=4096, steps=1024)
    rows = [o._replace(bits=o.bits+100, passes=10**7, seconds=1e6) for o in rows]
    lines = format_scores(rows, 'character').splitlines()
    assert len(lines)==len(rows)+1 and max(map(len, lines))<=90
    for o,line in zip(rows, lines[1:]): assert o.name in line and o.kind in line and f'{o.bits:.4f}' in line

def test_progress_sees_every_score():
    batches = []
    score_table(network(), IDS, n=2, k=2, T=2, steps=2, progress=lambda o: (batches.append(1), o)[1])
    assert len(batches)>=11

# What is rejected

@pytest.mark.parametrize('name, change', [
    ('n', dict(n=1)), ('k', dict(k=1)), ('T', dict(T=0)), ('steps', dict(steps=0)), ('units', dict(units=0)),
    ('seed', dict(seed=-1)), ('bs', dict(bs=0)), ('ids', dict(ids=IDS+3)), ('ids', dict(ids=X)),
    ('model', dict(model=3)),
    ('noise of the model', dict(model=tiny_denoiser(V, L, noise=Corruption(V, mask=.5, substitute=.5))))],
    ids=lambda o: o if isinstance(o, str) else '')
def test_tables_reject_wrong_arguments_by_name(name, change):
    with pytest.raises(ValueError, match=rf'\b{name}\b'):
        score_table(**dict(model=network(), ids=IDS) | change)

@pytest.mark.parametrize('name, f', [
    ('L', lambda: SmallLanguage(network(), 5)),
    ('L', lambda: SmallLanguage(TableDenoiser(2, 8), 7)),
    ('L', lambda: SmallLanguage(network(), 0)),
    ('clean tokens', lambda: SmallLanguage(TableDenoiser(5, 2), 2)),
    ('bs', lambda: SmallLanguage(network(), 2, bs=0)),
    ('model', lambda: SmallLanguage(TableDenoiser(V, L, time_conditioning=True), L)),
    ('noise of the model', lambda: SmallLanguage(tiny_denoiser(V, L, noise=Corruption(V, substitute=1)), L)),
    ('order', lambda: language().in_order([0, 1])),
    ('rule', lambda: language().in_order([0, 0, 1, 2])),
    ('T', lambda: language().discrete_bound(0)),
    ('schedule', lambda: language().discrete_bound(2, 'none')),
    ('language', lambda: small_scores(network())),
    ('k', lambda: small_scores(language(), k=0)),
    ('nats', lambda: total_probability('x')),
    ('n', lambda: llada_draws(network(), X, 0)),
    ('seed', lambda: llada_draws(network(), X, seed=-1)),
    ('x', lambda: llada_draws(network(), X+1)),
    ('x', lambda: pseudo_nll(network(), torch.zeros(1, 5).long())),
    ('bs', lambda: pseudo_nll(network(), X, bs=0))])
def test_wrong_arguments_are_rejected_by_name(name, f):
    with pytest.raises(ValueError, match=rf'\b{name}\b'): f()
