"""Tokenizers of corpora: ends of documents, many texts at once, training in bounded memory, and those of
other people, read from files."""
import base64, json, pickle, random, subprocess, sys, time
from copy import deepcopy
import numpy as np
import pytest, tokenizers
from huggingface_hub.utils import LocalEntryNotFoundError
from hypothesis import given, settings, strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from bijdiff.data.corpora import pydoc_corpus
from bijdiff.data.tokens import ByteTokenizer, CharTokenizer, cut_text, END_CHAR, MASK_CHAR
from bijdiff.data.subwords import BPETokenizer, get_tokenizer, HubTokenizer, load_tokenizer, pack_tokenizer
from bijdiff.data.subwords import tokenizer_from_dict, train_tokenizer
from bijdiff.likelihood.codec import compress, decompress
from bijdiff.model.denoiser import BijectiveDenoiser, DenoiserConfig
from bijdiff.testing import random_weights

TEXT = 'the cat sat on the mat, and the dog ran to the other cat\n'*30
PYDOC_LINE = pydoc_corpus()[:300_000].replace('\n', ' ')
ENDS = ['<|endoftext|>', '</s>', '<eos>', '<|end_of_text|>', '[SEP]']
any_text = st.text(max_size=60) | st.text(' \n\r\t\x1c\x85\u3000\'sa1.,é中', max_size=60)

@pytest.fixture(scope='module')
def bpe(): return BPETokenizer.train(TEXT+pydoc_corpus()[:50_000], 600)

# Tokenizers of other people

def gpt2_like():
    "Byte pairs with an end, as those of GPT-2"
    t = tokenizers.Tokenizer.from_str(BPETokenizer.train(TEXT, 300).json)
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    t.add_special_tokens(['<|endoftext|>'])
    return t

def t5_like():
    "Unigrams that have the end among their pieces, as those of T5"
    letters = [(c, -3.) for c in '▁abcdehmnorst</>']
    pieces = [('<pad>', 0.), ('</s>', 0.), ('<unk>', 0.), *letters, ('▁the', -2.)]
    t = tokenizers.Tokenizer(models.Unigram(pieces, 2))
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    t.decoder = decoders.Metaspace()
    t.add_special_tokens(['<pad>', '</s>', '<unk>'])
    t.post_processor = processors.TemplateProcessing(single='$A </s>', special_tokens=[('</s>', 1)])
    return t

def bert_like():
    "Parts of words, in small letters, between two special tokens, cut off and filled up"
    vocab = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', 'the', 'cat', '##s', 'sep', '[', ']']
    t = tokenizers.Tokenizer(models.WordPiece({w:i for i,w in enumerate(vocab)}, unk_token='[UNK]'))
    t.normalizer = normalizers.BertNormalizer()
    t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    t.decoder = decoders.WordPiece()
    t.add_special_tokens(['[PAD]', '[UNK]', '[CLS]', '[SEP]'])
    t.post_processor = processors.BertProcessing(('[SEP]', 3), ('[CLS]', 2))
    t.enable_truncation(2)
    t.enable_padding(length=9)
    return t

def words():
    "Words, the one for unknown words among them, with a hole in the ids and without an end"
    t = tokenizers.Tokenizer(models.WordLevel({'the':0, 'cat':1, '<eos>':7}, '<eos>'))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.add_special_tokens(['<eos>'])
    return t

def packed_gpt2(): return pack_tokenizer(json.loads(gpt2_like().to_str()))

OTHERS = dict(gpt2=gpt2_like, t5=t5_like, bert=bert_like, words=words)

@pytest.fixture(params=OTHERS)
def other(request, tmp_path):
    "A tokenizer of the library, and ours of its file"
    t = OTHERS[request.param]()
    t.save(str(tmp_path/'tokenizer.json'))
    return t,load_tokenizer(tmp_path)

def ours(): return [CharTokenizer.train(TEXT), ByteTokenizer(), BPETokenizer.train(TEXT, 300)]

