"""The objective of three terms, against losses, gradients and weights by hand. Faults are planted."""
from functools import partial
import numpy as np, pytest, torch
import torch.nn.functional as F
from fastai.basics import SGD, CancelFitException
from fastai.callback.all import GradientAccumulation
from torch import nn
from bijdiff.layers.bijection import Bijection
from bijdiff.training.terms import inversion_nats, ObjectiveCallback
from helpers import seeded_weights
from training_helpers import coupling_states, fit, N_STEPS, OnEvent, round_to_lattice, same_weights
from training_helpers import short_lr_find, small_noise, StopAt, tiny_learner, train, wrap_method
from loss_by_hand import token_loss

torch.set_num_threads(1)

def recorded(learn, term): return [parts[term] for parts in learn.objective.parts]

# The likelihood

def noisy_state(model, xt):
    "Two streams rms_norm(embedding) + .1 N(0, 1) on the lattice, with the noise that the network draws next"
    e = model.embed(xt)
    e = e/(e.square().mean(-1, keepdim=True)+torch.finfo(e.dtype).eps).sqrt()
    h = torch.cat([e, e], -1)
    with torch.random.fork_rng(devices=[]): noise = torch.randn(h.shape)
    return round_to_lattice(h+.1*noise, model.config.lattice_bits)

def logits_by_hand(model, y):
    "Output head on the layer norm of the sum of both streams"
    half = y.shape[-1]//2
    norm = model.norm
    return model.output_head(F.layer_norm(y[...,:half]+y[...,half:], (half,), norm.weight, norm.bias))

def state_nll_by_hand(model, y):
    "Negative log-density of the states under independent normals, mean over tokens"
    normal = torch.distributions.Normal(model.latent.mu, model.latent.log_s.exp())
    return -normal.log_prob(y).sum(-1).mean()

def terms_by_hand(learn):
    "Denoising and likelihood term of the batch at hand"
    x0,xt,t = learn.yb
    *_,y = coupling_states(learn.model, noisy_state(learn.model, learn.xb[0]))
    denoise = token_loss(logits_by_hand(learn.model, y), x0, xt, t, (1, 0, 0)).mean()
    return denoise, state_nll_by_hand(learn.model, y)

class SGDByHand:
    "Terms by hand, and the weights after each step: p - lr (g_denoise + lam g_likelihood), and the learner's"
    def __init__(self, lam, lr):
        self.lam,self.lr = lam,lr
        self.terms,self.want,self.got = [],[],[]
    def callbacks(self): return [OnEvent('before_batch', self.predict), OnEvent('after_step', self.record)]
    def predict(self, learn):
        params = list(learn.model.parameters())
        terms = terms_by_hand(learn)
        self.terms.append([term.item() for term in terms])
        options = dict(retain_graph=True, materialize_grads=True)
        grads = [torch.autograd.grad(term, params, **options) for term in terms]
        self.want.append([p.detach()-self.lr*(d+self.lam*n) for p,d,n in zip(params, *grads)])
    def record(self, learn): self.got.append([p.detach().clone() for p in learn.model.parameters()])

def check_terms(lam=.2, lr=.02, **kwargs):
    "Compare terms, loss and weights of every SGD step with those by hand"
    by_hand = SGDByHand(lam, lr)
    learn = tiny_learner(*by_hand.callbacks(), opt_func=SGD, lambda_likelihood=lam, **kwargs)
    seeded_weights(learn.model.backbone, .1)
    train(learn, 1, lr, flat=True)
    assert len(learn.objective.parts)==len(by_hand.got)==N_STEPS
    steps = zip(learn.objective.parts, learn.oscillation.losses)
    for (parts,loss),(denoise,likelihood) in zip(steps, by_hand.terms):
        assert parts==pytest.approx(dict(denoise=denoise, likelihood=likelihood), rel=1e-4)
        assert loss==pytest.approx(denoise+lam*likelihood, rel=1e-4)
    for got,want in zip(by_hand.got, by_hand.want):
        for a,b in zip(got, want): assert (a-b).abs().max()<=2e-5*max(1, b.abs().max())

@pytest.mark.parametrize('reversible', [True, False])
def test_loss_and_step_with_the_likelihood_by_hand(reversible):
    check_terms(config_kwargs=dict(reversible=reversible))

