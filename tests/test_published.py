"""Weights in the layout of the public code of MDLM and SEDD: network, meaning of its outputs, files.

`layout` lists names and shapes as the public code has them, and `outputs` computes the network in NumPy, from
the papers and that layout, one head at a time and with rotations as complex numbers. Both share no code with
the package."""
import itertools
import math
import re
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from bijdiff.likelihood.bounds import nelbo
from bijdiff.likelihood.codec import compress, decompress
from bijdiff.likelihood.exact import log_prob
from bijdiff.model.predictions import output_scores
from bijdiff.model.published import PublishedNetwork, load_published
from bijdiff.sampling.generate import sample
from helpers import assert_drawn_from, count_sequences, plant_fault

V,L = 3,3
D,HEADS,BLOCKS,COND = 8,2,2,5
KINDS = 'mdlm','mdlm_time','sedd'
EPS = 1e-3
ALL = torch.tensor([*itertools.product(range(V), repeat=L)])

# A checkpoint, and the network in NumPy

def block_layout(i):
    "Shapes of the tensors of one block, by name"
    b = f'blocks.{i}.'
    mlp = {f'{b}mlp.0.weight':(4*D, D), f'{b}mlp.0.bias':(4*D,)}
    mlp |= {f'{b}mlp.2.weight':(D, 4*D), f'{b}mlp.2.bias':(D,)}
    attention = {f'{b}attn_qkv.weight':(3*D, D), f'{b}attn_out.weight':(D, D)}
    norms = {f'{b}norm1.weight':(D,), f'{b}norm2.weight':(D,)}
    level = {f'{b}adaLN_modulation.weight':(6*D, COND), f'{b}adaLN_modulation.bias':(6*D,)}
    return mlp | attention | norms | level

def layout(n_ids=V+1):
    "Shapes of the tensors of a network, by name, without the rotary frequencies"
    shapes = {'vocab_embed.embedding':(n_ids, D),
              'sigma_map.mlp.0.weight':(COND, 256), 'sigma_map.mlp.0.bias':(COND,),
              'sigma_map.mlp.2.weight':(COND, COND), 'sigma_map.mlp.2.bias':(COND,)}
    for i in range(BLOCKS): shapes |= block_layout(i)
    out = 'output_layer.'
    shapes |= {f'{out}adaLN_modulation.weight':(2*D, COND), f'{out}adaLN_modulation.bias':(2*D,)}
    head = {f'{out}linear.weight':(n_ids, D), f'{out}linear.bias':(n_ids,)}
    return shapes | head | {f'{out}norm_final.weight':(D,)}

def weights(seed=0, n_ids=V+1):
    "Random tensors of this layout"
    g = torch.Generator().manual_seed(seed)
    tensors = {k:.4*torch.randn(shape, generator=g) for k,shape in layout(n_ids).items()}
    d_head = D//HEADS
    return tensors | {'rotary_emb.inv_freq':10000.**(-torch.arange(0, d_head, 2)/d_head)}

def write(folder, tensors, prefix=''):
    "A safetensors file"
    path = folder/'model.safetensors'
    save_file({prefix+k:v for k,v in tensors.items()}, path)
    return path

def read(folder, kind, seed=0, dtype=torch.float64):
    "A denoiser with the random tensors of a seed"
    return load_published(write(folder, weights(seed)), kind, L).to(dtype)

def silu(x): return x/(1+np.exp(-x))
def gelu(x): return .5*x*(1+np.tanh((2/np.pi)**.5*(x+.044715*x**3)))

def normalised(x, weight):
    "Norm over the features, without a bias"
    centred = x-x.mean(-1, keepdims=True)
    return weight*centred/np.sqrt((centred**2).mean(-1, keepdims=True)+1e-5)

