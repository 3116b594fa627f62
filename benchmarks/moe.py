"""Mixtures of experts against a single bijective transformer and against a gated mixture, on a text.

    python benchmarks/moe.py all PATH/TO/tinyshakespeare.txt              # everything that is still missing, one run after another
    python benchmarks/moe.py one PATH/TO/tinyshakespeare.txt --name dense --lr 3e-3 --seed 1

Small networks, 700 steps of 32 texts of 64 characters (two passes over 716,800 characters, the next 79,645 held out), Adam in one cycle, float32, stored activations. Each architecture tries the same learning rates with seed 0 and
keeps the one with the better held-out bound for the other seeds. Parameters are matched to those of the dense network to within 9%; the rows ending in _c are matched to its computation per token instead. Those ending in 0.8 M are twice as wide with twice as many heads, which makes it about 0.8 million parameters where the others have 0.2. "2 uncoupled" has couplers that stay at zero. Every run is a process of its own and one line of benchmarks/results/moe.jsonl:
stop it when you like, and start it again. Several may work at it at once (benchmarks/study.py has the machinery)."""
import json, platform, statistics, sys
from pathlib import Path
import torch, fastai
from fastcore.script import call_parse
from torch.utils.flop_counter import FlopCounterMode
from bijdiff.all import *
from gated import GateCallback, make_gated
from study import append_row, fit, held_out, work

RESULTS = (Path(__file__).parent/'results'/Path(__file__).name).with_suffix('.jsonl')
LRS,SEEDS = (6e-3, 1.2e-2, 2.4e-2),(0, 1, 2)
CONFIGS = {
    'dense':dict(d_model=64), '2 uncoupled':dict(d_model=44, n_experts=2, uncoupled=True), 'standard':dict(d_model=64, n_bijective_layers=0),
    '2 final':dict(d_model=44, n_experts=2), '2 every':dict(d_model=40, n_experts=2, couple='every'), '4 final':dict(d_model=32, n_experts=4),
    'sparse 2 of 8':dict(d_model=22, n_heads=1, n_experts=8, k_active=2), 'sparse 2 of 8, balanced':dict(d_model=22, n_heads=1, n_experts=8, k_active=2, router_balance=.01),
    'gated 2 of 8':dict(d_model=28, gated=(8, 2), balance=.01), 'gated 2 of 8, no balance':dict(d_model=28, gated=(8, 2), balance=0.),
    'sparse 2 of 8, _c':dict(d_model=36, n_experts=8, k_active=2), 'gated 2 of 8, _c':dict(d_model=52, gated=(8, 2), balance=.01)}

def doubled(c): return {**c, 'd_model':2*c['d_model'], 'n_heads':2*c.get('n_heads', 2)}

CONFIGS |= {f'{n}, 0.8 M':doubled(CONFIGS[n]) for n in ('dense', '2 final', 'gated 2 of 8', 'standard', 'sparse 2 of 8', '2 every', '4 final', 'gated 2 of 8, no balance')}

def flops_per_token(model, L):
    "Of a forward pass"
    x = torch.full((4, L), model.mask_id)
    with torch.no_grad(), FlopCounterMode(display=False) as c: model(x)
    return c.get_total_flops()/x.numel()

def learner(dls, seed, d_model, gated=None, balance=0., uncoupled=False, **config_kwargs):
    config_kwargs = dict(dict(d_model=d_model, n_heads=2, n_layers=4, reversible=False), **config_kwargs)
    if gated is not None: config_kwargs['n_bijective_layers'] = 0
    watch = [ProbeCallback(), *([ExpertCallback(every=50)] if 'n_experts' in config_kwargs else [])]
    learn = diffusion_learner(dls, seed=seed, n_valid_draws=1, config_kwargs=config_kwargs, cbs=watch)
    for c,role in zip(learn.model.backbone.layers, learn.model.backbone.roles) if uncoupled else ():
        if role=='coupler': c.requires_grad_(False)
    if gated is not None:
        make_gated(learn.model, *gated)
        learn.add_cb(GateCallback(balance))
    return learn

def experts_seen(learn):
    "What became of the experts"
    if hasattr(learn, 'expert'):
        e = learn.expert
        g,looks = torch.tensor(e.grads[1:]),e.looks
        return dict(gradient_ratio=e.gradient_ratio(), mean_gradient_ratio=(g.mean(0).min()/g.mean(0).max()).item(), last={k:v for k,v in looks[-1].items()}, mean_cka_by_look=[round(statistics.mean(o['cka']), 4) for o in looks[1:]], flags=e.flags())
    if hasattr(learn, 'gate'):
        g,s = torch.stack(learn.gate.grads[1:]),torch.stack(learn.gate.weights[-50:]).mean(0)
        return dict(gradient_ratio=(g.min(1)[0]/g.max(1)[0]).min().item(), mean_gradient_ratio=(g.mean(0).min()/g.mean(0).max()).item(), share_by_layer=s.tolist())
    return {}

def run(path, name, lr, seed, steps):
    "One training, as a line of the results"
    torch.set_num_threads(1)
    ChunkedUpdate.min_chunk_rows = 2048                                              # the MLP of a batch in one portion: faster for networks as small as these
    L,bs,epochs = 64,32,2
    text = Path(path).read_text()[:int(steps/epochs*L*bs/.9)+1]
    dls = text_dls(text, seq_len=L, bs=bs)
    learn = learner(dls, seed, **CONFIGS[name])
    flops = flops_per_token(learn.model, L)
    learn.logger = lambda row: print(*row, flush=True)
    seconds,memory,error = fit(learn, epochs, lr)
    bits,se = held_out(learn, error)
    t = learn.oscillation.trend
    return dict(name=name, seed=seed, lr=lr, bits_per_char=round(bits, 4), se=round(se, 4), error=error, n_params=sum(p.numel() for p in learn.model.parameters()), flops_per_token=round(flops), seconds_per_epoch=round(seconds/epochs, 1), peak_mib=round(memory),
                steps=len(learn.oscillation.losses), amplitude=None if t is None else round(t.amplitude, 4), losses=[round(v, 4) for v in learn.oscillation.losses], probe_every=learn.probe.every, probe=[round(v, 4) for v in learn.probe.losses],
                experts=experts_seen(learn), config=CONFIGS[name], machine=f'{platform.machine()}, 1 thread, others running beside it', torch=torch.__version__, fastai=fastai.__version__, command=f"python benchmarks/moe.py one tinyshakespeare.txt --name '{name}' --lr {lr} --seed {seed}")

@call_parse
def main(
    what:str, # one run, or all that are missing
    path:str, # The text
    name:str=None, # Names in CONFIGS, separated by /
    lr:float=3e-3, # Peak learning rate of one run
    seed:int=0, # Of one run
    steps:int=700, # Training steps
):
    if what=='all':
        grid = {k:dict(lrs=LRS, seeds=SEEDS) for k in (name.split('/') if name else CONFIGS)}
        return work(RESULTS, grid, lambda n,lr,s: [sys.executable, __file__, 'one', path, '--name', n, '--lr', str(lr), '--seed', str(s), '--steps', str(steps)])
    res = run(path, name, lr, seed, steps)
    print(json.dumps(res))
    append_row(RESULTS, res)
