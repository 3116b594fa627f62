"""Networks and layers can be copied at any time of their training: before, between and after both passes."""
import copy, io, pickle
from functools import partial
import pytest, torch
from bijdiff.layers.attention_inverse import BijectiveMultiHeadAttention
from bijdiff.layers.bijection import BijectiveSequential
from bijdiff.layers.block import BijectiveTransformer
from bijdiff.layers.coupling import AdditiveCoupling, AffineCoupling, CouplingNet
from bijdiff.layers.linear import BijectiveLinear
from bijdiff.layers.moe import BijectiveMoE
from bijdiff.layers.multiscale import MultiscaleTransformer
from bijdiff.layers.norm import ActNorm, InvertibleLayerNorm
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from helpers import seeded_weights

def pickled(m): return pickle.loads(pickle.dumps(m))
def saved(m):
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    return torch.load(file, weights_only=False)

COPIES = dict(deepcopy=copy.deepcopy, pickle=pickled, save=saved, copy=copy.copy)

def denoiser(**kwargs):
    sizes = dict(d_model=8, n_heads=2, n_layers=2, seq_len=6)
    return BijectiveDenoiser(DenoiserConfig(7, **sizes, dropout=.1, **kwargs))

NETWORKS = dict(
    latent=partial(denoiser, latent_density=True),
    gaps=partial(denoiser, noise=dict(mask=.5, delete=.5), gap_head=True),
    sparse=partial(denoiser, n_experts=3, k_active=1, router_balance=.1, router_z_loss=.1),
    scales=partial(denoiser, enable_multiscale=True, time_conditioning=True),
)
LAYERS = dict(
    additive=lambda: AdditiveCoupling(CouplingNet(4)),
    affine=lambda: AffineCoupling(CouplingNet(4, dim_out=8)),
    linear=lambda: BijectiveLinear(8, mixing='rotation'),
    actnorm=lambda: ActNorm(8),
    layernorm=lambda: InvertibleLayerNorm(8),
    attention=lambda: BijectiveMultiHeadAttention(4, 2),
    sequence=lambda: BijectiveSequential(ActNorm(8), BijectiveLinear(8)),
    stack=lambda: BijectiveTransformer(2, 4, 2),
    multiscale=lambda: MultiscaleTransformer(1, 4, 2),
    mixture=lambda: BijectiveMoE(2, 2, 1, k_active=1, balance=.1),
)

def outputs(m, x):
    "Everything that a network or a layer returns for an input, as tensors"
    torch.manual_seed(3)
    timed = getattr(m, 'time_conditioning', False) is True
    out = m(x, torch.full((len(x),), .5)) if timed else m(x)
    return list(out) if isinstance(out, tuple) else [out]

def loss_of(m, x):
    "A loss of all outputs, the density of states included"
    loss = sum(o.square().mean() for o in outputs(m, x))
    nll = getattr(m, 'latent_nll', None)
    return loss if nll is None else loss+.01*nll.mean()

def same(xs, ys): return all(torch.equal(x, y) for x,y in zip(xs, ys, strict=True))

def with_graph(m):
    "Names of the tensors with a graph that the modules of a network hold"
    held = [(f'{name}.{k}', v) for name,o in m.named_modules() for k,v in vars(o).items()]
    return [name for name,v in held if isinstance(v, torch.Tensor) and v.grad_fn is not None]

INPUTS = dict.fromkeys(NETWORKS, torch.tensor([[0, 7, 2, 3, 7, 5]]*2))
MAKERS = NETWORKS | LAYERS

@pytest.mark.parametrize('how', COPIES)
@pytest.mark.parametrize('name', MAKERS)
def test_copies_after_each_part_of_a_step_compute_the_same(name, how):
    torch.manual_seed(0)
    m = seeded_weights(MAKERS[name]()).train()
    x = INPUTS.get(name, torch.randn(2, 6, 8))
    optimizer = torch.optim.SGD(m.parameters(), .1)
    loss = loss_of(m, x)
    taken = [COPIES[how](m)]
    loss.backward()
    taken.append(COPIES[how](m))
    want = outputs(m, x)
    assert all(same(outputs(o, x), want) and not with_graph(COPIES[how](o)) for o in taken)
    optimizer.step()
    assert same(outputs(COPIES[how](m), x), outputs(m, x))
    loss_of(COPIES[how](m), x).backward()

@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize('name', [k for k in LAYERS if k!='layernorm'])
def test_bijections_without_gradients_give_the_same_numbers_both_ways(name, mode):
    torch.manual_seed(0)
    f = seeded_weights(LAYERS[name]()).double().eval()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    want = f(x)
    with mode():
        assert same(f(x), want)
        x_inside = x+0
        y,logdet = f(x_inside)
        back,inverse_logdet = f.inverse(y)
        assert torch.allclose(back, x_inside) and torch.allclose(inverse_logdet, -logdet)
    back.clone().requires_grad_()
    f(x.clone().requires_grad_())[0].sum().backward()

@pytest.mark.parametrize('name', NETWORKS)
def test_a_network_in_inference_mode_trains_afterwards(name):
    m = seeded_weights(NETWORKS[name]()).train()
    with torch.inference_mode(): outputs(m, INPUTS[name])
    loss_of(m, INPUTS[name]).backward()
    assert m.embed.weight.grad.any()
