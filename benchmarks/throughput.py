"""Tokens per second of a training step: bijective denoiser against a plain transformer of equal size.

    python benchmarks/throughput.py

The plain one is nn.TransformerEncoderLayer (pre-norm, GELU, learned positions). The networks take turns, step
by step; medians are compared. Writes benchmarks/results/throughput.json."""
import statistics
import torch
from torch import nn
from bijdiff.console import command
from bijdiff.diffusion.corruption import Corruption
from bijdiff.diffusion.objective import masked_nelbo
from bijdiff.diffusion.schedules import HalfCosine, low_discrepancy_times
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from common import add_row, n_params, result_path, run_record, save, seconds_in_turns, timed_step

VOCAB_SIZE = 66

class Plain(nn.Module):
    "A pre-norm transformer denoiser of PyTorch's own layers"
    def __init__(self, vocab_size, seq_len, d_model, n_heads, n_layers):
        super().__init__()
        self.embed = nn.Embedding(vocab_size+1, d_model)
        self.pos = nn.Parameter(.02*torch.randn(seq_len, d_model))
        self.layers = nn.Sequential(*(self.block(d_model, n_heads) for _ in range(n_layers)))
        self.norm = nn.LayerNorm(d_model)
        self.output_head = nn.Linear(d_model, vocab_size)

    def block(self, d_model, n_heads):
        "Return a block of PyTorch's own"
        return nn.TransformerEncoderLayer(d_model, n_heads, 4*d_model, 0., 'gelu', batch_first=True,
                                          norm_first=True)

    def forward(self, xt):
        return self.output_head(self.norm(self.layers(self.embed(xt)+self.pos)))

def stepper(model, corrupt, x, bf16):
    "Return a function that takes one training step and returns its seconds, those of the noise not counted"
    opt = torch.optim.AdamW(model.parameters(), 1e-3)
    def prepare():
        t = low_discrepancy_times(len(x)).to(x.device)
        xt = corrupt(x, t)
        def step():
            with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
                loss = masked_nelbo(model(xt), x, xt, t, corrupt.schedule).mean()
            loss.backward()
            opt.step()
            opt.zero_grad()
        return step
    return timed_step(prepare, x.device)

def measure(models, corrupt, x, bf16, steps):
    "Return tokens per second of each model in one precision, from the medians, and their ratio"
    steppers = {name:stepper(m.to(x.device), corrupt, x, bf16) for name,m in models.items()}
    seconds = {name:statistics.median(v) for name,v in seconds_in_turns(steppers, steps, 3).items()}
    return dict(precision='bfloat16' if bf16 else 'float32',
                **{f'{name}_tokens_per_s':round(x.numel()/s) for name,s in seconds.items()},
                ratio=round(seconds['plain']/seconds['bijective'], 3),
                **{f'{name}_params':n_params(m) for name,m in models.items()})

@command
def throughput(
    d_model:int=156, # Width of one stream
    n_heads:int=3, # Attention heads
    n_layers:int=6, # Blocks
    seq_len:int=256, # Tokens of a sequence
    bs:int=32, # Sequences of a batch
    steps:int=25, # Steps of each network
    device:str='cpu', # cpu or cuda
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Compare the speed of training with that of a plain transformer"
    torch.manual_seed(0)
    sizes = dict(seq_len=seq_len, d_model=d_model, n_heads=n_heads, n_layers=n_layers)
    x = torch.randint(0, VOCAB_SIZE, (bs, seq_len), device=device)
    corrupt = Corruption(VOCAB_SIZE, schedule=HalfCosine())
    rows = []
    for bf16 in (True, False):
        models = dict(bijective=BijectiveDenoiser(DenoiserConfig(VOCAB_SIZE, **sizes)),
                      plain=Plain(VOCAB_SIZE, **sizes))
        add_row(rows, measure(models, corrupt, x, bf16, steps))
    record = run_record(__file__, device, bs=bs, **sizes, steps=steps, seed=0)
    save(result_path(__file__, out), dict(rows=rows, device=device) | record)

if __name__=='__main__': throughput()
