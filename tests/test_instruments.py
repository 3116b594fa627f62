"""What watches a training run, against judges of its own: runs without it, losses and gradients written out by hand, forward hooks, dense Jacobians. Faults are planted to see that the judges see them."""
from types import SimpleNamespace
import json, math, random, sys, types
from functools import cache, partial
from pathlib import Path
import numpy as np, pytest, torch
import torch.nn.functional as F
from fastai.basics import SGD, Adam, Callback, CancelFitException, CancelStepException
from fastai.callback.all import GradientAccumulation, GradientClip, ReduceLROnPlateau, SaveModelCallback
from torch import nn
from bijdiff.training import callbacks, instruments
from bijdiff.layers.bijection import Bijection
from bijdiff.layers.block import layer_by_layer
from bijdiff.layers.moe import BijectiveMoE
from bijdiff.diffusion.schedules import HalfCosine
from bijdiff.diffusion.corruption import Corruption
from bijdiff.data.corpora import pydoc_corpus
from bijdiff.data.loaders import text_dls
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.training.noising import CorruptionCallback, DiffusionLoss
from bijdiff.training.callbacks import EMACallback, InvertibilityCallback, LogDetCallback
from bijdiff.training.loop import DiffusionLearner
from bijdiff.training.terms import inversion_nats, ObjectiveCallback
from bijdiff.training.checkpoint import CheckpointCallback
from bijdiff.training.learner import diffusion_learner
from bijdiff.training.experts import ExpertCallback
from bijdiff.training.instruments import BlockNormCallback, parameters_by_block, ProbeCallback, RunLogCallback
from bijdiff.training.instruments import LatticeUsageCallback, TensorBoardCallback

torch.set_num_threads(1)
SMALL,N = dict(d_model=8, n_heads=2, n_layers=2, reversible=False),4                  # N steps an epoch
@cache
def data(seq_len=16, bs=16, chars=1200): return text_dls(pydoc_corpus()[:chars], seq_len=seq_len, bs=bs, device='cpu')    # 66 texts, and 7 held out
def V(): return data().tokenizer.vocab_size
def noise(*shares, **kw): return Corruption(V(), *shares, schedule=HalfCosine(), **kw)

def make(*cbs, config_kwargs={}, dls=None, **kw): return diffusion_learner(dls or data(), config_kwargs=SMALL|config_kwargs, cbs=list(cbs), **kw)
def train(l, epochs=2, lr=1e-2, flat=False):
    with l.no_bar(), l.no_logging(): (l.fit if flat else l.fit_one_cycle)(epochs, lr)
    return l
