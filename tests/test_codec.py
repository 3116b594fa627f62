"""Files come back byte for byte, have as many bits as their exact likelihood says, and whatever is wrong with one is refused."""
import json, math, random, struct
from functools import lru_cache
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st
from bijdiff.likelihood import codec
from bijdiff.model import saving
from bijdiff.sampling import rules
from bijdiff.diffusion.schedules import Cosine
from bijdiff.diffusion.corruption import Corruption
from bijdiff.data.tokens import BPETokenizer, ByteTokenizer, CharTokenizer
from bijdiff.likelihood.codec import CODEC_VERSION, compress, compress_file, decompress, decompress_file
from bijdiff.likelihood.codec import fingerprint, MAGIC
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.sampling.rules import UnmaskingRule
from bijdiff.sampling.generate import sample
from bijdiff.likelihood.bounds import chunk_batches
from bijdiff.likelihood.exact import log_prob

def tiny(tokenizer=None, seed=0, std=.3, sure=1., **kw):
    "A small denoiser with random weights, whose logits are multiplied"
    torch.manual_seed(seed)
    tokenizer = tokenizer or ByteTokenizer()
    m = BijectiveDenoiser(DenoiserConfig(tokenizer.vocab_size, **{**dict(seq_len=16, d_model=8, n_heads=2, n_layers=2), **kw}))
    for p in m.parameters(): torch.nn.init.normal_(p, std=std)
    for p in m.output_head.parameters(): p.data *= sure
    m.tokenizer = tokenizer
    return m.eval()
MODEL,SURE = tiny(),tiny(std=.6, sure=3.)
ORDER = tuple(torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist())
EVERY_RULE = [UnmaskingRule(o, 4, seed=3, block_length=5) for o in (*UnmaskingRule.names, ORDER)]
each_rule = pytest.mark.parametrize('rule', EVERY_RULE, ids=lambda o: str(o.rule)[:13])
def noise(n, seed=0): return random.Random(seed).randbytes(n)

# Round trips
TEXTS = {'empty':b'', 'one byte':b'\x00', 'random':noise(100), 'no UTF-8':b'\xff\xfe\x80abc\xc3(\xed\xa0\x80', 'one block':noise(16, 1), 'one byte more':noise(17, 2), 'a batch':noise(32, 3), 'batches and a rest':noise(16*5+3, 4), 'zeros':bytes(50), 'every byte':bytes(range(256))}
@pytest.mark.parametrize('name', TEXTS)
def test_round_trips(name):
    for rule in EVERY_RULE:
        if isinstance(rule.rule, tuple) and len(TEXTS[name])%16: continue                          # the positions of full blocks
        assert decompress(MODEL, compress(MODEL, TEXTS[name], rule, bs=2))==TEXTS[name]

def test_an_order_of_other_blocks_is_an_error():
    with pytest.raises(ValueError, match='the rule orders 16 positions, but the text has 1 tokens'): compress(MODEL, bytes(17), ORDER, 4)

@pytest.mark.parametrize('kw', [{}, dict(steps=1), dict(steps=100), dict(rule='random', seed=5), dict(steps=3, temperature=.5), dict(steps=3, temperature=3., rule='entropy'), dict(steps=5, schedule=Cosine(.1)), dict(rule='block', block_length=3, steps=6), dict(bs=1, steps=2), dict(rule=UnmaskingRule('confidence'))], ids=str)
def test_settings_are_in_the_file(kw):
    for m in (MODEL, SURE): assert decompress(m, compress(m, noise(41), **kw))==noise(41)

def test_likely_text_with_top_p():
    "What the sampler writes can be coded by its rule, though only some of the bytes can be written"
    for rule in UnmaskingRule.names:
        rule = UnmaskingRule(rule, 4, top_p=.7, temperature=1.2)
        data = bytes(sample(SURE, 3, rule=rule).flatten().tolist())
        assert decompress(SURE, compress(SURE, data, rule))==data

