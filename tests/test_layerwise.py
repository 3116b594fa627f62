"""What is measured layer by layer: lattice usage, against the couplings written out, and log-determinants,
against dense Jacobians."""
import math
from functools import partial
from types import SimpleNamespace
import pytest, torch
from fastai.basics import Adam
from bijdiff.layers.block import layer_by_layer
from bijdiff.layers.moe import BijectiveMoE
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.training import callbacks
from bijdiff.training.callbacks import InvertibilityCallback, LogDetCallback
from bijdiff.training.instruments import LatticeUsageCallback
from bijdiff.training.loop import DiffusionLearner
from bijdiff.training.noising import CorruptionCallback, DiffusionLoss
from helpers import seeded_weights
from training_helpers import coupling_states, fit, OnEvent, small_dls, small_model, tiny_learner, train
from training_helpers import vocab_size

torch.set_num_threads(1)

class FirstValidBatch:
    "The network's input in the first held-out batch of each epoch"
    def __init__(self):
        self.inputs = []
        self.callback = OnEvent('before_batch', self.add, train=False)
    def add(self, learn):
        if learn.iter==0: self.inputs.append(learn.xb[0].clone())

# How much of the lattice is in use

def lattice_limit(bits):
    "Largest number of float32 on a lattice of step 2^-bits: 2^(24-bits); 1 without a lattice"
    return 1. if bits is None else 2.**(24-bits)

@torch.no_grad()
def usage_by_hand(model, h):
    "Largest number of each state over the limit, from the couplings written out"
    return [y.abs().max().item()/lattice_limit(model.config.lattice_bits) for y in coupling_states(model, h)]

@torch.no_grad()
def usage_by_hooks(model, h):
    "Largest number of each state over the limit, from forward hooks of the couplings"
    used,limit = [],lattice_limit(model.config.lattice_bits)
    def add(module, args, out): used.append(out[0].abs().max().item()/limit)
    hooks = [c.register_forward_hook(add) for c in model.backbone.couplings()]
    list(layer_by_layer(model.backbone, h))
    for hook in hooks: hook.remove()
    return used

USAGE = {
    'stack':   {},
    'scales':  dict(enable_multiscale=True, n_layers=1),
    'mixture': dict(n_experts=2, n_layers=1),
    'off':     dict(lattice_bits=None),
    'coarse':  dict(lattice_bits=6),
}
@pytest.mark.parametrize('name', USAGE)
def test_lattice_usage_is_that_of_the_couplings(name):
    first = FirstValidBatch()
    learn = tiny_learner(LatticeUsageCallback(), first.callback, config_kwargs=USAGE[name])
    seeded_weights(learn.model.backbone, .2)
    train(learn, 1)
    xt, = first.inputs
    values, = learn.lattice_usage.values
    with torch.no_grad(): h = learn.model.eval().state(xt)
    by_hand = usage_by_hand(learn.model, h)
    assert len(by_hand)==len(learn.model.backbone.couplings())
    assert values==pytest.approx(by_hand, rel=1e-5)
    assert usage_by_hooks(learn.model, h)==pytest.approx(by_hand, rel=1e-5)
    assert learn.lattice_usage.value==max(values)

def lattice_usage(model, xt):
    "Largest fraction, and the fraction of each layer, that LatticeUsageCallback measures"
    cb = LatticeUsageCallback()
    cb.values,cb.learn = [],SimpleNamespace(fitting=True)
    with torch.no_grad(): return cb.measure(model, model.eval().state(xt)), cb.values[0]

@torch.no_grad()
def scale_last_layers(model, factor):
    "Multiply the last matrix of each block's MLP"
    for block in model.backbone.blocks: block.f.pointwise[-1].weight *= factor

def test_usage_grows_with_the_weights_and_the_lattice():
    xt = small_dls().valid.dataset.ids[:96].view(6, 16)
    model = seeded_weights(small_model(vocab_size=vocab_size(), lattice_bits=8), .5)
    layers = []
    for factor in (1, 8, 8):
        scale_last_layers(model, factor)
        largest,values = lattice_usage(model, xt)
        assert largest==max(values)
        layers.append(values)
    assert all(a<b<c for a,b,c in zip(*layers))
    assert layers[0][-1]*3<layers[1][-1] and layers[1][-1]*3<layers[2][-1]<1
    fine = small_model(vocab_size=vocab_size(), lattice_bits=11)
    fine.load_state_dict(model.state_dict())
    assert lattice_usage(fine, xt)[1]==pytest.approx([8*v for v in layers[2]], rel=2e-2)

