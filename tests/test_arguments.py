"""Wrong arguments of every public function: each is rejected by an error that names it, before any work.

A table has a valid call of each function, and the kind of each of its arguments. A kind has values that are
wrong, and values that are as good as the valid one: lists and arrays in place of tensors, NumPy's numbers."""
import re
from functools import partial
from math import inf, nan
import numpy as np
import pytest, torch
from fastai.basics import Callback, DataLoaders
from matplotlib.figure import Figure
from torch import nn
import bijdiff.all as everything
from bijdiff.all import *
from bijdiff.diffusion.schedules import get_schedule
from bijdiff.sampling.prompts import heal_blanks, heal_prompt
from bijdiff.sampling.conditionals import token_probs
from bijdiff.sampling.rules import public_order, reveal_counts, spread_order
from helpers import seeded_weights

V,L = 5,4
torch.manual_seed(0)

def network(**kwargs):
    "A small network with a tokenizer"
    config = DenoiserConfig(V, d_model=8, n_heads=2, n_layers=1, seq_len=L, **kwargs)
    model = seeded_weights(BijectiveDenoiser(config)).eval()
    model.tokenizer = CharTokenizer('abcde')
    return model

class Nothing:
    "An object of no use anywhere"
    def __repr__(self): return 'Nothing()'

model = network()
timed = network(time_conditioning=True, noise=dict(mask=.5, substitute=.5))
latent = network(latent_density=True)
noise = Corruption(V)
x0 = torch.tensor([[0, 1, 2, 3], [4, 3, 2, 1]])
xt = torch.tensor([[0, V, 2, V], [V, 3, V, 1]])
t = torch.tensor([.3, .8])
mask = torch.ones(2, L, dtype=torch.bool)
logits = torch.randn(2, L, V)
state = to_lattice(torch.randn(2, L, 16), 12)

# Values that are wrong, by the kind of argument

nothing = [None, Nothing()]
not_numbers = [*nothing, 'x', [1.], 1j]
not_tensors = [*nothing, 'abc', [['a']*4]*2]
ragged = [[1, 2], [3]]
counts = [*not_numbers, True, 1.5, nan, -1, torch.tensor([1, 2])]

def wrong_ids(x, shaped):
    "Ids of another type, out of range, or of another shape"
    other_types = [x.float(), x>1, x+1j, x.double().tolist()]
    return [*not_tensors, ragged, 1.5, *other_types, x+100, x-100, *shaped]

WRONG = dict(
    ids=wrong_ids(x0, [x0[0], x0[None]]),
    some_ids=wrong_ids(x0, [x0[0], x0[None]])[1:],
    row=wrong_ids(x0[0], [x0, 3]),
    template=wrong_ids(x0, [x0[None], x0[[0, 0, 0]]])[1:],
    times=[*not_tensors, ragged, .5, t*nan, t-1, t+1, t[:1], t[:,None], t+1j, t>.5],
    sigma=[*not_tensors, ragged, t-1, t*nan, t+1j, t>.5, torch.rand(3)],
    mask=[Nothing(), 'abc', 1, mask.float(), mask[0], mask[:,:2], ragged],
    layer_mask=[Nothing(), 'abc', 1, mask.float(), mask[0], mask[:,:2], ragged, mask.tolist()],
    lengths=[Nothing(), 'x', 1.5, [4], [4, 5], [4, -1], [4., 4.], [True, True]],
    numbers=[*not_tensors, 1.5, torch.rand(4), torch.rand(4, 2)+1j],
    values=[*nothing, 'x', 1.5, torch.rand(2, 2), ['a', 'b']],
    curve=[torch.rand(2, 2), [nan]*64, [inf]*64],
    some_logits=[*nothing, 'abc', [['a']], logits>0],
    logits=[*nothing, 'abc', 1.5, logits[0], logits[...,0], logits>0],
    gaps=[*not_tensors, 1.5, torch.ones(2, L+1), -torch.ones(2, L+1).long(), torch.ones(2, L).long()],
    state=[*nothing, 'x', 1.5, [['a']]],
    count0=counts,
    count=[*counts, 0],
    count2=[*counts, 0, 1],
    bytes=[*counts, 0, 255],
    odd=[*counts, 0, 2],
    window=[*counts[:-1], 2],
    some=[*counts, 0, inf][1:],
    some0=[*counts, inf][1:],
    bits=[*counts, 60][1:],
    seed=[*counts, 2**64],
    number=[*not_numbers, True, nan, inf],
    least0=[*not_numbers, True, nan, inf, -1.],
    positive=[*not_numbers, True, nan, inf, -1., 0.],
    fraction=[*not_numbers, True, nan, -.1, 1.5],
    share=[*not_numbers, True, nan, -.1, 1.5, 0.],
    inside=[*not_numbers, True, nan, 0., 1.],
    eps=[*not_numbers, True, nan, -1., 1.],
    zero=[*counts],
    atol=[*not_numbers, True, nan, -1.],
    flag=[*nothing, 'x', 3],
    model=[*nothing, 'x', 3, nn.Linear(2, 2), BijectiveTransformer(1, 8, 2), [model]],
    module=[*nothing, 'x', 3, nn.Linear],
    stack=[*nothing, 'x', 3, nn.Linear(2, 2), [model]],
    bijection=[*nothing, 'x', 3, nn.Linear(2, 2)],
    function=[*nothing, 'x', 3],
    schedule=[Nothing(), 'nope', 3, [1], True],
    needed_schedule=[*nothing, 'nope', 3, [1], True],
    corruption=[*nothing, 'nope', 3],
    rule=[Nothing(), 'nope', 3, True, b'x', [0, 0, 1, 2], [1.5]],
    generator=[Nothing(), 'x', 3],
    string=[*nothing, 3, b'x', [1]],
    name=[*nothing, 'nope', 3, [1]],
    tokenizer=[*nothing, 'x', 3, nn.Linear(2, 2)],
    data=[*nothing, 'x', 3, [1]],
    frames=[*nothing, 'x', 3, []],
    index=[*counts, 2],
    path=[*nothing, 3, b'x'],
)

