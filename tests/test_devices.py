"""The same on every kind of device that is there: the CPU, and a CUDA or MPS accelerator where one is found. Run it alone on a new machine: pytest tests/test_devices.py -o addopts="" """
import math
from contextlib import nullcontext
from copy import deepcopy
import pytest, torch
from fastai.basics import Callback, CancelFitException
from fastai.callback.training import GradientClip
from bijdiff.all import *

devices = ['cpu', *(k for k,b in dict(cuda=torch.cuda, mps=torch.backends.mps).items() if b.is_available())]
TEXT = ''.join(f'{i} cats and {i*i} dogs met {i%7} birds. ' for i in range(400))
V,L = 30,24

@pytest.fixture(params=devices)
def device(request): return torch.device(request.param)

def wild(m, seed=0):
    "Random weights: fresh blocks add nothing"
    torch.manual_seed(seed)
    for p in m.parameters(): torch.nn.init.normal_(p, std=.2)
    return m.eval()

kinds = dict(plain={}, stored=dict(reversible=False), half=dict(n_bijective_layers=1), multiscale=dict(enable_multiscale=True), coupled=dict(n_experts=2), every=dict(n_experts=2, couple='every'),
             gated=dict(n_experts=3, k_active=2), timed=dict(time_conditioning=True), deep=dict(coupling_depth=3))
stacks = [k for k in kinds if k not in ('stored', 'half')]

def network(kind, **config_kwargs): return wild(BijectiveDenoiser(DenoiserConfig(V, L, 16, 2, 2, **kinds[kind], **config_kwargs)))
def padding(device): return torch.arange(L, device=device)<torch.tensor([[L], [7], [0]], device=device)        # a whole text, a short one, none
def texts(n=3, seed=0): return torch.randint(0, V+1, (n, L), generator=torch.Generator().manual_seed(seed))
def times(m, n, device): return torch.linspace(.2, .8, n, device=device) if m.config.time_conditioning else None

def learner(device, shares=None, **kw):
    "A small one; a noise by its shares"
    dls = text_dls(TEXT, seq_len=L, bs=32, device=device)
    if shares: kw['corruption'] = Corruption(dls.tokenizer.vocab_size, **shares)
    config_kwargs = {'d_model':16, 'n_heads':2, 'n_layers':2, **kw.pop('config_kwargs', {})}
    return diffusion_learner(dls, seed=1, n_valid_draws=1, config_kwargs=config_kwargs, **kw)

def quiet_fit(learn, n=1, lr=.01):
    learn.logger = lambda row: None
    with learn.no_bar(): learn.fit_one_cycle(n, lr)
    return learn
def weights(learn): return [p.detach().cpu().clone() for p in learn.model.parameters()]
def same(a, b): return len(a)==len(b) and all(map(torch.equal, a, b))

@pytest.mark.parametrize('kind', kinds)
def test_outputs_are_those_of_the_cpu(kind, device):
    m,x = network(kind),texts()
    with torch.no_grad():
        want = m(x, times(m, 3, 'cpu'))
        got = m.to(device)(x.to(device), times(m, 3, device))
    assert got.device.type==device.type and (got.cpu()-want).abs().max() < 1e-3*want.abs().max()      # rounding to the lattice carries a difference in the last bit further

