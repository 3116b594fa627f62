"""Prompts and blanks meet token boundaries as in training text, and the given text always comes back."""
import json
from collections import Counter
from itertools import product
import numpy as np
import pytest, tokenizers, torch
from hypothesis import given, settings, strategies as st
from bijdiff.data.corpora import pydoc_corpus
from bijdiff.data.subwords import BPETokenizer, HubTokenizer, pack_tokenizer
from bijdiff.data.tokens import ByteTokenizer, CharTokenizer, whole_characters
from bijdiff.diffusion.corruption import Corruption
from bijdiff.writing import _templates, write_texts
from bijdiff.likelihood.exact import log_prob
from bijdiff.sampling.generate import infill_template, sample, split_blanks
from bijdiff.sampling.prompts import heal_blanks, heal_prompt, tokenisations
from bijdiff.testing import chi_square, tiny_denoiser

BPE = BPETokenizer.train(pydoc_corpus()[:100_000], 512)

def model_of(tokenizer, seq_len=64, **kwargs):
    "A model with random weights"
    model = tiny_denoiser(tokenizer.vocab_size, seq_len, **kwargs)
    model.tokenizer = tokenizer
    return model

MODEL = model_of(BPE)
PROMPTS = [
    '', ' ', '   ', 'The ', 'The  ', 'The   ', 'The\n', 'The\n\n', 'The \n ', 'The\t', 'def f(x):\n    ',
    'val', 'The valu', 'The value', 'The value.', 'foo(', 'x = "', "don'", "don't", 'a_', '__', '3', '3.1',
    'été', 'ét', 'naïve ', '日本 ', '👩\u200d👧', '\ufffd', 'a\u3000', '\x00', '\r\n', 'The “quoted” ',
]

def texts_of(model, templates, **kwargs):
    "Texts that a model writes into templates"
    written = sample(model, len(templates), steps=4, template=templates, **kwargs)
    return [model.tokenizer.decode(ids) for ids in written]

# Given text comes back

@pytest.mark.parametrize('prompt', PROMPTS)
def test_a_text_begins_with_its_prompt(prompt):
    for text in texts_of(MODEL, heal_prompt(MODEL, prompt, 8)): assert text.startswith(prompt)

@settings(max_examples=60, deadline=None)
@given(st.text(max_size=12) | st.text(" \n\tabeht.,('_é日", max_size=12))
def test_a_text_begins_with_any_prompt(prompt):
    for text in texts_of(MODEL, heal_prompt(MODEL, prompt, 3)): assert text.startswith(prompt)

def parts_come_back(text, parts):
    "True if a text is the parts in order, with something between each two"
    at = 0
    for k,part in enumerate(parts[:-1]):
        at = text.find(part, at) if k else 0 if text.startswith(part) else -1
        if at<0: return False
        at += len(part)
    return text.endswith(parts[-1])

INFILLS = [
    '____', 'The ____ is returned.', 'The ____', '____ is', 'a____b', 'The val____ of', '____ ____',
    'f(____)', 'The ____ is ___ a ______.', '\n____\n', 'été ____ naïve', '“____”', 'a  ____  b', 'x____{2}y',
    'The ____{7} is', '日____本', 'a\n\n___\n\nb',
]

@pytest.mark.parametrize('text', INFILLS)
def test_text_around_blanks_comes_back(text):
    parts,_ = split_blanks(MODEL, text)
    for written in texts_of(MODEL, heal_blanks(MODEL, text, 8)): assert parts_come_back(written, parts)

@pytest.mark.parametrize('tokenizer', [CharTokenizer.train('The cat_ é\n'), ByteTokenizer()])
def test_characters_and_bytes_keep_their_tokens(tokenizer):
    model = model_of(tokenizer, 24)
    for prompt in ('', 'The ', 'The c', 'é'):
        ids = tokenizer.encode(prompt)
        assert heal_prompt(model, prompt, 2).tolist()==[ids + [model.mask_id]*(24-len(ids))]*2
    text = 'The ____ c___t'
    assert heal_blanks(model, text, 2).tolist()==[infill_template(model, text)]*2

@pytest.mark.parametrize('noise', [(.5, .5), (.5, 0, .5)], ids=['substitution', 'deletion'])
def test_other_noise_keeps_the_tokens_of_the_prompt(noise):
    model = model_of(BPE, noise=Corruption(BPE.vocab_size, *noise))
    ids = BPE.encode('The ')
    assert heal_prompt(model, 'The ')[0].tolist()==ids + [model.mask_id]*(64-len(ids))
    assert heal_blanks(model, 'The ____ is')[0].tolist()==infill_template(model, 'The ____ is')

