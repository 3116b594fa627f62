"""The training loop: validations beside a training, rows of the record, steps that spoil the optimiser."""
import csv
import math
import pytest
import torch
from fastai.basics import Callback, CancelTrainException, Recorder, RMSProp, SGD
from fastai.callback.all import CSVLogger, EarlyStoppingCallback, GradientAccumulation, GradientClip
from fastai.callback.all import ReduceLROnPlateau, SaveModelCallback, ShortEpochCallback
from bijdiff.training.callbacks import EMACallback, TableCallback
from bijdiff.training.loop import DiffusionLearner
from bijdiff.training.optimizers import muon
from bijdiff.training.checkpoint import CHECKPOINT, CheckpointCallback
from training_helpers import fit, OnEvent, rejects, short_lr_find, state_copy, tiny_learner, train

torch.set_num_threads(1)

# Validation beside a training

def watchers():
    "Callbacks that watch the bound, and one that writes a table"
    watching = [SaveModelCallback('bound'), EarlyStoppingCallback('bound', patience=9),
                ReduceLROnPlateau('bound', patience=9)]
    return [*watching, CSVLogger(), EMACallback(.9)]

def kept(learn):
    "What a training has left: files, best values, rates, records, weights"
    files = {p.name:p.read_bytes() for p in learn.path.rglob('*') if p.is_file()}
    best = [(cb.best, getattr(cb, 'wait', None)) for cb in learn.cbs if hasattr(cb, 'best')]
    records = [list(getattr(learn.recorder, k)) for k in ('lrs', 'iters', 'losses', 'values')]
    rates = [h['lr'] for h in learn.opt.hypers]
    return repr((best, records, rates, learn.recorder.smooth_loss.count)), files, state_copy(learn)

def same_kept(a, b): return a[:2]==b[:2] and all(torch.equal(v, b[2][k]) for k,v in a[2].items())

def broken_validate(learn):
    "A validation that ends with an error"
    with pytest.raises(ZeroDivisionError):
        learn.validate(cbs=OnEvent('after_batch', lambda learn: 1/0, train=False))

@pytest.mark.parametrize('use', [
    DiffusionLearner.validate, lambda learn: learn.validate(0), lambda learn: learn.get_preds(),
    short_lr_find, broken_validate])
def test_what_a_training_has_left_outlives_a_validation(use, tmp_path):
    learn = fit(*watchers(), path=tmp_path, epochs=2)
    before,best = kept(learn),[cb.best for cb in learn.cbs if hasattr(cb, 'best')]
    with learn.no_bar(), learn.no_logging():
        for _ in range(2): use(learn)
    after = kept(learn)
    assert after[1]==before[1] and [cb.best for cb in learn.cbs if hasattr(cb, 'best')]==best
    assert use is short_lr_find or same_kept(after, before)       # whose records are those of the search
    train(learn, 2)                                                    # and the next training watches again
    assert len(learn.csv_logger.read_log())==2 and len(learn.recorder.values)==2

def test_a_watcher_that_does_not_pause_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(DiffusionLearner, '_pause_fit_callbacks', lambda self: None)
    learn = fit(*watchers(), path=tmp_path, epochs=2)
    before = kept(learn)
    with learn.no_bar(), learn.no_logging(): learn.validate()
    assert not same_kept(kept(learn), before)

# Rows of the record

def table(capsys, *cbs, **kwargs):
    "Lines of the table that a training prints, as dictionaries of its columns"
    learn = tiny_learner(TableCallback(), *cbs)
    with learn.no_bar(): learn.fit(3, 1e-3, **kwargs)
    head,*lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(head)==len('epoch train loss bound ± log-det inverse error tokens/s time'.split())
    return learn, [dict(zip(('epoch', 'train', 'bound', 'se', 'log_det', 'inverse', 'speed', 'time'), line))
                   for line in lines]

@pytest.mark.parametrize('start', [1, 2])
def test_a_later_start_has_only_rows_of_its_epochs(start, capsys):
    learn,rows = table(capsys, start_epoch=start)
    assert [int(row['epoch']) for row in rows]==list(range(start, 3))
    assert all(':' in row['time'] and float(row['train'])>0 for row in rows)
    assert len(learn.recorder.values)==3-start

def test_a_watcher_may_start_later(tmp_path):
    "fastai's own way gives it an empty row"
    learn = tiny_learner(SaveModelCallback('bound'), path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 1e-3, start_epoch=2)
    assert learn.save_model.best==learn.bound.bits

class NoTraining(Callback):
    "Cancel the training of the second epoch"
    def before_batch(self):
        if self.training and self.epoch==1: raise CancelTrainException

