"""What watches a training run changes nothing, and its records survive an interruption.

The values are tested in test_probe.py, test_block_norm.py, test_layerwise.py, test_run_log.py and
test_objective_terms.py. Faults are planted to see that the tests see them."""
import json, random
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple
import numpy as np, pytest, torch
from fastai.callback.all import GradientAccumulation, GradientClip, ReduceLROnPlateau, SaveModelCallback
from bijdiff.training.callbacks import EMACallback
from bijdiff.training.checkpoint import CheckpointCallback
from bijdiff.training.experts import ExpertCallback
from bijdiff.training.instruments import BlockNormCallback, LatticeUsageCallback, ProbeCallback
from bijdiff.training.instruments import RunLogCallback, TensorBoardCallback
from bijdiff.training.terms import ObjectiveCallback
from training_helpers import differing_weights, fit, N_STEPS, rejects, same_weights, small_noise
from training_helpers import state_copy, StopAt, tiny_learner, train, wrap_method

torch.set_num_threads(1)

# Watching changes nothing

def everything():
    "Dropout, reversible layers, averaged weights, accumulated and clipped gradients, two terms in the loss"
    cbs = [EMACallback(.9), GradientAccumulation(32), GradientClip(.05)]
    return dict(cbs=cbs, config_kwargs=dict(dropout=.3, reversible=True), lambda_likelihood=.1)

def one_layer(*cbs, corruption=None, **config_kwargs):
    "Arguments of a learner for a network of one layer"
    return dict(cbs=cbs, corruption=corruption, config_kwargs=dict(n_layers=1)|config_kwargs)

SETTINGS = { # called for each run, as callbacks belong to one learner
    'plain':        dict,
    'dropout':      lambda: one_layer(dropout=.3),
    'average':      lambda: one_layer(EMACallback(.9)),
    'accumulated':  lambda: one_layer(GradientAccumulation(32)),
    'clipped':      lambda: one_layer(GradientClip(.05)),
    'substitution': lambda: one_layer(corruption=small_noise(.5, .5), dropout=.3),
    'router':       lambda: one_layer(n_experts=2, k_active=1, router_balance=.1),
    'everything':   everything,
}
INSTRUMENTS = { # called with a folder
    'log':   lambda folder: RunLogCallback(folder/'log.jsonl', 2),
    'range': lambda folder: LatticeUsageCallback(),
    'norms': lambda folder: BlockNormCallback(2),
    'probe': lambda folder: ProbeCallback(2, n_texts=3),
}

def instruments(which, folder):
    "One instrument, or all of them"
    return [create(folder) for name,create in INSTRUMENTS.items() if which in (name, 'all')]

class Result(NamedTuple):
    "The end of a training run"
    weights:dict
    losses:list
    metrics:list
    random_state:tuple

def random_state():
    "States of the three global generators"
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), np.random.get_state()[1].tobytes()

def run(setting, watchers=()):
    "Train for one epoch"
    kwargs = SETTINGS[setting]()
    learn = fit(*kwargs.pop('cbs', ()), *watchers, epochs=1, **kwargs)
    metrics = [row[:-1] for row in learn.recorder.values]                     # without the speed
    return Result(state_copy(learn), learn.oscillation.losses, metrics, random_state())

@cache
def unwatched(setting): return run(setting)

def differences(a, b):
    "Names of the weights and of the other results that differ"
    others = [name for name in Result._fields[1:] if getattr(a, name)!=getattr(b, name)]
    return differing_weights(a.weights, b.weights)+others

WATCHED = [(setting, 'all') for setting in SETTINGS] + [('everything', name) for name in INSTRUMENTS]
@pytest.mark.parametrize('setting,which', WATCHED)
def test_watching_changes_nothing(setting, which, tmp_path):
    assert not differences(run(setting, instruments(which, tmp_path)), unwatched(setting))

def draw_a_number(self, method, *args):
    torch.rand(1)
    return method(*args)
def draw_from_the_noise(self, method):
    torch.rand(1, generator=self.learn.corruption.generator)
    return method()
def move_a_weight(self, method):
    self.model.output_head.bias.data += 1e-7
    return method()
def stay_in_evaluation_mode(self, method):
    value = method()
    self.model.eval()
    return value

MEDDLERS = { # class, method, fault, instrument, setting
    'probe that draws':             (ProbeCallback, '_measure', draw_a_number, 'probe', 'dropout'),
    'log that draws':               (RunLogCallback, '_at_step', draw_a_number, 'log', 'dropout'),
    'norms that move weights':      (BlockNormCallback, 'after_step', move_a_weight, 'norms', 'plain'),
    'probe that ends training':     (ProbeCallback, '_measure', stay_in_evaluation_mode, 'probe', 'dropout'),
    'probe on the noise generator': (ProbeCallback, '_measure', draw_from_the_noise, 'probe', 'plain'),
}
@pytest.mark.parametrize('name', MEDDLERS)
def test_meddling_is_seen(name, monkeypatch, tmp_path):
    cls,method,fault,which,setting = MEDDLERS[name]
    wrap_method(monkeypatch, cls, method, fault)
    assert differences(run(setting, instruments(which, tmp_path)), unwatched(setting))

def test_a_learner_without_weights_of_terms_has_no_objective_callback():
    learn = tiny_learner()
    assert not hasattr(learn, 'objective')
    assert not any(isinstance(cb, ObjectiveCallback) for cb in learn.cbs)
    assert hasattr(tiny_learner(lambda_invert=.1), 'objective')

