"""The model that comes with the package is small, whole, installed with it, and knows English."""
import random
import subprocess
import sys
from pathlib import Path
import pytest
import torch
from safetensors import safe_open
from bijdiff.all import load_denoiser, log_prob
from bijdiff.model.denoiser import BijectiveDenoiser

root = Path(__file__).resolve().parent.parent
folder = root/'bijdiff'/'models'/'books'
most_bytes = 3_000_000
sentence = ('The old man looked at the sea, and then he went back to the house, where his daughter had made '
            'a fire and was waiting for him with the supper.')

def bits_per_character(model, text):
    "Exact bits of a text written from left to right"
    x = torch.tensor([model.tokenizer.encode(text)])
    return -log_prob(model, x).item()/len(text)/torch.log(torch.tensor(2.)).item()

@pytest.fixture(scope='module')
def model(): return load_denoiser('bijdiff:books')

def test_it_takes_at_most_3_mb():
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sizes.keys()=={'config.json', 'model.safetensors', 'tokenizer.json'}
    assert sum(sizes.values())<=most_bytes

def test_it_is_kept_in_half_precision_and_computes_in_float32(model):
    with safe_open(folder/'model.safetensors', 'pt') as file:
        assert {file.get_tensor(k).dtype for k in file.keys()}=={torch.float16}
    assert {p.dtype for p in model.parameters()}=={torch.float32}

def test_it_is_loaded_without_a_word(recwarn):
    load_denoiser('bijdiff:books')
    assert not recwarn.list

def test_it_knows_english(model):
    "The bits of a sentence are those of the model that was measured; in another order its words need more"
    words = sentence.split()
    random.Random(0).shuffle(words)
    in_order,shuffled = (bits_per_character(model, text) for text in (sentence, ' '.join(words)))
    assert in_order==pytest.approx(1.3047, abs=.002) and shuffled>in_order+1

def test_another_name_is_an_error_that_lists_the_models():
    for load in (load_denoiser, BijectiveDenoiser.from_pretrained):
        with pytest.raises(ValueError, match="'bijdiff:poems'.*bijdiff:books"): load('bijdiff:poems')

def test_the_package_is_built_with_it(tmp_path):
    command = [sys.executable, 'setup.py', '--quiet', 'build_py', '--build-lib', str(tmp_path)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    built = tmp_path/'bijdiff'/'models'/'books'
    contents = lambda place: {path.name: path.read_bytes() for path in place.iterdir()}
    assert contents(built)==contents(folder)
