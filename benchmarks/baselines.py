"""Networks that the study compares with: the transformer of MDLM, and an autoregressive twin of ours.

`DiT` is the network of masked diffusion as published: Sahoo et al. 2024 (MDLM), section 4 and the appendix on
training, with the network of Lou et al. 2024 (SEDD), after Peebles and Xie 2023, section 3.2. Adaptive norms
and gates depend on the time and begin at zero; positions are rotary; there is no local mixing. (The public
configuration of MDLM leaves the time constant, which its paper finds to make little difference.)

`make_causal` turns a denoiser of standard blocks into a network that sees what stands to the left: attention
has a causal mask, and local mixing is padded on the left only. It is trained on the next token."""
import torch
import torch.nn.functional as F
from fastcore.foundation import L
from torch import nn, Tensor
from bijdiff.checks import check
from bijdiff.layers.attention import attend, BidirectionalAttention, head_dim, rotary_angles, rotate
from bijdiff.layers.block import AdaptiveNorm, LocalMixing, TimeEmbedding
from bijdiff.layers.coupling import Dropout
from bijdiff.likelihood.bounds import chunk_batches
from bijdiff.model.denoiser import eval_mode, Features
from bijdiff.model.predictions import logits_of
from bijdiff.training.noising import CorruptionCallback, DiffusionLoss

# The network of MDLM

class GatedNorm(nn.Module):
    "LayerNorm with shift, scale and gate from a vector; all three are 0 at the beginning"
    def __init__(self, d_model, cond_dim):
        super().__init__()
        self.norm = nn.LayerNorm(d_model, bias=False)
        self.to_three = nn.Linear(cond_dim, 3*d_model)
        for p in self.to_three.parameters(): nn.init.zeros_(p)

    def forward(self, x, cond):
        "Return the normalised state and the gate, (B, L, d_model) and (B, 1, d_model)"
        shift,scale,gate = self.to_three(cond)[:,None].chunk(3, -1)
        return self.norm(x)*(1+scale) + shift, gate


