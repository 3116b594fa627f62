"""What the instruments cost: time spent inside each callback, as a share of the time of training.

    python benchmarks/instruments.py

Trains networks of two sizes on the embedded corpus for some steps, with every instrument at its default setting. The clock runs inside the same training, so a busy machine slows both sides alike. Writes benchmarks/results/instruments.json."""
import json, platform, sys, tempfile, time
from pathlib import Path
import torch, fastai
from fastcore.script import call_parse
from bijdiff.all import *

def timed(cls, *args, **kwargs):
    "A callback that knows how long it took"
    class Timed(cls):
        spent = 0.
        def __call__(self, event_name):
            start = time.perf_counter()
            super().__call__(event_name)
            self.spent += time.perf_counter()-start
    Timed.__name__ = cls.__name__
    return Timed(*args, **kwargs)

def shares(config_kwargs, bs, steps, seed):
    "Seconds inside each callback over those of the whole training, and the step"
    torch.set_num_threads(1)
    dls = text_dls(pydoc_corpus()[:int(steps*bs*64/.9)+1], seq_len=64, bs=bs)
    with tempfile.TemporaryDirectory() as d:
        cbs = [timed(ProbeCallback), timed(BlockNormCallback), timed(LatticeUsageCallback), timed(RunLogCallback, Path(d)/'run.jsonl')]
        learn = diffusion_learner(dls, seed=seed, n_valid_draws=1, config_kwargs=config_kwargs, cbs=cbs)
        own = timed(OscillationCallback)
        learn.remove_cb(OscillationCallback); learn.add_cb(own)
        start = time.perf_counter()
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 4e-3)
        whole = time.perf_counter()-start
    return {**{cb.name:cb.spent/whole for cb in [*cbs, own]}, 'seconds_per_step':whole/len(own.losses)}

@call_parse
def main(steps:int=100, repeats:int=3):
    rows = []
    for name,bs,config_kwargs in (('0.2 M parameters, 32 texts', 32, dict(d_model=64, n_heads=2, n_layers=4)), ('1.5 M parameters, 32 texts', 32, dict(d_model=144, n_heads=4, n_layers=6))):
        runs = [shares(config_kwargs, bs, steps, s) for s in range(repeats)]
        rows.append(dict(setting=name, **{k:sorted(r[k] for r in runs)[repeats//2] for k in runs[0]}, config_kwargs=config_kwargs))
        print(rows[-1], flush=True)
    res = dict(rows=rows, what='median over repeats; shares of the time of an epoch, validation included', steps=steps, repeats=repeats, machine=f'{platform.machine()}, 1 thread', torch=torch.__version__, fastai=fastai.__version__, command='python benchmarks/instruments.py '+' '.join(sys.argv[1:]))
    (Path(__file__).parent/'results'/Path(__file__).name).with_suffix('.json').write_text(json.dumps(res, indent=1)+'\n')