def test_a_cancelled_part_leaves_a_hole_and_shifts_nothing(capsys, tmp_path):
    best = SaveModelCallback('bound')
    learn,rows = table(capsys, NoTraining())
    assert [row['train'] for row in rows][1]=='nan' and ':' in rows[1]['time']
    assert float(rows[1]['bound'])==pytest.approx(learn.recorder.values[1][2], abs=1e-4)
    short = fit(ShortEpochCallback(.3), best, path=tmp_path)
    column = short.recorder.metric_names.index('bound')-1
    assert math.isnan(short.recorder.values[0][column])==math.isnan(short.recorder.values[1][column])
    assert all(len(v)==len(short.recorder.metric_names)-2 for v in short.recorder.values)

# Steps that would spoil the optimiser

class Spike(Callback):
    "Multiply the loss of one step, before it is scaled or accumulated"
    order = -3
    def __init__(self, factor, at): self.factor,self.at = factor,at
    def after_loss(self):
        if self.training and self.train_iter==self.at: self.learn.loss_grad = self.loss_grad*self.factor

class HarmMatrices(Callback):
    "Multiply the gradients of the matrices of the MLPs in one step"
    order = 2                                                      # after the gradients have been computed
    def __init__(self, factor, at): self.factor,self.at = factor,at
    def before_step(self):
        if self.train_iter!=self.at: return
        for k,p in self.model.named_parameters():
            if 'pointwise' in k and p.ndim==2: p.grad.mul_(self.factor)

@pytest.mark.parametrize('factor', (1e12, math.nan))
def test_a_gradient_of_matrices_that_would_spoil_their_average_is_an_error(factor):
    with rejects('norm of the gradients'): fit(HarmMatrices(factor, 21), epochs=7)
    assert math.isfinite(fit(HarmMatrices(1e3, 21), epochs=7).bound.bits)

HARM = {
    'huge':             (1e12, {}, []),
    'huge, Adam':       (1e12, dict(optimizer='adam'), []),
    'huge, RMSProp':    (1e12, dict(opt_func=RMSProp), []),
    'infinite, SGD':    (math.inf, dict(opt_func=SGD), []),
    'NaN':              (math.nan, {}, []),
    'NaN, clipped':     (math.nan, {}, [GradientClip(1.)]),
    'accumulated':      (1e12, {}, [GradientAccumulation(32)]),
    'averaged':         (1e12, {}, [EMACallback(.9)]),
}
@pytest.mark.parametrize('name', HARM)
def test_a_step_that_would_spoil_the_optimiser_is_an_error(name, tmp_path):
    "It names the step and the loss, and the last checkpoint is that of the epoch before"
    factor,kwargs,cbs = HARM[name]
    checkpoint = CheckpointCallback(tmp_path)
    with rejects('step 2 of epoch 5' if name!='accumulated' else 'epoch 5') as error:
        fit(checkpoint, Spike(factor, 21), *cbs, epochs=7, **kwargs)
    assert 'loss' in str(error.value)
    assert (tmp_path/CHECKPOINT).exists()
    resumed = fit(CheckpointCallback(tmp_path, resume=True), *cbs, epochs=7, **kwargs)
    assert len(resumed.recorder.values)==7 and math.isfinite(resumed.bound.bits)

def test_a_clipped_spike_and_an_ordinary_one_train_on():
    def moves(learn):
        "Length of the way of the weights in the last epoch"
        before = state_copy(learn)
        train(learn, 1, 1e-3, flat=True)
        return sum((v-before[k]).norm().item() for k,v in state_copy(learn).items())
    plain = moves(fit(epochs=20))
    assert moves(fit(GradientClip(1.), Spike(1e15, 2), epochs=20))>plain/10
    assert moves(fit(Spike(10., 20), epochs=20))>plain/10

def test_a_frozen_optimiser_is_what_the_check_prevents(monkeypatch):
    "Without it the weights hardly move after the spike, and the run ends as if nothing had happened"
    monkeypatch.setattr('bijdiff.training.loop._most_growth', math.inf)
    monkeypatch.setattr('bijdiff.training.loop._most_at_first', math.inf)
    def way(learn):
        "Length of the way of the weights in one more epoch"
        before = state_copy(learn)
        train(learn, 1, 1e-3, flat=True)
        return sum((v-before[k]).norm().item() for k,v in state_copy(learn).items())
    spiked,plain = (fit(*cbs, epochs=40, optimizer='adam') for cbs in ([Spike(1e12, 14)], []))
    assert way(spiked) < way(plain)/10                                 # its momentum has died away

def test_a_scaled_loss_in_half_precision_is_not_taken_for_a_spike():
    assert len(train(tiny_learner().to_fp16(init_scale=2.**16), 3).recorder.values)==3

def test_a_rate_search_goes_through_high_rates():
    learn = tiny_learner()
    short_lr_find(learn)
    assert isinstance(learn.recorder, Recorder) and learn.opt_func is muon
