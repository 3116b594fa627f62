"""What inverts, how exactly, and at what price: deep stacks, the table of the notes, and what the lattice does to training.

    python benchmarks/exactness.py

1. Inverse error of 32 blocks, width 256, length 256, on the lattice and off it, float32 and bfloat16 autocast: fresh, wild (weights x4) and trained weights; gradients of the reversible backward against stored activations.
2. The notes' table at a batch of 8x64x512: reconstruction error, parameters, gradient norms of the four configurations.
3. Training loss with and without rounding to the lattice, same seeds and data.
4. What rounding changes at given weights: loss on the same texts with the same noise.
Writes benchmarks/results/exactness.json."""
import json, platform, random, statistics, time
from pathlib import Path
import torch
from torch import nn
from fastcore.script import call_parse
from bijdiff.all import *

def random_init(m, std):
    "Random weights everywhere; normalisations stay"
    for n,p in m.named_parameters():
        if 'norm' not in n: nn.init.normal_(p, std=std)
    return m

def scale_(m, s):
    "All matrices times s"
    with torch.no_grad():
        for p in m.parameters():
            if p.ndim>1: p.mul_(s)
    return m

@torch.no_grad()
def errors(stack, x):
    "Inverse errors by lattice and precision"
    res = {}
    for name,bits in dict(lattice=12, float=None).items():
        stack.set_lattice(bits)
        for dtype in (torch.float32, torch.bfloat16):
            with torch.autocast(x.device.type, dtype, enabled=dtype!=torch.float32): y,_ = stack(x); back,_ = stack.inverse(y)
            res[f'{name} {str(dtype)[6:]}'] = (back-x).abs().max().item()
            res[f'{name} {str(dtype)[6:]} moved'] = (y-x).abs().max().item()
    stack.set_lattice(12)
    return res

def gradients(stack, x, reversible, bf16):
    "All gradients of one call, with dropout"
    stack.reversible = reversible
    x = x.clone().requires_grad_()
    torch.manual_seed(7)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16): y,_ = stack(x)
    return torch.autograd.grad(y.square().mean(), [x, *stack.parameters()])

def same_gradients(stack, x):
    "Whether reversible and stored gradients are the same bits; off the lattice, by how much they differ"
    res = {}
    for bits in (12, None):
        stack.set_lattice(bits)
        for bf16 in (False, True):
            a,b = (gradients(stack, x, r, bf16) for r in (True, False))
            res[f"{'lattice' if bits else 'float'} {'bfloat16' if bf16 else 'float32'}"] = dict(bitwise=all(torch.equal(g, h) for g,h in zip(a, b)),
                worst_relative=max(((g-h).norm()/h.norm().clamp_min(1e-30)).item() for g,h in zip(a, b)))
    stack.set_lattice(12)
    return res

def train(config, steps, bs, lr, seed=0):
    "Train a denoiser on the embedded corpus; give it with its loss per step"
    torch.manual_seed(seed); random.seed(seed)                          # the second is for the order of texts
    dls = text_dls('pydoc', seq_len=config['seq_len'], bs=bs)
    model = BijectiveDenoiser(DenoiserConfig(dls.tokenizer.vocab_size, **config))
    opt,corrupt,losses,it = torch.optim.AdamW(model.parameters(), lr),Corruption(dls.tokenizer.vocab_size, schedule=HalfCosine()),[],iter(dls.train)
    for i in range(steps):
        try: x = next(it)[0]
        except StopIteration: x = next(it := iter(dls.train))[0]
        x = x.as_subclass(torch.Tensor)
        opt.param_groups[0]['lr'] = lr*min(1, (i+1)/(.1*steps))
        t = low_discrepancy_times(len(x))
        xt = corrupt(x, t)
        with torch.autocast('cpu', torch.bfloat16): loss = masked_nelbo(model(xt), x, xt, t, corrupt.schedule).mean()
        opt.zero_grad(); loss.backward(); opt.step()
        losses.append(loss.item())
        if i%50==0: print(f'step {i} loss {loss.item():.3f}', flush=True)
    return model,dls,losses

def deep(steps, depth=32, d=256, L=256):
    "Part 1"
    torch.manual_seed(0)
    x,rows = to_lattice(torch.randn(2, L, 2*d), 12),{}
    stack = BijectiveTransformer(depth, d, 8, lattice_bits=12, dropout=.1).eval()
    rows['initial'] = errors(stack, x)
    rows['random, std 0.02'] = errors(random_init(stack, .02), x)
    rows['random x4'] = errors(scale_(stack, 4), x)
    rows['gradients, random'] = same_gradients(random_init(stack.train(), .02), x[:1])
    print(json.dumps(rows, indent=1), flush=True)
    if steps:
        model,dls,losses = train(dict(seq_len=L, d_model=d, n_heads=8, n_layers=depth), steps, 2, 5e-4)
        text = next(iter(dls.valid))[0].as_subclass(torch.Tensor)[:2]
        with torch.no_grad(): h = model.state(text)
        rows[f'trained {steps} steps'] = dict(errors(model.backbone.eval(), h), first_loss=statistics.mean(losses[:10]), last_loss=statistics.mean(losses[-10:]))
        rows['trained x4'] = errors(scale_(model.backbone, 4), h)
    return rows

