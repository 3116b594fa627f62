"""Checkpoints: what is in them, what is refused, and trainings that go on with the same bits."""
import copy
import json
import random
import warnings
import pytest
import torch
from fastai.basics import Callback, CancelFitException, SGD
from fastai.callback.all import GradientAccumulation, SaveModelCallback
from safetensors import safe_open
from safetensors.torch import save_file
from bijdiff.data.corpora import pydoc_corpus
from bijdiff.data.loaders import text_dls
from bijdiff.model.saving import tensors_hash
from bijdiff.records import check_count, environment
from bijdiff.training.callbacks import EMACallback
from bijdiff.training.checkpoint import CHECKPOINT, CheckpointCallback, read_checkpoint
from bijdiff.training.instruments import BlockNormCallback, ProbeCallback
from training_helpers import fit, OnEvent, rejects, same_weights, small_dls, state_copy
from training_helpers import StopAt, tiny_learner, train

torch.set_num_threads(1)

# Files that somebody has changed

def instruments(): return [EMACallback(.9), ProbeCallback(2), BlockNormCallback(2), GradientAccumulation(40)]

@pytest.fixture(scope='module')
def interrupted(tmp_path_factory):
    "A folder with the checkpoint of a training that was stopped in its third epoch"
    folder = tmp_path_factory.mktemp('interrupted')
    with pytest.raises(KeyboardInterrupt):
        fit(CheckpointCallback(folder), StopAt(2, 1), *instruments(), epochs=3, lambda_likelihood=.1)
    return folder

def rewrite(folder, target, change, **header_changes):
    "Write a checkpoint again, with the right hash, after a change of its records or its tensors"
    with safe_open(folder/CHECKPOINT, 'pt') as f:
        tensors,header = {k:f.get_tensor(k) for k in f.keys()},f.metadata()
    meta = json.loads(header['bijdiff_checkpoint'])
    meta = change(meta, tensors) or meta
    rest = json.dumps(meta)
    header |= dict(bijdiff_checkpoint=rest, hash=tensors_hash(tensors, rest.encode()))
    save_file(tensors, target/CHECKPOINT, header|header_changes)

class Stop(Callback):
    "End a fit before its first epoch"
    order = 1000
    def before_fit(self): raise CancelFitException

def resume(folder):
    "A learner that has read a checkpoint, and its callback"
    checkpoint = CheckpointCallback(folder, resume=True)
    learn = tiny_learner(checkpoint, *instruments(), Stop(), lambda_likelihood=.1)
    return train(learn, 3), checkpoint

def records(meta): return meta['records']['dict']
def setter(*path):
    "A change that sets an entry of the records of the file"
    *path,key,value = path
    def change(meta, tensors):
        for k in path: meta = meta[k]
        meta[key] = value
    return change

def of_callback(name, **attrs):
    "A change that gives a callback other attributes"
    def change(meta, tensors):
        record = records(meta).setdefault(name, dict(dict={}))['dict']
        record |= {k:dict(plain=v) for k,v in attrs.items()}
    return change

def of_tensor(name, f):
    "A change of a tensor"
    def change(meta, tensors): tensors[name] = f(tensors[name])
    return change

def poison(x):
    x = x.clone()
    x.view(-1)[0] = torch.nan
    return x

