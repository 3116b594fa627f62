"""Files of somebody who knows the format: sizes, names, noise, tokenizers and headers that are wrong, with
the right hashes; paths that lead to no file. benchmarks/hostile_files.py counts more of each kind."""
import json
import os
import subprocess
import sys
from pathlib import Path
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch import nn
from torch.nn.utils import prune
from bijdiff.data.tokens import ByteTokenizer, CharTokenizer, exact_ids
from bijdiff.data.subwords import BPETokenizer
from bijdiff.documents import read_documents
from bijdiff.likelihood.codec import compress, decompress, fingerprint
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.model.headers import read_header
import forks
from helpers import seeded_weights
sys.path.insert(0, str(Path(__file__).parent.parent/'benchmarks'))
import hostile_files

def test_a_hostile_file_is_answered_in_one_line_at_once(tmp_path):
    "Three files of each kind, by a command, as it forks and may have no threads; a busy machine is slower"
    out = tmp_path/'out.json'
    done = subprocess.run([sys.executable, hostile_files.__file__, '--n', '3', '--seed', '1', '--out', out],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode==0, done.stderr
    found = json.loads(out.read_text())
    assert found['kinds'].keys()==hostile_files.KINDS.keys()
    for r in found['wrong']:
        assert r['end'] in ('read', 'rejected') and r['mib']<hostile_files.MOST_MIB, r
        assert r['seconds']<5*hostile_files.MOST_SECONDS, r

@pytest.fixture
def parts(tmp_path):
    "Parts of a small model with byte pairs"
    return hostile_files.read_parts(hostile_files.right_model(tmp_path/'right', 'plain', 'bpe'))

def run(name, *args):
    "Exit status and lines on stderr of a command"
    status,_,err = forks.run([Path(sys.executable).parent/name, *args], timeout=120)
    return status, err.splitlines()

def test_a_command_ends_with_one_line_and_status_2_for_a_hostile_model(tmp_path, parts):
    parts.config['noise'] = dict(schedule=dict(name='polynomial', powre=2))
    hostile_files.write_parts(tmp_path, parts)
    status,lines = run('bijdiff_sample', tmp_path)
    assert status==2 and len(lines)==1
    assert 'powre' in lines[0] and 'model.safetensors' in lines[0]

def test_a_command_does_not_wait_for_a_pipe(tmp_path):
    "Neither in place of the weights, nor of a text"
    right = hostile_files.right_model(tmp_path/'right', 'plain', 'char')
    os.mkfifo(tmp_path/'model.safetensors')
    for folder,text in ((tmp_path, __file__), (right, tmp_path/'model.safetensors')):
        status,lines = run('bijdiff_score', folder, text)
        assert status==2 and len(lines)==1 and 'is a pipe' in lines[0]

@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_number_of_tensors_is_known_before_a_network_is_built(data):
    "For networks of all kinds; they are built without memory"
    draw = lambda *values: data.draw(st.sampled_from(values))
    n_layers = draw(1, 2, 3)
    fields = dict(n_layers=n_layers, coupling_depth=draw(1, 2, 3), local_window=draw(0, 3),
                  time_conditioning=draw(False, True), enable_multiscale=draw(False, True),
                  latent_density=draw(False, True), n_experts=draw(None, 2, 3), couple=draw('final', 'every'),
                  k_active=draw(None, 1), n_bijective_layers=draw(None, 0, n_layers),
                  gap_head=draw(False, True))
    if fields['gap_head']: fields['noise'] = dict(mask=.5, delete=.5)
    if fields['n_experts']: fields |= dict(coupling_depth=2)
    try: config = DenoiserConfig(7, d_model=8, n_heads=2, **fields)
    except ValueError: assume(False)
    with torch.device('meta'): model = BijectiveDenoiser(config)
    assert len(model.state_dict())==config.n_tensors()

@pytest.mark.parametrize('network', hostile_files.NETWORKS)
def test_loading_leaves_all_random_numbers_and_gives_the_same_network(tmp_path, network):
    "The weights are in memory of their own: what happens to the file afterwards does not matter"
    config = DenoiserConfig(7, d_model=8, n_heads=2, **{'n_layers':1, **hostile_files.NETWORKS[network]})
    model = seeded_weights(BijectiveDenoiser(config)).eval()
    path = model.save_pretrained(tmp_path)/'model.safetensors'
    state = torch.get_rng_state()
    again = BijectiveDenoiser.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    path.write_bytes(bytes(path.stat().st_size))
    ids,t = torch.randint(0, 8, (2, 9)),torch.rand(2)
    for a,b in zip(again.hidden(ids, t), model.hidden(ids, t)): assert torch.equal(a, b)
    assert all(p.requires_grad for p in again.parameters())

def test_a_network_is_not_built_for_a_file_with_too_few_tensors(tmp_path, parts, monkeypatch):
    "A number of layers that the limits allow, and the file does not have"
    hostile_files.write_parts(tmp_path, parts._replace(config=parts.config | dict(n_layers=50)))
    monkeypatch.setattr(BijectiveDenoiser, '__init__', lambda *args: pytest.fail('it is built'))
    with pytest.raises(ValueError, match='the number of tensors'): BijectiveDenoiser.from_pretrained(tmp_path)

def test_no_tensor_is_read_before_everything_else_is_checked(tmp_path, parts, monkeypatch):
    parts.tensors['norm.weight'] = torch.zeros(9)
    hostile_files.write_parts(tmp_path, parts)
    monkeypatch.setattr('bijdiff.model.saving.read_tensors', lambda path: pytest.fail('they are read'))
    with pytest.raises(ValueError, match='norm.weight'): BijectiveDenoiser.from_pretrained(tmp_path)

# Tokenizers and scores

falsifiers = hostile_files.FALSIFIERS | hostile_files.MODEL_FALSIFIERS

@pytest.mark.parametrize('change', falsifiers.items(), ids=falsifiers.keys())
def test_a_field_that_changes_how_a_text_is_cut_into_tokens_is_named(change):
    name,value = change
    described = json.loads(BPETokenizer.train('the cat').json)
    (described['model'] if name in hostile_files.MODEL_FALSIFIERS else described)[name] = value
    with pytest.raises(ValueError, match=name): BPETokenizer(json.dumps(described))

def test_pairs_that_are_strings_are_those_of_older_versions_of_the_library():
    tokenizer = BPETokenizer.train('the cat sat on the mat '*9, 270)
    described = json.loads(tokenizer.json)
    described['model']['merges'] = [' '.join(pair) for pair in described['model']['merges']]
    text = 'the mat\r\nand more'
    assert BPETokenizer(json.dumps(described)).encode(text)==tokenizer.encode(text)

class Shortener(CharTokenizer):
    "A tokenizer that leaves out the end of a text"
    def encode(self, text, replace=False): return super().encode(text[:5], replace)

@pytest.fixture
def model():
    "A small network for three characters"
    config = DenoiserConfig(3, seq_len=16, d_model=8, n_heads=2, n_layers=1)
    return seeded_weights(BijectiveDenoiser(config)).eval()

def test_a_text_that_its_ids_do_not_give_back_is_called_changed_and_is_not_compressed(model, tmp_path):
    model.tokenizer = Shortener('abc')
    (tmp_path/'text').write_text('abcabcabc')
    doc, = read_documents(model, tmp_path/'text')
    assert (doc.text, doc.is_changed)==('abcab', True)
    with pytest.raises(ValueError, match="from position 5 on, is ''; expected 'cabc'"):
        compress(model, b'abcabcabc')

@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1, max_size=40) | st.sampled_from(['a\r\nb\rc\n', '\ufffd', 'e\u0301\ufeff░']))
def test_ids_stand_for_the_whole_text_with_every_tokenizer_of_ours(text):
    for tokenizer in (CharTokenizer.train(text), ByteTokenizer(), BPETokenizer.train(text, 300)):
        ids = exact_ids(tokenizer, text)
        assert tokenizer.decode(ids)==text

