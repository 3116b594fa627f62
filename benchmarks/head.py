"""Memory and time of a training pass at a large vocabulary: logits at all positions, or at a few at a time.

    python benchmarks/head.py      # writes benchmarks/results/head.json

The same network, batch and noise, and one forward pass through the network. `dense` computes logits at all
positions and takes the losses of `diffusion.objective`; `chunked` is the loss of the learner, DiffusionLoss.
Memory: most bytes that tensors hold during the pass, above what they hold before it, when weights and their
gradients are there, as multiples of the logits of the batch. Time: both take turns; quartiles of the ratio
dense/chunked, with the median in the middle."""
from functools import partial
from types import SimpleNamespace
import torch
import torch.nn.functional as F
from bijdiff.console import command
from bijdiff.diffusion.corruption import Corruption
from bijdiff.diffusion.objective import hybrid_nelbo, masked_nelbo, score_entropy
from bijdiff.diffusion.schedules import low_discrepancy_times
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.model.predictions import output_scores
from bijdiff.training.noising import DiffusionLoss
from common import add_row, check_peak, peak_bytes, random_weights, ratio, result_path, run_record, save
from common import seconds_in_turns, timed_step

# Losses from logits at all positions, nats per token

def dense_masks(c, model, logits, noisy, t):
    "Return the bound of masking"
    return masked_nelbo(logits, noisy.x0, noisy.xt, t, c.schedule).mean()

def dense_scores(c, model, logits, noisy, t):
    "Return the score entropy of masking"
    scores = output_scores(model, logits, noisy.xt, c.state_probs(t))[...,:-1]
    return score_entropy(scores, noisy.x0, noisy.xt, t, c.schedule).mean()

def dense_hybrid(c, model, logits, noisy, t):
    "Return the bound of masking and substitution"
    return hybrid_nelbo(logits, noisy.x0, noisy.xt, t, c).mean()

ROWS = { # Noise, fields of the network beside its size, loss from logits
    'masks': (dict(schedule='half_cosine'), {}, dense_masks),
    'masks, log-linear': (dict(schedule='log_linear'), {}, dense_masks),
    'score entropy': (dict(schedule='log_linear'), dict(score_head=True), dense_scores),
    'hybrid': (dict(mask=.8, substitute=.2), dict(time_conditioning=True), dense_hybrid),
}

def problem(s, name):
    "Return network, noise, noisy sequences and times of a row, the same at each call"
    torch.manual_seed(s.seed)
    noise,fields,_ = ROWS[name]
    c = Corruption(s.vocab_size, **noise)
    size = dict(d_model=s.d_model, n_heads=s.n_heads, n_layers=s.n_layers)
    config = DenoiserConfig(s.vocab_size, s.seq_len, **size, noise=c.to_dict(), **fields)
    model = random_weights(BijectiveDenoiser(config), .02).to(s.device)
    g = torch.Generator().manual_seed(s.seed)
    x = torch.randint(0, s.vocab_size, (s.batch, s.seq_len), generator=g).to(s.device)
    t = low_discrepancy_times(s.batch, None, g)
    return model, c, c.corrupt(x, t, g), t

def dense(s, name):
    "Return a function that computes the loss from logits at all positions, and the network"
    model,c,noisy,t = problem(s, name)
    return lambda: ROWS[name][2](c, model, model(noisy.xt, t), noisy, t), model

def chunked(s, name):
    "Return a function that computes the loss of the learner, and the network"
    model,c,noisy,t = problem(s, name)
    loss = DiffusionLoss(c, model)
    return lambda: loss(model(noisy.xt, t, None, True), noisy.x0, noisy.xt, t), model

def plain(s, name):
    "Return a function that computes the cross-entropy at all positions, and the network"
    model,c,noisy,t = problem(s, name)
    return lambda: F.cross_entropy(model(noisy.xt, t).flatten(0, 1), noisy.x0.flatten()), model

# Measurements

def prepare(loss, model):
    "Return a pass forward and back, after one that has allocated the gradients"
    if next(model.parameters()).grad is None: loss().backward()
    model.zero_grad(set_to_none=False)
    return lambda: loss().backward()

def copies(s, way, name):
    "Return the memory of a pass, in logits of the batch"
    logits = 4*s.batch*s.seq_len*s.vocab_size
    return round(peak_bytes(partial(prepare, *way(s, name)), s.device)/logits, 2)

def gradients(s, way, name):
    "Return the loss and the gradients of all weights"
    loss,model = way(s, name)
    value = loss()
    value.backward()
    return value.detach(), [p.grad for p in model.parameters()]

def differences(s, name):
    "Return the relative difference of the losses, and the largest one of the gradients of a weight"
    (a,found),(b,want) = (gradients(s, way, name) for way in (chunked, dense))
    worst = max(((p-q).norm()/q.norm()).item() for p,q in zip(found, want) if q.norm())
    return dict(loss_difference=float(f'{abs(a/b-1).item():.2g}'), gradient_difference=float(f'{worst:.2g}'))

def measure(s, name, turns):
    "Return a row of the table"
    row = dict(row=name, dense=copies(s, dense, name), chunked=copies(s, chunked, name))
    steps = {way.__name__:timed_step(partial(prepare, *way(s, name)), s.device) for way in (dense, chunked)}
    seconds = seconds_in_turns(steps, turns, 1)
    times = {f'{k}_seconds':round(sorted(v)[turns//2], 2) for k,v in seconds.items()}
    return row | times | dict(speedup=ratio(seconds['dense'], seconds['chunked'])) | differences(s, name)

@command
def head(
    vocab_size:int=50_257, # V
    seq_len:int=256, # Positions
    batch:int=4, # Sequences
    d_model:int=256, # Width of one stream
    n_heads:int=8, # Attention heads
    n_layers:int=4, # Blocks
    turns:int=9, # Turns per time
    device:str='cpu', # cpu or cuda
    seed:int=0, # Seed of weights, text and noise
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Measure memory and time of the head in training"
    given = dict(locals())
    s = SimpleNamespace(**{k:v for k,v in given.items() if k not in ('turns', 'out')})
    check_peak(device)
    table = []
    record = run_record(__file__, device, setting=vars(s))
    result = dict(cross_entropy=copies(s, plain, 'masks'), rows=table, **record)
    for name in ROWS:
        add_row(table, measure(s, name, turns))
        save(result_path(__file__, out), result)

if __name__=='__main__': head()
