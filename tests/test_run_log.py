"""The log of a training run, as lines of JSON and in TensorBoard, against the learner and its instruments."""
import json, math, sys, types
from pathlib import Path
import pytest, torch
from fastai.callback.all import GradientAccumulation
from bijdiff.data.corpora import pydoc_corpus
from bijdiff.data.loaders import text_dls
from bijdiff.training.callbacks import EMACallback
from bijdiff.training.instruments import BlockNormCallback, ProbeCallback, RunLogCallback, TensorBoardCallback
from training_helpers import fit, N_STEPS, rejects, short_lr_find, tiny_learner, train, wrap_method

torch.set_num_threads(1)
METRICS = 'train_loss','valid_loss','bound','se','log_det','inverse_error','tokens_per_s'

def reject_constant(name): raise ValueError(f'{name} is not JSON')
def read_rows(path):
    "Lines of a log, without NaN and Infinity, which JSON does not have"
    return [json.loads(line, parse_constant=reject_constant) for line in Path(path).read_text().splitlines()]

# Lines of JSON

def norm_columns(learn, step):
    "Columns such as `gradient of layer 1`, with None for NaN"
    columns = {}
    for row in learn.block_norm.rows:
        if row['step']!=step: continue
        for what in ('gradient', 'update'):
            for block,v in row[what].items(): columns[f'{what} of {block}'] = None if math.isnan(v) else v
    return columns

def expected_step(learn, step):
    "The line of one step"
    row = dict(step=step, loss=learn.oscillation.losses[step-1], lr=learn.recorder.lrs[step-1])
    if hasattr(learn, 'objective'): row |= learn.objective.parts[step-1]
    probes = dict(zip(learn.probe.steps, learn.probe.losses))
    if step in probes: row['probe'] = probes[step]
    return row | norm_columns(learn, step)

def check_epoch(row, learn, values):
    "Compare the line of an epoch with the row of the recorder"
    assert list(row)==['epoch', *learn.recorder.metric_names[1:-1]]==['epoch', *METRICS]
    assert list(row.values())[1:]==pytest.approx([float(v) for v in values], rel=1e-6)

