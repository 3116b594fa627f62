"""Gradients of a stack under DistributedDataParallel, each process with its share of the batch. Used by test_reversible.py.

    torchrun --nproc_per_node 2 tests/reversible_job.py FOLDER"""
import sys
from contextlib import nullcontext
import torch
from torch import nn
import torch.distributed as dist
from bijdiff.layers.lattice import to_lattice
from bijdiff.layers.block import BijectiveTransformer

class Model(nn.Module):
    "A stack, and a layer that takes no part"
    def __init__(self, reversible):
        super().__init__()
        self.stack,self.unused = BijectiveTransformer(3, 8, 2, lattice_bits=12, reversible=reversible, time_conditioning=True),nn.Linear(2, 2)
        torch.manual_seed(0)
        for p in self.parameters(): nn.init.normal_(p, std=.3)
    def forward(self, x, t): return self.stack(x, t=t)[0]

def batches():
    "Two batches of four texts, with their times"
    g = torch.Generator().manual_seed(1)
    return [(to_lattice(torch.randn(4, 7, 16, generator=g), 12), torch.rand(4, generator=g)) for _ in range(2)]

def accumulate(model, batches, no_sync=nullcontext):
    "Gradients of all batches, added up; the processes need to meet at the last one only. With those of the first batch"
    model.zero_grad()
    for i,(x,t) in enumerate(batches):
        with no_sync() if i<len(batches)-1 else nullcontext(): model(x, t).sin().sum((1, 2)).mean().backward()
        if i==0: first = gradients(model)
    return gradients(model),first

def gradients(model): return {n.removeprefix('module.'):None if p.grad is None else p.grad.clone() for n,p in model.named_parameters()}

def main(folder):
    dist.init_process_group('gloo')
    rank,found = dist.get_rank(),{}
    mine = [tuple(o.chunk(dist.get_world_size())[rank] for o in b) for b in batches()]
    for reversible in (True, False):
        model = nn.parallel.DistributedDataParallel(Model(reversible), find_unused_parameters=True, bucket_cap_mb=.01)      # several buckets
        found[reversible] = accumulate(model, mine[:1])[0],*accumulate(model, mine, model.no_sync)
    torch.save(found, f'{folder}/{rank}.pt')
    dist.destroy_process_group()

if __name__=='__main__': main(sys.argv[1])