# Values that mean the same as a valid one

def as_lists(v): return [v.tolist(), v.numpy()]
def as_integers(v): return [*as_lists(v), v.int(), v.numpy().astype(np.uint8), v.numpy().astype(np.uint16)]
def as_floats(v): return [*as_lists(v), v.double().numpy(), tuple(v.tolist())]
def as_numpy(v): return [] if v is None else [np.array(v)[()]]

EQUAL = {
    as_integers: 'ids row template lengths',
    as_lists: 'gaps mask sigma numbers logits some_logits',
    as_floats: 'times',
    as_numpy: 'values curve count0 count count2 some some0 seed number least0 positive fraction share '
              'inside eps',
}
EQUAL = {kind:f for f,kinds in EQUAL.items() for kind in kinds.split()}

# Valid calls: each argument is a pair of its kind and its value

def drawn(noise, x0, t, lengths):
    "Noisy ids, from a generator that always begins alike"
    return noise.corrupt(x0, t, torch.Generator().manual_seed(0), lengths)

def entered(model):
    with eval_mode(model): return True

def forward(layer, x, mask): return layer(x, mask=mask)[0]
def inverse(layer, y, mask): return layer.inverse(y, mask=mask)[0]
def layers_of(stack, x): return list(layer_by_layer(stack, x))

any_model = dict(model=('model', model))
some_model = dict(model=('model', timed))
trained = dict(model=('model', latent))
x_arg,xt_arg,t_arg = dict(x=('ids', x0)),dict(xt=('ids', xt)),dict(t=('times', t))
losses = dict(logits=('logits', logits), x0=('ids', x0), **t_arg)
masked = torch.where(xt==V, V, x0)
by_rule = dict(rule=('rule', 'spread'), steps=('some', None), seed=('seed', 1))
tempered = dict(temperature=('positive', .9), top_p=('share', .99))
given = torch.where(xt==V, xt, x0)
nats = torch.rand(4, 2)
series = torch.linspace(2, 1, 64).double()+torch.randn(64).double()*.1
width = dict(d_model=('count', 4), n_heads=('count', 2), lattice_bits=('bits', 12), dropout=('fraction', 0.))
mlp = dict(coupling_hidden_dim=('some', 8), coupling_depth=('count', 2), local_window=('window', 7))
kinds = dict(attention=('name', 'standard'), ffn=('name', 'standard'))
stack = dict(n_layers=('count', 1), reversible=('flag', True), time_conditioning=('flag', False))
tests = dict(n_null=('count2', 19), seed=('seed', 0), min_cycles=('count', 2))

frames = dict(
    frames=('frames', [xt, x0]), tokenizer=('tokenizer', model.tokenizer), n=('count', 2), which=('index', 1))