WEIGHT = 'model.output_head.weight'
HOSTILE = {
    'another folder':        (of_callback('checkpoint 1', folder='/tmp/elsewhere'), 'checkpoint 1'),
    'a method':              (of_callback('ema 1', after_fit='x'), 'ema 1'),
    'a class attribute':     (of_callback('ema 1', order=0), 'ema 1'),
    'an unknown callback':   (of_callback('model 1', x=1), 'callbacks'),
    'a flag that is none':   (of_callback('ema 1', swapped=1), 'swapped'),
    'a count below 0':       (of_callback('gradient_accumulation 1', count=-16), 'count'),
    'losses in words':       (of_callback('oscillation 1', losses=['low']*3), 'losses'),
    'rows with other names': (of_callback('block_norm 1', rows=[dict(step=1, path='/')]), 'rows'),
    'steps in words':        (of_callback('probe 1', steps='12'), 'steps'),
    'more epochs recorded':  (of_callback('recorder 1', values=[[1., 2.]]*9), 'recorded epochs'),
    'finished, untrained':   (setter('done', 10**9), 'epochs done'),
    'no epoch done':         (setter('done', 0), 'epochs done'),
    'half an epoch':         (setter('done', 1.5), 'done'),
    'true epochs':           (setter('done', True), 'done'),
    'a rate below 0':        (setter('opt', 'hypers', 0, 'lr', -1.), 'lr'),
    'a rate in words':       (setter('opt', 'hypers', 0, 'lr', 'high'), 'lr'),
    'an endless rate':       (setter('opt', 'hypers', 0, 'lr', float('inf')), 'lr'),
    'a new hyper-parameter': (setter('opt', 'hypers', 0, 'folder', 1.), 'hyper-parameters'),
    'a new state':           (setter('opt', 'state', 0, 'lr', 7.), 'optimiser'),
    'a step below 0':        (setter('opt', 'state', 0, 'step', -1), 'step'),
    'no states':             (setter('opt', 'state', []), 'optimiser'),
    'no fits':               (setter('fits', []), 'fit'),
    'fits in words':         (setter('fits', ['two']), 'fits'),
    'other epochs':          (setter('fits', 0, 'epochs', 4), 'epochs'),
    'another seed':          (setter('network_and_text', 'seed', 1), 'seed'),
    'a loss in words':       (setter('smooth', ['low', 1]), 'smooth'),
    'no smoothed loss':      (setter('smooth', []), 'smooth'),
    'endless threads':       (setter('environment', 'threads', 10**9), 'threads'),
    'unknown gradients':     (setter('zero_gradients', ['folder']), 'gradients'),
    'something unsaved':     (setter('unsaved', ['Callback.x']), 'Callback.x'),
    'an unknown entry':      (setter('folder', '/tmp'), 'records'),
    'records in words':      (setter('records', 'none'), 'records'),
    'a wrong table':         (setter('records', 'dict', 'ema 1', dict(rows=dict(a=3))), 'list'),
    'a missing tensor':      (setter('records', 'dict', 'probe 1', dict(tensor='77')), 'tensor'),
    'weights of NaN':        (of_tensor(WEIGHT, poison), 'output_head.weight'),
    'other shapes':          (of_tensor(WEIGHT, lambda x: x[:-1].clone()), 'output_head.weight'),
    'other types':           (of_tensor(WEIGHT, torch.Tensor.double), 'output_head.weight'),
    'another average':       (of_tensor('ema.0', lambda x: x[:-1].clone()), 'averages 0'),
    'states of NaN':         (of_tensor('opt.0.sqr_avg', poison), 'sqr_avg'),
    'whole gradients':       (of_tensor(WEIGHT.replace('model', 'grad', 1), torch.Tensor.int), 'gradients'),
}

@pytest.mark.parametrize('name', HOSTILE)
def test_a_changed_file_is_refused_and_changes_nothing(name, interrupted, tmp_path):
    change,message = HOSTILE[name]
    rewrite(interrupted, tmp_path, change)
    checkpoint = CheckpointCallback(tmp_path, resume=True)
    learn = tiny_learner(checkpoint, *instruments(), lambda_likelihood=.1)
    before = state_copy(learn)
    with rejects(message): train(learn, 3)
    assert all(torch.equal(v, before[k]) for k,v in state_copy(learn).items())
    assert checkpoint.folder==tmp_path and learn.ema.order==EMACallback.order
    assert [p.name for p in tmp_path.iterdir()]==[CHECKPOINT]

def test_a_file_that_was_only_written_again_is_read(interrupted, tmp_path):
    rewrite(interrupted, tmp_path, lambda meta,tensors: None)
    learn,_ = resume(tmp_path)
    assert learn.oscillation.losses and learn.gradient_accumulation.count>0

