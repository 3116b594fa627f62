"""Portable arithmetic: outputs with the same bits under all conditions, on another machine, and in NumPy."""
import json, math, os, pickle, subprocess, sys
from copy import copy, deepcopy
from functools import cache
from pathlib import Path
from threading import Barrier, Thread
from types import SimpleNamespace
import numpy as np
import pytest, torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
import portable_by_hand as by_hand
from bijdiff.data.loaders import text_dls
from bijdiff.diffusion import schedules
from bijdiff.diffusion.schedules import Geometric
from bijdiff.layers import elementary, exact_sums
from bijdiff.layers import portable_arithmetic as arithmetic
from bijdiff.layers.coupling import CouplingNet
from bijdiff.layers.exact_sums import grid_layer_norm, grid_linear, grid_matmul, grid_rms_norm
from bijdiff.layers.exact_sums import weight_grid
from bijdiff.layers.portable_arithmetic import portable_arithmetic
from bijdiff.likelihood.exact import log_prob, token_nll
from bijdiff.likelihood import portable as portable_module
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.likelihood.portable import portable
from bijdiff.sampling.generate import sample, samplers_for
from bijdiff.testing import quiet_fit, small_learner
import helpers
from helpers import float64
from portable_job import CONTEXT, FUNCTIONS, KINDS, L, ROWS, RULES, V
from portable_job import clean_ids, context_value, count_zeros, fingerprint, get_function, inputs
from portable_job import integer_tensor, likelihoods, measure, network, outputs, query_key_value
from portable_job import set_weights, subnormal_network

@cache
def network_of(kind):
    "A network that several tests share and none changes"
    return network(kind)

@cache
def reference(kind, n=5):
    "Outputs in one thread and one batch, without any switch"
    return outputs(portable(network_of(kind)), inputs(n))

def assert_same_bits(found, expected):
    "Assert that lists of tensors are equal, signs of 0 included"
    assert len(found)==len(expected)
    assert all(torch.equal(a, b) for a,b in zip(found, expected))
    assert fingerprint(found)==fingerprint(expected)

def thirds(seed, *shape):
    "Random numbers of both signs with all their digits, of sizes up to 10"
    return integer_tensor(seed, -3*10**6, 3*10**6, *shape)/3e5

each_kind = pytest.mark.parametrize('kind', KINDS)

def run_job(*args, **env):
    "Run portable_job.py in an environment with further variables, and return what it prints"
    command = [sys.executable, Path(__file__).with_name('portable_job.py'), *args]
    found = subprocess.run(command, env=os.environ|env, capture_output=True, text=True)
    assert found.returncode==0, found.stderr
    return json.loads(found.stdout)

# Conditions of this process

CONDITIONS = helpers.CONDITIONS | dict(inference=torch.inference_mode)

@pytest.mark.parametrize('condition', CONDITIONS)
@each_kind
def test_switches_of_pytorch_change_no_bit(kind, condition):
    with CONDITIONS[condition](): found = outputs(portable(network_of(kind)), inputs())
    assert_same_bits(found, reference(kind))

@pytest.mark.parametrize('condition', CONDITIONS)
@pytest.mark.parametrize('name', ['nucleus', 'guided', 'budget'])
def test_switches_of_pytorch_change_no_bit_of_a_likelihood(name, condition):
    p = portable(network_of('stack'))
    expected = likelihoods(p, name)
    with CONDITIONS[condition](): found = likelihoods(p, name)
    assert_same_bits(found, expected)

def test_autocast_changes_the_outputs_of_plain_networks():
    plain = outputs(network_of('stack'), inputs())
    with torch.autocast('cpu', torch.bfloat16): cast = outputs(network_of('stack'), inputs())
    assert not torch.equal(cast[0], plain[0])

def test_subnormal_logits_survive_where_they_are_flushed():
    model = subnormal_network()
    with CONDITIONS['flushed_subnormals'](): found = [count_zeros(m, 5) for m in (portable(model), model)]
    assert found==[0, 5*L*V]

def test_subnormal_logits_survive_where_another_thread_flushes_them():
    portable_zeros,plain_zeros = run_job('flushed')
    assert portable_zeros==0
    if not plain_zeros: pytest.skip('threads do not inherit how subnormal numbers are treated')

def test_the_context_restores_what_it_switches():
    threads,autocast = torch.get_num_threads,torch.is_autocast_enabled
    switches = lambda: (arithmetic._flushes_subnormals(), threads(), autocast('cpu'))
    with CONDITIONS['flushed_subnormals'](), CONDITIONS['two_threads'](), CONDITIONS['autocast']():
        with portable_arithmetic(): assert switches()==(False, 1, False)
        assert switches()==(True, 2, True)
        with pytest.raises(KeyError), portable_arithmetic(): raise KeyError
        assert switches()==(True, 2, True)
    assert torch.erf(torch.ones(1))>0 and torch.is_grad_enabled()

@each_kind
def test_batches_of_any_size_give_the_same_bits(kind):
    p = portable(network_of(kind))
    of_batches = reference(kind, 16)
    for first,last in ((0, 1), (3, 4), (15, 16), (0, 3), (13, 16)):
        found = outputs(p, [o[first:last] for o in inputs(16)])
        assert_same_bits(found, [o[first:last] for o in of_batches])

