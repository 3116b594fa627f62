"""Memory and time of exact likelihoods at a large vocabulary: whole distributions, or one number a position.

    python benchmarks/exact_memory.py      # writes benchmarks/results/exact_memory.json

The same network, sequences and rules. `bounded` is `token_nll` with 64 sequences in a batch; `dense` computes
logits and whole distributions at all positions that a step reads, with 8 sequences in a batch. Memory: most
bytes that tensors hold during the call, above the weights and the ids, in GB. Time: seconds a sequence, as
both take turns; quartiles of the ratio dense/bounded, with the median in the middle. Difference: the largest
one of the nats of a token, where they are finite."""
from functools import partial
from types import SimpleNamespace
import torch
from bijdiff.console import command
from bijdiff.likelihood.exact import token_nll
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.sampling.conditionals import confidence, token_probs
from bijdiff.sampling.rules import get_rule, reveal_counts, reveal_ranks
from common import add_row, check_peak, peak_bytes, random_weights, ratio, result_path, save
from common import seconds_in_turns, shared_run_record, timed_step

DENSE_BS = 8
ROWS = [ # Rule, steps, options, whether times are measured too
    ('spread', 1, {}, True),
    ('confidence', 1, {}, True),
    ('spread', 4, {}, False),
    ('confidence', 4, {}, False),
    ('confidence', 1, dict(temperature=.8, top_p=.9), False),
]

def problem(s):
    "Return the network and the sequences"
    torch.manual_seed(s.seed)
    size = dict(d_model=s.d_model, n_heads=s.n_heads, n_layers=s.n_layers)
    model = random_weights(BijectiveDenoiser(DenoiserConfig(s.vocab_size, s.seq_len, **size)), .2).eval()
    x = torch.randint(0, s.vocab_size, (s.sequences, s.seq_len))
    return model.to(s.device), x

def dense_batch(model, x, rule):
    "Return nats of each token of a batch, from whole distributions at all positions that a step reads"
    nats,z = torch.zeros(x.shape, dtype=torch.float64),torch.full_like(x, model.mask_id)
    keys = rule.order_keys(torch.full((len(x),), x.shape[1]), x.shape[1])
    for count in reveal_counts(x.shape[1], rule.steps):
        read = masked = z==model.mask_id
        if not rule.adaptive: read = masked & (reveal_ranks(masked, keys)<count)
        logits = model.head(model.hidden(z.to(model.device))[read.to(model.device)]).cpu()
        p = token_probs(logits, rule.temperature, rule.top_p)
        now = read
        if rule.adaptive:
            certain = torch.full(x.shape, -torch.inf, dtype=p.dtype)
            certain[masked] = confidence(p, rule.rule)
            now = masked & (reveal_ranks(masked, keys, certain)<count)
        nats[now] = -p[now[read]].gather(-1, x[now][:,None])[:,0].log()
        z = torch.where(now, x, z)
    return nats

@torch.no_grad()
def dense(model, x, rule):
    "Return nats of each token of the first sequences, from whole distributions"
    return dense_batch(model, x[:DENSE_BS], rule)

def bounded(model, x, rule):
    "Return nats of each token as the package computes them, in one batch"
    return token_nll(model, x, rule, bs=len(x))

def gigabytes(s, way, rule):
    "Return the peak memory of a batch"
    model,x = problem(s)
    return round(peak_bytes(lambda: partial(way, model, x, rule), s.device)/1e9, 2)

def seconds_each(s, rule, turns):
    "Return the seconds a sequence of both ways, in turns"
    model,x = problem(s)
    calls = {f.__name__:partial(f, model, x, rule) for f in (dense, bounded)}
    steps = {name:timed_step(lambda call=call: call, s.device) for name,call in calls.items()}
    seconds = seconds_in_turns(steps, turns)
    n = dict(dense=DENSE_BS, bounded=len(x))
    return {k:[o/n[k] for o in v] for k,v in seconds.items()}

def difference(s, rule):
    "Return the largest difference of the nats of a token"
    model,x = problem(s)
    a,b = dense(model, x, rule),bounded(model, x[:DENSE_BS], rule)
    return float(f'{(a-b).masked_fill(a==b, 0.).abs().max().item():.2g}')

def measure(s, name, steps, options, is_timed, turns):
    "Return a row of the table"
    rule = get_rule(name, steps, **options)
    memory = {f'{f.__name__}_gb':gigabytes(s, f, rule) for f in (dense, bounded)}
    row = dict(rule=name, steps=steps, **options, **memory, difference=difference(s, rule))
    if not is_timed: return row
    seconds = seconds_each(s, rule, turns)
    times = {f'{k}_seconds':round(sorted(v)[turns//2], 2) for k,v in seconds.items()}
    return row | times | dict(speedup=ratio(seconds['dense'], seconds['bounded']))

@command
def exact_memory(
    vocab_size:int=50_257, # V
    seq_len:int=256, # Positions
    sequences:int=64, # Sequences
    d_model:int=64, # Width of one stream, and number of features
    n_heads:int=2, # Attention heads
    n_layers:int=2, # Blocks
    turns:int=3, # Turns per time
    device:str='cpu', # cpu or cuda
    seed:int=0, # Seed of weights and sequences
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Measure memory and time of exact likelihoods at a large vocabulary"
    given = dict(locals())
    s = SimpleNamespace(**{k:v for k,v in given.items() if k not in ('turns', 'out')})
    check_peak(device)
    table = []
    result = dict(rows=table, **shared_run_record(__file__, device, turns=turns, setting=vars(s)))
    for row in ROWS:
        add_row(table, measure(s, *row, turns))
        save(result_path(__file__, out), result)

if __name__=='__main__': exact_memory()
