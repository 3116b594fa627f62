"""Mixtures of experts against a single bijective transformer and against a gated mixture, on a text.

    python benchmarks/moe.py all PATH/TO/tinyshakespeare.txt              # the runs that are missing
    python benchmarks/moe.py one PATH/TO/tinyshakespeare.txt --name dense --lr 3e-3 --seed 1

Small networks, 700 steps of 32 sequences of 64 characters (two epochs of 716,800 characters, the next 79,645
held out), Adam in one cycle, float32, stored activations. Each architecture tries the same learning rates
with seed 0 and takes the one with the better held-out bound for the other seeds. Parameters are matched to
those of the dense network to within 9%; the rows ending in _c are matched to its computation per token
instead. Those ending in 0.8 M are twice as wide with twice as many heads, which makes it about 0.8 million
parameters where the others have 0.2. In "2 uncoupled" the couplers stay at zero. Every run is a process of
its own and one line of benchmarks/results/moe.jsonl: stop it at any time, and start it again. Several workers
may share it (benchmarks/runs.py)."""
import statistics
import sys
from pathlib import Path
import torch
from torch.utils.flop_counter import FlopCounterMode
from bijdiff.checks import check_one_of
from bijdiff.console import command
from bijdiff.data.loaders import text_dls
from bijdiff.training.experts import ExpertCallback
from bijdiff.training.instruments import ProbeCallback
from bijdiff.training.learner import diffusion_learner
from common import n_params, result_path, shared_run_record, spell_command
from gated import GateCallback, make_gated
from runs import append_row, run_missing
from study import fit, held_out_bits, rounded, use_small_chunks

LRS = 6e-3,1.2e-2,2.4e-2
SEEDS = 0,1,2
L,BS,EPOCHS = 64,32,2
CONFIGS = {
    'dense':dict(d_model=64),
    '2 uncoupled':dict(d_model=44, n_experts=2, uncoupled=True),
    'standard':dict(d_model=64, n_bijective_layers=0),
    '2 final':dict(d_model=44, n_experts=2),
    '2 every':dict(d_model=40, n_experts=2, couple='every'),
    '4 final':dict(d_model=32, n_experts=4),
    'sparse 2 of 8':dict(d_model=22, n_heads=1, n_experts=8, k_active=2),
    'sparse 2 of 8, balanced':dict(d_model=22, n_heads=1, n_experts=8, k_active=2, router_balance=.01),
    'gated 2 of 8':dict(d_model=28, gated=(8, 2), balance=.01),
    'gated 2 of 8, no balance':dict(d_model=28, gated=(8, 2), balance=0.),
    'sparse 2 of 8, _c':dict(d_model=36, n_experts=8, k_active=2),
    'gated 2 of 8, _c':dict(d_model=52, gated=(8, 2), balance=.01),
}
DOUBLED = ('dense', '2 final', 'gated 2 of 8', 'standard', 'sparse 2 of 8', '2 every', '4 final',
           'gated 2 of 8, no balance')

def doubled(config):
    "Return a configuration of twice the width and twice as many heads"
    return config | dict(d_model=2*config['d_model'], n_heads=2*config.get('n_heads', 2))

CONFIGS |= {f'{name}, 0.8 M':doubled(CONFIGS[name]) for name in DOUBLED}

def flops_per_token(model, L):
    "Return the floating-point operations of a forward pass, per token"
    x = torch.full((4, L), model.mask_id)
    with torch.no_grad(), FlopCounterMode(display=False) as counter: model(x)
    return counter.get_total_flops()/x.numel()

def freeze_couplers(model):
    "Leave the couplers of a mixture at zero"
    for layer,role in zip(model.backbone.layers, model.backbone.roles):
        if role=='coupler': layer.requires_grad_(False)

