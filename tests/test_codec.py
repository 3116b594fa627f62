"""Files come back byte for byte, have as many bits as their likelihood says; damaged ones are rejected."""
import math, random
from functools import partial
from pathlib import Path
from typing import NamedTuple
import pytest, torch
from hypothesis import given, settings, strategies as st
from codec_helpers import CHECKSUM_BYTES, LENGTH_AT, magic, random_bytes, read_header, seal, small_denoiser
from codec_helpers import version
from helpers import code_length, HandmadeDenoiser, plant_fault, record_calls
from bijdiff import files
from bijdiff.data.tokens import ByteTokenizer, CharTokenizer
from bijdiff.data.subwords import BPETokenizer
from bijdiff.diffusion.corruption import Corruption
from bijdiff.diffusion.schedules import Cosine
from bijdiff.likelihood import codec, coding
from bijdiff.likelihood.codec import compress, compress_file, decompress, decompress_file, fingerprint
from bijdiff.likelihood.exact import log_prob
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.likelihood.portable import portable
from bijdiff.sampling import conditionals
from bijdiff.sampling.generate import sample
from bijdiff.sampling.rules import UnmaskingRule

# Functions that faults replace, which only the package knows
ENCODE,DECODE,UNMASK = (codec, 'encode'),(codec, 'decode'),(coding, 'unmask')
GET_RULE,TOKEN_PROBS = (codec, 'get_rule'),(conditionals, 'token_probs')
OPEN,FSYNC,REPLACE,LINK = (files, 'open'),(files.os, 'fsync'),(files.os, 'replace'),(files.os, 'link')

# Denoisers, rules and data

MODEL,CONFIDENT = small_denoiser(),small_denoiser(std=.6, logit_scale=3.)
ORDER = tuple(torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist())
EVERY_RULE = [UnmaskingRule(rule, 4, seed=3, block_length=5) for rule in (*UnmaskingRule.names, ORDER)]
each_rule = pytest.mark.parametrize('rule', EVERY_RULE, ids=lambda o: str(o.rule)[:13])
DATA = b'to be or not to be, that is the question'

def assert_returns(model, data, *args, **kwargs):
    "Assert that data comes back from compression"
    assert decompress(model, compress(model, data, *args, **kwargs))==data

# Round trips

BYTES = {
    'empty': b'',
    'one byte': b'\x00',
    'random': random_bytes(100),
    'no UTF-8': b'\xff\xfe\x80abc\xc3(\xed\xa0\x80',
    'one block': random_bytes(16, 1),
    'one byte more': random_bytes(17, 2),
    'a batch': random_bytes(32, 3),
    'batches and a rest': random_bytes(16*5+3, 4),
    'zeros': bytes(50),
    'every byte': bytes(range(256)),
}

@pytest.mark.parametrize('name', BYTES)
def test_round_trips(name):
    data = BYTES[name]
    for rule in EVERY_RULE:
        orders_full_blocks = isinstance(rule.rule, tuple)
        if orders_full_blocks and len(data)%16: continue
        assert_returns(MODEL, data, rule, context=0, streams=4)
        if not orders_full_blocks: assert_returns(MODEL, data, rule, context=7, streams=4)

@pytest.mark.parametrize('data, context', [(bytes(17), 0), (bytes(16), 4), (bytes(16), None)])
def test_an_order_of_other_blocks_is_an_error(data, context):
    "The first block of a stream has no context, so that it is shorter"
    with pytest.raises(ValueError, match='rule'): compress(MODEL, data, ORDER, 4, context=context)

SETTINGS = {
    'defaults': {},
    'one step': dict(steps=1),
    'more steps than tokens': dict(steps=100),
    'random order': dict(rule='random', seed=5),
    'cold': dict(steps=3, temperature=.5),
    'hot, by entropy': dict(steps=3, temperature=3., rule='entropy'),
    'schedule': dict(steps=5, schedule=Cosine(.1)),
    'blocks': dict(rule='block', block_length=3, steps=6),
    'one block at a time': dict(streams=1, steps=2),
    'one token at a time': dict(context=15, steps=2),
    'no context': dict(context=0, steps=2),
    'the arithmetic of the device': dict(fast=True, steps=2),
    'a threshold': dict(rule='margin', threshold=.01),
    'blocks by a threshold': dict(rule='block', block_length=5, threshold=.02),
    'a budget': dict(rule='entropy', budget=12.),
    'a rule with everything in it': dict(rule=UnmaskingRule('confidence')),
}

