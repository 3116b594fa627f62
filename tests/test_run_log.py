"""The log of a training run, as JSON lines, in TensorBoard and in Weights & Biases, against the learner."""
import json, math, sys, types
from pathlib import Path
import pytest, torch
from bijdiff.data.corpora import pydoc_corpus
from bijdiff.data.loaders import text_dls
from bijdiff.training.checkpoint import CheckpointCallback
from bijdiff.training.instruments import BlockNormCallback, LogCallback, ProbeCallback, RunLogCallback
from bijdiff.training.instruments import TensorBoardCallback
from bijdiff.training.logs import run_log, WandbCallback
from training_helpers import fit, N_STEPS, rejects, short_lr_find, StopAt, tiny_learner, train, wrap_method

torch.set_num_threads(1)
METRICS = 'train_loss','valid_loss','bound','se','log_det','inverse_error','tokens_per_s'
BOUNDS = 'bits_per_byte','perplexity','word_perplexity'

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
    n_batches = len(learn.recorder.lrs)//len(learn.oscillation.losses)
    lr = learn.recorder.lrs[n_batches*step-1]
    row = dict(step=step, loss=learn.oscillation.losses[step-1], lr=lr)
    if hasattr(learn, 'objective'): row |= learn.objective.parts[step-1]
    probes = dict(zip(learn.probe.steps, learn.probe.losses))
    if step in probes: row['probe'] = probes[step]
    return row | norm_columns(learn, step)

def check_epoch(row, learn, values):
    "Compare the line of an epoch with the row of the recorder"
    assert ('epoch', *learn.recorder.metric_names[1:-1])==('epoch', *METRICS)
    assert list(row)==['epoch', 'step', *METRICS, *BOUNDS]
    assert [row[k] for k in METRICS]==pytest.approx([float(v) for v in values], rel=1e-6)
    assert row['perplexity']==pytest.approx(2**row['bound'])        # a character is a token

def parts(rows):
    "Lines of steps, and lines of evaluations"
    return [row for row in rows if 'epoch' not in row],[row for row in rows if 'epoch' in row]