def fit(*cbs, epochs=2, lr=1e-2, flat=False, **kw): return train(make(*cbs, **kw), epochs, lr, flat)
def weights(l): return {k:v.clone() for k,v in l.model.state_dict().items()}
def wild(m, std=.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in m.parameters(): p.copy_(torch.randn(p.shape, generator=g)*std)
    return m

class Spy(Callback):
    "Looks on at an event, after all others by default"
    def __init__(self, event, f, order=80, train=True): self.order,self.run_valid,self.run_train = order,not train,train; setattr(self, event, lambda: f(self.learn))

class Plug(Callback):
    "Pulls the plug, or cancels"
    def __init__(self, epoch=1, it=2, e=KeyboardInterrupt): self.at,self.e = (epoch, it),e
    def before_batch(self):
        if self.training and (self.epoch, self.iter)==self.at: raise self.e

# Watching changes nothing

def state_of_the_world(): return torch.get_rng_state().numpy().tobytes(), random.getstate(), np.random.get_state()[1].tobytes()
EVERYTHING = dict(cbs=lambda: [EMACallback(.9), GradientAccumulation(32), GradientClip(.05)], config_kwargs=dict(dropout=.3, reversible=True), lambda_likelihood=.1)
SETTINGS = {'plain':{}, 'dropout':dict(config_kwargs=dict(dropout=.3, n_layers=1)), 'average':dict(cbs=lambda: [EMACallback(.9)], config_kwargs=dict(n_layers=1)), 'accumulated':dict(cbs=lambda: [GradientAccumulation(32)], config_kwargs=dict(n_layers=1)),
            'clipped':dict(cbs=lambda: [GradientClip(.05)], config_kwargs=dict(n_layers=1)), 'substitution':dict(corruption=lambda: noise(.5, .5), config_kwargs=dict(dropout=.3, n_layers=1)), 'router':dict(config_kwargs=dict(n_experts=2, k_active=1, router_balance=.1, n_layers=1)), 'everything':EVERYTHING}
INSTRUMENTS = dict(probe=lambda d: [ProbeCallback(2, n_texts=3)], norms=lambda d: [BlockNormCallback(2)], range=lambda d: [LatticeUsageCallback()], log=lambda d: [RunLogCallback(d/'log.jsonl', 2)])
INSTRUMENTS['all'] = lambda d: [cb for k in ('log','range','norms','probe') for cb in INSTRUMENTS[k](d)]

def result(setting, *cbs):
    "Weights, losses, metrics and random states at the end of a run"
    kw = {**SETTINGS[setting]}
    if 'corruption' in kw: kw['corruption'] = kw['corruption']()
    l = fit(*kw.pop('cbs', list)(), *cbs, epochs=1, **kw)
    return weights(l), l.oscillation.losses, [o[:-1] for o in l.recorder.values], state_of_the_world()
@cache
def unwatched(setting): return result(setting)

def differing(a, b):
    (w,*rest),(v,*others) = a,b
    assert w.keys()==v.keys()
    return [k for k in w if not torch.equal(w[k], v[k])] + [n for n,o,p in zip(('losses','metrics','random state'), rest, others) if o!=p]

@pytest.mark.parametrize('setting,which', [(s, 'all') for s in SETTINGS] + [('everything', k) for k in INSTRUMENTS if k!='all'])
def test_watching_changes_nothing(setting, which, tmp_path): assert not differing(result(setting, *INSTRUMENTS[which](tmp_path)), unwatched(setting))

def fault(mp, cls, name, f): mp.setattr(cls, name, (lambda old: lambda self, *a: f(self, partial(old, self), *a))(getattr(cls, name)))
def draws(self, old): torch.rand(1); return old()
def moves(self, old, *a): self.model.output_head.bias.data += 1e-7; return old(*a)
FAULTS = {'probe that draws':(ProbeCallback, '_look', draws, 'probe', 'dropout'), 'log that draws':(RunLogCallback, '_at_step', draws, 'log', 'dropout'), 'norms that move weights':(BlockNormCallback, 'after_step', moves, 'norms', 'plain'),
          'probe in training mode':(ProbeCallback, '_look', lambda self, old: (old(), self.model.eval())[0], 'probe', 'dropout'), 'probe on the shared generator':(ProbeCallback, '_look', lambda self, old: (torch.rand(1, generator=self.learn.corruption.generator), old())[1], 'probe', 'plain')}
@pytest.mark.parametrize('name', FAULTS)
def test_meddling_is_seen(name, monkeypatch, tmp_path):
    cls,method,f,which,setting = FAULTS[name]
    fault(monkeypatch, cls, method, f)
    assert differing(result(setting, *INSTRUMENTS[which](tmp_path)), unwatched(setting))

def test_objective_without_weights_is_not_there():
    assert not hasattr(make(), 'objective') and not any(isinstance(cb, ObjectiveCallback) for cb in make().cbs)
    assert hasattr(make(lambda_invert=.1), 'objective')

class Calm(Callback):
    "One layer trains without dropout, as fastai's BnFreeze does it for batch norms"
    def before_train(self): self.model.backbone.blocks[0].eval()
def test_a_layer_in_evaluation_mode_stays_there():
    a,b = (weights(fit(Calm(), *cbs, epochs=1, config_kwargs=dict(dropout=.5))) for cbs in ([], [ProbeCallback(2)]))
    assert all(torch.equal(a[k], b[k]) for k in a)

# The probe

E,H = .999,math.pi/2                                                           # of the half-cosine
def alpha(t): return 1-E+E*(H*t).cos()
def dalpha(t): return -E*H*(H*t).sin()
def state_probs(t, shares):
    "Kept, masked, substituted, deleted; and their derivatives"
    m,u,d = (c/sum(shares) for c in shares)
    a,da = alpha(t),dalpha(t)
    return [a, m*(1-a), u*(1-a), d*(1-a)],[da, -m*da, -u*da, -d*da]

def tokens_by_hand(logits, x0, z, t, shares, T=None):
    "Nats of each symbol, (B, L): divergence of the true from the modelled reverse jumps, or T times that of posteriors by Bayes' rule"
    n,t = logits.shape[-1],t.double()[:,None,None]
    (k,m,u,d),(dk,dm,du,dd) = state_probs(t, shares)
    at = F.one_hot(z, n+1).bool()
    def mixed(t): (k,m,u,_),_ = state_probs(t, shares); return [torch.cat([k*o+u/n, m.expand(*o.shape[:2], 1)], -1) for o in (F.one_hot(x0, n).double(), logits.double().softmax(-1))]
    if T:
        r = alpha(t)/alpha(t-1/T)                                             # kept from s to t; otherwise redrawn as token or mask
        redrawn = torch.cat([(sum(shares[1:2])/sum(shares)*(1-r)/n).expand(*at.shape[:2], n), (shares[0]/sum(shares)*(1-r)).expand(*at.shape[:2], 1)], -1)
        joint = [o*(r*at+(redrawn*at).sum(-1, keepdim=True)) for o in mixed(t-1/T)]
        q,qhat = (o/o.sum(-1, keepdim=True) for o in joint)
        return T*torch.where(q>0, q*(q.clamp(min=1e-300)/qhat.clamp(min=1e-300)).log(), 0.).sum(-1)
    A = k+m+u                                                                  # rates of redraws from the balances of the kept and the substituted
    out = -dk/k
    to_token = (du+u*out)/A
    rate = torch.where(at[...,-1:], out-to_token, to_token/n)
    true,model = (rate*(o/(o*at).sum(-1, keepdim=True)).masked_fill(at, 0.) for o in mixed(t))
    return (model-true+torch.where(true>0, true*(true.clamp(min=1e-300)/model.clamp(min=1e-300)).log(), 0.)).sum(-1)

def by_hand(l, xt, x0, t, text, gaps, shares, T=None, L=16):
    "Nats per token of a batch from the network in evaluation mode"
    c,mode = l.model.config,l.model.training
    with torch.no_grad(): out = l.model.eval()(xt, t.float() if c.time_conditioning else None, text if c.gap_head else None)
    l.model.train(mode)
    if not c.gap_head: return (tokens_by_hand(out, x0, xt, t, shares, T).sum(1)/L).mean().item()
    nats,t = (tokens_by_hand(out.logits, x0, xt, t, shares)*text).sum(1),t.double()[:,None]
    (k,m,u,d),(*_,dd) = state_probs(t, shares)
    ghat = out.gaps.double().exp()*d/(k+m+u)
    nats = nats + (dd/d*(ghat-gaps-gaps*ghat.log())*F.pad(text, (1, 0), value=True)).sum(1)
    return (nats/L).mean().item()

KINDS = {'masks':((1,0,0), None), 'masks, 20 steps':((1,0,0), 20), 'substitution':((.6,.4,0), None), 'substitution, 7 steps':((.9,.1,0), 7), 'deletion':((.5,0,.5), None), 'all three':((.5,.2,.3), None)}
def probe_input(l, n, T, seed):
    x = torch.stack([l.dls.valid.dataset.ids[16*i:16*i+16] for i in range(n)])
    t = torch.tensor([(i+.5)/n for i in range(n)])
    t = t if T is None else (t*T).ceil()/T
    return x, t, l.corruption.corruption.corrupt(x, t, torch.Generator().manual_seed(seed))

def judge_probe(kind, n=4, seed=3):
    shares,T = KINDS[kind]
    l,seen = make(ProbeCallback(1, n, seed), corruption=noise(*shares, T=T)),[]
    x,t,noisy = probe_input(l, n, T, seed)
    l.add_cb(Spy('after_batch', lambda l: seen.append(by_hand(l, noisy.xt, noisy.x0, t, noisy.text, noisy.gaps, shares, T))))
    train(l, 1)
    assert (noisy.xt==V()).any()==(shares[0]>0) and len(set(seen))==N and noisy.text.all()==(shares[2]==0)
    assert l.probe.losses==pytest.approx(seen, rel=2e-5)
@pytest.mark.parametrize('kind', KINDS)
def test_probe_is_the_loss_by_hand(kind): judge_probe(kind)

@pytest.mark.parametrize('name,f', [('other texts', lambda c, x, *a: (x.roll(1, 0), *a)), ('other times', lambda c, x, t, g: (x, t*.9, g)), ('other noise', lambda c, x, t, g: (x, t, g.manual_seed(4)))])
def test_a_probe_of_something_else_is_seen(name, f, monkeypatch):
    sample = Corruption.corrupt
    def planted(self, x, t, g=None, *a): return sample(self, *(f(self, x, t, g) if len(x)==4 and g.initial_seed()==3 and sys._getframe(1).f_code.co_filename==instruments.__file__ else (x, t, g)), *a)
    monkeypatch.setattr(Corruption, 'corrupt', planted)
    with pytest.raises((AssertionError, ValueError)): judge_probe('masks')    # a text that is not its own clean one costs no bits, and is refused

def still(*cbs, **kw): return fit(ProbeCallback(1), *cbs, lr=0., flat=True, epochs=1, config_kwargs=dict(dropout=.3), **kw).probe.losses
def test_same_weights_same_value():
    for c in (None, noise(.5, .2, .3)): assert len(set(still(corruption=c)))==1
def test_noise_that_is_drawn_again_is_seen(monkeypatch):
    def anew(self, old):
        self.seed += 1
        kept = self.steps,self.losses
        self.before_fit(); self.steps,self.losses = kept
        return old()
    fault(monkeypatch, ProbeCallback, '_look', anew)
    assert len(set(still()))==N
def test_dropout_in_the_probe_would_be_seen(monkeypatch):
    monkeypatch.setattr(BijectiveDenoiser, 'eval', lambda self: self)
    torch.manual_seed(0)
    l = make(ProbeCallback(1), config_kwargs=dict(dropout=.3))
    wild(l.model)
    train(l, 1, 0., True)
    assert len(set(l.probe.losses))>1

def test_texts_of_the_probe():
    l = fit(ProbeCallback(N, n_texts=50), epochs=1)
    assert l.probe.fixed[1][0].shape==(7, 16) and torch.equal(l.probe.fixed[1][0].flatten(), data().valid.dataset.ids[:112])
    for kw,msg in ((dict(every=0), 'every is 0'), (dict(n_texts=0), 'n_texts is 0'), (dict(every=-3), 'every is -3')):
        with pytest.raises(ValueError, match=f'{msg}; expected a whole number of at least 1'): ProbeCallback(**kw)
    for cls in (BlockNormCallback, partial(RunLogCallback, 'x'), partial(TensorBoardCallback, 'x')):
        with pytest.raises(ValueError, match='every is 0; expected a whole number of at least 1'): cls(every=0)

def test_probe_sees_the_weights_of_training_not_their_average():
    l = fit(EMACallback(.9), ProbeCallback(1))
    end,probe = l.probe.losses[-1],l.probe
    assert probe._look()!=end
    l.ema._swap()
    assert probe._look()==end and not l.model.training

def test_steps_over_epochs_and_fits():
    l = fit(ProbeCallback(3), BlockNormCallback(5))
    assert l.probe.steps==[3, 6] and len(l.probe.losses)==2 and [r['step'] for r in l.block_norm.rows]==[5]
    kept = l.probe.losses
    with l.no_bar(): l.validate()
    assert l.probe.losses is kept and len(l.block_norm.rows)==1
    train(l, 1)
    assert l.probe.steps==[3] and l.block_norm.rows==[] and l.probe.losses[0]!=kept[0]

# After an interruption

def watched(d, *cbs, resume=False):
    d.mkdir(exist_ok=True)
    l = make(ProbeCallback(3), BlockNormCallback(3), LatticeUsageCallback(), RunLogCallback(d/'log.jsonl', 2), CheckpointCallback(d, resume=resume), *cbs, config_kwargs=dict(dropout=.2), lambda_likelihood=.01, lambda_invert=.1)
    return train(l)
def records(l): return dict(steps=l.probe.steps, losses=l.probe.losses, rows=l.block_norm.rows, values=l.lattice_usage.values, parts=l.objective.parts)
def lines(path): return [{k:v for k,v in json.loads(l).items() if k!='tokens_per_s'} for l in Path(path).read_text().splitlines()]

def test_records_and_log_after_a_resume(tmp_path):
    a,b = tmp_path/'a',tmp_path/'b'
    with pytest.raises(KeyboardInterrupt): watched(a, Plug(1, 3))
    cut = len(lines(a/'log.jsonl'))
    resumed,whole = watched(a, resume=True),watched(b)
    assert records(resumed)==records(whole) and all(torch.equal(v, weights(whole)[k]) for k,v in weights(resumed).items())
    assert whole.probe.steps==[3, 6] and len(whole.objective.parts)==8 and len(whole.lattice_usage.values)==2
    got,want = lines(a/'log.jsonl'),lines(b/'log.jsonl')
    assert cut==4 and got[:cut]==want[:cut] and got[cut:]==want[3:]           # the line of the epoch that was cut off comes again
    assert [l['step'] for l in got if 'step' in l]==[2, 4, 6, 6, 8] and [l['epoch'] for l in got if 'epoch' in l]==[0, 1]

def savers(): return [SaveModelCallback(monitor='bound', fname='a'), SaveModelCallback(monitor='valid_loss', fname='b')]
def plateau(): return [ReduceLROnPlateau(monitor='valid_loss', patience=1, min_delta=10.)]                        # nothing is good enough for it
STATEFUL = {'two savers':(savers, lambda l: [cb.best for cb in l.cbs if isinstance(cb, SaveModelCallback)], {}), 'reduced rate':(plateau, lambda l: [h['lr'] for h in l.opt.hypers], {}),
            'scaled loss':(list, lambda l: l.loss_scale.scaling, {}), 'experts':(lambda: [ExpertCallback(3)], lambda l: (l.expert.step, l.expert.grads, l.expert.looks), dict(n_experts=2))}
@pytest.mark.parametrize('name', STATEFUL)
def test_callbacks_go_on_after_a_resume(name, tmp_path):
    cbs,state,config_kwargs = STATEFUL[name]
    def run(d, *more, **kw):
        l = make(CheckpointCallback(tmp_path/d, **kw), *cbs(), *more, path=tmp_path/d, config_kwargs=config_kwargs)
        if name=='scaled loss': l.to_fp16(init_scale=2.**40)
        return train(l, 4, 1e-3, flat=True)
    with pytest.raises(KeyboardInterrupt): run('a', Plug(3, 1))
    resumed,whole = run('a', resume=True),run('b')
    assert json.dumps(state(resumed))==json.dumps(state(whole))
    assert all(torch.equal(v, weights(whole)[k]) for k,v in weights(resumed).items())

def test_a_record_that_is_lost_is_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(LatticeUsageCallback, 'saved_attrs', ())
    with pytest.raises(KeyboardInterrupt): watched(tmp_path, Plug(1, 0))
    l = watched(tmp_path, resume=True)
    assert len(l.lattice_usage.values)==1 and len(l.objective.parts)==8

def test_instruments_are_back_after_an_interrupted_lr_find(tmp_path):
    l = make(ProbeCallback(2), Plug(0, 2), path=tmp_path)
    with pytest.raises(KeyboardInterrupt), l.no_bar(): l.lr_find(show_plot=False)
    l.remove_cb(Plug)
    train(l, 1)
    assert len(l.oscillation.losses)==N and l.probe.steps==[2, 4]

# Norms by block

def test_norms_under_a_scaled_loss_are_those_of_the_gradients():
    plain,scaled = (train(change(make(BlockNormCallback(1))), 1).block_norm.rows[0]['gradient'] for change in (DiffusionLearner.to_fp32, partial(DiffusionLearner.to_fp16, init_scale=2.**10)))
    assert any(plain.values()) and all(abs(scaled[k]-v)<=.05*v+1e-4 for k,v in plain.items())

def own_blocks(m):
    "By attribute, not by name"
    b,out = m.backbone,dict(embed=m.embed, entry=m.entry, norm=m.norm, output_head=m.output_head, latent=m.latent, gap_output=m.gap_output)
    layers = [[c] for c in b.layers] if isinstance(b, BijectiveMoE) else [[block, *([b.multiscale[i]] if hasattr(b, 'multiscale') and i<len(b.multiscale) else [])] for i,block in enumerate(b.blocks)]
    return {k:list(v.parameters()) for k,v in out.items() if v is not None and list(v.parameters())} | {f'layer {i}':[p for f in fs for p in f.parameters()] for i,fs in enumerate(layers)}
BLOCKS = dict(stack={}, standard=dict(n_bijective_layers=1), all_standard=dict(n_bijective_layers=0), mixture=dict(n_experts=2), sparse=dict(n_experts=2, k_active=1, couple='every'), scales=dict(enable_multiscale=True),
              half_with_scales=dict(enable_multiscale=True, n_bijective_layers=1), mixture_with_scales=dict(n_experts=2, enable_multiscale=True), latent=dict(latent_density=True), twelve=dict(n_layers=12))
def ids(ps): return sorted(map(id, ps))
def model(**kw): return BijectiveDenoiser(DenoiserConfig(**dict(vocab_size=20, seq_len=16)|SMALL|kw))
@pytest.mark.parametrize('name', BLOCKS)
def test_every_parameter_is_in_its_block(name):
    m = model(**BLOCKS[name])
    got,want = parameters_by_block(m),own_blocks(m)
    assert ids(p for ps in got.values() for p in ps)==ids(m.parameters())
    assert {k:ids(ps) for k,ps in got.items()}=={k:ids(ps) for k,ps in want.items()}

TIMED = {'stack':{}, 'mixture':dict(n_experts=2), 'gaps':dict(gap_head=True, noise=dict(mask=.5, delete=.5))}
@pytest.mark.parametrize('name', TIMED)
def test_every_parameter_is_in_one_block_with_time(name):
    m = model(time_conditioning=True, **TIMED[name])
    assert ids(p for ps in parameters_by_block(m).values() for p in ps)==ids(m.parameters())
@pytest.mark.parametrize('name', TIMED)
def test_the_time_embedding_is_no_layer(name):
    m = model(time_conditioning=True, **TIMED[name])
    got,want = parameters_by_block(m),own_blocks(m)
    assert {k:ids(got[k]) for k in got if k.startswith('layer')}=={k:ids(want[k]) for k in want if k.startswith('layer')}

def norm(ps): return math.sqrt(sum(p.double().square().sum().item() for p in ps))
def judge_norms(n_acc=1, every=1, clip=None, opt=SGD, epochs=1, **kw):
    "Against gradients of every batch by themselves, and weights before and after every step"
    grads,before,after = [],[],[]
    def note(l):
        l.model.train()
        grads.append(torch.autograd.grad(l.loss_func(l.model(*l.xb), *l.yb), list(l.model.parameters())))
    def snap(where): return lambda l: where.append([p.detach().clone() for p in l.model.parameters()])
    l = make(BlockNormCallback(every), Spy('before_batch', note), Spy('before_step', snap(before), order=90), Spy('after_step', snap(after), order=-90), *([GradientAccumulation(16*n_acc)] if n_acc>1 else []), *([GradientClip(clip)] if clip else []), opt_func=opt, **kw)
    wild(l.model.output_head, .1)
    train(l, epochs, .05, flat=True)
    happen = range(n_acc, N*epochs+1, n_acc)
    assert [r['step'] for r in l.block_norm.rows]==[s for s in happen if s%every==0]!=[] and len(before)==len(after)==len(happen)
    number = {id(p):i for i,p in enumerate(l.model.parameters())}
    for r in l.block_norm.rows:
        mean = [torch.stack(g).mean(0) for g in zip(*grads[r['step']-n_acc:r['step']])]
        whole,k = norm(mean),r['step']//n_acc-1
        blocks = own_blocks(l.model)
        assert r['gradient'].keys()==r['update'].keys()==blocks.keys()
        for b,ps in blocks.items():
            at = [number[id(p)] for p in ps]
            size = norm([before[k][i] for i in at])
            assert r['gradient'][b]==pytest.approx(norm([mean[i] for i in at]), rel=1e-4, abs=1e-7)
            if size==0:                                                       # offsets of a mixture begin there
                assert math.isnan(r['update'][b])
                continue
            step = norm([after[k][i]-before[k][i] for i in at])/size
            assert r['update'][b]==pytest.approx(step, rel=1e-4)
            if opt is SGD: assert step*size==pytest.approx(.05*r['gradient'][b]*min(1, (clip or math.inf)/whole), rel=2e-2, abs=1e-7)
        assert clip is None or whole>10*clip
NORMS = {'plain':dict(epochs=2, every=3), 'clipped':dict(clip=.01, config_kwargs=dict(reversible=True)), 'accumulated':dict(n_acc=2), 'accumulated by threes, clipped':dict(n_acc=3, every=2, clip=.01, epochs=2),
         'adam':dict(opt=partial(Adam, eps=1e-8), config_kwargs=dict(n_experts=2, n_layers=1)), 'scales':dict(config_kwargs=dict(enable_multiscale=True, n_layers=1))}
@pytest.mark.parametrize('name', NORMS)
def test_norms_by_block(name): judge_norms(**NORMS[name])

NORM_FAULTS = {'after clipping':(lambda mp: mp.setattr(BlockNormCallback, 'order', 50), 'clipped'), 'before the accumulated step':(lambda mp: mp.setattr(BlockNormCallback, 'order', -50), 'accumulated'),
               'sum of norms':(lambda mp: mp.setattr(instruments, '_norm', lambda ts: sum(t.norm().item() for t in ts)), 'plain'), 'a parameter too few':(lambda mp: mp.setattr(instruments, 'parameters_by_block', lambda m: {k:v[:-1] or v for k,v in parameters_by_block(m).items()}), 'plain')}
@pytest.mark.parametrize('name', NORM_FAULTS)
def test_wrong_norms_are_seen(name, monkeypatch):
    plant,case = NORM_FAULTS[name]
    plant(monkeypatch)
    with pytest.raises((AssertionError, KeyError)): judge_norms(**NORMS[case])

def test_step_that_is_called_off_moves_nothing():
    class CallOff(Callback):
        order = BlockNormCallback.order+1
        def before_step(self):
            if self.iter%2: raise CancelStepException
    for r in fit(BlockNormCallback(1), CallOff()).block_norm.rows: assert (r['step']%2==0)==(not any(r['update'].values())) and any(r['gradient'].values())

# How much of the lattice is in use

def walk(m, h, mask=None, cond=None):
    "States behind each coupling on two streams, without the couplings' own code; gradients pass through the rounding"
    from bijdiff.layers.attention import rotary_angles
    half,bits = h.shape[-1]//2,m.config.lattice_bits
    a,b = h[...,:half],h[...,half:]
    for c in m.backbone.couplings():
        u = c.f(b, rotary=rotary_angles(h.shape[1], m.backbone.d_head, h.device), **({} if mask is None else dict(mask=mask)), **({} if cond is None else dict(cond=cond)))
        if bits is not None: u = u+((u*2**bits).round()/2**bits-u).detach()
        a,b = b,a+u
        yield torch.cat([a, b], -1)

RANGES = dict(stack={}, scales=dict(enable_multiscale=True, n_layers=1), mixture=dict(n_experts=2, n_layers=1), off=dict(lattice_bits=None), coarse=dict(lattice_bits=6))
@pytest.mark.parametrize('name', RANGES)
def test_range_of_the_streams(name):
    first = []
    l = make(LatticeUsageCallback(), Spy('before_batch', lambda l: l.iter or first.append(l.xb[0].clone()), train=False), config_kwargs=RANGES[name])
    wild(l.model.backbone, .2)
    train(l, 1)
    bits,hooked = l.model.config.lattice_bits,[]
    limit = 1. if bits is None else 2.**(24-bits)
    with torch.no_grad():
        h = l.model.eval().state(first[-1])
        own = [y.abs().max().item()/limit for y in walk(l.model, h)]
        hooks = [c.register_forward_hook(lambda m, a, out: hooked.append(out[0].abs().max().item()/limit)) for c in l.model.backbone.couplings()]
        list(layer_by_layer(l.model.backbone, h))
    for o in hooks: o.remove()
    values = l.lattice_usage.values
    assert len(first)==len(values)==1 and len(own)==len(l.model.backbone.couplings())
    assert values[-1]==pytest.approx(own, rel=1e-5)==hooked and l.lattice_usage.value==max(values[-1])

def share(m, xt):
    cb = LatticeUsageCallback()
    cb.values,cb.learn = [],SimpleNamespace(fitting=True)
    with torch.no_grad(): return cb.measure(m, m.eval().state(xt)),cb.values[0]
def test_share_grows_with_the_weights_and_the_lattice():
    xt,m,found = data().valid.dataset.ids[:96].view(6, 16),wild(model(vocab_size=V(), lattice_bits=8), .5),[]
    for scale in (1, 8, 8):
        with torch.no_grad():
            for b in m.backbone.blocks: b.f.pointwise[-1].weight *= scale
        found.append(share(m, xt))
    values = [v for _,v in found]
    assert values[0][-1]*3<values[1][-1] and values[1][-1]*3<values[2][-1]<1 and all(a<b<c for a,b,c in zip(*values)) and [a for a,_ in found]==[max(v) for v in values]
    fine = model(vocab_size=V(), lattice_bits=11)
    fine.load_state_dict(m.state_dict())
    assert share(fine, xt)[1]==pytest.approx([8*o for o in values[2]], rel=2e-2)

def test_standard_layers_have_no_range():
    l = fit(LatticeUsageCallback(), epochs=1, config_kwargs=dict(n_bijective_layers=1))
    assert l.lattice_usage.values==[] and math.isnan(l.lattice_usage.value)

def test_validation_adds_no_range():
    l = fit(LatticeUsageCallback(), epochs=1)
    with l.no_bar(): l.validate()
    assert len(l.lattice_usage.values)==1

# Log-determinants by layer

STACKS = dict(stack={}, scales=dict(enable_multiscale=True), mixture=dict(n_experts=2, couple='every'), sparse=dict(n_experts=3, k_active=1, couple='every'), off=dict(lattice_bits=None))
@pytest.mark.parametrize('timed', [False, True])
@pytest.mark.parametrize('name', STACKS)
def test_layer_by_layer_is_the_stack(name, timed):
    m = wild(model(**STACKS[name], time_conditioning=timed)).eval()
    xt,ctx = torch.arange(32).view(2, 16)%20,dict(mask=torch.arange(16)<torch.tensor([[16], [9]])) | (dict(t=torch.tensor([.2, .9])) if timed else {})
    with torch.no_grad():
        h = m.state(xt)
        states,dets = zip(*layer_by_layer(m.backbone, h, **ctx))
        y,logdet = m.backbone(h, **ctx)
    assert torch.equal(states[-1], y) and len(states)==len(m.backbone.couplings()) and not torch.equal(y, h)
    assert all(d.shape==(2,) and not d.any() for d in dets) and not logdet.any()

def affine_learner(couple, cbs=()):
    "A learner for a mixture whose couplers scale"
    dls = data(4, 32, 300)
    m = BijectiveDenoiser(DenoiserConfig(dls.tokenizer.vocab_size, 4, d_model=4, n_heads=2, n_experts=2, lattice_bits=None))
    m.backbone = BijectiveMoE(2, 4, 2, 1+(couple=='every'), couple, coupler='affine', reversible=False)
    wild(m, .4)
    c = m.corruption
    return DiffusionLearner(dls, m, DiffusionLoss(c, m), opt_func=partial(Adam, eps=1e-8), cbs=[CorruptionCallback(c, n_valid_draws=1), LogDetCallback(), InvertibilityCallback(), *cbs])
def judge_log_det(couple):
    first = []
    l = train(affine_learner(couple, [Spy('before_batch', lambda l: l.iter or first.append(l.xb[0].clone()), train=False)]), 1, 1e-3)
    with torch.no_grad(): h = l.model.double().eval().state(first[-1])
    context,want,B = l.model.backbone._context(h, None, None),[],len(h)
    for c in l.model.backbone.layers:
        flat = lambda v: c(v.view(1, 4, -1), **context)[0].flatten()
        want.append(np.mean([torch.linalg.slogdet(torch.func.jacrev(flat)(v.flatten()))[1].item() for v in h])/4)
        with torch.no_grad(): h = c(h, **context)[0]
    assert l.log_det.per_layer==pytest.approx(want, rel=1e-4, abs=1e-6) and l.log_det.value==pytest.approx(sum(want), rel=1e-4)
    scaling = [role=='coupler' for role in l.model.backbone.roles]
    assert [abs(o)>1e-3 for o in l.log_det.per_layer]==scaling and sum(scaling)==(4 if couple=='every' else 2) and B>1
    assert l.invertibility.value<1e-4
def test_log_determinants_by_layer_are_those_of_dense_jacobians(): judge_log_det('every')
def test_a_wrong_log_determinant_is_seen(monkeypatch):
    monkeypatch.setattr(callbacks, 'layer_by_layer', lambda *a, **kw: ((y, -d) for y,d in layer_by_layer(*a, **kw)))
    with pytest.raises(AssertionError): judge_log_det('final')

# The log

def no_constant(name): raise ValueError(f'{name} is no JSON')
def strict(path): return [json.loads(l, parse_constant=no_constant) for l in Path(path).read_text().splitlines()]
def rounded(o): return pytest.approx(o, rel=1e-6)

def judge_lines(rows, l, every, first_epoch=0):
    "The lines of one fit, against the instruments"
    steps,epochs = [r for r in rows if 'step' in r],[r for r in rows if 'epoch' in r]
    n = len(l.oscillation.losses)
    assert [r['step'] for r in steps]==list(range(every, n+1, every)) and [r['epoch'] for r in epochs]==list(range(n//N))
    probes,norms = dict(zip(l.probe.steps, l.probe.losses)),{r['step']:r for r in l.block_norm.rows}
    for r in steps:
        s = r['step']
        want = dict(step=s, loss=l.oscillation.losses[s-1], lr=l.recorder.lrs[s-1]) | (l.objective.parts[s-1] if hasattr(l, 'objective') else {}) | ({'probe':probes[s]} if s in probes else {})
        if s in norms: want |= {f'{what} of {b}':None if math.isnan(v) else v for what in ('gradient','update') for b,v in norms[s][what].items()}
        assert r==want
    for r,values in zip(epochs, l.recorder.values):
        assert list(r)==['epoch', *l.recorder.metric_names[1:-1]]==['epoch','train_loss','valid_loss','bound','se','log_det','inverse_error','tokens_per_s']
        assert list(r.values())[1:]==rounded([float(v) for v in values])
    assert [set(r) for r in rows if 'epoch' in r]==[set(r) for r in epochs] and rows.index(epochs[0])==N//every

LOGS = {'three terms':dict(lambda_likelihood=.1, lambda_invert=.1), 'averaged, accumulated':dict(cbs=lambda: [EMACallback(.9), GradientAccumulation(48)])}
def judge_log(name, tmp_path):
    kw,path = {**LOGS[name]},tmp_path/'deep'/'in'/'log.jsonl'
    l = fit(RunLogCallback(path, 3), *kw.pop('cbs', list)(), ProbeCallback(2), BlockNormCallback(3), **kw)
    judge_lines(strict(path), l, 3)
    text,n = path.read_text(),len(strict(path))
    assert {'gradient of layer 1','update of norm'}<=set(strict(path)[0]) and 'probe' in strict(path)[2]
    with l.no_bar(): l.validate()
    assert path.read_text()==text
    train(l, 1)                                                               # a second fit
    assert path.read_text().startswith(text) and len(strict(path))==n+2
    judge_lines(strict(path)[n:], l, 3)
@pytest.mark.parametrize('name', LOGS)
def test_log(name, tmp_path): judge_log(name, tmp_path)

def test_wrong_lines_are_seen(monkeypatch, tmp_path):
    fault(monkeypatch, RunLogCallback, '_at_step', lambda self, old: {**old(), 'lr':self.opt.hypers[-1]['lr']*1.001})
    with pytest.raises(AssertionError): judge_log('three terms', tmp_path)
def test_a_log_that_is_begun_anew_is_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(RunLogCallback, 'open', lambda self: (self.path.parent.mkdir(parents=True, exist_ok=True), self.path.write_text('')))
    with pytest.raises(AssertionError): judge_log('averaged, accumulated', tmp_path)

def test_lr_find_is_not_logged(tmp_path):
    l = make(RunLogCallback(tmp_path/'log.jsonl', 1), ProbeCallback(1), path=tmp_path)
    with l.no_bar(), l.no_logging(): l.lr_find(num_it=6, show_plot=False)
    assert not (tmp_path/'log.jsonl').exists() and not hasattr(l.probe, 'steps')
    train(l, 1)
    assert len(strict(tmp_path/'log.jsonl'))==N+1

@pytest.mark.parametrize('kw', [dict(n_valid_draws=1), dict(config_kwargs=dict(n_bijective_layers=1))], ids=['one draw', 'standard layers'])
def test_lines_are_json_where_a_metric_is_not_there(kw, tmp_path):
    fit(RunLogCallback(tmp_path/'log.jsonl', 3), epochs=1, **kw)
    strict(tmp_path/'log.jsonl')

@pytest.fixture
def board(monkeypatch):
    "A TensorBoard that keeps what it is told"
    class SummaryWriter:
        all = []
        def __init__(self, folder): self.folder,self.scalars,self.closed = folder,[],False; self.all.append(self)
        def add_scalar(self, name, value, step): self.scalars.append((name, value, step))
        def close(self): self.closed = True
    m = types.ModuleType('torch.utils.tensorboard')
    m.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', m)
    return SummaryWriter.all

def test_tensorboard_gets_the_numbers_of_the_log(board, tmp_path):
    l = fit(RunLogCallback(tmp_path/'log.jsonl', 2), TensorBoardCallback(tmp_path/'board', 2), ProbeCallback(2), BlockNormCallback(4), lambda_likelihood=.1)
    w, = board
    rows = strict(tmp_path/'log.jsonl')
    assert w.folder==str(tmp_path/'board') and w.closed
    want = [(k, v, r.get('step', N*(r.get('epoch', 0)+1))) for r in rows for k,v in r.items() if k not in ('step','epoch')]
    assert w.scalars==want and {'loss','lr','likelihood','probe','gradient of layer 1','update of embed','bound'}<={k for k,*_ in want}
    with l.no_bar(): l.validate()
    assert len(board)==1

@pytest.mark.parametrize('bs,epochs', [(28, 2), (64, 1)])
def test_epochs_in_tensorboard_are_at_their_last_step(bs, epochs, board, tmp_path):
    dls = text_dls(pydoc_corpus()[:800], seq_len=16, bs=bs, device='cpu')
    l = fit(TensorBoardCallback(tmp_path, 1), epochs=epochs, dls=dls)
    n = len(l.oscillation.losses)//epochs
    assert [s for k,_,s in board[0].scalars if k=='bound']==[n*(e+1) for e in range(epochs)]

def test_without_tensorboard_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    with pytest.raises(ImportError, match='pip install tensorboard'): fit(TensorBoardCallback(tmp_path), epochs=1)

# The objective of three terms

def bits_of(x, bits): return x+((x*2**bits).round()/2**bits-x).detach()
def terms_by_hand(l):
    "Denoising and likelihood term of the batch at hand, with the noise that the network will draw"
    m,(x0,xt,t),state = l.model,l.yb,torch.get_rng_state()
    e = m.embed(l.xb[0])
    e = e/(e.square().mean(-1, keepdim=True)+torch.finfo(e.dtype).eps).sqrt()
    h = torch.cat([e, e], -1)
    h = bits_of(h+.1*torch.randn(h.shape), m.config.lattice_bits)
    torch.set_rng_state(state)
    *_,y = walk(m, h)
    half = y.shape[-1]//2
    logits = m.output_head(F.layer_norm(y[...,:half]+y[...,half:], (half,), m.norm.weight, m.norm.bias))
    nll = -torch.distributions.Normal(m.latent.mu, m.latent.log_s.exp()).log_prob(y).sum(-1).mean()
    return tokens_by_hand(logits, x0, xt, t, (1,0,0)).mean(), nll

def judge_terms(lam=.2, lr=.02, **kw):
    "Terms, loss and weights of every SGD step"
    want,terms,after = [],[],[]
    def note(l):
        ps = list(l.model.parameters())
        d,n = terms_by_hand(l)
        terms.append((d.item(), n.item()))
        grads = [torch.autograd.grad(o, ps, retain_graph=True, allow_unused=True) for o in (d, n)]
        want.append([p.detach()-lr*sum(w*g for w,g in zip((1, lam), gs) if g is not None) for p,gs in zip(ps, zip(*grads))])
    l = make(Spy('before_batch', note), Spy('after_step', lambda l: after.append([p.detach().clone() for p in l.model.parameters()])), opt_func=SGD, lambda_likelihood=lam, **kw)
    wild(l.model.backbone, .1)
    train(l, 1, lr, flat=True)
    for p,(d,n),loss in zip(l.objective.parts, terms, l.oscillation.losses):
        assert p==pytest.approx(dict(denoise=d, likelihood=n), rel=1e-4) and loss==pytest.approx(d+lam*n, rel=1e-4)
    for got,w in zip(after, want):
        for a,b in zip(got, w): assert (a-b).abs().max()<=2e-5*max(1, b.abs().max())
    assert len(l.objective.parts)==len(after)==N
@pytest.mark.parametrize('reversible', [True, False])
def test_loss_and_step_with_the_likelihood_by_hand(reversible): judge_terms(config_kwargs=dict(reversible=reversible))
def test_a_wrong_weight_is_seen(monkeypatch):
    monkeypatch.setattr(ObjectiveCallback, 'weights', property(lambda self: dict(denoise=1., likelihood=self.lambda_likelihood/2, invert=0.)))
    with pytest.raises(AssertionError): judge_terms()
def test_an_objective_that_is_only_recorded_is_seen(monkeypatch):
    def after_loss(self, old):
        before = self.learn.loss_grad
        old(); self.learn.loss_grad = before
    fault(monkeypatch, ObjectiveCallback, 'after_loss', after_loss)
    with pytest.raises(AssertionError): judge_terms()

@pytest.mark.parametrize('lam', [(.1, 0.), (0., .1), (.2, .3)])
def test_total_and_shares(lam):
    l = fit(*[GradientAccumulation(32)]*(lam[0]==.2), epochs=1, lambda_likelihood=lam[0], lambda_invert=lam[1])
    o,names = l.objective,['denoise'] + ['likelihood']*(lam[0]>0) + ['invert']*(lam[1]>0)
    assert all(list(p)==names for p in o.parts) and len(o.parts)==N
    assert l.oscillation.losses==pytest.approx([p['denoise']+lam[0]*p.get('likelihood', 0)+lam[1]*p.get('invert', 0) for p in o.parts], rel=1e-6)
    s = o.fractions()
    assert sum(s.values())==pytest.approx(1) and list(s)==names and s.get('invert', 0.)==0
    size = [[abs(w*p[k]) for k,w in dict(denoise=1, likelihood=lam[0], invert=lam[1]).items() if k in p] for p in o.parts]
    assert list(s.values())==pytest.approx([sum(r[i]/sum(r) for r in size)/N for i in range(len(names))])
    assert l.model.latent is None or not hasattr(l.model, 'latent_nll') or l.model.latent_nll is None

@pytest.mark.parametrize('kw', [{}, dict(config_kwargs=dict(dropout=.3, enable_multiscale=True, n_layers=1)), dict(config_kwargs=dict(n_experts=2, k_active=1, n_layers=1))], ids=['stack', 'scales', 'sparse'])
def test_inverse_term_of_an_exact_model_is_nothing(kw):
    a,b = fit(epochs=1, **kw),fit(epochs=1, lambda_invert=.5, **kw)
    assert [p['invert'] for p in b.objective.parts]==[0.]*N and a.oscillation.losses==b.oscillation.losses==[p['denoise'] for p in b.objective.parts]
    assert all(torch.equal(v, weights(b)[k]) for k,v in weights(a).items()) and not b.objective.hooks

class LearnedInverse(Bijection):
    "A linear map and another that is to undo it, both moved by a vector of the context"
    inverts_exactly = False
    def __init__(self, d, cond=None):
        super().__init__()
        g = torch.Generator().manual_seed(7)
        self.W,self.U = (nn.Parameter(torch.eye(d)+.3*torch.randn(d, d, generator=g)/d**.5) for _ in range(2))
        self.shift = None if cond is None else nn.Parameter(torch.randn(cond, d, generator=g))
    def forward(self, x, cond=None, **context): return x@self.W + (0 if self.shift is None else (cond@self.shift)[:,None]), x.new_zeros(len(x))
    def inverse(self, y, cond=None, **context): return y@self.U, y.new_zeros(len(y))
class First(nn.Module):
    "The state alone of what a component gives, behind what was there"
    def __init__(self, f, inner=nn.Identity()): super().__init__(); self.f,self.inner = f,inner
    def forward(self, x, *args): return self.f(self.inner(x, *args), *(args if self.f.shift is not None else ()))[0]

def behind_embedding(m): m.entry = First(LearnedInverse(16))
def in_block(m): mixer = m.backbone.blocks[0].f.mixer; mixer.mlp_norm = First(LearnedInverse(8), mixer.mlp_norm)
def told_the_time(m): mixer = m.backbone.blocks[0].f.mixer; mixer.mlp_norm = First(LearnedInverse(8, 8), mixer.mlp_norm)
def in_mlp(m): m.backbone.blocks[0].f.pointwise.insert(1, First(LearnedInverse(32)))
def component(l): return next(m for m in l.model.modules() if isinstance(m, LearnedInverse))
def bad(*cbs, where=behind_embedding, reversible=False, lam=.1, std=None, config_kwargs={}, **kw):
    l = make(*cbs, ObjectiveCallback(lambda_invert=lam), config_kwargs=dict(lattice_bits=None, reversible=reversible)|config_kwargs, **kw)
    if std: wild(l.model.backbone.blocks, std)
    where(l.model)
    return l
def terms(l): return [p['invert'] for p in l.objective.parts]

def test_error_of_a_bad_inverse_falls():
    states,(l,without) = [],(bad(reversible=True, lam=o) for o in (.1, 0.))
    component(l).register_forward_pre_hook(lambda m, a: states.append(a[0].detach()))
    for o in (l, without): train(o, 2, .05)
    left = [inversion_nats(component(o), states[0]).item() for o in (l, without)]
    assert terms(l)[-1]<terms(l)[0]/3 and left[0]<left[1]/3 and len(terms(l))==2*N
    assert 'invert' not in without.objective.parts[0] and without.oscillation.losses==[p['denoise'] for p in without.objective.parts]

def gradients(lam, where, **kw):
    "Of the first batch, by name; and the states that the component was given first"
    grads,states = [],[]
    l = bad(Plug(0, 1, CancelFitException), Spy('after_backward', lambda l: grads.append({n:None if p.grad is None else p.grad.clone() for n,p in l.model.named_parameters()})), where=where, lam=lam, std=.2, **kw)
    component(l).register_forward_pre_hook(lambda m, a: states.append(a[0].detach()))
    train(l, 1)
    return l, grads[0], states[0]
def judge_gradients(where, lam=.5, **kw):
    (l,a,h),(_,b,_) = (gradients(o, where, **kw) for o in (lam, 0.))
    f = bad(where=where, lam=lam, **kw)
    W,U = (o.detach() for o in (component(f).W, component(f).U))                # as they were at the first batch
    h = h.flatten(0, -2)
    r = h@W@U-h
    want = {'W':h.T@r@U.T*lam/len(h), 'U':(h@W).T@r*lam/len(h)}
    assert terms(l)[0]==pytest.approx(r.square().sum().item()/2/len(h), rel=1e-5)
    for n in a:
        x = a[n] if b[n] is None or a[n] is None else a[n]-b[n]
        if n.split('.')[-1] in want: assert (x-want.pop(n.split('.')[-1])).abs().max()<1e-5
        else: assert x is None or not x.any(), n
    assert not want
@pytest.mark.parametrize('reversible', [False, True])
@pytest.mark.parametrize('where', [behind_embedding, in_block])
def test_only_the_component_gets_a_gradient_from_the_term(where, reversible): judge_gradients(where, reversible=reversible)
def test_states_that_are_not_taken_as_given_are_seen(monkeypatch):
    monkeypatch.setattr(ObjectiveCallback, '_note', lambda self, m, args, kw: self.seen.setdefault(m, (args, kw)) and None)
    with pytest.raises((AssertionError, RuntimeError)): judge_gradients(behind_embedding)

@pytest.mark.parametrize('reversible', [False, True])
def test_no_gradient_through_the_context(reversible):
    a,b = (gradients(o, told_the_time, reversible=reversible, corruption=noise(.5, .5))[1] for o in (.5, 0.))
    for n in a:
        if n.startswith('backbone.time'): assert torch.allclose(a[n], b[n], atol=1e-6)

@pytest.mark.parametrize('where', [behind_embedding, in_block])
def test_inverse_term_of_reversible_layers_is_the_same(where):
    a,b = (terms(train(bad(where=where, reversible=r), 1, .03)) for r in (True, False))
    assert a==pytest.approx(b, rel=1e-3) and len(set(a))==N and a[-1]<a[0]

@pytest.mark.parametrize('where,reversible', [(behind_embedding, False), (in_block, True), (in_mlp, False)])
def test_inverse_term_under_autocast(where, reversible):
    low,full = (train(l, 1) for l in (bad(where=where, reversible=reversible).to_bf16(), bad(where=where, reversible=reversible)))
    assert np.isfinite(terms(low)).all() and terms(low)==pytest.approx(terms(full), rel=.15) and low.oscillation.losses!=full.oscillation.losses
def test_likelihood_under_autocast():
    low,full = (train(l, 1) for l in (make(lambda_likelihood=.1).to_bf16(), make(lambda_likelihood=.1)))
    assert [p['likelihood'] for p in low.objective.parts]==pytest.approx([p['likelihood'] for p in full.objective.parts], rel=.05) and low.oscillation.losses!=full.oscillation.losses

def hooked(l): return len(component(l)._forward_pre_hooks)
@pytest.mark.parametrize('e', [None, CancelFitException])
def test_hooks_are_gone_afterwards(e):
    l,during = bad(*([Plug(0, 3, e)] if e else [])),[]
    l.add_cb(Spy('after_batch', lambda l: during.append(hooked(l))))
    train(l, 1)
    assert set(during)=={1} and hooked(l)==0
@pytest.mark.parametrize('again', [False, True])
def test_hooks_are_gone_after_an_interruption(again):
    l = bad(Plug(0, 3))
    with pytest.raises(KeyboardInterrupt): train(l, 1)
    l.remove_cb(Plug)
    if again: train(l, 1)
    assert hooked(l)==0

def test_lr_find_leaves_terms_alone(tmp_path):
    l = bad(path=tmp_path)
    with l.no_bar(), l.no_logging(): l.lr_find(num_it=6, show_plot=False)
    assert not hasattr(l.objective, 'parts') and hooked(l)==0
    train(l, 1)
    parts = [dict(p) for p in l.objective.parts]
    with l.no_bar(), l.no_logging(): l.lr_find(num_it=6, show_plot=False)
    assert l.objective.parts==parts and len(parts)==N and hooked(l)==0 and len(l.recorder.losses)>N
def test_validation_leaves_terms_alone():
    l = fit(lambda_likelihood=.1, epochs=1)
    with l.no_bar(): l.validate()
    assert len(l.objective.parts)==N and sum(l.objective.fractions().values())==pytest.approx(1)
