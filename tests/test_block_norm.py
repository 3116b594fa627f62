"""Norms of gradients and steps by block, against the gradients of each batch. Faults are planted."""
import math
from functools import partial
import pytest, torch
from fastai.basics import SGD, Adam, Callback, CancelStepException
from fastai.callback.all import GradientAccumulation, GradientClip
from bijdiff.layers.moe import BijectiveMoE
from bijdiff.training import instruments
from bijdiff.training.instruments import BlockNormCallback, parameters_by_block
from helpers import seeded_weights
from training_helpers import fit, N_STEPS, OnEvent, small_model, tiny_learner, train

torch.set_num_threads(1)

# Which parameters belong to which block

def layers_by_attribute(backbone):
    "Modules of each layer: a coupling of a mixture, or a block and its multiscale part"
    if isinstance(backbone, BijectiveMoE): return [[layer] for layer in backbone.layers]
    scales = list(getattr(backbone, 'multiscale', ()))
    return [[block, *scales[i:i+1]] for i,block in enumerate(backbone.blocks)]

def blocks_by_attribute(model):
    "Parameters of each block, found by attributes and not by names"
    outside = dict(embed=model.embed, entry=model.entry, norm=model.norm, output_head=model.output_head,
                   latent=model.latent, gap_output=model.gap_output)
    blocks = {k:list(m.parameters()) for k,m in outside.items() if m is not None and list(m.parameters())}
    for i,modules in enumerate(layers_by_attribute(model.backbone)):
        blocks[f'layer {i}'] = [p for m in modules for p in m.parameters()]
    return blocks

def ids(parameters): return sorted(map(id, parameters))
def ids_by_block(blocks): return {k:ids(ps) for k,ps in blocks.items()}
def all_ids(blocks): return ids(p for ps in blocks.values() for p in ps)

MODELS = {
    'stack':               {},
    'standard':            dict(n_bijective_layers=1),
    'all_standard':        dict(n_bijective_layers=0),
    'mixture':             dict(n_experts=2),
    'sparse':              dict(n_experts=2, k_active=1, couple='every'),
    'scales':              dict(enable_multiscale=True),
    'half_with_scales':    dict(enable_multiscale=True, n_bijective_layers=1),
    'mixture_with_scales': dict(n_experts=2, enable_multiscale=True),
    'latent':              dict(latent_density=True),
    'twelve':              dict(n_layers=12),
}
@pytest.mark.parametrize('name', MODELS)
def test_every_parameter_is_in_its_block(name):
    model = small_model(**MODELS[name])
    blocks = parameters_by_block(model)
    assert all_ids(blocks)==ids(model.parameters())
    assert ids_by_block(blocks)==ids_by_block(blocks_by_attribute(model))

TIME_CONDITIONED = {
    'stack':   {},
    'mixture': dict(n_experts=2),
    'gaps':    dict(gap_head=True, noise=dict(mask=.5, delete=.5)),
}
@pytest.mark.parametrize('name', TIME_CONDITIONED)
def test_every_parameter_is_in_one_block_with_time(name):
    model = small_model(time_conditioning=True, **TIME_CONDITIONED[name])
    assert all_ids(parameters_by_block(model))==ids(model.parameters())

@pytest.mark.parametrize('name', TIME_CONDITIONED)
def test_the_time_embedding_is_no_layer(name):
    model = small_model(time_conditioning=True, **TIME_CONDITIONED[name])
    got,want = (ids_by_block(blocks(model)) for blocks in (parameters_by_block, blocks_by_attribute))
    def layers(blocks): return {k:v for k,v in blocks.items() if k.startswith('layer')}
    assert layers(got)==layers(want)

# The norms

LR = .05

def norm(tensors):
    "Square root of the sum of all squares, in float64"
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))

class StepTrace:
    "Gradients of each batch, and the weights before and after each step"
    def __init__(self): self.grads,self.before,self.after = [],[],[]
    def add_grads(self, learn):
        learn.model.train()
        loss = learn.loss_func(learn.model(*learn.xb), *learn.yb)
        self.grads.append(torch.autograd.grad(loss, list(learn.model.parameters())))
    def add_before(self, learn): self.before.append([p.detach().clone() for p in learn.model.parameters()])
    def add_after(self, learn): self.after.append([p.detach().clone() for p in learn.model.parameters()])
    def callbacks(self):
        last_before_step = OnEvent('before_step', self.add_before, order=90)
        first_after_step = OnEvent('after_step', self.add_after, order=-90)
        return [OnEvent('before_batch', self.add_grads), last_before_step, first_after_step]
    def mean_grads(self, step, n_acc):
        "Mean gradient of each parameter over the batches of one step"
        return [torch.stack(g).mean(0) for g in zip(*self.grads[step-n_acc:step])]

def check_gradients(row, model, grads):
    "Compare norms of gradients, before clipping, with those of the mean gradients"
    numbers = {id(p):i for i,p in enumerate(model.parameters())}
    blocks = blocks_by_attribute(model)
    assert row['gradient'].keys()==blocks.keys()
    for name,ps in blocks.items():
        want = norm(grads[numbers[id(p)]] for p in ps)
        assert row['gradient'][name]==pytest.approx(want, rel=1e-4, abs=1e-7)

