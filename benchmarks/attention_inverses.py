"""Four inverses of attention: error, condition number, time and log-determinant at lengths 16, 64 and 256.

    python benchmarks/attention_inverses.py

Weights are initial or trained; trained ones come from filling in masked characters through one attention
layer. States are embedded characters of the embedded corpus with random position codes. Errors are in
float32; `logdet_error` compares with the dense Jacobian in float64 at length 16. Writes
benchmarks/results/attention_inverses.json."""
import random
import statistics
import warnings
import torch
from torch import nn
import torch.nn.functional as F
from bijdiff.console import command
from bijdiff.data.loaders import text_dls
from bijdiff.layers.attention_inverse import (BijectiveMultiHeadAttention, CachedAttention, CouplingAttention,
                                              FixedPointAttention, MixingAttention, Reconstruction)
from bijdiff.layers.bijection import dense_logdet
from bijdiff.layers.coupling import split_halves
from bijdiff.layers.lattice import to_lattice
from common import batches, median_seconds, result_path, run_record, save

KINDS = dict(coupling={}, mixing={}, cached={}, fixed_point=dict(logdet='series', n_probes=2, n_terms=4))

class Filler(nn.Module):
    "Embedded characters, one attention layer, logits"
    def __init__(self, vocab_size, d_model, n_heads, kind):
        super().__init__()
        self.embed = nn.Embedding(vocab_size+1, d_model)
        self.attn = BijectiveMultiHeadAttention(d_model, n_heads, kind, **KINDS[kind])
        self.head = nn.Linear(d_model, vocab_size)
        g = torch.Generator().manual_seed(1)
        self.register_buffer('positions', torch.randn(512, d_model, generator=g))

    def state(self, ids):
        "Return the state before the layer: one stream, or two that are equal"
        h = self.embed(ids)+self.positions[:ids.shape[1]]
        return torch.cat([h]*(self.attn.state_dim//h.shape[-1]), -1)

    def forward(self, ids):
        y,_ = self.attn(self.state(ids))
        return self.head(sum(y.split(self.head.in_features, -1)))

def train(model, dls, steps, mask_id):
    "Train to fill in a third of the characters; return the mean loss of the last 20 steps"
    opt = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _,x in zip(range(steps), batches(dls.train)):
        hidden = torch.rand(x.shape)<1/3
        loss = F.cross_entropy(model(x.masked_fill(hidden, mask_id))[hidden], x[hidden])
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return statistics.mean(losses[-20:])

def condition(layer, h):
    "Return the largest condition number of a matrix that the inverse solves for, None without such a matrix"
    if isinstance(layer, MixingAttention): matrix = layer._matrix(split_halves(h)[1], None)
    elif isinstance(layer, CachedAttention): matrix = layer.attention(h)
    else: return None
    return torch.linalg.cond(matrix.double()).max().item()

@torch.no_grad()
def logdet_error(model, h):
    "Return a layer's log-determinant in float64 and its largest difference to the dense one, in nats"
    layer = model.attn.layer.double()
    h = h[:1].double()
    is_series = isinstance(layer, FixedPointAttention)
    if is_series: layer.logdet = 'dense'
    logdet = layer(h)[1]
    error = (logdet-dense_logdet(layer, h)).abs().max().item()
    if is_series: layer.logdet = 'series'
    layer.float()
    return dict(logdet_nats=logdet.item(), logdet_error=error)

def lattice_error(layer, h):
    "Return the largest error of inverting a coupling on the lattice"
    layer.lattice_bits = 12
    x = to_lattice(h, 12)
    error = (layer.inverse(layer(x)[0])[0]-x).abs().max().item()
    layer.lattice_bits = None
    return error

@torch.no_grad()
def measure(model, x):
    "Return errors and times of one layer at one length"
    layer,h = model.attn.layer,model.state(x)
    y = layer(h)[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        back = layer.inverse(y)
    error = back[0]-h
    reported = back.error.max().item() if isinstance(back, Reconstruction) else None
    res = dict(L=x.shape[1], error=error.abs().max().item(), rms=error.pow(2).mean().sqrt().item(),
               warned=bool(caught), condition=condition(layer, h), reported=reported)
    warnings.simplefilter('ignore')
    res['forward_ms'] = 1e3*median_seconds(lambda: layer(h), 5)
    res['inverse_ms'] = 1e3*median_seconds(lambda: layer.inverse(y), 5)
    if isinstance(layer, CouplingAttention): res['lattice_error'] = lattice_error(layer, h)
    return res

def rows_of(kind, x, d_model, n_heads, vocab_size, steps):
    "Yield the rows of one kind of attention: two sorts of weights, three lengths"
    torch.manual_seed(0)
    random.seed(0) # The order of the training sequences
    model = Filler(vocab_size, d_model, n_heads, kind)
    loss = None
    for weights in ('initial', 'trained'):
        if weights=='trained': loss = train(model, text_dls('pydoc', seq_len=64, bs=16), steps, vocab_size)
        for L in (16, 64, 256):
            row = dict(kind=kind, weights=weights, loss=loss, **measure(model, x[:,:L]))
            if L==16: row |= logdet_error(model, model.state(x[:,:L]))
            yield row

def shown(row):
    "Return the values of a row that are not None, numbers with three digits"
    return {k:f'{v:.3g}' if isinstance(v, float) else v for k,v in row.items() if v is not None}

@command
def attention_inverses(
    d_model:int=64, # Width of one stream
    n_heads:int=4, # Attention heads
    bs:int=8, # Sequences that are measured
    steps:int=300, # Training steps
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Compare four inverses of attention"
    dls = text_dls('pydoc', seq_len=256, bs=16)
    x = next(batches(dls.valid))[:bs]
    rows = []
    for kind in KINDS:
        for row in rows_of(kind, x, d_model, n_heads, dls.tokenizer.vocab_size, steps):
            rows.append(row)
            print(shown(row), flush=True)
    settings = dict(d_model=d_model, n_heads=n_heads, bs=bs, steps=steps, seed=0)
    save(result_path(__file__, out), dict(rows=rows) | run_record(__file__, **settings))

if __name__=='__main__': attention_inverses()
