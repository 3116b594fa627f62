"""Helpers of the tests of training."""
import re
from functools import cache, partial
import pytest
import torch
from fastai.basics import Callback
from bijdiff.data.corpora import pydoc_corpus
from bijdiff.data.loaders import text_dls
from bijdiff.diffusion.corruption import Corruption
from bijdiff.layers.attention import rotary_angles
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.testing import quiet_fit
from bijdiff.training.learner import diffusion_learner

SMALL = dict(d_model=8, n_heads=2, n_layers=2, reversible=False)
N_STEPS = 4 # Steps of an epoch on the data of small_dls

def rejects(name, error=ValueError):
    "Expect an error whose message names an argument"
    return pytest.raises(error, match=rf'\b{re.escape(name)}\b')

@cache
def small_dls(seq_len=16, bs=16, n_chars=1200):
    "DataLoaders of 66 training and 7 held-out sequences of 16 characters"
    return text_dls(pydoc_corpus()[:n_chars], seq_len=seq_len, bs=bs, device='cpu')

def vocab_size(): return small_dls().tokenizer.vocab_size

def small_noise(*weights, **kwargs):
    "A corruption with weights of masking, substitution and deletion, on the vocabulary of small_dls"
    return Corruption(vocab_size(), *weights, **kwargs)

def small_model(**config_kwargs):
    "A denoiser with fresh weights"
    return BijectiveDenoiser(DenoiserConfig(**dict(vocab_size=20, seq_len=16)|SMALL|config_kwargs))

def tiny_learner(*cbs, config_kwargs={}, dls=None, **kwargs):
    "A learner by `diffusion_learner`, for a network of two blocks of width 8"
    return diffusion_learner(dls or small_dls(), config_kwargs=SMALL|config_kwargs, cbs=list(cbs), **kwargs)

def train(learn, epochs=2, lr=1e-2, flat=False):
    "Train without any display, in one cycle or at a constant learning rate"
    if not flat: return quiet_fit(learn, epochs, lr)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, lr)
    return learn

def fit(*cbs, epochs=2, lr=1e-2, flat=False, **kwargs):
    "Train a `tiny_learner`"
    return train(tiny_learner(*cbs, **kwargs), epochs, lr, flat)

def short_lr_find(learn):
    "Run `lr_find` for six steps without any display"
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=6, show_plot=False)

def state_copy(learn):
    "A copy of the weights and buffers, by name"
    return {k:v.clone() for k,v in learn.model.state_dict().items()}

def differing_weights(a, b):
    "Names of the tensors that differ in two state dicts"
    assert a.keys()==b.keys()
    return [k for k in a if not torch.equal(a[k], b[k])]

def same_weights(a, b):
    "Return True if two learners have the same weights, bit by bit"
    return not differing_weights(state_copy(a), state_copy(b))

class OnEvent(Callback):
    "Call a function with the learner at one event, after all other callbacks by default"
    def __init__(self, event, f, order=80, train=True):
        self.order,self.run_train,self.run_valid = order,train,not train
        setattr(self, event, lambda: f(self.learn))

class StopAt(Callback):
    "Raise an error before one training batch"
    def __init__(self, epoch=1, it=2, error=KeyboardInterrupt):
        self.at,self.error = (epoch, it),error
    def before_batch(self):
        if self.training and (self.epoch, self.iter)==self.at: raise self.error

def wrap_method(monkeypatch, cls, name, wrapper):
    "Replace a method by wrapper(self, method, *args), where method is the bound original"
    old = getattr(cls, name)
    monkeypatch.setattr(cls, name, lambda self, *args: wrapper(self, partial(old, self), *args))

def round_to_lattice(x, bits):
    "Round to multiples of 2^-bits; gradients pass through the rounding"
    return x+((x*2**bits).round()/2**bits-x).detach()

def coupling_states(model, h):
    """States after each coupling (a, b) -> (b, a+f(b)) of two streams, without the couplings' own code.
    Gradients pass through the rounding to the lattice."""
    half,bits = h.shape[-1]//2,model.config.lattice_bits
    rotary = rotary_angles(h.shape[1], model.backbone.d_head, h.device)
    a,b = h[...,:half],h[...,half:]
    for coupling in model.backbone.couplings():
        update = coupling.f(b, rotary=rotary)
        if bits is not None: update = round_to_lattice(update, bits)
        a,b = b,a+update
        yield torch.cat([a, b], -1)