CALLS = {
    'canonical': (canonical, any_model),
    'fingerprint': (fingerprint, any_model),
    'samplers_for': (samplers_for, any_model),
    'eval_mode': (entered, dict(model=('function', model))),
    'inverse_errors': (inverse_errors, any_model | xt_arg),
    'call_denoiser': (call_denoiser, any_model | xt_arg | t_arg | dict(mask=('mask', mask))),
    'call_denoiser, timed': (call_denoiser, some_model | xt_arg | t_arg),
    'BijectiveDenoiser': (timed.forward, xt_arg | t_arg | dict(mask=('mask', mask))),
    'clean_posterior': (clean_posterior, some_model | xt_arg | t_arg | dict(mask=('mask', mask))),
    'SEDDAdapter': (SEDDAdapter, any_model | dict(schedule=('schedule', None))),
    'MDLMAdapter': (MDLMAdapter, any_model | dict(schedule=('schedule', None))),
    'as_sedd': (model.as_sedd(), dict(x=('ids', xt), sigma=('sigma', t))),
    'as_mdlm': (model.as_mdlm(), dict(x=('ids', xt), sigma=('sigma', t))),

    'sample': (sample, any_model | tempered | dict(
        n=('count', 2), steps=('some', 3), template=('template', xt), seed=('seed', 1),
        schedule=('schedule', 'cosine'), length_steps=('zero', 0))),
    'sample, rule': (sample, any_model | by_rule | dict(n=('count', 2), length=('some', 3))),
    'prompt_template': (prompt_template, any_model | dict(prompt=('string', 'ab'), length=('some', 3))),
    'infill_template': (infill_template, any_model | dict(
        text=('string', 'a___b'), blank=('some', 2), length=('some', 4))),
    'heal_prompt': (heal_prompt, any_model | tempered | dict(
        prompt=('string', 'ab'), n=('count', 2), length=('some', 3), seed=('seed', 1))),
    'heal_blanks': (heal_blanks, any_model | tempered | dict(
        text=('string', 'a___b'), n=('count', 2), blank=('some', 2), length=('some', 4), seed=('seed', 1))),
    'UnmaskingRule': (UnmaskingRule, by_rule | tempered | dict(
        tokens=('count', 2), block_length=('count', 2), schedule=('schedule', 'cosine'))),
    'unmask': (unmask, any_model | dict(
        x=('ids', xt), rule=('rule', 'spread'), choose=('function', lambda p, where: p.argmax(-1)),
        lengths=('lengths', torch.tensor([4, 4])), known=('some_ids', x0))),
    'self_correct': (self_correct, some_model | x_arg | dict(
        error_rate=('inside', .2), steps=('count0', 2), per_step=('count', 2), fixed=('mask', ~mask))),
    'reveal_counts': (reveal_counts, dict(
        n=('count0', 5), steps=('some', 2), schedule=('schedule', None), tokens=('count', 1))),
    'public_order': (public_order, dict(L=('count0', 5), seed=('seed', 0))),
    'spread_order': (spread_order, dict(L=('count0', 5))),
    'token_probs': (token_probs, tempered | dict(logits=('some_logits', logits))),

    'nelbo': (nelbo, any_model | x_arg | dict(
        n=('count2', 3), schedule=('schedule', None), T=('some', None), seed=('seed', 1),
        given=('mask', mask))),
    'nelbo_draws': (nelbo_draws, any_model | x_arg | dict(
        n=('count', 3), schedule=('schedule', None), T=('some', 4), seed=('seed', 1), given=('mask', mask))),
    'score_ids': (score_ids, any_model | dict(
        ids=('row', x0[0]), n=('count2', 3), T=('some', 4), bs=('count', 2), seed=('seed', 1))),
    'token_nll': (token_nll, any_model | x_arg | tempered | dict(
        tokens=('count', 1), block_length=('count', 2), schedule=('schedule', None))),
    'log_prob': (log_prob, any_model | x_arg | by_rule | dict(
        bs=('count', 2), lengths=('lengths', torch.tensor([4, 4])))),
    'log_prob, template': (log_prob, any_model | x_arg | dict(template=('template', given))),
    'document_nll': (document_nll, any_model | by_rule | dict(ids=('row', x0[0]), bs=('count', 2))),
    'order_nats': (order_nats, any_model | x_arg | dict(
        n=('count', 2), steps=('some', None), seed=('seed', 0), bs=('count', 3))),
    'all_orders_nats': (all_orders_nats, any_model | x_arg | dict(steps=('some', 2))),
    'order_bound': (order_bound, dict(nats=('numbers', nats), k=('count', 1))),
    'order_estimate': (order_estimate, dict(nats=('numbers', nats))),
    'latent_nats': (latent_nats, trained | x_arg | dict(n=('count2', 3), seed=('seed', 0))),
    'char_bits': (char_bits, dict(
        tokenizer=('tokenizer', model.tokenizer), ids=('row', x0[0]), nats=('values', torch.rand(4)))),
    'compress': (compress, any_model | by_rule | dict(
        data=('data', b'abc'), context=('some0', 2), streams=('count', 2), fast=('flag', False),
        most_tokens=('count', 9))),
    'decompress': (decompress, any_model | dict(
        blob=('data', compress(model, b'abc')), most_tokens=('count', 9))),
    'portable': (portable, dict(model=('model', model))),

    'Corruption': (Corruption, dict(
        vocab_size=('count', 5), mask=('least0', .5), substitute=('least0', .5), delete=('least0', 0.),
        schedule=('needed_schedule', 'cosine'), T=('some', None))),
    'GIDDCorruption': (GIDDCorruption, dict(
        vocab_size=('count', 5), p_uniform=('inside', .1), gamma=('positive', 1.), T=('some', None))),
    'Corruption.corrupt': (partial(drawn, noise), dict(
        x0=('ids', x0), lengths=('lengths', torch.tensor([4, 3])), **t_arg)),
    'Geometric': (Geometric, dict(sigma_min=('positive', .001), sigma_max=('positive', 20.))),
    'Polynomial': (Polynomial, dict(power=('positive', 2.), eps=('eps', .001))),
    **{f.__name__: (f, dict(eps=('eps', .001)))
       for f in (Schedule, Cosine, CosineSquared, HalfCosine, LogLinear)},
    'get_schedule': (lambda schedule: get_schedule(schedule), dict(schedule=('needed_schedule', 'cosine'))),
    'low_discrepancy_times': (low_discrepancy_times, dict(
        n=('count0', 4), T=('some', None), generator=('generator', None))),
    'masked_nelbo': (masked_nelbo, losses | dict(
        xt=('ids', masked), schedule=('needed_schedule', 'cosine'), T=('some', None))),
    'hybrid_nelbo': (hybrid_nelbo, losses | xt_arg | dict(corruption=('corruption', Corruption(V, .5, .5)))),
    'uniform_nelbo': (uniform_nelbo, losses | dict(xt=('ids', x0), schedule=('needed_schedule', 'cosine'))),
    'log_scores': (log_scores, xt_arg | t_arg | dict(
        logits=('logits', logits), corruption=('corruption', Corruption(V, .5, .5)))),
    'score_entropy': (score_entropy, t_arg | dict(
        log_score=('logits', logits), x0=('ids', x0), xt=('ids', masked), noise=('name', 'absorb'),
        schedule=('needed_schedule', 'cosine'))),
    'insertion_nelbo': (insertion_nelbo, t_arg | dict(
        gap_logits=('numbers', torch.randn(2, L+1)), gaps=('gaps', torch.ones(2, L+1).long()),
        gap_mask=('mask', torch.ones(2, L+1).bool()), corruption=('corruption', Corruption(V, .5, 0., .5)))),

    'as_transform': (as_transform, dict(f=('bijection', ActNorm(2)), event_dim=('count', 1))),
    'check_bijection': (check_bijection, dict(
        f=('bijection', ActNorm(2).double().eval()), x=('state', torch.rand(2, 2).double()),
        atol=('atol', 1e-8))),
    'dense_logdet': (dense_logdet, dict(f=('function', ActNorm(2).eval()), x=('state', torch.rand(2, 2)))),
    'BijectiveSequential': (lambda layers: BijectiveSequential(layers), dict(layers=('module', ActNorm(2)))),
    'to_lattice': (to_lattice, dict(t=('some_logits', torch.rand(3)), bits=('count0', 12))),
    'split_halves': (split_halves, dict(x=('state', torch.rand(3, 4)))),
    'AdditiveCoupling': (AdditiveCoupling, dict(f=('module', nn.Linear(2, 2)), lattice_bits=('bits', 12))),
    'AffineCoupling': (AffineCoupling, dict(f=('module', nn.Linear(2, 4)), max_log_scale=('positive', 2.))),
    'ChunkedUpdate': (ChunkedUpdate, dict(
        mixer=('module', nn.Linear(2, 2)), pointwise=('module', nn.Linear(2, 2)))),
    'CouplingNet': (CouplingNet, dict(
        dim=('count', 4), coupling_hidden_dim=('some', 8), coupling_depth=('count', 2),
        dropout=('fraction', 0.), dim_out=('some', 4))),
    'BijectiveLinear': (BijectiveLinear, dict(
        dim=('count2', 4), n_couplings=('count', 4), coupling=('name', 'additive'), mixing=('name', 'none'),
        bias=('flag', True), lattice_bits=('bits', 12), seed=('seed', 0))),
    'ActNorm': (ActNorm, dict(dim=('count', 4), eps=('least0', 1e-5))),
    'InvertibleLayerNorm': (InvertibleLayerNorm, dict(
        dim=('count2', 4), eps=('least0', 0.), affine=('flag', True))),
    'BijectiveMultiHeadAttention': (BijectiveMultiHeadAttention, dict(
        d_model=('count', 4), n_heads=('count', 2), kind=('name', 'coupling'))),
    'BijectiveTransformerBlock': (BijectiveTransformerBlock, width | mlp | dict(
        attention=('name', 'bijective'), ffn=('name', 'bijective'), cond_dim=('some', 4))),
    'BijectiveTransformer': (BijectiveTransformer, width | mlp | kinds | stack | dict(
        n_bijective_layers=('some0', 1), bijective_ratio=('fraction', 1.))),
    'MultiscaleTransformer': (MultiscaleTransformer, width | stack | dict(
        segment_length=('count', 4), window=('odd', 7), multiscale_hidden_dim=('some', 4))),
    'BijectiveMoE': (BijectiveMoE, width | stack | dict(
        n_experts=('count2', 2), couple=('name', 'final'), k_active=('some', 1), coupler=('name', 'additive'),
        coupler_dim=('some', 4), balance=('least0', 0.), z_loss=('least0', 0.),
        enable_multiscale=('flag', False), segment_length=('count', 4))),
    'layer_by_layer': (layers_of, dict(stack=('stack', BijectiveTransformer(1, 8, 2)), x=('state', state))),

    'film_strip': (film_strip, frames),
    'plot_film_strip': (plot_film_strip, frames | dict(width=('count', 64))),
    'gif_bytes': (gif_bytes, {k: v for k,v in frames.items() if k!='n'} | dict(
        width=('count', 64), seconds=('positive', 6.),
        colours=('frames', ('red', 'black', 'grey', 'white')))),
    'plot_bits': (plot_bits, dict(
        chars=('frames', [('a', 1.), ('b', 2.)]), n=('count', 2), width=('count', 8), top=('positive', 8.))),
    'split_text': (split_text, dict(text=('string', 'abcd'), valid_pct=('inside', .5))),
    'load_corpus': (load_corpus, dict(name=('path', 'pydoc'))),
    'get_tokenizer': (lambda tokenizer, text: get_tokenizer(tokenizer, text), dict(
        tokenizer=('name', 'char'), text=('string', 'abc'))),
    'CharTokenizer': (CharTokenizer, dict(chars=('string', 'abc'))),
    'BPETokenizer': (BPETokenizer, dict(json=('string', BPETokenizer.train('abc').json))),
    'BPETokenizer.train': (BPETokenizer.train, dict(text=('string', 'abc'), vocab_size=('bytes', 300))),
    'ByteTokenizer': (ByteTokenizer().encode, dict(text=('string', 'abc'))),
    'CharTokenizer.encode': (model.tokenizer.encode, dict(text=('string', 'abc'))),
    'text_dls': (text_dls, dict(
        corpus=('string', 'abcd'*99), tokenizer=('name', 'char'), seq_len=('count', 4), bs=('count', 2),
        valid_pct=('inside', .5))),

    'EMACallback': (EMACallback, dict(decay=('inside', .9))),
    'ProbeCallback': (ProbeCallback, dict(every=('count', 2), n_texts=('count', 2), seed=('seed', 0))),
    'BlockNormCallback': (BlockNormCallback, dict(every=('count', 2))),
    'RunLogCallback': (RunLogCallback, dict(path=('path', 'log'), every=('count', 2))),
    'TensorBoardCallback': (TensorBoardCallback, dict(path=('path', 'log'), every=('count', 2))),
    'ExpertCallback': (ExpertCallback, dict(every=('count', 2), n_texts=('count', 2))),

    'area_under_curve': (area_under_curve, dict(curve=('curve', series))),
    'epochs_to_target': (epochs_to_target, dict(curve=('curve', series), target=('number', 1.5))),
    'seed_interval': (seed_interval, dict(values=('curve', series), level=('inside', .9))),
    'fit_trend': (fit_trend, dict(losses=('curve', series))),
    'compare_runs': (compare_runs, dict(
        a=('curve', series), b=('curve', series.flip(0)), last=('share', .5), level=('inside', .9))),
    'oscillation': (oscillation, tests | dict(losses=('curve', series))),
    'oscillation_windows': (oscillation_windows, tests | dict(losses=('curve', series), n=('count', 1))),
}
LAYERS = dict(
    additive=AdditiveCoupling(CouplingNet(8)), affine=AffineCoupling(CouplingNet(8, dim_out=16)),
    linear=BijectiveLinear(16), actnorm=ActNorm(16).eval(), attention=BijectiveMultiHeadAttention(8, 2),
    stack=BijectiveTransformer(1, 8, 2), scales=MultiscaleTransformer(1, 8, 2), mixture=BijectiveMoE(2, 4, 2))
