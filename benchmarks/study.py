"""Trainings over a grid of configurations and seeds, from a file in benchmarks/results/studies/.

    python benchmarks/study.py run layers PATH/TO/tinyshakespeare.txt         # the runs that are missing
    python benchmarks/study.py one layers PATH/TO/tinyshakespeare.txt --name standard --lr .012 --seed 1
    python benchmarks/study.py table layers                                   # the results so far

Every run is a process of its own and one line of benchmarks/results/studies/NAME.jsonl. Stop it at any time,
by `kill -9` if need be, and start it again: finished runs are not repeated. Several workers may share a
study.

benchmarks/results/studies/NAME.json has
- `steps` and `epochs`, which give the length of the text: its first 90% are for training, the rest is held
  out;
- `seq_len`, `bs`, `lrs`, `seeds`;
- `fields`: those of DenoiserConfig that all networks have in common;
- `draws` of the noise in the score, 8 if it does not say; `bf16`, true for trainings in half precision;
  `exact`, the number of chunks whose likelihood is computed after the training (see `exact_bits`);
- `configs`: what differs, by name: fields, `epochs` (of the same text), `tokenizer`, `bs`, `lrs`, `seeds`,
  keywords of diffusion_learner under `learner` (Adam is the optimiser unless it says otherwise), and of
  fit_one_cycle under `fit`, or of fit_steps where `steps` are among them, or of `fit_constant`;
  `standard_first`, `embed_scale`, `mask_pairs`, `dit` and `next_token` (see the functions and classes, and
  baselines.py).

All runs of a seed see the same sequences in the same order with the same noise, and start from the same
random numbers."""
import json
import math
import resource
import sys
import time
from pathlib import Path
import numpy as np
import torch
from fastai.callback.schedule import combine_scheds, ParamScheduler, SchedLin, SchedNo
from fastai.torch_core import default_device
from torch import nn
from bijdiff.checks import check, check_one_of
from bijdiff.console import command
from bijdiff.data.loaders import text_dls
from bijdiff.diffusion.schedules import low_discrepancy_times
from bijdiff.layers.lattice import LatticeError, to_lattice
from bijdiff.layers.reversible import ChunkedUpdate
from bijdiff.likelihood.bounds import nelbo_draws, score_ids
from bijdiff.likelihood.exact import log_prob
from bijdiff.training.instruments import BlockNormCallback, LatticeUsageCallback, ProbeCallback
from bijdiff.training.learner import diffusion_learner
from bijdiff.training.noising import CorruptionCallback
from baselines import next_token_nats, NextTokenLoss, use_dit, use_next_token
from common import mean_se, n_params, Param, RESULTS, shared_run_record, spell_command, spread_ids
from runs import append_row, best_runs, diverged, paired, read_rows, run_missing

STUDIES = RESULTS/'studies'
NOT_FIELDS = ('epochs','bs','lrs','seeds','learner','fit','standard_first','embed_scale','mask_pairs','dit',
              'next_token','tokenizer')

# Grids and results

def read_grid(name):
    "Read a study and fill in what all configurations have in common"
    grid = json.loads((STUDIES/f'{name}.json').read_text())
    common = {k:grid[k] for k in ('epochs','lrs','seeds')}
    grid['configs'] = {k:{**common, 'learner':{}, 'fit':{}, **c} for k,c in grid['configs'].items()}
    return grid

def config_fields(grid, config):
    "Return the fields of DenoiserConfig of one configuration"
    return grid['fields'] | {k:v for k,v in config.items() if k not in NOT_FIELDS}

def best_of(study):
    "Return the runs of each configuration of a study at its best rate"
    return best_runs(read_rows(STUDIES/f'{study}.jsonl'), read_grid(study)['configs'])

def table(study):
    "Print mean and standard deviation over seeds for each configuration"
    for name,runs in best_of(study).items():
        bits = [r['bits_per_char'] for r in runs if not diverged(r)]
        spread = f'± {np.std(bits, ddof=1):.4f}' if len(bits)>1 else ' '*8
        seconds = np.median([r['seconds'] for r in runs])
        result = f"{runs[0]['lr']:<7g} {np.mean(bits):.4f} {spread} over {len(bits)} of {len(runs)} seeds"
        print(f"{name:28} {result}, {runs[0]['n_params']} parameters, {seconds:.0f} s")

# Training

def peak_mib(device):
    "Return the most MiB that tensors have held on a GPU; on a CPU the largest size of the process"
    if device.type=='cuda': return torch.cuda.max_memory_allocated()/2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024

