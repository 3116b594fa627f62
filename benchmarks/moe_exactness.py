"""Do mixtures of experts invert exactly, and does the inverse choose the same experts?

    python benchmarks/moe_exactness.py

1. `rows`: inverse error of mixtures with trained weights, on the lattice and off it, in float32 and under
   bfloat16 autocast, and with the batch in another order: 2, 4 and 8 experts, both couplings, dense and
   sparse, 8 and 32 blocks. Training is a few steps of Adam on the embedded corpus from random weights of
   standard deviation 0.05, so that every block changes its input.
2. `million`: a million choices of routers: how many the inverse makes differently, on the lattice and off it;
   and the inverse error off it when the choices are kept.

Writes benchmarks/results/moe_exactness.json after every row; rows that are there are skipped."""
import random
from itertools import product
import torch
from bijdiff.console import command
from bijdiff.data.corpora import pydoc_corpus
from bijdiff.data.loaders import text_dls
from bijdiff.diffusion.corruption import Corruption
from bijdiff.diffusion.objective import masked_nelbo
from bijdiff.diffusion.schedules import HalfCosine, low_discrepancy_times
from bijdiff.layers.lattice import to_lattice
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from common import add_row, batches, has_row, random_weights, result_path, resume, run_record, save, timed

D,L,B = 16,64,8
LATTICES = dict(lattice=12, float=None)
PRECISIONS = dict(float32=False, bfloat16=True)

def train(steps, **config_kwargs):
    "Train a small denoiser; return it, a batch of corrupted held-out sequences and the losses"
    torch.manual_seed(0)
    random.seed(0) # The order of the sequences
    dls = text_dls(pydoc_corpus()[:60_000], seq_len=L, bs=B)
    V = dls.tokenizer.vocab_size
    model = BijectiveDenoiser(DenoiserConfig(V, L, d_model=D, n_heads=2, **config_kwargs))
    random_weights(model.backbone, .05)
    opt = torch.optim.Adam(model.parameters(), 3e-3)
    corrupt = Corruption(V, schedule=HalfCosine())
    losses = []
    for _,x in zip(range(steps), batches(dls.train)):
        t = low_discrepancy_times(len(x))
        xt = corrupt(x, t)
        loss = masked_nelbo(model(xt), x, xt, t, corrupt.schedule).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    xt = corrupt(next(batches(dls.valid)), torch.full((B,), .5))
    return model.eval(), xt, losses

def flips(a, b):
    "Return how many choices of experts differ between two sets of routes, and how many there are"
    different = sum((a[k]!=b[k]).any(-1).sum().item() for k in a)
    return different, sum(a[k][...,0].numel() for k in a)

@torch.no_grad()
def roundtrip(moe, h, bf16, order=None, keep_routes=False):
    "Return the inverse error, the choices that differ, all choices, and how far the state is moved"
    is_sparse = moe.k_active is not None
    routes = {}
    with torch.autocast(h.device.type, torch.bfloat16, enabled=bf16):
        y,_ = moe(h, routes=routes) if is_sparse else moe(h)
        if order is not None:
            h,y = h[order],y[order]
            routes = {k:c[order] for k,c in routes.items()}
        routes_back = dict(routes) if keep_routes else {}
        x,_ = moe.inverse(y, routes=routes_back) if is_sparse else moe.inverse(y)
    return (x-h).abs().max().item(), *flips(routes, routes_back), (y-h).abs().max().item()

def off_lattice(h):
    "Return states between the points of the lattice"
    return h+torch.rand(h.shape, generator=torch.Generator().manual_seed(1))*2**-12

def errors(model, xt):
    "Return all errors of one network"
    h = model.state(xt)
    order = torch.randperm(len(h), generator=torch.Generator().manual_seed(2))
    res = {}
    for lattice,bits in LATTICES.items():
        model.backbone.set_lattice(bits)
        x = h if bits else off_lattice(h)
        for precision,bf16 in PRECISIONS.items():
            key = f'{lattice} {precision}'
            res[key],different,n_choices,moved = roundtrip(model.backbone, x, bf16)
            if n_choices: res[f'{key} flips'] = [different, n_choices]
            if bits: res[f'{key} another order'] = roundtrip(model.backbone, x, bf16, order)[0]
    model.backbone.set_lattice(12)
    return res | dict(moved=moved)

def count_flips(moe, bits, bf16, choices, g):
    "Count choices that the inverse makes differently, in batches of random states"
    different = n_choices = 0
    worst = kept = 0.
    while n_choices<choices:
        x = torch.randn(B, L, moe.state_dim, generator=g)
        if bits is not None: x = to_lattice(x, bits)
        error,more_different,more,_ = roundtrip(moe, x, bf16)
        different += more_different
        n_choices += more
        worst = max(worst, error)
        if bits is None and not kept: kept = roundtrip(moe, x, bf16, keep_routes=True)[0]
    return dict(flips=different, choices=n_choices, worst_error=worst, error_with_choices_kept=kept)

def a_million(steps, choices=1_000_000):
    "Count choices that the inverse makes differently, by lattice and precision"
    model,*_ = train(steps, n_layers=8, n_experts=4, k_active=2, couple='every')
    g = torch.Generator().manual_seed(3)
    res = {}
    for lattice,bits in LATTICES.items():
        model.backbone.set_lattice(bits)
        for precision,bf16 in PRECISIONS.items():
            res[f'{lattice} {precision}'] = count_flips(model.backbone, bits, bf16, choices, g)
            print(lattice, precision, res[f'{lattice} {precision}'], flush=True)
    return res

def row_of(key, steps):
    "Train and measure one mixture; with 32 blocks in half of the steps"
    steps = steps if key['n_layers']==8 else steps//2
    (model,xt,losses),seconds = timed(lambda: train(steps, **key))
    row = key | dict(first_loss=losses[0], last_loss=losses[-1], seconds=round(seconds))
    return row | errors(model, xt)

@command
def moe_exactness(
    steps:int=20, # Training steps
    threads:int=1, # Threads of PyTorch
    choices:int=1_000_000, # Choices of routers in part 2
    depths:str='8,32', # Numbers of blocks in part 1, separated by commas
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Measure the inverses of mixtures of experts"
    torch.set_num_threads(threads)
    target = result_path(__file__, out)
    settings = dict(d_model=D, seq_len=L, bs=B, steps=steps, seed=0)
    old = resume(target, settings)
    res = dict(rows=[]) | old | run_record(__file__, old=old, **settings)
    if 'million' not in res:
        res['million'] = a_million(steps, choices)
        save(target, res)
    for values in product(map(int, depths.split(',')), (2, 4, 8), ('final', 'every'), (None, 1, 2)):
        n_layers,n_experts,couple,k_active = values
        key = dict(n_experts=n_experts, n_layers=n_layers, couple=couple, k_active=k_active)
        if has_row(res['rows'], **key): continue
        add_row(res['rows'], row_of(key, steps))
        save(target, res)

if __name__=='__main__': moe_exactness()