class DiTBlock(nn.Module):
    "Attention, then an MLP of four times the width, each behind an adaptive norm and before a gate"
    def __init__(self, d_model, n_heads, cond_dim, dropout):
        super().__init__()
        self.n_heads = n_heads
        self.attention_norm,self.mlp_norm = (GatedNorm(d_model, cond_dim) for _ in range(2))
        self.qkv = nn.Linear(d_model, 3*d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        up,down = nn.Linear(d_model, 4*d_model),nn.Linear(4*d_model, d_model)
        self.mlp = nn.Sequential(up, nn.GELU('tanh'), down)
        self.dropout = Dropout(dropout)

    def attend(self, x, rotary):
        q,k,v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        y = attend(rotate(q, *rotary), rotate(k, *rotary), v)
        return self.out(y.transpose(1, 2).flatten(2))

    def forward(self, x, cond, rotary):
        h,gate = self.attention_norm(x, cond)
        x = x + gate*self.dropout(self.attend(h, rotary))
        h,gate = self.mlp_norm(x, cond)
        return x + gate*self.dropout(self.mlp(h))


class DiT(nn.Module):
    "Denoiser with the network of MDLM, by the protocol `Denoiser`"
    time_conditioning = True
    def __init__(self, noise, seq_len, d_model, n_heads, n_layers, cond_dim, dropout=0., tokenizer=None):
        super().__init__()
        self.noise,self.seq_len,self.tokenizer = noise,seq_len,tokenizer
        V = noise.vocab_size
        self.d_head = head_dim(d_model, n_heads)
        self.embed = nn.Embedding(V+1, d_model)
        nn.init.uniform_(self.embed.weight, -d_model**-.5, d_model**-.5)
        self.time = nn.Sequential(TimeEmbedding(cond_dim), nn.SiLU())
        self.blocks = nn.ModuleList(DiTBlock(d_model, n_heads, cond_dim, dropout) for _ in range(n_layers))
        self.norm = AdaptiveNorm(d_model, cond_dim)
        self.output_head = nn.Linear(d_model, V)
        for p in self.output_head.parameters(): nn.init.zeros_(p)

    @property
    def mask_id(self)->int: return self.noise.vocab_size
    @property
    def n_ids(self)->int: return self.noise.vocab_size+1
    @property
    def clean_ids(self)->Tensor: return torch.arange(self.n_ids)<self.mask_id
    @property
    def device(self): return self.embed.weight.device

    def hidden(self, ids, t=None, mask=None):
        "Return what the head takes, (B, L, d_model)"
        check(mask is None, 'mask', mask, 'None: this network takes no padding')
        cond = self.time(t.to(self.embed.weight))
        rotary = rotary_angles(ids.shape[1], self.d_head, self.device)
        x = self.embed(ids)
        for block in self.blocks: x = block(x, cond, rotary)
        return self.norm(x, cond)

    def head(self, h): return self.output_head(h)
    def forward(self, ids, t=None, mask=None, features=False):
        h = self.hidden(ids, t, mask)
        return Features(h) if features else self.head(h)

OF_BLOCKS = 'log_det','invertibility','lattice_usage','block_norm' # Callbacks that look into our blocks

def use_dit(learn, seed, dropout, **sizes):
    "Give a learner the network of MDLM in place of its own"
    tokenizer,noise = learn.dls.tokenizer,learn.corruption.corruption
    torch.manual_seed(seed)
    model = DiT(noise, learn.dls.seq_len, **sizes, dropout=dropout, tokenizer=tokenizer)
    learn.model = learn.loss_func.model = model.to(learn.dls.device)
    learn.remove_cbs([getattr(learn, o) for o in OF_BLOCKS])
    learn.metrics = L(m for m in learn.metrics if m.callback not in OF_BLOCKS)

# The autoregressive twin

class CausalMixing(LocalMixing):
    "Weighted sum over a position and those before it, separately for every feature"
    def forward(self, x, mask=None):
        h = F.pad(x.transpose(1, 2), (self.weight.shape[-1]-1, 0))
        return F.conv1d(h, self.weight, groups=len(self.weight)).transpose(1, 2)


class CausalAttention(BidirectionalAttention):
    "Attention of each position to itself and to those before it"
    def forward(self, x, mask=None, rotary=None, rows=None):
        qk,v = self._split_heads(self.qkv(x)).split([2*self.n_heads, self.n_heads], 1)
        q,k = rotate(F.layer_norm(qk, (self.d_head,)), *rotary).chunk(2, 1)
        past = torch.ones(len(x[0]), len(x[0]), dtype=torch.bool, device=x.device).tril()
        y = attend(q, k, v, past)
        return self.dropout(self.out(y.transpose(1, 2).flatten(2)))

def make_causal(model):
    "Let a denoiser of standard blocks see the left alone, in place; its weights stay"
    n = model.backbone.n_bijective_layers
    check(n==0, 'n_bijective_layers', n, '0: the twin has standard blocks')
    for m in model.modules():
        if type(m) is LocalMixing: m.__class__ = CausalMixing
        if type(m) is BidirectionalAttention: m.__class__ = CausalAttention

def shifted(ids, first):
    "Return ids one place to the right, behind a first one"
    return F.pad(ids[:,:-1], (1, 0), value=first)


class NextTokenCallback(CorruptionCallback):
    "Show the network each sequence one place to the right, behind a mask; the times mean nothing to it"
    name = 'corruption'
    def inputs(self, noisy, t):
        features = not hasattr(self.learn, 'gather_preds')
        return shifted(noisy.x0, self.corruption.vocab_size), None, None, features


class NextTokenLoss(DiffusionLoss):
    "Mean over tokens of the negative log-likelihood given those to the left, nats"
    def per_sequence(self, out, clean, *target):
        "Return nats per token, (B,)"
        logits = logits_of(self.model, out.hidden) if isinstance(out, Features) else out
        return F.cross_entropy(logits.float().transpose(1, 2), clean, reduction='none').mean(1)

    def __call__(self, out, clean, *target):
        nats = self.per_sequence(out, clean)
        self.nats = nats.detach()
        return nats if self.reduction=='none' else nats.mean()

def use_next_token(learn):
    "Train the network of a learner on the next token; its blocks must be standard ones"
    make_causal(learn.model)
    old = learn.corruption
    learn.remove_cb(old)
    learn.add_cb(NextTokenCallback(old.corruption, old.seed, 1))
    learn.loss_func = NextTokenLoss(old.corruption, learn.model)

@torch.no_grad()
def next_token_nats(model, ids, bs=32):
    "Return nats of each chunk of a text, by an autoregressive network; ids are (N,), or chunks (B, L)"
    batches = chunk_batches(ids, model.seq_len, bs) if ids.ndim==1 else ids.split(bs)
    loss = NextTokenLoss(model.noise, model)
    with eval_mode(model):
        nats = [loss.per_sequence(model(shifted(x, model.mask_id)), x)*x.shape[1] for x in batches]
    return torch.cat(nats).double()