def check_updates(row, model, before, after):
    "Compare the sizes of the step with |after-before|/|before|; NaN for blocks that are 0 before"
    numbers = {id(p):i for i,p in enumerate(model.parameters())}
    blocks = blocks_by_attribute(model)
    assert row['update'].keys()==blocks.keys()
    for name,ps in blocks.items():
        at = [numbers[id(p)] for p in ps]
        size = norm(before[i] for i in at)
        if size==0: assert math.isnan(row['update'][name])
        else: assert row['update'][name]==pytest.approx(norm(after[i]-before[i] for i in at)/size, rel=1e-4)

def check_sgd(row, model, before, whole, clip):
    "Compare updates with those of SGD: learning rate times gradient times min(1, clip/whole)"
    numbers = {id(p):i for i,p in enumerate(model.parameters())}
    for name,ps in blocks_by_attribute(model).items():
        size = norm(before[numbers[id(p)]] for p in ps)
        if size==0: continue
        want = LR*row['gradient'][name]*min(1, (clip or math.inf)/whole)
        assert row['update'][name]*size==pytest.approx(want, rel=2e-2, abs=1e-7)

def check_norms(n_acc=1, every=1, clip=None, opt=SGD, epochs=1, **kwargs):
    "Compare all rows with the gradients of each batch, and the weights before and after each step"
    trace = StepTrace()
    cbs = [BlockNormCallback(every), *trace.callbacks()]
    if n_acc>1: cbs.append(GradientAccumulation(16*n_acc))
    if clip: cbs.append(GradientClip(clip))
    learn = tiny_learner(*cbs, opt_func=opt, **kwargs)
    seeded_weights(learn.model.output_head, .1)
    rows = train(learn, epochs, LR, flat=True).block_norm.rows
    steps = range(1, N_STEPS*epochs//n_acc+1)
    assert len(trace.before)==len(trace.after)==len(steps)
    assert [row['step'] for row in rows]==[s for s in steps if s%every==0]!=[]
    for row in rows:
        k,grads = row['step']-1,trace.mean_grads(row['step']*n_acc, n_acc)
        check_gradients(row, learn.model, grads)
        check_updates(row, learn.model, trace.before[k], trace.after[k])
        if opt is SGD: check_sgd(row, learn.model, trace.before[k], norm(grads), clip)
        assert clip is None or norm(grads)>10*clip

NORMS = {
    'plain':                dict(epochs=2, every=3),
    'clipped':              dict(clip=.01, config_kwargs=dict(reversible=True)),
    'accumulated':          dict(n_acc=2),
    'by threes and clipped':dict(n_acc=3, every=2, clip=.01, epochs=2),
    'adam':                 dict(opt=partial(Adam, eps=1e-8), config_kwargs=dict(n_experts=2, n_layers=1)),
    'scales':               dict(config_kwargs=dict(enable_multiscale=True, n_layers=1)),
}
@pytest.mark.parametrize('name', NORMS)
def test_norms_by_block(name): check_norms(**NORMS[name])

def measure_after_clipping(mp): mp.setattr(BlockNormCallback, 'order', 50)
def measure_before_the_accumulated_step(mp): mp.setattr(BlockNormCallback, 'order', -50)
def add_norms_up(mp): mp.setattr(instruments, '_norm', lambda tensors: sum(t.norm().item() for t in tensors))
def leave_parameters_out(mp):
    def blocks(model): return {k:ps[:-1] or ps for k,ps in parameters_by_block(model).items()}
    mp.setattr(instruments, 'parameters_by_block', blocks)

NORM_FAULTS = [
    (measure_after_clipping, 'clipped'),
    (measure_before_the_accumulated_step, 'accumulated'),
    (add_norms_up, 'plain'),
    (leave_parameters_out, 'plain'),
]
@pytest.mark.parametrize('fault,case', NORM_FAULTS)
def test_wrong_norms_are_seen(fault, case, monkeypatch):
    fault(monkeypatch)
    with pytest.raises((AssertionError, KeyError)): check_norms(**NORMS[case])

def test_norms_under_a_scaled_loss_are_those_of_the_gradients():
    def first_gradients(learn): return train(learn, 1).block_norm.rows[0]['gradient']
    plain = first_gradients(tiny_learner(BlockNormCallback(1)).to_fp32())
    scaled = first_gradients(tiny_learner(BlockNormCallback(1)).to_fp16(init_scale=2.**10))
    assert any(plain.values())
    assert all(abs(scaled[k]-v)<=.05*v+1e-4 for k,v in plain.items())

class CancelOddSteps(Callback):
    order = BlockNormCallback.order+1
    def before_step(self):
        if self.iter%2: raise CancelStepException

def test_step_that_is_called_off_moves_nothing():
    for row in fit(BlockNormCallback(1), CancelOddSteps()).block_norm.rows:
        assert any(row['gradient'].values())
        assert any(row['update'].values())==(row['step']%2==1)
