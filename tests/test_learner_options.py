"""Options of `diffusion_learner` for the steps of a training, alone and interrupted."""
import copy, json, math, os, re, shutil
from functools import partial
import pytest, torch
from fastai.callback.all import Callback, GradientClip, ShortEpochCallback
from fastai.optimizer import Adam
from bijdiff.data.loaders import text_dls
from bijdiff.data.stores import TextCounts
from bijdiff.data.tokens import CharTokenizer
from bijdiff.diffusion.corruption import Corruption
from bijdiff.layers.coupling import is_compiled
from bijdiff.likelihood.bounds import score_ids
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.training.callbacks import AccumulationCallback, BoundCallback, EMACallback
from bijdiff.training.checkpoint import CheckpointCallback
from bijdiff.testing import random_weights
from bijdiff.training.instruments import BlockNormCallback, ProbeCallback, RunLogCallback
from bijdiff.training.loop import DiffusionLearner
from bijdiff.training.precision import CompileCallback
from training_helpers import differing_weights, fit, N_STEPS, rejects, same_weights, small_dls, small_noise
from training_helpers import state_copy, StopAt, tiny_learner, train, vocab_size

torch.set_num_threads(1)

def flat_grad(model): return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

class StepGradients(Callback):
    "Keep the gradient that the optimiser gets in every step"
    order = 80
    def before_fit(self): self.grads = []
    def before_step(self): self.grads.append(flat_grad(self.model).clone())

def gradients(fits=1, epochs=2, **kwargs):
    "Gradients of the steps of the last of several fits that do not move the weights"
    learn = tiny_learner(StepGradients(), wd=0., **kwargs)
    for _ in range(fits): train(learn, epochs, 0., flat=True)
    return torch.stack(learn.step_gradients.grads)

def relative_difference(a, b): return ((a-b).norm()/b.norm()).item()

# Accumulation

def test_the_gradient_of_a_step_is_the_mean_over_its_batches():
    single,triple = gradients(epochs=3),gradients(epochs=3, accumulate=3)
    assert len(single)==3*N_STEPS and len(triple)==N_STEPS
    assert relative_difference(triple, single.view(N_STEPS, 3, -1).mean(1))<1e-5

def test_a_fit_leaves_no_gradients_to_the_next_one():
    single,triple = gradients(fits=2, epochs=1),gradients(fits=2, epochs=1, accumulate=3)
    assert len(triple)==1 and relative_difference(triple[0], single[:3].mean(0))<1e-5

def test_batches_after_the_last_step_leave_no_records():
    learn = fit(accumulate=3, lambda_likelihood=.1, epochs=2)
    assert len(learn.oscillation.losses)==len(learn.objective.parts)==2

def test_left_gradients_are_seen(monkeypatch):
    monkeypatch.setattr(AccumulationCallback, 'before_fit', lambda self: setattr(self, 'count', 0))
    with pytest.raises(AssertionError): test_a_fit_leaves_no_gradients_to_the_next_one()

def test_a_batch_of_few_sequences_counts_as_one():
    dls = text_dls('a small text of few words, '*20, seq_len=16, bs=64, device='cpu')
    assert len(dls.train)==1
    assert len(gradients(epochs=6, accumulate=3, dls=dls))==2

def test_instruments_count_steps():
    cbs = ProbeCallback(1),BlockNormCallback(1)
    learn = fit(*cbs, accumulate=2, lambda_likelihood=.1)
    steps = [1, 2, 3, 4]
    assert learn.probe.steps==steps and [r['step'] for r in learn.block_norm.rows]==steps
    assert len(learn.oscillation.losses)==len(learn.objective.parts)==4
    for loss,terms in zip(learn.oscillation.losses, learn.objective.parts):
        assert loss==pytest.approx(terms['denoise']+.1*terms['likelihood'], rel=1e-5)

def test_the_loss_of_a_step_is_the_mean_over_its_batches():
    single,double = (tiny_learner(wd=0., accumulate=n) for n in (1, 2))
    for learn in (single, double): train(learn, 2, 0., flat=True)
    losses = torch.tensor(single.oscillation.losses).view(-1, 2).mean(1)
    assert torch.allclose(torch.tensor(double.oscillation.losses), losses)

# Clipping, optimiser, average

def test_gradients_are_clipped():
    norms = gradients(grad_clip=.05).norm(dim=1)
    assert torch.allclose(norms, torch.full_like(norms, .05), rtol=1e-3)
    assert (gradients().norm(dim=1)>.06).all()