@pytest.mark.parametrize('name', SETTINGS)
def test_settings_are_in_the_file(name):
    for m in (MODEL, CONFIDENT): assert_returns(m, random_bytes(41), **SETTINGS[name])

def test_likely_text_with_top_p():
    "Samples can be coded by their rule, though top-p leaves only some of the bytes possible"
    for name in UnmaskingRule.names:
        rule = UnmaskingRule(name, 4, top_p=.7, temperature=1.2)
        data = bytes(sample(portable(CONFIDENT), 3, rule=rule).flatten().tolist())
        assert_returns(CONFIDENT, data, rule, context=0)

@pytest.mark.parametrize('n, fast', [(1_000_000, True), (200_000, False)])
def test_a_megabyte(n, fast):
    m = small_denoiser(seq_len=64, d_model=4, n_heads=1, n_layers=1)
    assert_returns(m, bytes(n), steps=1, context=0, streams=64, fast=fast)

ALPHABET = 'abc äß日\n😀'
CHAR_MODEL = small_denoiser(CharTokenizer(ALPHABET))

def test_char_tokenizer():
    m = small_denoiser(CharTokenizer.train(ALPHABET))
    for text in ('', 'a', 'äß日 😀\n'*7, 'abc �'): assert_returns(m, text.encode(), steps=4)

def test_bpe_tokenizer():
    m = small_denoiser(BPETokenizer.train('the cat sat on the mat and the dog ran to the cat '*20, 280))
    for text in ('', ' ', 'the cat', '  the\n\tdog  \r\n', 'Ein Käse, 日本 😀', 'the cat sat on the mat '*4):
        assert_returns(m, text.encode(), steps=4)

@settings(max_examples=25, deadline=None)
@given(st.binary(max_size=40), st.sampled_from(UnmaskingRule.names), st.integers(1, 20),
       st.integers(1, 4), st.integers(0, 15), st.booleans())
def test_any_bytes_come_back(data, rule, steps, streams, context, fast):
    assert_returns(MODEL, data, rule, steps, streams=streams, context=context, fast=fast)

@settings(max_examples=15, deadline=None)
@given(st.text(ALPHABET, max_size=40), st.sampled_from(UnmaskingRule.names))
def test_any_text_comes_back(text, rule):
    assert_returns(CHAR_MODEL, text.encode(), rule, 4)

# Size

def judge_size(m, data, rule, context=0, streams=3):
    "Return the bits of a compressed file, which must come back and be as many as its code length, and a few"
    blob = compress(m, data, rule, context=context, streams=streams)
    bits = 8*read_header(blob)[1]
    expected = code_length(m, torch.tensor(list(data)), rule, context, streams)
    assert abs(bits-expected)<.001*expected+64, f'{bits} bits, not {expected:.0f}'
    assert decompress(m, blob)==data
    return bits

@each_rule
def test_as_many_bits_as_the_likelihood_says(rule):
    "Far fewer than 8 a byte for samples of the model, far more for random bytes"
    samples = bytes(sample(CONFIDENT, 30, rule=rule, seed=1).flatten().tolist())
    assert judge_size(CONFIDENT, samples, rule)<.6*8*len(samples)
    assert judge_size(CONFIDENT, random_bytes(30*16), rule)>1.3*8*30*16
    if isinstance(rule.rule, str): judge_size(CONFIDENT, samples[:100], rule)

def successor(byte): return (7*byte+1)%256

class SuccessorDenoiser(HandmadeDenoiser):
    "A denoiser that expects the successor of a byte after it, and any byte after a mask"
    def __init__(self):
        super().__init__(256, 16)
        self.table = torch.zeros(257, 256)
        for byte in range(256): self.table[byte,successor(byte)] = 8.
        self.tokenizer = ByteTokenizer()

    def outputs(self, xt, t, mask):
        before = torch.cat([torch.full_like(xt[:,:1], self.mask_id), xt[:,:-1]], 1)
        return self.table[before], None