@each_kind
def test_more_padding_changes_no_bit(kind):
    ids,t,mask = inputs()
    more = F.pad(ids, (0, 9), value=7),t,F.pad(mask, (0, 9), value=False)
    found = outputs(portable(network_of(kind)), more)
    lengths = [o.shape[1] for o in reference(kind)]
    assert_same_bits([o[:,:n] for o,n in zip(found, lengths)], reference(kind))

@each_kind
def test_training_mode_and_dropout_change_no_bit(kind):
    model = network(kind, dropout=.5).train()
    assert_same_bits(outputs(portable(model), inputs()), reference(kind))
    assert all(m.training for m in model.modules())

@pytest.mark.parametrize('kind', ['stack', 'substitution', 'deletion'])
def test_slices_of_a_batch_are_joined_to_the_same_bits(monkeypatch, kind):
    p = portable(network_of(kind))
    features = p.hidden(*inputs())
    monkeypatch.setattr(portable_module, '_most_tokens', 2*L+1)
    assert_same_bits(outputs(p, inputs()), reference(kind))
    assert_same_bits([p.hidden(*inputs())], [features])

def test_compiled_parts_are_evaluated_without_their_compiled_code():
    "It would call the parts of the network, in training mode"
    model = network('stack', dropout=.5).train()
    model.backbone.compile(backend='eager')
    assert_same_bits(outputs(portable(model), inputs()), reference('stack'))

def test_times_and_masks_of_another_batch_are_an_error_in_slices_too(monkeypatch):
    p = portable(network_of('substitution'))
    monkeypatch.setattr(portable_module, '_most_tokens', L)
    ids,t,mask = inputs()
    with pytest.raises(ValueError, match='t has shape'): p(ids, t[:2], mask)
    with pytest.raises(ValueError, match='mask has shape'): p(ids, t, mask[:2])

def test_lists_and_arrays_give_the_same_bits():
    p = portable(network_of('substitution'))
    assert_same_bits(outputs(p, [o.tolist() for o in inputs()]), reference('substitution'))
    assert_same_bits(outputs(p, [o.numpy() for o in inputs()]), reference('substitution'))

@pytest.mark.parametrize('shape', [(0, 5), (3, 0)])
def test_batches_without_tokens_are_evaluated(shape):
    p = portable(network_of('stack'))
    ids = torch.zeros(shape, dtype=torch.long)
    assert p(ids).shape==(*shape, V)
    assert log_prob(p, ids).tolist()==[0.]*shape[0]

def numbered_animals():
    "Batches of 16 x 32 characters"
    text = ''.join(f'{i} cats and {i*i} dogs met {i%7} birds. ' for i in range(250))
    return text_dls(text, seq_len=32, bs=16, device='cpu')

@cache
def trained():
    "A network of 2 blocks of width 32 that was trained briefly, in evaluation mode"
    return quiet_fit(small_learner(dls=numbered_animals())).model.eval()

def test_a_trained_network_has_the_same_bits_in_all_batches_and_under_all_switches():
    model = trained()
    ids = integer_tensor(0, 0, model.mask_id, 6, 64)
    p = portable(model)
    expected = p(ids)
    assert (expected-model(ids)).abs().max()<1e-3
    assert torch.equal(torch.cat([p(o[None]) for o in ids]), expected)
    for condition in CONDITIONS.values():
        with condition(): assert torch.equal(portable(model)(ids), expected)

# Another machine

FEW_INSTRUCTIONS = dict(ATEN_CPU_CAPABILITY='default', ONEDNN_MAX_CPU_ISA='SSE41',
                        MKL_ENABLE_INSTRUCTIONS='SSE4_2', OMP_NUM_THREADS='2')

@pytest.fixture(scope='module')
def elsewhere():
    "Fingerprints of a process whose libraries use few instructions, and two threads"
    return run_job(**FEW_INSTRUCTIONS)

@pytest.fixture(scope='module')
def here(): return measure()

@pytest.mark.parametrize('what', ['networks', 'rules', 'schedules', 'context', 'functions'])
def test_another_machine_computes_the_same_bits(here, elsewhere, what):
    different = [name for name in here[what] if here[what][name]!=elsewhere[what][name]]
    assert here[what] and not different

def test_another_machine_computes_other_bits_with_plain_networks(here, elsewhere):
    if here['capability']==elsewhere['capability']:
        pytest.skip(f"libraries use the same instructions in both processes, {here['capability']}")
    assert elsewhere['capability']=='DEFAULT'
    different = [kind for kind in KINDS if here['plain'][kind]!=elsewhere['plain'][kind]]
    assert len(different)>len(KINDS)/2

def test_the_logarithm_of_python_has_no_influence_on_times(monkeypatch):
    "It comes from a library that differs between systems"
    alpha = torch.arange(1, 1000).double()/1000
    with portable_arithmetic(): expected = Geometric().t(alpha)
    inexact = SimpleNamespace(pi=math.pi, log=lambda x: math.nextafter(math.log(x), 0))
    monkeypatch.setattr(schedules, 'math', inexact)
    with portable_arithmetic(): assert torch.equal(Geometric().t(alpha), expected)