JUNK = [None, True, -1, 10**30, 1e400, 'x', '', [], {}, [[]], [None]*3, {'a':{'b':[]}}, 0.5, '../..']
def mutate(o, rng):
    "Change one entry somewhere: replace, remove or add it"
    while True:
        keys = list(o) if isinstance(o, dict) else range(len(o))
        if not keys: return
        k = rng.choice(list(keys))
        if isinstance(o[k], (dict,list)) and o[k] and rng.random()<.8:
            o = o[k]
            continue
        kind = rng.random()
        if kind<.7: o[k] = copy.deepcopy(rng.choice(JUNK))
        elif isinstance(o, dict) and kind<.85: del o[k]
        elif isinstance(o, dict): o['folder'] = '/tmp/elsewhere'
        else: o.insert(k, rng.choice(JUNK))
        return

@pytest.mark.filterwarnings('ignore:the last bits')
def test_random_changes_give_one_line_or_known_attributes(interrupted, tmp_path):
    "150 changes: each is refused with a ValueError, or sets nothing but declared attributes"
    names = {cb.name:{*vars(cb)} for cb in resume(interrupted)[0].cbs}
    refused = 0
    for seed in range(150):
        rng = random.Random(seed)
        rewrite(interrupted, tmp_path, lambda meta,tensors: mutate(meta, rng))
        try: learn,checkpoint = resume(tmp_path)
        except ValueError as e:
            refused += 1
            assert len(str(e))<2000
            continue
        assert {cb.name:{*vars(cb)} for cb in learn.cbs}==names and checkpoint.folder==tmp_path
    assert refused>75

# Everything that is kept between batches

def resumed_and_whole(tmp_path, make, at=(2, 1), epochs=4, **kwargs):
    "A training that was interrupted and resumed, and one that was not"
    def run(name, *cbs, resume=False):
        learn = tiny_learner(CheckpointCallback(tmp_path/name, resume=resume), *make(), *cbs,
                             path=tmp_path/name, **kwargs)
        return train(precision(learn), epochs)
    with pytest.raises(KeyboardInterrupt): run('broken', StopAt(*at))
    return run('broken', resume=True), run('whole')

precision = lambda learn: learn

def gradients(learn): return [None if p.grad is None else p.grad.clone() for p in learn.model.parameters()]

KEPT = {
    'accumulation':            lambda: [GradientAccumulation(48)],
    'accumulation over epochs':lambda: [GradientAccumulation(200)],
    'with an average':         lambda: [GradientAccumulation(40), EMACallback(.9)],
}
@pytest.mark.parametrize('name', KEPT)
@pytest.mark.parametrize('half', [False, True], ids=['float32', 'float16'])
def test_accumulated_gradients_are_kept(name, half, tmp_path, monkeypatch):
    if half: monkeypatch.setitem(globals(), 'precision', lambda learn: learn.to_fp16(init_scale=2.**12))
    resumed,whole = resumed_and_whole(tmp_path, KEPT[name], config_kwargs=dict(dropout=.1))
    assert same_weights(resumed, whole)
    assert all(torch.equal(a, b) for a,b in zip(gradients(resumed), gradients(whole)))
    assert any(g.any() for g in gradients(whole))
    assert resumed.gradient_accumulation.count==whole.gradient_accumulation.count>0
    assert resumed.recorder.hps==whole.recorder.hps and resumed.train_iter==whole.train_iter

def test_a_checkpoint_without_gradients_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr('bijdiff.training.checkpoint.unpack_gradients', lambda *args: None)
    resumed,whole = resumed_and_whole(tmp_path, KEPT['accumulation'])
    assert not same_weights(resumed, whole)