def chain_of_successors(n):
    "Bytes of which one in ten is not the successor of the byte before it"
    rng,data = random.Random(0),[0]
    for _ in range(n-1): data.append(rng.randrange(256) if rng.random()<.1 else successor(data[-1]))
    return bytes(data)

@pytest.mark.parametrize('rule', UnmaskingRule.names)
def test_with_context_the_bits_are_those_of_blocks_that_see_it(rule):
    "The last block is not full; without context, or with less of it, there are more bits"
    m,rule,data = SuccessorDenoiser(),UnmaskingRule(rule, 4, seed=3, block_length=5),chain_of_successors(401)
    judge = partial(judge_size, m, data, rule)
    assert abs(judge(0, 1)-judge(0, 20))<=32
    assert judge(5, 1)+80<judge(5, 20)
    assert judge(5, 1)+80<code_length(m, torch.tensor(list(data)), rule, 0, 11)
    judge(15, 3)

def warmer(get_rule): return lambda rule, *a, **kw: UnmaskingRule(rule.rule, rule.steps, temperature=1.2)
def in_another_order(get_rule): return lambda *a, **kw: UnmaskingRule(ORDER, 4)
def without_the_model(encode):
    "Code as a denoiser with weights of 0, whose probabilities are all equal"
    return lambda m, *a: encode(small_denoiser(std=0.), *a)

SIZE_FAULTS = {
    'other probabilities': (GET_RULE, warmer),
    'another order': (GET_RULE, in_another_order),
    'no model': (ENCODE, without_the_model),
}

@pytest.mark.parametrize('name', SIZE_FAULTS)
def test_other_sizes_are_noticed(name, monkeypatch):
    rule,data = UnmaskingRule('confidence', 4),random_bytes(30*16)
    judge_size(CONFIDENT, data, rule)
    plant_fault(monkeypatch, *SIZE_FAULTS[name])
    with pytest.raises(AssertionError, match='bits, not'): judge_size(CONFIDENT, data, rule)

# Damaged files, files of other models

@pytest.fixture(scope='module')
def blob(): return compress(MODEL, DATA, steps=4)

@pytest.fixture
def no_decoding(monkeypatch):
    "Any use of the network is an error of another type"
    monkeypatch.setattr(*DECODE, None)

def assert_rejected(blob, word=None, m=MODEL):
    "Assert that decompression raises a ValueError that contains a word"
    with pytest.raises(ValueError, match=word): decompress(m, blob)

