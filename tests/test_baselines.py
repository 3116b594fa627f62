"""The networks that the study compares with: the twin sees the left alone, MDLM's is what its paper says."""
import sys
from itertools import product
from pathlib import Path
import pytest
import torch
from torch import nn
from bijdiff.diffusion.corruption import Corruption
from bijdiff.likelihood.exact import log_prob
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'benchmarks'))
import baselines

V,L = 5,9

def with_random_weights(m, std=.4):
    "Draw all weights from a normal distribution"
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in m.parameters(): p.copy_(torch.randn(p.shape, generator=g)*std)
    return m.eval()

def make_twin(V=V, seq_len=L, dropout=0.):
    "An autoregressive network with random weights"
    config = DenoiserConfig(V, seq_len, d_model=12, n_heads=3, n_layers=3, n_bijective_layers=0,
                            dropout=dropout)
    model = with_random_weights(BijectiveDenoiser(config))
    baselines.make_causal(model)
    return model

def make_dit(V=V, seq_len=L, **kwargs):
    noise = Corruption(V, schedule='log_linear')
    return baselines.DiT(noise, seq_len, **dict(d_model=12, n_heads=3, n_layers=2, cond_dim=4) | kwargs)

# The twin

def judge_causality(model):
    "Outputs before a changed token are the same to the bit; all others change"
    x = torch.randint(0, V, (1, L), generator=torch.Generator().manual_seed(3))
    before = model(x)
    for i in range(L):
        y = x.clone()
        y[0,i] = (y[0,i]+1)%V
        after = model(y)
        assert torch.equal(after[:,:i], before[:,:i])
        assert (after[:,i:]!=before[:,i:]).any(-1).all()

def test_the_twin_sees_the_left_alone():
    judge_causality(make_twin())

@pytest.mark.parametrize('part', ['CausalMixing', 'CausalAttention'])
def test_both_parts_must_be_causal(part, monkeypatch):
    "With either of them as it is in a denoiser the judge fails"
    monkeypatch.setattr(baselines, part, getattr(baselines, part).__bases__[0])
    with pytest.raises(AssertionError): judge_causality(make_twin())

def test_causal_mixing_is_a_weighted_sum_of_the_past():
    m = baselines.CausalMixing(2, 3)
    x = torch.randn(1, 6, 2)
    y = torch.zeros_like(x)
    for i,back in product(range(6), range(3)):
        if i>=back: y[:,i] += x[:,i-back]*m.weight[:,0,2-back]
    torch.testing.assert_close(m(x), y)

def test_probabilities_of_the_twin_add_up_to_one():
    model = make_twin(3, 4)
    texts = torch.tensor(list(product(range(3), repeat=4)))
    total = (-baselines.next_token_nats(model, texts)).exp().sum().item()
    assert total==pytest.approx(1, abs=1e-5)

def test_a_twin_of_a_document_is_scored_chunk_by_chunk():
    "A chunk that is cut short counts as its own tokens"
    model = make_twin()
    ids = torch.randint(0, V, (2*L+4,))
    nats = baselines.next_token_nats(model, ids)
    assert len(nats)==3
    for found,chunk in zip(nats, ids.split(L)):
        logp = model(torch.cat([torch.tensor([V]), chunk[:-1]])[None])[0].log_softmax(-1)
        assert found.item()==pytest.approx(-logp[range(len(chunk)), chunk].sum().item(), rel=1e-4)

def test_a_twin_is_scored_without_dropout():
    model = make_twin(dropout=.5).train()
    ids = torch.randint(0, V, (2, L))
    assert torch.equal(baselines.next_token_nats(model, ids), baselines.next_token_nats(model, ids))
    assert model.training

def test_a_twin_of_bijective_blocks_is_refused():
    model = BijectiveDenoiser(DenoiserConfig(V, L, d_model=12, n_heads=3, n_layers=2))
    with pytest.raises(ValueError, match='n_bijective_layers is 2'): baselines.make_causal(model)

# The network of MDLM

def test_a_fresh_network_adds_nothing_to_the_embedding():
    "All gates are 0: blocks are identities, and all logits are 0"
    model = make_dit()
    ids,t = torch.randint(0, V+1, (2, L)),torch.tensor([.1, .7])
    x = model.embed(ids)
    assert torch.equal(model(ids, t), torch.zeros(2, L, V))
    normal = nn.functional.layer_norm(x, (12,))
    torch.testing.assert_close(model.hidden(ids, t), normal)

def block_by_hand(block, x, cond, d_head):
    "A block of one sequence, (L, d), by complex rotations and an explicit sum over keys"
    def normal(norm, x):
        shift,scale,gate = norm.to_three(cond).chunk(3)
        x = (x-x.mean(-1, keepdim=True))/(x.var(-1, keepdim=True, unbiased=False)+1e-5).sqrt()
        return x*norm.norm.weight*(1+scale)+shift, gate
    def turned(q):
        a,b = q.chunk(2, -1)
        theta = 10000.**(-torch.arange(d_head//2)*2/d_head)
        z = torch.complex(a, b)*torch.exp(1j*torch.arange(len(q))[:,None]*theta)
        return torch.cat([z.real, z.imag], -1)
    h,gate = normal(block.attention_norm, x)
    heads = []
    for w in block.qkv.weight.view(3, block.n_heads, d_head, -1).transpose(0, 1):
        q,k,v = (h@o.T for o in w)
        heads.append((turned(q)@turned(k).T/d_head**.5).softmax(-1)@v)
    x = x+gate*(torch.cat(heads, -1)@block.out.weight.T)
    h,gate = normal(block.mlp_norm, x)
    return x+gate*block.mlp(h)

def test_a_block_by_hand():
    model = with_random_weights(make_dit())
    x,cond = torch.randn(L, 12),torch.randn(4)
    found = model.blocks[0](x[None], cond[None], baselines.rotary_angles(L, 4))[0]
    torch.testing.assert_close(found, block_by_hand(model.blocks[0], x, cond, 4), atol=1e-4, rtol=1e-4)

def test_the_network_knows_the_time():
    model = with_random_weights(make_dit())
    ids = torch.randint(0, V+1, (1, L))
    assert not torch.equal(model(ids, torch.tensor([.2])), model(ids, torch.tensor([.3])))

def test_likelihoods_of_the_network_add_up_to_one():
    "It is a `Denoiser`: the exact likelihood works"
    model = with_random_weights(make_dit(3, 4)).double()
    texts = torch.tensor(list(product(range(3), repeat=4)))
    total = log_prob(model, texts, rule='spread', steps=2).double().exp().sum().item()
    assert total==pytest.approx(1, abs=1e-9)

def test_dropout_is_for_training():
    model = with_random_weights(make_dit(dropout=.5))
    ids,t = torch.randint(0, V+1, (1, L)),torch.tensor([.2])
    assert torch.equal(model(ids, t), model(ids, t))
    model.train()
    assert not torch.equal(model(ids, t), model(ids, t))

def test_padding_is_refused():
    with pytest.raises(ValueError, match='expected None: this network'):
        make_dit()(torch.zeros(1, L, dtype=torch.long), torch.tensor([.2]), torch.ones(1, L).bool())
