"""Compressed files on other machines, and from hostile hands.

Files come back whatever PyTorch's switches are. A header of somebody who knows the format, with the right
checksum, is answered by one line at once. benchmarks/portable_files.py and benchmarks/hostile_files.py try
more of both."""
import json
import math
import time
import pytest, torch
from codec_helpers import make_file, random_bytes, read_header, small_denoiser, words_of
from helpers import all_at_once, CONDITIONS, HandmadeDenoiser, plant_fault, with_threads
from bijdiff.data.tokens import ByteTokenizer
from bijdiff.likelihood import codec
from bijdiff.likelihood.codec import compress, compress_file, decompress, decompress_file
from bijdiff.likelihood.coding import EndOfBits
from bijdiff.sampling import conditionals
from bijdiff.sampling.rules import UnmaskingRule

# Functions that faults replace, which only the package knows
ENCODE,DECODE = (codec, 'encode'),(codec, 'decode')

MODELS = dict(stack=small_denoiser(), mixture=small_denoiser(n_experts=4, k_active=2, d_model=16))
MODEL = MODELS['stack']
portable_and_fast = pytest.mark.parametrize('fast', [False, True], ids=['portable', 'fast'])
DATA = b'to be or not to be, that is the question'

# Other settings

REGIONS = CONDITIONS | dict(all_at_once=all_at_once)

SETTINGS = [
    dict(rule=rule, steps=steps, context=context, streams=streams)
    for rule,steps,context,streams in zip(
        [*UnmaskingRule.names, *UnmaskingRule.names[:5]], [1, 2, 5, 3]*3, [0, 4, 15, 8]*3, [1, 3, 16]*4)]