def flip_bit(blob, i):
    "Change bit i of some bytes"
    changed = bytearray(blob)
    changed[i//8] ^= 1<<i%8
    return bytes(changed)

def test_no_bit_can_change_unseen(blob, no_decoding):
    for i in range(8*len(blob)): assert_rejected(flip_bit(blob, i))

def test_nothing_can_be_missing_or_added(blob, no_decoding):
    for i in range(len(blob)): assert_rejected(blob[:i])
    for i in range(1, 30): assert_rejected(blob[i:])
    for more in (b'\0', b'\0'*4, b'x', random_bytes(16), random_bytes(100), blob): assert_rejected(blob+more)
    for i in (10, 50, len(blob)-17, len(blob)-1): assert_rejected(blob[:i]+blob[i+1:], 'checksum')

def test_the_error_says_what_is_wrong_with_a_file(blob):
    assert decompress(MODEL, blob)==DATA
    for n in (0, 5, 8, 20): assert_rejected(blob[:n], rf'\b{n} bytes')
    assert_rejected(b'PK\3\4'+blob, r'\.bij')
    assert_rejected(DATA*10, r'\.bij')
    assert_rejected(blob[:-1], 'checksum')
    of_a_later_version = seal(magic+bytes([version+1])+blob[LENGTH_AT:-CHECKSUM_BYTES])
    assert_rejected(of_a_later_version, rf'\b{version+1}\b.*\b{version}\b')
    assert decompress(MODEL, seal(blob[:-CHECKSUM_BYTES]))==DATA

def test_another_weight_is_another_model(blob):
    for name,_ in list(MODEL.named_parameters())[::3]:
        m = small_denoiser()
        m.get_parameter(name).data.flatten()[0] += 1e-3
        assert_rejected(blob, 'model', m)
    assert_rejected(blob, 'model', small_denoiser(seed=1))
    assert_rejected(blob, 'model', small_denoiser().double())

def test_another_configuration_is_another_model(blob):
    assert_rejected(blob, 'model', small_denoiser(dropout=.1))

def test_another_tokenizer_is_another_model(blob):
    m = small_denoiser()
    m.tokenizer = CharTokenizer(''.join(map(chr, range(256))))
    assert_rejected(blob, 'model', m)
    m.tokenizer = ByteTokenizer()
    assert fingerprint(m)==fingerprint(MODEL)
    assert decompress(m, blob)==DATA
    m.tokenizer = None
    assert_rejected(blob, 'model', m)

def test_saved_models_are_the_same(blob, tmp_path):
    small_denoiser().save_pretrained(tmp_path)
    m = BijectiveDenoiser.from_pretrained(tmp_path)
    assert fingerprint(m)==fingerprint(MODEL)
    assert decompress(m, blob)==DATA
    assert compress(m, DATA, steps=4)==blob

# Rejected input

def test_impossible_text():
    "It has probability 0 for the likelihood, too"
    data = random_bytes(32)
    for name in UnmaskingRule.names:
        rule = UnmaskingRule(name, 4, top_p=.5)
        with pytest.raises(ValueError, match='probability 0'): compress(MODEL, data, rule)
        assert log_prob(MODEL, torch.tensor(list(data)).view(2, 16), rule).eq(-math.inf).any()

class LowerCaseTokenizer(CharTokenizer):
    "A tokenizer that writes all letters small"
    def encode(self, text, replace=False): return super().encode(text.lower(), replace)

class Rejected(NamedTuple):
    "Arguments of compress, and a word of the message: the argument's name where it is one argument"
    word:str
    data:bytes = DATA
    kwargs:dict = {}
    tokenizer:object = None # Of a model of its own
    config_kwargs:dict = {}

HYBRID = dict(noise=Corruption(256, 1, 1).to_dict(), time_conditioning=True)
REJECTED = {
    'foreign character': Rejected("'d'", b'abd', tokenizer=CharTokenizer('abc ')),
    'no UTF-8': Rejected('UTF-8.*3.*char', b'abc\xff', tokenizer=CharTokenizer('abc ')),
    'no UTF-8 for BPE': Rejected('UTF-8', b'\xc3(', tokenizer=BPETokenizer.train('abc', 256)),
    'tokenizer that changes texts': Rejected('tokenizer', b'aBc', tokenizer=LowerCaseTokenizer('abc ABC')),
    'hybrid noise': Rejected('noise', config_kwargs=HYBRID),
    'rule': Rejected('rule', kwargs=dict(rule='best')),
    'steps 0': Rejected('steps', kwargs=dict(steps=0)),
    'temperature 0': Rejected('temperature', kwargs=dict(temperature=0)),
    'rule and steps': Rejected('steps', kwargs=dict(rule=UnmaskingRule(), steps=3)),
}

@pytest.mark.parametrize('name', REJECTED)
def test_bad_input_is_an_error(name):
    word,data,kwargs,tokenizer,config_kwargs = REJECTED[name]
    m = small_denoiser(tokenizer, **config_kwargs)
    with pytest.raises(ValueError, match=word): compress(m, data, **kwargs)

def test_a_model_without_a_tokenizer_is_an_error():
    m = BijectiveDenoiser(DenoiserConfig(256, seq_len=4, d_model=4, n_heads=1, n_layers=1))
    with pytest.raises(ValueError, match='tokenizer'): compress(m, b'a')

def in_bfloat16(token_probs): return lambda logits, *a: token_probs(logits.bfloat16(), *a)

LONG = [(20, 'left_to_right'), (20, 'confidence'), (300, 'entropy'), (20_000, 'random')]
@pytest.mark.parametrize('fast', [False, True], ids=['portable', 'fast'])
@pytest.mark.parametrize('n, rule', LONG)
def test_other_arithmetic(n, rule, fast, monkeypatch):
    """A decoder that rounds differently gets other bytes, and says so

    From a long file it also gets bits that the coder would never write, or too few of them.
    """
    blob = compress(CONFIDENT, random_bytes(n), rule, 2, streams=512, fast=fast)
    with monkeypatch.context() as patches:
        plant_fault(patches, TOKEN_PROBS, in_bfloat16)
        assert_rejected(blob, 'other last digits|fewer bits', CONFIDENT)
    assert decompress(CONFIDENT, blob)==random_bytes(n)

# Threads and modes

def interrupted(*args, **kwargs): raise KeyboardInterrupt

@pytest.fixture
def restored_threads():
    "The number of threads is afterwards as it was before"
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)

