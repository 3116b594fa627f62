"""What the function inside a coupling must own, and what it must leave alone, on every path."""
from functools import partial
import pytest, torch
from torch import nn
from bijdiff.layers.coupling import AdditiveCoupling, AffineCoupling, ChunkedUpdate
from bijdiff.layers.reversible import couple_all, uncouple_all
from test_reversible import alike, pair, state, times, trial

# Tensors that a function uses without owning them

global_shift = torch.ones(8, requires_grad=True)

def by_hook(m, w):
    "A forward hook with a parameter, as adapters of low rank have"
    m.blocks[1].f.mixer.attn.register_forward_hook(lambda module, args, out: out+w)

def by_pre_hook(m, w):
    "A hook before the second stage, with its tensor in an argument of a partial function"
    def add(module, args, by): return (args[0]+by,)
    m.blocks[0].f.pointwise.register_forward_pre_hook(partial(add, by=w))

def by_list(m, w):
    "A plain list of tensors, of a network that is called in place of the local mixing"
    class Shifted(type(m.blocks[2].f.mixer.local)):
        def forward(self, x, mask=None): return super().forward(x, mask)+self.extra[1]
    m.blocks[2].f.mixer.local.__class__ = Shifted
    m.blocks[2].f.mixer.local.extra = [torch.ones(8), w]

def by_object(m, w):
    "A method of an object that is not a module"
    class Adapter:
        def __init__(self): self.low_rank = dict(shift=w)
        def forward_hook(self, module, args, out): return out+self.low_rank['shift']
    m.blocks[0].f.mixer.attn.register_forward_hook(Adapter().forward_hook)

def by_computed(m, w):
    "A tensor with a graph of its own outside of the stack"
    by_hook(m, (2*w).sin())

def by_global(m, w):
    "A global of the file, which is found among the variables of a function"
    m.blocks[1].f.mixer.attn.register_forward_hook(lambda module, args, out: out+global_shift)

# Name of each in the message, as a regular expression
NAMES = {
    by_hook: r'mixer\.attn\._forward_hooks\.\d+\.w',
    by_pre_hook: r'pointwise\._forward_pre_hooks\.\d+\.keywords\.by',
    by_list: r'mixer\.local\.extra\.1',
    by_object: r"mixer\.attn\._forward_hooks\.\d+\.__self__\.low_rank\.shift",
    by_computed: r'mixer\.attn\._forward_hooks\.\d+\.w',
    by_global: r'mixer\.attn\._forward_hooks\.\d+\.global_shift',
}
USES = list(NAMES)

def gradient_of_use(m, use, frozen):
    "Gradient of a tensor that a stack uses in a way of its own"
    w = nn.Parameter(torch.full((8,), .1))
    global_shift.grad = None
    use(m, w)
    m.requires_grad_(not frozen)
    m(state())[0].sin().sum().backward()
    return global_shift.grad if use is by_global else w.grad

@pytest.mark.parametrize('use', USES, ids=lambda use: use.__name__)
def test_a_tensor_that_is_used_and_not_owned_is_named(use):
    "Stored activations give it a gradient; the reversible backward would give it None"
    reversible,stored = pair()
    assert gradient_of_use(stored, use, False).any()
    with pytest.raises(ValueError, match=f'{NAMES[use]} requires a gradient'):
        gradient_of_use(reversible, use, False)

@pytest.mark.parametrize('use', USES, ids=lambda use: use.__name__)
def test_a_frozen_stack_gives_it_its_gradient(use):
    "Couplings before which nothing requires a gradient store their activations"
    reversible,stored = (gradient_of_use(m, use, True) for m in pair())
    assert reversible.any() and torch.equal(reversible, stored)

def test_in_every_block_of_a_frozen_stack_it_is_named():
    "After the first block the state requires a gradient, so the later ones rebuild it"
    m,_ = pair()
    m.requires_grad_(False)
    for block in m.blocks:
        low_rank = nn.Linear(8, 8, bias=False)
        block.f.mixer.attn.register_forward_hook(lambda module, args, out, add=low_rank: out+add(out))
    with pytest.raises(ValueError, match=r'_forward_hooks\.\d+\..*weight requires a gradient'):
        m(state())[0].sin().sum().backward()