# Ends of documents

@pytest.mark.parametrize('tok', ours(), ids=lambda t: t.kind)
def test_the_end_of_a_document_is_one_more_clean_token_and_the_last(tok):
    docs = tok.with_eod()
    assert tok.eod_id is None and docs.eod_id==tok.vocab_size and docs.vocab_size==tok.vocab_size+1
    assert docs.with_eod() is docs and docs!=tok and docs.fingerprint!=tok.fingerprint
    assert docs.decode([*docs.encode('the'), docs.eod_id, docs.vocab_size, docs.eod_id])=='the␄░␄'
    assert docs.encode(TEXT)==tok.encode(TEXT)

@pytest.mark.parametrize('tok', ours(), ids=lambda t: t.kind)
def test_a_dictionary_without_an_end_is_that_of_older_files(tok):
    assert 'eod' not in tok.to_dict() and tok.with_eod().to_dict()==dict(tok.to_dict(), eod=True)
    for t in (tok, tok.with_eod()):
        again = tokenizer_from_dict(json.loads(json.dumps(t.to_dict())))
        assert again==t and again.eod_id==t.eod_id and again.fingerprint==t.fingerprint

@pytest.mark.parametrize('text', [END_CHAR, MASK_CHAR, *ENDS, 'a␄b'])
def test_no_text_is_encoded_as_the_end_of_a_document(text, bpe):
    for tok in (CharTokenizer.train(TEXT+text), ByteTokenizer(), bpe):
        docs = tok.with_eod()
        assert docs.eod_id not in docs.encode(text) and docs.decode(docs.encode(text))==text

@pytest.mark.parametrize('eod', [1, 'yes', None])
@pytest.mark.parametrize('tok', ours(), ids=lambda t: t.kind)
def test_an_end_that_is_not_a_bool_is_an_error(tok, eod):
    fields = {k:getattr(tok, k) for k in tok.fields}
    with pytest.raises(ValueError, match='eod'): type(tok)(**fields, eod=eod)

# Many texts at once

@settings(max_examples=60, deadline=None)
@given(texts=st.lists(any_text, max_size=4))
def test_many_texts_give_the_ids_of_each(texts):
    for tok in (CharTokenizer.train(''.join(texts)+'a'), ByteTokenizer(), BPETokenizer.train(TEXT, 300)):
        for t in (tok, tok.with_eod()):
            arrays = t.encode_batch(texts)
            assert [a.tolist() for a in arrays]==[*map(t.encode, texts)]
            assert all(a.dtype==t.dtype==np.uint16 for a in arrays)

def test_ids_above_16_bits_have_32():
    large = CharTokenizer(''.join(map(chr, [*range(0xd000), *range(0xe000, 0xe000+2**16-0xd000)])))
    assert (large.dtype,large.with_eod().dtype)==(np.uint16,np.int32)
    assert large.with_eod().encode_batch(['\ue000'])[0].dtype==np.int32

def test_characters_are_those_of_the_dictionary_and_an_unknown_one_is_named_with_its_place():
    text = 'ab'*2**20
    tok = CharTokenizer('ab')
    assert (tok.encode_batch([text])[0]==np.tile([0, 1], 2**20)).all()
    with pytest.raises(ValueError, match=f"'☃' at position {2**21}"): tok.encode(text+'☃')
    with pytest.raises(ValueError, match="'☃'.*no �"): tok.encode_batch(['a', '☃'], replace=True)
    assert CharTokenizer('a�').encode_batch(['b\ud800a'], replace=True)[0].tolist()==[1, 1, 0]

@pytest.mark.parametrize('texts', [None, 'abc', ['a', 3], [b'a'], ('a',)])
def test_texts_that_are_not_a_list_of_strings_are_an_error(texts):
    for tok in ours():
        with pytest.raises(ValueError, match='texts'): tok.encode_batch(texts)

WITH_SPACES = BPETokenizer.train(TEXT*2+' \n \n\r\n\'s a1.,', 400)