def test_threads_of_the_file(monkeypatch, restored_threads):
    """Those of a compression that is fast are used for decompression

    Afterwards there are as many as before."""
    m = small_denoiser()
    threads = record_calls(monkeypatch, m, lambda xt, t: torch.get_num_threads())
    torch.set_num_threads(2)
    blob = compress(m, DATA, steps=2, fast=True)
    assert set(threads)=={2}
    assert read_header(blob)[0]['arithmetic']['threads']==2
    torch.set_num_threads(1)
    threads.clear()
    assert decompress(m, blob)==DATA
    assert set(threads)=={2}
    assert torch.get_num_threads()==1
    monkeypatch.setattr(*UNMASK, interrupted)
    with pytest.raises(KeyboardInterrupt): decompress(m, blob)
    assert torch.get_num_threads()==1

def test_threads_are_left_alone_by_the_portable_arithmetic(monkeypatch, restored_threads):
    "A file does not say how many there were, and is the same with any number"
    threads = []
    def noting(unmask):
        def noted(*args, **kwargs):
            threads.append(torch.get_num_threads())
            return unmask(*args, **kwargs)
        return noted
    plant_fault(monkeypatch, UNMASK, noting)
    blobs = []
    for n in (1, 2):
        torch.set_num_threads(n)
        blobs.append(compress(MODEL, DATA, steps=2))
        assert set(threads)=={n} and torch.get_num_threads()==n
        threads.clear()
    assert blobs[0]==blobs[1]
    assert read_header(blobs[0])[0]['arithmetic']=='portable 1'

@pytest.mark.parametrize('fast', [False, True], ids=['portable', 'fast'])
def test_modes(monkeypatch, fast):
    "Dropout and autocast do nothing, and a model that was in training mode is so again"
    m = small_denoiser(dropout=.5)
    blob = compress(m, DATA, steps=4, fast=fast)
    assert not m.training
    m.train()
    with torch.autocast('cpu', torch.bfloat16):
        assert compress(m, DATA, steps=4, fast=fast)==blob
        assert decompress(m, blob)==DATA
        assert torch.is_autocast_enabled('cpu')
    assert decompress(m, blob)==DATA
    assert m.training
    monkeypatch.setattr(*UNMASK, interrupted)
    for f,data in ((partial(compress, fast=fast), DATA), (decompress, blob)):
        with pytest.raises(KeyboardInterrupt): f(m, data)
        assert all(part.training for part in m.modules())

# Files

def names(folder): return sorted(o.name for o in folder.iterdir())

def test_files(tmp_path):
    f,packed,other = (tmp_path/name for name in ('play.txt', 'play.txt.bij', 'other'))
    f.write_bytes(DATA)
    before,after = compress_file(MODEL, f, steps=4)
    assert (before, after)==(len(DATA), packed.stat().st_size)
    assert packed.read_bytes()==compress(MODEL, DATA, steps=4)
    assert names(tmp_path)==['play.txt', 'play.txt.bij']
    f.unlink()
    assert decompress_file(MODEL, packed)==(after, before)
    assert f.read_bytes()==DATA
    assert decompress_file(MODEL, str(packed), other)==(after, before)
    assert other.read_bytes()==DATA
    assert names(tmp_path)==['other', 'play.txt', 'play.txt.bij']

def test_files_of_other_names(tmp_path):
    f,small,back = (tmp_path/name for name in ('play.txt', 'small', 'back'))
    f.write_bytes(DATA)
    compress_file(MODEL, f, small, rule='random', seed=3)
    assert read_header(small.read_bytes())[0]['rule']==dict(rule='random', steps=16, seed=3)
    with pytest.raises(ValueError, match='out'): decompress_file(MODEL, small)
    decompress_file(MODEL, small, back)
    assert back.read_bytes()==DATA
    assert names(tmp_path)==['back', 'play.txt', 'small']

