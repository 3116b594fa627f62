"""Where does the plateau at the start of training come from? Steps until the loss is clearly below letter frequencies, one factor changed at a time.

    python benchmarks/plateau.py

Small models on the embedded corpus, the same data order and noise for all that share a schedule. Writes benchmarks/results/plateau.json."""
import json, math, platform, sys, warnings
from collections import Counter
from functools import partial
from pathlib import Path
import numpy as np, torch
from fastai.optimizer import Adam
from fastcore.script import call_parse
from bijdiff.all import *

variants = {
    'default': {},
    'standard blocks': dict(config_kwargs=dict(n_bijective_layers=0)),
    'no local mixing': dict(config_kwargs=dict(local_window=0)),
    'log-linear schedule': dict(schedule='log_linear'),
    'all of these, and Adam with eps 1e-5': dict(config_kwargs=dict(n_bijective_layers=0, local_window=0), schedule='log_linear', opt_func=partial(Adam, eps=1e-5)),
}

def first_below(losses, level, k=20):
    "First step at which the mean of k losses is below a level"
    below = np.flatnonzero(np.convolve(losses, np.ones(k)/k, mode='valid')<level)
    return int(below[0])+k if len(below) else None

@call_parse
def main(epochs:int=1, lr:float=2e-3, seed:int=42):
    warnings.simplefilter('ignore')
    dls = text_dls('pydoc', seq_len=64, bs=16)
    n = Counter(dls.train.dataset.ids.tolist())
    unigram = -sum(c/n.total()*math.log2(c/n.total()) for c in n.values())
    rows = []
    for name,kw in variants.items():
        config_kwargs = dict(d_model=128, n_heads=4, n_layers=4, **kw.get('config_kwargs', {}))
        learn = diffusion_learner(dls, seed=seed, **{**kw, 'config_kwargs':config_kwargs})
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr)
        bits = np.array(learn.oscillation.losses)/math.log(2)
        rows.append(dict(variant=name, steps_to_leave_plateau=first_below(bits, unigram-.5), bound=round(learn.bound.bits, 3), se=round(learn.bound.se, 3)))
        print(rows[-1], flush=True)
    res = dict(rows=rows, unigram_entropy_bits=round(unigram, 3), left_plateau='mean of 20 losses more than 0.5 bits below the unigram entropy', steps=len(bits), epochs=epochs, lr=lr, seed=seed,
               machine=f'{platform.machine()}, {torch.get_num_threads()} threads', torch=torch.__version__, command='python benchmarks/plateau.py '+' '.join(sys.argv[1:]))
    (Path(__file__).parent/'results'/Path(__file__).name).with_suffix('.json').write_text(json.dumps(res, indent=1)+'\n')