for name,layer in LAYERS.items():
    CALLS[f'{name}, forward'] = partial(forward, layer),dict(x=('state', state), mask=('layer_mask', mask))
    CALLS[f'{name}, inverse'] = partial(inverse, layer),dict(y=('state', state), mask=('layer_mask', mask))

# Public names whose arguments are tested elsewhere: of data, training, files and pictures; and plain records
ELSEWHERE = set('''
    pydoc_corpus read_text DenoiserConfig Denoiser DenoiserOutput Estimate Score Bijection LatticeError
    diffusion_learner TableCallback CheckpointCallback LatticeUsageCallback
    compress_file decompress_file plot_runs plot_spectrum plot_trend
    open_source tokenise corpus_dls train_tokenizer load_tokenizer BestModelCallback run_log
    pair_dls answer_nll write_answers TextQuality ForeignDenoiser load_denoiser load_published
    score_table format_scores SmallLanguage small_scores total_probability
'''.split())

def test_every_public_function_is_here_or_tested_elsewhere():
    covered = {name.split(',')[0] for name in CALLS}
    assert set(everything.__all__)-covered==ELSEWHERE

def call(name, **changed):
    "A call of the table with some arguments changed"
    f,arguments = CALLS[name]
    torch.manual_seed(0)
    return f(**{k:v for k,(_,v) in arguments.items()} | changed)