def make_learner(dls, seed, d_model, gated=None, balance=0., uncoupled=False, **fields):
    "Return the learner of one configuration"
    config_kwargs = dict(d_model=d_model, n_heads=2, n_layers=4, reversible=False) | fields
    if gated is not None: config_kwargs['n_bijective_layers'] = 0
    cbs = [ProbeCallback()]
    if 'n_experts' in config_kwargs: cbs.append(ExpertCallback(every=50))
    learn = diffusion_learner(dls, seed=seed, n_valid_draws=1, optimizer='adam',
                              config_kwargs=config_kwargs, cbs=cbs)
    if uncoupled: freeze_couplers(learn.model)
    if gated is not None:
        make_gated(learn.model, *gated)
        learn.add_cb(GateCallback(balance))
    learn.logger = lambda row: print(*row, flush=True)
    return learn

def mean_gradient_ratio(norms):
    "Return the smallest over the largest mean gradient norm of an expert, from norms (steps, n)"
    means = norms.mean(0)
    return (means.min()/means.max()).item()

def expert_report(learn):
    "Return what was seen of the experts: gradients, similarities and routes; {} without experts"
    if hasattr(learn, 'expert'):
        expert = learn.expert
        norms = torch.tensor(expert.grad_norms[1:])
        cka = [round(statistics.mean(o['cka']), 4) for o in expert.records[1:]]
        return dict(gradient_ratio=expert.gradient_ratio(), mean_gradient_ratio=mean_gradient_ratio(norms),
                    last=dict(expert.records[-1]), mean_cka_by_record=cka, warnings=expert.warnings())
    if hasattr(learn, 'gate'):
        norms = torch.stack(learn.gate.grad_norms[1:])
        fractions = torch.stack(learn.gate.fractions[-50:]).mean(0)
        return dict(gradient_ratio=(norms.min(1)[0]/norms.max(1)[0]).min().item(),
                    mean_gradient_ratio=mean_gradient_ratio(norms), fraction_by_layer=fractions.tolist())
    return {}

def train_one(path, name, lr, seed, steps):
    "Do one run; return its row"
    use_small_chunks(2048, 2048)
    text = Path(path).read_text()[:int(steps/EPOCHS*L*BS/.9)+1]
    learn = make_learner(text_dls(text, seq_len=L, bs=BS), seed, **CONFIGS[name])
    flops = flops_per_token(learn.model, L)
    seconds,memory,error = fit(learn, EPOCHS, lr)
    bits,se = held_out_bits(learn, error)
    oscillation = learn.oscillation
    amplitude = None if oscillation.trend is None else round(oscillation.trend.amplitude, 4)
    line = spell_command(__file__, 'one', 'tinyshakespeare.txt', name=name, lr=lr, seed=seed, steps=steps)
    return dict(name=name, seed=seed, lr=lr, bits_per_char=round(bits, 4), se=round(se, 4), error=error,
                n_params=n_params(learn.model), flops_per_token=round(flops),
                seconds_per_epoch=round(seconds/EPOCHS, 1), peak_mib=round(memory),
                steps=len(oscillation.losses), amplitude=amplitude, losses=rounded(oscillation.losses),
                probe_every=learn.probe.every, probe=rounded(learn.probe.losses),
                experts=expert_report(learn),
                config=CONFIGS[name]) | shared_run_record(__file__, command=line)

@command
def moe(
    what:str, # one: a single run, or all: those that are missing
    path:str, # The text
    name:str=None, # Configuration of one run; or those to run, separated by /
    lr:float=3e-3, # Peak learning rate of one run
    seed:int=0, # Seed of one run
    steps:int=700, # Training steps
    out:str=None, # File of rows, instead of the one in benchmarks/results/
):
    "Train mixtures of experts and their comparators"
    check_one_of('what', what, ('one', 'all'))
    file = result_path(__file__, out, '.jsonl')
    if what=='one':
        row = train_one(path, name, lr, seed, steps)
        print(row)
        return append_row(file, row)
    grid = {k:dict(lrs=LRS, seeds=SEEDS) for k in (name.split('/') if name else CONFIGS)}
    words = [sys.executable, __file__, 'one', path, '--steps', str(steps), '--out', str(file)]
    run_missing(file, grid, lambda n,lr,s: [*words, '--name', n, '--lr', str(lr), '--seed', str(s)])

if __name__=='__main__': moe()
