"""Logits of a few positions at a time against logits at all positions: nats, gradients, memory, errors."""
from functools import lru_cache
import pytest, torch
from fastai.callback.core import Callback
from helpers import plant_fault, seeded_generator
from bijdiff.diffusion.corruption import Corruption, GIDDCorruption
from bijdiff.likelihood.exact import token_nll
from bijdiff.model import scoring
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser, Features
from bijdiff.model.predictions import call_features, output_kind
from bijdiff.model.scoring import chunk_rows, integrand_sum, masked_nll, output_integrand, ScoredRows
from bijdiff.sampling import conditionals
from bijdiff.testing import quiet_fit, random_weights, small_learner
from bijdiff.training.noising import DiffusionLoss

V,B,L = 7,3,8

NOISES = {
    'masks': (Corruption(V), {}),
    'masks in steps': (Corruption(V, T=4), {}),
    'substitution': (Corruption(V, 0., 1.), {}),
    'hybrid': (Corruption(V, .6, .4), {}),
    'hybrid in steps': (Corruption(V, .6, .4, T=4), {}),
    'gidd': (GIDDCorruption(V), {}),
    'deletion': (Corruption(V, .6, 0., .4), {}),
    'all three': (Corruption(V, .4, .3, .3), {}),
    'scores of masks': (Corruption(V), dict(score_head=True)),
    'scores of substitution': (Corruption(V, 0., 1.), dict(score_head=True)),
}
every_noise = pytest.mark.parametrize('name', NOISES)

@pytest.fixture
def small_chunks(monkeypatch):
    "Chunks of five rows, in parts of two"
    monkeypatch.setattr(scoring, 'chunk_rows', lambda n, vocab_size: 5)
    monkeypatch.setattr(scoring, '_part', 2*V)

@lru_cache(None)
def network(name):
    "A network in float64 with random weights for a noise"
    noise,fields = NOISES[name]
    torch.manual_seed(0)
    size = dict(seq_len=L, d_model=8, n_heads=2, n_layers=1)
    config = DenoiserConfig(V, **size, noise=noise.to_dict(), **noise.config_fields(), **fields)
    return random_weights(BijectiveDenoiser(config), .4).double()

def problem(name):
    "A network, its noise, noisy sequences of which one is shorter, where padding has scores, and times"
    noise,g = NOISES[name][0],seeded_generator(1)
    x,t = torch.randint(0, V, (B, L), generator=g),torch.tensor([.25, .5, .75])
    lengths = None if name=='scores of substitution' else torch.tensor([L, L, 5])
    return network(name), noise, noise.corrupt(x, t, g, lengths), t

def dense_nats(m, noise, noisy, t, features):
    "Nats per sequence from logits at all positions, (B,)"
    tokens = output_kind(m).integrand(m.head(features.hidden), noisy.x0, noisy.xt, t, noise)
    gaps = noise.gap_integrand(features.gap_logits, noisy, t)
    return torch.where(noisy.attention_mask, tokens, 0.).sum(1) + gaps

def gradients(m, loss):
    "Gradients of all weights"
    return torch.autograd.grad(loss, list(m.parameters()), allow_unused=True)

def assert_same(found, want): torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-11)

def judge(name):
    "Values and gradients of the sum, and the values alone, are those from all logits"
    m,noise,noisy,t = problem(name)
    total,nats = integrand_sum(m, call_features(m, noisy.xt, t, noise.padding_mask(noisy)), noisy, t, noise)
    found = gradients(m, 3*total)
    features = call_features(m, noisy.xt, t, noise.padding_mask(noisy))
    want = dense_nats(m, noise, noisy, t, features)
    assert_same(nats, want.detach())
    assert_same(total, want.sum())
    with torch.no_grad(): assert_same(output_integrand(m, features, noisy, t, noise), want.detach())
    for a,b in zip(found, gradients(m, 3*want.sum())):
        assert (a is None)==(b is None)
        if b is not None: assert_same(a, b)

@every_noise
def test_values_and_gradients_are_those_of_all_logits(name, small_chunks): judge(name)

@every_noise
def test_one_chunk_is_enough_for_a_small_vocabulary(name): judge(name)

def gradient_left_out(f): return lambda *args: (f(*args)[0], 0*f(*args)[1])
def values_slightly_more(f): return lambda *args: (f(*args)[0]*1.001, f(*args)[1])

@pytest.mark.parametrize('target, fault', [
    ('_nats_and_gradient', gradient_left_out),
    ('_nats_and_gradient', values_slightly_more)])
def test_the_judge_notices(target, fault, monkeypatch, small_chunks):
    plant_fault(monkeypatch, (scoring, target), fault)
    with pytest.raises(AssertionError): judge('hybrid')

