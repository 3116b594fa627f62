"Muon is that of PyTorch, matrix by matrix, beside Adam for the rest"
import pytest
import torch
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.training import optimizers
from bijdiff.training.optimizers import muon, muon_groups
from bijdiff.training.precision import AutocastCallback, LossScaleCallback
from training_helpers import tiny_learner

LR,WD = .01,.1

def small_model(seed=0):
    "Return a small network whose parameters are all random"
    torch.manual_seed(seed)
    model = BijectiveDenoiser(DenoiserConfig(12, 8, d_model=16, n_heads=2, n_layers=2))
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn(p.shape)*.1)
    return model

def gradient(p, step):
    "Return the same random gradient for parameters of one shape in one step"
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(1000*step+p.numel()))

def separate_matrices(group, n):
    "Return the matrices of parameters as parameters of their own"
    return [torch.nn.Parameter(o.clone()) for p in group for o in p.detach().chunk(n)]

def by_pytorch(groups, n_steps):
    "Return the parameters of the groups after some steps of PyTorch's own optimisers"
    others,matrices,attention = groups
    adam_params = [torch.nn.Parameter(p.detach().clone()) for p in others]
    singles = separate_matrices(matrices, 1)
    thirds = separate_matrices(attention, 3)
    adam = torch.optim.AdamW(adam_params, lr=LR, betas=(.95, .99), weight_decay=WD)
    own = torch.optim.Muon([*singles, *thirds], lr=LR, weight_decay=WD, momentum=.95,
                           adjust_lr_fn='match_rms_adamw')
    for step in range(n_steps):
        for p in adam_params: p.grad = gradient(p, step)
        for p in singles: p.grad = gradient(p, step)
        for i,p in enumerate(attention):
            for part,g in zip(thirds[3*i:3*i+3], gradient(p, step).chunk(3)): part.grad = g
        adam.step()
        own.step()
    joined = [torch.cat(thirds[3*i:3*i+3]) for i in range(len(attention))]
    return [adam_params, singles, joined]

def by_bijdiff(groups, n_steps):
    "Return the parameters of the groups after some steps of our optimiser"
    opt = muon(groups, lr=LR, wd=WD)
    for step in range(n_steps):
        for p in opt.all_params().itemgot(0): p.grad = gradient(p, step)
        opt.step()
    return groups

def test_twenty_steps_are_those_of_pytorch(monkeypatch):
    "PyTorch iterates in bfloat16 everywhere; so does ours here"
    monkeypatch.setattr(optimizers, 'has_fast_bf16', lambda device: True)
    groups = muon_groups(small_model())
    before = [[p.detach().clone() for p in g] for g in groups]
    expected = by_pytorch(groups, 20)
    found = by_bijdiff(groups, 20)
    for b,e,f in zip(before, expected, found):
        for x,y,z in zip(b, e, f):
            moved = (y-x).abs().max()
            assert moved>.05
            assert (y-z).abs().max()<2e-3*moved

def test_without_bfloat16_steps_are_near_those_of_pytorch(monkeypatch):
    monkeypatch.setattr(optimizers, 'has_fast_bf16', lambda device: False)
    groups = muon_groups(small_model())
    expected = by_pytorch(groups, 20)
    found = by_bijdiff(groups, 20)
    for e,f in zip(expected[1]+expected[2], found[1]+found[2]): assert (e-f).abs().max()<2e-3

def test_groups_have_schedules_and_weight_decay_of_their_own():
    groups = muon_groups(small_model())
    opt = muon(groups, lr=LR, wd=0.)
    opt.set_hyper('lr', [0., LR, 0.])
    opt.set_hyper('wd', [0., 0., WD/LR])
    opt.set_hyper('lr', [0., LR, LR])
    before = [[p.detach().clone() for p in g] for g in groups]
    for p in opt.all_params().itemgot(0): p.grad = torch.zeros_like(p)
    opt.step()
    for b,a in zip(before[0]+before[1], groups[0]+groups[1]): torch.testing.assert_close(a.detach(), b)
    for b,a in zip(before[2], groups[2]): torch.testing.assert_close(a.detach(), b*(1-WD))

@pytest.mark.parametrize('n', (1, 2, 4))
def test_other_numbers_of_groups_are_rejected(n):
    with pytest.raises(ValueError, match='groups'): muon([[]]*n, lr=LR)

def test_a_cycle_can_have_a_peak_for_each_group():
    learn = tiny_learner()
    before = {k:v.detach().clone() for k,v in learn.model.named_parameters()}
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, [1e-2, 1e-2, 0.])
    moved = {k for k,v in learn.model.named_parameters() if not torch.equal(v, before[k])}
    assert {k for k in before if k not in moved}=={k for k in before if 'qkv' in k}

@pytest.mark.parametrize('kwargs, cbs', [
    (dict(accumulate=2, ema=.5, grad_clip=.5), []),
    (dict(), [AutocastCallback(torch.bfloat16)]),
    (dict(), [AutocastCallback(torch.float16), LossScaleCallback(init_scale=2.**10)]),
], ids=['accumulated, averaged, clipped', 'bfloat16', 'float16'])
def test_it_learns_with_all_that_belongs_to_a_step(kwargs, cbs):
    learn = tiny_learner(*cbs, **kwargs)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(8, 1e-2)
    losses = learn.oscillation.losses
    assert sum(losses[-4:])<sum(losses[:4])-1

def test_gradients_of_any_size_give_the_same_step_of_muon():
    "So a clipped gradient changes what Adam does, and of Muon nothing in the first step"
    updates = []
    for scale in (1., 2.**-20):
        groups = muon_groups(small_model())
        before = [p.detach().clone() for p in groups[1]+groups[2]]
        opt = muon(groups, lr=LR, wd=0.)
        for p in opt.all_params().itemgot(0): p.grad = gradient(p, 0)*scale
        opt.step()
        updates.append([p.detach()-b for p,b in zip(groups[1]+groups[2], before)])
    for a,b in zip(*updates): assert torch.equal(a, b) and a.abs().max()>0