def test_a_megabyte():
    m,data = tiny(seq_len=64, d_model=4, n_heads=1, n_layers=1),bytes(1_000_000)
    blob = compress(m, data, steps=1, bs=64)
    assert decompress(m, blob)==data

ALPHABET = 'abc äß日\n😀'
chars = lru_cache(None)(lambda: tiny(CharTokenizer(ALPHABET)))
def test_char_tokenizer():
    m = tiny(CharTokenizer.train(ALPHABET))
    for text in ('', 'a', 'äß日 😀\n'*7, 'abc �'): assert decompress(m, compress(m, text.encode(), steps=4)).decode()==text
def test_bpe_tokenizer():
    m = tiny(BPETokenizer.train('the cat sat on the mat and the dog ran to the cat '*20, 280))
    for text in ('', ' ', 'the cat', '  the\n\tdog  \r\n', 'Ein Käse, 日本 😀', 'the cat sat on the mat '*4): assert decompress(m, compress(m, text.encode(), steps=4)).decode()==text

@settings(max_examples=25, deadline=None)
@given(st.binary(max_size=40), st.sampled_from(UnmaskingRule.names), st.integers(1, 20), st.integers(1, 4))
def test_any_bytes_come_back(data, rule, steps, bs): assert decompress(MODEL, compress(MODEL, data, rule, steps, bs=bs))==data

@settings(max_examples=15, deadline=None)
@given(st.text(ALPHABET, max_size=40), st.sampled_from(UnmaskingRule.names))
def test_any_text_comes_back(text, rule):
    m = chars()
    assert decompress(m, compress(m, text.encode(), rule, 4)).decode()==text

# Size
def header_of(blob):
    "The header, and the bytes that hold bits"
    n, = struct.unpack('<I', blob[9:13])
    return json.loads(blob[13:13+n]), len(blob)-13-n-16
def judge_size(m, data, rule, bs=3):
    blob = compress(m, data, rule, bs=bs)
    bits,want = 8*header_of(blob)[1],-sum(log_prob(m, x, rule).sum().item() for x in chunk_batches(torch.tensor(list(data)), m.config.seq_len, bs))/math.log(2)
    assert abs(bits-want)<.001*want+64, f'{bits} bits, not {want:.0f}'
    assert decompress(m, blob)==data
    return bits
@each_rule
def test_as_many_bits_as_the_likelihood_says(rule):
    "For what the model expects far fewer than 8 a byte, for what it does not expect far more"
    data = bytes(sample(SURE, 30, rule=rule, seed=1).flatten().tolist())
    assert judge_size(SURE, data, rule)<.6*8*len(data)
    assert judge_size(SURE, noise(30*16), rule)>1.3*8*30*16
    if isinstance(rule.rule, str): judge_size(SURE, data[:100], rule)

FAULTS = {'other probabilities':lambda mp: mp.setattr(codec, 'get_rule', lambda rule, *a, f=codec.get_rule, **kw: UnmaskingRule(rule.rule, rule.steps, temperature=1.2)), 'another order':lambda mp: mp.setattr(codec, 'get_rule', lambda *a, **kw: UnmaskingRule(ORDER, 4)),
          'no model':lambda mp: mp.setattr(codec, '_encode', lambda m, ids, rule, bs, progress, f=codec._encode: f(tiny(std=0.), ids, rule, bs, progress))}
@pytest.mark.parametrize('name', FAULTS)
def test_other_sizes_are_noticed(name, monkeypatch):
    rule = UnmaskingRule('confidence', 4)
    data = noise(30*16)
    judge_size(SURE, data, rule)
    FAULTS[name](monkeypatch)
    with pytest.raises(AssertionError, match='bits, not'): judge_size(SURE, data, rule)

# Refusals
DATA = b'to be or not to be, that is the question'
def refused(blob, message=None, m=MODEL):
    with pytest.raises(ValueError, match=message): decompress(m, blob)
@pytest.fixture(scope='module')
def blob(): return compress(MODEL, DATA, steps=4)
def resealed(body): return body+codec._sum(body)

