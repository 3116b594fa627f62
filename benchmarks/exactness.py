"""How exactly stacks invert, what that takes, and what the lattice changes in training.

    python benchmarks/exactness.py

1. `deep`: inverse error of 32 blocks, width 256, length 256, on the lattice and off it, in float32 and under
   bfloat16 autocast, with initial, random and trained weights, and with those times 4; gradients of the
   reversible backward pass against those of stored activations.
2. `notes`: the table of the notes at a batch of 8x64x512: reconstruction error, parameters and gradient norms
   of the four configurations.
3. `lattice_in_training`: training loss with and without rounding to the lattice, same seeds and data.
4. `rounding_at_fixed_weights`: how rounding changes the loss of given weights, same sequences and noise.

Writes benchmarks/results/exactness.json."""
import json
import random
import statistics
import torch
from torch import nn
from bijdiff.checks import check_one_of
from bijdiff.console import command
from bijdiff.data.loaders import text_dls
from bijdiff.diffusion.corruption import Corruption
from bijdiff.diffusion.objective import masked_nelbo
from bijdiff.diffusion.schedules import HalfCosine, low_discrepancy_times
from bijdiff.layers.attention_inverse import BijectiveMultiHeadAttention
from bijdiff.layers.block import BijectiveTransformer, BijectiveTransformerBlock
from bijdiff.layers.lattice import to_lattice
from bijdiff.layers.linear import BijectiveLinear
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from common import batches, load, n_params, random_weights, result_path, run_record, save, timed

SMALL = dict(seq_len=64, d_model=64, n_heads=2, n_layers=4)

@torch.no_grad()
def scale_(m, factor):
    "Multiply all matrices of a module by a factor"
    for p in m.parameters():
        if p.ndim>1: p.mul_(factor)
    return m

@torch.no_grad()
def inverse_error(f, x):
    "Return the largest difference between a state and its reconstruction"
    return (f.inverse(f(x)[0])[0]-x).abs().max().item()

# Training

def train(config, steps, bs, lr, seed=0):
    "Train a denoiser on the embedded corpus; return it with its data and its losses"
    torch.manual_seed(seed)
    random.seed(seed) # The order of the sequences
    dls = text_dls('pydoc', seq_len=config['seq_len'], bs=bs)
    model = BijectiveDenoiser(DenoiserConfig(dls.tokenizer.vocab_size, **config))
    opt = torch.optim.AdamW(model.parameters(), lr)
    corrupt = Corruption(dls.tokenizer.vocab_size, schedule=HalfCosine())
    losses = []
    for i,x in zip(range(steps), batches(dls.train)):
        opt.param_groups[0]['lr'] = lr*min(1, (i+1)/(.1*steps))
        t = low_discrepancy_times(len(x))
        xt = corrupt(x, t)
        with torch.autocast('cpu', torch.bfloat16):
            loss = masked_nelbo(model(xt), x, xt, t, corrupt.schedule).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
        if i%50==0: print(f'step {i} loss {loss.item():.3f}', flush=True)
    return model,dls,losses

# 1. Deep stacks

@torch.no_grad()
def errors(stack, x):
    "Return inverse errors, and how far states move, by lattice and precision"
    res = {}
    for name,bits in dict(lattice=12, float=None).items():
        stack.set_lattice(bits)
        for dtype in (torch.float32, torch.bfloat16):
            with torch.autocast(x.device.type, dtype, enabled=dtype!=torch.float32):
                y,_ = stack(x)
                back,_ = stack.inverse(y)
            res[f'{name} {str(dtype)[6:]}'] = (back-x).abs().max().item()
            res[f'{name} {str(dtype)[6:]} moved'] = (y-x).abs().max().item()
    stack.set_lattice(12)
    return res

def gradients(stack, x, reversible, bf16):
    "Return the gradients of input and weights for one call, with dropout"
    stack.reversible = reversible
    x = x.clone().requires_grad_()
    torch.manual_seed(7)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16): y,_ = stack(x)
    return torch.autograd.grad(y.square().mean(), [x, *stack.parameters()])

def compare_gradients(stack, x, bf16):
    "Compare reversible with stored gradients: equal bits, and the largest relative difference"
    found,stored = (gradients(stack, x, reversible, bf16) for reversible in (True, False))
    relative = [((g-h).norm()/h.norm().clamp_min(1e-30)).item() for g,h in zip(found, stored)]
    return dict(bitwise=all(map(torch.equal, found, stored)), worst_relative=max(relative))

def gradient_table(stack, x):
    "Compare gradients on the lattice and off it, in both precisions"
    res = {}
    for bits in (12, None):
        stack.set_lattice(bits)
        for bf16 in (False, True):
            key = f"{'lattice' if bits else 'float'} {'bfloat16' if bf16 else 'float32'}"
            res[key] = compare_gradients(stack, x, bf16)
    stack.set_lattice(12)
    return res

