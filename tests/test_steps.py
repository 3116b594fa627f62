"""Trainings of a number of steps: their legs, checkpoints within them, signals, and the best model."""
import multiprocessing
import os
import random
import signal
import sys
import numpy as np
import pytest
import torch
from fastai.basics import Callback
from fastai.callback.all import GradientAccumulation
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.model.saving import tensors_hash
from bijdiff.training.best import BestModelCallback
from bijdiff.training.callbacks import EMACallback
from bijdiff.training.checkpoint import CHECKPOINT, CheckpointCallback, read_checkpoint
from bijdiff.training.stopping import stop_on_signals, TrainingStopped
from test_checkpoint import gradients, rewrite, setter
from training_helpers import N_STEPS, OnEvent, rejects, same_weights, small_dls
from training_helpers import StopAt, tiny_learner, train, wrap_method

torch.set_num_threads(1)

def in_steps(learn, steps=10, eval_every=4, **kwargs):
    "Train for some steps without any display"
    with learn.no_bar(), learn.no_logging(): learn.fit_steps(steps, 1e-2, eval_every, **kwargs)
    return learn

def dropout_learner(*cbs, **kwargs): return tiny_learner(*cbs, config_kwargs=dict(dropout=.1), **kwargs)

# Steps

class Draws(Callback):
    "Draw random numbers in evaluations, as a loader or a metric may"
    run_train = False
    def before_batch(self): torch.rand(3), np.random.rand(), random.random()

def test_weights_do_not_depend_on_how_often_they_are_evaluated():
    whole = in_steps(dropout_learner(GradientAccumulation(40)), eval_every=None)
    for eval_every in (1, 3, 10):
        learn = in_steps(dropout_learner(GradientAccumulation(40), Draws()), eval_every=eval_every)
        assert same_weights(learn, whole)
        assert learn.recorder.losses==whole.recorder.losses and learn.recorder.lrs==whole.recorder.lrs

def test_legs_that_draw_anew_are_seen(monkeypatch):
    "Where random numbers are set before every leg, as before every epoch, weights depend on the legs"
    from bijdiff.training.noising import CorruptionCallback
    old = CorruptionCallback.before_train
    def begin(self):
        plan,self.learn.step_plan = self.learn.step_plan,None
        old(self)
        self.learn.step_plan = plan
    whole = in_steps(dropout_learner(), eval_every=None)
    monkeypatch.setattr(CorruptionCallback, 'before_train', begin)
    assert not same_weights(in_steps(dropout_learner(), eval_every=4), whole)

@pytest.mark.parametrize('n_acc,per_step', [(16, 1), (17, 2), (48, 3)])
def test_a_step_is_an_update_of_the_weights(n_acc, per_step):
    seen = []
    watch = OnEvent('after_step', lambda learn: seen.append(learn.n_updates))
    learn = in_steps(tiny_learner(GradientAccumulation(n_acc), watch))
    assert seen==[*range(1, 11)] and learn.train_iter==10*per_step
    assert learn.opt.state[learn.opt.all_params()[0][0]]['step']==10

def test_the_rate_rises_in_the_steps_of_warm_up():
    lrs = in_steps(tiny_learner(), 20, warmup=5).recorder.lrs
    assert lrs.index(max(lrs))==5 and lrs==in_steps(tiny_learner(), 20).recorder.lrs
    lrs = in_steps(tiny_learner(), 20, warmup=0).recorder.lrs
    assert lrs[0]==max(lrs)

def test_there_is_a_row_for_each_evaluation():
    rows = []
    learn = tiny_learner()
    learn.logger = rows.append
    with learn.no_bar(): learn.fit_steps(10, 1e-2, 4)
    assert [row[0] for row in rows]==[4, 8, 10] and len(learn.recorder.values)==3

def test_epochs_after_steps_are_epochs():
    learn = train(in_steps(tiny_learner()), 1)
    assert learn.train_iter==learn.n_updates==N_STEPS and learn.step_plan is None

def test_a_second_fit_has_another_order():
    batches = []
    note = OnEvent('before_batch', lambda learn: batches.append(learn.yb[0].clone()))
    learn = in_steps(tiny_learner(note), 2)
    in_steps(learn, 2)
    assert not torch.equal(batches[0], batches[2])

def test_a_wrong_number_of_steps_is_rejected_by_name():
    for name,value in dict(steps=0, eval_every=1.5, warmup=11).items():
        with rejects(name): tiny_learner().fit_steps(**{'steps':10, name:value})

# Checkpoints within an epoch or a leg