def check_rows(rows, learn, every):
    "Compare the lines of one fit with the instruments"
    steps,epochs = ([row for row in rows if kind in row] for kind in ('step', 'epoch'))
    n_steps = len(learn.oscillation.losses)
    assert [row['step'] for row in steps]==list(range(every, n_steps+1, every))
    assert [row['epoch'] for row in epochs]==list(range(n_steps//N_STEPS))
    for row in steps: assert row==expected_step(learn, row['step'])
    for row,values in zip(epochs, learn.recorder.values): check_epoch(row, learn, values)
    assert rows.index(epochs[0])==N_STEPS//every

def three_terms(): return dict(lambda_likelihood=.1, lambda_invert=.1)
def averaged_and_accumulated(): return dict(cbs=[EMACallback(.9), GradientAccumulation(48)])

def check_log(kwargs, folder):
    "Check the log of two fits, with a validation between them that adds nothing"
    path = folder/'deep'/'in'/'log.jsonl'
    watchers = [RunLogCallback(path, 3), *kwargs.pop('cbs', ()), ProbeCallback(2), BlockNormCallback(3)]
    learn = fit(*watchers, **kwargs)
    first,text = read_rows(path),path.read_text()
    check_rows(first, learn, 3)
    assert {'gradient of layer 1', 'update of norm'}<=set(first[0])
    assert 'probe' in first[2]
    with learn.no_bar(): learn.validate()
    assert path.read_text()==text
    train(learn, 1)
    assert path.read_text().startswith(text)
    second = read_rows(path)[len(first):]
    assert len(second)==2
    check_rows(second, learn, 3)

@pytest.mark.parametrize('case', [three_terms, averaged_and_accumulated])
def test_log(case, tmp_path): check_log(case(), tmp_path)

def with_wrong_rate(self, row): return {**row(), 'lr':self.opt.hypers[-1]['lr']*1.001}
def test_wrong_lines_are_seen(monkeypatch, tmp_path):
    wrap_method(monkeypatch, RunLogCallback, '_at_step', with_wrong_rate)
    with pytest.raises(AssertionError): check_log(three_terms(), tmp_path)

def open_empty(self):
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self.path.write_text('')
def test_a_log_that_is_begun_anew_is_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(RunLogCallback, 'open', open_empty)
    with pytest.raises(AssertionError): check_log(averaged_and_accumulated(), tmp_path)

def test_lr_find_is_not_logged(tmp_path):
    path = tmp_path/'log.jsonl'
    learn = tiny_learner(RunLogCallback(path, 1), ProbeCallback(1), path=tmp_path)
    short_lr_find(learn)
    assert not path.exists() and not hasattr(learn.probe, 'steps')
    train(learn, 1)
    assert len(read_rows(path))==N_STEPS+1

WITHOUT_A_METRIC = {
    'one draw':        dict(n_valid_draws=1),
    'standard layers': dict(config_kwargs=dict(n_bijective_layers=1)),
}
@pytest.mark.parametrize('name', WITHOUT_A_METRIC)
def test_lines_are_json_where_a_metric_is_missing(name, tmp_path):
    fit(RunLogCallback(tmp_path/'log.jsonl', 3), epochs=1, **WITHOUT_A_METRIC[name])
    assert len(read_rows(tmp_path/'log.jsonl'))==2

# TensorBoard

class FakeWriter:
    "A SummaryWriter that keeps its scalars"
    def __init__(self, folder): self.folder,self.scalars,self.closed = folder,[],False
    def add_scalar(self, name, value, step): self.scalars.append((name, value, step))
    def close(self): self.closed = True

@pytest.fixture
def writers(monkeypatch):
    "All writers that are opened during a test"
    opened = []
    def SummaryWriter(folder):
        opened.append(FakeWriter(folder))
        return opened[-1]
    module = types.ModuleType('torch.utils.tensorboard')
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', module)
    return opened

def scalars(row):
    "Name, value and step of each number of a line; an epoch belongs to its last step"
    step = row['step'] if 'step' in row else N_STEPS*(row['epoch']+1)
    return [(k, v, step) for k,v in row.items() if k not in ('step', 'epoch')]

def test_tensorboard_gets_the_numbers_of_the_log(writers, tmp_path):
    logs = RunLogCallback(tmp_path/'log.jsonl', 2),TensorBoardCallback(tmp_path/'board', 2)
    learn = fit(*logs, ProbeCallback(2), BlockNormCallback(4), lambda_likelihood=.1)
    writer, = writers
    assert writer.folder==str(tmp_path/'board') and writer.closed
    assert writer.scalars==[s for row in read_rows(tmp_path/'log.jsonl') for s in scalars(row)]
    names = {name for name,*_ in writer.scalars}
    assert {'loss', 'lr', 'likelihood', 'probe', 'gradient of layer 1', 'update of embed', 'bound'}<=names
    with learn.no_bar(): learn.validate()
    assert len(writers)==1

@pytest.mark.parametrize('bs,epochs', [(28, 2), (64, 1)])
def test_epochs_in_tensorboard_are_at_their_last_step(bs, epochs, writers, tmp_path):
    dls = text_dls(pydoc_corpus()[:800], seq_len=16, bs=bs, device='cpu')
    learn = fit(TensorBoardCallback(tmp_path, 1), epochs=epochs, dls=dls)
    n = len(learn.oscillation.losses)//epochs
    steps = [step for name,_,step in writers[0].scalars if name=='bound']
    assert steps==[n*(e+1) for e in range(epochs)]

def test_without_tensorboard_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    with rejects('pip install tensorboard', ImportError): fit(TensorBoardCallback(tmp_path), epochs=1)