def notes_table(d=512, heads=8):
    "Part 2: one block of each configuration at the notes' batch"
    torch.manual_seed(0)
    x = to_lattice(torch.randn(8, 64, 2*d), 12)
    standard = sum(p.numel() for p in nn.TransformerEncoderLayer(d, heads, 4*d).parameters())
    rows = []
    for attention in ('bijective', 'standard'):
        for ffn in ('bijective', 'standard'):
            for bits in (12, None):
                torch.manual_seed(0)
                b = random_init(BijectiveTransformerBlock(d, heads, attention, ffn, bits), .02)
                y,_ = b(x)
                y.square().mean().backward()
                n = sum(p.numel() for p in b.parameters())
                with torch.no_grad(): err = (b.inverse(y)[0]-x).abs().max().item() if b.is_bijective else None
                rows.append(dict(attention=attention, ffn=ffn, lattice=bits is not None, reconstruction_error=err, parameters=n, ratio=n/standard,
                                 gradient_norm=torch.sqrt(sum(p.grad.pow(2).sum() for p in b.parameters())).item()))
    one,lin = torch.randn(8, 64, d),random_init(BijectiveLinear(d), .02)
    with torch.no_grad(): lin_err = (lin.inverse(lin(one)[0])[0]-one).abs().max().item()
    grid,on = to_lattice(one, 12),random_init(BijectiveLinear(d, lattice_bits=12), .02)
    with torch.no_grad(): on_err = (on.inverse(on(grid)[0])[0]-grid).abs().max().item()
    cached = BijectiveMultiHeadAttention(d, heads, 'cached')
    with torch.no_grad(): y,_ = cached(one); att_err = (cached.inverse(y)[0]-one).abs().max().item()
    return dict(blocks=rows, standard_parameters=standard, linear=dict(error_float=lin_err, error_lattice=on_err, ratio=sum(p.numel() for p in lin.parameters())/sum(p.numel() for p in nn.Linear(d, d).parameters())),
                cached_attention_error=att_err, notes=dict(linear_error=0., attention_error=5.77e-2, block_inverse='missing', ratio=4.5))

def lattice_in_training(steps, seeds=3):
    "Part 3: the same training with k = 12, coarser grids, and none"
    res = {}
    for bits in (None, 12, 8, 6):
        config = dict(seq_len=64, d_model=64, n_heads=2, n_layers=4, lattice_bits=bits)
        finals = [statistics.mean(train(config, steps, 16, 3e-3, s)[2][-steps//4:]) for s in range(seeds)]
        res[str(bits)] = dict(last_quarter_loss=finals, mean=statistics.mean(finals))
        print(bits, res[str(bits)], flush=True)
    return res

def rounding_at_fixed_weights(steps):
    "Part 4: loss of one trained model on one batch and noise, on grids of several sizes, as a difference to none"
    model,dls,_ = train(dict(seq_len=64, d_model=64, n_heads=2, n_layers=4, lattice_bits=12), steps, 16, 3e-3)
    model.eval()
    x = torch.cat([b[0].as_subclass(torch.Tensor) for b,_ in zip(dls.valid, range(16))])
    t,corrupt = low_discrepancy_times(len(x)),Corruption(dls.tokenizer.vocab_size, schedule=HalfCosine())
    xt = corrupt(x, t)
    def loss(bits):
        model.config.lattice_bits = bits
        model.backbone.set_lattice(bits)
        with torch.no_grad(): return masked_nelbo(model(xt), x, xt, t, corrupt.schedule).mean().item()
    none = loss(None)
    return dict(loss=none, difference={str(b):loss(b)-none for b in (12, 8, 6, 4)})

@call_parse
def main(
    steps:int=300, # Training steps of the deep stack
    lattice_steps:int=200, # Training steps of each run of parts 3 and 4
    seeds:int=3, # Runs of part 3 for every grid
    only:str=None, # One part to measure again: notes, lattice_in_training, rounding_at_fixed_weights or deep
):
    path,start = (Path(__file__).parent/'results'/Path(__file__).name).with_suffix('.json'),time.time()
    parts = dict(notes=notes_table, lattice_in_training=lambda: lattice_in_training(lattice_steps, seeds), rounding_at_fixed_weights=lambda: rounding_at_fixed_weights(lattice_steps), deep=lambda: deep(steps))
    res = json.loads(path.read_text()) if only else {}
    for name,f in parts.items():
        if only in (None, name):
            res[name] = f()
            print(name, json.dumps(res[name], indent=1), flush=True)
    res.update(steps=steps, lattice_steps=lattice_steps, seed=0, machine=f'{platform.machine()}, {torch.get_num_threads()} threads', torch=torch.__version__, command='python benchmarks/exactness.py')
    if not only: res['seconds'] = round(time.time()-start)
    path.write_text(json.dumps(res, indent=1)+'\n')
