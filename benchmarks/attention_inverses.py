"""Four inverses of attention: error, condition number, cost and log-determinant at lengths 16, 64, 256, with initial and trained weights.

    python benchmarks/attention_inverses.py

States are embedded characters of the embedded corpus with random position codes. Trained weights come from filling in masked characters through one attention layer.
Errors in float32; `logdet_error` compares with the dense Jacobian in float64 at length 16. Writes benchmarks/results/attention_inverses.json."""
import json, platform, random, statistics, sys, time, warnings
from pathlib import Path
import torch
from torch import nn
import torch.nn.functional as F
from fastcore.script import call_parse
from bijdiff.all import *

kinds = dict(coupling={}, mixing={}, cached={}, fixed_point=dict(logdet='series', n_probes=2, n_terms=4))

class Filler(nn.Module):
    "Embedded characters, one attention layer, logits"
    def __init__(self, V, d, heads, kind):
        super().__init__()
        self.embed,self.attn,self.head = nn.Embedding(V+1, d),BijectiveMultiHeadAttention(d, heads, kind, **kinds[kind]),nn.Linear(d, V)
        g = torch.Generator().manual_seed(1)
        self.register_buffer('positions', torch.randn(512, d, generator=g))
    def state(self, ids):
        h = self.embed(ids)+self.positions[:ids.shape[1]]
        return torch.cat([h]*(self.attn.state_dim//h.shape[-1]), -1)
    def forward(self, ids): return self.head(sum(self.attn(self.state(ids))[0].split(self.head.in_features, -1)))

def train(model, dls, steps, mask_id):
    "Fill in a third of the characters"
    opt,losses = torch.optim.AdamW(model.parameters(), 3e-3),[]
    it = iter(dls.train)
    for _ in range(steps):
        try: x = next(it)[0]
        except StopIteration: x = next(it := iter(dls.train))[0]
        x = x.as_subclass(torch.Tensor)
        hidden = torch.rand(x.shape)<1/3
        loss = F.cross_entropy(model(x.masked_fill(hidden, mask_id))[hidden], x[hidden])
        opt.zero_grad(); loss.backward(); opt.step()
        losses.append(loss.item())
    return statistics.mean(losses[-20:])

def median_ms(f, n=5):
    "Median time of a call, ms"
    ts = []
    for _ in range(n+1):
        t = time.perf_counter(); f(); ts.append(1e3*(time.perf_counter()-t))
    return statistics.median(ts[1:])

def condition(layer, h):
    "Largest condition number of what has to be inverted, or None where nothing is"
    if isinstance(layer, MixingAttention): return torch.linalg.cond(layer._matrix(split_halves(h)[1], None).double()).max().item()
    if isinstance(layer, CachedAttention): return torch.linalg.cond(layer.attention(h).double()).max().item()

def logdet_error(model, h):
    "Largest difference between a layer's log-determinant and the dense one, float64, nats"
    layer = model.attn.layer.double()
    h = h[:1].double()
    series = isinstance(layer, FixedPointAttention)
    if series: layer.logdet = 'dense'
    with torch.no_grad(): ld = layer(h)[1]
    res = dict(logdet_nats=ld.item(), logdet_error=(ld-dense_logdet(layer, h)).abs().item())
    if series: layer.logdet = 'series'
    layer.float()
    return res

@torch.no_grad()
def measure(model, x):
    "Errors and times of one layer at one length"
    h,layer = model.state(x),model.attn.layer
    y = layer(h)[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        r = layer.inverse(y)
    res = dict(L=x.shape[1], error=(r[0]-h).abs().max().item(), rms=(r[0]-h).pow(2).mean().sqrt().item(), warned=bool(caught), condition=condition(layer, h),
               reported=r.error.max().item() if isinstance(r, Reconstruction) else None, forward_ms=median_ms(lambda: layer(h)))
    warnings.simplefilter('ignore')
    res['inverse_ms'] = median_ms(lambda: layer.inverse(y))
    if isinstance(layer, CouplingAttention):
        layer.lattice_bits,g = 12,to_lattice(h, 12)
        res['lattice_error'] = (layer.inverse(layer(g)[0])[0]-g).abs().max().item()
        layer.lattice_bits = None
    return res

@call_parse
def main(
    d_model:int=64, # Width of one stream
    n_heads:int=4, # Heads
    bs:int=8, # Texts that are measured
    steps:int=300, # Training steps
):
    rows = []
    dls = text_dls('pydoc', seq_len=256, bs=16)
    V = dls.tokenizer.vocab_size
    test = next(iter(dls.valid))[0].as_subclass(torch.Tensor)[:bs]
    for kind in kinds:
        torch.manual_seed(0); random.seed(0)                            # the second is for the order of texts
        model,loss = Filler(V, d_model, n_heads, kind),None
        for weights in ('initial', 'trained'):
            if weights=='trained': loss = train(model, text_dls('pydoc', seq_len=64, bs=16), steps, V)
            for L in (16, 64, 256):
                rows.append(dict(kind=kind, weights=weights, loss=loss, **measure(model, test[:,:L]), **(logdet_error(model, model.state(test[:,:16])) if L==16 else {})))
                print({k:f'{v:.3g}' if isinstance(v, float) else v for k,v in rows[-1].items() if v is not None}, flush=True)
    res = dict(rows=rows, d_model=d_model, n_heads=n_heads, bs=bs, steps=steps, seed=0, machine=f'{platform.machine()}, {torch.get_num_threads()} threads', torch=torch.__version__,
               command='python benchmarks/attention_inverses.py '+' '.join(sys.argv[1:]))
    (Path(__file__).parent/'results'/Path(__file__).name).with_suffix('.json').write_text(json.dumps(res, indent=1)+'\n')