def plain(o): return re.sub(r'np\.\w+\(([^()]*)\)', r'\1', repr(o))

def same(a, b):
    "Return True for equal results, whatever they are made of"
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, nn.Module|Schedule|Corruption): return plain(a)==plain(b)
    if isinstance(a, np.ndarray): return np.array_equal(a, b)
    if isinstance(a, list|tuple): return len(a)==len(b) and all(map(same, a, b))
    if hasattr(a, 'event_dim'): return a.n_axes==b.n_axes
    if isinstance(a, Callback|Figure|DataLoaders): return type(a) is type(b)
    return a==b or a!=a

WITH_ARGUMENT = [(name, argument) for name,(_,arguments) in CALLS.items() for argument in arguments]

@pytest.mark.parametrize('name, argument', WITH_ARGUMENT, ids=lambda v: v.replace(', ', '-'))
def test_wrong_values_are_rejected_by_name(name, argument):
    kind,valid = CALLS[name][1][argument]
    for value in WRONG[kind]:
        try: result = call(name, **{argument:value})
        except (ValueError, TypeError) as e: assert argument in str(e), f'{value!r}: {e}'
        else: pytest.fail(f'{argument}={value!r} was taken, for {result!r}')

@pytest.mark.parametrize('name', CALLS)
def test_lists_arrays_and_numbers_of_numpy_are_as_good_as_tensors_and_numbers(name):
    want = call(name)
    for argument,(kind,valid) in CALLS[name][1].items():
        for value in EQUAL.get(kind, lambda v: [])(valid):
            assert same(call(name, **{argument:value}), want), f'{argument}={value!r}'

@pytest.mark.parametrize('ids', [[1.5], [0, 7], [True], 'a', [[0]], None])
def test_decode_takes_ids_alone(ids):
    with pytest.raises(ValueError, match='ids'): model.tokenizer.decode(ids)