def turned(x):
    "Rotary positions: features j and j+d/2 of a head (L, d) as one complex number"
    d = x.shape[1]
    z = x[:,:d//2]+1j*x[:,d//2:]
    z = z*np.exp(1j*np.arange(len(x))[:,None]*10000.**(-2*np.arange(d//2)/d))
    return np.concatenate([z.real, z.imag], 1)

def attention(x, qkv, out):
    "Attention of every position of one sequence (L, D) to all, head by head"
    q,k,v = np.split(x@qkv.T, 3, -1)
    results,d = [],D//HEADS
    for h in range(HEADS):
        part = slice(h*d, (h+1)*d)
        logits = turned(q[:,part])@turned(k[:,part]).T/d**.5
        p = np.exp(logits-logits.max(-1, keepdims=True))
        results.append(p/p.sum(-1, keepdims=True)@v[:,part])
    return np.concatenate(results, -1)@out.T

def level_vector(w, sigma):
    "Vector of a noise level"
    angles = sigma*np.exp(-math.log(10000)*np.arange(128)/128)
    h = w['sigma_map.mlp.0.weight']@np.concatenate([np.cos(angles), np.sin(angles)])+w['sigma_map.mlp.0.bias']
    return silu(w['sigma_map.mlp.2.weight']@silu(h)+w['sigma_map.mlp.2.bias'])

def block(x, c, w):
    "One block, its tensors by the names within it"
    m = w['adaLN_modulation.weight']@c+w['adaLN_modulation.bias']
    shift1,scale1,gate1,shift2,scale2,gate2 = m.reshape(6, D)
    h = normalised(x, w['norm1.weight'])*(1+scale1)+shift1
    x = x+gate1*attention(h, w['attn_qkv.weight'], w['attn_out.weight'])
    h = normalised(x, w['norm2.weight'])*(1+scale2)+shift2
    h = gelu(h@w['mlp.0.weight'].T+w['mlp.0.bias'])
    return x+gate2*(h@w['mlp.2.weight'].T+w['mlp.2.bias'])

def outputs(tensors, ids, sigma):
    "Outputs of the network for one sequence, (L, n_ids)"
    w = {k:v.double().numpy() for k,v in tensors.items()}
    c = level_vector(w, sigma)
    x = w['vocab_embed.embedding'][ids]
    for i in range(BLOCKS):
        name = f'blocks.{i}.'
        x = block(x, c, {k.removeprefix(name):v for k,v in w.items() if k.startswith(name)})
    m = w['output_layer.adaLN_modulation.weight']@c+w['output_layer.adaLN_modulation.bias']
    shift,scale = m.reshape(2, D)
    h = normalised(x, w['output_layer.norm_final.weight'])*(1+scale)+shift
    return h@w['output_layer.linear.weight'].T+w['output_layer.linear.bias']

def level(t): return -math.log(1-(1-EPS)*t)

def left_to_right(tensors, ids, sigma_of):
    "Log-probability of a sequence from left to right, with noise levels by the number of masks"
    nats = 0.
    for i in range(L):
        seen = np.where(np.arange(L)<i, ids, V)
        logits = outputs(tensors, seen, sigma_of(L-i))[i,:V]
        nats += logits[ids[i]]-np.log(np.exp(logits).sum())
    return nats

# The network

@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_outputs_are_those_of_the_network_written_in_numpy(tmp_path, kind):
    model,ids = read(tmp_path, kind),torch.tensor([[0, V, 2], [V, V, 1]])
    t = [.3, .9]
    found = model(ids, torch.tensor(t))
    for row,x,time in zip(found, ids, t):
        sigma = 0. if kind=='mdlm' else level(time)
        np.testing.assert_allclose(row, outputs(weights(), x.numpy(), sigma), atol=1e-6)

def test_names_and_shapes_of_the_network_are_those_of_the_layout():
    network = PublishedNetwork(V+1, D, HEADS, BLOCKS, COND)
    found = {k:tuple(v.shape) for k,v in network.state_dict().items()}
    assert found==layout()|{'rotary_emb.inv_freq':(D//HEADS//2,)}

@torch.no_grad()
def test_positions_of_nothing_but_masks_differ_by_rounding_alone(tmp_path):
    model = read(tmp_path, 'mdlm', dtype=torch.float32)
    model.seq_len = 50
    h = model.hidden(torch.full((7, 50), V))
    torch.testing.assert_close(h, h[:,:1].expand_as(h), atol=1e-5, rtol=1e-5)
    with_token = torch.full((7, 50), V)
    with_token[:,10] = 0
    assert (model.hidden(with_token)!=h).any(-1).all()

@pytest.mark.parametrize('rule', ['confidence', 'entropy'])
def test_rounding_does_not_choose_the_order(tmp_path, rule):
    "Likelihoods by adaptive rules are the same in any batch"
    for seed in range(3):
        model = read(tmp_path, 'mdlm', seed, torch.float32)
        one,all_at_once = (log_prob(model, ALL, rule, bs=bs) for bs in (1, 27))
        torch.testing.assert_close(one, all_at_once, atol=1e-5, rtol=1e-5)

# What the outputs mean

@pytest.mark.parametrize('rule', ['left_to_right', 'spread', 'confidence'])
@pytest.mark.parametrize('kind', KINDS)
def test_probabilities_of_all_sequences_add_up_to_1(tmp_path, kind, rule):
    for seed in range(3):
        model = read(tmp_path, kind, seed, torch.float32)
        for steps in (None, 2):
            total = log_prob(model, ALL, rule, steps).exp().sum().item()
            assert total==pytest.approx(1, abs=1e-6)

@pytest.mark.parametrize('kind', KINDS)
def test_log_prob_is_that_of_the_numpy_network_at_the_levels_of_the_formula(tmp_path, kind):
    def sigma(m): return 0. if kind=='mdlm' else -math.log(max(1-m/L, EPS))
    expected = [left_to_right(weights(), x.numpy(), sigma) for x in ALL]
    np.testing.assert_allclose(log_prob(read(tmp_path, kind), ALL), expected, atol=1e-6)

@pytest.mark.parametrize('kind', ['mdlm_time', 'sedd'])
def test_the_level_depends_on_the_number_of_masks_alone(tmp_path, kind):
    model,seen = read(tmp_path, kind),set()
    def note(_, args): seen.update((int((x==V).sum()), round(s.item(), 12)) for x,s in zip(*args))
    model.f.register_forward_pre_hook(note)
    for rule in ('left_to_right', 'spread', 'confidence'): log_prob(model, ALL, rule)
    sample(model, 20, rule='entropy')
    assert seen=={(m, round(-math.log(max(1-m/L, EPS)), 12)) for m in (1, 2, 3)}

@pytest.mark.parametrize('kind, rule, steps', [
    ('mdlm', 'spread', None), ('mdlm_time', 'left_to_right', 2), ('sedd', 'left_to_right', None),
    ('sedd', 'confidence', None), ('sedd', 'entropy', 2)])
def test_frequencies_of_samples_are_the_probabilities(tmp_path, kind, rule, steps):
    model = read(tmp_path, kind, seed=1)
    x = sample(model, 4000, steps, rule=rule, seed=3)
    p = log_prob(model, ALL, rule, steps).exp().numpy()
    assert_drawn_from(count_sequences(x, V), p/p.sum(), 5)

def test_frequencies_see_another_level(tmp_path, monkeypatch):
    x = sample(read(tmp_path, 'sedd', seed=1), 4000, rule='left_to_right', seed=3)
    def at_level_0(f): return lambda self,ids,sigma: f(self, ids, 0*sigma)
    plant_fault(monkeypatch, (PublishedNetwork, 'forward'), at_level_0)
    p = log_prob(read(tmp_path, 'sedd', seed=1), ALL).exp().numpy()
    with pytest.raises(AssertionError): assert_drawn_from(count_sequences(x, V), p/p.sum(), 5)

@pytest.mark.parametrize('kind', KINDS)
def test_a_large_output_for_the_mask_changes_nothing(tmp_path, kind):
    tensors = weights()
    before = log_prob(load_published(write(tmp_path, tensors), kind, L), ALL)
    tensors['output_layer.linear.bias'][V] = 50.
    model = load_published(write(tmp_path, tensors), kind, L)
    torch.testing.assert_close(log_prob(model, ALL), before)
    assert (sample(model, 100)<V).all()

@torch.no_grad()
def test_scores_of_sedd_are_its_outputs_scaled_by_the_level(tmp_path):
    model,ids,t = read(tmp_path, 'sedd'),torch.tensor([[0, V, 2], [V, V, 1]]),torch.tensor([.3, .9])
    found = output_scores(model, model(ids, t)[...,:V], ids, model.noise.state_probs(t.double())).numpy()
    for row,x,time in zip(found, ids.numpy(), t.tolist()):
        sigma = level(time)
        expected = outputs(weights(), x, sigma)-math.log(math.exp(sigma)-1)-math.log(V)
        np.put_along_axis(expected, x[:,None], 0., 1)
        np.testing.assert_allclose(row[x==V], expected[x==V], atol=1e-6)

@pytest.mark.parametrize('kind', KINDS)
def test_bound_and_samplers_in_time_are_there(tmp_path, kind):
    model = read(tmp_path, kind)
    assert nelbo(model, ALL[:2], n=8).mean.isfinite().all()
    for sampler in ('first_hitting', 'tweedie'):
        assert (sample(model, 5, steps=4, sampler=sampler)<V).all()

# Files

@pytest.mark.parametrize('prefix', ['', 'backbone.'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_a_file_is_read_with_and_without_prefix_in_any_precision(tmp_path, prefix, dtype):
    tensors = {k:v.to(dtype) for k,v in weights().items()}
    model = load_published(write(tmp_path, tensors, prefix), 'sedd', L)
    assert not model.training and (model.n_ids,model.mask_id,model.seq_len)==(V+1,V,L)
    assert {v.dtype for v in model.state_dict().values()}=={torch.float32}
    assert all(torch.equal(model.f.state_dict()[k], v.float()) for k,v in tensors.items())

def test_the_mask_may_be_any_id(tmp_path):
    tensors,order = weights(),torch.tensor([0, 2, 3, 1])
    middle = load_published(write(tmp_path, tensors), 'sedd', L, mask_id=1)
    for k in ('vocab_embed.embedding', 'output_layer.linear.weight', 'output_layer.linear.bias'):
        tensors[k] = tensors[k][order]
    last = load_published(write(tmp_path, tensors), 'sedd', L)
    torch.testing.assert_close(log_prob(middle, order[ALL]), log_prob(last, ALL))
    assert torch.equal(sample(middle, 50), order[sample(last, 50)])

class Bytes:
    "All bytes as ids"
    kind = 'byte'
    def encode(self, text): return [*text.encode()]
    def decode(self, ids): return bytes(ids).decode()

@pytest.mark.parametrize('kind', KINDS)
def test_a_text_comes_back_from_as_many_bits_as_log_prob_says(tmp_path, kind):
    path,text = write(tmp_path, weights(n_ids=257)),b'published networks '*20
    model = load_published(path, kind, 19, Bytes())
    blob = compress(model, text, 'confidence', steps=5, context=0)
    assert decompress(model, blob)==text
    ids = torch.tensor([*text]).view(20, 19)
    bits = -log_prob(model, ids, 'confidence', 5).sum().item()/math.log(2)
    header = int.from_bytes(blob[9:13], 'little')+13+16
    assert abs(8*(len(blob)-header)-bits)<bits/100+64

def with_tensor(**changed): return lambda: weights()|changed
def without(*dropped): return lambda: {k:v for k,v in weights().items() if k not in dropped}

BAD = {
    'output_layer.linear.bias':without('output_layer.linear.bias'),
    'blocks.1.norm2.weight':without('blocks.1.norm2.weight'),
    'rotary_emb.inv_freq':without('rotary_emb.inv_freq'),
    'vocab_embed.embedding':without('vocab_embed.embedding'),
    'blocks.0.adaLN_modulation.bias':lambda: {k:v for k,v in weights().items() if 'blocks' not in k},
    'noise.sigma_max':with_tensor(**{'noise.sigma_max':torch.ones(1)}),
    'blocks.7.extra':with_tensor(**{'blocks.7.extra':torch.ones(1)}),
    'blocks.1.attn_out.weight':with_tensor(**{'blocks.1.attn_out.weight':torch.ones(D, D+1)}),
    'sigma_map.mlp.0.weight':with_tensor(**{'sigma_map.mlp.0.weight':torch.ones(COND, 128)}),
    'sigma_map.mlp.0.bias':with_tensor(**{'sigma_map.mlp.0.bias':torch.ones(())}),
    'the shape of rotary_emb.inv_freq':with_tensor(**{'rotary_emb.inv_freq':torch.ones(3)}),
    'the shape of vocab_embed.embedding':with_tensor(**{'vocab_embed.embedding':torch.ones(V+1, 0)}),
    'the type of blocks.0.norm1.weight':with_tensor(**{'blocks.0.norm1.weight':torch.ones(D).long()}),
    'backbone.':with_tensor(**{'backbone.blocks.0.norm1.weight':torch.ones(D)}),
}

@pytest.mark.parametrize('name', BAD)
def test_a_file_with_other_tensors_is_refused_by_their_names(tmp_path, name):
    path = write(tmp_path, BAD[name]())
    with pytest.raises(ValueError, match=re.escape(name)) as e: load_published(path, 'mdlm', L)
    assert str(path) in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('suffix', ['.bin', '.pt', '.pth', '.ckpt'])
def test_a_pickle_is_not_read_and_the_error_says_how_to_convert_it(tmp_path, suffix):
    path = tmp_path/f'model{suffix}'
    torch.save(weights(), path)
    advice = 'path.*save_file.*weights_only=True'
    with pytest.raises(ValueError, match=advice): load_published(path, 'mdlm', L)

def test_a_pickle_with_the_name_of_another_kind_is_refused(tmp_path):
    path = tmp_path/'model.safetensors'
    torch.save(weights(), path)
    with pytest.raises(ValueError, match='not a safetensors file'): load_published(path, 'mdlm', L)

def test_a_missing_file_is_named(tmp_path):
    path = tmp_path/'none.safetensors'
    with pytest.raises(OSError, match=path.name): load_published(path, 'mdlm', L)

@pytest.mark.parametrize('name, value', [
    ('kind', 'duo'), ('kind', None), ('seq_len', 0), ('seq_len', None), ('mask_id', V+1), ('mask_id', -1)])
def test_wrong_arguments_are_named(tmp_path, name, value):
    arguments = dict(kind='mdlm', seq_len=L) | {name:value}
    with pytest.raises(ValueError, match=name): load_published(write(tmp_path, weights()), **arguments)

@pytest.mark.parametrize('kind', ['mdlm_time', 'sedd'])
def test_a_network_with_a_level_needs_times(tmp_path, kind):
    with pytest.raises(ValueError, match='t is None'): read(tmp_path, kind)(ALL)

def test_padding_is_refused(tmp_path):
    with pytest.raises(ValueError, match='mask'): log_prob(read(tmp_path, 'mdlm'), ALL[:1], lengths=[2])
