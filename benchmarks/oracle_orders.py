"""What an oracle order is worth: the best of some orders, chosen with the text in hand, by enumeration.

    python benchmarks/oracle_orders.py

For languages of 2 to 4 tokens and 4 or 6 positions, and denoisers with random weights or trained on Markov
languages: `Z` is the sum over all sequences of the probability in the best of K orders, `hidden` its
logarithm in bits. For trained ones the `ladder` has the expected bits per sequence under the language that
they learnt: its entropy; a fixed order; adaptive rules; a mixture of K orders; the best of K orders, with
log2 K bits to send the order, with log2 Z bits to make it a probability, and as such. K orders are those of
the public seeds 0 to K-1. Writes benchmarks/results/oracle_orders.json after every row; rows that are there
are skipped."""
import math
from functools import partial
from itertools import product
import torch
from bijdiff.console import command
from bijdiff.likelihood.exact import log_prob
from bijdiff.likelihood.scores import mixture_nats, order_rules, SmallLanguage, total_probability
from bijdiff.sampling.rules import public_order
from common import do_missing, ints, n_params, result_path, resume, shared_run_record
from small_languages import entropy_bits, expected_bits, markov_language, train, untrained

SIZES = (2, 4), (2, 6), (3, 4), (3, 6), (4, 4), (4, 6)
NUMBERS = 2, 4, 8, 16, 32, 64

def scores_of_orders(language, numbers):
    "Return nats of all sequences in the best of K orders and in their mixture, by K; all orders by 'all'"
    each = torch.stack([language.in_order(public_order(language.L, seed)) for seed in range(max(numbers))])
    rules = {name:order_rules[name] for name in ('best', 'mixture')}
    found = {k:{name:f(each[:k]) for name,f in rules.items()} for k in numbers}
    return found | {'all': {name:language.over_all_orders(f) for name,f in rules.items()}}

def n_orders(k, L): return math.factorial(L) if k=='all' else k

def hidden_bits(nats): return math.log2(total_probability(nats))

def ladder(language, p, orders):
    "Return expected bits per sequence, from the entropy of the language to scores that are no probabilities"
    def bits(nats): return round(expected_bits(p, nats), 4)
    def rule(name): return bits(-log_prob(language.model, language.x, name))
    rows = dict(
        entropy_of_language=round(entropy_bits(p), 4), left_to_right=rule('left_to_right'),
        confidence=rule('confidence'), entropy=rule('entropy'),
        mean_over_orders=bits(language.monte_carlo_bound()))
    for k,o in orders.items():
        best,number = bits(o['best']),math.log2(n_orders(k, language.L))
        rows[str(k)] = dict(
            mixture=bits(o['mixture']), best_and_its_number=round(best+number, 4),
            best_normalised=round(best+hidden_bits(o['best']), 4), best=best)
    return rows

def measure(kind, V, L, seed, steps):
    "Return a row of the result file"
    p = markov_language(V, L, seed)
    model = train(p, V, L, seed, steps) if kind=='trained' else untrained(V, L, seed)
    language = SmallLanguage(model, L)
    orders = scores_of_orders(language, [k for k in NUMBERS if k<math.factorial(L)])
    totals = {str(k):round(total_probability(o['best']), 6) for k,o in orders.items()}
    hidden = {str(k):round(hidden_bits(o['best']), 4) for k,o in orders.items()}
    mixtures = max(abs(total_probability(o['mixture'])-1) for o in orders.values())
    row = dict(kind=kind, V=V, L=L, seed=seed, n_params=n_params(model), Z=totals, hidden=hidden,
               mixture_Z_error=mixtures)
    return row | (dict(ladder=ladder(language, p, orders)) if kind=='trained' else {})

@command
def oracle_orders(
    seeds:str='0,1,2', # Seeds of languages, weights and trainings, separated by commas
    steps:int=400, # Steps of each training
    threads:int=1, # Threads of PyTorch
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Measure what the best of some orders hides, and what it would take to send it"
    torch.set_num_threads(threads)
    target = result_path(__file__, out)
    settings = dict(steps=steps)
    old = resume(target, settings)
    rows = old.get('rows', [])
    record = shared_run_record(__file__, old=old, **settings)
    runs = product(ints(seeds), SIZES, ('random', 'trained'))
    keys = [dict(kind=kind, V=V, L=L, seed=seed) for seed,(V,L),kind in runs]
    do_missing(target, rows, [(key, partial(measure, **key, steps=steps)) for key in keys], record)

if __name__=='__main__': oracle_orders()
