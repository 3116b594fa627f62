"""Scripts about learning: pairs of masks, the time of a step, the job for a GPU, the default job."""
import json
import sys
from pathlib import Path
import pytest
import torch
from fastai.callback.core import Callback
from bijdiff.data.corpora import pydoc_corpus
from bijdiff.diffusion.corruption import Corruption
from bijdiff.diffusion.schedules import get_schedule

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent/'benchmarks'))
import default_job
import optimizers
import shakespeare_gpu
import study

V = 7

class SeenCallback(Callback):
    "Call a function after each batch"
    def __init__(self, f): self.f = f
    def after_batch(self): self.f(self.learn)

def mask_pairs(schedule, n=64, L=400):
    "Return clean sequences, (n, L), and their noisy pairs with the times, 2n each"
    cb = study.MaskPairCallback(Corruption(V, schedule=get_schedule(schedule)))
    cb.generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, V, (n, L), generator=torch.Generator().manual_seed(1))
    t,noisy = cb._train_noise(torch.cat([x, x]), None)
    return x,t,noisy

def test_each_token_is_masked_once_in_a_pair():
    x,_,noisy = mask_pairs('half_cosine')
    first,second = noisy.xt.chunk(2)
    assert ((first==V) ^ (second==V)).all()
    for half in (first, second): assert (half==x)[half!=V].all()

@pytest.mark.parametrize('schedule', ['half_cosine', 'log_linear'])
def test_the_times_of_a_pair_are_those_of_its_masks(schedule):
    "The fraction of masks is 1-alpha(t) within the error of 400 tokens"
    _,t,noisy = mask_pairs(schedule)
    masked = (noisy.xt==V).double().mean(1)
    expected = 1-get_schedule(schedule).alpha(t)
    assert ((masked-expected).abs()<5*.5/400**.5).all()
    assert abs((masked-expected).mean())<.01

@pytest.mark.filterwarnings('ignore:.*not in the vocabulary')
def test_a_batch_of_a_training_has_each_sequence_twice(tmp_path):
    "Clean ids are the same in both halves, and those that are not masked stand in the noisy ones"
    text = tmp_path/'text.txt'
    text.write_text(pydoc_corpus()[:6000])
    grid = dict(steps=8, epochs=1, seq_len=16, bs=4, fields=dict(d_model=8, n_heads=2, n_layers=1))
    learn = study.make_learner(grid, dict(mask_pairs=True, learner={}, fit={}), text, 0)
    seen = []
    learn.add_cb(SeenCallback(lambda learn: seen.append((learn.xb[0], learn.yb[0]))))
    with learn.no_bar(): learn.fit(1, 1e-3)
    n_train = len(learn.dls.train)
    for xt,clean in seen[:n_train]:
        mask = learn.model.mask_id
        assert len(xt)==len(clean)==8
        assert torch.equal(clean[:4], clean[4:])
        assert torch.equal(torch.where(xt==mask, clean, xt), clean)
        assert ((xt[:4]==mask) ^ (xt[4:]==mask)).all()
    assert n_train>4

@pytest.mark.filterwarnings('ignore:.*not in the vocabulary')
def test_the_job_for_a_gpu_writes_its_record(tmp_path):
    text = tmp_path/'text.txt'
    text.write_text(pydoc_corpus()[:6000])
    sizes = dict(d_model=16, n_heads=2, n_layers=1, seq_len=32, bs=8)
    options = dict(epochs=3, lr=1e-2, draws=2, ema=.9, out=tmp_path/'r.json')
    shakespeare_gpu.shakespeare_gpu(str(text), **options, **sizes)
    result = json.loads((tmp_path/'r.json').read_text())
    assert len(result['valid_bits_by_epoch'])==result['epochs_done']==3
    assert result['bits_per_char']<6 and result['ema']==.9

@pytest.mark.filterwarnings('ignore:.*not in the vocabulary')
def test_the_time_limit_ends_a_training_after_an_epoch(tmp_path):
    text = tmp_path/'text.txt'
    text.write_text(pydoc_corpus()[:6000])
    sizes = dict(d_model=16, n_heads=2, n_layers=1, seq_len=32, bs=8)
    shakespeare_gpu.shakespeare_gpu(str(text), epochs=3, minutes=0., draws=2, out=tmp_path/'r.json', **sizes)
    assert json.loads((tmp_path/'r.json').read_text())['epochs_done']==1

def test_the_time_of_a_step_is_measured_for_both_optimisers(tmp_path, monkeypatch):
    small = dict(network=dict(d_model=16, n_heads=2, n_layers=1), seq_len=32, bs=4)
    monkeypatch.setattr(optimizers, 'SIZES', dict(small=small))
    optimizers.optimizers(turns=3, warmup=1, sizes='small', out=tmp_path/'r.json')
    row, = json.loads((tmp_path/'r.json').read_text())['rows']
    assert len(row['step'])==3 and 0<row['optimizer']['adam']<1 and 0<row['optimizer']['muon']<1

def test_the_bound_of_a_job_is_read_from_its_report():
    line = 'bound on the held-out text: 1.925 ± 0.008 bits per '
    report = f'x\n{line}character\n{line}byte'
    assert default_job.bound_of(report)==(1.925, .008)
