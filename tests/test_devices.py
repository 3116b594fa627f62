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

def network(kind, **fields): return wild(BijectiveDenoiser(DenoiserConfig(V, L, 16, 2, 2, **kinds[kind], **fields)))
def texts(n=3, seed=0): return torch.randint(0, V+1, (n, L), generator=torch.Generator().manual_seed(seed))
def times(m, n, device): return torch.linspace(.2, .8, n, device=device) if m.config.time_conditioning else None

def learner(device, shares=None, **kw):
    "A small one; a noise by its shares"
    dls = text_dls(TEXT, seq_len=L, bs=32, device=device)
    if shares: kw['corruption'] = Corruption(dls.tokenizer.vocab_size, **shares)
    fields = {'d_model':16, 'n_heads':2, 'n_layers':2, **kw.pop('fields', {})}
    return diffusion_learner(dls, seed=1, n_valid_draws=1, fields=fields, **kw)

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

@pytest.mark.parametrize('autocast', [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('kind', stacks)
def test_inverse_is_exact(kind, autocast, device):
    m = network(kind).to(device)
    s = m.state(texts().to(device))
    ctx = m.context(s)
    with torch.no_grad(), torch.autocast(device.type, autocast) if autocast else nullcontext():
        y = m.backbone(s, **ctx)[0]
        assert torch.equal(m.backbone.inverse(y, **ctx)[0], s) and not torch.equal(y, s)

@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('kind', stacks)
def test_reversible_backward_gives_the_gradients_of_stored_activations(kind, autocast, device):
    got,want = [],[]
    for grads,reversible in (got, True), (want, False):
        m = network(kind, dropout=.3, reversible=reversible).to(device).train()
        torch.manual_seed(3)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast): loss = m(texts().to(device), times(m, 3, device)).float().sin().sum()
        loss.backward()
        grads += [p.grad.cpu() for p in m.parameters() if p.grad is not None]
    scale = max(w.abs().max() for w in want)
    assert len(got)==len(want) and all((g-w).abs().max() <= 1e-3*scale for g,w in zip(got, want))      # not bit by bit: sums on an accelerator may come in another order

@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
def test_training_learns(precision, device):
    learn = learner(device)
    if precision=='bfloat16': learn.to_bf16()
    losses = quiet_fit(learn, 3).recorder.losses
    assert learn.model.device.type==device.type and float(sum(losses[-10:])) < .95*float(sum(losses[:10]))

def test_training_in_half_precision_with_scaled_loss(device):
    if device.type!='cuda': pytest.skip('loss scaling is of use on CUDA only')
    losses = quiet_fit(learner(device).to_fp16(), 3).recorder.losses
    assert float(sum(losses[-10:])) < .95*float(sum(losses[:10]))

def test_all_instruments_and_terms(device):
    learn = learner(device, lambda_likelihood=.01, lambda_invert=.1, fields=dict(n_experts=2), cbs=[ProbeCallback(3), BlockNormCallback(3), StreamRangeCallback(), ExpertCallback(5), EMACallback(.9), GradientClip(1.)])
    quiet_fit(learn)
    assert len(learn.probe.losses)>1 and learn.block_norm.rows and learn.stream_range.values and learn.log_det.value==0. and learn.invertibility.value==0.
    assert all(math.isfinite(v) and v>0 for v in learn.probe.losses)

class StopAfterFirst(Callback):
    "Interrupt behind the first checkpoint"
    order = CheckpointCallback.order+1
    def after_epoch(self): raise CancelFitException

def test_a_resumed_training_ends_with_the_same_weights(tmp_path, device):
    def run(folder, *cbs, resume=False): return quiet_fit(learner(device, fields=dict(dropout=.2), cbs=[CheckpointCallback(folder, resume=resume), *cbs]), 3)
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

@pytest.mark.parametrize('shares', [dict(mask=0., substitute=1.), dict(mask=.5, substitute=.5), dict(mask=.8, delete=.2)], ids=['uniform', 'both', 'deletion'])
def test_other_noises(shares, device):
    learn = quiet_fit(learner(device, shares), 1)
    m,x = learn.model,learn.dls.valid.one_batch()[0][:2]
    out = sample(m, 2, steps=6, seed=0)
    assert len(out)==2 and all((o<m.config.vocab_size).all() for o in out) and math.isfinite(learn.recorder.values[-1][1])
    assert nelbo(m, x, n=4).mean.isfinite().all()

def test_objective_of_scores(device):
    learn = learner(device, dict(mask=0., substitute=1.), objective='score_entropy', fields=dict(score_head=True))
    assert math.isfinite(quiet_fit(learn).recorder.values[-1][1]) and sample(learn.model, 2, steps=6, sampler='tweedie').shape==(2, L)

def test_likelihoods(trained):
    x,on_cpu = torch.tensor(trained.tokenizer.encode(TEXT)[:4*L]).view(4, L),deepcopy(trained).cpu()
    for rule in ('spread', 'left_to_right'): assert (log_prob(trained, x, rule).cpu()-log_prob(on_cpu, x, rule)).abs().max() < .05
    a,b = score_ids(trained, x.flatten(), n=8),score_ids(on_cpu, x.flatten(), n=8)
    assert a.nats==pytest.approx(b.nats, rel=.01)                                      # the same masks: they are drawn on the CPU

def test_codec(trained):
    data = TEXT[:500].encode()
    blob = compress(trained, data)
    assert decompress(trained, blob)==data and len(blob)<len(data)

def test_saving_and_loading(trained, tmp_path, device):
    trained.save_pretrained(tmp_path/'m')
    on_cpu,back = (BijectiveDenoiser.from_pretrained(tmp_path/'m', device=d) for d in ('cpu', device))
    assert on_cpu.device.type=='cpu' and back.device.type==device.type
    assert same([p.cpu() for p in back.parameters()], [p.cpu() for p in trained.parameters()])
