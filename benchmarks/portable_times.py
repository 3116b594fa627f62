"""Time, memory and accuracy of portable arithmetic, beside float32 in the same process.

    python benchmarks/portable_times.py TEXT MODELS/byte

MODELS/byte is a folder of a saved model. The two evaluations take turns on batches of the text in which half
of the tokens are masked. The result has
- seconds of both, and the quartiles of their ratio turn by turn, for several batches;
- seconds of decompressing 8 kB: portable with its default context, and in the arithmetic of the machine
  without context, as before there was portable arithmetic;
- the fraction of the time of each kind of function in a portable evaluation;
- the largest difference of a logit, and the bits per token of the held-out text by both: the bound with the
  same noise, and the exact likelihood of a rule;
- a wide network of random weights, to see that nothing leaves the range of exact sums.

Writes benchmarks/results/portable_times.json."""
import time
from collections import Counter
from contextlib import contextmanager
import torch
from bijdiff.console import command
from bijdiff.data.corpora import load_corpus, split_text
from bijdiff.layers import portable_arithmetic
from bijdiff.likelihood.bounds import nelbo_draws
from bijdiff.likelihood.codec import compress, decompress
from bijdiff.likelihood.exact import log_prob
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.likelihood.portable import portable
from common import describe, random_weights, ratio, result_path, run_record, save, seconds_in_turns
from common import spread_chunks, timed

def half_masked(ids, mask_id):
    "Return ids with a mask at every second place on average, by random numbers of a fixed seed"
    g = torch.Generator().manual_seed(0)
    return ids.masked_fill(torch.rand(ids.shape, generator=g)<.5, mask_id)

def times(model, view, ids, bs, turns):
    "Return seconds of both evaluations of a batch, and the quartiles of their ratio"
    x = half_masked(ids[:bs], model.mask_id)
    steps = dict(float32=lambda: timed(lambda: model(x))[1], portable=lambda: timed(lambda: view(x))[1])
    seconds = seconds_in_turns(steps, turns, warmup=1)
    medians = {k:round(sorted(v)[len(v)//2], 4) for k,v in seconds.items()}
    return dict(bs=bs, L=x.shape[1], seconds=medians, ratio=ratio(seconds['portable'], seconds['float32']))

@contextmanager
def timed_functions(seconds):
    "Add the seconds of each function that portable arithmetic replaces to a counter"
    table = portable_arithmetic._replaced
    before = dict(table)
    def wrap(name, f):
        def g(*args, **kwargs):
            result,s = timed(lambda: f(*args, **kwargs))
            seconds[name] += s
            return result
        return g
    table.update({name:wrap(name, f) for name,f in before.items()})
    try: yield
    finally: table.update(before)

def parts(view, x, turns):
    "Return the fraction of the time of each kind of function"
    seconds,start = Counter(),time.perf_counter()
    with timed_functions(seconds):
        for _ in range(turns): view(x)
    total = time.perf_counter()-start
    fractions = {k:round(s/total, 3) for k,s in seconds.most_common() if s>.005*total}
    return fractions | dict(others=round(1-sum(seconds.values())/total, 3))

def bits(model, view, ids, draws, steps):
    "Return bits per token of chunks by both evaluations, and the largest difference of a logit"
    x = half_masked(ids[:16], model.mask_id)
    found = dict(largest_logit_difference=(model(x)-view(x)).abs().max().item())
    n = ids.numel()*torch.tensor(2.).log().item()
    for name,m in dict(float32=model, portable=view).items():
        bound = nelbo_draws(m, ids, draws, seed=0).mean(0).sum().item()/n
        exact = -log_prob(m, ids, 'spread', steps).sum().item()/n
        found[name] = dict(bound=round(bound, 7), exact=round(exact, 7))
    return found

def decoding(model, data, turns):
    "Return seconds of decompressing some bytes in both arithmetics, and the quartiles of their ratio"
    blobs = dict(portable=compress(model, data), fast=compress(model, data, fast=True, context=0))
    steps = {k:lambda blob=blob: timed(lambda: decompress(model, blob))[1] for k,blob in blobs.items()}
    seconds = seconds_in_turns(steps, turns)
    medians = {k:round(sorted(v)[len(v)//2], 2) for k,v in seconds.items()}
    return dict(bytes=len(data), seconds=medians, ratio=ratio(seconds['portable'], seconds['fast']))

def wide(width, vocab_size):
    "Return the size of the logits of a wide network of random weights in portable arithmetic"
    torch.manual_seed(0)
    config = DenoiserConfig(vocab_size, seq_len=32, d_model=width, n_heads=8, n_layers=2)
    view = portable(random_weights(BijectiveDenoiser(config), .05).eval())
    logits = view(torch.randint(0, vocab_size, (2, 32)))
    finite = bool(logits.isfinite().all())
    return dict(width=width, vocab_size=vocab_size, finite=finite, std=round(logits.std().item(), 3))

@command
@torch.no_grad()
def portable_times(
    path:str, # The text
    folder:str, # Folder of a saved model
    turns:int=9, # Turns of the time measurement
    draws:int=4, # Draws of the noise for the bound
    chunks:int=64, # Chunks of the held-out text that are scored
    steps:int=16, # Function evaluations of the rule
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Measure portable arithmetic beside float32"
    torch.set_num_threads(1)
    model = BijectiveDenoiser.from_pretrained(folder).eval()
    view = portable(model)
    _,valid = split_text(load_corpus(path))
    ids = spread_chunks(valid, model.tokenizer, chunks, model.seq_len)
    res = dict(times=[times(model, view, ids, bs, turns) for bs in (1, 4, 16, 64)])
    print(res)
    res['decoding'] = decoding(model, valid.encode()[:8192], 3)
    res['parts'] = parts(view, half_masked(ids[:16], model.mask_id), 3)
    res |= dict(bits=bits(model, view, ids, draws, steps), wide=wide(1024, 50_257))
    res['model'] = describe(folder, model)
    print(res)
    record = run_record(__file__, turns=turns, draws=draws, chunks=chunks, steps=steps, seed=0)
    save(result_path(__file__, out), res | record)

if __name__=='__main__': portable_times()