def test_where_a_token_can_cost_much_gradients_are_clipped_anyway():
    clip = lambda **kwargs: [cb.max_norm for cb in tiny_learner(**kwargs).cbs if isinstance(cb, GradientClip)]
    assert clip()==[]
    assert clip(corruption=small_noise(.5, .5))==[1.] and clip(objective='score_entropy')==[1.]
    assert clip(corruption=small_noise(.5, .5), grad_clip=3.)==[3.]

def test_betas_are_those_of_both_moments_in_all_steps():
    learn = fit(StepGradients(), optimizer='adam', betas=(.7, .8), epochs=1)
    assert set(learn.recorder.hps['mom'])=={.7}
    first,second = torch.zeros(()),torch.zeros(())
    for g in learn.step_gradients.grads:
        first,second = .7*first+.3*g,.8*second+.2*g**2
    states = [learn.opt.state[p] for p in learn.model.parameters() if p.grad is not None]
    assert relative_difference(torch.cat([s['grad_avg'].flatten() for s in states]), first)<1e-5
    assert relative_difference(torch.cat([s['sqr_avg'].flatten() for s in states]), second)<1e-5

def test_without_betas_the_first_moment_has_its_cycle():
    assert min(fit(epochs=1).recorder.hps['mom'])<.86

def test_betas_of_muon_are_its_momentum_and_those_of_adam():
    learn = fit(optimizer='muon', betas=(.7, .8), epochs=1)
    assert set(learn.recorder.hps['mom'])=={.7}
    assert {h['sqr_mom'] for h in learn.opt.hypers}=={.8}

def test_muon_is_the_default():
    assert same_weights(fit(), fit(optimizer='muon'))
    assert not same_weights(fit(), fit(optimizer='adam'))

def test_adam_has_a_small_eps():
    assert same_weights(fit(optimizer='adam'), fit(opt_func=partial(Adam, eps=1e-8)))

def test_sgd_has_momentum_and_learns():
    learn = fit(StepGradients(), optimizer='sgd', epochs=6, lr=3e-2)
    losses = learn.oscillation.losses
    assert sum(losses[-4:])<sum(losses[:4])-.5
    states = [learn.opt.state[p] for p in learn.model.parameters() if p.grad is not None]
    average = torch.zeros(())
    for g,mom in zip(learn.step_gradients.grads, learn.recorder.hps['mom']): average = mom*average+g
    assert relative_difference(torch.cat([s['grad_avg'].flatten() for s in states]), average)<1e-5

class NoGradients(Callback):
    "Set all gradients to 0 before a step"
    order = 80
    def before_step(self): self.opt.zero_grad()

MATRICES = (r'(qkv|out|local|context|score|logits|output_head|gap_output|to_scale_shift|pointwise.*|net[.]\d)'
            r'[.]weight$')
def decay_factors(**kwargs):
    "By name of a parameter, the factor of two steps without gradients at a rate of 0.1 and a decay of 0.5"
    learn = tiny_learner(NoGradients(), wd=.5, **kwargs)
    torch.manual_seed(0)
    random_weights(learn.model, .1)
    before = state_copy(learn)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .1, cbs=ShortEpochCallback(.1))
    return {k:(v/before[k]).mean().item() for k,v in state_copy(learn).items()}

NETWORKS = dict(
    plain=lambda: {}, timed=lambda: dict(corruption=small_noise(.5, .1, .4)),
    latent=lambda: dict(lambda_likelihood=.1),
    scales=lambda: dict(config_kwargs=dict(enable_multiscale=True)),
    experts=lambda: dict(config_kwargs=dict(n_experts=3, k_active=2, couple='every')))
@pytest.mark.parametrize('name', NETWORKS)
def test_weight_decay_acts_on_matrices_alone(name):
    factors = decay_factors(**NETWORKS[name]())
    assert {k for k,f in factors.items() if f<1-1e-4}=={k for k in factors if re.search(MATRICES, k)}
    assert 'embed.weight' in factors and min(factors.values())==pytest.approx(.95**2, abs=1e-3)

def test_decay_of_norms_is_seen(monkeypatch):
    monkeypatch.setattr(DiffusionLearner, '_bn_bias_state', lambda self, with_bias: [])
    with pytest.raises(AssertionError): test_weight_decay_acts_on_matrices_alone('plain')