def test_owned_tensors_are_no_strangers():
    "Parameters that are computed, shared or registered twice, buffers, and a keyword of the call"
    both = pair(dropout=.2, time_conditioning=True)
    for m in both:
        torch.nn.utils.parametrizations.weight_norm(m.blocks[0].f.mixer.attn.out)
        m.blocks[1].f.mixer.extra = m.blocks[0].f.mixer.attn
        m.blocks[2].f.pointwise = m.blocks[0].f.pointwise
        m.blocks[1].f.mixer.register_buffer('scale', torch.ones(8))
        m.blocks[1].f.mixer.register_forward_hook(lambda module, args, out: (out[0]*module.scale, out[1]))
    found,stored = (trial(m, state(), t=times()) for m in both)
    assert alike(found, stored)

# Functions that write into their inputs

class Double(nn.Module):
    "Doubles its input, or a tensor of its context, in place before it begins"
    def __init__(self, what, dim_out=4):
        super().__init__()
        self.what = what
        self.lin = nn.Linear(4, dim_out)
    def forward(self, x, cond=None, **context):
        (x[...,:1] if self.what=='x2' else cond).mul_(2)
        return self.lin(x+cond[:,None])

class PassOn(nn.Module):
    "A first stage that hands its input itself to the second"
    def forward(self, x, **context): return torch.zeros_like(x), x

def two_stages():
    return ChunkedUpdate(PassOn(), nn.Sequential(nn.ELU(inplace=True), nn.Linear(4, 4)))

COUPLINGS = {
    'input': lambda: AdditiveCoupling(Double('x2')),
    'context': lambda: AdditiveCoupling(Double('cond')),
    'second stage': lambda: AdditiveCoupling(two_stages()),
    'affine': lambda: AffineCoupling(Double('x2', 8)),
    'lattice': lambda: AdditiveCoupling(Double('x2'), 4),
}

def paths(coupling):
    "Functions of state and context that evaluate a coupling: all for additive ones"
    own = [coupling, coupling.inverse]
    if isinstance(coupling, AffineCoupling): return own
    return own+[partial(couple_all, [coupling]), partial(couple_all, [coupling], reversible=False),
                partial(uncouple_all, [coupling])]

@pytest.mark.parametrize('name', COUPLINGS)
@pytest.mark.parametrize('grad', [False, True], ids=['without gradients', 'with gradients'])
def test_a_function_that_writes_into_its_inputs_is_an_error(name, grad):
    "Such a coupling is not a bijection, or another one at every call"
    coupling = COUPLINGS[name]()
    for path in paths(coupling):
        x,cond = torch.randn(2, 5, 8).round(),torch.randn(2, 4)
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match='was changed in place') as e:
            path(x, cond=cond)
        assert str(e.value).startswith('cond' if name=='context' else 'x2')

@pytest.mark.parametrize('name', COUPLINGS)
def test_in_inference_mode_functions_write_into_copies(name):
    "There PyTorch counts no changes, so functions cannot be watched"
    coupling = COUPLINGS[name]().double()
    with torch.inference_mode():
        x,cond = torch.randn(2, 5, 8).round().double(),torch.randn(2, 4).double()
        x_before,cond_before = x.clone(),cond.clone()
        y,_ = coupling(x, cond=cond)
        back,_ = coupling.inverse(y, cond=cond)
        assert torch.equal(x, x_before) and torch.equal(cond, cond_before)
        assert torch.allclose(back, x)

def test_a_function_may_write_into_what_it_has_made():
    f = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Dropout(.5, inplace=True))
    x = torch.randn(2, 5, 8).requires_grad_()
    assert couple_all([AdditiveCoupling(f)], x)[...,:4].equal(x[...,4:])
