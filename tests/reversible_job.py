"""Gradients of a stack under DistributedDataParallel, each process with its part of the batch.

Used by test_reversible.py:

    torchrun --nproc_per_node 2 tests/reversible_job.py FOLDER"""
import sys
from contextlib import nullcontext
import torch
from torch import nn
import torch.distributed as dist
from bijdiff.layers.lattice import to_lattice
from bijdiff.layers.block import BijectiveTransformer
from bijdiff.testing import random_weights

class Model(nn.Module):
    "A stack with random weights, and a layer that is not used"
    def __init__(self, reversible):
        super().__init__()
        kwargs = dict(lattice_bits=12, reversible=reversible, time_conditioning=True)
        self.stack = BijectiveTransformer(3, 8, 2, **kwargs)
        self.unused = nn.Linear(2, 2)
        torch.manual_seed(0)
        random_weights(self)
    def forward(self, x, t): return self.stack(x, t=t)[0]

def batches():
    "Two batches of four states, with their times"
    g = torch.Generator().manual_seed(1)
    def batch(): return to_lattice(torch.randn(4, 7, 16, generator=g), 12), torch.rand(4, generator=g)
    return [batch(), batch()]

def part_of(batch, rank, world_size):
    "The part of a batch that one process computes"
    return [o.chunk(world_size)[rank] for o in batch]

def gradients(model):
    "Copies of the gradients by name, None for a parameter without one"
    def copied(p): return None if p.grad is None else p.grad.clone()
    return {name.removeprefix('module.'): copied(p) for name,p in model.named_parameters()}

def accumulate(model, batches, no_sync=nullcontext):
    "Gradients summed over all batches, and those of the first; processes synchronise at the last one only"
    model.zero_grad()
    for i,(x,t) in enumerate(batches):
        with nullcontext() if i==len(batches)-1 else no_sync():
            model(x, t).sin().sum((1, 2)).mean().backward()
        if i==0: first = gradients(model)
    return gradients(model), first

def main(folder):
    "Save `{reversible: (one batch, two batches, the first of the two)}` for each process"
    dist.init_process_group('gloo')
    rank = dist.get_rank()
    found = {}
    parts = [part_of(batch, rank, dist.get_world_size()) for batch in batches()]
    for reversible in (True, False):
        kwargs = dict(find_unused_parameters=True, bucket_cap_mb=.01) # several buckets
        model = nn.parallel.DistributedDataParallel(Model(reversible), **kwargs)
        one_batch,_ = accumulate(model, parts[:1])
        found[reversible] = one_batch, *accumulate(model, parts, model.no_sync)
    torch.save(found, f'{folder}/{rank}.pt')
    dist.destroy_process_group()

if __name__=='__main__': main(sys.argv[1])
