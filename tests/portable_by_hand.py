"""Portable arithmetic and a bijective denoiser in NumPy, from the formulas, without the package's code.

Networks are float32 and rounded after every operation; functions and sums are float64. A number on a grid is
rounded by division, whereas the package adds and subtracts a large number. Exact sums need no order here."""
import math
from functools import cache
import numpy as np

LN2 = 0.6931471805599453
LN2_HIGH,LN2_LOW = 0.693147180369123816490,1.90821492927058770002e-10
HALF_PI = 1.5707963267948966
HALF_PI_PARTS = 1.57079632673412561417,6.07710050630396597660e-11,2.02226624879595063154e-21

# grids and exact sums

def row_power(x, axis=-1):
    "Largest power of two that is at most the largest size of each row, and at least 2^-40"
    _,exponent = np.frexp(np.abs(x.astype(np.float64)).max(axis, keepdims=True))
    return np.maximum(np.ldexp(1., exponent-1), 2.**-40)

def round_to(x, step):
    "Nearest multiples of a step, half to even, float64"
    return np.rint(x.astype(np.float64)/step)*step

def on_grid(x, bits, axis=-1):
    "Rows rounded to multiples of 2p/2^bits, p being the power of the row"
    return round_to(x, row_power(x, axis)*2.**(1-bits))

def linear(x, weight, bias=None):
    "x W^T + b, with 22 bits for a number and 21 for a weight"
    y = (on_grid(x, 22)@on_grid(weight, 21).T).astype(np.float32)
    return y if bias is None else y+bias

# functions of float64 numbers

def horner(x, coefficients):
    "Polynomial, from the highest coefficient to the lowest"
    total = np.full_like(x, coefficients[0])
    for c in coefficients[1:]: total = total*x+c
    return total

def sqrt(x):
    "Heron's method on m of x = m 4^h, m from 1/2 to 2"
    m,e = np.frexp(x)
    h = e//2
    m = np.ldexp(m, e-2*h)
    y = .5*m+.5
    for _ in range(4): y = (y+m/y)*.5
    return np.where(x==0, 0., np.ldexp(y, h))

EXP_SERIES = [1/math.factorial(i) for i in range(24, -1, -1)]

@cache
def roots_of_two():
    "2^(j/512) for j from 0 to 511"
    return horner(np.arange(512.)*(LN2/512), EXP_SERIES)

