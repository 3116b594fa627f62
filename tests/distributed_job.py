"""One training run, alone or under torchrun, that prints its metrics as JSON.

Used by test_distributed.py, and an example of distributed training:

    ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 tests/distributed_job.py 16

With a folder and a number of steps it trains in steps, writes a checkpoint after every batch, is interrupted
before that step, and goes on when it is run again."""
import json, sys
from contextlib import nullcontext
from pathlib import Path
from fastai.basics import Callback
from fastai.callback.all import GradientAccumulation
from fastai.distributed import num_distrib, rank_distrib
from bijdiff.all import *

def metrics(learn):
    "Loss of each step, bound in bits with its standard error, and the sum of absolute weights"
    weights = sum(p.double().abs().sum().item() for p in learn.model.parameters())
    return dict(losses=learn.oscillation.losses, bits=learn.bound.bits, se=learn.bound.se, weights=weights)

class StopInStep(Callback):
    "Interrupt a fit at the end of a step; the last checkpoint lies between its batches"
    order = 80
    def __init__(self, n): self.n = n
    def after_batch(self):
        if self.training and (self.n_updates, self.train_iter%2)==(self.n, 0): raise KeyboardInterrupt

def in_steps(
    folder:Path, # Folder of the checkpoint
    stop_at:int, # Number of the step that is interrupted, if there is no checkpoint yet
):
    "Train for seven steps of two batches, in legs of three, with accumulation, an average and dropout"
    resume = (folder/'checkpoint.safetensors').exists()
    bs = 16//num_distrib()
    dls = text_dls(pydoc_corpus()[:4000], seq_len=16, bs=bs, device='cpu')
    cbs = [GradientAccumulation(2*bs), EMACallback(.9)]
    cbs += [CheckpointCallback(folder, resume=resume, save_every='0.000001min')]
    if not resume: cbs.append(StopInStep(stop_at))
    learn = diffusion_learner(dls, config_kwargs=dict(d_model=8, n_heads=2, n_layers=2, dropout=.1), cbs=cbs)
    with learn.distrib_ctx(), learn.no_bar(), learn.no_logging(): learn.fit_steps(7, 1e-2, 3)
    if rank_distrib()==0: print(json.dumps(metrics(learn)))

def main(
    global_bs, # Batch size, all processes together
):
    bs = global_bs//max(num_distrib(), 1)
    dls = text_dls(pydoc_corpus()[:40_000], seq_len=32, bs=bs, device='cpu')
    learn = diffusion_learner(dls, config_kwargs=dict(d_model=16, n_heads=2, n_layers=2))
    distributed = learn.distrib_ctx() if num_distrib()>1 else nullcontext()
    with distributed, learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(2, 1e-2)
    if rank_distrib()==0: print(json.dumps(metrics(learn)))

if __name__=='__main__':
    if len(sys.argv)==3: in_steps(Path(sys.argv[1]), int(sys.argv[2]))
    else: main(int(sys.argv[1]))