ALWAYS = '0.000001min' # After every batch, between the batches of a step too

def averaging(*cbs):
    "A learner with dropout, accumulated gradients and averaged weights"
    return dropout_learner(GradientAccumulation(40), EMACallback(.9), *cbs)

def ends_alike(resumed, whole):
    "Return True if two trainings have ended with the same weights, gradients, averages and records"
    same = lambda a, b: len(a)==len(b) and all(map(torch.equal, a, b))
    records = [[o.recorder.losses, o.recorder.lrs, o.n_updates, o.train_iter, o.bound.bits,
                o.oscillation.losses] for o in (resumed, whole)]
    same_average = not hasattr(whole, 'ema') or same(resumed.ema.average, whole.ema.average)
    zeros = lambda learn: [torch.zeros(0) if g is None else g for g in gradients(learn)]
    return same_weights(resumed, whole) and same_average and same(zeros(resumed), zeros(whole)) \
        and records[0]==records[1]

def resumed_and_whole(folder, fit, at, precision=lambda learn: learn, workers=0):
    "A training that was interrupted before a batch and resumed, and one that was not"
    def run(name, *cbs, resume=False, num_workers=0):
        checkpoint = CheckpointCallback(folder/name, resume=resume, save_every=ALWAYS)
        learn = precision(averaging(checkpoint, *cbs))
        learn.dls.train.fake_l.num_workers = num_workers
        return fit(learn)
    with pytest.raises(KeyboardInterrupt): run('broken', StopAt(*at))
    return run('broken', resume=True, num_workers=workers), run('whole')

def three_epochs(learn): return train(learn, 3)

def seven_steps(learn): return in_steps(learn, 7, 3)

@pytest.mark.parametrize('fit,at', [(three_epochs, (0, 2)), (three_epochs, (1, 3)), (three_epochs, (2, 0)),
                                    (seven_steps, (0, 5)), (seven_steps, (1, 0)), (seven_steps, (2, 1))])
def test_a_training_goes_on_within_an_epoch_or_a_leg(fit, at, tmp_path):
    resumed,whole = resumed_and_whole(tmp_path, fit, at)
    assert ends_alike(resumed, whole)