def check_rows(rows, learn, every):
    "Compare the lines of one fit with the instruments"
    steps,epochs = parts(rows)
    n_steps,n_epochs = len(learn.oscillation.losses),len(learn.recorder.values)
    assert [row['step'] for row in steps]==list(range(every, n_steps+1, every))
    assert [row['epoch'] for row in epochs]==list(range(n_epochs))
    assert [row['step'] for row in epochs]==[n_steps*(e+1)//n_epochs for e in range(n_epochs)]
    for row in steps: assert row==expected_step(learn, row['step'])
    for row,values in zip(epochs, learn.recorder.values): check_epoch(row, learn, values)
    assert rows.index(epochs[0])==epochs[0]['step']//every

def three_terms(): return dict(lambda_likelihood=.1, lambda_invert=.1)
def averaged_and_accumulated(): return dict(ema=.9, accumulate=2, lambda_likelihood=.1)

def check_log(kwargs, folder):
    "Check the log of two fits, with a validation between them that adds nothing"
    path = folder/'deep'/'in'/'log.jsonl'
    learn = fit(RunLogCallback(path, 2), ProbeCallback(4), BlockNormCallback(2), **kwargs)
    first,text = read_rows(path),path.read_text()
    check_rows(first, learn, 2)
    assert {'gradient of layer 1', 'update of norm'}<=set(first[0])
    assert 'probe' in [row for row in first if row['step']==4][0]
    with learn.no_bar(): learn.validate()
    assert path.read_text()==text
    train(learn, 1)
    assert path.read_text().startswith(text)
    second = read_rows(path)[len(first):]
    assert len(second)>=2
    check_rows(second, learn, 2)

@pytest.mark.parametrize('case', [three_terms, averaged_and_accumulated])
def test_log(case, tmp_path): check_log(case(), tmp_path)

def with_wrong_rate(self, row, n): return {**row(n), 'lr':self.opt.hypers[-1]['lr']*1.001}
def test_wrong_lines_are_seen(monkeypatch, tmp_path):
    wrap_method(monkeypatch, LogCallback, '_at_step', with_wrong_rate)
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

# Interrupted and continued

def logged(folder, *plug, resume=False, make=RunLogCallback, **kwargs):
    "Three epochs with checkpoints and a log, in steps of two batches"
    cbs = make(folder/'log', 1),CheckpointCallback(folder, resume=resume),BlockNormCallback(2),*plug
    return fit(*cbs, epochs=3, accumulate=2, ema=.9, **kwargs)

def without_speed(rows): return [{k:v for k,v in row.items() if k!='tokens_per_s'} for row in rows]

def interrupt_and_resume(folder, plug, **kwargs):
    "Three epochs with an interruption"
    with pytest.raises(KeyboardInterrupt): logged(folder, plug, **kwargs)
    return logged(folder, resume=True, **kwargs)

class StopInValidation(StopAt):
    "Raise an error after the row of an evaluation is written, before the next epoch"
    def before_batch(self): pass
    def before_epoch(self):
        if self.epoch==self.at[0]: raise self.error

PLUGS = dict(step=StopAt(1, 3), begin=StopAt(2, 0), epoch=StopInValidation(2))
@pytest.mark.parametrize('plug', PLUGS.values(), ids=PLUGS)
def test_a_resumed_log_has_every_line_once(plug, tmp_path):
    whole,parted = tmp_path/'whole',tmp_path/'parted'
    logged(whole)
    interrupt_and_resume(parted, plug)
    assert without_speed(read_rows(parted/'log'))==without_speed(read_rows(whole/'log'))

def test_a_log_that_is_not_cut_back_is_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(RunLogCallback, 'size', property(RunLogCallback.size.fget, lambda self, n: None))
    with pytest.raises(AssertionError): test_a_resumed_log_has_every_line_once(StopAt(1, 3), tmp_path)

def test_a_log_that_was_deleted_begins_anew(tmp_path):
    with pytest.raises(KeyboardInterrupt): logged(tmp_path, StopAt(1, 3))
    (tmp_path/'log').unlink()
    logged(tmp_path, resume=True)
    assert [row['step'] for row in parts(read_rows(tmp_path/'log'))[0]]==[3, 4, 5, 6]

# TensorBoard

class FakeWriter:
    "A SummaryWriter that keeps its scalars"
    def __init__(self, folder, purge_step=None):
        self.folder,self.purge_step,self.scalars,self.closed = folder,purge_step,[],False
    def add_scalar(self, name, value, step): self.scalars.append((name, value, step))
    def close(self): self.closed = True

@pytest.fixture
def writers(monkeypatch):
    "All writers that are opened during a test"
    opened = []
    def SummaryWriter(*args, **kwargs):
        opened.append(FakeWriter(*args, **kwargs))
        return opened[-1]
    module = types.ModuleType('torch.utils.tensorboard')
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', module)
    return opened

def scalars(row):
    "Name, value and step of each number of a line"
    return [(k, v, row['step']) for k,v in row.items() if k not in ('step', 'epoch')]

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

def kept(writers):
    "Scalars that TensorBoard shows: later files take the place of earlier ones from a step on"
    shown = []
    for w in writers:
        if w.purge_step is not None: shown = [s for s in shown if s[2]<w.purge_step]
        shown += w.scalars
    return [s for s in shown if s[0]!='tokens_per_s']

def test_tensorboard_shows_every_step_once_after_an_interruption(writers, tmp_path):
    logged(tmp_path/'whole', make=TensorBoardCallback)
    whole = kept(writers)
    writers.clear()
    interrupt_and_resume(tmp_path/'parted', StopAt(1, 3), make=TensorBoardCallback)
    assert [w.purge_step for w in writers]==[None, 3] and kept(writers)==whole

def test_without_tensorboard_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    with rejects('pip install tensorboard', ImportError): fit(TensorBoardCallback(tmp_path), epochs=1)

# Weights & Biases

class FakeServer:
    "A stand-in of the package wandb: rows by run and number; numbers that a run has are ignored"
    def __init__(self): self.runs,self.opened,self.sent = {},[],0
    def init(self, id, **kwargs):
        self.opened.append(dict(kwargs, id=id))
        self.rows = self.runs.setdefault(id, {})
        return self
    def define_metric(self, name, step_metric): self.step_metric = step_metric
    def log(self, row, step):
        self.sent += 1
        self.rows.setdefault(step, row)
    def finish(self): self.opened[-1]['closed'] = True

@pytest.fixture
def server(monkeypatch):
    "A stand-in of the package wandb"
    server = FakeServer()
    monkeypatch.setitem(sys.modules, 'wandb', server)
    return server

def test_wandb_gets_the_rows_of_the_log(server, tmp_path):
    fit(RunLogCallback(tmp_path/'log', 2), WandbCallback(tmp_path/'wandb', 2), ProbeCallback(2))
    rows, = server.runs.values()
    assert [rows[i] for i in range(len(rows))]==read_rows(tmp_path/'log')
    assert server.opened[0]['closed'] and server.step_metric=='step'

def test_a_resumed_training_goes_on_with_its_run(server, tmp_path):
    logged(tmp_path/'whole', make=WandbCallback)
    whole, = server.runs.values()
    server.runs = {}
    server.sent = 0
    interrupt_and_resume(tmp_path/'parted', StopAt(1, 3), make=WandbCallback)
    rows, = server.runs.values()
    assert server.sent==len(whole)+1 and len(server.opened)==3
    assert without_speed(rows.values())==without_speed(whole.values())

def test_without_wandb_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with rejects('pip install wandb', ImportError): fit(WandbCallback(tmp_path), epochs=1)

def test_a_log_is_chosen_by_name(tmp_path):
    kinds = dict(jsonl=RunLogCallback, tensorboard=TensorBoardCallback, wandb=WandbCallback)
    logs = {kind:run_log(kind, tmp_path, 7) for kind in kinds}
    assert {kind:type(log) for kind,log in logs.items()}==kinds
    assert {(log.every, log.path.parent) for log in logs.values()}=={(7, tmp_path)}
    for argument,kwargs in dict(kind=dict(kind='csv', folder=tmp_path), folder=dict(kind='jsonl', folder=3),
                                every=dict(kind='jsonl', folder=tmp_path, every=0)).items():
        with rejects(argument): run_log(**kwargs)