class AverageByHand(Callback):
    "Average the weights after every update"
    order = 80
    n = 0
    def weights(self): return torch.cat([p.detach().flatten() for p in self.model.parameters()])
    def before_fit(self): self.average = self.weights()
    def after_step(self):
        self.n += 1
        decay = min(.8, self.n/(9+self.n))
        self.average = decay*self.average+(1-decay)*self.weights()

@pytest.mark.parametrize('accumulate', [1, 3])
def test_the_average_follows_updates(accumulate):
    learn = fit(AverageByHand(), ema=.8, accumulate=accumulate, epochs=3)
    assert learn.average_by_hand.n==12//accumulate
    assert relative_difference(learn.average_by_hand.weights(), learn.average_by_hand.average)<1e-6

def after_every_batch(self):
    if self.training: self.after_update(self.learn.train_iter)
def test_an_average_that_follows_batches_is_seen(monkeypatch):
    monkeypatch.setattr(EMACallback, 'after_batch', after_every_batch)
    with pytest.raises(AssertionError): test_the_average_follows_updates(3)

# Compiled blocks

class IsCompiled(Callback):
    "Note for training and for validation if blocks are compiled"
    def before_fit(self): self.seen = set()
    def before_batch(self):
        self.seen.add((self.training, is_compiled(self.model.backbone.blocks[0].f)))

@pytest.fixture
def compiler():
    "A compiler without cached code, and without any afterwards"
    torch.compiler.reset()
    yield CompileCallback
    torch.compiler.reset()

def test_blocks_are_compiled_for_training_alone(compiler):
    learn,plain = fit(compiler(backend='aot_eager'), IsCompiled()),fit()
    assert learn.is_compiled.seen=={(True, True), (False, False)}
    assert not is_compiled(learn.model) and state_copy(learn).keys()==state_copy(plain).keys()
    copy.deepcopy(learn.model)
    for k,v in state_copy(plain).items(): assert torch.allclose(state_copy(learn)[k], v, atol=1e-3)

def test_compile_is_an_option():
    assert tiny_learner(compile=True).compile.kwargs==dict(dynamic=False)
    assert not [cb for cb in tiny_learner().cbs if isinstance(cb, CompileCallback)]

def interrupted(folder, plug=(), resume=False, cbs=list, **kwargs):
    "Four epochs with checkpoints and all options"
    options = dict(ema=.8, accumulate=3, grad_clip=.5, betas=(.8, .9), wd=.1, config_kwargs=dict(dropout=.1))
    checkpoint = CheckpointCallback(folder, resume=resume)
    log = RunLogCallback(folder/'log', 1)
    return fit(checkpoint, log, *cbs(), *plug, epochs=4, **options|kwargs)

def check_resumed(folder, **kwargs):
    "Compare a training that was interrupted within its second epoch with one that was not"
    whole = interrupted(folder/'whole', **kwargs)
    with pytest.raises(KeyboardInterrupt): interrupted(folder/'parted', [StopAt(2, 1)], **kwargs)
    resumed = interrupted(folder/'parted', resume=True, **kwargs)
    assert not differing_weights(state_copy(whole), state_copy(resumed))
    assert whole.oscillation.losses==resumed.oscillation.losses
    assert whole.bound.per_byte==resumed.bound.per_byte
    assert len((folder/'whole'/'log').read_text().splitlines())==9
    assert len((folder/'parted'/'log').read_text().splitlines())==9

@pytest.mark.parametrize('options', [
    dict(), dict(optimizer='sgd', betas=None), dict(lambda_likelihood=.1)], ids=str)
def test_a_resumed_training_with_all_options_ends_with_the_same_bits(options, tmp_path):
    check_resumed(tmp_path, **options)

def test_a_resumed_compiled_training_ends_with_the_same_bits(compiler, tmp_path):
    check_resumed(tmp_path, cbs=lambda: [compiler(backend='aot_eager')])

@pytest.mark.skipif(not os.environ.get('BIJDIFF_SLOW'), reason='set BIJDIFF_SLOW=1: compiles for long')
@pytest.mark.skipif(not (shutil.which('g++') or shutil.which('clang++')), reason='no C++ compiler')
def test_a_resumed_training_compiled_by_default_ends_with_the_same_bits(compiler, tmp_path):
    check_resumed(tmp_path, compile=True, config_kwargs=dict(n_layers=1))