# Operations

# Operations on floats that move numbers, compare them, or round once, by the names in PyTorch's dispatcher
MOVES = '''_local_scalar_dense _to_copy _unsafe_view alias arange cat clone constant_pad_nd copy detach
    embedding empty empty_like expand fill full full_like gather index index_copy index_put index_select
    lift_fresh masked_fill masked_scatter new_zeros ones ones_like permute scalar_tensor scatter select
    slice split split_with_sizes stack transpose unbind unsqueeze view where zero zeros zeros_like'''.split()
COMPARES = 'abs amax amin clamp eq equal ge gt isinf le lt max maximum min ne neg nonzero sort'.split()
ROUNDS_ONCE = 'add div frexp mul round rsub sub'.split()
SUMS = 'bmm cumsum mm sum'.split() # Without rounding in float64, if their numbers are on a grid

def is_float(o): return isinstance(o, torch.Tensor) and o.is_floating_point()

class Operations(TorchDispatchMode):
    "Collects the operations on floats: name, type, number of arguments that are tensors, and alpha"
    def __init__(self):
        super().__init__()
        self.found = set()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [o for o in args if isinstance(o, torch.Tensor)]
        name = func.overloadpacket.__name__.removesuffix('_')
        dtypes = [o.dtype for o in (*tensors, out) if is_float(o)]
        if dtypes: self.found.add((name, dtypes[0], len(tensors), kwargs.get('alpha', 1)))
        return out
    def check(self):
        "Assert that nothing is rounded twice or in an order of its own"
        for name,dtype,n_tensors,alpha in self.found:
            assert name in MOVES+COMPARES+ROUNDS_ONCE+SUMS
            assert alpha==1
            if name in SUMS: assert dtype==torch.float64
            if name=='div': assert n_tensors==2

@each_kind
def test_networks_use_no_operation_that_is_rounded_more_than_once(kind):
    "Divisors are tensors: by a number, some devices multiply with its rounded inverse"
    for table in (elementary._powers, elementary._gelu_table, elementary._exp_table): table.cache_clear()
    p,batch = portable(network_of(kind)),inputs()
    with Operations() as operations: outputs(p, batch)
    operations.check()

@pytest.mark.parametrize('name', CONTEXT)
def test_functions_use_no_operation_that_is_rounded_more_than_once(name):
    with Operations() as operations: context_value(name)
    operations.check()

@pytest.mark.parametrize('name', CONTEXT)
def test_functions_are_those_of_pytorch_up_to_rounding(name):
    found,expected = context_value(name),CONTEXT[name](ROWS)
    assert found.dtype==expected.dtype and found.shape==expected.shape
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)

def test_factories_make_float32_whatever_the_default_is():
    with CONDITIONS['float64_by_default'](), portable_arithmetic():
        assert torch.zeros(2).dtype==torch.ones(2).dtype==torch.empty(2).dtype==torch.float32

def test_the_check_of_operations_finds_plain_networks():
    model = network_of('stack')
    with Operations() as operations: outputs(model, inputs())
    names = {name for name,*_ in operations.found}
    assert {'addmm', 'gelu', 'native_layer_norm'} <= names-{*MOVES, *COMPARES, *ROUNDS_ONCE, *SUMS}

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('operation', ['add', 'sub', 'mul', 'div'])
def test_operations_of_pytorch_are_rounded_like_those_of_numpy(operation, dtype):
    "With one number for all and with one for each, and in place, for lengths that end within a vector"
    x,y = (integer_tensor(i, 1, 2**24, 4001).to(dtype)/3 for i in (1, 2))
    numpy_operation = dict(sub='subtract', mul='multiply', div='divide').get(operation, operation)
    expected = getattr(np, numpy_operation)(x.numpy(), y.numpy())
    assert np.array_equal(getattr(torch, operation)(x, y).numpy(), expected)
    assert np.array_equal(getattr(x.clone(), operation+'_')(y).numpy(), expected)
    by_number = getattr(np, numpy_operation)(x.numpy(), y.numpy()[0])
    assert np.array_equal(getattr(torch, operation)(x, y[0]).numpy(), by_number)
    assert np.array_equal(x.square().numpy(), x.numpy()*x.numpy())

# In NumPy

@pytest.mark.parametrize('name', FUNCTIONS)
def test_functions_have_the_bits_of_numpy(name):
    x = FUNCTIONS[name] if name!='log' else FUNCTIONS[name][1:]
    found = get_function(name)(x).numpy()
    assert np.array_equal(found, getattr(by_hand, name)(x.numpy()))

@pytest.mark.parametrize('d', [2, 12, 62, 66])
def test_attention_has_the_bits_of_numpy(d):
    "Of 9 keys, 3 are hidden and larger than the others"
    q,k,v = query_key_value(d)
    keys = torch.arange(9)%3!=1
    k,v = (torch.where(keys[:,None], o, 100*o) for o in (k, v))
    found = elementary.attention(q, k, v, keys[None,None,None])
    expected = by_hand.attention(*(o.numpy() for o in (q, k, v)), keys.numpy()[None])
    assert np.array_equal(found.numpy(), expected)

