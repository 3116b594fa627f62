"""The same on every kind of device that is there: the CPU, and a CUDA or MPS accelerator where one is found.

Run it alone on a new machine: pytest tests/test_devices.py -o addopts="" """
import math
from contextlib import nullcontext
from copy import deepcopy
from functools import cache
import pytest, torch
from fastai.basics import Callback, CancelFitException
from fastai.callback.training import GradientClip
from bijdiff.data.loaders import text_dls
from bijdiff.diffusion.corruption import Corruption
from bijdiff.layers.coupling import AffineCoupling, CouplingNet
from bijdiff.layers.lattice import LatticeError, to_lattice
from bijdiff.layers.linear import BijectiveLinear, PairRotation, ShearedLinear
from bijdiff.layers.norm import ActNorm
from bijdiff.likelihood.bounds import nelbo, score_ids
from bijdiff.likelihood.codec import compress, decompress
from bijdiff.likelihood.exact import latent_nats, log_prob
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.sampling.generate import infill_template, sample
from bijdiff.testing import quiet_fit
from bijdiff.training.callbacks import EMACallback
from bijdiff.training.checkpoint import CheckpointCallback
from bijdiff.training.experts import ExpertCallback
from bijdiff.training.instruments import BlockNormCallback, LatticeUsageCallback, ProbeCallback
from bijdiff.training.learner import diffusion_learner
from helpers import seeded_weights

ACCELERATORS = dict(cuda=torch.cuda, mps=torch.backends.mps)
DEVICES = ['cpu', *(name for name,backend in ACCELERATORS.items() if backend.is_available())]
TEXT = ''.join(f'{i} cats and {i*i} dogs met {i%7} birds. ' for i in range(400))
V,L = 30,24

@pytest.fixture(params=DEVICES)
def device(request): return torch.device(request.param)

KINDS = {
    'plain':      {},
    'stored':     dict(reversible=False),
    'half':       dict(n_bijective_layers=1),
    'multiscale': dict(enable_multiscale=True),
    'coupled':    dict(n_experts=2),
    'every':      dict(n_experts=2, couple='every'),
    'gated':      dict(n_experts=3, k_active=2),
    'timed':      dict(time_conditioning=True),
    'deep':       dict(coupling_depth=3),
}
REVERSIBLE = [kind for kind in KINDS if kind not in ('stored', 'half')]

def network(kind, **config_kwargs):
    "A denoiser with random weights, in evaluation mode"
    model = BijectiveDenoiser(DenoiserConfig(V, L, 16, 2, 2, **KINDS[kind], **config_kwargs))
    return seeded_weights(model, .2).eval()

def random_ids(n=3): return torch.randint(0, V+1, (n, L), generator=torch.Generator().manual_seed(0))
def clean_ids(n=3): return random_ids(n).clamp(max=V-1)
def padding(device):
    "Mask of a full sequence, a short one and an empty one"
    return torch.arange(L, device=device)<torch.tensor([[L], [7], [0]], device=device)
def times(model, n, device):
    "Times for a time-conditioned model, None for another"
    return torch.linspace(.2, .8, n, device=device) if model.config.time_conditioning else None

def learner_on(device, weights=None, config_kwargs={}, **kwargs):
    "A learner on TEXT, with a corruption by its weights"
    dls = text_dls(TEXT, seq_len=L, bs=32, device=device)
    if weights: kwargs['corruption'] = Corruption(dls.tokenizer.vocab_size, **weights)
    config_kwargs = dict(d_model=16, n_heads=2, n_layers=2)|config_kwargs
    return diffusion_learner(dls, seed=1, n_valid_draws=1, config_kwargs=config_kwargs, **kwargs)

def weights_on_cpu(model): return [p.detach().cpu().clone() for p in model.parameters()]
def same(a, b):
    "Return True if two lists of tensors are equal, bit by bit"
    return len(a)==len(b) and all(map(torch.equal, a, b))
def largest(x): return x.abs().max()

# The network

@pytest.mark.parametrize('kind', KINDS)
def test_outputs_are_those_of_the_cpu(kind, device):
    model,x = network(kind),random_ids()
    with torch.no_grad():
        want = model(x, times(model, 3, 'cpu'))
        got = model.to(device)(x.to(device), times(model, 3, device))
    assert got.device.type==device.type
    assert largest(got.cpu()-want) < 1e-3*largest(want)     # the lattice amplifies differences of rounding

def state_and_context(model, masked, device):
    "State of random ids, and the keywords of the backbone"
    h = model.state(random_ids().to(device)).detach()
    context = model.context(h)
    return h, context|dict(mask=padding(device)) if masked else context