def half_the_likelihood(self): return dict(denoise=1., likelihood=self.lambda_likelihood/2, invert=0.)
def test_a_wrong_weight_is_seen(monkeypatch):
    monkeypatch.setattr(ObjectiveCallback, 'weights', property(half_the_likelihood))
    with pytest.raises(AssertionError): check_terms()

def only_record(self, after_loss):
    before = self.learn.loss_grad
    after_loss()
    self.learn.loss_grad = before
def test_an_objective_that_is_only_recorded_is_seen(monkeypatch):
    wrap_method(monkeypatch, ObjectiveCallback, 'after_loss', only_record)
    with pytest.raises(AssertionError): check_terms()

# The total and its fractions

def fractions_by_hand(parts, weights):
    "Mean over steps of |w_i L_i| / sum of |w_j L_j|"
    sizes = np.array([[abs(weights[k]*v) for k,v in p.items()] for p in parts])
    return (sizes/sizes.sum(1, keepdims=True)).mean(0).tolist()

@pytest.mark.parametrize('lambda_likelihood,lambda_invert,cbs', [
    (.1, 0., []),
    (0., .1, []),
    (.2, .3, [GradientAccumulation(32)]),
])
def test_total_and_fractions(lambda_likelihood, lambda_invert, cbs):
    learn = fit(*cbs, epochs=1, lambda_likelihood=lambda_likelihood, lambda_invert=lambda_invert)
    parts,fractions = learn.objective.parts,learn.objective.fractions()
    weights = dict(denoise=1, likelihood=lambda_likelihood, invert=lambda_invert)
    names = [k for k,w in weights.items() if w]
    assert len(parts)==(N_STEPS//2 if cbs else N_STEPS) and all(list(p)==names for p in parts)
    totals = [sum(weights[k]*v for k,v in p.items()) for p in parts]
    assert learn.oscillation.losses==pytest.approx(totals, rel=1e-6)
    assert list(fractions)==names
    assert sum(fractions.values())==pytest.approx(1) and fractions.get('invert', 0.)==0
    assert list(fractions.values())==pytest.approx(fractions_by_hand(parts, weights))
    assert getattr(learn.model, 'latent_nll', None) is None

def test_likelihood_under_autocast():
    low = train(tiny_learner(lambda_likelihood=.1).to_bf16(), 1)
    full = train(tiny_learner(lambda_likelihood=.1), 1)
    assert recorded(low, 'likelihood')==pytest.approx(recorded(full, 'likelihood'), rel=.05)
    assert low.oscillation.losses!=full.oscillation.losses

def test_validation_leaves_terms_alone():
    learn = fit(lambda_likelihood=.1, epochs=1)
    with learn.no_bar(): learn.validate()
    assert len(learn.objective.parts)==N_STEPS
    assert sum(learn.objective.fractions().values())==pytest.approx(1)

# Inverses that are exact

EXACT = {
    'stack':  {},
    'scales': dict(dropout=.3, enable_multiscale=True, n_layers=1),
    'sparse': dict(n_experts=2, k_active=1, n_layers=1),
}
@pytest.mark.parametrize('name', EXACT)
def test_inverse_term_of_an_exact_model_is_nothing(name):
    without,with_term = (fit(epochs=1, lambda_invert=lam, config_kwargs=EXACT[name]) for lam in (0., .5))
    assert recorded(with_term, 'invert')==[0.]*N_STEPS
    assert without.oscillation.losses==with_term.oscillation.losses==recorded(with_term, 'denoise')
    assert same_weights(without, with_term)
    assert not with_term.objective.hooks

# Inverses that are learned

class LearnedInverse(Bijection):
    "x W + cond S, with the inverse y U, which does not undo it"
    inverts_exactly = False
    def __init__(self, d, d_cond=None):
        super().__init__()
        g = torch.Generator().manual_seed(7)
        self.W,self.U = (nn.Parameter(torch.eye(d)+.3*torch.randn(d, d, generator=g)/d**.5) for _ in range(2))
        self.S = None if d_cond is None else nn.Parameter(torch.randn(d_cond, d, generator=g))
    def forward(self, x, cond=None, **context):
        shift = 0 if self.S is None else (cond@self.S)[:,None]
        return x@self.W+shift, x.new_zeros(len(x))
    def inverse(self, y, cond=None, **context): return y@self.U, y.new_zeros(len(y))

class StateOnly(nn.Module):
    "A LearnedInverse after another module, without its log-determinant"
    def __init__(self, f, inner=nn.Identity(), by_keyword=False):
        super().__init__()
        self.f,self.inner,self.by_keyword = f,inner,by_keyword
    def forward(self, x, *args):
        y = self.inner(x, *args)
        if self.f.S is None: return self.f(y)[0]
        return self.f(y, cond=args[0])[0] if self.by_keyword else self.f(y, *args)[0]

def after_embedding(model): model.entry = StateOnly(LearnedInverse(16))
def in_block(model):
    mixer = model.backbone.blocks[0].f.mixer
    mixer.mlp_norm = StateOnly(LearnedInverse(8), mixer.mlp_norm)
def in_time_conditioned_block(model, by_keyword=False):
    mixer = model.backbone.blocks[0].f.mixer
    mixer.mlp_norm = StateOnly(LearnedInverse(8, 8), mixer.mlp_norm, by_keyword)
def in_mlp(model): model.backbone.blocks[0].f.pointwise.insert(1, StateOnly(LearnedInverse(32)))

def inexact_learner(*cbs, insert=after_embedding, reversible=False, lam=.1, std=None, **kwargs):
    "A learner for a network into which a LearnedInverse is inserted, with random blocks if std is given"
    config_kwargs = dict(lattice_bits=None, reversible=reversible)
    learn = tiny_learner(*cbs, ObjectiveCallback(lambda_invert=lam), config_kwargs=config_kwargs, **kwargs)
    if std: seeded_weights(learn.model.backbone.blocks, std)
    insert(learn.model)
    return learn

def component(learn): return next(m for m in learn.model.modules() if isinstance(m, LearnedInverse))
def keep_inputs(learn):
    "A list to which each state that enters the LearnedInverse is added"
    states = []
    component(learn).register_forward_pre_hook(lambda m, args: states.append(args[0].detach()))
    return states

def test_error_of_an_inexact_inverse_falls():
    with_term,without = (inexact_learner(reversible=True, lam=lam) for lam in (.1, 0.))
    states = keep_inputs(with_term)
    for learn in (with_term, without): train(learn, 2, .05)
    terms = recorded(with_term, 'invert')
    left,left_without = (inversion_nats(component(learn), states[0]).item() for learn in (with_term, without))
    assert len(terms)==2*N_STEPS and terms[-1]<terms[0]/3
    assert left<left_without/3
    assert 'invert' not in without.objective.parts[0]
    assert without.oscillation.losses==recorded(without, 'denoise')

# Gradients of the inverse term

def copy(grad): return None if grad is None else grad.clone()
def gradients(lam, insert, **kwargs):
    "The learner, all gradients of its first batch by name, and the state that entered the LearnedInverse"
    first = {}
    def keep(learn): first.update({n:copy(p.grad) for n,p in learn.model.named_parameters()})
    cbs = [StopAt(0, 1, CancelFitException), OnEvent('after_backward', keep)]
    learn = inexact_learner(*cbs, insert=insert, lam=lam, std=.2, **kwargs)
    states = keep_inputs(learn)
    train(learn, 1)
    return learn, first, states[0]

def term_by_hand(f, h):
    """Half the mean squared error r = h W U - h of N states, and its gradients by W and U:
    |r|^2/2N, h' r U'/N and (h W)' r/N."""
    h,W,U = h.flatten(0, -2),f.W.detach(),f.U.detach()
    r = h@W@U-h
    return r.square().sum().item()/2/len(h), {'W':h.T@r@U.T/len(h), 'U':(h@W).T@r/len(h)}

def check_gradients(insert, lam=.5, **kwargs):
    "Check that the term adds its gradient to W and U, and nothing to all other parameters"
    learn,grads,h = gradients(lam, insert, **kwargs)
    _,without,_ = gradients(0., insert, **kwargs)
    fresh = component(inexact_learner(insert=insert, lam=lam, std=.2, **kwargs))      # as at the first batch
    value,want = term_by_hand(fresh, h)
    assert recorded(learn, 'invert')[0]==pytest.approx(value, rel=1e-5)
    found = set()
    for name,grad in grads.items():
        last = name.split('.')[-1]
        added = grad if without[name] is None or grad is None else grad-without[name]
        if last in want:
            assert (added-lam*want[last]).abs().max()<1e-5
            found.add(last)
        else: assert added is None or not added.any(), name
    assert found=={'W', 'U'}

@pytest.mark.parametrize('reversible', [False, True])
@pytest.mark.parametrize('insert', [after_embedding, in_block])
def test_only_the_component_gets_a_gradient_from_the_term(insert, reversible):
    check_gradients(insert, reversible=reversible)

def keep_attached(self, m, args, kwargs):
    if m not in self.seen: self.seen[m] = args,kwargs
def test_states_that_are_not_detached_are_seen(monkeypatch):
    monkeypatch.setattr(ObjectiveCallback, '_note', keep_attached)
    with pytest.raises((AssertionError, RuntimeError)): check_gradients(after_embedding)

@pytest.mark.parametrize('by_keyword', [False, True])
@pytest.mark.parametrize('reversible', [False, True])
def test_no_gradient_through_the_context(reversible, by_keyword):
    insert = partial(in_time_conditioned_block, by_keyword=by_keyword)
    kwargs = dict(insert=insert, reversible=reversible, corruption=small_noise(.5, .5))
    (_,with_term,_),(_,without,_) = (gradients(lam, **kwargs) for lam in (.5, 0.))
    of_time = [name for name in with_term if name.startswith('backbone.time')]
    assert of_time
    for name in of_time: assert torch.allclose(with_term[name], without[name], atol=1e-6)

@pytest.mark.parametrize('insert', [after_embedding, in_block])
def test_inverse_term_of_reversible_layers_is_the_same(insert):
    learners = [train(inexact_learner(insert=insert, reversible=r), 1, .03) for r in (True, False)]
    reversible,stored = (recorded(learn, 'invert') for learn in learners)
    assert reversible==pytest.approx(stored, rel=1e-3)
    assert len(set(reversible))==N_STEPS and reversible[-1]<reversible[0]

@pytest.mark.parametrize('insert,reversible', [(after_embedding, False), (in_block, True), (in_mlp, False)])
def test_inverse_term_under_autocast(insert, reversible):
    low = train(inexact_learner(insert=insert, reversible=reversible).to_bf16(), 1)
    full = train(inexact_learner(insert=insert, reversible=reversible), 1)
    assert np.isfinite(recorded(low, 'invert')).all()
    assert recorded(low, 'invert')==pytest.approx(recorded(full, 'invert'), rel=.15)
    assert low.oscillation.losses!=full.oscillation.losses

# Hooks come and go with a fit

def n_hooks(learn): return len(component(learn)._forward_pre_hooks)

@pytest.mark.parametrize('error', [None, CancelFitException])
def test_hooks_are_gone_afterwards(error):
    learn = inexact_learner(*([StopAt(0, 3, error)] if error else []))
    during = []
    learn.add_cb(OnEvent('after_batch', lambda learn: during.append(n_hooks(learn))))
    train(learn, 1)
    assert set(during)=={1} and n_hooks(learn)==0

@pytest.mark.parametrize('again', [False, True])
def test_hooks_are_gone_after_an_interruption(again):
    learn = inexact_learner(StopAt(0, 3))
    with pytest.raises(KeyboardInterrupt): train(learn, 1)
    learn.remove_cb(StopAt)
    if again: train(learn, 1)
    assert n_hooks(learn)==0

def test_lr_find_leaves_terms_alone(tmp_path):
    learn = inexact_learner(path=tmp_path)
    short_lr_find(learn)
    assert not hasattr(learn.objective, 'parts') and n_hooks(learn)==0
    train(learn, 1)
    parts = [dict(p) for p in learn.objective.parts]
    short_lr_find(learn)
    assert len(parts)==N_STEPS and learn.objective.parts==parts
    assert n_hooks(learn)==0 and len(learn.recorder.losses)>N_STEPS