def test_a_blank_has_as_many_tokens_as_underscores():
    "A space before it belongs to them; {n} is another number, in all vocabularies"
    n_masks = lambda text, model=MODEL: infill_template(model, text).count(model.mask_id)
    assert [n_masks(f'The {blank} is') for blank in ('___', '_____', '____{2}', '____{12}')]==[3, 5, 2, 12]
    n_given = len(BPE.encode('The'))+len(BPE.encode(' is'))
    assert heal_blanks(MODEL, 'The ____ is').shape[1]==n_given+4
    for tokenizer in (CharTokenizer('abc'), ByteTokenizer()):
        model = model_of(tokenizer, 20)
        assert n_masks('a____b', model)==18 and n_masks('a____{5}b', model)==5
        assert split_blanks(model, 'a____{5}b____c')[1]==[5, 12]

@pytest.mark.parametrize('text, name', [
    ('a ____{0}', 'the number of ____{0}'), ('a ____{999999} b', 'room'), ('a '+'_'*80, 'room'),
    ('a', 'text')])
def test_blanks_without_room_are_rejected(text, name):
    for make in (infill_template, heal_blanks):
        with pytest.raises(ValueError, match=name): make(MODEL, text)

# As in training

def test_a_word_after_a_space_is_one_token_with_its_space():
    "No text goes on after a lone space but with white space"
    for text in texts_of(MODEL, heal_prompt(MODEL, 'The ', 50), rule='left_to_right'): assert text[:4]=='The '
    for ids in heal_prompt(MODEL, 'The ', 50):
        written = BPE.decode(ids[ids!=MODEL.mask_id])
        assert BPE.encode(written)==ids[ids!=MODEL.mask_id].tolist()
        assert written.startswith('The ')
    assert len({tuple(ids.tolist()) for ids in heal_prompt(MODEL, 'The ', 50)})>20

def test_the_seed_decides_alone():
    a,b,c = (heal_prompt(MODEL, 'The ', 20, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c)

# The distribution, against all sequences of a small vocabulary

SMALL = ['a', 'b', 'Ġ', 'Ċ', 'ab', 'Ġa', 'ĠĠ', 'Ġab']
MERGES = [('a', 'b'), ('Ġ', 'a'), ('Ġ', 'Ġ'), ('Ġ', 'ab')]

def small_tokenizer():
    "Eight byte pairs over two letters, a space and a line break"
    t = tokenizers.Tokenizer(tokenizers.models.BPE({s:i for i,s in enumerate(SMALL)}, MERGES))
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = tokenizers.decoders.ByteLevel()
    return HubTokenizer(pack_tokenizer(json.loads(t.to_str())))

def covering(ids, prompt, tokenizer):
    "The first ids whose text begins with a prompt"
    return next(ids[:k] for k in range(1, len(ids)+1) if tokenizer.decode(list(ids[:k])).startswith(prompt))

@pytest.mark.parametrize('prompt', ['a ', 'a', 'b  ', ' ', 'ba', 'b\n', 'a b '])
def test_ways_are_those_of_all_texts(prompt):
    "Of all texts of up to five more characters"
    tokenizer = small_tokenizer()
    ends = [''.join(end) for k in range(6) for end in product('ab \n', repeat=k)]
    expected = {covering(tuple(tokenizer.encode(prompt+end)), prompt, tokenizer) for end in ends}
    ids,ways = tokenisations(tokenizer, prompt)
    assert {(*ids, *way) for way in ways or [()]}==expected

@pytest.mark.parametrize('prompt', ['a ', 'b  ', 'ba'])
def test_the_distribution_is_the_conditional_one_of_all_sequences(prompt):
    "P(way) = sum of P(x) over all sequences x that begin with the way, of those that begin with any way"
    tokenizer,L = small_tokenizer(),4
    model = model_of(tokenizer, L)
    x = torch.tensor([*product(range(len(SMALL)), repeat=L)])
    p = log_prob(model, x).exp().numpy()
    ids,ways = tokenisations(tokenizer, prompt)
    ways = [(*ids, *way) for way in ways]
    first = [next((i for i,way in enumerate(ways) if tuple(o[:len(way)])==way), -1) for o in x.tolist()]
    expected = np.array([p[np.array(first)==i].sum() for i in range(len(ways))])
    drawn = heal_prompt(model, prompt, 20_000).tolist()
    found = Counter(tuple(i for i in o if i!=model.mask_id) for o in drawn)
    counts = np.array([found[way] for way in ways])
    assert counts.sum()==20_000 and chi_square(counts, expected/expected.sum())>1e-3

# Tokenizers of other people

def metaspace():
    "Unigrams with spaces before words, which decoding strips from the first"
    pieces = [('<unk>', 0.), *((c, -3.) for c in '▁abcehst'), ('▁the', -2.), ('▁cat', -2.), ('▁c', -2.5)]
    t = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0))
    t.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    t.decoder = tokenizers.decoders.Metaspace()
    return t