def exp(x):
    "2^(n/512) e^r, n the whole number nearest to 512 x/ln 2"
    x = x.clip(-700, 700)
    n = np.rint(x*(512/LN2))
    r = (x-n*(LN2_HIGH/512))-n*(LN2_LOW/512)
    n = n.astype(np.int64)
    return np.ldexp(roots_of_two()[n%512]*horner(r, EXP_SERIES[-5:]), n//512)

def log(x):
    "e ln 2 + 2 artanh((m-1)/(m+1)) for x = m 2^e, m from sqrt(1/2) to sqrt(2)"
    m,e = np.frexp(x)
    small = m<math.sqrt(.5)
    m,e = np.where(small, 2*m, m),(e-small).astype(np.float64)
    s = (m-1)/(m+1)
    artanh = horner(s*s, [1/(2*i+1) for i in range(12, -1, -1)])
    return e*LN2_HIGH + (2*s*artanh + e*LN2_LOW)

SIGNED = [(-1)**(i//2)/math.factorial(i) for i in range(18)]

def cos_sin(x):
    "Series of x - n pi/2, which change places in odd quarters"
    n = np.rint(x*(1/HALF_PI))
    r = x
    for part in HALF_PI_PARTS: r = r-n*part
    c,s = horner(r*r, SIGNED[16::-2]),r*horner(r*r, SIGNED[17::-2])
    quarter = n.astype(np.int64)%4
    return [np.choose(quarter, o) for o in ([c, -s, -c, s], [s, c, -s, -c])]

def cos(x): return cos_sin(x)[0]
def sin(x): return cos_sin(x)[1]
def sigmoid(x): return 1/(1+exp(-x))
def tanh(x): return 1-2/(1+exp(2*x))

def acos(x):
    "2 arcsin(sqrt((1-|x|)/2)) by four Newton steps; pi minus that for negative numbers"
    s = sqrt((1-np.abs(x))*.5)
    y = s*(1+s*s*(1/6))
    for _ in range(4):
        c,sine = cos_sin(y)
        y = y-(sine-s)/c
    return np.where(x<0, 2*HALF_PI-2*y, 2*y)

def softmax(x):
    "Exponentials, 0 below -700, over the sum of their multiples of 2^(1-b), as many bits as can be added"
    z = x-x.max(-1, keepdims=True)
    e = np.where(z<-700, 0., exp(z))
    bits = min(51, 53-(x.shape[-1]-1).bit_length())
    return e/round_to(e, 2.**(1-bits)).sum(-1, keepdims=True)

# GELU and attention

@cache
def gelu_table():
    "u Phi(-u) at multiples of 2^-10 up to 8, by Marsaglia's series, and the differences, float32"
    u = np.arange(2**13+2)*2.**-10
    term = total = u
    for i in range(1, 200):
        term = term*u*u/(2*i+1)
        total = total+term
    h = u*(.5-exp(u*u*-.5)*0.3989422804014327*total).clip(0)
    return h[:-1].astype(np.float32), np.diff(h).astype(np.float32)

def gelu(x):
    "max(x, 0) - h(|x|), with straight lines between the entries of the table"
    values,slopes = gelu_table()
    u = np.minimum(np.abs(x), np.float32(8))*np.float32(1024)
    i = u.astype(np.int64)
    return np.maximum(x, np.float32(0))-((u-i.astype(np.float32))*slopes[i]+values[i])

@cache
def falling_exp_table():
    "exp(-(i+1/2) ln2/512), float32"
    return exp((np.arange(2.**14)+.5)*-(LN2/512)).astype(np.float32)

def falling_exp(y):
    "exp(-y ln2/512), a multiple of 2^-22: the entry of the whole part times 1-(f-1/2) ln2/512"
    unit = LN2/512
    y = np.minimum(y.astype(np.float32), np.float32(2**14-1))
    i = y.astype(np.int64)
    factor = (y-i.astype(np.float32))*np.float32(-unit)+np.float32(1+.5*unit)
    return round_to(factor*falling_exp_table()[i], 2.**-22)

def attention(q, k, v, keys):
    "Softmax attention, (B, H, L, d), with one grid for the visible keys of a head; keys is (B, L)"
    keys = keys[:,None,:,None]
    q = q*np.float32(1/(math.sqrt(q.shape[-1])*(LN2/512)))
    q,k = on_grid(q, 22),on_grid(np.where(keys, k, 0), 22, (-2, -1))
    v = on_grid(np.where(keys, v, 0), 21, (-2, -1))
    scores = np.where(np.swapaxes(keys, -1, -2), q@np.swapaxes(k, -1, -2), -2.**60)
    weights = falling_exp(scores.max(-1, keepdims=True)-scores)
    return (weights@v/weights.sum(-1, keepdims=True)).astype(np.float32)

# layers, float32

def layer_norm(x, weight=None, bias=None):
    "Deviations from the mean times 1/sqrt(variance+1e-5); the variance is (n sum x^2 - (sum x)^2)/n^2"
    x = on_grid(x, 22)
    n,total = x.shape[-1],x.sum(-1, keepdims=True)
    variance = (((x*x).sum(-1, keepdims=True)*n-total*total)/n**2).clip(0)
    scale = (1/sqrt(variance+1e-5)).astype(np.float32)
    y = (x.astype(np.float32)-(total/n).astype(np.float32))*scale
    return y if weight is None else y*weight+bias

def rms_norm(x):
    "x times 1/sqrt(mean square + 2^-23)"
    x = on_grid(x, 22)
    mean = (x*x).sum(-1, keepdims=True)/x.shape[-1]+2.**-23
    return x.astype(np.float32)*(1/sqrt(mean)).astype(np.float32)

def local_mixing(x, weight, mask):
    "Weighted sum of neighbours, from left to right; padding counts as 0"
    L,window = x.shape[1],weight.shape[-1]
    x = np.pad(np.where(mask[...,None], x, np.float32(0)), ((0, 0), (window//2, window//2), (0, 0)))
    total = x[:,:L]*weight[:,0,0]
    for i in range(1, window): total = total+x[:,i:i+L]*weight[:,0,i]
    return total

def rotary_angles(L, d):
    "Angles l 10000^(-2j/d), (L, d/2), rounded to float32, as are their cosines and sines"
    exponents = -(np.arange(0, d, 2, dtype=np.float32)/np.float32(d))
    theta = exp(exponents.astype(np.float64)*log(np.float64(10000.))).astype(np.float32)
    angles = np.arange(L, dtype=np.float32)[:,None]*theta
    return [o.astype(np.float32) for o in cos_sin(angles.astype(np.float64))]

def rotate(x, c, s):
    "Pairs (j, j+d/2) turned by their angles"
    a,b = np.split(x, 2, -1)
    return np.concatenate([a*c-b*s, b*c+a*s], -1)

def self_attention(x, part, n_heads, mask):
    "Bidirectional attention with normalised and rotated queries and keys, (B, L, d)"
    B,L,D = x.shape
    qkv = linear(np.where(mask[...,None], x, np.float32(0)), part('qkv.weight'))
    q,k,v = np.split(qkv.reshape(B, L, 3*n_heads, D//n_heads).swapaxes(1, 2), 3, 1)
    angles = rotary_angles(L, D//n_heads)
    q,k = (rotate(layer_norm(o), *angles) for o in (q, k))
    visible = mask|~mask.any(1, keepdims=True)
    y = attention(q, k, v, visible)
    return linear(y.swapaxes(1, 2).reshape(B, L, D), part('out.weight'))

# the denoiser

def norm_of(part, name):
    "The layer norm of a name"
    return lambda x: layer_norm(x, part(f'{name}.weight'), part(f'{name}.bias'))

def update(h, part, n_heads, mask):
    "Update of a block: attention after local mixing, plus an MLP of the sum of all three; 0 at padding"
    inside = lambda name: lambda rest: part(f'{name}.{rest}')
    n = local_mixing(norm_of(part, 'mixer.local_norm.norm')(h), part('mixer.local.weight'), mask)
    a = norm_of(part, 'mixer.attn_norm.norm')(h+n)
    a = self_attention(a, inside('mixer.attn'), n_heads, mask)
    u = norm_of(part, 'mixer.mlp_norm.norm')((h+n)+a)
    hidden = gelu(linear(u, part('pointwise.0.weight'), part('pointwise.0.bias')))
    y = a+linear(hidden, part('pointwise.3.weight'), part('pointwise.3.bias'))
    return np.where(mask[...,None], y, np.float32(0))

def to_lattice(x, bits):
    "Nearest multiples of 2^-bits"
    return round_to(x, 2.**-bits).astype(np.float32)

def denoiser(weights, config, ids, mask):
    "Logits, (B, L, V), of a stack of bijective blocks, from its weights by name"
    e = to_lattice(rms_norm(weights['embed.weight'][ids]), config.lattice_bits)
    x1,x2 = e,e
    for i in range(config.n_layers):
        part = lambda name, prefix=f'backbone.blocks.{i}.f': weights[f'{prefix}.{name}']
        x1,x2 = x2,x1+to_lattice(update(x2, part, config.n_heads, mask), config.lattice_bits)
    h = norm_of(weights.__getitem__, 'norm')(x1+x2)
    return linear(h, weights['output_head.weight'], weights['output_head.bias'])