def fit_constant(learn, epochs, lr, constant_after):
    "Train with a rate that rises for a number of steps and then stays"
    part = constant_after/(epochs*len(learn.dls.train))
    rate = combine_scheds([part, 1-part], [SchedLin(lr/100, lr), SchedNo(lr, lr)])
    learn.fit(epochs, lr, cbs=ParamScheduler(dict(lr=rate)))

def fit(learn, epochs, lr, **kwargs):
    """Train; return seconds, MiB and the error if states left the lattice

    MiB are all that tensors held on a GPU, and what the process grew by on a CPU. A rate that is too high for
    one network does not stop the other runs"""
    device = learn.dls.device
    before = 0 if device.type=='cuda' else peak_mib(device)
    start,error = time.time(),None
    try:
        with learn.no_bar():
            if 'constant_after' in kwargs: fit_constant(learn, epochs, lr, **kwargs)
            elif 'steps' in kwargs: learn.fit_steps(lr=lr, **kwargs)
            else: learn.fit_one_cycle(epochs, lr, **kwargs)
    except LatticeError as e: error = str(e)
    return time.time()-start, peak_mib(device)-before, error

def held_out_bits(learn, error, draws=8):
    "Return bits per character of the held-out text and their standard error, NaN after an error in training"
    if error: return float('nan'),float('nan')
    ids,n_chars = learn.dls.valid.dataset.ids,len(learn.dls.valid_text)
    if isinstance(learn.loss_func, NextTokenLoss):
        return next_token_nats(learn.model, ids).sum().item()/math.log(2)/n_chars,0.
    return score_ids(learn.model, ids, n=draws).bits(n_chars)

