"""Helpers that several test files share."""
import torch
from torch import nn

# layers, mixtures

def plant_fault(monkeypatch, target, fault):
    "Replace a function, a pair of its owner and its name, by `fault(function)`, a wrong version of it"
    monkeypatch.setattr(*target, fault(getattr(*target)))

def draw_weights(m, std=.4, seed=0):
    "Seed the global generator and draw all parameters from N(0, std^2)"
    torch.manual_seed(seed)
    for p in m.parameters(): nn.init.normal_(p, std=std)
    return m

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

# noise and losses

def float64(*values):
    "Return a tensor of these numbers"
    return torch.tensor(values, dtype=torch.float64)

def seeded_generator(seed):
    "Return a generator of random numbers with this seed"
    return torch.Generator().manual_seed(seed)

def derivative(f, t, d=1e-4):
    "Return f'(t) by the five-point formula (8 (f(t+d)-f(t-d)) - f(t+2d) + f(t-2d)) / 12d"
    return (8*(f(t+d)-f(t-d))-f(t+2*d)+f(t-2*d))/(12*d)
