"""Files of earlier versions, by tools/make_fixtures.py, are read: model and checkpoint."""
import importlib.util
import json
import shutil
from pathlib import Path
import pytest
import torch
from fastai.callback.all import GradientAccumulation
from safetensors import safe_open
from safetensors.torch import save_file
from bijdiff.likelihood.codec import decompress, fingerprint
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.model.saving import tensors_hash
from bijdiff.testing import quiet_fit
from bijdiff.training.callbacks import EMACallback
from bijdiff.training.checkpoint import CHECKPOINT, CheckpointCallback, read_checkpoint

root = Path(__file__).parent.parent
fixtures = root/'tests'/'fixtures'/'0.1'
held = json.loads((fixtures/'held.json').read_text())

def make_fixtures():
    "The script that has written the files, as a module"
    spec = importlib.util.spec_from_file_location('make_fixtures', root/'tools'/'make_fixtures.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def test_a_model_of_version_0_1_is_read():
    model = BijectiveDenoiser.from_pretrained(fixtures/'model')
    assert tensors_hash(model.state_dict())==held['weights']
    assert fingerprint(model)==held['fingerprint']
    with torch.no_grad(): logits = model(torch.tensor([[27, 1, 2, 27, 3]]))[0,0,:4]
    assert torch.allclose(logits, torch.tensor(held['logits']), atol=1e-3)
    assert model.tokenizer.decode([20, 8, 5])=='the'

def test_a_compressed_text_of_version_0_1_comes_back():
    "Of format 2; all its probabilities are equal, so that it does so on every machine"
    model = BijectiveDenoiser.from_pretrained(fixtures/'uniform')
    assert decompress(model, (fixtures/'text.bij').read_bytes())==b'a file that comes back'

def test_a_compressed_text_of_format_3_comes_back():
    "On every machine: this fails where a bit of portable arithmetic has changed"
    made = root/'tests'/'fixtures'/'codec_3'
    model = BijectiveDenoiser.from_pretrained(made/'model')
    text = decompress(model, (made/'text.bij').read_bytes())
    assert text==b'a file that comes back on every machine by the bits of its network'

def test_a_checkpoint_of_version_0_1_is_resumed(tmp_path):
    tensors,meta = read_checkpoint(fixtures)
    assert meta['done']==2 and meta['fits'][-1]['epochs']==3
    shutil.copy(fixtures/CHECKPOINT, tmp_path)
    learn = make_fixtures().learner(CheckpointCallback(tmp_path, resume=True))
    quiet_fit(learn, 3)
    assert len(learn.recorder.values)==3
    state = learn.model.state_dict()
    before = {k.removeprefix('model.'):v for k,v in tensors.items() if k.startswith('model.')}
    assert before.keys()==state.keys() and any(not torch.equal(v, state[k]) for k,v in before.items())

def test_a_checkpoint_of_format_3_is_resumed(tmp_path):
    "With accumulated gradients and averages"
    made = root/'tests'/'fixtures'/'checkpoint_3'
    tensors,meta = read_checkpoint(made)
    assert meta['version']==3 and meta['done']==2 and any(k.startswith('grad.') for k in tensors)
    shutil.copy(made/CHECKPOINT, tmp_path)
    more = GradientAccumulation(40),EMACallback(.9)
    learn = make_fixtures().learner(CheckpointCallback(tmp_path, resume=True), *more)
    quiet_fit(learn, 3)
    assert len(learn.recorder.values)==3

def rewritten(path, **changes):
    "Write a safetensors file again with other entries in its header"
    with safe_open(path, 'pt') as f:
        tensors,meta = {k:f.get_tensor(k) for k in f.keys()},f.metadata()
    save_file(tensors, path, {k:v for k,v in (meta|changes).items() if v is not None})

@pytest.mark.parametrize('version', ['1', '4', '6', 'x', None])
def test_a_model_of_another_version_is_rejected_by_its_version(version, tmp_path):
    shutil.copytree(fixtures/'model', tmp_path/'model')
    rewritten(tmp_path/'model'/'model.safetensors', version=version)
    with pytest.raises(ValueError, match='format version'):
        BijectiveDenoiser.from_pretrained(tmp_path/'model')

@pytest.mark.parametrize('version', ['1', '5', None])
def test_a_checkpoint_of_another_version_is_rejected_by_its_version(version, tmp_path):
    shutil.copy(fixtures/CHECKPOINT, tmp_path)
    rewritten(tmp_path/CHECKPOINT, version=version)
    with pytest.raises(ValueError, match='format version'): read_checkpoint(tmp_path)

@pytest.mark.parametrize('version', [1, 4])
def test_a_compressed_text_of_another_version_is_rejected_by_its_version(version):
    blob = bytearray((fixtures/'text.bij').read_bytes())
    blob[8] = version
    model = BijectiveDenoiser.from_pretrained(fixtures/'uniform')
    with pytest.raises(ValueError, match=f'format version {version}'): decompress(model, bytes(blob))