@settings(max_examples=300, deadline=None)
@given(text=any_text, size=st.integers(1, 20))
def test_a_text_cut_at_ends_of_words_keeps_its_tokens(text, size):
    pieces = [*cut_text(text, size, 10**6)]
    encode = WITH_SPACES.library.encode
    assert ''.join(pieces)==text
    assert [i for p in pieces for i in encode(p).ids]==encode(text).ids

def test_pieces_are_as_long_as_asked_for():
    pieces = [*cut_text('abc '*100+'d'*100, 10, 30)]
    assert {*map(len, pieces[:30])}<=set(range(10, 15)) and max(map(len, pieces))<=30
    assert [*cut_text('', 10, 30)]==[]

def test_a_long_text_has_the_tokens_that_the_library_gives(bpe):
    text = pydoc_corpus()*2
    assert len(text)>2**19 and bpe.encode(text)==bpe.library.encode(text).ids

def test_a_word_of_megabytes_is_encoded_and_comes_back(bpe):
    text = ''.join(random.Random(0).choices('abc', k=2**20))
    assert bpe.decode(bpe.encode(text))==text

def test_a_lone_surrogate_is_an_error(bpe):
    with pytest.raises(ValueError, match='surrogates'): bpe.encode_batch(['a', 'b\udcff'])

# Training

def plainly_trained(text, vocab_size):
    "JSON of the vocabulary that the library makes of the lines of a text"
    t = tokenizers.Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator(text.splitlines(keepends=True), trainer)
    return t.to_str()

@pytest.mark.parametrize('text', [TEXT, pydoc_corpus(), PYDOC_LINE, 'é\r\n\r\nb'])
def test_the_vocabulary_of_an_ordinary_text_is_that_of_the_library(text):
    assert BPETokenizer.train(text, 700).json==plainly_trained(text, 700)

def test_a_tokenizer_is_trained_on_many_texts_as_on_one():
    text = pydoc_corpus()[:100_000]
    lines = text.splitlines(keepends=True)
    assert train_tokenizer('bpe', iter(lines), 500)==BPETokenizer.train(text, 500)
    assert train_tokenizer('char', iter(lines))==CharTokenizer.train(text)==get_tokenizer('char', text)
    assert train_tokenizer('byte', iter(lines))==ByteTokenizer()
    assert train_tokenizer('bpe', [TEXT])==BPETokenizer.train(TEXT)

def test_words_beyond_the_bound_are_left_out(monkeypatch):
    "The vocabulary is that of the text without the words that come after it"
    known,new = 'the cat sat\n'*9,'an owl and the cat\n'*9
    monkeypatch.setattr('bijdiff.data.subwords._bounded.__defaults__', (10,))
    assert BPETokenizer.train(known+new, 270)==BPETokenizer.train(known+' the cat\n'*9, 270)
    assert 'owl' not in BPETokenizer.train(known+new, 300).json

@pytest.mark.parametrize('args, name', [
    (('word', ['a']), 'tokenizer'), (('hub', ['a']), 'tokenizer'), (('char', ['a'], 300), 'vocab_size'),
    (('bpe', ['a'], 255), 'vocab_size'), (('bpe', ['a'], 0), 'vocab_size')])
def test_a_wrong_argument_of_the_training_is_named(args, name):
    with pytest.raises(ValueError, match=name): train_tokenizer(*args)

def test_an_error_of_the_corpus_ends_the_training():
    def texts():
        yield 'the cat'
        raise OSError('the disk is gone')
    with pytest.raises(OSError, match='the disk is gone'): train_tokenizer('bpe', texts(), 300)

def test_a_line_of_320_000_letters_trains_in_seconds():
    text = ''.join(random.Random(0).choices('abcdefghijklmnopqrstuvwxyz', k=320_000))
    start = time.perf_counter()
    BPETokenizer.train(text)
    assert time.perf_counter()-start<10

