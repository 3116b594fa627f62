"""Time inside each monitoring callback, as a fraction of the time of training.

    python benchmarks/instruments.py

Trains networks of two sizes on the embedded corpus for some steps, with all monitoring callbacks at their
defaults. The clock runs inside the same training, so that a busy machine slows both sides alike. Writes
benchmarks/results/instruments.json."""
import statistics
import tempfile
import time
from pathlib import Path
import torch
from bijdiff.console import command
from bijdiff.data.corpora import pydoc_corpus
from bijdiff.data.loaders import text_dls
from bijdiff.training.callbacks import OscillationCallback
from bijdiff.training.instruments import (BlockNormCallback, LatticeUsageCallback, ProbeCallback,
                                          RunLogCallback)
from bijdiff.training.learner import diffusion_learner
from common import add_row, result_path, run_record, save, timed

SIZES = {
    '0.2 M parameters, 32 texts':dict(d_model=64, n_heads=2, n_layers=4),
    '1.5 M parameters, 32 texts':dict(d_model=144, n_heads=4, n_layers=6),
}
L,BS = 64,32

def clocked(cls, *args, **kwargs):
    "Return a callback that keeps the seconds spent in it"
    class Clocked(cls):
        spent = 0.
        def __call__(self, event_name):
            start = time.perf_counter()
            super().__call__(event_name)
            self.spent += time.perf_counter()-start
    Clocked.__name__ = cls.__name__
    return Clocked(*args, **kwargs)

def train_clocked(config_kwargs, steps, seed, folder):
    "Train for some steps; return the callbacks with their clocks, and the seconds of the whole training"
    dls = text_dls(pydoc_corpus()[:int(steps*BS*L/.9)+1], seq_len=L, bs=BS)
    cbs = [clocked(ProbeCallback), clocked(BlockNormCallback), clocked(LatticeUsageCallback),
           clocked(RunLogCallback, Path(folder)/'run.jsonl')]
    learn = diffusion_learner(dls, seed=seed, n_valid_draws=1, optimizer='adam',
                              config_kwargs=config_kwargs, cbs=cbs)
    learn.remove_cb(OscillationCallback)
    cbs.append(clocked(OscillationCallback))
    learn.add_cb(cbs[-1])
    with learn.no_bar(), learn.no_logging(): _,seconds = timed(lambda: learn.fit_one_cycle(1, 4e-3))
    return cbs, seconds

def fractions(config_kwargs, steps, seed):
    "Return the fraction of the time that is spent in each callback, and the seconds of a step"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        cbs,seconds = train_clocked(config_kwargs, steps, seed, folder)
    n_steps = len(cbs[-1].losses)
    return {cb.name:cb.spent/seconds for cb in cbs} | dict(seconds_per_step=seconds/n_steps)

@command
def instruments(
    steps:int=100, # Training steps
    repeats:int=3, # Trainings, each with a seed of its own
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Measure the time that monitoring callbacks take"
    rows = []
    for name,config_kwargs in SIZES.items():
        runs = [fractions(config_kwargs, steps, seed) for seed in range(repeats)]
        medians = {k:statistics.median_high(r[k] for r in runs) for k in runs[0]}
        add_row(rows, dict(setting=name, **medians, fields=config_kwargs))
    what = 'median over repeats; fractions of the time of an epoch, validation included'
    settings = dict(steps=steps, repeats=repeats, seeds=list(range(repeats)))
    save(result_path(__file__, out), dict(rows=rows, what=what) | run_record(__file__, **settings))

if __name__=='__main__': instruments()
