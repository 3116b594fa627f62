"""One training, alone or under torchrun, that prints its metrics as JSON.

Used by test_distributed.py, and an example of distributed training in Python:

    torchrun --nproc_per_node 2 tests/distributed_job.py '{"fsdp": true}'

Options, as JSON: `fsdp`; `folder`, to train in steps with a checkpoint after every batch, and to go on when
it is run again; `stop_at`, the step that is interrupted if there is no checkpoint yet; `config`, fields of
DenoiserConfig; `noise`, weights of the corruption; all others are those of `diffusion_learner`."""
import json, sys
from pathlib import Path
import torch
from fastai.basics import Callback
from fastai.distributed import rank_distrib
from bijdiff.all import *
from bijdiff.training.distributed import own_batch_size, process_group, whole_model

def metrics(learn):
    "Loss of each step, bound in bits with its standard error, and the sum of absolute weights"
    weights = sum(p.double().abs().sum().item() for p in whole_model(learn.model).parameters())
    return dict(losses=learn.oscillation.losses, bits=learn.bound.bits, se=learn.bound.se, weights=weights)

class StopInStep(Callback):
    "Interrupt a fit at the end of a step; the last checkpoint lies between its batches"
    order = 80
    def __init__(self, n): self.n = n
    def after_batch(self):
        if self.training and (self.n_updates, self.train_iter%2)==(self.n, 0): raise KeyboardInterrupt

def in_steps(dls, options, folder, stop_at, fsdp):
    "Train for seven steps of two batches, in legs of three, with accumulation, an average and dropout"
    resume = (folder/'checkpoint.safetensors').exists()
    cbs = [CheckpointCallback(folder, resume=resume, save_every='0.000001min')]
    if not resume: cbs.append(StopInStep(stop_at))
    config = dict(d_model=8, n_heads=2, n_layers=2, dropout=.1)
    learn = diffusion_learner(dls, config_kwargs=config, cbs=cbs, accumulate=2, ema=.9, **options)
    learn.distribute(fsdp)
    with learn.no_bar(), learn.no_logging(): learn.fit_steps(7, 1e-2, 3)
    return learn

def in_epochs(dls, options, fsdp, config=None, noise=(1,)):
    "Train for two epochs"
    config = dict(d_model=16, n_heads=2, n_layers=2) | (config or {})
    corruption = Corruption(dls.tokenizer.vocab_size, *noise)
    learn = diffusion_learner(dls, corruption=corruption, config_kwargs=config, **options).distribute(fsdp)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2)
    return learn

def main(fsdp=False, folder=None, stop_at=99, config=None, noise=(1,), **options):
    with process_group(torch.device('cpu')):
        n_chars,length = (4_000, 16) if folder else (10_000, 32)
        dls = text_dls(pydoc_corpus()[:n_chars], seq_len=length, bs=own_batch_size(16), device='cpu')
        if folder: learn = in_steps(dls, options, Path(folder), stop_at, fsdp)
        else: learn = in_epochs(dls, options, fsdp, config, noise)
        found = metrics(learn)
    if rank_distrib()==0: print(json.dumps(found))

if __name__=='__main__': main(**json.loads(sys.argv[1]))