@pytest.mark.parametrize('masked', [False, True], ids=['whole', 'padded'])
@pytest.mark.parametrize('autocast', [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('kind', stacks)
def test_inverse_is_exact(kind, autocast, masked, device):
    m = network(kind).to(device)
    s = m.state(texts().to(device))
    ctx = m.context(s)|(dict(mask=padding(device)) if masked else {})
    with torch.no_grad():
        full = m.backbone(s, **ctx)[0]
        with torch.autocast(device.type, autocast) if autocast else nullcontext():
            y = m.backbone(s, **ctx)[0]
            assert torch.equal(m.backbone.inverse(y, **ctx)[0], s) and not torch.equal(y, s)
        assert torch.equal(y, full) == (autocast is None)                              # else autocast did nothing
        if masked: assert torch.equal(y[~ctx['mask']], s[~ctx['mask']])

@pytest.mark.parametrize('masked', [False, True], ids=['whole', 'padded'])
@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('kind', stacks)
def test_reversible_backward_gives_the_gradients_of_stored_activations(kind, autocast, masked, device):
    grads = []
    for reversible in (True, False):
        m = network(kind, dropout=.3, reversible=reversible).to(device).train()
        s = m.state(texts().to(device)).detach()
        ctx = m.context(s)|(dict(mask=padding(device)) if masked else {})
        torch.manual_seed(3)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast): y = m.backbone(s, **ctx)[0]
        y.sin().sum().backward()
        grads.append({k:p.grad.cpu() for k,p in m.backbone.named_parameters() if p.grad is not None})
    got,want = grads
    assert got.keys()==want.keys() and len(got)>8
    for k,w in want.items(): assert (got[k]-w).abs().max() <= 1e-2*w.abs().max()+1e-6*max(v.abs().max() for v in want.values()), k     # not bit by bit: sums on an accelerator may come in another order

@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
def test_training_learns(precision, device):
    learn = learner(device)
    if precision=='bfloat16': learn.to_bf16()
    losses = quiet_fit(learn, 3).recorder.losses
    if precision=='bfloat16': assert losses[1]!=quiet_fit(learner(device)).recorder.losses[1]
    assert learn.model.device.type==device.type and float(sum(losses[-10:])) < .95*float(sum(losses[:10]))

def test_training_in_half_precision_with_scaled_loss(device):
    losses = quiet_fit(learner(device).to_fp16(), 3).recorder.losses
    assert float(sum(losses[-10:])) < .95*float(sum(losses[:10]))

def test_all_instruments_and_terms(device):
    learn = learner(device, lambda_likelihood=.01, lambda_invert=.1, config_kwargs=dict(n_experts=2), cbs=[ProbeCallback(3), BlockNormCallback(3), LatticeUsageCallback(), ExpertCallback(5), EMACallback(.9), GradientClip(1.)])
    quiet_fit(learn)
    assert len(learn.probe.losses)>1 and learn.block_norm.rows and learn.lattice_usage.values and learn.log_det.value==0. and learn.invertibility.value==0.
    assert all(math.isfinite(v) and v>0 for v in learn.probe.losses) and learn.expert.looks and len(learn.expert.grads)==len(learn.recorder.losses)
    assert learn.objective.parts[-1]['likelihood']!=0 and learn.objective.parts[-1]['invert']==0

def test_the_moving_average_is_one(device):
    learn = learner(device, cbs=EMACallback(.9))
    assert not same(weights(quiet_fit(learn)), weights(quiet_fit(learner(device))))
    assert all(torch.allclose(a, b, atol=1e-5) for a,b in zip(weights(quiet_fit(learner(device, cbs=EMACallback(1e-6)))), weights(quiet_fit(learner(device)))))

class StopAfterFirst(Callback):
    "Interrupt behind the first checkpoint"
    order = CheckpointCallback.order+1
    def after_epoch(self): raise CancelFitException

def test_a_resumed_training_ends_with_the_same_weights(tmp_path, device):
    def run(folder, *cbs, resume=False): return quiet_fit(learner(device, config_kwargs=dict(dropout=.2), cbs=[CheckpointCallback(folder, resume=resume), *cbs]), 3)
    whole,stopped = run(tmp_path/'a'),run(tmp_path/'b', StopAfterFirst())
    assert same(weights(run(tmp_path/'b', resume=True)), weights(whole)) and not same(weights(stopped), weights(whole))

@pytest.fixture(scope='module')
def trained_on():
    "A function that gives the model trained on a device"
    found = {}
    def get(device):
        if device.type not in found: found[device.type] = quiet_fit(learner(device), 3).model.eval()
        return found[device.type]
    return get

@pytest.fixture
def trained(trained_on, device): return trained_on(device)

def test_sampling(trained):
    a,b,c = (sample(trained, 3, steps=8, seed=s) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.shape==(3, L) and a.max()<trained.config.vocab_size

@pytest.mark.parametrize('rule', ['left_to_right', 'confidence', 'entropy'])
def test_filling(trained, rule):
    t = torch.tensor(infill_template(trained.tokenizer, L, 'cats ____ dogs'))
    filled,known = sample(trained, 2, template=t, steps=6, rule=rule),t<trained.config.vocab_size
    assert 0<known.sum()<L and (filled[:,known]==t[known]).all() and filled.max()<trained.config.vocab_size

all_shares = pytest.mark.parametrize('shares', [dict(mask=1.), dict(mask=0., substitute=1.), dict(mask=.5, substitute=.5), dict(mask=.8, delete=.2)], ids=['masks', 'uniform', 'both', 'deletion'])

@all_shares
def test_noise_is_that_of_the_cpu(shares, device):
    c,x,t = Corruption(V, **shares),texts(6).clamp(max=V-1),torch.linspace(.1, .9, 6)
    here,there = (c.corrupt(o, t, torch.Generator().manual_seed(1)) for o in (x.to(device), x))
    for n,a,b in zip(here._fields, here, there): assert a is b is None or a.device.type==device.type and torch.equal(a.cpu(), b), n

@all_shares
def test_other_noises(shares, device):
    learn = quiet_fit(learner(device, shares), 1)
    m,x = learn.model,learn.dls.valid.one_batch()[0][:2]
    out = sample(m, 2, steps=6, seed=0)
    assert len(out)==2 and all(len(o) and (o<m.config.vocab_size).all() for o in out) and math.isfinite(learn.recorder.values[-1][1])
    a,b = nelbo(m, x, n=4).mean,nelbo(deepcopy(m).cpu(), x.cpu(), n=4).mean
    assert (a.cpu()-b.cpu()).abs().max() < .01*b.abs().max()

def test_objective_of_scores(device):
    learn = learner(device, dict(mask=0., substitute=1.), objective='score_entropy', config_kwargs=dict(score_head=True))
    assert math.isfinite(quiet_fit(learn).recorder.values[-1][1]) and sample(learn.model, 2, steps=6, sampler='tweedie').shape==(2, L)

def test_likelihoods(trained):
    x,on_cpu = torch.tensor(trained.tokenizer.encode(TEXT)[:4*L]).view(4, L),deepcopy(trained).cpu()
    for rule in ('spread', 'left_to_right'): assert (log_prob(trained, x, rule).cpu()-log_prob(on_cpu, x, rule)).abs().max() < .05
    a,b = score_ids(trained, x.flatten(), n=8),score_ids(on_cpu, x.flatten(), n=8)
    assert a.nats==pytest.approx(b.nats, rel=.01)                                      # the same masks: they are drawn on the CPU

def test_density_of_the_states(device):
    m,x = network('plain', latent_density=True),texts().clamp(max=V-1)
    want = latent_nats(m, x, n=3).mean
    assert (latent_nats(m.to(device), x, n=3).mean-want).abs().max() < 1e-3*want.abs().max()

layers = dict(linear=lambda: BijectiveLinear(8, mixing='rotation', lattice_bits=12), affine_linear=lambda: BijectiveLinear(8, coupling='affine', mixing='permutation'), rotation=lambda: PairRotation(torch.rand(4)*3, 12),
              sheared=lambda: ShearedLinear(torch.linalg.qr(torch.randn(8, 8))[0], 12), actnorm=lambda: ActNorm(8), affine=lambda: AffineCoupling(CouplingNet(4, dim_out=8)))

@pytest.mark.parametrize('name', layers)
def test_layers_are_those_of_the_cpu(name, device):
    torch.manual_seed(0)
    f = wild(layers[name]())
    x = to_lattice(torch.randn(3, 5, 8), 12)
    with torch.no_grad():
        y,d = f(x)
        got,back = f.to(device)(x.to(device)),f.inverse(y.to(device))
    assert got[0].device.type==device.type and (got[0].cpu()-y).abs().max()<1e-3 and (got[1].cpu()-d).abs().max()<1e-4
    assert (back[0].cpu()-x).abs().max()<1e-3 and (back[1].cpu()+d).abs().max()<1e-4

@pytest.mark.parametrize('value', [math.nan, math.inf, 1e4])
def test_leaving_the_lattice_is_an_error(value, device):
    m = network('plain').to(device)
    m.backbone.blocks[0].f.pointwise.register_forward_hook(lambda *a: a[-1]+value)
    with torch.no_grad(), pytest.raises(LatticeError): m(texts().to(device))

def test_codec(trained):
    data = TEXT[:500].encode()
    blob = compress(trained, data)
    assert decompress(trained, blob)==data and len(blob)<len(data)

def test_saving_and_loading(trained, tmp_path, device):
    trained.save_pretrained(tmp_path/'m')
    on_cpu,back = (BijectiveDenoiser.from_pretrained(tmp_path/'m', device=d) for d in ('cpu', device))
    assert on_cpu.device.type=='cpu' and back.device.type==device.type
    assert same([p.cpu() for p in back.parameters()], [p.cpu() for p in trained.parameters()])
