"""Memory of weights, gradients and optimiser of each process: one process, DDP, and FSDP2.

    python benchmarks/devices.py

Starts itself by torchrun on the CPU for each row, trains a network for two steps of Adam, and adds up the
bytes of the tensors that a process keeps between steps. `unit_mb` is what FSDP2 gathers beside them for a
moment: the embedding and the output head together, and a block."""
import json
import subprocess
import sys
import torch
from fastai.basics import Adam, rank_distrib
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from bijdiff.console import command
from bijdiff.layers.coupling import AdditiveCoupling
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.training.distributed import process_group, shard
from common import result_path, run_record, save

ROWS = (('one', 1), ('ddp', 2), ('fsdp', 2), ('ddp', 4), ('fsdp', 4))
MB = 2**20

def local_bytes(t):
    "Bytes of a tensor, or of the part of it in this process"
    t = t.to_local() if hasattr(t, 'to_local') else t
    return t.numel()*t.element_size()

def parameter_bytes(parameters): return sum(map(local_bytes, parameters))

def units(model):
    "Megabytes of the embedding, the output head and all else outside of blocks, and of one block"
    blocks = [m for m in model.modules() if isinstance(m, AdditiveCoupling)]
    inside = [p for m in blocks for p in m.parameters()]
    rest = parameter_bytes(model.parameters())-parameter_bytes(inside)
    return dict(ends=rest/MB, block=parameter_bytes(blocks[0].parameters())/MB)

def kept_bytes(model, opt):
    "Bytes of weights, gradients and optimiser of this process"
    grads = [p.grad for p in model.parameters()]
    states = [v for p in model.parameters() for v in opt.state[p].values() if isinstance(v, Tensor)]
    found = dict(weights=model.parameters(), gradients=grads, optimiser=states)
    return {name:parameter_bytes(tensors)/MB for name,tensors in found.items()}

def train(engine, config):
    "Train for two steps; return the megabytes that this process keeps, and those of the units"
    torch.manual_seed(0)
    model = BijectiveDenoiser(config)
    unit_mb = units(model)
    if engine=='fsdp': shard(model)
    opt = Adam(list(model.parameters()), lr=1e-3)
    wrapped = DistributedDataParallel(model) if engine=='ddp' else model
    for _ in range(2):
        opt.zero_grad()
        ids = torch.randint(config.vocab_size, (2, config.seq_len))
        wrapped(ids).logsumexp(-1).mean().backward()
        opt.step()
    return dict(kept_mb=kept_bytes(model, opt), unit_mb=unit_mb)

def row(engine, n, config):
    "Start a training of a row in its processes; return its result"
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n)]
    options = [word for k,v in config.items() for word in (f'--{k}', str(v))]
    words = [sys.executable, *launcher, __file__, '--engine', engine, *options]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return dict(engine=engine, processes=n) | json.loads(done.stdout.splitlines()[-1])

@command
def devices(
    vocab_size:int=8192, # Vocabulary
    d_model:int=256, # Width of a stream
    n_layers:int=8, # Blocks
    engine:str=None, # Used by the script for its own processes: one, ddp or fsdp
    out:str=None, # JSON file for the results
):
    "Measure the memory that each process keeps"
    sizes = dict(vocab_size=vocab_size, d_model=d_model, n_layers=n_layers)
    if engine is None:
        rows = [row(*o, sizes) for o in ROWS]
        for o in rows: print(json.dumps(o))
        return save(result_path(__file__, out), run_record(__file__, **sizes) | dict(rows=rows))
    config = DenoiserConfig(**sizes, seq_len=32, n_heads=4)
    with process_group(torch.device('cpu')): found = train(engine, config)
    if rank_distrib()==0: print(json.dumps(found))

if __name__=='__main__': devices()