def deep(steps, depth=32, d=256, L=256):
    "Measure a deep stack with initial, random and trained weights"
    torch.manual_seed(0)
    rows = {}
    x = to_lattice(torch.randn(2, L, 2*d), 12)
    stack = BijectiveTransformer(depth, d, 8, lattice_bits=12, dropout=.1).eval()
    rows['initial'] = errors(stack, x)
    rows['random, std 0.02'] = errors(random_weights(stack, .02), x)
    rows['random x4'] = errors(scale_(stack, 4), x)
    rows['gradients, random'] = gradient_table(random_weights(stack.train(), .02), x[:1])
    print(json.dumps(rows, indent=1), flush=True)
    if not steps: return rows
    model,dls,losses = train(dict(seq_len=L, d_model=d, n_heads=8, n_layers=depth), steps, 2, 5e-4)
    with torch.no_grad(): h = model.state(next(batches(dls.valid))[:2])
    first,last = (statistics.mean(o) for o in (losses[:10], losses[-10:]))
    trained = errors(model.backbone.eval(), h)
    rows[f'trained {steps} steps'] = dict(trained, first_loss=first, last_loss=last)
    rows['trained x4'] = errors(scale_(model.backbone, 4), h)
    return rows

# 2. The table of the notes

def block_row(x, standard, heads, attention, ffn, bits):
    "Measure one configuration of a block: reconstruction error, parameters, gradient norm"
    torch.manual_seed(0)
    block = random_weights(BijectiveTransformerBlock(x.shape[-1]//2, heads, attention, ffn, bits), .02)
    y,_ = block(x)
    y.square().mean().backward()
    error = inverse_error(block, x) if block.is_bijective else None
    norm = torch.sqrt(sum(p.grad.pow(2).sum() for p in block.parameters())).item()
    return dict(attention=attention, ffn=ffn, lattice=bits is not None, reconstruction_error=error,
                parameters=n_params(block), ratio=n_params(block)/standard, gradient_norm=norm)

def linear_row(x):
    "Measure linear layers as couplings: errors off the lattice and on it, parameters against nn.Linear"
    d = x.shape[-1]
    plain = random_weights(BijectiveLinear(d), .02)
    error = inverse_error(plain, x)
    on_lattice = random_weights(BijectiveLinear(d, lattice_bits=12), .02)
    return dict(error_float=error, error_lattice=inverse_error(on_lattice, to_lattice(x, 12)),
                ratio=n_params(plain)/n_params(nn.Linear(d, d, device='meta')))

def notes_table(d=512, heads=8):
    "Measure blocks, linear layers and cached attention at the batch of the notes"
    torch.manual_seed(0)
    x = to_lattice(torch.randn(8, 64, 2*d), 12)
    standard = n_params(nn.TransformerEncoderLayer(d, heads, 4*d))
    kinds = 'bijective','standard'
    blocks = [block_row(x, standard, heads, attention, ffn, bits)
              for attention in kinds for ffn in kinds for bits in (12, None)]
    one_stream = torch.randn(8, 64, d)
    linear = linear_row(one_stream)
    cached = inverse_error(BijectiveMultiHeadAttention(d, heads, 'cached'), one_stream)
    notes = dict(linear_error=0., attention_error=5.77e-2, block_inverse='missing', ratio=4.5)
    return dict(blocks=blocks, standard_parameters=standard, linear=linear, cached_attention_error=cached,
                notes=notes)

# 3. and 4. Rounding

def lattice_in_training(steps, seeds=3):
    "Train on the lattice of 12 bits, on coarser ones and off it; return the losses of the last quarter"
    res = {}
    for bits in (None, 12, 8, 6):
        losses = [train(SMALL | dict(lattice_bits=bits), steps, 16, 3e-3, seed)[2] for seed in range(seeds)]
        finals = [statistics.mean(o[-steps//4:]) for o in losses]
        res[str(bits)] = dict(last_quarter_loss=finals, mean=statistics.mean(finals))
        print(bits, res[str(bits)], flush=True)
    return res

def rounding_at_fixed_weights(steps):
    "Return the loss of one trained model off the lattice, and what grids of several sizes add to it"
    model,dls,_ = train(SMALL | dict(lattice_bits=12), steps, 16, 3e-3)
    model.eval()
    x = torch.cat([b[0].as_subclass(torch.Tensor) for b,_ in zip(dls.valid, range(16))])
    corrupt = Corruption(dls.tokenizer.vocab_size, schedule=HalfCosine())
    t = low_discrepancy_times(len(x))
    xt = corrupt(x, t)
    @torch.no_grad()
    def loss(bits):
        model.config.lattice_bits = bits
        model.backbone.set_lattice(bits)
        return masked_nelbo(model(xt), x, xt, t, corrupt.schedule).mean().item()
    unrounded = loss(None)
    return dict(loss=unrounded, difference={str(b):loss(b)-unrounded for b in (12, 8, 6, 4)})

@command
def exactness(
    steps:int=300, # Training steps of the deep stack
    lattice_steps:int=200, # Training steps of each run of parts 3 and 4
    seeds:int=3, # Runs of part 3 for every grid
    only:str=None, # One part to measure again: notes, lattice_in_training, rounding_at_fixed_weights or deep
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Measure exactness of inverses and the effect of the lattice"
    parts = dict(notes=notes_table,
                 lattice_in_training=lambda: lattice_in_training(lattice_steps, seeds),
                 rounding_at_fixed_weights=lambda: rounding_at_fixed_weights(lattice_steps),
                 deep=lambda: deep(steps))
    check_one_of('only', only, [None, *parts])
    target = result_path(__file__, out)
    res = load(target) if only else {}
    seconds = 0
    for name in [only] if only else parts:
        res[name],took = timed(parts[name])
        seconds += took
        print(name, json.dumps(res[name], indent=1), flush=True)
    res |= run_record(__file__, old=res, steps=steps, lattice_steps=lattice_steps, seed=0)
    if not only: res['seconds'] = round(seconds)
    save(target, res)

if __name__=='__main__': exactness()
