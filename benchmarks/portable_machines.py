"""Hashes of the outputs of networks of every kind, on this machine; equal ones mean equal bits.

    python benchmarks/portable_machines.py                    # the processor
    python benchmarks/portable_machines.py --device cuda      # a GPU
    ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 \\
        python benchmarks/portable_machines.py                # an older processor, emulated

Run it on other machines, in other environments, on a GPU: each run adds a row with its machine, versions and
the hashes of portable and of float32 outputs, and the number of those that differ from the first row's.
Weights are drawn as whole numbers, since PyTorch's normal random numbers differ between processors.

Writes benchmarks/results/portable_machines.json."""
import torch
from bijdiff.console import command
from bijdiff.diffusion.corruption import Corruption
from bijdiff.likelihood.exact import log_prob
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.likelihood.portable import portable
from bijdiff.model.saving import tensors_hash
from common import add_row, load, result_path, run_record, save

V,L = 50,37

def timed_noise(*weights): return dict(time_conditioning=True, noise=Corruption(V, *weights).to_dict())

KINDS = dict(
    stack={}, hybrid=dict(n_bijective_layers=2), standard=dict(n_bijective_layers=0),
    no_lattice=dict(lattice_bits=None), no_local_mixing=dict(local_window=0), deep_mlp=dict(coupling_depth=3),
    multiscale=dict(enable_multiscale=True), latent=dict(latent_density=True),
    mixture=dict(n_experts=2), coupled_every_block=dict(n_experts=3, couple='every'),
    sparse=dict(n_experts=4, k_active=2, couple='every'),
    sparse_multiscale=dict(n_experts=2, k_active=1, enable_multiscale=True),
    substitution=timed_noise(1, 1), scores=timed_noise(0, 1) | dict(score_head=True),
    deletion=timed_noise(1, 0, 1) | dict(gap_head=True))

def network(fields, seed=0):
    "Return a network whose weights are whole numbers divided by 2000"
    config = DenoiserConfig(V, seq_len=40, d_model=24, n_heads=2, n_layers=3, **fields)
    model = BijectiveDenoiser(config).eval()
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters(): p.data = torch.randint(-700, 701, p.shape, generator=g)/2000.
    return model

def inputs():
    "Return ids, times and a mask of five sequences"
    g = torch.Generator().manual_seed(1)
    mask = torch.arange(L)<torch.tensor([37, 30, 5, 0, 36])[:,None]
    return torch.randint(0, V+1, (5, L), generator=g), torch.randint(0, 1001, (5,), generator=g)/1000., mask

@torch.no_grad()
def hash_of(model):
    "Return a hash of the outputs of a network"
    ids,t,mask = (o.to(model.device) for o in inputs())
    out = model(ids, t.cpu(), mask)
    outputs = out if isinstance(out, tuple) else (out,)
    return tensors_hash({str(i):o.cpu() for i,o in enumerate(outputs)})[:16]

def hash_of_likelihoods(model):
    "Return a hash of exact likelihoods, by rules of several kinds"
    x = inputs()[0].clamp(max=V-1)
    rules = [dict(rule='spread', steps=4), dict(rule='confidence', steps=4, top_p=.95),
             dict(rule='entropy', budget=9.)]
    nats = [log_prob(model, x, temperature=.8, **kwargs) for kwargs in rules]
    return tensors_hash({str(i):o for i,o in enumerate(nats)})[:16]

def hashes(device):
    "Return the hashes of all kinds, portable and in float32"
    found = dict(portable={}, float32={})
    for name,fields in KINDS.items():
        model = network(fields).to(device)
        for kind,m in dict(portable=portable(model), float32=model).items():
            found[kind][name] = hash_of(m)
            if model.noise.masks_only: found[kind][f'{name}, likelihood'] = hash_of_likelihoods(m)
    return found

def compare(row, first):
    "Return how many hashes of each kind of arithmetic differ from those of the first row"
    return {kind:sum(row[kind][k]!=v for k,v in first[kind].items()) for kind in ('portable','float32')}

@command
def portable_machines(
    device:str='cpu', # Device of the networks
    name:str='', # What is special about this machine, in words
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Add the hashes of this machine to the result file"
    torch.set_num_threads(1)
    target = result_path(__file__, out)
    rows = load(target)['rows'] if target.exists() else []
    record = run_record(__file__, device=device, seed=0)
    row = dict(name=name, capability=torch.backends.cpu.get_cpu_capability()) | hashes(device)
    row |= dict(differ=compare(row, rows[0] if rows else row), n=len(row['portable'])) | record
    add_row(rows, row)
    save(target, dict(rows=rows))

if __name__=='__main__': portable_machines()