@pytest.mark.parametrize('masked', [False, True], ids=['whole', 'padded'])
@pytest.mark.parametrize('autocast', [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('kind', REVERSIBLE)
def test_inverse_is_exact(kind, autocast, masked, device):
    model = network(kind).to(device)
    h,context = state_and_context(model, masked, device)
    with torch.no_grad():
        in_float32,_ = model.backbone(h, **context)
        with torch.autocast(device.type, autocast) if autocast else nullcontext():
            y,_ = model.backbone(h, **context)
            back,_ = model.backbone.inverse(y, **context)
    assert torch.equal(back, h) and not torch.equal(y, h)
    assert torch.equal(y, in_float32)==(autocast is None)                    # otherwise autocast did nothing
    if masked: assert torch.equal(y[~context['mask']], h[~context['mask']])

def backbone_gradients(kind, reversible, autocast, masked, device):
    "Gradients of the backbone by name, on the CPU, with dropout"
    model = network(kind, dropout=.3, reversible=reversible).to(device).train()
    h,context = state_and_context(model, masked, device)
    torch.manual_seed(3)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast): y,_ = model.backbone(h, **context)
    y.sin().sum().backward()
    return {k:p.grad.cpu() for k,p in model.backbone.named_parameters() if p.grad is not None}

@pytest.mark.parametrize('masked', [False, True], ids=['whole', 'padded'])
@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('kind', REVERSIBLE)
def test_reversible_backward_gives_the_gradients_of_stored_activations(kind, autocast, masked, device):
    got,want = (backbone_gradients(kind, r, autocast, masked, device) for r in (True, False))
    assert got.keys()==want.keys() and len(got)>8
    floor = 1e-6*max(largest(g) for g in want.values())
    for k,w in want.items():                                # sums on an accelerator may come in another order
        assert largest(got[k]-w) <= 1e-2*largest(w)+floor, k

@pytest.mark.parametrize('value', [math.nan, math.inf, 1e4])
def test_leaving_the_lattice_is_an_error(value, device):
    model = network('plain').to(device)
    model.backbone.blocks[0].f.pointwise.register_forward_hook(lambda module, args, out: out+value)
    with torch.no_grad(), pytest.raises(LatticeError): model(random_ids().to(device))

def sheared_linear(): return ShearedLinear(torch.linalg.qr(torch.randn(8, 8))[0], 12)
LAYERS = {
    'linear':        lambda: BijectiveLinear(8, mixing='rotation', lattice_bits=12),
    'affine_linear': lambda: BijectiveLinear(8, coupling='affine', mixing='permutation'),
    'rotation':      lambda: PairRotation(torch.rand(4)*3, 12),
    'sheared':       sheared_linear,
    'actnorm':       lambda: ActNorm(8),
    'affine':        lambda: AffineCoupling(CouplingNet(4, dim_out=8)),
}
@pytest.mark.parametrize('name', LAYERS)
def test_layers_are_those_of_the_cpu(name, device):
    torch.manual_seed(0)
    f = seeded_weights(LAYERS[name](), .2).eval()
    x = to_lattice(torch.randn(3, 5, 8), 12)
    with torch.no_grad():
        want,want_logdet = f(x)
        got,logdet = f.to(device)(x.to(device))
        back,back_logdet = f.inverse(want.to(device))
    assert got.device.type==device.type
    assert largest(got.cpu()-want)<1e-3 and largest(logdet.cpu()-want_logdet)<1e-4
    assert largest(back.cpu()-x)<1e-3 and largest(back_logdet.cpu()+want_logdet)<1e-4

# Training

def learns(losses): return float(sum(losses[-10:])) < .95*float(sum(losses[:10]))

@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
def test_training_learns(precision, device):
    learn = learner_on(device)
    if precision=='bfloat16': learn.to_bf16()
    losses = quiet_fit(learn, 3).recorder.losses
    assert learn.model.device.type==device.type and learns(losses)
    if precision=='bfloat16': assert losses[1]!=quiet_fit(learner_on(device)).recorder.losses[1]

def test_training_in_half_precision_with_scaled_loss(device):
    assert learns(quiet_fit(learner_on(device).to_fp16(), 3).recorder.losses)

def test_all_instruments_and_terms(device):
    instruments = [ProbeCallback(3), BlockNormCallback(3), LatticeUsageCallback(), ExpertCallback(5)]
    cbs = [*instruments, EMACallback(.9), GradientClip(1.)]
    terms = dict(lambda_likelihood=.01, lambda_invert=.1)
    learn = quiet_fit(learner_on(device, cbs=cbs, config_kwargs=dict(n_experts=2), **terms))
    assert len(learn.probe.losses)>1 and all(math.isfinite(v) and v>0 for v in learn.probe.losses)
    assert learn.block_norm.rows and learn.lattice_usage.values
    assert learn.log_det.value==0. and learn.invertibility.value==0.
    assert learn.expert.records and len(learn.expert.grad_norms)==len(learn.recorder.losses)
    parts = learn.objective.parts[-1]
    assert parts['likelihood']!=0 and parts['invert']==0

def test_the_moving_average_follows_its_decay(device):
    def weights(*cbs): return weights_on_cpu(quiet_fit(learner_on(device, cbs=cbs)).model)
    plain = weights()
    assert not same(weights(EMACallback(.9)), plain)
    assert all(torch.allclose(a, b, atol=1e-5) for a,b in zip(weights(EMACallback(1e-6)), plain))

class StopAfterFirst(Callback):
    "Interrupt training after the first checkpoint"
    order = CheckpointCallback.order+1
    def after_epoch(self): raise CancelFitException

def test_a_resumed_training_ends_with_the_same_weights(tmp_path, device):
    def weights(folder, *cbs, resume=False):
        cbs = [CheckpointCallback(folder, resume=resume), *cbs]
        learn = learner_on(device, config_kwargs=dict(dropout=.2), cbs=cbs)
        return weights_on_cpu(quiet_fit(learn, 3).model)
    whole = weights(tmp_path/'a')
    stopped = weights(tmp_path/'b', StopAfterFirst())
    assert not same(stopped, whole)
    assert same(weights(tmp_path/'b', resume=True), whole)

# A trained model

@cache
def trained_on(device_type): return quiet_fit(learner_on(torch.device(device_type)), 3).model.eval()

@pytest.fixture
def trained(device): return trained_on(device.type)

def test_sampling(trained):
    a,b,c = (sample(trained, 3, steps=8, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.shape==(3, L) and a.max()<trained.config.vocab_size

@pytest.mark.parametrize('rule', ['left_to_right', 'confidence', 'entropy'])
def test_filling(trained, rule):
    template = torch.tensor(infill_template(trained, 'cats ____ dogs', length=L))
    given = template<trained.config.vocab_size
    filled = sample(trained, 2, template=template, steps=6, rule=rule)
    assert 0<given.sum()<L
    assert (filled[:,given]==template[given]).all() and filled.max()<trained.config.vocab_size

def test_likelihoods(trained):
    x,on_cpu = torch.tensor(trained.tokenizer.encode(TEXT)[:4*L]).view(4, L),deepcopy(trained).cpu()
    for rule in ('spread', 'left_to_right'):
        assert largest(log_prob(trained, x, rule).cpu()-log_prob(on_cpu, x, rule)) < .05
    got,want = (score_ids(model, x.flatten(), n=8).mean for model in (trained, on_cpu))
    assert got==pytest.approx(want, rel=.01)                # with the same masks, drawn on the CPU

def test_codec(trained):
    data = TEXT[:500].encode()
    blob = compress(trained, data)
    assert decompress(trained, blob)==data and len(blob)<len(data)
    on_cpu = deepcopy(trained).cpu()
    assert compress(on_cpu, data)==blob and decompress(on_cpu, blob)==data
    assert decompress(trained, compress(trained, data, fast=True))==data

def test_saving_and_loading(trained, tmp_path, device):
    trained.save_pretrained(tmp_path/'m')
    on_cpu,back = (BijectiveDenoiser.from_pretrained(tmp_path/'m', device=d) for d in ('cpu', device))
    assert on_cpu.device.type=='cpu' and back.device.type==device.type
    assert same(weights_on_cpu(back), weights_on_cpu(trained))

def test_density_of_the_states(device):
    model,x = network('plain', latent_density=True),clean_ids()
    want = latent_nats(model, x, n=3).mean
    assert largest(latent_nats(model.to(device), x, n=3).mean-want) < 1e-3*largest(want)

# Kinds of noise

NOISES = {
    'masks':    dict(mask=1.),
    'uniform':  dict(mask=0., substitute=1.),
    'both':     dict(mask=.5, substitute=.5),
    'deletion': dict(mask=.8, delete=.2),
}
@pytest.mark.parametrize('name', NOISES)
def test_noise_is_that_of_the_cpu(name, device):
    corruption,x,t = Corruption(V, **NOISES[name]),clean_ids(6),torch.linspace(.1, .9, 6)
    got,want = (corruption.corrupt(o, t, torch.Generator().manual_seed(1)) for o in (x.to(device), x))
    for field,a,b in zip(want._fields, got, want):
        assert a is b is None or a.device.type==device.type and torch.equal(a.cpu(), b), field

@pytest.mark.parametrize('name', NOISES)
def test_training_sampling_and_bound_with_other_noises(name, device):
    learn = quiet_fit(learner_on(device, NOISES[name]))
    model,x = learn.model,learn.dls.valid.one_batch()[0][:2]
    valid_loss = learn.recorder.values[-1][1]
    assert math.isfinite(valid_loss)
    samples = sample(model, 2, steps=6, seed=0)
    assert len(samples)==2 and all(len(ids) and (ids<model.config.vocab_size).all() for ids in samples)
    got,want = nelbo(model, x, n=4).mean,nelbo(deepcopy(model).cpu(), x.cpu(), n=4).mean
    assert largest(got.cpu()-want) < .01*largest(want)

def test_objective_of_scores(device):
    noise,head = dict(mask=0., substitute=1.),dict(score_head=True)
    learn = quiet_fit(learner_on(device, noise, objective='score_entropy', config_kwargs=head))
    assert math.isfinite(learn.recorder.values[-1][1])
    assert sample(learn.model, 2, steps=6, sampler='tweedie').shape==(2, L)