@pytest.mark.parametrize('first,then', [(False, True), (True, False)])
def test_a_compiled_training_goes_on_compiled_or_not_at_all(first, then, compiler, tmp_path):
    cbs = lambda is_compiled: lambda: [compiler(backend='aot_eager')]*is_compiled
    with pytest.raises(KeyboardInterrupt): interrupted(tmp_path, [StopAt(1, 1)], cbs=cbs(first))
    with pytest.raises(ValueError, match='compile'): interrupted(tmp_path, resume=True, cbs=cbs(then))

def test_a_training_goes_on_with_the_same_compiler(compiler, tmp_path):
    by = lambda name: lambda: [compiler(backend=name)]
    with pytest.raises(KeyboardInterrupt): interrupted(tmp_path, [StopAt(1, 1)], cbs=by('aot_eager'))
    with rejects('backend'): interrupted(tmp_path, resume=True, cbs=by('eager'))

def stepped(folder, *plug, resume=False):
    "Nine steps of two batches, with evaluations after four and checkpoints after two"
    checkpoint = CheckpointCallback(folder, resume=resume, save_every=2)
    cbs = RunLogCallback(folder/'log', 1),checkpoint,ProbeCallback(2)
    learn = tiny_learner(*cbs, *plug, ema=.8, accumulate=2, grad_clip=.5, betas=(.8, .9), wd=.1)
    with learn.no_bar(), learn.no_logging(): learn.fit_steps(9, 1e-2, eval_every=4)
    return learn

def test_steps_are_logged_once_by_a_resumed_training(tmp_path):
    whole = stepped(tmp_path/'whole')
    with pytest.raises(KeyboardInterrupt): stepped(tmp_path/'parted', StopAt(1, 5))
    parted = stepped(tmp_path/'parted', resume=True)
    assert same_weights(whole, parted) and whole.oscillation.losses==parted.oscillation.losses
    assert whole.probe.steps==parted.probe.steps==[2, 4, 6, 8] and whole.probe.losses==parted.probe.losses
    logs = [[json.loads(line) for line in open(tmp_path/name/'log')] for name in ('whole', 'parted')]
    for row in sum(logs, []): row.pop('tokens_per_s', None)
    assert logs[0]==logs[1]
    assert [row['step'] for row in logs[0]]==[1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 9]

# A saved model to start from

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "A trained model, and the folder it is saved in"
    model = fit(epochs=1).model
    return model,model.save_pretrained(tmp_path_factory.mktemp('saved'))

@pytest.mark.parametrize('kind', [0, 1, str], ids=['model', 'folder', 'name'])
def test_a_training_starts_from_a_saved_model(saved, kind):
    init = str(saved[1]) if kind is str else saved[kind]
    before = {k:v.clone() for k,v in saved[0].state_dict().items()}
    from_model = tiny_learner(init=init, config_kwargs=dict(dropout=.2), seed=7)
    model = from_model.model
    assert not differing_weights(before, model.state_dict())
    assert model.config.dropout==.2 and model.training and model.tokenizer is small_dls().tokenizer
    train(from_model, 1)
    assert differing_weights(before, model.state_dict()), 'was not trained'
    assert not differing_weights(before, saved[0].state_dict()), 'the model of init was changed'

def test_noise_and_heads_are_those_of_the_saved_model(tmp_path):
    noise = small_noise(.5, .1, .4)
    fit(corruption=noise, epochs=1).model.save_pretrained(tmp_path)
    for corruption in (None, noise):
        learn = tiny_learner(init=tmp_path, corruption=corruption)
        assert learn.corruption.corruption.to_dict()==noise.to_dict() and learn.model.config.gap_head

def other_dls(text, **kwargs): return text_dls(text*30, **dict(seq_len=16, bs=16, device='cpu')|kwargs)

def permuted_dls():
    "Data with the characters of the vocabulary in another order"
    chars = small_dls().tokenizer.chars
    return other_dls(chars[:40], tokenizer=CharTokenizer(chars[::-1]))

