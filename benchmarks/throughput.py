"""Tokens per second of a training step: bijective denoiser against a plain transformer of equal size, in one run.

    python benchmarks/throughput.py

The plain one is nn.TransformerEncoderLayer (pre-norm, GELU, learned positions). Steps alternate; medians are compared. Writes benchmarks/results/throughput.json."""
import json, platform, statistics, sys, time
from pathlib import Path
import torch
from torch import nn
from fastcore.script import call_parse
from bijdiff.all import *

class Plain(nn.Module):
    "A pre-norm transformer denoiser of PyTorch's own layers"
    def __init__(self, V, L, d, heads, n):
        super().__init__()
        self.embed,self.pos = nn.Embedding(V+1, d),nn.Parameter(.02*torch.randn(L, d))
        self.layers = nn.Sequential(*[nn.TransformerEncoderLayer(d, heads, 4*d, 0., 'gelu', batch_first=True, norm_first=True) for _ in range(n)])
        self.norm,self.output_head = nn.LayerNorm(d),nn.Linear(d, V)
    def forward(self, xt): return self.output_head(self.norm(self.layers(self.embed(xt)+self.pos)))

def stepper(model, corrupt, x, bf16):
    "A function that takes one training step and gives its seconds"
    opt = torch.optim.AdamW(model.parameters(), 1e-3)
    def step():
        t = low_discrepancy_times(len(x)).to(x.device)
        xt,start = corrupt(x, t),time.perf_counter()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16): loss = masked_nelbo(model(xt), x, xt, t, corrupt.schedule).mean()
        loss.backward(); opt.step(); opt.zero_grad()
        if x.is_cuda: torch.cuda.synchronize()
        return time.perf_counter()-start
    return step

@call_parse
def main(d_model:int=156, n_heads:int=3, n_layers:int=6, seq_len:int=256, bs:int=32, steps:int=25, device:str='cpu'):
    torch.manual_seed(0)
    V,rows = 66,[]
    x,corrupt = torch.randint(0, V, (bs, seq_len), device=device),Corruption(V, schedule=HalfCosine())
    for bf16 in (True, False):
        models = dict(bijective=BijectiveDenoiser(DenoiserConfig(V, seq_len, d_model, n_heads, n_layers)), plain=Plain(V, seq_len, d_model, n_heads, n_layers))
        steppers = {k:stepper(m.to(device), corrupt, x, bf16) for k,m in models.items()}
        times = {k:[] for k in steppers}
        for i in range(steps+3):
            for k,f in steppers.items():
                s = f()
                if i>=3: times[k].append(s)
        med = {k:statistics.median(v) for k,v in times.items()}
        rows.append(dict(precision='bfloat16' if bf16 else 'float32', **{f'{k}_tokens_per_s':round(bs*seq_len/v) for k,v in med.items()}, ratio=round(med['plain']/med['bijective'], 3),
                         **{f'{k}_params':sum(p.numel() for p in m.parameters()) for k,m in models.items()}))
        print(rows[-1], flush=True)
    res = dict(rows=rows, seq_len=seq_len, bs=bs, d_model=d_model, n_heads=n_heads, n_layers=n_layers, steps=steps, seed=0, device=device,
               machine=f'{platform.machine()}, {torch.get_num_threads()} threads', torch=torch.__version__, command='python benchmarks/throughput.py '+' '.join(sys.argv[1:]))
    (Path(__file__).parent/'results'/Path(__file__).name).with_suffix('.json').write_text(json.dumps(res, indent=1)+'\n')
