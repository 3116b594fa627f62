"""Exact bits of rules that choose how many tokens a step reveals, and a search for an order below `spread`.

    python benchmarks/unmasking.py MODEL                   # the model of the first tutorial, the corpus pydoc
    python benchmarks/unmasking.py MODEL --corpus TEXT

n chunks of the model's length are evenly spread over the held-out tenth of the text.

`sizes` has for each threshold and budget the mean number of forward passes a chunk, the bits per character,
and the paired differences to `spread` and `confidence` with as many passes (their mean, rounded), with
standard errors over chunks. `orders` has all public orders of `public_rules` at 8 and 16 passes: the bits on
the chunks of even number, by which they are chosen, and on those of odd number, with the paired difference
to `spread`.

Writes benchmarks/results/unmasking.json after every row. Rows that are there are skipped."""
import math
import torch
from bijdiff.console import command
from bijdiff.data.corpora import load_corpus, split_text
from bijdiff.diffusion.schedules import get_schedule, Polynomial
from bijdiff.model.denoiser import BijectiveDenoiser, eval_mode
from bijdiff.sampling.rules import public_order, spread_order, unmask, UnmaskingRule
from common import add_row, describe, has_row, mean_se, result_path, resume, save, shared_run_record
from common import spread_ids

# Rules

CHOOSING = [dict(rule='confidence', threshold=t) for t in (.5, .3, .2, .1)]
CHOOSING += [dict(rule='margin', threshold=t) for t in (.2, .05)]
CHOOSING += [dict(rule='entropy', budget=b) for b in (8., 24., 72.)]
CHOOSING += [dict(rule='block', threshold=t) for t in (.3, .1)]

def multiples(L, step): return tuple(k*step%L for k in range(L))

def wave(L, width):
    "A comb that moves to the right: positions by their place plus a delay that spreads within `width`"
    delay = spread_order(width)
    rank = {o:i for i,o in enumerate(delay)}
    return tuple(sorted(range(L), key=lambda i: (i+L*rank[i%width]/width, i)))

def shifted(order, by):
    "An order whose positions move to the right, those at the end to the beginning"
    return tuple((i+by)%len(order) for i in order)

def bits_in_order(L, order):
    "Positions by their binary digits, the most important first"
    return tuple(sorted(range(L), key=lambda i: [i>>b&1 for b in order]))

def public_rules(L, steps):
    "Return at most 60 rules whose order is known beforehand, by name, for a power of two of positions"
    spread = tuple(spread_order(L))
    n_bits = L.bit_length()-1
    rules = {'spread': UnmaskingRule('spread', steps)}
    def add(name, order=spread, **kwargs): rules[name] = UnmaskingRule(order, steps, **kwargs)
    for name in ('cosine', 'half_cosine', 'cosine_squared'):
        add(f'spread, {name}', schedule=get_schedule(name))
    for power in (.7, 1.2, 1.5, 2., 3.): add(f'spread, power {power}', schedule=Polynomial(power))
    for seed in range(10): add(f'random {seed}', tuple(public_order(L, seed)))
    for step in (3, 5, 11, 17, 37, 59, 91, 97, 99, 157): add(f'multiples of {step}', multiples(L, step))
    for width in (4, 8, 16, 32, 64, 128): add(f'wave {width}', wave(L, width))
    for by in (1, 5, 8): add(f'spread, shifted by {by}', shifted(spread, by))
    add('spread, from the end', tuple(L-1-i for i in spread))
    for k in range(1, n_bits):
        add(f'binary digits from {k}', bits_in_order(L, [*range(k, n_bits), *range(k)]))
    for seed in range(8):
        digits = torch.randperm(n_bits, generator=torch.Generator().manual_seed(seed)).tolist()
        add(f'binary digits {digits}', bits_in_order(L, digits))
    add('halves', tuple(sorted(range(L), key=lambda i: (i%2, spread.index(i)))))
    return rules

# Scores

@torch.no_grad()
def follow(model, x, rule, bs=16):
    "Return nats and forward passes of each sequence, (n,)"
    nats,passes = [],[]
    for part in x.split(bs):
        rows = torch.zeros(part.shape, dtype=torch.float64)
        steps = torch.zeros(len(part))
        def note(p, where):
            rows[where] = -p.log()
            steps.add_(where.any(1))
        with eval_mode(model): unmask(model, torch.full_like(part, model.mask_id), rule, note, known=part)
        nats.append(rows.sum(1))
        passes.append(steps)
    return torch.cat(nats), torch.cat(passes)

class Scorer:
    "Bits per character of rules on some chunks, each computed once"
    def __init__(self, model, x):
        self.model,self.x,self.known = model,x,{}
        self.chars = torch.tensor([len(model.tokenizer.decode(o.tolist())) for o in x]).double()

    def __call__(self, rule):
        "Return bits and forward passes of each chunk"
        if rule not in self.known:
            nats,passes = follow(self.model, self.x, rule)
            self.known[rule] = nats/math.log(2),passes
        return self.known[rule]

    def per_char(self, bits, chunks=slice(None)):
        "Return mean and standard error of bits per character, of some chunks"
        return mean_se((bits/self.chars.mean())[chunks], 4)

def size_row(score, options):
    "Return the bits of a rule that chooses the number of tokens, beside fixed numbers"
    bits,passes = score(UnmaskingRule(**options))
    mean = passes.mean().item()
    row = dict(options, passes=round(mean, 1), **score.per_char(bits))
    for other in ('spread', 'confidence'):
        same = score(UnmaskingRule(other, max(round(mean), 1)))[0]
        row[f'minus_{other}'] = score.per_char(bits-same)
        row[other] = score.per_char(same)['mean']
    return row

# The command

EVEN,ODD = slice(0, None, 2),slice(1, None, 2)

def order_row(score, name, rule):
    "Return the bits of an order on both halves of the chunks"
    bits = score(rule)[0]
    difference = bits-score(UnmaskingRule('spread', rule.steps))[0]
    halves = dict(chosen_by=score.per_char(bits, EVEN), reported=score.per_char(bits, ODD),
                  minus_spread=score.per_char(difference, ODD))
    return dict(name=name, steps=rule.steps, **halves)

@command
def unmasking(
    folder:str, # A saved model
    corpus:str='pydoc', # pydoc, or a text
    n:int=48, # Chunks
    threads:int=1, # Threads of PyTorch
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Measure rules that choose how many tokens, and search for an order below spread"
    torch.set_num_threads(threads)
    target,model = result_path(__file__, out),BijectiveDenoiser.from_pretrained(folder)
    ids = torch.tensor(model.tokenizer.encode(split_text(load_corpus(corpus))[1]))
    x = spread_ids(ids, n, model.seq_len)
    score = Scorer(model, x)
    settings = dict(n=n, corpus=corpus, model=describe(folder, model))
    old = resume(target, settings)
    result = dict(sizes=old.get('sizes', []), orders=old.get('orders', []))
    result |= dict(characters=int(score.chars.sum())) | shared_run_record(__file__, old=old, **settings)
    def add(rows, row):
        add_row(rows, row)
        save(target, result)
    for options in CHOOSING:
        if not has_row(result['sizes'], **options): add(result['sizes'], size_row(score, options))
    for steps in (8, 16):
        for name,rule in public_rules(model.seq_len, steps).items():
            key = dict(name=name, steps=steps)
            if not has_row(result['orders'], **key): add(result['orders'], order_row(score, name, rule))

if __name__=='__main__': unmasking()