def test_rows_of_all_sizes_have_the_bits_of_numpy():
    "From 1e-16, below the smallest grid, to 1e13"
    x = thirds(0, 30, 45)*10.**torch.arange(-17, 13)[:,None]
    weight,bias,gain = thirds(1, 17, 45),thirds(2, 17),thirds(3, 45)
    pairs = [
        (grid_linear(x, weight_grid(weight), bias), by_hand.linear(x.numpy(), weight.numpy(), bias.numpy())),
        (grid_layer_norm(x), by_hand.layer_norm(x.numpy())),
        (grid_layer_norm(x, gain, gain), by_hand.layer_norm(x.numpy(), gain.numpy(), gain.numpy())),
        (grid_rms_norm(x), by_hand.rms_norm(x.numpy())),
        (elementary.softmax(x.double()), by_hand.softmax(x.double().numpy())),
    ]
    for found,expected in pairs: assert np.array_equal(found.numpy(), expected)

def logits_by_hand(model, ids, mask):
    "Logits of a stack of blocks in NumPy"
    weights = {name:o.numpy() for name,o in model.state_dict().items()}
    return by_hand.denoiser(weights, model.config, ids.numpy(), mask.numpy())

@pytest.mark.parametrize('scale', [1., .05, 3.])
def test_a_small_network_has_the_bits_of_numpy(scale):
    config = DenoiserConfig(V, seq_len=48, d_model=12, n_heads=2, n_layers=2, coupling_hidden_dim=48)
    model = set_weights(BijectiveDenoiser(config), scale).eval()
    ids,_,mask = inputs(7)
    found = portable(model)(ids, None, mask)
    assert np.array_equal(found.numpy(), logits_by_hand(model, ids, mask))
    assert (found-outputs(model, (ids, None, mask))[0]).abs().max()<1e-3

def test_a_trained_network_has_the_bits_of_numpy():
    ids = integer_tensor(0, 0, trained().mask_id, 6, 64)
    mask = torch.arange(64)<torch.tensor([64, 50, 1, 33, 64, 7])[:,None]
    found = portable(trained())(ids, None, mask)
    assert np.array_equal(found.numpy(), logits_by_hand(trained(), ids, mask))

# Devices

@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no CUDA device')
@each_kind
def test_a_cuda_device_computes_the_bits_of_the_cpu(kind):
    found = outputs(portable(network(kind).to('cuda')), inputs())
    assert_same_bits([o.cpu() for o in found], reference(kind))

# Functions at the edges

INF,NAN = float('inf'),float('nan')
SUBNORMAL = 5e-324
EXTREME = SUBNORMAL,1e-310,1.7e308

def value(name, *x): return get_function(name)(float64(*x)).tolist()

def test_exp_is_1_at_0_and_has_a_largest_and_a_smallest_value():
    assert value('exp', 0., -0., SUBNORMAL, -SUBNORMAL)==[1.]*4
    assert value('exp', INF, 1e300, 701.)==value('exp', 700.)*3
    assert value('exp', -INF, -1e300, -701.)==value('exp', -700.)*3
    assert value('exp', -700.)[0]>0

def test_log_is_infinite_at_0_and_takes_subnormal_numbers():
    assert value('log', 0., -0., 1., INF)==[-INF, -INF, 0., INF]
    assert value('log', *EXTREME)==pytest.approx([math.log(o) for o in EXTREME])

def test_sqrt_is_exact_at_squares_and_takes_subnormal_numbers():
    assert value('sqrt', 0., 4., 144., INF)==[0., 2., 12., INF]
    assert value('sqrt', *EXTREME)==pytest.approx([math.sqrt(o) for o in EXTREME])

def test_circular_functions_at_0_and_their_limits():
    assert value('cos', 0., -0., SUBNORMAL)==[1.]*3
    assert value('sin', 0., SUBNORMAL, -SUBNORMAL)==[0., SUBNORMAL, -SUBNORMAL]
    assert value('acos', 1., -1.)==[0., math.pi]
    assert value('acos', 0., SUBNORMAL)==pytest.approx([math.pi/2]*2, abs=1e-15)
    assert value('cos', 1e6, -1e6)==pytest.approx([math.cos(1e6)]*2, abs=1e-12)

def test_sigmoid_and_tanh_reach_their_limits():
    assert value('sigmoid', 0., 800., INF)==[.5, 1., 1.]
    assert value('sigmoid', -INF, -800.)==pytest.approx([0., 0.], abs=1e-300)
    assert value('tanh', 0., SUBNORMAL, 400., INF, -400., -INF)==[0., 0., 1., 1., -1., -1.]

def test_gelu_at_0_and_at_large_numbers():
    x = torch.tensor([0., -0., 1e-45, 1e30, INF])
    assert torch.equal(elementary.gelu(x), x)
    large = elementary.gelu(torch.tensor([-8., -1e30, -INF]))
    assert (large<=0).all() and (large>-1e-14).all()