def run_python(src):
    "Result of a program in a process of its own"
    return subprocess.run([sys.executable, '-c', src], capture_output=True, text=True)

interrupted = """
import os, random, signal, threading, time
from bijdiff.data.subwords import BPETokenizer
text = ''.join(random.Random(0).choices('abcdefghijklmnopqrstuvwxyz', k=3_000_000))
tokenizer = BPETokenizer.train('the cat')
sent = []
def stop():
    sent.append(time.time())
    os.kill(os.getpid(), signal.SIGINT)
threading.Timer(.7, stop).start()
try: {work}
except KeyboardInterrupt: print(time.time()-sent[0])
"""

@pytest.mark.parametrize('work', ['BPETokenizer.train(text)', 'tokenizer.encode_batch([text]*100)'])
def test_an_interrupt_is_heard(work):
    done = run_python(interrupted.format(work=work))
    assert done.returncode==0 and float(done.stdout)<5, done.stderr

measured = """
import random, sys, threading, time
from bijdiff.data.subwords import BPETokenizer, train_tokenizer
numbers = random.Random(0)
def anonymous(): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon'))
text = ' '.join('%07x' % numbers.randrange(2**28) for _ in range(2**20))
tokenizer = BPETokenizer.train(text[:2**16], 2000)
is_done,seen = threading.Event(),[]
def watch():
    while not is_done.wait(.01): seen.append(anonymous())
threading.Thread(target=watch).start()
before = anonymous()
try: {work}
finally: is_done.set()
print((max(seen)-before)//1024)
"""

@pytest.mark.skipif(sys.platform!='linux', reason='it reads /proc')
@pytest.mark.parametrize('work, most', [
    ("train_tokenizer('bpe', [text], 16384)", 400), ('tokenizer.encode_batch([text])', 100)])
def test_memory_is_bounded_for_distinct_words(work, most):
    done = run_python(measured.format(work=work))
    assert done.returncode==0 and int(done.stdout)<most, (done.stdout,done.stderr)

# Tokenizers from files

def test_a_tokenizer_of_other_people_gives_the_ids_of_its_words_alone(other):
    theirs,tok = other
    theirs.no_truncation()
    theirs.no_padding()
    for text in ('the cat', 'the cats '*40, ''):
        assert tok.encode(text)==theirs.encode(text, add_special_tokens=False).ids
        assert tok.encode_batch([text, text])[1].tolist()==tok.encode(text)

def test_the_end_is_that_of_the_tokenizer_or_one_more_id(other):
    theirs,tok = other
    ends = {end for end in ENDS if theirs.token_to_id(end) is not None}
    is_unknown = theirs.token_to_id('the')==0                       # its <eos> stands for unknown words
    expected = 8 if is_unknown else theirs.token_to_id(*ends)
    assert tok.eod_id==expected and tok.vocab_size==max(theirs.get_vocab().values())+1+is_unknown
    assert tok.decode([tok.eod_id, tok.vocab_size])=='␄░'

def test_the_text_of_a_special_token_is_ordinary_text(other):
    theirs,tok = other
    special = {i for i,t in theirs.get_added_tokens_decoder().items() if t.content not in ('[UNK]', '<unk>')}
    if tok.eod_id==8: special = set()
    inside = 'the </s> cat', '</s></s>', '<|endoftext|> the cat<|endoftext|>'
    for text in (*ENDS, *inside, '<pad>', '[CLS]', '</S>'):
        for ids in (tok.encode(text), deepcopy(tok).encode(text)):
            assert not {tok.eod_id, *special} & {*ids}, text

def test_the_text_of_a_special_token_has_the_ids_of_any_text(tmp_path):
    plain = BPETokenizer.train(TEXT+'<|endoftext|>\n'*50, 320)
    t = tokenizers.Tokenizer.from_str(plain.json)
    t.add_special_tokens(['<|endoftext|>'])
    t.save(str(tmp_path/'tokenizer.json'))
    text = 'the cat<|endoftext|> the'
    assert load_tokenizer(tmp_path).encode(text)==plain.encode(text)

