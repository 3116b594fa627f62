"""When does training leave its first plateau, where the loss is that of letter frequencies?

    python benchmarks/plateau.py

One factor is changed at a time, in small models on the embedded corpus, with the same data order and noise
for all that share a schedule. The plateau is left when the mean of 20 losses is more than half a bit below
the entropy of the letters. Writes benchmarks/results/plateau.json."""
import math
import warnings
from collections import Counter
from functools import partial
import numpy as np
from fastai.optimizer import Adam
from bijdiff.console import command
from bijdiff.data.corpora import pydoc_corpus
from bijdiff.data.loaders import text_dls
from bijdiff.training.learner import diffusion_learner
from common import add_row, result_path, run_record, save

STANDARD = dict(n_bijective_layers=0)
NO_MIXING = dict(local_window=0)
VARIANTS = {
    'default':{},
    'standard blocks':dict(config_kwargs=STANDARD),
    'no local mixing':dict(config_kwargs=NO_MIXING),
    'log-linear schedule':dict(schedule='log_linear'),
    'all of these, and Adam with eps 1e-5':dict(config_kwargs=STANDARD | NO_MIXING, schedule='log_linear',
                                                opt_func=partial(Adam, eps=1e-5)),
}

def unigram_entropy(ids):
    "Return the entropy of the frequencies of ids, in bits"
    counts = Counter(ids.tolist())
    fractions = [c/counts.total() for c in counts.values()]
    return -sum(p*math.log2(p) for p in fractions)

def first_below(losses, level, k=20):
    "Return the first step at which the mean of k losses is below a level, or None"
    below = np.flatnonzero(np.convolve(losses, np.ones(k)/k, mode='valid')<level)
    return int(below[0])+k if len(below) else None

def train(dls, epochs, lr, seed, config_kwargs=None, **kwargs):
    "Train one variant; return the learner and its losses in bits"
    sizes = dict(d_model=128, n_heads=4, n_layers=4)
    optimizer = {} if 'opt_func' in kwargs else dict(optimizer='adam')
    config_kwargs = sizes | (config_kwargs or {})
    learn = diffusion_learner(dls, seed=seed, config_kwargs=config_kwargs, **optimizer | kwargs)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr)
    return learn, np.array(learn.oscillation.losses)/math.log(2)

@command
def plateau(
    epochs:int=1, # Epochs
    lr:float=2e-3, # Peak learning rate
    seed:int=42, # Seed of weights, data order and noise
    chars:int=None, # Characters of the corpus; all if None
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Measure when training leaves its first plateau"
    warnings.simplefilter('ignore')
    dls = text_dls(pydoc_corpus()[:chars], seq_len=64, bs=16)
    entropy = unigram_entropy(dls.train.dataset.ids)
    rows = []
    for name,variant in VARIANTS.items():
        learn,bits = train(dls, epochs, lr, seed, **variant)
        add_row(rows, dict(variant=name, steps_to_leave_plateau=first_below(bits, entropy-.5),
                           bound=round(learn.bound.bits, 3), se=round(learn.bound.se, 3)))
    left = 'mean of 20 losses more than 0.5 bits below the unigram entropy'
    res = dict(rows=rows, unigram_entropy_bits=round(entropy, 3), left_plateau=left, steps=len(bits))
    save(result_path(__file__, out), res | run_record(__file__, epochs=epochs, lr=lr, seed=seed))

if __name__=='__main__': plateau()