@pytest.mark.parametrize('name', [name for name in FUNCTIONS if name!='gelu'])
def test_nan_remains_nan(name):
    assert math.isnan(value(name, NAN)[0])

@pytest.mark.parametrize('name', ['log', 'sqrt', 'acos', 'cos', 'sin'])
def test_numbers_outside_of_the_domain_give_nan(name):
    outside = dict(log=-1., sqrt=-1., acos=1.5)
    assert math.isnan(value(name, outside.get(name, INF))[0])

def test_softmax_of_excluded_tokens_is_0():
    p = elementary.softmax(float64([1., -INF, 1e4, -1e4], [0., -INF, -INF, 0.]))
    assert p.tolist()==[[0., 0., 1., 0.], [.5, 0., 0., .5]]

# Functions of parts

@pytest.mark.parametrize('name', FUNCTIONS)
def test_a_function_of_a_part_is_the_part_of_the_function(name):
    "Shapes, strides and lengths that end within a vector"
    f,x = get_function(name),FUNCTIONS[name][1:].view(20, -1)
    y = f(x)
    assert torch.equal(f(x.mT), y.mT)
    assert torch.equal(f(x[:,::3]), y[:,::3])
    assert torch.equal(f(x[3,7:20]), y[3,7:20])
    assert torch.equal(f(x[5,5]), y[5,5])
    assert torch.equal(f(x[:,:1].expand(-1, 9)), y[:,:1].expand(-1, 9))
    assert f(x[:0]).shape==y[:0].shape

ROW_FUNCTIONS = dict(
    softmax=lambda x: elementary.softmax(x.double()),
    linear=lambda x: grid_linear(x, weight_grid(thirds(1, 17, 45)), thirds(2, 17)),
    layer_norm=lambda x: grid_layer_norm(x, thirds(1, 45), thirds(2, 45)),
    rms_norm=lambda x: grid_rms_norm(x, thirds(1, 45)),
)