def test_a_tokenizer_of_other_people_is_pickled_and_comes_from_its_dictionary(other):
    _,tok = other
    for again in (pickle.loads(pickle.dumps(tok)), deepcopy(tok), tokenizer_from_dict(tok.to_dict())):
        assert again==tok and again.eod_id==tok.eod_id and again.encode('the </s>')==tok.encode('the </s>')

def test_the_end_is_named_by_the_configuration(tmp_path):
    t = gpt2_like()
    t.add_special_tokens(['<|im_end|>'])
    t.save(str(tmp_path/'tokenizer.json'))
    for own in ('<|im_end|>', dict(content='<|im_end|>')):
        (tmp_path/'tokenizer_config.json').write_text(json.dumps(dict(eos_token=own)))
        assert load_tokenizer(tmp_path).eod_id==t.token_to_id('<|im_end|>')
    (tmp_path/'tokenizer_config.json').write_text(json.dumps(dict(eos_token='<none>')))
    assert load_tokenizer(str(tmp_path/'tokenizer.json')).eod_id==t.token_to_id('<|endoftext|>')

def test_long_texts_are_cut_only_for_the_words_of_byte_pairs(tmp_path):
    for make,in_pieces in ((gpt2_like, True), (t5_like, False), (bert_like, False)):
        make().save(str(tmp_path/'tokenizer.json'))
        tok = load_tokenizer(tmp_path)
        text = 'the cat '*20_000
        assert tok.in_pieces==in_pieces and len(tok.encode(text))>=len(text)/8

def test_pairs_become_strings_unless_a_token_has_a_space(tmp_path):
    t = tokenizers.Tokenizer(models.BPE({'a':0, ' ':1, 'a ':2, 'aa':3}, [('a', ' '), ('a', 'a')]))
    t.save(str(tmp_path/'tokenizer.json'))
    assert load_tokenizer(tmp_path).encode('aaa ')==t.encode('aaa ').ids
    gpt2_like().save(str(tmp_path/'tokenizer.json'))
    assert load_tokenizer(tmp_path).encode(TEXT)==gpt2_like().encode(TEXT).ids

def test_a_tokenizer_with_as_many_pairs_as_those_of_large_models_is_saved(tmp_path):
    "300,000 pairs in brackets are more than a file of ours may have"
    letters = [*map(chr, range(0x4e00, 0x4e00+550))]
    pairs = [(a, b) for a in letters for b in letters][:300_000]
    vocab = {w:i for i,w in enumerate([*letters, *map(''.join, pairs)])}
    tokenizers.Tokenizer(models.BPE(vocab, pairs)).save(str(tmp_path/'tokenizer.json'))
    tok = load_tokenizer(tmp_path)
    assert len(json.dumps(tok.to_dict()))<2**23 and tok.encode('一丁')==[vocab['一丁']]

SIZES = dict(seq_len=16, d_model=8, n_heads=2, n_layers=1)

WITH_ENDS = [CharTokenizer.train(TEXT).with_eod(), ByteTokenizer(True),
             HubTokenizer(packed_gpt2(), '<|endoftext|>')]

@pytest.mark.parametrize('tok', WITH_ENDS, ids=lambda t: t.kind)
def test_files_come_back_from_a_model_with_an_end_of_documents(tok, tmp_path):
    "The saved model carries the tokenizer, and its codec never needs the end"
    model = random_weights(BijectiveDenoiser(DenoiserConfig(tok.vocab_size, **SIZES)), .3).eval()
    model.tokenizer = tok
    again = BijectiveDenoiser.from_pretrained(model.save_pretrained(tmp_path))
    data = TEXT[:50].encode() if tok.kind!='byte' else bytes(range(256))
    assert again.tokenizer==tok and again.tokenizer.eod_id==tok.eod_id
    assert decompress(again, compress(model, data))==data
    assert load_tokenizer(tmp_path)==tok