def test_a_parameter_without_gradient_stays_without_one(tmp_path):
    "An optimiser with weight decay skips parameters whose gradient is None, and decays those where it is 0"
    def unused(learn):
        for name in ('unused', 'emptied'):
            layer = torch.nn.Linear(3, 3, bias=False)
            torch.nn.init.ones_(layer.weight)
            setattr(learn.model, name, layer)
        learn.model.emptied.weight.grad = torch.zeros(3, 3)
    make = lambda: [OnEvent('after_create', unused)]
    resumed,whole = resumed_and_whole(tmp_path, make, opt_func=SGD, wd=.1)
    assert same_weights(resumed, whole)
    assert (whole.model.unused.weight==1).all() and (whole.model.emptied.weight<1).all()

class Growing(Callback):
    "Multiply the loss by a number that grows from batch to batch"
    n = 0
    def after_loss(self):
        if self.training:
            self.n += 1
            self.learn.loss_grad = self.loss_grad*(1+self.n/10)

def test_a_callback_that_keeps_something_is_named(tmp_path):
    "At once, and when resuming; as soon as it is declared, the same file is resumed"
    with pytest.warns(UserWarning, match='Growing.n'), pytest.raises(KeyboardInterrupt):
        fit(CheckpointCallback(tmp_path), Growing(), StopAt(2, 1), epochs=3)
    with rejects('Growing.n'): fit(CheckpointCallback(tmp_path, resume=True), Growing(), epochs=3)

class Hidden(Callback):
    "Keep a generator within an object within an attribute"
    def __init__(self): self.inner = dict(sources=[random.Random(3)])
    def before_batch(self): self.inner['sources'][0].random()

def test_state_in_objects_is_seen_too(tmp_path):
    with pytest.warns(UserWarning, match='Hidden.inner'):
        fit(CheckpointCallback(tmp_path), Hidden(), epochs=1)

class Declared(Growing): saved_attrs = dict(n=check_count)
class Remade(Growing): saved_attrs = dict(n=None)

def test_a_declared_attribute_is_restored(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        resumed,whole = resumed_and_whole(tmp_path, lambda: [Declared()])
        assert same_weights(resumed, whole) and resumed.declared.n==16
        resumed,whole = resumed_and_whole(tmp_path/'remade', lambda: [Remade()])
    assert not same_weights(resumed, whole)

# Several fits

class StopInFit(StopAt):
    "Raise an error in one of several fits"
    def __init__(self, n, *at):
        super().__init__(*at)
        self.n = n
    def before_batch(self):
        if self.learn.corruption.n_fits==self.n: super().before_batch()

def three_fits(folder, *cbs, resume=False, first=2, wait=lambda i: None):
    "Train three times, with different schedules and rates"
    cbs = [CheckpointCallback(folder, resume=resume), EMACallback(.9), GradientAccumulation(40), *cbs]
    learn = tiny_learner(SaveModelCallback(fname='best'), *cbs, path=folder)
    for i in range(3):
        if i==1: train(learn, 3, 3e-3, flat=True)
        else: train(learn, first, 1e-2)
        wait(i)
    return learn

@pytest.mark.filterwarnings('ignore:fit .* was complete')
@pytest.mark.parametrize('fit_at,epoch', [(0, 1), (1, 0), (1, 2), (2, 0), (2, 1)])
def test_the_interrupted_one_of_several_fits_goes_on(fit_at, epoch, tmp_path):
    whole = three_fits(tmp_path/'whole')
    with pytest.raises(KeyboardInterrupt): three_fits(tmp_path/'broken', StopInFit(fit_at, epoch, 2))
    steps = []
    count = OnEvent('after_batch', lambda learn: steps.append(1))
    resumed = three_fits(tmp_path/'broken', count, resume=True)
    assert same_weights(resumed, whole)
    epochs = [2, 3, 2]
    kept = sum(epochs[:fit_at])+epoch
    assert len(steps)==4*(sum(epochs)-kept)

def test_a_kill_between_two_fits(tmp_path):
    def wait(i):
        if i==0: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): three_fits(tmp_path/'broken', wait=wait)
    assert same_weights(three_fits(tmp_path/'broken', resume=True), three_fits(tmp_path/'whole'))

