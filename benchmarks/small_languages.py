"""Markov languages of a few tokens, and denoisers that learn them, for sums over all sequences."""
import math
import torch
import torch.nn.functional as F
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from common import random_weights

def markov_language(V, L, seed):
    "Return the probability of each sequence of L of V tokens, (V^L,), in the order of itertools.product"
    g = torch.Generator().manual_seed(seed)
    first,*rows = (torch.rand(V+1, V, generator=g, dtype=torch.float64)*4).exp()
    step = torch.stack(rows)/torch.stack(rows).sum(1, keepdim=True)
    x = torch.cartesian_prod(*[torch.arange(V)]*L).view(-1, L)
    p = (first/first.sum())[x[:,0]]
    for i in range(1, L): p = p*step[x[:,i-1],x[:,i]]
    return p

def entropy_bits(p):
    "Return the entropy of a language, bits per sequence: what the best model needs"
    return -torch.xlogy(p, p).sum().item()/math.log(2)

def make_network(V, L, seed, d_model=16):
    "Return a denoiser with fresh weights"
    torch.manual_seed(seed)
    return BijectiveDenoiser(DenoiserConfig(V, seq_len=L, d_model=d_model, n_heads=2, n_layers=2))

def untrained(V, L, seed, std=.5):
    "Return a denoiser with random weights"
    return random_weights(make_network(V, L, seed), std).eval()

def train(
    p, # Probability of each sequence, (V^L,)
    V, # Number of tokens
    L, # Tokens of a sequence
    seed, # Seed of weights, sequences and masks
    steps, # Training steps
    most_masks=None, # Largest number of masks; L if None
    bs=64, # Sequences in a batch
    lr=1e-2, # Peak learning rate
):
    "Return a denoiser that has learnt a language by sequences with 1 to most_masks masks, each as often"
    model,g = make_network(V, L, seed),torch.Generator().manual_seed(seed)
    x = torch.cartesian_prod(*[torch.arange(V)]*L).view(-1, L)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for _ in range(steps):
        x0 = x[torch.multinomial(p, bs, replacement=True, generator=g)]
        n = torch.randint(1, (most_masks or L)+1, (bs, 1), generator=g)
        masked = torch.rand(bs, L, generator=g).argsort(1).argsort(1)<n
        logits = model(x0.masked_fill(masked, V))
        nats = F.cross_entropy(logits.transpose(1, 2), x0, reduction='none')
        loss = (nats*masked/n).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
    return model.eval()

def expected_bits(p, nats):
    "Return the mean of a score over a language, bits per sequence"
    return (p@nats).item()/math.log(2)
