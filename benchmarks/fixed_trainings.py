"""Train a small network of every kind with fixed seeds and print hashes of its weights, samples and bound.

    python benchmarks/fixed_trainings.py OUT.json            # train, and keep the hashes
    python benchmarks/fixed_trainings.py --against OLD.json  # train, and fail where a hash differs

Hashes are comparable on one machine with one version of Python and torch: a change of the code that must not
change any number is tried before and after."""
import os
import platform
import sys
import tempfile

os.environ['OMP_NUM_THREADS'] = '1' # Before torch is imported
import torch
from bijdiff.console import command
from bijdiff.data.corpora import pydoc_corpus
from bijdiff.data.loaders import text_dls
from bijdiff.diffusion.corruption import Corruption, GIDDCorruption
from bijdiff.diffusion.schedules import HalfCosine
from bijdiff.likelihood.bounds import nelbo_draws
from bijdiff.likelihood.exact import log_prob
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.model.saving import tensors_hash
from bijdiff.sampling.generate import sample
from bijdiff.training.callbacks import EMACallback
from bijdiff.training.learner import diffusion_learner
from common import load, Param, save

SIZE = dict(d_model=16, n_heads=2, n_layers=2)
UNIFORM = dict(mask=0., substitute=1.)
KINDS = dict(
    masks=dict(),
    masks_in_steps=dict(T=8),
    log_linear=dict(schedule='log_linear'),
    hybrid=dict(noise=dict(mask=.8, substitute=.2)),
    uniform=dict(noise=UNIFORM),
    gidd=dict(noise='gidd'),
    deletion=dict(noise=dict(mask=.8, delete=.2)),
    all_noises=dict(noise=dict(mask=.6, substitute=.2, delete=.2)),
    score_entropy=dict(objective='score_entropy'),
    uniform_score_entropy=dict(objective='score_entropy', noise=UNIFORM),
    standard=dict(config_kwargs=dict(bijective_ratio=0.)),
    hybrid_stack=dict(config_kwargs=dict(n_bijective_layers=1)),
    no_lattice=dict(config_kwargs=dict(lattice_bits=None)),
    dropout=dict(config_kwargs=dict(dropout=.1)),
    multiscale=dict(config_kwargs=dict(enable_multiscale=True)),
    mixture=dict(config_kwargs=dict(n_experts=2)),
    coupled_in_every_block=dict(config_kwargs=dict(n_experts=2, couple='every', enable_multiscale=True)),
    sparse_mixture=dict(config_kwargs=dict(n_experts=3, k_active=2, router_balance=.01, router_z_loss=.001)),
    latent_density=dict(lambda_likelihood=.1),
    byte=dict(tokenizer='byte'),
    bpe=dict(tokenizer='bpe'),
    bfloat16=dict(bf16=True),
    average=dict(ema=True),
    muon=dict(optimizer='muon'),
    muon_mixture=dict(optimizer='muon', bf16=True, config_kwargs=dict(n_experts=2)),
)

def corruption_of(noise, vocab_size):
    "Return the corruption of a kind, or None for masking with the schedule of the learner"
    if noise is None: return None
    if noise=='gidd': return GIDDCorruption(vocab_size)
    return Corruption(vocab_size, **noise, schedule=HalfCosine())

def learner_of(kind):
    "Return a learner for one of KINDS, before its training"
    options = dict(optimizer='adam') | KINDS[kind]
    tokenizer = options.pop('tokenizer', 'char')
    bf16,ema = options.pop('bf16', False),options.pop('ema', False)
    dls = text_dls(pydoc_corpus()[:40000], tokenizer, seq_len=32, bs=8, device='cpu')
    corruption = corruption_of(options.pop('noise', None), dls.tokenizer.vocab_size)
    config_kwargs = SIZE | options.pop('config_kwargs', {})
    learn = diffusion_learner(dls, corruption=corruption, config_kwargs=config_kwargs, **options)
    if ema: learn.add_cb(EMACallback(.9))
    return learn.to_bf16() if bf16 else learn

def hash_of_ids(model):
    "Hash eight samples: tensors of one length, or of different lengths where tokens are inserted"
    has_free_schedule = model.noise.masks_only and not model.config.time_conditioning
    samples = sample(model, 8, steps=16, seed=3, schedule='cosine' if has_free_schedule else None)
    return tensors_hash({str(i):o.contiguous() for i,o in enumerate(samples)})

def hash_of_weights(model):
    "Hash the parameters and buffers in their order, whatever their names"
    return tensors_hash({f'{i:04}':o for i,o in enumerate(model.state_dict().values())})

def reloaded(model):
    "Return a model that was saved and loaded again"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return BijectiveDenoiser.from_pretrained(folder)

def hashes(kind):
    "Train a network of this kind; hash its weights, losses, samples and the bound of a held-out text"
    learn = learner_of(kind)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-2)
    model = learn.model.eval()
    x = torch.stack([learn.dls.valid.dataset[i][0].as_subclass(torch.Tensor) for i in range(2)])
    bound = nelbo_draws(model, x, 2, seed=5)
    weights = hash_of_weights(model)
    assert hash_of_weights(reloaded(model))==weights, f'{kind}: a saved model comes back with other weights'
    losses = torch.tensor(learn.oscillation.losses)
    res = dict(weights=weights, losses=tensors_hash(dict(l=losses)), samples=hash_of_ids(model),
               bound=tensors_hash(dict(b=bound)))
    if not model.noise.masks_only or model.config.score_head: return res
    likelihood = log_prob(model, x[:,:12], 'confidence', steps=4)
    return res | dict(log_prob=tensors_hash(dict(p=likelihood)))

def machine():
    "Return what the hashes depend on besides the code"
    return dict(python=platform.python_version(), torch=torch.__version__,
                cpu=platform.processor() or platform.machine(),
                capability=torch.backends.cpu.get_cpu_capability(), threads=torch.get_num_threads())

def compare(record, old):
    "Stop with an error where hashes differ from those of an earlier run"
    if old['machine']!=record['machine']:
        print(f"the kept run had {old['machine']} and this one has {record['machine']}:",
              'hashes may differ for that alone')
    found,kept = record['hashes'],old['hashes']
    names = [(kind, name) for kind in KINDS for name in found[kind]]
    differ = [f'{kind}: {name}' for kind,name in names if found[kind][name]!=kept.get(kind, {}).get(name)]
    if differ: sys.exit('these differ: ' + ', '.join(differ))
    print(f'all {len(found)} kinds end with the same bits')

@command
def fixed_trainings(
    out:Param('JSON file for the hashes', str, nargs='?', opt=False)=None,
    against:str=None, # JSON file of an earlier run
):
    "Train a small network of every kind with fixed seeds, and hash the results"
    torch.set_num_threads(1)
    found = {}
    for kind in KINDS:
        found[kind] = hashes(kind)
        weights,samples = (found[kind][k][:16] for k in ('weights', 'samples'))
        print(f'{kind:24} weights {weights}  samples {samples}', flush=True)
    record = dict(command='python benchmarks/fixed_trainings.py OUT.json', machine=machine(), hashes=found)
    if out: save(out, record)
    if against is not None: compare(record, load(against))

if __name__=='__main__': fixed_trainings()