class StopAfterSaving(StopInFit):
    "Interrupt a fit when SaveModelCallback has written its file, before there is a checkpoint"
    order = SaveModelCallback.order+1
    def before_batch(self): pass
    def after_epoch(self):
        if self.learn.corruption.n_fits==self.n: raise KeyboardInterrupt

@pytest.mark.parametrize('damage', [False, True])
def test_the_end_of_a_fit_needs_no_file_that_a_later_one_overwrites(damage, tmp_path):
    "The best model of the first fit is in its last checkpoint"
    whole = three_fits(tmp_path/'whole')
    with pytest.raises(KeyboardInterrupt): three_fits(tmp_path/'broken', StopAfterSaving(1))
    if damage: (tmp_path/'broken'/'models'/'best.pth').write_bytes(b'cut off')
    assert read_checkpoint(tmp_path/'broken')[1]['complete']
    assert same_weights(three_fits(tmp_path/'broken', resume=True), whole)

def test_a_fit_that_is_complete_is_not_ended_twice(tmp_path):
    "Averaged weights are not exchanged again"
    make = lambda **kwargs: fit(CheckpointCallback(tmp_path, **kwargs), EMACallback(.9), epochs=3)
    whole,again = make(),make(resume=True)
    assert same_weights(whole, again) and whole.oscillation.losses==again.oscillation.losses
    assert all(torch.equal(a, b) for a,b in zip(whole.ema.average, again.ema.average))
    assert again.bound.bits==whole.bound.bits and again.recorder.hps==whole.recorder.hps

@pytest.mark.filterwarnings('ignore:fit .* was complete')
def test_a_complete_fit_that_was_another_one_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt): three_fits(tmp_path, StopInFit(1, 2, 2))
    with rejects('epochs was 2 and is 4'): three_fits(tmp_path, resume=True, first=4)

def test_other_rates_are_refused_where_no_option_names_them(tmp_path):
    for flat in (True, False):
        with pytest.raises(KeyboardInterrupt): fit(CheckpointCallback(tmp_path), StopAt(), flat=flat)
        with rejects('cannot resume'): fit(CheckpointCallback(tmp_path, resume=True), lr=1e-3, flat=flat)

# Data and machine

def test_another_held_out_text_is_refused(tmp_path):
    text = pydoc_corpus()[:1200]
    dls = text_dls(text, seq_len=16, bs=16, device='cpu')
    with pytest.raises(KeyboardInterrupt): fit(CheckpointCallback(tmp_path), StopAt(), dls=dls)
    other = text_dls(text[:-9]+text[-18:-9], dls.tokenizer, seq_len=16, bs=16, device='cpu')
    assert torch.equal(dls.train.dataset.ids, other.train.dataset.ids)
    with rejects('held_out'): fit(CheckpointCallback(tmp_path, resume=True), dls=other)

@pytest.mark.parametrize('name,kwargs', [('seed', dict(seed=7)), ('batches', dict(dls=small_dls(bs=8)))])
def test_another_seed_or_batch_size_is_refused(name, kwargs, tmp_path):
    with pytest.raises(KeyboardInterrupt): fit(CheckpointCallback(tmp_path), StopAt())
    with rejects(name): fit(CheckpointCallback(tmp_path, resume=True), **kwargs)

def test_another_precision_is_refused(tmp_path):
    learn = tiny_learner(CheckpointCallback(tmp_path), StopAt()).to_bf16()
    with pytest.raises(KeyboardInterrupt): train(learn)
    with rejects('autocast'): fit(CheckpointCallback(tmp_path, resume=True))