@given(data=st.binary(max_size=40))
def test_bytes_that_are_not_utf_8_are_scored_as_they_are(data):
    assert bytes(exact_ids(ByteTokenizer(), data.decode('utf-8', 'surrogateescape')))==data

# Parts that are compiled or wrapped

def wrapped(model, kind):
    "Compile or wrap parts of a network, which are not called"
    if kind=='compiled': model.backbone = torch.compile(model.backbone)
    if kind=='both': model.backbone.blocks[0] = nn.DataParallel(torch.compile(model.backbone.blocks[0]))
    if kind=='parallel': model.norm = nn.DataParallel(model.norm)
    return model

@pytest.mark.parametrize('kind', ['compiled', 'both', 'parallel'])
def test_a_network_with_compiled_or_wrapped_parts_is_saved_under_plain_names(model, kind, tmp_path):
    "And its files are those of the plain network: they have its fingerprint"
    model.tokenizer = CharTokenizer('abc')
    blob,mark = compress(model, b'abba'),fingerprint(model)
    config,weights = model.config,{k:v.clone() for k,v in model.state_dict().items()}
    wrapped(model, kind)
    assert fingerprint(model)==mark and model.state_dict().keys()!=weights.keys()
    again = BijectiveDenoiser.from_pretrained(model.save_pretrained(tmp_path))
    assert again.config==config and again.state_dict().keys()==weights.keys()
    assert all(torch.equal(v, weights[k]) for k,v in again.state_dict().items())
    assert decompress(again, blob)==b'abba'

@pytest.mark.parametrize('change, name', [
    (lambda m: nn.utils.parametrizations.orthogonal(m.output_head), 'output_head.parametrizations'),
    (lambda m: prune.random_unstructured(m.output_head, 'weight', .5), 'output_head.weight_mask'),
    (lambda m: setattr(m, 'norm', nn.LayerNorm(3)), 'norm.bias'),
    (lambda m: m.register_buffer('extra', torch.zeros(2)), 'extra'),
    (lambda m: setattr(m.output_head, 'bias', nn.Parameter(torch.arange(3), False)), 'output_head.bias')])
def test_a_network_that_could_not_be_loaded_is_not_saved(model, change, name, tmp_path):
    "The error names the first tensor that differs from those of its configuration, and an older file stays"
    model.save_pretrained(tmp_path)
    before = read_header(tmp_path/'model.safetensors')
    change(model)
    with pytest.raises(ValueError, match=name): model.save_pretrained(tmp_path)
    assert read_header(tmp_path/'model.safetensors')==before
