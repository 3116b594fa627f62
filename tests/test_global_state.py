"""Nothing is left behind: random numbers, figures, threads and warnings are as they were before."""
import random
from functools import cache
import matplotlib
import numpy as np
import pytest
import torch
matplotlib.use('Agg')
import matplotlib.pyplot as plt
from bijdiff.all import *
from bijdiff.testing import tiny_denoiser
from training_helpers import fit, short_lr_find, small_dls, tiny_learner

TEXT = 'the quick brown fox jumps over the lazy dog. '*30

def random_states():
    "States of the three generators that a program shares"
    name,keys,*rest = np.random.get_state()
    return random.getstate(), (name, keys.tobytes(), *rest), torch.get_rng_state().numpy().tobytes()

def others():
    "Figures, threads and PyTorch's switches"
    switches = torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled, torch.get_default_dtype()
    modes = torch.is_grad_enabled(), torch.is_autocast_enabled('cpu')
    return plt.get_fignums(), torch.get_num_threads(), *switches, *modes

def left_behind(f):
    "Call a function; return what it has changed"
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    before = dict(zip(('random', 'numpy', 'torch'), random_states())) | dict(others=others())
    f()
    after = dict(zip(('random', 'numpy', 'torch'), random_states())) | dict(others=others())
    return [k for k in before if before[k]!=after[k]]

@pytest.fixture(scope='module')
def model():
    "A denoiser with a tokenizer of bytes"
    model = tiny_denoiser(256, 16)
    model.tokenizer = ByteTokenizer()
    return model

@pytest.fixture(scope='module')
def learn(): return fit(ProbeCallback(2), BlockNormCallback(2), epochs=6, lambda_likelihood=.1)

@pytest.fixture(scope='module')
def experts(): return fit(ExpertCallback(2), epochs=1, config_kwargs=dict(n_experts=2))

@cache
def substituting(): return tiny_denoiser(20, 8, noise=Corruption(20, .5, .5))

def ids(*shape): return torch.arange(np.prod(shape)).view(shape)%20
def losses(): return [3+np.exp(-i/40)+.05*np.sin(i*i) for i in range(300)]
def frames(model):
    found = []
    sample(model, 2, steps=4, seed=0, frames=found)
    return found

DATA = {
    'text_dls':           lambda: text_dls(TEXT, seq_len=16, bs=4, device='cpu'),
    'text_dls bpe':       lambda: text_dls(TEXT, 'bpe', seq_len=16, bs=4, device='cpu'),
    'one_batch':          lambda: small_dls().one_batch(),
    'a new loader':       lambda: small_dls().valid.new(bs=2),
    'show_batch':         lambda: small_dls().show_batch(max_n=2),
    'pydoc_corpus':       pydoc_corpus,
    'split_text':         lambda: split_text(TEXT),
    'corrupt':            lambda: Corruption(20)(ids(2, 8), torch.tensor([.2, .7]), torch.Generator()),
    'compare_runs':       lambda: compare_runs(losses(), losses()[::-1]),
    'oscillation':        lambda: oscillation(losses()),
    'oscillation_windows':lambda: oscillation_windows(losses()),
    'seed_interval':      lambda: seed_interval([1., 2., 3.]),
    'plot_trend':         lambda: plot_trend(losses()),
    'plot_spectrum':      lambda: plot_spectrum(losses(), n_null=19),
    'plot_runs':          lambda: plot_runs(dict(a=losses())),
    'learner':            lambda: tiny_learner(),
    'learner with seed':  lambda: tiny_learner(seed=3),
}
@pytest.mark.parametrize('name', DATA)
def test_data_and_dynamics_leave_nothing_behind(name): assert left_behind(DATA[name])==[]

substituting() # Which sets a seed
MODEL = {
    'sample':         lambda m: sample(m, 2, steps=4, seed=1),
    'rule':           lambda m: sample(m, 2, rule='confidence', steps=4, seed=1),
    'self_correct':   lambda m: self_correct(substituting(), ids(2, 8)),
    'nelbo_draws':    lambda m: nelbo_draws(m, ids(2, 8), 2, seed=1),
    'score_ids':      lambda m: score_ids(m, ids(1, 40)[0], n=2, seed=1),
    'log_prob':       lambda m: log_prob(m, ids(2, 8), 'spread', steps=4),
    'order_nats':     lambda m: order_nats(m, ids(2, 8), 4),
    'document_nll':   lambda m: document_nll(m, ids(1, 40)[0], UnmaskingRule('random', steps=4)),
    'inverse_errors': lambda m: inverse_errors(m, ids(2, 8)),
    'compress':       lambda m: decompress(m, compress(m, b'the same again', steps=4)),
    'compress fast':  lambda m: decompress(m, compress(m, b'the same again', steps=4, fast=True)),
    'portable':       lambda m: sample(portable(m), 2, steps=4, seed=1),
    'film strip':     lambda m: plot_film_strip(frames(m), m.tokenizer),
    'gif_bytes':      lambda m: gif_bytes(frames(m), m.tokenizer),
    'plot_bits':      lambda m: plot_bits([('a', 1.), ('b', 2.)]),
    'clean_posterior':lambda m: clean_posterior(m, ids(2, 8), torch.tensor([.5, .5]), None, Corruption(256)),
}
@pytest.mark.parametrize('name', MODEL)
def test_functions_of_a_model_leave_nothing_behind(name, model):
    assert left_behind(lambda: MODEL[name](model))==[]

def test_training_leaves_nothing_behind(learn, tmp_path):
    "A fit with dropout, a validation, predictions, the search of a rate, a look at results"
    learn.path = tmp_path
    assert left_behind(lambda: fit(epochs=1, config_kwargs=dict(dropout=.2)))==[]
    with learn.no_bar():
        for f in (learn.validate, learn.get_preds, learn.show_results, lambda: short_lr_find(learn)):
            assert left_behind(f)==[]

@pytest.mark.parametrize('plot', [
    lambda learn,experts: learn.oscillation.plot(), lambda learn,experts: learn.objective.plot(),
    lambda learn,experts: learn.block_norm.plot(), lambda learn,experts: experts.expert.plot()])
def test_plots_of_callbacks_are_figures_that_are_not_left_open(plot, learn, experts):
    shown = []
    assert left_behind(lambda: shown.append(plot(learn, experts)))==[]
    assert isinstance(shown[0], matplotlib.figure.Figure) and shown[0].axes

def test_figures_of_the_user_stay_open():
    mine = plt.figure()
    plot_runs(dict(a=losses()))
    assert plt.gcf() is mine and plt.get_fignums()==[mine.number]
    plt.close(mine)

def test_what_is_left_behind_is_seen():
    assert left_behind(lambda: random.random())==['random']
    assert left_behind(lambda: np.random.rand())==['numpy']
    assert left_behind(lambda: torch.rand(1))==['torch']
    assert left_behind(plt.figure)==['others']
    plt.close('all')

def test_the_seed_of_a_learner_is_that_of_its_weights():
    a,b,c = (tiny_learner(seed=s).model.state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(a[k], c[k]) for k in a)
