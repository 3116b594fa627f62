"""Fingerprints of what networks of every kind compute, with and without portable arithmetic, as JSON.

Used by test_portable.py in its own process, and in one whose libraries know few instructions:

    ATEN_CPU_CAPABILITY=default python tests/portable_job.py

With the argument `flushed` it counts logits that became 0 because they are subnormal.

Weights and inputs are whole numbers, divided: generators of normal numbers differ between processors."""
import hashlib, json, sys
from pathlib import Path
import torch
import torch.nn.functional as F
from bijdiff.diffusion.corruption import Corruption
from bijdiff.diffusion.schedules import schedules
from bijdiff.layers import elementary, exact_sums
from bijdiff.layers.portable_arithmetic import portable_arithmetic
from bijdiff.likelihood.exact import log_prob, token_nll
from bijdiff.likelihood.portable import portable
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'benchmarks'))
from portable_machines import KINDS, L, V

def integer_tensor(seed, lowest, highest, *shape):
    "Random whole numbers from lowest to highest, the same on every machine"
    return torch.randint(lowest, highest+1, shape, generator=torch.Generator().manual_seed(seed))

def set_weights(model, scale=1.):
    "Set all weights to random multiples of 1/2000, of size up to 0.35, times a scale"
    for i,p in enumerate(model.parameters()):
        p.data = (integer_tensor(i, -700, 700, *p.shape).double()/2000*scale).to(p.dtype)
    return model

def network(kind, **config_kwargs):
    "Network of a kind, in evaluation mode"
    config = dict(seq_len=48, d_model=24, n_heads=2, n_layers=3) | KINDS[kind] | config_kwargs
    return set_weights(BijectiveDenoiser(DenoiserConfig(V, **config))).eval()

def inputs(n=5):
    "Ids with masks, times and padding; sequence 3 has no tokens"
    lengths = torch.tensor([L, 30, 5, 0]+[L-1-i for i in range(n)])[:n]
    t = integer_tensor(1, 0, 1024, n).double()/1024
    return integer_tensor(2, 0, V, n, L), t, torch.arange(L)<lengths[:,None]

def outputs(model, batch):
    "All outputs of a network, a list"
    with torch.no_grad(): out = model(*batch)
    return [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]

def fingerprint(tensors):
    "Hash of the bits of tensors"
    return hashlib.sha256(b''.join(o.cpu().numpy().tobytes() for o in tensors)).hexdigest()[:16]

RULES = dict(
    left_to_right={}, random={}, spread={}, block=dict(block_length=5), confidence={}, margin={}, entropy={},
    nucleus=dict(rule='random', top_p=.9), cold=dict(rule='confidence', temperature=.7),
    threshold=dict(rule='confidence', threshold=.05), budget=dict(rule='entropy', budget=8.),
    guided=dict(rule='entropy', guidance=.5), cosine=dict(rule='spread', schedule='cosine'),
)

def clean_ids(n=2, length=12): return integer_tensor(3, 0, V-1, n, length)

def likelihoods(model, name, x=None, **options):
    "Nats of each token, and log-probabilities, by a rule in 3 steps; the guided rule has a template"
    if x is None: x = clean_ids()
    options = dict(rule=name) | RULES[name] | options
    if not {'threshold', 'budget'} & options.keys(): options['steps'] = 3
    if 'guidance' in options: options['template'] = torch.where(torch.arange(x.shape[1])<4, x, V)
    return [f(model, x, **options) for f in (token_nll, log_prob)]

def points(largest, n=2000, smallest=-1):
    "Evenly spaced numbers from smallest*largest to largest, float64"
    return torch.arange(smallest*n, n+1).double()/n*largest

FUNCTIONS = dict(
    exp=points(30), log=points(1, smallest=0), sqrt=points(100, smallest=0), cos=points(200), sin=points(200),
    acos=points(1), sigmoid=points(20), tanh=points(10), gelu=points(9).float(),
)

def get_function(name): return exact_sums.sqrt if name=='sqrt' else getattr(elementary, name)

def query_key_value(d, L=9):
    "Three tensors for attention of one head, (1, 1, L, d) each"
    return [integer_tensor(i, -700, 700, 1, 1, L, d)/500. for i in range(3)]

def function_values():
    "Values of the functions, and of attention with heads of 66 features, by name"
    found = {name:get_function(name)(x) for name,x in FUNCTIONS.items()}
    return found | dict(attention=elementary.attention(*query_key_value(66)))

ROWS = points(9, 300)[1:].view(-1, 10) # Float64, (60, 10)

CONTEXT = dict(
    sum=lambda x: x.sum(-1), sum32=lambda x: x.float().abs().sum(0), mean=lambda x: x.mean((0, 1)),
    cumsum=lambda x: x.cumsum(-1), softmax=lambda x: x.softmax(0), log_softmax=lambda x: x.log_softmax(-1),
    log_softmax32=lambda x: x.float().log_softmax(-1), xlogy=lambda x: torch.xlogy(x.abs(), x.abs()+.01),
    pow=lambda x: x.abs()**.3, rpow=lambda x: 10.**x, sqrt=lambda x: x.abs().sqrt(), silu=F.silu,
    div=lambda x: x/3, rdiv=lambda x: 1/(x.abs()+1), matmul=lambda x: x.T@x, exp=lambda x: x.float().exp(),
    logspace=lambda x: torch.logspace(0, 3, 7), acos=lambda x: (x/10).acos(), tanh=lambda x: x.tanh(),
)

def context_value(name):
    "Result of a function in portable arithmetic"
    with portable_arithmetic(): return CONTEXT[name](ROWS)

def timed_likelihoods(schedule):
    "Likelihoods by a network for masking noise that is called with times"
    noise = Corruption(V, schedule=schedule).to_dict()
    return likelihoods(portable(network('stack', time_conditioning=True, noise=noise)), 'random')

def measure():
    "Fingerprints of networks, likelihoods and functions, by name, and the instructions in use"
    models = {kind:network(kind) for kind in KINDS} | dict(float64=network('stack').double())
    p = portable(models['stack'])
    return dict(
        capability=torch.backends.cpu.get_cpu_capability(),
        plain={kind:fingerprint(outputs(m, inputs())) for kind,m in models.items()},
        networks={kind:fingerprint(outputs(portable(m), inputs())) for kind,m in models.items()},
        rules={name:fingerprint(likelihoods(p, name)) for name in RULES},
        schedules={name:fingerprint(timed_likelihoods(name)) for name in schedules},
        context={name:fingerprint([context_value(name)]) for name in CONTEXT},
        functions={name:fingerprint([y]) for name,y in function_values().items()},
    )

def subnormal_network():
    "A network whose logits are 1e-40"
    model = network('stack')
    model.output_head.weight.data.zero_()
    model.output_head.bias.data.fill_(1e-40)
    return model

def count_zeros(model, n):
    "Number of logits of n sequences whose bits are those of 0"
    return (outputs(model, inputs(n))[0].view(torch.int32)==0).sum().item()

def flushed():
    "Zeros of a portable and a plain network where the second of two threads was started without subnormals"
    torch.set_num_threads(2)
    torch.set_flush_denormal(True)
    torch.ones(2**20).mul(2)
    torch.set_flush_denormal(False)
    model = subnormal_network()
    return [count_zeros(m, 40) for m in (portable(model), model)]

if __name__=='__main__': print(json.dumps(flushed() if sys.argv[1:]==['flushed'] else measure()))
