"""Memory and time of writing at a large vocabulary: every sampler and rule, in one large batch.

    python benchmarks/writing_size.py      # writes benchmarks/results/writing_size.json

A network with random weights writes all sequences in one batch. Memory: the most that the process holds
while it writes, above what it holds with the network and after a short warm-up, in GB. Network: the
fraction of the time in `hidden` and `head`. Seconds are those of a sequence. First hitting takes one step a
mask, so all but `steps` tokens of its sequences are given.

Beside it, MDLM's cached sampler, as the paper describes it (Sahoo et al. 2024, 2406.07524, section 4.2):
logits at all positions, and V+1 classes at each, drawn with Gumbel numbers in float32; the network is
evaluated again where something has changed. It has batches of 8, as a larger one does not fit. The same
network, length and number of steps.

Each row is measured in a process of its own. Rows that are there are skipped."""
import multiprocessing
import time
from pathlib import Path
from types import SimpleNamespace
import torch
from bijdiff.console import command
from bijdiff.diffusion.corruption import Corruption
from bijdiff.diffusion.schedules import HalfCosine
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.sampling.generate import sample
from bijdiff.sampling.rules import UnmaskingRule
from common import do_missing, load, random_weights, result_path, shared_run_record

DENSE_BS = 8
NOISES = dict(mask=dict(mask=1.), hybrid=dict(mask=.8, substitute=.2), deletion=dict(mask=.5, delete=.5))
MASKS = ['ancestral', 'tweedie', 'euler', 'first_hitting', 'remask_cap', 'remask_rescale', 'remask_loop',
         *UnmaskingRule.names]
ROWS = [('mask', name) for name in ('cached', *MASKS)] + [('deletion', 'insertion')]
ROWS += [('hybrid', name) for name in ('ancestral', 'tweedie', 'euler', 'forward_backward')]

def network(s, noise):
    "Return a network with random weights"
    torch.manual_seed(s.seed)
    corruption = Corruption(s.vocab_size, **NOISES[noise])
    sizes = dict(d_model=s.d_model, n_heads=s.n_heads, n_layers=s.n_layers)
    config = DenoiserConfig(s.vocab_size, s.seq_len, noise=corruption.to_dict(), reversible=False,
                            **corruption.config_fields(), **sizes)
    return random_weights(BijectiveDenoiser(config), .02).eval()

def count_seconds(model):
    "Make a network add up the seconds in `hidden`, `head` and calls; return them by name"
    seconds = dict(hidden=0., head=0., forward=0.)
    def timed(name, f):
        def call(*args, **kwargs):
            start = time.perf_counter()
            out = f(*args, **kwargs)
            seconds[name] += time.perf_counter()-start
            return out
        return call
    for name in seconds: setattr(model, name, timed(name, getattr(model, name)))
    return seconds

def cached_step(q, logits, x, mask_id, t, s):
    "Symbols at time s, drawn from V+1 classes with Gumbel numbers, and copied where they are revealed"
    alpha_t,alpha_s = (HalfCosine().alpha(torch.tensor(o, dtype=torch.float64)).item() for o in (t, s))
    moves_t,moves_s = 1-alpha_t*(t<1),1-alpha_s if s else 0.
    q[...,:-1] = logits.softmax(-1)*(moves_t-moves_s)
    q[...,-1] = moves_s
    drawn = (q/torch.empty_like(q).exponential_()).argmax(-1)
    return torch.where(x==mask_id, drawn, x)

@torch.no_grad()
def cached(model, n, steps):
    "Return sequences by MDLM's sampler"
    L,V,mask_id = model.seq_len,model.noise.vocab_size,model.mask_id
    x,logits,q = torch.full((n, L), mask_id),None,torch.zeros(n, L, V+1)
    for i in range(steps):
        if logits is None: logits = model.head(model.hidden(x))
        new = cached_step(q, logits, x, mask_id, 1-i/steps, 1-(i+1)/steps)
        if not torch.equal(new, x): logits = None
        x = new
    return x

def write(s, model, name):
    "Write sequences; return their number"
    if name=='cached':
        cached(model, DENSE_BS, s.steps)
        return DENSE_BS
    template = torch.full((model.seq_len,), model.mask_id)
    if name=='first_hitting': template[s.steps:] = 0
    options = dict(sampler=name, steps=None if name=='first_hitting' else s.steps)
    sample(model, s.sequences, template=template, bs=s.sequences, seed=s.seed, **options)
    return s.sequences

def memory(field):
    "Return a number of this process's memory, in bytes"
    line = next(o for o in Path('/proc/self/status').read_text().splitlines() if o.startswith(field))
    return int(line.split()[1])*1024

def measure(s, noise, name, queue):
    "Write once, and put memory and times into a queue"
    torch.set_num_threads(1)
    model = network(s, noise)
    sample(model, 1, 1, length=4)                                # what is allocated once
    seconds,before = count_seconds(model),memory('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')                # the peak counts from here on
    start = time.perf_counter()
    n = write(s, model, name)
    total = time.perf_counter()-start
    gb = (memory('VmHWM')-before)/1e9
    queue.put(dict(sequences=n, gb=round(gb, 2), seconds=round(total/n, 3),
                   network=round(sum(seconds.values())/total, 3)))

def measure_apart(s, noise, name):
    "Measure a row in a process of its own"
    context = multiprocessing.get_context('spawn')
    queue = context.SimpleQueue()
    process = context.Process(target=measure, args=(s, noise, name, queue))
    process.start()
    process.join()
    assert process.exitcode==0, f'{noise}, {name}: exit status {process.exitcode}'
    return queue.get()

@command
def writing_size(
    vocab_size:int=50_257, # V
    seq_len:int=256, # Positions
    sequences:int=64, # Sequences of a batch
    d_model:int=256, # Width of one stream
    n_heads:int=4, # Attention heads
    n_layers:int=8, # Blocks
    steps:int=8, # Steps
    seed:int=0, # Seed of weights and sequences
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Measure memory and time of all samplers at a large vocabulary"
    given = dict(locals())
    s = SimpleNamespace(**{k:v for k,v in given.items() if k!='out'})
    target = result_path(__file__, out)
    rows = load(target)['rows'] if target.exists() else []
    runs = [(dict(noise=noise, sampler=name), lambda noise=noise, name=name: measure_apart(s, noise, name))
            for noise,name in ROWS]
    do_missing(target, rows, runs, shared_run_record(__file__, setting=vars(s)))

if __name__=='__main__': writing_size()