def test_standard_layers_have_no_lattice_usage():
    learn = fit(LatticeUsageCallback(), epochs=1, config_kwargs=dict(n_bijective_layers=1))
    assert learn.lattice_usage.values==[] and math.isnan(learn.lattice_usage.value)

def test_validation_adds_no_lattice_usage():
    learn = fit(LatticeUsageCallback(), epochs=1)
    with learn.no_bar(): learn.validate()
    assert len(learn.lattice_usage.values)==1

# Log-determinants by layer

STACKS = {
    'stack':   {},
    'scales':  dict(enable_multiscale=True),
    'mixture': dict(n_experts=2, couple='every'),
    'sparse':  dict(n_experts=3, k_active=1, couple='every'),
    'off':     dict(lattice_bits=None),
}
@pytest.mark.parametrize('timed', [False, True])
@pytest.mark.parametrize('name', STACKS)
def test_layer_by_layer_is_the_stack(name, timed):
    model = seeded_weights(small_model(**STACKS[name], time_conditioning=timed)).eval()
    xt = torch.arange(32).view(2, 16)%20
    context = dict(mask=torch.arange(16)<torch.tensor([[16], [9]]))
    if timed: context['t'] = torch.tensor([.2, .9])
    with torch.no_grad():
        h = model.state(xt)
        states,dets = zip(*layer_by_layer(model.backbone, h, **context))
        y,logdet = model.backbone(h, **context)
    assert len(states)==len(model.backbone.couplings())
    assert torch.equal(states[-1], y) and not torch.equal(y, h)
    assert all(d.shape==(2,) and not d.any() for d in dets) and not logdet.any()

def affine_learner(couple, *cbs):
    "A learner for a mixture whose couplers scale, with sequences of four tokens"
    dls = small_dls(4, 32, 300)
    sizes = dict(d_model=4, n_heads=2, n_experts=2, lattice_bits=None)
    model = BijectiveDenoiser(DenoiserConfig(dls.tokenizer.vocab_size, 4, **sizes))
    model.backbone = BijectiveMoE(2, 4, 2, 1+(couple=='every'), couple, coupler='affine', reversible=False)
    seeded_weights(model, .4)
    corruption = model.config.corruption()
    noise = CorruptionCallback(corruption, n_valid_draws=1)
    loss = DiffusionLoss(corruption, model)
    cbs = [noise, LogDetCallback(), InvertibilityCallback(), *cbs]
    return DiffusionLearner(dls, model, loss, opt_func=partial(Adam, eps=1e-8), cbs=cbs)

def dense_logdet(f, x):
    "log |det df/dx| of one state, from its dense Jacobian"
    return torch.linalg.slogdet(torch.func.jacrev(f)(x.flatten()))[1].item()

def dense_logdets(backbone, h):
    "Log-determinant of each layer, mean over the sequences, nats per token"
    context,dets = backbone._context(h, None, None),[]
    B,L,_ = h.shape
    for layer in backbone.layers:
        def flat(v): return layer(v.view(1, L, -1), **context)[0].flatten()
        dets.append(sum(dense_logdet(flat, v) for v in h)/B/L)
        with torch.no_grad(): h = layer(h, **context)[0]
    return dets

def check_log_det(couple):
    first = FirstValidBatch()
    learn = train(affine_learner(couple, first.callback), 1, 1e-3)
    backbone,per_layer = learn.model.backbone,learn.log_det.per_layer
    with torch.no_grad(): h = learn.model.double().eval().state(first.inputs[-1])
    assert len(h)>1
    want = dense_logdets(backbone, h)
    assert per_layer==pytest.approx(want, rel=1e-4, abs=1e-6)
    assert learn.log_det.value==pytest.approx(sum(want), rel=1e-4)
    couplers = [role=='coupler' for role in backbone.roles]
    assert sum(couplers)==(4 if couple=='every' else 2)
    assert [abs(v)>1e-3 for v in per_layer]==couplers
    assert learn.invertibility.value<1e-4

def test_log_determinants_by_layer_are_those_of_dense_jacobians(): check_log_det('every')

def negated_log_determinants(*args, **kwargs):
    for y,logdet in layer_by_layer(*args, **kwargs): yield y,-logdet

def test_a_wrong_log_determinant_is_seen(monkeypatch):
    monkeypatch.setattr(callbacks, 'layer_by_layer', negated_log_determinants)
    with pytest.raises(AssertionError): check_log_det('final')