def exact_bits(learn, n):
    """Return exact bits per character of n chunks spread over the held-out text, with errors over chunks

    Those of the rule `spread`, 8 tokens a pass, beside the bound on the same chunks; by the chain rule for a
    network that was trained on the next token"""
    x = spread_ids(learn.dls.valid.dataset.ids, n, learn.dls.seq_len)
    if isinstance(learn.loss_func, NextTokenLoss): nats = dict(exact=next_token_nats(learn.model, x))
    else:
        by_rule = -log_prob(learn.model, x, 'spread', x.shape[1]//8)
        nats = dict(exact=by_rule, bound=nelbo_draws(learn.model, x, 16, seed=0).mean(0))
    n_chars = torch.tensor([len(learn.dls.tokenizer.decode(o.tolist())) for o in x])
    return {k:mean_se(v.double().cpu()/math.log(2)/n_chars, 4) for k,v in nats.items()}

def use_small_chunks(cpu, cuda):
    "Set the rows of a chunk of the MLP for small networks: few chunks, or one, are faster"
    torch.set_num_threads(1)
    ChunkedUpdate.min_chunk_rows = cpu if default_device().type=='cpu' else cuda

def standard_first(model):
    """Move the bijective blocks after the standard ones, where the configuration has them first

    The backbone becomes one chain without the reversible backward pass: the same values, more memory"""
    backbone = model.backbone
    n = backbone.n_bijective_layers
    backbone.blocks = nn.ModuleList([*backbone.blocks[n:], *backbone.blocks[:n]])
    backbone.n_bijective_layers = 0

class ScaledEntry(nn.Module):
    "The embedding times a factor, for both streams"
    def __init__(self, scale, bits):
        super().__init__()
        self.scale,self.bits = scale,bits
    def forward(self, h):
        return h*self.scale if self.bits is None else to_lattice(h*self.scale, self.bits)


class MaskPairCallback(CorruptionCallback):
    """Noise in which each training sequence stands in a batch twice, and each of its tokens is masked once

    The second half of a batch has the masks that the first has not, and the times at which as few tokens are
    masked as are not in the first; the batch has twice the rows of the loader"""
    name = 'corruption'
    def before_batch(self):
        if self.training: self.learn.xb = (torch.cat([self.xb[0], self.xb[0]]),)
        super().before_batch()

    def _train_noise(self, x, given):
        x = x[:len(x)//2]
        t = low_discrepancy_times(len(x), None, self.generator)
        noisy = self.corruption.corrupt(x, t, self.generator)
        V = self.corruption.vocab_size
        others = torch.where(noisy.xt==V, x, V)
        alpha = self.corruption.schedule.alpha(t)
        both = torch.cat([t, self.corruption.schedule.t(1-alpha)])
        return both, noisy._replace(xt=torch.cat([noisy.xt, others]))

def make_learner(grid, config, path, seed):
    "Return the learner of one configuration"
    n_chars = int(grid['steps']/grid['epochs']*grid['seq_len']*grid['bs']/.9)+1
    text = Path(path).read_text()[:n_chars]
    tokenizer = config.get('tokenizer', 'char')
    dls = text_dls(text, tokenizer, seq_len=grid['seq_len'], bs=config.get('bs', grid['bs']))
    cbs = [ProbeCallback(), BlockNormCallback(50), LatticeUsageCallback()]
    learn = diffusion_learner(dls, seed=seed, n_valid_draws=1, config_kwargs=config_fields(grid, config),
                              cbs=cbs, **dict(optimizer='adam') | config['learner'])
    model = learn.model
    if config.get('standard_first'): standard_first(model)
    if config.get('embed_scale'): model.entry = ScaledEntry(config['embed_scale'], model.config.lattice_bits)
    if config.get('mask_pairs'):
        old = learn.corruption
        learn.remove_cb(old)
        learn.add_cb(MaskPairCallback(old.corruption, old.seed, old.n_valid_draws))
    if config.get('dit'): use_dit(learn, seed, **config['dit'])
    if config.get('next_token'): use_next_token(learn)
    if grid.get('bf16'): learn.to_bf16()
    learn.logger = lambda row: print(*row, flush=True)
    return learn

def rounded(values):
    "Return values with four decimals"
    return [round(v, 4) for v in values]

def watched_blocks(learn):
    "Return what is measured of blocks of this package, None for other networks"
    names = 'lattice_usage','log_det','inverse_error','norms'
    if not hasattr(learn, 'block_norm'): return dict.fromkeys(names)
    return dict(lattice_usage=learn.lattice_usage.values[-1:], log_det=learn.log_det.value,
                inverse_error=learn.invertibility.value, norms=learn.block_norm.rows[-1:])

def watched(learn):
    "Return what the callbacks of a learner have seen"
    terms = learn.objective if hasattr(learn, 'objective') else None
    return dict(valid_bits_by_epoch=rounded(v[2] for v in learn.recorder.values),
                losses=rounded(learn.oscillation.losses),
                probe_every=learn.probe.every, probe=rounded(learn.probe.losses),
                **watched_blocks(learn),
                terms=terms.fractions() if terms else None,
                last_terms=terms.parts[-1] if terms else None)

def train_one(study, path, name, lr, seed):
    "Do one run; return its row"
    use_small_chunks(2048, 8192)
    grid = read_grid(study)
    config = grid['configs'][name]
    learn = make_learner(grid, config, path, seed)
    seconds,memory,error = fit(learn, config['epochs'], lr, **config['fit'])
    bits,se = held_out_bits(learn, error, grid.get('draws', 8))
    exact = dict(exact=exact_bits(learn, grid['exact'])) if grid.get('exact') and not error else {}
    line = spell_command(__file__, 'one', study, 'tinyshakespeare.txt', name=name, lr=lr, seed=seed)
    return dict(study=study, name=name, seed=seed, lr=lr, bits_per_char=round(bits, 4), se=round(se, 4),
                error=error, n_params=n_params(learn.model), epochs=config['epochs'],
                seconds=round(seconds, 1), peak_mib=round(memory), **watched(learn), **exact,
                config={k:v for k,v in config.items() if k not in ('lrs','seeds') and (v or k!='fit')},
                fields=config_fields(grid, config)) | shared_run_record(__file__, default_device(), line)

@command
def study(
    what:str, # run: all that are missing, one: a single run, or table
    study:str, # Name of a file in benchmarks/results/studies/
    path:Param('The text; not needed for a table', str, nargs='?', opt=False)=None,
    name:str=None, # Configuration of one run; or those to run, separated by /
    lr:float=None, # Peak learning rate of one run
    seed:int=0, # Seed of one run
):
    "Do the runs of a study, or show its results"
    check_one_of('what', what, ('run', 'one', 'table'))
    if what=='table': return table(study)
    check(path is not None, 'path', path, 'the path of a text')
    file = STUDIES/f'{study}.jsonl'
    if what=='one':
        row = train_one(study, path, name, lr, seed)
        print({k:v for k,v in row.items() if k not in ('losses','probe','norms')})
        return append_row(file, row)
    configs = read_grid(study)['configs']
    chosen = {k:configs[k] for k in (name.split('/') if name else configs)}
    words = [sys.executable, __file__, 'one', study, path]
    run_missing(file, chosen, lambda n,lr,s: [*words, '--name', n, '--lr', str(lr), '--seed', str(s)])

if __name__=='__main__': study()
