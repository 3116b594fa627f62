"""One training run, alone or under torchrun, that prints its metrics as JSON.

Used by test_distributed.py, and an example of distributed training:

    ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 tests/distributed_job.py 16"""
import json, sys
from contextlib import nullcontext
from fastai.distributed import num_distrib, rank_distrib
from bijdiff.all import *

def metrics(learn):
    "Loss of each step, bound in bits with its standard error, and the sum of absolute weights"
    weights = sum(p.double().abs().sum().item() for p in learn.model.parameters())
    return dict(losses=learn.oscillation.losses, bits=learn.bound.bits, se=learn.bound.se, weights=weights)

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

if __name__=='__main__': main(int(sys.argv[1]))
