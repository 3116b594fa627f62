"""Helpers that several test files share. None of them needs fastai."""
import math
import time
from contextlib import contextmanager, ExitStack
from typing import NamedTuple
import numpy as np
import torch
from torch import nn
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from bijdiff.diffusion.corruption import Corruption
from bijdiff.likelihood.exact import log_prob
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser, DenoiserOutput, Features
from bijdiff.testing import chi_square, random_weights

# Switches of PyTorch

@contextmanager
def switched(get, put, value):
    "A region with another value of a switch"
    before = get()
    put(value)
    try: yield
    finally: put(before)

def with_threads(n): return switched(torch.get_num_threads, torch.set_num_threads, n)
def get_onednn(): return torch.backends.mkldnn.enabled
def set_onednn(on): torch.backends.mkldnn.enabled = on
precision = torch.get_float32_matmul_precision,torch.set_float32_matmul_precision

# Regions in which PyTorch computes otherwise, by name
CONDITIONS = dict(
    two_threads=lambda: with_threads(2),
    without_onednn=lambda: switched(get_onednn, set_onednn, False),
    float64_by_default=lambda: switched(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    autocast=lambda: torch.autocast('cpu', torch.bfloat16),
    medium_precision=lambda: switched(*precision, 'medium'),
    flushed_subnormals=lambda: switched(lambda: False, torch.set_flush_denormal, True),
)

@contextmanager
def all_at_once():
    "A region with all of these conditions"
    with ExitStack() as stack:
        for region in CONDITIONS.values(): stack.enter_context(region())
        yield

# layers and mixtures

def plant_fault(monkeypatch, target, fault):
    "Replace a function, a pair of its owner and its name, by `fault(function)`, a wrong version of it"
    monkeypatch.setattr(*target, fault(getattr(*target)))

def draw_weights(m, std=.4, seed=0):
    "Seed the global generator and draw all parameters from N(0, std^2)"
    torch.manual_seed(seed)
    for p in m.parameters(): nn.init.normal_(p, std=std)
    return m

def seeded_weights(m, std=.3, seed=0):
    "Draw all parameters from N(0, std^2), leaving the global generator as it was"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return random_weights(m, std)

def assert_equal(a, b, what):
    "Assert that two tensors have the same shape and the same values"
    assert a.shape==b.shape and torch.equal(a, b), what

def assert_close(a, b, tol, what):
    "Assert that two tensors have the same shape and differ by less than `tol`"
    assert a.shape==b.shape and (a-b).abs().max()<tol, what

def assert_on_lattice(x, bits):
    "Assert that all numbers are multiples of 2^-bits"
    assert_equal((x*2.**bits).round(), x*2.**bits, 'on the lattice')

def first_tokens(L, *lengths):
    "Mask of sequences of L positions with padding after the given numbers of tokens"
    return torch.arange(L)<torch.tensor(lengths)[:,None]

def random_context(B, L, masked=False, timed=False):
    "A mask with padding anywhere, which some sequences consist of, and times"
    context = {}
    if masked: context['mask'] = torch.rand(B, L)<torch.rand(B, 1)*1.5-.25
    if timed: context['t'] = torch.rand(B)
    return context

def storage_bytes(tensors):
    "Sizes in bytes of the storages of tensors, by their addresses"
    return {t.untyped_storage().data_ptr():t.untyped_storage().nbytes() for t in tensors}

# noise, losses and sampling

def float64(*values):
    "Return a tensor of these numbers"
    return torch.tensor(values, dtype=torch.float64)

def seeded_generator(seed):
    "Return a generator of random numbers with this seed"
    return torch.Generator().manual_seed(seed)

def derivative(f, t, d=1e-4):
    "Return f'(t) by the five-point formula (8 (f(t+d)-f(t-d)) - f(t+2d) + f(t-2d)) / 12d"
    return (8*(f(t+d)-f(t-d))-f(t+2*d)+f(t-2*d))/(12*d)

def assert_drawn_from(counts, p, n_tests):
    "Assert that counts fit probabilities; by chance this fails in one of 1,000 runs of `n_tests` such tests"
    value = chi_square(counts, p)
    assert value>1e-3/n_tests, f'p-value {value:.1e}'

def count_sequences(x, n_symbols):
    "Count each sequence of the symbols 0 to n_symbols-1 in x, (n, L); in the order of itertools.product"
    L = x.shape[1]
    code = x@n_symbols**torch.arange(L).flip(0)
    return np.bincount(code.numpy(), minlength=n_symbols**L)

def assert_given_kept(x, template, mask_id):
    "Assert that all tokens are clean, and that those given in the template, (L,), are unchanged"
    assert (x<mask_id).all(), 'masks are left'
    for i,given in enumerate(template):
        if given<mask_id: assert (x[:,i]==given).all(), 'given tokens are changed'

def cut_tail(p, top_p):
    "Set to 0 what comes after the likeliest outcomes have reached `top_p` together, (V,)"
    p,total = p.copy(),0.
    for i in np.argsort(-p, kind='stable'):
        if total>=top_p: p[i] = 0
        total += p[i]
    return p

def tempered_probs(logits, temperature=1., top_p=1.):
    "Softmax of logits/temperature, (..., V), cut to the likeliest tokens and normalised again"
    p = np.exp(logits/temperature)
    p /= p.sum(-1, keepdims=True)
    if top_p<1: p = np.apply_along_axis(cut_tail, -1, p, top_p)
    return p/p.sum(-1, keepdims=True)

def warmer(token_probs):
    "Fault: temperatures that are a tenth too high"
    return lambda logits, temperature=1., top_p=1.: token_probs(logits, 1.1*temperature, top_p)

def of_sampled_tokens(confidence):
    "Fault: the probability of a sampled token, in place of the largest probability"
    return lambda probs, rule: probs.gather(-1, torch.multinomial(probs, 1))[...,0]

class Noise(NamedTuple):
    "A corruption, its state probabilities by hand, and further fields of its denoiser's configuration"
    corruption:Corruption
    state_probs:object # Function of the time: that a token is kept, masked, substituted, deleted
    config_kwargs:dict

def fixed_weights(alpha, mask, substitute, delete=0.):
    "Probabilities that a token is kept, masked, substituted, deleted: alpha(t), and weight*(1-alpha(t)) each"
    def state_probs(t):
        lost = 1-alpha(t)
        return np.array([alpha(t), mask*lost, substitute*lost, delete*lost])
    return state_probs

def gidd_weights(p_uniform, gamma):
    "Probabilities that a token is kept, masked, substituted, deleted, under the hybrid noise of GIDD"
    scale = p_uniform/(1-p_uniform)*2**gamma
    def state_probs(t):
        c = scale*max(t*(1-t), 0)**(gamma/2)
        return np.array([1-t, t, c, 0.])/(1+c)
    return state_probs

class HandmadeDenoiser(BijectiveDenoiser):
    "A denoiser whose outputs are computed by the method `outputs` of a subclass, in place of a network"
    def __init__(self, vocab_size, seq_len, noise=None, **config_kwargs):
        own = {}
        if noise is not None:
            own = dict(noise=noise.to_dict(), time_conditioning=not noise.masks_only, gap_head=noise.deletes)
        config_kwargs = dict(d_model=2, n_heads=1, n_layers=1) | own | config_kwargs
        super().__init__(DenoiserConfig(vocab_size, seq_len=seq_len, **config_kwargs))
        self.eval()

    def outputs(self, xt, t, mask):
        "Logits, (B, L, V), and gap logits, (B, L+1), or None"
        raise NotImplementedError

    def forward(self, xt, t=None, mask=None, features=False):
        logits,gap_logits = self.outputs(xt, t, mask)
        if features: return Features(logits, gap_logits)
        return logits if gap_logits is None else DenoiserOutput(logits, gap_logits)

    def hidden(self, ids, t=None, mask=None): return self.outputs(ids, t, mask)[0]
    def head(self, h): return h

    def code(self, xt, mask):
        "Number of each sequence of tokens, masks and padding, (B,)"
        V,L = self.config.vocab_size,self.config.seq_len
        padded = xt if mask is None else torch.where(mask, xt, V+1)
        padded = pad(padded, (0, L-xt.shape[1]), value=V+1)
        return padded@(V+2)**torch.arange(L)

class TableDenoiser(HandmadeDenoiser):
    "Random logits for each sequence; a time-conditioned denoiser adds 2t times other random logits"
    def __init__(self, vocab_size, seq_len, noise=None, seed=0, choices=None, **config_kwargs):
        super().__init__(vocab_size, seq_len, noise, **config_kwargs)
        V,L,n = vocab_size,seq_len,(vocab_size+2)**seq_len
        g = torch.Generator().manual_seed(seed)
        self.table = 1.5*torch.randn(2, n, L, V, generator=g, dtype=torch.float64)
        if self.config.gap_head:
            self.gap_table = 1.5*torch.randn(2, n, L+1, generator=g, dtype=torch.float64)
        if choices is not None:
            which = torch.randint(0, len(choices), (2, n, L), generator=g)
            self.table = torch.tensor(choices, dtype=torch.float64)[which]
        self.double()

    def look_up(self, table, code, t):
        "Entries of a table at a time, (B, ...)"
        if not self.config.time_conditioning: return table[0][code]
        return table[0][code]+2*t.double().view(-1, *[1]*(table.ndim-2))*table[1][code]

    def outputs(self, xt, t, mask):
        code,L = self.code(xt, mask),xt.shape[1]
        logits = self.look_up(self.table, code, t)[:,:L]
        if not self.config.gap_head: return logits, None
        return logits, .3*self.look_up(self.gap_table, code, t)[:,:L+1]

def ids_and_time(xt, t):
    "Noisy ids and times of a call of a denoiser"
    return xt.clone(), t if t is None else t.clone()

class Largest(TorchDispatchMode):
    "Notes the largest result of all operations, in numbers, by type"
    def __init__(self):
        super().__init__()
        self.numbers = {}
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for o in out if isinstance(out, tuple|list) else [out]:
            if not isinstance(o, torch.Tensor): continue
            self.numbers[o.dtype] = max(self.numbers.get(o.dtype, 0), o.numel())
        return out

def record_calls(monkeypatch, model, note=ids_and_time):
    "Return a list to which `note` of ids and times is added whenever a denoiser is called"
    calls = []
    def spy_on(f):
        def spy(xt, t=None, mask=None, **kwargs):
            calls.append(note(xt, t))
            return f(xt, t, mask, **kwargs)
        return spy
    for name in ('forward', 'hidden'):
        monkeypatch.setattr(model, name, spy_on(getattr(model, name)))
    return calls

def code_length(model, ids, rule, context, streams):
    """Minus the base-2 logarithm of the probability of a document, ids (N,), block by block

    Blocks have seq_len-context tokens, and see so many before them, within equal parts of the document."""
    block = model.seq_len-context
    part = block*math.ceil(len(ids)/(block*streams))
    bits = 0.
    for i in range(0, len(ids), block):
        given = min(context, i%part)
        x = ids[None,i-given:i+block]
        template = x.masked_fill(torch.arange(x.shape[1])>=given, model.mask_id)
        bits -= log_prob(model, x, rule, template=template).item()/math.log(2)
    return bits

def wait_for(path, process):
    "Wait until a file is there or a process has ended"
    for _ in range(3000):
        if path.exists() or process.poll() is not None: return
        time.sleep(.05)