def test_a_resumed_training_has_as_many_threads(tmp_path):
    "With as many as before inside of the fit, and with as many as now after it, also after an error"
    seen = []
    note = OnEvent('before_batch', lambda learn: seen.append(torch.get_num_threads()))
    with pytest.raises(KeyboardInterrupt): fit(CheckpointCallback(tmp_path), StopAt())
    torch.set_num_threads(3)
    try:
        with pytest.warns(UserWarning, match='1 threads'), pytest.raises(KeyboardInterrupt):
            fit(CheckpointCallback(tmp_path, resume=True), note, StopAt(1, 1))
        assert {*seen}=={1} and torch.get_num_threads()==3
        with pytest.warns(UserWarning, match='1 threads'):
            fit(CheckpointCallback(tmp_path, resume=True), note)
        assert {*seen}=={1} and torch.get_num_threads()==3
    finally: torch.set_num_threads(1)

def test_another_machine_is_said(tmp_path):
    with pytest.raises(KeyboardInterrupt): fit(CheckpointCallback(tmp_path), StopAt())
    rewrite(tmp_path, tmp_path, setter('environment', 'torch', '1.0'))
    with pytest.warns(UserWarning, match="torch was '1.0'"): fit(CheckpointCallback(tmp_path, resume=True))

def test_flags_that_change_bits_are_in_the_environment():
    before = environment('cpu')
    torch.use_deterministic_algorithms(True)
    try: assert environment('cpu')!=before
    finally: torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision('medium')
    try: assert environment('cpu')!=before
    finally: torch.set_float32_matmul_precision('highest')
    assert environment('cpu')==before

# Long trainings

def test_long_trainings_fit_into_a_checkpoint(tmp_path):
    """Lists of numbers are tensors; as text, those of a million steps would exceed what a header can hold

    A list of 100,000 numbers that is text makes the header longer than is allowed below."""
    n = 100_000
    def lengthen(learn):
        learn.oscillation.losses = [i/7 for i in range(n)]
        learn.recorder.lrs = [1/(i+1) for i in range(n)]
        learn.probe.steps = list(range(n))
    long = OnEvent('after_validate', lengthen, train=False)
    fit(CheckpointCallback(tmp_path), ProbeCallback(2), long, epochs=1)
    learn = fit(CheckpointCallback(tmp_path, resume=True), ProbeCallback(2), epochs=1)
    assert learn.oscillation.losses[-1]==(n-1)/7 and learn.probe.steps[-1]==n-1
    with safe_open(tmp_path/CHECKPOINT, 'pt') as f: assert len(str(f.metadata()))<1e5

# Folders and versions

def test_two_learners_do_not_share_a_folder(tmp_path):
    def other(learn):
        with rejects('in use by another training'): fit(CheckpointCallback(tmp_path), epochs=1)
    fit(CheckpointCallback(tmp_path), OnEvent('after_train', other), epochs=1)
    fit(CheckpointCallback(tmp_path), epochs=1)

def as_version_2(folder):
    "Write a checkpoint in the form of bijdiff 0.1: fewer records, without gradients"
    def change(meta, tensors):
        for name in [k for k in tensors if k.startswith(('list.', 'grad.'))]: del tensors[name]
        kept = {k:meta[k] for k in ('options', 'done', 'smooth', 'opt', 'network_and_text')}
        recorder = dict(lrs=[], iters=[], losses=[], values=[[1.]])
        return kept | dict(n_epoch=2, records={'recorder 1':recorder, 'corruption 1':dict(n_fits=0)})
    rewrite(folder, folder, change, version='2')

def test_a_checkpoint_of_version_2_with_accumulation_is_refused(tmp_path):
    "It lacks the gradients"
    for name in 'ab':
        with pytest.raises(KeyboardInterrupt): fit(CheckpointCallback(tmp_path/name), StopAt())
        as_version_2(tmp_path/name)
    assert read_checkpoint(tmp_path/'a')[1]['version']==2
    fit(CheckpointCallback(tmp_path/'a', resume=True))
    checkpoint = CheckpointCallback(tmp_path/'b', resume=True)
    with rejects('gradient_accumulation'): fit(checkpoint, GradientAccumulation(48))