BAD_INITS = {
    'vocab_size':    lambda: dict(dls=other_dls('a text of few letters ')),
    'tokenizer':     lambda: dict(dls=permuted_dls()),
    'seq_len':       lambda: dict(dls=small_dls(seq_len=32)),
    'config':        lambda: dict(config=DenoiserConfig(vocab_size(), 16, d_model=8, n_heads=2, n_layers=2)),
    'config_kwargs': lambda: dict(config_kwargs=dict(n_layers=3)),
    'corruption':    lambda: dict(corruption=small_noise(.5, .5)),
    'schedule':      lambda: dict(schedule='cosine'),
    'objective':     lambda: dict(objective='score_entropy'),
    'lambda_likelihood': lambda: dict(lambda_likelihood=.1),
}
@pytest.mark.parametrize('name', BAD_INITS)
def test_a_training_that_does_not_fit_the_saved_model_is_rejected(name, saved):
    kwargs = BAD_INITS[name]()
    if 'config' in kwargs:
        from bijdiff.training.learner import diffusion_learner
        with rejects(name): diffusion_learner(small_dls(), init=saved[1], **kwargs)
        return
    with rejects(name): tiny_learner(init=saved[1], **kwargs)

def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(OSError, match=str(tmp_path)): tiny_learner(init=tmp_path)

# The bound in other units

def bytes_and_words(dls):
    text = dls.valid_text
    return len(text.encode()),len(text.split())

@pytest.mark.parametrize('tokenizer', ['char', 'byte', 'bpe'])
def test_the_bound_by_byte_token_and_word(tokenizer):
    dls = text_dls('Ein längerer Text, über Bäume und Äpfel. '*60, tokenizer, seq_len=16, bs=16, device='cpu')
    learn = fit(dls=dls, epochs=1)
    n_bytes,n_words = bytes_and_words(dls)
    score = score_ids(learn.model, dls.valid.dataset.ids, n=64, schedule='half_cosine')
    n_tokens,bound = len(dls.valid.dataset.ids),learn.bound
    nats,se = n_tokens*float(score.mean),n_tokens*float(score.se)
    for estimate,log_of_it in ((bound.per_byte.mean, nats/n_bytes/math.log(2)),
                               (math.log(bound.perplexity.mean), nats/n_tokens),
                               (math.log(bound.word_perplexity.mean), nats/n_words)):
        assert estimate==pytest.approx(log_of_it, rel=4*se/nats+4*bound.se/bound.bits)
    for estimate in (bound.perplexity, bound.word_perplexity):
        assert estimate.se/estimate.mean==pytest.approx(math.log(estimate.mean)*bound.se/bound.bits)
    assert bound.per_byte.se/bound.per_byte.mean==pytest.approx(bound.se/bound.bits)

def test_counts_of_the_data_are_taken():
    dls = copy.copy(small_dls())
    dls.valid_counts = TextCounts(tokens=30, characters=60, bytes=120, words=15)
    bound = fit(dls=dls, epochs=1).bound
    nats = math.log(bound.perplexity.mean)
    assert bound.bits==pytest.approx(nats*30/60/math.log(2))
    assert bound.per_byte.mean==pytest.approx(bound.bits/2)
    assert math.log(bound.word_perplexity.mean)==pytest.approx(2*nats)

def test_a_text_without_words_has_no_perplexity_per_word():
    bound = BoundCallback(TextCounts(4, 4, 4, 0))
    bound.bits = bound.se = 1.
    assert math.isnan(bound.word_perplexity.mean) and bound.perplexity.mean==pytest.approx(2)

# Rejected options

BAD_OPTIONS = dict(
    optimizer=['adamw', 3], betas=[(.9,), .9, (.9, 1.), (.9, -.1), ('a', .9)], wd=[-.1, 'a', math.nan],
    grad_clip=[0, -1., 'a', math.inf], accumulate=[0, 1.5, True, None], ema=[0, 1, 1.5, 'a'],
    compile=[1, 'a', None], init=[3, torch.nn.Linear(1, 1)])
@pytest.mark.parametrize('name,value', [(k, v) for k,values in BAD_OPTIONS.items() for v in values], ids=str)
def test_a_bad_option_is_rejected_by_name(name, value):
    with rejects(name): tiny_learner(**{name:value})

@pytest.mark.parametrize('kwargs', [dict(optimizer='sgd'), dict(opt_func=Adam)], ids=['sgd', 'a function'])
def test_betas_belong_to_the_adaptive_optimisers_by_name(kwargs):
    with rejects('betas'): tiny_learner(betas=(.9, .99), **kwargs)

def test_an_optimiser_is_given_in_one_way():
    with rejects('optimizer'): tiny_learner(optimizer='adam', opt_func=Adam)