# Bad files

def written(folder, content):
    (folder/'tokenizer.json').write_bytes(content)
    return folder

BAD = {
    'empty': b'', 'no JSON': b'{"version"', 'a list': b'[]', 'no model': b'{"version":"1.0"}',
    'another model': b'{"version":"1.0","model":{"type":"Nothing"}}',
    'deep': b'{"a":'*99+b'1'+b'}'*99, 'not UTF-8': b'{"\xff":1}',
    'wrong type': json.dumps(dict(json.loads(BPETokenizer.train('a').json), added_tokens=[3])).encode(),
    'our kind, damaged': b'{"kind":"char","chars":"aa"}', 'a future kind': b'{"kind":"x"}'}

@pytest.mark.parametrize('content', BAD.values(), ids=BAD)
def test_a_damaged_tokenizer_is_an_error(content, tmp_path):
    with pytest.raises(ValueError): load_tokenizer(written(tmp_path, content))

def test_a_tokenizer_that_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match='tokenizer.json'): load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match='none.json'): load_tokenizer(tmp_path/'none.json')
    def offline(*args): raise ConnectionError
    monkeypatch.setattr('huggingface_hub.hf_hub_download', offline)
    with pytest.raises(FileNotFoundError, match='some/model.*ConnectionError'): load_tokenizer('some/model')
    with pytest.raises(ValueError, match='name'): load_tokenizer('')

def test_a_tokenizer_is_downloaded_by_name(tmp_path, monkeypatch):
    gpt2_like().save(str(tmp_path/'tokenizer.json'))
    config = tmp_path/'tokenizer_config.json'
    def download(name, file):
        if not (tmp_path/file).exists(): raise LocalEntryNotFoundError(file)
        return str(tmp_path/file)
    monkeypatch.setattr('huggingface_hub.hf_hub_download', download)
    assert load_tokenizer('gpt2')==load_tokenizer(tmp_path)
    config.write_text('{"eos_token": "the"}')
    assert load_tokenizer('gpt2')==load_tokenizer(tmp_path)

def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr('bijdiff.data.subwords._most_json', 1000)
    gpt2_like().save(str(tmp_path/'tokenizer.json'))
    with pytest.raises(ValueError, match='the size of'): load_tokenizer(tmp_path)

def test_a_panic_of_the_library_is_an_error():
    described = json.loads(gpt2_like().to_str())
    charsmap = base64.b64encode(b'\4\0\0\0abcdefgh').decode()
    described['normalizer'] = dict(type='Precompiled', precompiled_charsmap=charsmap)
    tok = HubTokenizer(pack_tokenizer(described))
    with pytest.raises(ValueError, match='a text'): tok.encode('the cat')

@pytest.mark.parametrize('vocab', [{}, {'a':2**31-1, '?':0}])
def test_a_tokenizer_without_tokens_or_with_billions_is_an_error(vocab):
    described = json.loads(tokenizers.Tokenizer(models.WordLevel({'a':0}, '?')).to_str())
    described['model']['vocab'] = vocab
    with pytest.raises(ValueError, match='the number of ids'): HubTokenizer(pack_tokenizer(described))

@pytest.mark.parametrize('packed', ['', 'abc!', 'YWJj', packed_gpt2()[:-8], None, 3])
def test_a_packed_tokenizer_that_is_damaged_is_an_error(packed):
    with pytest.raises(ValueError, match='packed'): HubTokenizer(packed)

@pytest.mark.parametrize('eod', ['nothing', '', None, 3])
def test_an_end_that_is_not_a_token_is_an_error(eod):
    with pytest.raises(ValueError, match='eod'): HubTokenizer(packed_gpt2(), eod)

def test_a_tokenizer_that_would_unpack_to_gigabytes_is_an_error(monkeypatch):
    monkeypatch.setattr('bijdiff.data.subwords._most_json', 1000)
    with pytest.raises(ValueError, match='packed'): HubTokenizer(packed_gpt2())