@pytest.mark.parametrize('name', ['masks', 'hybrid', 'scores of masks'])
def test_positions_that_are_left_out_cost_nothing(name, monkeypatch, small_chunks):
    "They add exactly 0, their features get no gradient, and the head never sees them"
    m,noise,noisy,t = problem(name)
    scored = torch.arange(L).expand(B, -1)>=L//2
    noisy = noisy._replace(attention_mask=noisy.attention_mask&scored)
    h = call_features(m, noisy.xt, t).hidden.detach().requires_grad_()
    total,nats = integrand_sum(m, Features(h), noisy, t, noise)
    gradient, = torch.autograd.grad(total, h)
    assert not gradient[~scored].any() and gradient[scored].any()
    spoilt = Features(torch.where(scored[...,None], h, torch.nan))
    assert_same(integrand_sum(m, spoilt, noisy, t, noise)[1], nats)
    if name=='hybrid': return
    seen = []
    monkeypatch.setattr(m, 'head', lambda h: seen.append(len(h)) or m.output_head(h), raising=False)
    with torch.no_grad(): output_integrand(m, Features(h), noisy, t, noise)
    assert sum(seen)==(noisy.attention_mask&(noisy.xt==V)).sum()

def test_nothing_scored_is_a_loss_of_0():
    m,noise,noisy,t = problem('masks')
    noisy = noisy._replace(attention_mask=torch.zeros_like(noisy.attention_mask))
    total,nats = integrand_sum(m, call_features(m, noisy.xt, t), noisy, t, noise)
    assert total==0 and not nats.any()
    assert not any(g.any() for g in gradients(m, total) if g is not None)

def test_rows_return_to_their_places():
    where = torch.rand(B, L, generator=seeded_generator(0))<.4
    x = torch.arange(B*L).view(B, L)
    rows = ScoredRows(where, x, x+1, torch.tensor([0., .5, 1.]), V)
    assert torch.equal(rows.put(rows.take(x)), torch.where(where, x, 0))
    assert torch.equal(rows.t, torch.tensor([0., .5, 1.]).double().repeat_interleave(where.sum(1)))

@pytest.mark.parametrize('n', [1, 100, 1024, 65_536])
@pytest.mark.parametrize('vocab_size', [2, 300, 50_257, 10**9])
def test_chunks_are_bounded(n, vocab_size):
    rows = chunk_rows(n, vocab_size)
    assert rows>=1 and rows*vocab_size<=max(2**27, vocab_size)
    if n*vocab_size<=2**23: assert rows>=n

@pytest.mark.parametrize('name', ['masks', 'hybrid', 'deletion', 'scores of masks'])
def test_no_tensor_of_all_logits_in_training(name):
    "No function gives a result as large as the logits of the positions that are scored"
    V,L = 4096,64
    noise,fields = NOISES[name]
    noise = Corruption(V, *(noise.weights[k] for k in ('mask', 'substitute', 'delete')))
    size = dict(seq_len=L, d_model=8, n_heads=2, n_layers=1)
    m = BijectiveDenoiser(DenoiserConfig(V, **size, noise=noise.to_dict(), **noise.config_fields(), **fields))
    x,t = torch.randint(0, V, (160, L), generator=seeded_generator(0)),(torch.arange(160)+.5)/160
    noisy = noise.corrupt(x, t)
    rows = noise.scored_positions(noisy.xt, noisy.attention_mask).sum().item()
    class Largest(torch.overrides.TorchFunctionMode):
        numel = 0
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor): self.numel = max(self.numel, out.numel())
            return out
    with Largest() as largest:
        features = m(noisy.xt, t, noise.padding_mask(noisy), True)
        DiffusionLoss(noise, m)(features, x, noisy.xt, t, *noise.loss_targets(noisy)).backward()
    assert largest.numel<=2**23+rows+V < rows*V

def test_a_second_backward_pass_is_an_error():
    m,noise,noisy,t = problem('masks')
    total,_ = integrand_sum(m, call_features(m, noisy.xt, t), noisy, t, noise)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='another backward pass'): total.backward()

def test_second_derivatives_are_an_error():
    m,noise,noisy,t = problem('masks')
    total,_ = integrand_sum(m, call_features(m, noisy.xt, t), noisy, t, noise)
    with pytest.raises(RuntimeError, match='create_graph'):
        torch.autograd.grad(total, m.output_head.weight, create_graph=True)