def test_the_position_is_that_of_the_last_step(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        seven_steps(averaging(CheckpointCallback(tmp_path, save_every=2), StopAt(1, 7)))
    meta = read_checkpoint(tmp_path)[1]
    assert meta['done']==1 and meta['position']==dict(batch=3, updates=4, iterations=12)

@pytest.mark.parametrize('change', ['random states', 'batch'])
def test_a_checkpoint_without_its_position_is_seen(change, tmp_path, monkeypatch):
    if change=='batch': monkeypatch.setattr('bijdiff.training.checkpoint.CheckpointCallback._position',
                                            lambda self, meta: meta['position'] | dict(batch=1))
    else: monkeypatch.setattr('bijdiff.training.loop.restore_random_states', lambda *args, **kwargs: None)
    resumed,whole = resumed_and_whole(tmp_path, three_epochs, (1, 3))
    assert not same_weights(resumed, whole)

@pytest.mark.parametrize('fit', [three_epochs, seven_steps])
@pytest.mark.parametrize('half', ['bf16', 'fp16'])
def test_half_precision_goes_on_too(fit, half, tmp_path):
    precision = lambda learn: learn.to_bf16() if half=='bf16' else learn.to_fp16(init_scale=2.**12)
    assert ends_alike(*resumed_and_whole(tmp_path, fit, (1, 2), precision=precision))

@pytest.mark.parametrize('fit', [three_epochs, seven_steps])
def test_a_training_goes_on_with_other_loading_processes(fit, tmp_path):
    small_dls.cache_clear()
    try: assert ends_alike(*resumed_and_whole(tmp_path, fit, (1, 2), workers=2))
    finally: small_dls.cache_clear()

def test_checkpoints_by_the_clock(tmp_path, monkeypatch):
    writes = []
    note = lambda self, old, *args: writes.append(self.learn.train_iter) or old(*args)
    wrap_method(monkeypatch, CheckpointCallback, '_write', note)
    in_steps(tiny_learner(CheckpointCallback(tmp_path, save_every='60min')), 6, None)
    assert writes==[6, 6, 6]                             # before and after the evaluation, and the end
    writes.clear()
    in_steps(tiny_learner(CheckpointCallback(tmp_path, save_every='0.000001min')), 6, None)
    assert writes==[1, 2, 3, 4, 5, 6, 6, 6]

def test_without_save_every_epochs_have_one_checkpoint(tmp_path, monkeypatch):
    writes = []
    note = lambda self, old, *args: writes.append(args) or old(*args)
    wrap_method(monkeypatch, CheckpointCallback, '_write', note)
    train(tiny_learner(CheckpointCallback(tmp_path)), 2)
    assert writes==[(False,), (False,), (True,)]

HOSTILE = {
    'a batch beyond the leg':    (setter('position', 'batch', 13), 'batch'),
    'a batch below 0':           (setter('position', 'batch', -1), 'batch'),
    'too many steps':            (setter('position', 'updates', 10**9), 'updates'),
    'too many iterations':       (setter('position', 'iterations', 10**9), 'iterations'),
    'no position':               (setter('position', None), 'position'),
    'other steps':               (setter('fits', 0, 'steps', 8), 'steps'),
    'other legs':                (setter('fits', 0, 'eval_every', 2), 'eval_every'),
}
for k in ('python', 'numpy', 'torch', 'noise'):
    def cut(meta, tensors, k=k): tensors[f'random.0.{k}'] = tensors[f'random.0.{k}'][1:].clone()
    HOSTILE[f'a short state of {k}'] = cut,k
def lose(meta, tensors): del tensors['random.0.torch']
HOSTILE['a missing random state'] = lose,'random states'

@pytest.fixture(scope='module')
def interrupted(tmp_path_factory):
    "A folder with the checkpoint of a training in steps that was stopped within its second leg"
    folder = tmp_path_factory.mktemp('interrupted')
    with pytest.raises(KeyboardInterrupt):
        seven_steps(averaging(CheckpointCallback(folder, save_every=1), StopAt(1, 7)))
    return folder

@pytest.mark.parametrize('name', HOSTILE)
def test_a_changed_position_is_rejected(name, interrupted, tmp_path):
    change,message = HOSTILE[name]
    rewrite(interrupted, tmp_path, change)
    with rejects(message): seven_steps(averaging(CheckpointCallback(tmp_path, resume=True)))

def test_steps_are_not_resumed_in_epochs(interrupted):
    with rejects('steps'): train(averaging(CheckpointCallback(interrupted, resume=True)), 3)

# Stopping

def stop_at(checkpoint, event, at, error, train=True):
    "A callback that asks for a stop in a batch"
    def ask(learn):
        if (learn.epoch, learn.iter)==at: checkpoint.stop(error)
    return OnEvent(event, ask, train=train)

@pytest.mark.parametrize('fit', [three_epochs, seven_steps])
@pytest.mark.parametrize('in_training', [True, False])
def test_a_training_stops_after_the_present_batch_and_goes_on(fit, in_training, tmp_path):
    "In an evaluation, the training of the leg is not repeated"
    checkpoint = CheckpointCallback(tmp_path/'stopped')
    checkpoint.can_stop = True
    at,error = ((1, 2) if in_training else (1, 0)),TrainingStopped(signal.SIGTERM)
    stop = stop_at(checkpoint, 'before_batch', at, error, in_training)
    with pytest.raises(TrainingStopped) as raised: fit(averaging(checkpoint, stop))
    assert raised.value is error and error.status==75
    meta,n = read_checkpoint(tmp_path/'stopped')[1],9 if fit is seven_steps else N_STEPS
    assert meta['done']==1 and meta['position']['batch']==(3 if in_training else n)
    trained = []
    count = OnEvent('after_batch', lambda learn: trained.append((learn.epoch, learn.iter)))
    resumed = fit(averaging(CheckpointCallback(tmp_path/'stopped', resume=True), count))
    assert trained[0]==((1, 3) if in_training else (2, 0))
    assert ends_alike(resumed, fit(averaging(CheckpointCallback(tmp_path/'whole'))))

def needs_fork(test):
    "Mark a test that forks, with threads of the test runner beside it"
    test = pytest.mark.filterwarnings('ignore:This process:DeprecationWarning')(test)
    return pytest.mark.skipif(not hasattr(os, 'fork'), reason='Windows has other signals')(test)

def run_job(folder, report, workers):
    "Train in steps and report each batch; write a hash of all that a training ends with"
    os.setsid()
    def say(learn): report.send(learn.train_iter)
    checkpoint = CheckpointCallback(folder, resume=(folder/CHECKPOINT).exists(), save_every=2)
    cbs = [OnEvent('after_batch', say), OnEvent('after_batch', say, train=False)]
    learn = averaging(checkpoint, BestModelCallback(folder), *cbs)
    learn.dls.train.fake_l.num_workers = workers
    try:
        with stop_on_signals(checkpoint): in_steps(learn, 12, 5)
    except TrainingStopped as e: sys.exit(e.status)
    state = learn.model.state_dict() | {f'average {i}':a for i,a in enumerate(learn.ema.average)}
    (folder/'end').write_text(tensors_hash(state)+repr(learn.oscillation.losses))

def start_job(folder, workers=0):
    "Start a training in a fork; return it and the end of its pipe"
    forks = multiprocessing.get_context('fork')
    ours,theirs = forks.Pipe(False)
    job = forks.Process(target=run_job, args=(folder, theirs, workers))
    job.start()
    return job,ours

def interrupt_after(folder, n, signum, workers=0, group=False):
    "Start a training, send it a signal after some batches, and return its exit status"
    job,pipe = start_job(folder, workers)
    for _ in range(n):
        assert pipe.poll(60)
        pipe.recv()
    (os.killpg if group else os.kill)(job.pid, signum)
    job.join(60)
    return job.exitcode

def end_of(folder):
    "Run a training to its end; return what it ends with"
    job,_ = start_job(folder)
    job.join(100)
    return (folder/'end').read_text()

@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    "What an uninterrupted training ends with"
    return end_of(tmp_path_factory.mktemp('whole'))

@needs_fork
@pytest.mark.parametrize('signum,status', [(signal.SIGKILL, -9), (signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_loses_nothing(signum, status, uninterrupted, tmp_path):
    "In training, and then in an evaluation"
    assert interrupt_after(tmp_path, 7, signum)==status
    before = read_checkpoint(tmp_path)[1]['position']
    assert before['iterations']>=(7 if status>0 else 6)
    assert interrupt_after(tmp_path, 16-before['iterations'], signum)==status
    assert end_of(tmp_path)==uninterrupted

@needs_fork
@pytest.mark.parametrize('signum,status', [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_to_all_processes_leaves_those_that_load_data_alone(signum, status, uninterrupted, tmp_path):
    assert interrupt_after(tmp_path, 5, signum, workers=2, group=True)==status
    assert end_of(tmp_path)==uninterrupted

@needs_fork
@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT])
def test_processes_that_load_data_go_on_after_a_signal_of_their_own(signum, tmp_path):
    "A cluster sends it to all processes, and theirs may be heard first"
    small_dls.cache_clear()
    def shoot(learn):
        if learn.iter==2: [os.kill(p.pid, signum) for p in multiprocessing.active_children()]
    checkpoint = CheckpointCallback(tmp_path)
    learn = tiny_learner(checkpoint, OnEvent('before_batch', shoot), dls=small_dls(bs=4))
    learn.dls.train.fake_l.num_workers = 2
    try:
        with stop_on_signals(checkpoint): assert train(learn, 1).train_iter>12
    finally: small_dls.cache_clear()

# The best model

class SetBound(Callback):
    "Set the bound of each evaluation"
    order = 61
    def __init__(self, *values): self.values = values
    def after_validate(self): self.learn.bound.bits = self.values[self.epoch]

def test_the_best_model_is_the_one_that_was_evaluated(tmp_path):
    "With averaged weights; NaN is not the best, nor is an equal bound better"
    averages = []
    keep = lambda learn: averages.append(learn.model.output_head.weight.clone())
    note = OnEvent('after_epoch', keep, train=False)
    learn = in_steps(tiny_learner(SetBound(float('nan'), 3., 2., 2., 5.), BestModelCallback(tmp_path), note,
                                  EMACallback(.9)), 10, 2)
    best = BijectiveDenoiser.from_pretrained(tmp_path/'best')
    assert learn.best_model.best==2. and torch.equal(best.output_head.weight, averages[2])
    assert not any(torch.equal(best.output_head.weight, averages[i]) for i in (1, 3))

def test_a_resumed_training_remembers_the_best(tmp_path):
    def run(*cbs, resume=False):
        checkpoint = CheckpointCallback(tmp_path, resume=resume)
        best = BestModelCallback(tmp_path)
        return in_steps(tiny_learner(SetBound(2., 3., 2.5), best, checkpoint, *cbs), 6, 2)
    with pytest.raises(KeyboardInterrupt): run(StopAt(1, 1))
    before = (tmp_path/'best'/'model.safetensors').stat().st_mtime_ns
    assert run(resume=True).best_model.best==2.
    assert (tmp_path/'best'/'model.safetensors').stat().st_mtime_ns==before
