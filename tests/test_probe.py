"""The loss of a held-out batch with fixed noise, against the loss written out by hand. Faults are planted."""
import sys
from contextlib import nullcontext
import pytest, torch
from fastai.basics import Callback
from bijdiff.diffusion.corruption import Corruption
from bijdiff.training import instruments
from bijdiff.training.callbacks import EMACallback
from bijdiff.training.instruments import ProbeCallback
from helpers import seeded_weights
from training_helpers import fit, N_STEPS, OnEvent, rejects, same_weights, small_dls, small_noise
from training_helpers import tiny_learner, train, vocab_size, wrap_method
from loss_by_hand import batch_loss

torch.set_num_threads(1)
SEED,N_TEXTS = 3,4                                   # of the probe under test

# The value

def held_out(n):
    "The first n held-out sequences, (n, 16)"
    return small_dls().valid.dataset.ids[:16*n].view(n, 16)

def probe_input(learn, n, T):
    "Sequences, times (i+1/2)/n, rounded up to steps of 1/T, and noisy sequences of a probe"
    x = held_out(n)
    t = torch.tensor([(i+.5)/n for i in range(n)])
    if T is not None: t = (t*T).ceil()/T
    return t, learn.corruption.corruption.corrupt(x, t, torch.Generator().manual_seed(SEED))

KINDS = { # weights of masking, substitution and deletion; steps
    'masks':                 ((1, 0, 0), None),
    'masks, 20 steps':       ((1, 0, 0), 20),
    'substitution':          ((.6, .4, 0), None),
    'substitution, 7 steps': ((.9, .1, 0), 7),
    'deletion':              ((.5, 0, .5), None),
    'all three':             ((.5, .2, .3), None),
}

def check_probe(kind):
    "Compare the losses of a probe after every step with those by hand"
    weights,T = KINDS[kind]
    noise = small_noise(*weights, T=T)
    learn = tiny_learner(ProbeCallback(1, N_TEXTS, SEED), corruption=noise, optimizer='adam')
    t,noisy = probe_input(learn, N_TEXTS, T)
    want = []
    learn.add_cb(OnEvent('after_batch', lambda l: want.append(batch_loss(l, noisy, t, weights, T))))
    train(learn, 1)
    assert (noisy.xt==vocab_size()).any()==(weights[0]>0)
    assert noisy.attention_mask.all()==(weights[2]==0)
    assert len(set(want))==N_STEPS
    assert learn.probe.losses==pytest.approx(want, rel=2e-5)

@pytest.mark.parametrize('kind', KINDS)
def test_probe_is_the_loss_by_hand(kind): check_probe(kind)

def other_sequences(x, t, g): return x.roll(1, 0), t, g
def other_times(x, t, g): return x, t*.9, g
def other_noise(x, t, g): return x, t, g.manual_seed(SEED+1)

@pytest.mark.parametrize('fault', [other_sequences, other_times, other_noise])
def test_a_probe_of_something_else_is_seen(fault, monkeypatch):
    corrupt = Corruption.corrupt
    def planted(self, x, t, g=None, *args, **kwargs):
        by_instruments = sys._getframe(1).f_code.co_filename==instruments.__file__
        if by_instruments and len(x)==N_TEXTS and g.initial_seed()==SEED: x,t,g = fault(x, t, g)
        return corrupt(self, x, t, g, *args, **kwargs)
    monkeypatch.setattr(Corruption, 'corrupt', planted)
    with pytest.raises((AssertionError, ValueError)):           # ValueError: noisy ids of another sequence
        check_probe('masks')

# The same weights, the same value

def losses_of_still_weights(**kwargs):
    "Losses of the probe when the learning rate is 0"
    learn = fit(ProbeCallback(1), lr=0., flat=True, epochs=1, config_kwargs=dict(dropout=.3), **kwargs)
    return learn.probe.losses

def test_same_weights_same_value():
    for corruption in (None, small_noise(.5, .2, .3)):
        assert len(set(losses_of_still_weights(corruption=corruption)))==1

def resample_the_noise(self, measure):
    self.seed += 1
    recorded = self.steps,self.losses
    self.before_fit()
    self.steps,self.losses = recorded
    return measure()

def test_noise_that_is_drawn_again_is_seen(monkeypatch):
    wrap_method(monkeypatch, ProbeCallback, '_measure', resample_the_noise)
    assert len(set(losses_of_still_weights()))==N_STEPS

def test_dropout_in_the_probe_would_be_seen(monkeypatch):
    monkeypatch.setattr(instruments, 'eval_mode', nullcontext)
    torch.manual_seed(0)
    learn = tiny_learner(ProbeCallback(1), config_kwargs=dict(dropout=.3))
    seeded_weights(learn.model)
    train(learn, 1, 0., flat=True)
    assert len(set(learn.probe.losses))>1

# Which sequences, which weights, when

def test_the_probe_takes_the_first_held_out_sequences():
    learn = fit(ProbeCallback(N_STEPS, n_texts=50), epochs=1)
    _,(x,*_) = learn.probe.fixed
    assert torch.equal(x, held_out(7))

@pytest.mark.parametrize('name,value', [('every', 0), ('n_texts', 0), ('every', -3)])
def test_the_probe_rejects_what_is_not_a_positive_whole_number(name, value):
    with rejects(name): ProbeCallback(**{name:value})

def test_probe_sees_the_weights_of_training_not_their_average():
    learn = fit(EMACallback(.9), ProbeCallback(1))
    probe,last = learn.probe,learn.probe.losses[-1]
    assert probe._measure()!=last
    learn.ema._swap()
    assert probe._measure()==last
    assert not learn.model.training

class LayerWithoutDropout(Callback):
    "Train one layer in evaluation mode, as fastai's BnFreeze does with batch norms"
    def before_train(self): self.model.backbone.blocks[0].eval()

def test_a_layer_in_evaluation_mode_stays_there():
    def run(*cbs): return fit(LayerWithoutDropout(), *cbs, epochs=1, config_kwargs=dict(dropout=.5))
    assert same_weights(run(), run(ProbeCallback(2)))