def lower_words():
    "Parts of words in small letters"
    vocab = ['[UNK]', 'the', 'cat', '##s', '##ch', 'c']
    vocab = {w:i for i,w in enumerate(vocab)}
    t = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token='[UNK]'))
    t.normalizer = tokenizers.normalizers.BertNormalizer()
    t.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    t.decoder = tokenizers.decoders.WordPiece()
    return t

@pytest.mark.parametrize('make', [metaspace, lower_words])
@pytest.mark.parametrize('prompt', ['', 'the', 'the cat', 'the c', 'the ', 'The cat ', 'zzz'])
def test_what_a_tokenizer_gives_back_of_a_prompt_begins_the_text(make, prompt):
    "Or more than that of the prompt, such as a space at its end"
    model = model_of(HubTokenizer(pack_tokenizer(json.loads(make().to_str()))), 12)
    back = model.tokenizer.decode(model.tokenizer.encode(prompt))
    for text in texts_of(model, heal_prompt(model, prompt, 8)): assert text.startswith((prompt, back))
    for ids in heal_blanks(model, prompt+'____ cat', 2): assert (ids==model.mask_id).any()

@pytest.mark.parametrize('tokenizer', [
    BPE, ByteTokenizer(), CharTokenizer('aé日 \ufffd'), small_tokenizer(),
    HubTokenizer(pack_tokenizer(json.loads(metaspace().to_str())))],
    ids=['bpe', 'byte', 'char', 'small', 'metaspace'])
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_whole_characters_are_a_partition_of_the_tokens(tokenizer, seed):
    "Of any ids, masks among them; and of a text they are its characters"
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, tokenizer.vocab_size+1, (12,), generator=g)
    runs = [*whole_characters(tokenizer, ids)]
    assert sum((run for run,_ in runs), [])==ids.tolist() and all(len(run)<=4 for run,_ in runs)
    text = tokenizer.decode(ids[ids<tokenizer.vocab_size])
    again = tokenizer.encode(text) if isinstance(tokenizer, (CharTokenizer, ByteTokenizer)) else None
    if again is not None: assert ''.join(part for _,part in whole_characters(tokenizer, again))==text

def test_runs_of_byte_pairs_make_the_characters_of_a_text():
    "Whose bytes are tokens of their own, as the vocabulary has seen none of them"
    tokenizer = BPETokenizer.train('the cat sat on the mat '*9, 270)
    text = 'the na\u00efve cat \u20ac5 \u2603 \U0001f600 sat'
    assert ''.join(part for _,part in whole_characters(tokenizer, tokenizer.encode(text)))==text

def test_a_byte_of_no_character_stands_alone():
    runs = whole_characters(ByteTokenizer(), [227, 129, 97, 128])
    assert [text for _,text in runs]==['\ufffd', '\ufffd', 'a', '\ufffd']

def test_a_space_that_is_written_between_two_tokens_belongs_to_the_second():
    tokenizer = HubTokenizer(pack_tokenizer(json.loads(metaspace().to_str())))
    assert [text for _,text in whole_characters(tokenizer, tokenizer.encode('the cat'))]==['the', ' cat']

# Commands

def test_the_command_gives_back_prompt_and_text_around_blanks(tmp_path, capsys):
    MODEL.float().save_pretrained(tmp_path)
    MODEL.double()
    options = dict(prompt='The '), dict(prompt='The valu', rule='spread'), dict(infill='The ____{3} is')
    for kwargs in options:
        write_texts(tmp_path, n=3, steps=4, **kwargs)
        texts = capsys.readouterr().out
        assert texts.count('The')>=3 and texts.startswith(kwargs.get('prompt', 'The'))
        if 'infill' in kwargs: assert texts.rstrip('\n').endswith(' is')

def test_prompts_of_a_vocabulary_with_an_end_keep_their_tokens():
    "As pairs of prompts and answers are trained with them"
    model = model_of(BPE.with_eod())
    ids = BPE.encode('The ')
    assert _templates(model, 2, 'The ', None)[:,:len(ids)].tolist()==[ids]*2
    assert not (_templates(MODEL, 9, 'The ', None)[:,len(ids)-1]==ids[-1]).all()