def dozen_of_files(model, fast=False):
    "Twelve files of random bytes, one for each of the settings, and their bytes"
    data = [random_bytes(n*n//4, seed=n) for n in range(12)]
    return [(compress(model, b, fast=fast, **kwargs), b) for b,kwargs in zip(data, SETTINGS)]

@pytest.fixture(scope='module')
def files():
    "Files of each model, in portable arithmetic and in that of the device, with one thread"
    with with_threads(1):
        return {(name, fast):dozen_of_files(m, fast) for name,m in MODELS.items() for fast in (False, True)}

@pytest.mark.parametrize('region', REGIONS)
@pytest.mark.parametrize('name', MODELS)
@portable_and_fast
def test_files_come_back_under_other_settings(name, fast, region, files):
    "And under these they are compressed to the same bytes; a fast file names its number of threads"
    m,some_file = MODELS[name],dict(SETTINGS[2], fast=fast)
    with REGIONS[region]():
        before = torch.get_default_dtype(), torch.get_num_threads(), torch.is_autocast_enabled('cpu')
        for blob,data in files[name,fast]: assert decompress(m, blob)==data
        if not fast or torch.get_num_threads()==1:
            blob,data = files[name,fast][2]
            assert compress(m, data, **some_file)==blob
        assert before==(torch.get_default_dtype(), torch.get_num_threads(), torch.is_autocast_enabled('cpu'))

def smallest_half(): return torch.finfo(torch.float64).tiny*.5

class NotingDenoiser(HandmadeDenoiser):
    "A denoiser of equal probabilities that notes a subnormal number"
    def __init__(self):
        super().__init__(256, 16)
        self.tokenizer,self.noted = ByteTokenizer(),[]

    def outputs(self, xt, t, mask):
        self.noted.append(smallest_half())
        return torch.zeros(*xt.shape, 256), None

@portable_and_fast
def test_a_caller_without_subnormal_numbers_has_none_afterwards(fast):
    "The network has them"
    m = NotingDenoiser()
    with CONDITIONS['flushed_subnormals']():
        assert decompress(m, compress(m, DATA, steps=1, fast=fast))==DATA
        assert smallest_half()==0
    assert len(m.noted)>=2 and min(m.noted)==smallest_half()>0

# Hostile headers

class Missing: "In place of a value: the field is left out"

@pytest.fixture(scope='module')
def blob(): return compress(MODEL, DATA, steps=4)

@pytest.fixture(scope='module')
def fast_blob(): return compress(MODEL, DATA, steps=4, fast=True)

def changed_file(blob, words=None, **fields):
    "A file with other fields in its header, and the right checksum"
    header = read_header(blob)[0] | fields
    header = {k:v for k,v in header.items() if v is not Missing}
    return make_file(header, words_of(blob) if words is None else words)

def assert_answered(blob, word, **kwargs):
    "Assert that a file is rejected at once, by an error of one line with a word in it"
    start = time.perf_counter()
    with pytest.raises(ValueError, match=word) as e: decompress(MODEL, blob, **kwargs)
    assert time.perf_counter()-start<5
    assert '\n' not in str(e.value) and len(str(e.value))<1000

nan = math.nan
NESTED = [[[[[1]]]]]
LONG = 'a'*101
NUMBERS = [None, True, -1, -2**63, 1.5, nan, math.inf, 10**400, 2**53+1, '3', '', [3], {}, {'a':1}, NESTED,
           Missing]
WORDS = [None, True, 0, 3, 1.5, LONG, 'a\n', '\0', '\x1b[31m', ['a'], {}, NESTED, Missing]
RULES = [None, True, 3, 'spread', '', [], ['rule'], NESTED, Missing]
ARITHMETICS = [None, True, 1, 1.5, LONG, 'a\n', '', 'portable 0', 'portable 2', 'portable', 'Portable 1', [],
               NESTED, {}, {'threads':1}, {'portable':1}, Missing]
WRONG_FIELDS = [
    *[(field, v) for field in ('tokens','context','streams') for v in NUMBERS],
    *[(field, v) for field in ('model','sum') for v in WORDS],
    *[('rule', v) for v in RULES],
    *[('arithmetic', v) for v in ARITHMETICS],
    *[(field, 1) for field in ('', 'Model', 'bs', 'threads', 'self', 'a\n', LONG)],
    ('context', 16), ('context', 2**20), ('model', '0'*32), ('model', ''),
    *[('streams', v) for v in (0, 513, 2**31, 2**53)],
]

def named(v): return 'missing' if v is Missing else repr(v)[:20]

@pytest.mark.parametrize('field, value', WRONG_FIELDS, ids=named)
def test_a_wrong_field_of_the_header_is_named(field, value, blob):
    is_known = field in read_header(blob)[0]
    assert_answered(changed_file(blob, **{field:value}), field if is_known else 'a key of the header')

@pytest.mark.parametrize('field', ['torch', 'machine', 'cpu', 'device', 'threads', 'outputs'])
def test_a_wrong_field_of_the_arithmetic_is_named(field, fast_blob):
    right = read_header(fast_blob)[0]['arithmetic']
    counts = [0, -1, 1.5, 257, 2**31, 10**400, '1', None, True, []]
    for v in counts if field=='threads' else WORDS[:-1]:
        wrong = changed_file(fast_blob, arithmetic=right | {field:v})
        assert_answered(wrong, f'{field} in arithmetic')
    without = {k:v for k,v in right.items() if k!=field}
    for v in (without, right | {'more':1}, right | {field.upper():1}):
        assert_answered(changed_file(fast_blob, arithmetic=v), 'arithmetic in the header')

COSINE = dict(name='cosine', eps=1e-3)
POLYNOMIAL = dict(name='polynomial', power=2., eps=1e-3)
HUGE = 10**400
WRONG_VALUES = [ # Of a field of the rule, beside other fields
    ('rule', {}, ['best', '', LONG, None, 3, True, [], [0], [0, 0], [1.5], ['a'], {}, NESTED]),
    ('rule', {}, [[*range(n)] for n in (11, 17, 10**5)]),
    ('steps', {}, [0, -1, 1.5, '4', True, [], HUGE, 2**64]),
    ('tokens', {}, [0, -1, 1.5, '4', None, [], HUGE, 2**64]),
    ('tokens', dict(steps=4), [2]),
    ('seed', {}, [-1, 1.5, '4', None, [], HUGE, 2**64]),
    ('block_length', dict(rule='block'), [0, -1, 1.5, '4', None, HUGE, 2**64]),
    ('temperature', {}, [0, -1, nan, math.inf, HUGE, '1', None, True, [], 5e-324]),
    ('top_p', {}, [0, -1, 1.5, nan, math.inf, HUGE, '1', None, []]),
    ('guidance', {}, [-1, nan, math.inf, HUGE, '1', None, []]),
    ('threshold', dict(rule='margin'), [0, -1, 2, nan, HUGE, '1', []]),
    ('threshold', dict(rule='spread'), [.5]),
    ('threshold', dict(rule='margin', steps=4), [.5]),
    ('budget', dict(rule='entropy'), [-1, nan, math.inf, HUGE, '1', []]),
    ('budget', dict(rule='margin'), [1]),
    ('budget', dict(rule='entropy', steps=4), [1]),
    ('adjust', {}, ['f', LONG, 3, True, [], {}]),
    ('unknown', {}, [1]), ('self', {}, [1]), ('', {}, [1]),
    ('schedule', dict(steps=4), ['cosine', 3, True, [1], NESTED]),
    ('schedule', dict(steps=4), [{'name':'nope'}, {'name':3}, {'mask':COSINE}, {'name':COSINE}]),
    ('schedule', dict(steps=4), [COSINE | dict(eps=v) for v in (-1, HUGE, 'a')]),
    ('schedule', dict(steps=4), [COSINE | dict(power=2)]),
    ('schedule', dict(steps=4), [POLYNOMIAL | dict(power=v) for v in (1e300, nan, 0, '2')]),
]
WRONG_RULES = [(field, others | {field:v}) for field,others,values in WRONG_VALUES for v in values]
WORDS_OF_FIELDS = {'schedule':'schedule|name|eps|power', '':'a key of the rule'}

@pytest.mark.parametrize('field, rule', WRONG_RULES, ids=lambda v: repr(v)[:50])
def test_a_wrong_value_of_the_rule_is_named(field, rule, blob):
    "A schedule by the name of its field"
    assert_answered(changed_file(blob, rule=rule), WORDS_OF_FIELDS.get(field, field))

ABSURD_RULES = [
    dict(steps=2**53), dict(tokens=2**53), dict(rule='block', block_length=2**53), dict(seed=2**64-1),
    dict(temperature=1e-300), dict(temperature=1e300), dict(top_p=1e-300), dict(top_p=5e-324),
    dict(guidance=1e300), dict(rule='entropy', budget=1e308), dict(rule='margin', threshold=1e-300),
    dict(rule='confidence', steps=1, temperature=1e-300), dict(steps=4, schedule=COSINE | dict(eps=1e-320)),
]

@pytest.mark.parametrize('rule', ABSURD_RULES, ids=repr)
def test_a_rule_of_absurd_values_brings_nothing_back(rule, blob):
    "They are within the limits; the tokens are others"
    assert_answered(changed_file(blob, rule=rule), 'does not come back|fewer bits|temperature')

NO_HEADERS = [
    b'', b'{', b'[]', b'3', b'null', b'"a"', b'\xff', b'{"a":NaN}', b'['*10**5, b'{"a":'*10**5, b'[]'*10**5,
    b' '*2**20, b'{"a":' + b'9'*5000 + b'}', b'{"tokens":[' + b'[],'*2**17 + b'1]}',
    b'{' + b'"a":1,'*10**5 + b'"a":1}', b'{' + b','.join(b'"%x":0'%i for i in range(8*10**4)) + b'}',
]

@pytest.mark.parametrize('text', NO_HEADERS, ids=lambda o: o[:10])
def test_a_header_that_is_no_dictionary_too_deep_or_too_long_is_named(text, blob):
    assert_answered(make_file(text, words_of(blob)), 'the header')

def test_other_lengths_of_the_header_and_of_the_words_are_named(blob):
    words,right = words_of(blob),json.dumps(read_header(blob)[0]).encode()
    def answer(word, text=right, length=None, more=0):
        assert_answered(make_file(text, words+bytes(more), length), word)
    for text in (right*2, right[:-1], right+b'\0'): answer('the header', text)
    n = len(right)
    for length in (0, 1, n-4, n+4, n+len(words)+4): answer('the header', length=length)
    for length in (2**20+1, 2**31, 2**32-1): answer('the length of the header', length=length)
    answer('the length of the header', b' '*(2**20+1))
    answer('bytes after the header', length=2**20)
    for more in (1, 2, 3, 5): answer('bytes after the header', more=more)

def test_a_field_that_is_there_twice_counts_once(blob):
    "As JSON has it: the last one"
    text = json.dumps(read_header(blob)[0])
    assert decompress(MODEL, make_file(text.replace('{', '{"tokens":-1,', 1).encode(), words_of(blob)))==DATA
    twice = text[:-1]+',"tokens":-1}'
    assert_answered(make_file(twice.encode(), words_of(blob)), 'tokens in the header')

# Claims

CLAIMS = [
    dict(tokens=10**9), dict(tokens=2**24+1), dict(tokens=2**53),
    *[dict(tokens=2**24, streams=streams, context=context)
      for streams in (1, 16, 512) for context in (0, 4, 15)],
    *[dict(tokens=2**24, streams=512, rule=dict(rule=rule, steps=16)) for rule in UnmaskingRule.names],
]

@pytest.mark.parametrize('claim', CLAIMS, ids=repr)
@pytest.mark.parametrize('n_words', [0, 1, 12])
def test_claims_of_more_tokens_than_the_words_hold_end_at_once(claim, n_words, blob):
    word = 'tokens|fewer bits|does not come back'
    assert_answered(changed_file(blob, random_bytes(4*n_words), **claim), word)

def test_claims_that_the_caller_allows_end_at_once(blob):
    for tokens in (10**9, 2**53):
        claim = changed_file(blob, tokens=tokens, streams=512)
        assert_answered(claim, 'fewer bits|does not come back', most_tokens=2**53)

def test_a_file_that_claims_more_tokens_has_too_few_bits(blob):
    for more in (30, 1000, 10**6):
        with pytest.raises(EndOfBits, match='fewer bits'):
            decompress(MODEL, changed_file(blob, tokens=len(DATA)+more))
    for n in (0, 4, 8):
        cut = changed_file(blob, words_of(blob)[:n])
        with pytest.raises(EndOfBits, match='fewer bits'): decompress(MODEL, cut)

def test_other_numbers_of_tokens_and_words_are_noticed(blob):
    "Also where all tokens would come back"
    words,back = words_of(blob),'does not come back|fewer bits'
    for tokens in (0, 1, len(DATA)-1, len(DATA)+1): assert_answered(changed_file(blob, tokens=tokens), back)
    for more in (bytes(4), b'\1\0\0\0', b'\xff'*4, bytes(8), bytes(400), random_bytes(4), words):
        assert_answered(changed_file(blob, words+more), back)
    for n in range(4, len(words), 4): assert_answered(changed_file(blob, words[:-n]), back)
    assert decompress(MODEL, changed_file(blob, words))==DATA

def test_a_longer_document_than_allowed_is_an_error(blob, monkeypatch):
    "Of compression and of decompression, before any work"
    assert decompress(MODEL, blob, most_tokens=len(DATA))==DATA
    assert compress(MODEL, DATA, steps=4, most_tokens=len(DATA))==blob
    monkeypatch.setattr(*ENCODE, None)
    monkeypatch.setattr(*DECODE, None)
    for f,data in ((compress, DATA), (decompress, blob)):
        with pytest.raises(ValueError, match='most_tokens=39'): f(MODEL, data, most_tokens=len(DATA)-1)

# Fast files

def test_a_fast_file_names_its_machine_and_a_portable_one_does_not(blob, fast_blob):
    assert read_header(blob)[0]['arithmetic']=='portable 1'
    arithmetic = read_header(fast_blob)[0]['arithmetic']
    assert arithmetic.keys()=={'torch', 'machine', 'cpu', 'device', 'threads', 'outputs'}
    assert (arithmetic['torch'], arithmetic['device'])==(torch.__version__, 'cpu')

def test_a_fast_file_of_another_machine_is_rejected_before_any_decoding(fast_blob, monkeypatch):
    "The error names both machines"
    monkeypatch.setattr(*DECODE, None)
    right = read_header(fast_blob)[0]['arithmetic']
    other = changed_file(fast_blob, arithmetic=right | dict(outputs='0'*16, torch='1.2.3', cpu='AVX9'))
    with pytest.raises(ValueError, match='other last digits') as e: decompress(MODEL, other)
    for word in ('1.2.3', 'AVX9', torch.__version__, right['cpu']): assert word in str(e.value)

def test_a_fast_file_of_other_versions_comes_back_where_the_outputs_are_the_same(fast_blob):
    other = read_header(fast_blob)[0]['arithmetic'] | dict(torch='1.2.3', cpu='AVX9')
    assert decompress(MODEL, changed_file(fast_blob, arithmetic=other))==DATA

def test_a_file_that_names_another_arithmetic_never_gives_other_bytes(blob, fast_blob):
    "For so few tokens both may have the same words"
    fast = read_header(fast_blob)[0]['arithmetic']
    for file,arithmetic in ((blob, fast), (fast_blob, 'portable 1')):
        try: back = decompress(MODEL, changed_file(file, arithmetic=arithmetic))
        except ValueError as e: assert 'does not come back' in str(e) or 'fewer bits' in str(e)
        else: assert back==DATA

# Reading back

def of_other_tokens(encode): return lambda model, ids, *args: encode(model, (ids+1)%256, *args)
def without_the_last_word(encode): return lambda *args: encode(*args)[:-1]
def in_another_order(encode): return lambda model, ids, rule, *args: encode(model, ids, 'random', *args)
def in_other_arithmetic(encode):
    "Code with probabilities that are rounded to float32"
    def faulty(*args):
        with pytest.MonkeyPatch.context() as patches:
            rounding = lambda f: lambda *a: f(*a).float().double()
            plant_fault(patches, (conditionals, 'token_probs'), rounding)
            return encode(*args)
    return faulty

FAULTS = of_other_tokens, without_the_last_word, in_another_order, in_other_arithmetic

@pytest.mark.parametrize('fault', FAULTS)
@portable_and_fast
def test_a_file_that_would_not_come_back_is_not_written(fault, fast, tmp_path, monkeypatch):
    "Unless it is not read back"
    source,packed = tmp_path/'a',tmp_path/'a.bij'
    source.write_bytes(random_bytes(100))
    with monkeypatch.context() as patches:
        plant_fault(patches, ENCODE, fault)
        with pytest.raises(RuntimeError, match='does not come back; nothing was written'):
            compress_file(MODEL, source, steps=4, fast=fast)
        assert [o.name for o in tmp_path.iterdir()]==['a']
        compress_file(MODEL, source, steps=4, fast=fast, read_back=False)
    with pytest.raises(ValueError, match='a.bij: '): decompress_file(MODEL, packed, tmp_path/'b')
    assert sorted(o.name for o in tmp_path.iterdir())==['a', 'a.bij']

def test_reading_back_takes_the_options_of_compression(tmp_path):
    "The function of a rule, and the longest document"
    def even(logits, x, where): return logits-5*(torch.arange(logits.shape[1])%2)
    source = tmp_path/'a'
    source.write_bytes(DATA)
    for kwargs in (dict(adjust=even), dict(rule=UnmaskingRule('spread', 4, adjust=even))):
        compress_file(MODEL, source, force=True, **kwargs)
        assert decompress(MODEL, (tmp_path/'a.bij').read_bytes(), adjust=even)==DATA
    compress_file(MODEL, source, force=True, steps=4, most_tokens=len(DATA))
    with pytest.raises(ValueError, match='a: the number of tokens'):
        compress_file(MODEL, source, tmp_path/'b', steps=4, most_tokens=len(DATA)-1)