def test_prior_of_masks_from_one_sequence_of_masks(monkeypatch):
    m = network('masks')
    x = torch.randint(0, V, (B, L), generator=seeded_generator(0))
    with torch.no_grad():
        log_probs = m(torch.full((1, L), V)).log_softmax(-1).expand(B, -1, -1)
        want = -log_probs.gather(-1, x[...,None])[...,0]
        assert_same(masked_nll(m, x), want)
        monkeypatch.setattr(scoring, 'chunk_rows', lambda n, vocab_size: 3)
        assert_same(masked_nll(m, x), want)

@pytest.mark.parametrize('rule', ['confidence', 'entropy', 'block'])
def test_adaptive_rules_give_the_same_in_chunks(rule, monkeypatch):
    m,x = network('masks'),torch.randint(0, V, (B, L), generator=seeded_generator(0))
    want = token_nll(m, x, rule, steps=3)
    monkeypatch.setattr(conditionals, 'chunk_rows', lambda n, vocab_size: 4)
    assert_same(token_nll(m, x, rule, steps=3), want)

# Precision

def loss_in(dtype):
    "Loss and gradients of the head under autocast"
    m,noise,noisy,t = problem('masks')
    m = random_weights(BijectiveDenoiser(m.config), .4)
    loss = DiffusionLoss(noise, m)
    with torch.autocast('cpu', dtype, enabled=dtype!=torch.float32):
        value = loss(m(noisy.xt, t, None, True), noisy.x0, noisy.xt, t)
    value.backward()
    return value.detach(), m.output_head.weight.grad

@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, .05), (torch.float16, .02)])
def test_half_precision_is_near_to_float32(dtype, tolerance, small_chunks):
    torch.manual_seed(0)
    value,gradient = loss_in(torch.float32)
    torch.manual_seed(0)
    half,half_gradient = loss_in(dtype)
    assert half.dtype==half_gradient.dtype==torch.float32
    assert abs(half/value-1)<tolerance and value!=half
    assert (half_gradient-gradient).norm()<tolerance*gradient.norm()

@pytest.mark.parametrize('dtype, want', [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_type_of_the_logits_under_autocast(dtype, want, monkeypatch):
    seen = []
    def peek(f): return lambda logits, *args: seen.append(logits.dtype) or f(logits, *args)
    plant_fault(monkeypatch, (scoring, '_nats_and_gradient'), peek)
    loss_in(dtype)
    assert set(seen)=={want}

# The learner

def test_the_learner_gets_features_and_get_preds_logits():
    class Peek(Callback):
        kinds = set()
        def after_pred(self): self.kinds.add((self.training, type(self.pred)))
    learn = quiet_fit(small_learner(Peek()))
    assert Peek.kinds=={(True, Features), (False, Features)}
    learn.remove_cb(Peek)
    preds,_ = learn.get_preds()
    assert preds.shape[-1]==learn.dls.tokenizer.vocab_size

def test_the_loss_keeps_the_nats_of_each_sequence():
    m,noise,noisy,t = problem('hybrid')
    loss = DiffusionLoss(noise, m)
    value = loss(m(noisy.xt, t, None, True), noisy.x0, noisy.xt, t)
    assert not loss.nats.requires_grad
    assert_same(loss.nats.mean(), value.detach())
    assert_same(loss(m(noisy.xt, t), noisy.x0, noisy.xt, t), value)

def test_the_loss_of_another_network_is_an_error():
    learn = small_learner()
    learn.loss_func = DiffusionLoss(learn.corruption.corruption, network('masks'))
    with pytest.raises(ValueError, match='the model of the loss'): quiet_fit(learn)

# Heads that are more than a linear layer

class Adapted(torch.nn.Linear):
    "A linear layer with a trained addition of rank one"
    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())
        self.a,self.b = (torch.nn.Parameter(torch.ones(n)/2) for n in self.weight.shape)
    def forward(self, h): return super().forward(h) + (h@self.b)[...,None]*self.a

def with_hook(linear):
    "A linear layer whose output is changed by a hook"
    linear.register_forward_hook(lambda m, args, out: out*1.5)
    return linear

def without_bias(linear):
    "A linear layer without bias"
    new = torch.nn.Linear(linear.in_features, linear.out_features, bias=False)
    new.load_state_dict({'weight':linear.weight})
    return new

@pytest.mark.parametrize('head', [Adapted, with_hook, without_bias, lambda o: torch.nn.Sequential(o)])
def test_any_head_is_trained_as_it_is_called(head, small_chunks):
    network.cache_clear()
    m,noise,noisy,t = problem('masks')
    m.output_head = head(m.output_head).double()
    network.cache_clear()
    total,_ = integrand_sum(m, call_features(m, noisy.xt, t), noisy, t, noise)
    want = dense_nats(m, noise, noisy, t, call_features(m, noisy.xt, t)).sum()
    assert_same(total, want)
    for a,b in zip(gradients(m, total), gradients(m, want)): assert_same(a, b)