def test_compressing_does_not_overwrite_files(tmp_path, monkeypatch):
    "And begins no work before it knows that it may write"
    f,packed = tmp_path/'a',tmp_path/'a.bij'
    f.write_bytes(DATA)
    packed.write_bytes(b'old')
    with monkeypatch.context() as patches:
        patches.setattr(codec, 'compress', None)
        with pytest.raises(FileExistsError, match='a.bij'): compress_file(MODEL, f)
    assert packed.read_bytes()==b'old'
    compress_file(MODEL, f, force=True, steps=2)
    assert packed.read_bytes()==compress(MODEL, DATA, steps=2)

def test_decompressing_does_not_overwrite_files(tmp_path):
    f,packed = tmp_path/'a',tmp_path/'a.bij'
    f.write_bytes(DATA)
    compress_file(MODEL, f, steps=2)
    f.write_bytes(b'newer')
    with pytest.raises(FileExistsError, match=r'\ba\b'): decompress_file(MODEL, packed)
    assert f.read_bytes()==b'newer'
    decompress_file(MODEL, packed, force=True)
    assert f.read_bytes()==DATA
    assert names(tmp_path)==['a', 'a.bij']

def test_files_that_cannot_be_compressed(tmp_path):
    "An error of the arguments does not name the file"
    f = tmp_path/'a'
    f.write_bytes(DATA)
    with pytest.raises(FileNotFoundError, match='none'): compress_file(MODEL, tmp_path/'none')
    with pytest.raises(ValueError, match=tmp_path.name): compress_file(MODEL, tmp_path)
    with pytest.raises(ValueError, match='^rule'): compress_file(MODEL, f, tmp_path/'new', rule='best')
    with pytest.raises(ValueError, match='^streams'): compress_file(MODEL, f, tmp_path/'new', streams=0)
    with pytest.raises(ValueError, match='^context'): compress_file(MODEL, f, tmp_path/'new', context=16)
    assert names(tmp_path)==['a']

def disk_full(*args, **kwargs): raise OSError('no space left on device')

class FullFile:
    "A file on a full disk: half of the bytes are written"
    def __init__(self, path, mode, opener): self.f = Path(path).open(mode)
    def __enter__(self): return self
    def __exit__(self, *args): self.f.close()
    def write(self, b):
        self.f.write(b[:len(b)//2])
        disk_full()

class Failure(NamedTuple):
    "Functions of the package that fail, what they become, and the error that follows"
    error:type
    targets:tuple = ()
    replacement:object = disk_full

FAILURES = {
    'damaged file': Failure(ValueError),
    'in the network': Failure(KeyboardInterrupt, (UNMASK,), interrupted),
    'in the middle of writing': Failure(OSError, (OPEN,), FullFile),
    'at the end of writing': Failure(OSError, (FSYNC,)),
    'when moving': Failure(OSError, (REPLACE, LINK)),
}

@pytest.mark.parametrize('name', FAILURES)
def test_failures_leave_everything_as_it_was(name, tmp_path, monkeypatch):
    error,targets,replacement = FAILURES[name]
    f,packed = tmp_path/'a',tmp_path/'a.bij'
    f.write_bytes(DATA)
    compress_file(MODEL, f, steps=2)
    if name=='damaged file': packed.write_bytes(packed.read_bytes()[:-1]+b'?')
    f.write_bytes(b'old')
    content = packed.read_bytes()
    for target in targets: monkeypatch.setattr(*target, replacement, raising=False)
    def assert_unchanged():
        assert f.read_bytes()==b'old'
        assert packed.read_bytes()==content
        assert names(tmp_path)==['a', 'a.bij']
    with pytest.raises(error): decompress_file(MODEL, packed, force=True)
    assert_unchanged()
    with pytest.raises(error): decompress_file(MODEL, packed, tmp_path/'new')
    assert_unchanged()
    if name=='damaged file': return
    with pytest.raises(error): compress_file(MODEL, f, force=True)
    assert_unchanged()
