"""One training run, alone or under torchrun: prints its metrics as JSON. Used by test_distributed.py, and an example of distributed training.

    ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 tests/distributed_job.py 16"""
import json, sys
from contextlib import nullcontext
from fastai.distributed import num_distrib, rank_distrib
from bijdiff.all import *

def main(global_bs):
    dls = text_dls(pydoc_corpus()[:40_000], seq_len=32, bs=global_bs//max(num_distrib(), 1), device='cpu')
    learn = diffusion_learner(dls, config_kwargs=dict(d_model=16, n_heads=2, n_layers=2))
    with learn.distrib_ctx() if num_distrib()>1 else nullcontext(), learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2)
    weights = sum(p.double().abs().sum().item() for p in learn.model.parameters())
    if rank_distrib()==0: print(json.dumps(dict(losses=learn.oscillation.losses, bits=learn.bound.bits, se=learn.bound.se, weights=weights)))

if __name__=='__main__': main(int(sys.argv[1]))
