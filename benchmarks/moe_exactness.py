"""Do mixtures of experts invert exactly, and does the inverse choose the same experts?

    python benchmarks/moe_exactness.py

1. Inverse error of mixtures with trained weights, on the lattice and off it, in float32 and under bfloat16 autocast, and with the batch in another order: 2, 4 and 8 experts, both couplings, dense and sparse, 8 and 32 blocks.
   Trained means: a few steps of Adam on the embedded corpus, from random weights of standard deviation 0.05, so that every block does something.
2. A million choices of routers: how many the inverse makes differently, on the lattice and off it; and the inverse error off it when the choices are kept.
Writes benchmarks/results/moe_exactness.json after every row; rows that are there are skipped."""
import json, platform, time
from pathlib import Path
import torch
from torch import nn
from fastcore.script import call_parse
from bijdiff.all import *

OUT = (Path(__file__).parent/'results'/Path(__file__).name).with_suffix('.json')
D,L,B = 16,64,8

def trained(steps, **config_kwargs):
    "A small denoiser after some steps, and a batch of held-out text"
    torch.manual_seed(0)
    dls = text_dls(pydoc_corpus()[:60_000], seq_len=L, bs=B)
    model = BijectiveDenoiser(DenoiserConfig(dls.tokenizer.vocab_size, L, d_model=D, n_heads=2, **config_kwargs))
    for n,p in model.backbone.named_parameters():
        if 'norm' not in n: nn.init.normal_(p, std=.05)
    opt,noise,losses = torch.optim.Adam(model.parameters(), 3e-3),Corruption(dls.tokenizer.vocab_size, schedule=HalfCosine()),[]
    for (x,*_),_ in zip(dls.train, range(steps)):
        x = x.as_subclass(torch.Tensor)
        t = low_discrepancy_times(len(x))
        xt = noise(x, t)
        loss = masked_nelbo(model(xt), x, xt, t, noise.schedule).mean()
        opt.zero_grad(); loss.backward(); opt.step()
        losses.append(loss.item())
    xt = noise(next(iter(dls.valid))[0].as_subclass(torch.Tensor), torch.full((B,), .5))
    return model.eval(), xt, losses

def flips(a, b): return sum((a[k]!=b[k]).any(-1).sum().item() for k in a), sum(a[k][...,0].numel() for k in a)

@torch.no_grad()
def roundtrip(moe, h, bf16, order=None, keep=False):
    "Inverse error, flipped choices, all choices, and how far the state was moved"
    sparse,there = moe.k_active is not None,{}
    with torch.autocast(h.device.type, torch.bfloat16, enabled=bf16):
        y,_ = moe(h, **(dict(routes=there) if sparse else {}))
        if order is not None: h,y,there = h[order],y[order],{k:c[order] for k,c in there.items()}
        back = dict(there) if keep else {}
        x,_ = moe.inverse(y, **(dict(routes=back) if sparse else {}))
    return (x-h).abs().max().item(), *flips(there, back), (y-h).abs().max().item()

def errors(model, xt):
    "All errors of one network"
    h,res = model.state(xt),{}
    for name,bits in dict(lattice=12, float=None).items():
        model.backbone.set_lattice(bits)
        x = h if bits else h+torch.rand(h.shape, generator=torch.Generator().manual_seed(1))*2**-12      # off the grid
        for bf16 in (False, True):
            key = f"{name} {'bfloat16' if bf16 else 'float32'}"
            res[key],n,of,moved = roundtrip(model.backbone, x, bf16)
            if of: res[f'{key} flips'] = [n, of]
            if bits: res[f'{key} another order'] = roundtrip(model.backbone, x, bf16, torch.randperm(len(x), generator=torch.Generator().manual_seed(2)))[0]
    model.backbone.set_lattice(12)
    return res | dict(moved=moved)

def a_million(steps, choices=1_000_000):
    "Part 2: flips among so many choices, each batch another state"
    model,xt,_ = trained(steps, n_layers=8, n_experts=4, k_active=2, couple='every')
    res,g = {},torch.Generator().manual_seed(3)
    for name,bits in dict(lattice=12, float=None).items():
        model.backbone.set_lattice(bits)
        for bf16 in (False, True):
            n = of = 0
            worst = kept = 0.
            while of<choices:
                x = torch.randn(B, L, model.backbone.state_dim, generator=g)
                x = x if bits is None else to_lattice(x, bits)
                err,f,o,_ = roundtrip(model.backbone, x, bf16)
                n,of,worst = n+f,of+o,max(worst, err)
                if bits is None and not kept: kept = roundtrip(model.backbone, x, bf16, keep=True)[0]
            res[f"{name} {'bfloat16' if bf16 else 'float32'}"] = dict(flips=n, choices=of, worst_error=worst, error_with_choices_kept=kept)
            print(name, bf16, n, of, worst, kept, flush=True)
    return res

@call_parse
def main(steps:int=20, # Of training
         threads:int=1): # Of PyTorch
    torch.set_num_threads(threads)
    res = json.loads(OUT.read_text()) if OUT.exists() else dict(rows=[])
    def save(): OUT.write_text(json.dumps(res | dict(d_model=D, seq_len=L, bs=B, steps=steps, seed=0, machine=f'{platform.machine()}, {threads} threads', torch=torch.__version__, command='python benchmarks/moe_exactness.py'), indent=1)+'\n')
    if 'million' not in res:
        res['million'] = a_million(steps)
        save()
    for n_layers in (8, 32):
        for n in (2, 4, 8):
            for couple in ('final', 'every'):
                for k in (None, 1, 2):
                    key = dict(n_experts=n, n_layers=n_layers, couple=couple, k_active=k)
                    if any(all(r[a]==v for a,v in key.items()) for r in res['rows']): continue
                    start = time.time()
                    model,xt,losses = trained(steps if n_layers==8 else steps//2, **key)
                    res['rows'].append(key | dict(first_loss=losses[0], last_loss=losses[-1], seconds=round(time.time()-start)) | errors(model, xt))
                    print(res['rows'][-1], flush=True)
                    save()