@pytest.mark.parametrize('name', ROW_FUNCTIONS)
def test_rows_do_not_depend_on_other_rows_nor_on_strides(name):
    f,sizes = ROW_FUNCTIONS[name],10.**(torch.arange(-6, 24)//3)
    x = thirds(0, 4, 30, 45)*sizes[:,None]
    y = f(x)
    assert torch.equal(f(x[2,3]), y[2,3])
    assert torch.equal(f(x[:,::4]), y[:,::4])
    assert torch.equal(f(x.transpose(0, 1)), y.transpose(0, 1))
    assert torch.equal(f(x.mT.contiguous().mT), y)
    assert f(x[:0]).shape==y[:0].shape

def test_rows_with_other_orders_of_their_numbers_have_the_same_norms_and_sums():
    x,order = thirds(0, 30, 45),integer_tensor(1, 0, 10**6, 45).argsort()
    assert torch.equal(grid_layer_norm(x)[:,order], grid_layer_norm(x[:,order]))
    assert torch.equal(grid_rms_norm(x)[:,order], grid_rms_norm(x[:,order]))
    assert torch.equal(elementary.softmax(x.double())[:,order], elementary.softmax(x[:,order].double()))
    weight = thirds(2, 17, 45)
    linear = lambda order: grid_linear(x[:,order], weight_grid(weight[:,order]))
    assert torch.equal(linear(order), linear(torch.arange(45)))

def test_attention_does_not_depend_on_other_queries_heads_and_sequences_nor_on_the_order_of_keys(monkeypatch):
    q,k,v = (thirds(i, 3, 2, 29, 6) for i in range(3))
    keys = torch.arange(29)<torch.tensor([29, 11, 1])[:,None,None,None]
    y = elementary.attention(q, k, v, keys)
    assert torch.equal(elementary.attention(q[1:2,1:,7:9], k[1:2,1:], v[1:2,1:], keys[1:2]), y[1:2,1:,7:9])
    assert torch.equal(elementary.attention(q[1:2], k[1:2,:,:11], v[1:2,:,:11]), y[1:2])
    order = integer_tensor(1, 0, 10**6, 29).argsort()
    assert torch.equal(elementary.attention(q, k[:,:,order], v[:,:,order], keys[...,order]), y)
    strided = [o.transpose(1, 2).contiguous().transpose(1, 2) for o in (q, k, v)]
    assert torch.equal(elementary.attention(*strided, keys), y)
    monkeypatch.setattr(elementary, '_most_scores', 100)
    assert torch.equal(elementary.attention(q, k, v, keys), y)

# Sums, and proofs that are broken

def n_changed(bits):
    "Number of 100 sums of 512 products of whole random numbers that change with the order of their terms"
    x,y = (integer_tensor(i, -2**bits+1, 2**bits-1, n, 512).double() for i,n in ((1, 1), (2, 100)))
    order = integer_tensor(3, 0, 10**6, 512).argsort()
    return (grid_matmul(x[:,order], y.T[order], 2*bits)!=grid_matmul(x, y.T, 2*bits)).sum().item()

def test_sums_do_not_change_with_the_order_of_their_terms():
    assert n_changed(22)==0

def test_sums_change_with_the_order_of_their_terms_where_bits_are_not_checked(monkeypatch):
    with pytest.raises(ValueError, match='bits'): n_changed(30)
    monkeypatch.setattr(exact_sums, 'n_exact_terms', lambda bits: 2**60)
    assert n_changed(22)==0
    assert n_changed(30)>30

def test_long_sums_are_those_of_their_exact_parts_in_order():
    "2,048 products of numbers of 22 bits, whose whole sum needs 55 bits"
    x,y = (integer_tensor(i, 2**21, 2**22-1, 2048).double() for i in (1, 2))
    products = [int(a)*int(b) for a,b in zip(x, y)]
    parts = [float(sum(products[i:i+512])) for i in range(0, 2048, 512)]
    assert grid_matmul(x[None], y[:,None], 44).item()==((parts[0]+parts[1])+parts[2])+parts[3]
    squares = torch.tensor(products, dtype=torch.float64)
    assert exact_sums.grid_sum(squares[None], 44).item()==((parts[0]+parts[1])+parts[2])+parts[3]

def test_networks_of_fewer_bits_do_not_have_the_bits_of_numpy(monkeypatch):
    "The comparison with NumPy can fail"
    config = DenoiserConfig(V, seq_len=48, d_model=12, n_heads=2, n_layers=2, coupling_hidden_dim=48)
    model = set_weights(BijectiveDenoiser(config)).eval()
    ids,_,mask = inputs(7)
    monkeypatch.setattr(exact_sums, '_bits', 21)
    assert not np.array_equal(portable(model)(ids, None, mask).numpy(), logits_by_hand(model, ids, mask))

@pytest.mark.parametrize('module,name,bits', [
    (exact_sums, '_bits', 22), (exact_sums, '_weight_bits', 51), (elementary, '_bits', 22)])
def test_a_grid_of_one_bit_too_many_is_an_error(monkeypatch, module, name, bits):
    monkeypatch.setattr(module, name, bits+1)
    with pytest.raises(ValueError, match='bits'): outputs(portable(network_of('stack')), inputs())

def test_a_sum_on_a_grid_of_one_bit_too_many_is_an_error(monkeypatch):
    monkeypatch.setitem(arithmetic._sum_bits, torch.float32, 23)
    with portable_arithmetic(), pytest.raises(ValueError, match='bits'): torch.ones(3).sum()

@pytest.mark.parametrize('shape', [(5,), (3, 4), (2, 1, 6)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_sums_and_means_are_those_of_pytorch_up_to_rounding(shape, dtype):
    x = thirds(0, *shape).to(dtype)
    for dims in (None, -1, 0, tuple(range(len(shape)))):
        for keepdim in (False, True):
            args = () if dims is None else (dims, keepdim)
            with portable_arithmetic(): found = x.sum(*args), x.mean(*args)
            for y,expected in zip(found, (x.sum(*args), x.mean(*args))):
                assert y.dtype==dtype and y.shape==expected.shape
                assert (y-expected).abs().max()<1e-4

def test_infinite_terms_of_sums_count_as_in_pytorch():
    rows = float64([1., INF, 2.], [1., -INF, 2.], [INF, -INF, 0.], [NAN, 1., 2.], [1., 2., 4.])
    with portable_arithmetic(): found = rows.sum(1), rows.cumsum(1)
    for y,expected in zip(found, (rows.sum(1), rows.cumsum(1))):
        assert torch.equal(y.nan_to_num(77), expected.nan_to_num(77))

def test_long_cumulative_sums_are_exact():
    "Of 2^18 numbers the last sum is that of the reversed numbers"
    x = integer_tensor(0, 2**35, 2**36-1, 2**18).double()
    with portable_arithmetic(): forwards,backwards = x.cumsum(0),x.flip(0).cumsum(0)
    assert forwards[-1]==backwards[-1]
    assert x.cumsum(0)[-1]!=x.flip(0).cumsum(0)[-1]

@pytest.mark.parametrize('shape', [(0, 3), (2, 0)])
def test_sums_without_terms_are_0(shape):
    with portable_arithmetic(): total = torch.zeros(shape).sum(1)
    assert torch.equal(total, torch.zeros(shape[0]))

def test_matrix_products_keep_their_type():
    x,y = thirds(0, 3, 5),thirds(1, 5, 2)
    with portable_arithmetic(): found = x@y, x.double()@y.double()
    assert [o.dtype for o in found]==[torch.float32, torch.float64]
    assert (found[1]-x.double()@y.double()).abs().max()<1e-4

OTHER_FUNCTIONS = dict(
    erf=torch.erf, var=lambda x: x.var(), std=lambda x: x.std(), norm=lambda x: x.norm(), rsqrt=torch.rsqrt,
    logsumexp=lambda x: x.logsumexp(0), exp_=lambda x: x.exp_(), softplus=F.softplus, prod=lambda x: x.prod(),
    addcmul=lambda x: x.addcmul(x, x), bmm=lambda x: torch.bmm(x[:,None,None], x[:,None,None]),
    einsum=lambda x: torch.einsum('i,i->', x, x), rand=lambda x: torch.rand(3),
)

@pytest.mark.parametrize('name', OTHER_FUNCTIONS)
def test_a_function_without_a_portable_version_is_an_error(name):
    with portable_arithmetic(), pytest.raises(NotImplementedError, match=name):
        OTHER_FUNCTIONS[name](torch.ones(3))

def test_a_scaled_sum_is_an_error():
    "Some processors join a product and a sum into one rounding"
    x = torch.ones(1)
    with portable_arithmetic():
        assert torch.add(x, x, alpha=1)==2
        with pytest.raises(NotImplementedError, match='alpha'): torch.add(x, x, alpha=.3)

# Numbers that are not finite, and large networks

@pytest.mark.parametrize('bad', [NAN, INF])
def test_a_weight_that_is_not_finite_is_an_error(bad):
    "The last number of each parameter"
    for name,_ in network('deletion', n_layers=1).named_parameters():
        model = network('deletion', n_layers=1)
        model.get_parameter(name).data.view(-1)[-1] = bad
        with pytest.raises(ValueError): portable(model)(*inputs())

@pytest.mark.parametrize('bad', [NAN, INF, 1e30])
def test_features_that_are_not_finite_or_huge_are_an_error(bad):
    p = portable(network_of('stack'))
    features = p.hidden(*inputs())
    features[0,0,0] = bad
    with pytest.raises(ValueError, match='finite'): p.head(features)

def test_a_wide_mlp_is_evaluated():
    "Rows of 1,024 and of 4,096 numbers, of which the second are summed in parts"
    net = set_weights(CouplingNet(1024, 4096), .1).eval()
    x = thirds(0, 5, 1024)
    with torch.no_grad(): expected = net.double()(x.double())
    net.float()
    with portable_arithmetic(): found,first = net(x), net(x[:1])
    assert (found-expected).abs().max()<1e-5*expected.abs().max()
    assert torch.equal(found[:1], first)

def test_a_large_vocabulary_is_evaluated():
    n = 50_257
    model = set_weights(BijectiveDenoiser(DenoiserConfig(n, seq_len=20, d_model=32, n_heads=2, n_layers=1)))
    ids = integer_tensor(0, 0, n, 2, 20)
    p = portable(model.eval())
    assert (p(ids)-outputs(model, [ids])[0]).abs().max()<1e-3
    nll = token_nll(p, clean_ids(), 'entropy', steps=2, top_p=.99)
    assert torch.equal(nll, token_nll(p, clean_ids(), 'entropy', steps=2, top_p=.99, bs=1))

def test_large_weights_are_evaluated_without_a_lattice():
    model = set_weights(BijectiveDenoiser(DenoiserConfig(V, 48, 24, 2, 2, lattice_bits=None)), 1e3).eval()
    p = portable(model)
    found,expected = p(*inputs()),outputs(model.double(), inputs())[0]
    model.float()
    assert (found-expected).abs().max()<1e-4*expected.abs().max()
    assert_same_bits([p(*(o[i:i+1] for o in inputs())) for i in range(5)], [*found.split(1)])

def test_dropout_in_training_mode_is_an_error():
    with portable_arithmetic(), pytest.raises(ValueError, match='training'):
        F.dropout(torch.ones(3), .5, True)

# The network of a view

@pytest.mark.parametrize('model', [torch.nn.Linear(2, 2), None, portable(network('stack'))])
def test_only_denoisers_of_the_package_have_a_portable_view(model):
    with pytest.raises(ValueError, match='model'): portable(model)

def test_a_view_leaves_its_network_alone():
    "Training flags, dropout, what requires a gradient, and gradients"
    model = network('stack', dropout=.5).train()
    model.backbone.blocks[0].eval()
    model.embed.weight.requires_grad_(False)
    model(*inputs()).square().sum().backward()
    flags = lambda: [m.training for m in model.modules()]
    weights = lambda: [(p.requires_grad, p.grad, p.data_ptr()) for p in model.parameters()]
    before = flags(),weights()
    torch.manual_seed(0)
    expected = model(*inputs())
    torch.manual_seed(0)
    p = portable(model)
    p(*inputs())
    assert before==(flags(), weights())
    assert torch.equal(model(*inputs()), expected)
    assert torch.is_grad_enabled() and model(*inputs()).requires_grad

def test_outputs_have_no_gradient():
    found = portable(network_of('stack'))(*inputs())
    assert not found.requires_grad
    with pytest.raises(RuntimeError, match='grad'): found.sum().backward()

def scale_data(model): model.output_head.weight.data.mul_(2)
def replace_data(model): model.output_head.weight.data = model.output_head.weight.data*2
def replace_parameter(model): model.output_head.weight = torch.nn.Parameter(model.output_head.weight*2)
@torch.no_grad()
def scale_in_place(model): model.output_head.weight.mul_(2)
@torch.inference_mode()
def scale_in_inference(model): model.output_head.weight.mul_(2)
def scale_array(model): model.output_head.weight.detach().numpy()[:] *= 2
def load_weights(model):
    model.load_state_dict({k:v*(1+(k=='output_head.weight')) for k,v in model.state_dict().items()})

CHANGES = [scale_data, replace_data, replace_parameter, scale_in_place, scale_in_inference, scale_array,
           load_weights]

@pytest.mark.parametrize('change', CHANGES)
def test_changes_of_weights_are_seen(change):
    "Logits without their biases are doubled, again and again"
    model = network('stack')
    model.output_head.bias.data.zero_()
    p = portable(model)
    for factor in (1, 2, 4, 8):
        assert torch.equal(p(*inputs()), factor*reference_logits())
        change(model)

@cache
def reference_logits():
    "Logits of the stack without their biases"
    model = network('stack')
    model.output_head.bias.data.zero_()
    return portable(model)(*inputs())

def test_training_is_seen_by_a_view():
    learn = small_learner(dls=numbered_animals())
    p,ids = portable(learn.model),torch.zeros(2, 20, dtype=torch.long)
    before = p(ids)
    quiet_fit(learn)
    assert torch.equal(p(ids), portable(learn.model)(ids))
    assert not torch.equal(p(ids), before)

def run_at_once(*calls):
    "Results of functions in threads"
    results = [None]*len(calls)
    def run(i, f): results[i] = f()
    threads = [Thread(target=run, args=(i, f)) for i,f in enumerate(calls)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    return results

def test_a_view_and_its_network_are_evaluated_at_once_with_the_results_they_have_alone():
    "Both wait for each other in every block"
    model = network('stack').train()
    p = portable(model)
    alone = [p(*inputs()), model(*inputs())]
    barrier = Barrier(2, timeout=60)
    def wait(*args): barrier.wait()
    for block in model.backbone.blocks: block.f.mixer.register_forward_pre_hook(wait)
    found = run_at_once(lambda: p(*inputs()), lambda: model(*inputs()))
    assert [o.requires_grad for o in found]==[False, True]
    assert_same_bits([o.detach() for o in found], [o.detach() for o in alone])

def test_other_threads_do_not_compute_in_portable_arithmetic():
    x = torch.tensor([.3, 1.7])
    with portable_arithmetic():
        other, = run_at_once(lambda: torch.erf(x))
        with pytest.raises(NotImplementedError): torch.erf(x)
    assert torch.equal(other, torch.erf(x))

@pytest.mark.parametrize('make', [deepcopy, copy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_of_a_view_have_the_same_bits_and_share_the_weights_of_their_network(make):
    p = portable(network('stack'))
    p(*inputs())
    other = make(p)
    assert_same_bits(outputs(other, inputs()), reference('stack'))
    scale_data(other.model)
    assert not make(p)._weights
    assert not torch.equal(other(*inputs()), reference('stack')[0])
    assert torch.equal(p(*inputs()), other(*inputs()))==(other.model is p.model)

OF_ALL_PARTS = 'stack','multiscale','coupled_every_block','sparse','substitution','deletion'

@pytest.mark.parametrize('kind', OF_ALL_PARTS)
def test_the_inverse_of_one_sequence_undoes_the_forward_pass_of_a_batch(kind):
    p = portable(network_of(kind))
    ids,t,mask = inputs()
    if kind=='deletion': mask = F.pad(mask, (1, 0), value=True)
    def context(rows): return dict(mask=mask[rows]) | (dict(t=t.float()[rows]) if p.time_conditioning else {})
    with p.arithmetic():
        h = p.state(ids)
        y,_ = p.backbone(h, **context(slice(None)))
        back = [p.backbone.inverse(y[i:i+1], **context(slice(i, i+1)))[0] for i in range(5)]
    assert not torch.equal(y, h)
    assert torch.equal(torch.cat(back), h)

# Likelihoods and samples

@pytest.mark.parametrize('name', RULES)
def test_likelihoods_have_the_same_bits_in_batches_of_any_size(name):
    p = portable(network_of('stack'))
    batches = [likelihoods(p, name, clean_ids(4, 8), bs=bs) for bs in (64, 3, 1)]
    for found in batches[1:]: assert_same_bits(found, batches[0])
    plain = likelihoods(network_of('stack'), name, clean_ids(4, 8))
    for found,expected in zip(batches[0], plain): assert torch.allclose(found, expected, atol=1e-3)

def test_log_probs_are_sums_of_the_nats_of_tokens():
    p = portable(network_of('stack'))
    nats,total = likelihoods(p, 'entropy', clean_ids(5))
    assert (nats>0).all()
    assert (nats.sum(1)+total).abs().max()<1e-8

def assert_writes(p, **options):
    "Assert that two sequences are written, the same ones twice"
    written,again = ([*sample(p, 2, 4, length=10, seed=1, **options)] for _ in range(2))
    assert len(written)==2 and all((o<V).all() for o in written)
    assert all(torch.equal(a, b) for a,b in zip(written, again))

@pytest.mark.parametrize('sampler', samplers_for(network('stack')))
def test_views_write_sequences_by_every_sampler(sampler):
    assert_writes(portable(network_of('stack')), sampler=sampler)

@pytest.mark.parametrize('kind', ['sparse', 'substitution', 'scores', 'deletion'])
def test_views_of_other_networks_write_sequences(kind):
    assert_writes(portable(network_of(kind)))