EVERY_N_STEPS = {
    'norms': BlockNormCallback,
    'log':   partial(RunLogCallback, 'x'),
    'board': partial(TensorBoardCallback, 'x'),
}
@pytest.mark.parametrize('name', EVERY_N_STEPS)
def test_every_must_be_a_positive_whole_number(name):
    with rejects('every'): EVERY_N_STEPS[name](every=0)

def test_steps_over_epochs_and_fits():
    learn = fit(ProbeCallback(3), BlockNormCallback(5))
    first = learn.probe.losses
    assert learn.probe.steps==[3, 6] and len(first)==2
    assert [row['step'] for row in learn.block_norm.rows]==[5]
    with learn.no_bar(): learn.validate()
    assert learn.probe.losses is first and len(learn.block_norm.rows)==1
    train(learn, 1)
    assert learn.probe.steps==[3] and learn.probe.losses[0]!=first[0]
    assert learn.block_norm.rows==[]

# After an interruption

def watched(folder, *cbs, resume=False):
    "Train with checkpoints, instruments, a log and three terms"
    folder.mkdir(exist_ok=True)
    watchers = [ProbeCallback(3), BlockNormCallback(3), LatticeUsageCallback()]
    files = [RunLogCallback(folder/'log.jsonl', 2), CheckpointCallback(folder, resume=resume)]
    terms = dict(lambda_likelihood=.01, lambda_invert=.1)
    return train(tiny_learner(*watchers, *files, *cbs, config_kwargs=dict(dropout=.2), **terms))

def all_records(learn):
    "What the instruments have recorded"
    probe = learn.probe.steps,learn.probe.losses
    return probe, learn.block_norm.rows, learn.lattice_usage.values, learn.objective.parts

def log_rows(folder):
    "Lines of the log, without the speed"
    rows = [json.loads(line) for line in Path(folder/'log.jsonl').read_text().splitlines()]
    return [{k:v for k,v in row.items() if k!='tokens_per_s'} for row in rows]

def test_records_and_log_after_a_resume(tmp_path):
    a,b = tmp_path/'a',tmp_path/'b'
    with pytest.raises(KeyboardInterrupt): watched(a, StopAt(1, 3))
    n_before = len(log_rows(a))
    resumed,whole = watched(a, resume=True),watched(b)
    assert all_records(resumed)==all_records(whole) and same_weights(resumed, whole)
    assert whole.probe.steps==[3, 6]
    assert len(whole.objective.parts)==8 and len(whole.lattice_usage.values)==2
    got,want = log_rows(a),log_rows(b)
    assert n_before==4 and got==want                  # the line of the interrupted epoch is there once
    assert [row['step'] for row in got]==[2, 4, 4, 6, 8, 8]
    assert [row['epoch'] for row in got if 'epoch' in row]==[0, 1]

def two_savers(): return [SaveModelCallback(monitor=m, fname=m) for m in ('bound', 'valid_loss')]
def impatient_plateau():
    "A reduction of the learning rate after every other epoch, as no improvement is large enough"
    return [ReduceLROnPlateau(monitor='valid_loss', patience=1, min_delta=10.)]
def expert_callback(): return [ExpertCallback(3)]

def best_values(learn): return [cb.best for cb in learn.cbs if isinstance(cb, SaveModelCallback)]
def learning_rates(learn): return [h['lr'] for h in learn.opt.hypers]
def loss_scaling(learn): return learn.loss_scale.scaling
def expert_records(learn): return learn.expert.step, learn.expert.grad_norms, learn.expert.records

STATEFUL = { # callbacks, what must be restored, configuration
    'two savers':   (two_savers, best_values, {}),
    'reduced rate': (impatient_plateau, learning_rates, {}),
    'scaled loss':  (list, loss_scaling, {}),
    'experts':      (expert_callback, expert_records, dict(n_experts=2)),
}
@pytest.mark.parametrize('name', STATEFUL)
def test_callbacks_go_on_after_a_resume(name, tmp_path):
    create,state,config_kwargs = STATEFUL[name]
    def run(folder, *cbs, resume=False):
        checkpoint = CheckpointCallback(tmp_path/folder, resume=resume)
        learn = tiny_learner(checkpoint, *create(), *cbs, path=tmp_path/folder, config_kwargs=config_kwargs)
        if name=='scaled loss': learn.to_fp16(init_scale=2.**40)
        return train(learn, 4, 1e-3, flat=True)
    with pytest.raises(KeyboardInterrupt): run('a', StopAt(3, 1))
    resumed,whole = run('a', resume=True),run('b')
    assert json.dumps(state(resumed))==json.dumps(state(whole))
    assert same_weights(resumed, whole)

def test_a_record_that_is_lost_is_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(LatticeUsageCallback, 'saved_attrs', {})
    with pytest.raises(KeyboardInterrupt): watched(tmp_path, StopAt(1, 0))
    learn = watched(tmp_path, resume=True)
    assert len(learn.lattice_usage.values)==1 and len(learn.objective.parts)==8

def test_instruments_are_back_after_an_interrupted_lr_find(tmp_path):
    learn = tiny_learner(ProbeCallback(2), StopAt(0, 2), path=tmp_path)
    with pytest.raises(KeyboardInterrupt), learn.no_bar(): learn.lr_find(show_plot=False)
    learn.remove_cb(StopAt)
    train(learn, 1)
    assert len(learn.oscillation.losses)==N_STEPS and learn.probe.steps==[2, 4]