def test_no_bit_can_change_unseen(blob, monkeypatch):
    "Before the network is asked anything"
    monkeypatch.setattr(codec, '_decode', None)
    for i in range(8*len(blob)):
        b = bytearray(blob)
        b[i//8] ^= 1<<i%8
        refused(bytes(b))
def test_nothing_can_be_missing_or_added(blob, monkeypatch):
    monkeypatch.setattr(codec, '_decode', None)
    for i in range(len(blob)): refused(blob[:i])
    for i in range(1, 30): refused(blob[i:])
    for more in (b'\0', b'\0'*4, b'x', noise(16), noise(100), blob): refused(blob+more)
    for i in (10, 50, len(blob)-17, len(blob)-1): refused(blob[:i]+blob[i+1:], 'damaged or cut off')

def test_what_is_refused_is_said(blob):
    assert decompress(MODEL, blob)==DATA
    for n in (0, 5, 8): refused(blob[:n], f'cut off after {n} bytes')
    refused(b'PK\3\4'+blob, 'not written by bijdiff_compress')
    refused(DATA*10, 'not written by bijdiff_compress')
    refused(blob[:20], 'cut off after 20 bytes')
    refused(blob[:-1], 'damaged or cut off')
    newer = resealed(MAGIC+bytes([CODEC_VERSION+1])+blob[9:-16])                                   # whole, of a later bijdiff
    refused(newer, f'format version {CODEC_VERSION+1}; this bijdiff reads version {CODEC_VERSION}')
    assert decompress(MODEL, resealed(blob[:-16]))==DATA

def test_other_models(blob):
    "Another weight, another configuration, another tokenizer"
    for k,_ in list(MODEL.named_parameters())[::3]:
        m = tiny()
        m.get_parameter(k).data.flatten()[0] += 1e-3
        refused(blob, 'compressed with the model', m)
    refused(blob, 'compressed with the model', tiny(seed=1))
    refused(blob, 'compressed with the model', tiny(dropout=.1))
    refused(blob, 'compressed with the model', tiny().double())
    m = tiny()
    m.tokenizer = CharTokenizer(''.join(map(chr, range(256))))
    refused(blob, 'compressed with the model', m)
    m.tokenizer = ByteTokenizer()
    assert fingerprint(m)==fingerprint(MODEL) and decompress(m, blob)==DATA
    m.tokenizer = None
    refused(blob, 'compressed with the model', m)
def test_saved_models_are_the_same(blob, tmp_path):
    tiny().save_pretrained(tmp_path)
    m = BijectiveDenoiser.from_pretrained(tmp_path)
    assert fingerprint(m)==fingerprint(MODEL) and decompress(m, blob)==DATA and compress(m, DATA, steps=4)==blob

def test_impossible_text():
    "Its probability is 0 for the likelihood, too"
    for rule in UnmaskingRule.names:
        rule = UnmaskingRule(rule, 4, top_p=.5)
        with pytest.raises(ValueError, match='the text has probability 0 under this rule'): compress(MODEL, noise(32), rule)
        assert log_prob(MODEL, torch.tensor(list(noise(32))).view(2, 16), rule).eq(-math.inf).any()

class Lossy(CharTokenizer):
    "All letters are small"
    def encode(self, text, replace=False): return super().encode(text.lower(), replace)
REFUSED = {'foreign character':(lambda: compress(tiny(CharTokenizer('abc ')), b'abd'), "character 'd' at position 2"), 'no UTF-8':(lambda: compress(tiny(CharTokenizer('abc ')), b'abc\xff'), r'no UTF-8 text \(byte 3\).*char.*byte tokenizer'), 'no UTF-8 for BPE':(lambda: compress(tiny(BPETokenizer.train('abc', 256)), b'\xc3('), 'no UTF-8 text'),
    'tokenizer that changes texts':(lambda: compress(tiny(Lossy('abc ABC')), b'aBc'), 'does not give back this text'), 'no tokenizer':(lambda: compress(BijectiveDenoiser(DenoiserConfig(256, seq_len=4, d_model=4, n_heads=1, n_layers=1)), b'a'), 'no tokenizer'),
    'hybrid noise':(lambda: compress(tiny(noise=Corruption(256, 1, 1).to_dict(), time_conditioning=True), DATA), 'unmasking rules are for masking alone'), 'rule':(lambda: compress(MODEL, DATA, 'best'), "rule is 'best'"), 'steps 0':(lambda: compress(MODEL, DATA, steps=0), 'steps is 0'), 'temperature 0':(lambda: compress(MODEL, DATA, temperature=0), 'temperature is 0'), 'rule and steps':(lambda: compress(MODEL, DATA, UnmaskingRule(), 3), 'given beside an UnmaskingRule')}
@pytest.mark.parametrize('name', REFUSED)
def test_bad_input_is_an_error(name):
    f,message = REFUSED[name]
    with pytest.raises(ValueError, match=message): f()

@pytest.mark.parametrize('n, rule', [(20, 'left_to_right'), (20, 'confidence'), (300, 'entropy'), (20_000, 'random')])
def test_other_arithmetic(n, rule, monkeypatch):
    "A decoder that rounds differently gets something else, and says why; a long file also gets bits that the coder would never write"
    blob = compress(SURE, noise(n), rule, 2, bs=512)
    with monkeypatch.context() as mp:
        mp.setattr(rules, 'token_probs', lambda logits, *a, f=rules.token_probs: f(logits.bfloat16(), *a))
        refused(blob, 'the file is whole, but what comes out is not what went in.*expected the same software', SURE)
    assert decompress(SURE, blob)==noise(n)

# Threads and modes
def test_threads_of_the_file(monkeypatch):
    "Those of compression are used, and afterwards there are as many as before"
    seen,before = [],torch.get_num_threads()
    monkeypatch.setattr(BijectiveDenoiser, 'forward', lambda self, *a, f=BijectiveDenoiser.forward: seen.append(torch.get_num_threads()) or f(self, *a))
    try:
        torch.set_num_threads(2)
        blob = compress(MODEL, DATA, steps=2)
        assert set(seen)=={2} and header_of(blob)[0]['threads']==2
        torch.set_num_threads(1)
        seen.clear()
        assert decompress(MODEL, blob)==DATA and set(seen)=={2} and torch.get_num_threads()==1
        with pytest.raises(KeyboardInterrupt):
            monkeypatch.setattr(codec, 'unmask', interrupted)
            decompress(MODEL, blob)
        assert torch.get_num_threads()==1
    finally: torch.set_num_threads(before)
def interrupted(*a, **kw): raise KeyboardInterrupt

def test_modes(monkeypatch):
    "Dropout and autocast do nothing, and the model is in training afterwards if it was before"
    m = tiny(dropout=.5)
    blob = compress(m, DATA, steps=4)
    assert not m.training
    m.train()
    with torch.autocast('cpu', torch.bfloat16): assert compress(m, DATA, steps=4)==blob and decompress(m, blob)==DATA
    assert decompress(m, blob)==DATA and m.training
    monkeypatch.setattr(codec, 'unmask', interrupted)
    for f in (lambda: compress(m, DATA), lambda: decompress(m, blob)):
        with pytest.raises(KeyboardInterrupt): f()
        assert m.training

# Files
def names(folder): return sorted(o.name for o in folder.iterdir())
def test_files(tmp_path):
    f = tmp_path/'play.txt'
    f.write_bytes(DATA)
    before,after = compress_file(MODEL, f, steps=4)
    packed = tmp_path/'play.txt.bij'
    assert (before, after)==(len(DATA), packed.stat().st_size) and packed.read_bytes()==compress(MODEL, DATA, steps=4) and names(tmp_path)==['play.txt', 'play.txt.bij']
    f.unlink()
    assert decompress_file(MODEL, packed)==(after, before) and f.read_bytes()==DATA
    assert decompress_file(MODEL, str(packed), tmp_path/'other')==(after, before) and (tmp_path/'other').read_bytes()==DATA
    compress_file(MODEL, f, tmp_path/'small', rule='random', seed=3)
    assert header_of((tmp_path/'small').read_bytes())[0]['rule']==dict(rule='random', steps=16, seed=3)
    with pytest.raises(ValueError, match='does not end in .bij; say with out'): decompress_file(MODEL, tmp_path/'small')
    decompress_file(MODEL, tmp_path/'small', tmp_path/'back')
    assert (tmp_path/'back').read_bytes()==DATA and names(tmp_path)==['back', 'other', 'play.txt', 'play.txt.bij', 'small']

def test_files_are_not_overwritten(tmp_path, monkeypatch):
    f,packed = tmp_path/'a',tmp_path/'a.bij'
    f.write_bytes(DATA)
    packed.write_bytes(b'old')
    with monkeypatch.context() as mp:
        mp.setattr(codec, 'compress', None)                                                        # refused before any work
        with pytest.raises(FileExistsError, match='a.bij exists'): compress_file(MODEL, f)
    assert packed.read_bytes()==b'old'
    compress_file(MODEL, f, force=True, steps=2)
    assert packed.read_bytes()==compress(MODEL, DATA, steps=2)
    f.write_bytes(b'newer')
    with pytest.raises(FileExistsError, match='exists; choose another name'): decompress_file(MODEL, packed)
    assert f.read_bytes()==b'newer'
    decompress_file(MODEL, packed, force=True)
    assert f.read_bytes()==DATA and names(tmp_path)==['a', 'a.bij']
    with pytest.raises(FileNotFoundError, match='none does not exist'): compress_file(MODEL, tmp_path/'none')
    with pytest.raises(ValueError, match='is a folder'): compress_file(MODEL, tmp_path)
    for kw,msg in ((dict(rule='best'), "^rule is 'best'"), (dict(bs=0), '^bs is 0')):                                # not the file's fault
        with pytest.raises(ValueError, match=msg): compress_file(MODEL, f, tmp_path/'new', **kw)
    assert names(tmp_path)==['a', 'a.bij']

def full(*a, **kw): raise OSError('no space left on device')
class FullFile:
    "A file on a full disk: half is written"
    def __init__(self, path, mode): self.f = Path(path).open(mode)
    def __enter__(self): return self
    def __exit__(self, *a): self.f.close()
    def write(self, b):
        self.f.write(b[:len(b)//2])
        full()
FAILURES = {'damaged file':(lambda mp: None, ValueError), 'in the network':(lambda mp: mp.setattr(codec, 'unmask', interrupted), KeyboardInterrupt), 'in the middle of writing':(lambda mp: mp.setattr(saving, 'open', FullFile, raising=False), OSError), 'at the end of writing':(lambda mp: mp.setattr(codec.os, 'fsync', full), OSError), 'when moving':(lambda mp: [mp.setattr(codec.os, o, full) for o in ('replace', 'link')], OSError)}
@pytest.mark.parametrize('name', FAILURES)
def test_failures_leave_everything_as_it_was(name, tmp_path, monkeypatch):
    fail,error = FAILURES[name]
    f,packed = tmp_path/'a',tmp_path/'a.bij'
    f.write_bytes(DATA)
    compress_file(MODEL, f, steps=2)
    whole = packed.read_bytes()
    if name=='damaged file': packed.write_bytes(whole := whole[:-1]+b'?')
    f.write_bytes(b'old')
    fail(monkeypatch)
    for g in (lambda: decompress_file(MODEL, packed, force=True), lambda: decompress_file(MODEL, packed, tmp_path/'new'), *([lambda: compress_file(MODEL, f, force=True)] if name!='damaged file' else [])):
        with pytest.raises(error): g()
        assert f.read_bytes()==b'old' and packed.read_bytes()==whole and names(tmp_path)==['a', 'a.bij']
