"Measures of texts: words, n-grams and variety against counts by hand, and perplexity under another model."
import importlib.util, math, random, re
from collections import Counter
from types import SimpleNamespace
import pytest, torch
from bijdiff import reports
from bijdiff.data.loaders import text_dls
from bijdiff.diffusion.corruption import Corruption
from bijdiff.writing import write_texts
from bijdiff.likelihood import quality as quality_module
from bijdiff.likelihood.quality import CharNGrams, distinct_ngrams, even_chunks, Judge, load_judge_tokenizer
from bijdiff.likelihood.quality import print_quality, ratio_estimate, repetition, shuffled_texts
from bijdiff.likelihood.quality import TextQuality, word_entropy
from bijdiff.reports import _print_continued, _print_infill, _print_samples, _print_text_quality, _writing
from bijdiff.sampling.generate import sample
from bijdiff.testing import tiny_denoiser

REFERENCE = 'The cat sat on the mat. The dog, too, sat on it; a cat is no dog.'
TEXTS = ['A cat sat on the dog', 'xx the zebra and the mat', 'dog cat']

# Ratios

def test_the_error_of_a_ratio_is_that_of_many_repetitions():
    "The spread of the ratio over independent samples of 50 texts of random sizes"
    rng = random.Random(0)
    def draw():
        sizes = [rng.randint(5, 30) for _ in range(50)]
        rates = [rng.choice((.2, .6)) for _ in sizes]
        return ratio_estimate([sum(rng.random()<p for _ in range(n)) for n,p in zip(sizes, rates)], sizes)
    draws = [draw() for _ in range(400)]
    means = torch.tensor([o.mean for o in draws])
    ses = torch.tensor([o.se for o in draws])
    assert means.mean().item()==pytest.approx(.4, abs=.01)
    assert ses.mean().item()==pytest.approx(means.std().item(), rel=.1)

def test_one_text_has_no_error_and_nothing_has_no_ratio():
    assert ratio_estimate([1], [2])[0]==.5 and math.isnan(ratio_estimate([1], [2]).se)
    assert math.isnan(ratio_estimate([0, 0], [0, 0]).mean)

# n-grams

def slow_prob(text, before, char, order):
    "Witten-Bell by its formula, from counts of overlapping occurrences in the text"
    vocabulary = len(set(text))+1
    def after(history):
        return Counter(text[i+len(history)] for i in range(len(text)-len(history))
                       if text.startswith(history, i))
    def prob(history):
        shorter = prob(history[1:]) if history else 1/vocabulary
        seen = after(history)
        if not seen: return shorter
        return (seen[char]+len(seen)*shorter)/(seen.total()+len(seen))
    return prob(before[max(len(before)-order+1, 0):])

def test_bits_are_those_of_the_formula():
    ngrams = CharNGrams(REFERENCE, 4)
    for text in TEXTS:
        probs = [slow_prob(REFERENCE, text[:i], c, 4) for i,c in enumerate(text)]
        assert ngrams.bits(text)==pytest.approx(-sum(map(math.log2, probs)))

@pytest.mark.parametrize('before', ['', 'c', 'cat', 'the ', 'zzz', 'a zebra'])
def test_probabilities_sum_to_one_with_one_character_that_was_never_seen(before):
    ngrams = CharNGrams(REFERENCE)
    chars = [*set(REFERENCE), '☃']
    assert sum(ngrams.prob(before, c) for c in chars)==pytest.approx(1)

# Words and variety

def test_words_that_an_end_cuts_off_do_not_count_and_short_ones_neither():
    measured = TextQuality(REFERENCE)
    assert measured(TEXTS[:1]).known_words.mean==1                 # cat sat the; not dog, at the end
    assert measured(TEXTS[1:2]).known_words.mean==2/4              # the zebra and the; not xx, mat
    assert math.isnan(measured(TEXTS[2:]).known_words.mean)
    assert measured(TEXTS).known_words.mean==pytest.approx(5/7)

def test_a_shortest_word_of_one_letter_counts_all():
    assert TextQuality(REFERENCE, min_letters=1)([' a b cat ']).known_words.mean==2/3

def test_a_text_that_is_repeated_is_easy_to_predict_but_not_varied():
    measured = TextQuality(REFERENCE)
    once,often = measured([REFERENCE]),measured([REFERENCE]*8)
    assert often.ngram_bits.mean==pytest.approx(once.ngram_bits.mean)
    assert often.distinct==pytest.approx(once.distinct/8)
    assert measured(['the cat '*8]).entropy.mean==1

def test_variety_is_counted():
    assert word_entropy('a b c d a b c d')==2 and word_entropy(' \n')==0
    assert distinct_ngrams(['aaaa', 'aab'], 2)==2/5 and math.isnan(distinct_ngrams(['a'], 2))

def slow_repetition(tokens, n):
    "Fraction of the n-grams that stand further left as well, one comparison after the other"
    starts = range(len(tokens)-n+1)
    seen = [any(tokens[j:j+n]==tokens[i:i+n] for j in range(i)) for i in starts]
    return sum(seen)/len(seen)

def slow_run(tokens):
    "Length of the longest part whose tokens are all equal, by the length of all"
    parts = [(i, j) for i in range(len(tokens)) for j in range(i+1, len(tokens)+1)]
    return max(j-i for i,j in parts if len(set(tokens[i:j]))==1)/len(tokens)

def mean_and_error(values):
    values = torch.tensor(values, dtype=torch.double)
    return values.mean().item(),(values.std()/len(values)**.5).item()

@pytest.mark.parametrize('n', [1, 2, 4])
def test_repetition_is_that_of_comparisons_one_by_one(n):
    "Of random ids in rows and in lists of several lengths, and of words with these numbers"
    rng = random.Random(n)
    ids = [[rng.randrange(3) for _ in range(length)] for length in (20, 20, 20, 5, 11)]
    for rows,kinds in ((ids[:3], (list, torch.tensor)), (ids, (list,))):
        want = mean_and_error([slow_repetition(o, n) for o in rows])
        runs = mean_and_error([slow_run(o) for o in rows])
        texts = ['\n '.join(map(str, o)) for o in rows]
        for sequences in (*(kind(rows) for kind in kinds), [torch.tensor(o) for o in rows], texts):
            found = repetition(sequences, n)
            assert found.ngrams==pytest.approx(want) and found.longest_run==pytest.approx(runs)

@pytest.mark.parametrize('sequence, n, repeated, run', [
    ([5]*8, 4, 4/5, 1), ([*range(8)], 4, 0, 1/8), ([5], 1, 0, 1), ([5, 5], 1, 1/2, 1),
    ('no '*8, 4, 4/5, 1), ('a b c d a b c d', 4, 1/5, 1/8), ('a b b b a', 2, 1/4, 3/5)])
def test_repetition_of_sequences_by_hand(sequence, n, repeated, run):
    found = repetition([sequence], n)
    assert (found.ngrams.mean, found.longest_run.mean)==pytest.approx((repeated, run))
    assert math.isnan(found.ngrams.se) and math.isnan(found.longest_run.se)

def test_sequences_without_an_ngram_count_in_the_longest_run_alone():
    found = repetition([[5]*8, [1, 1, 2], []])
    assert found.ngrams.mean==4/5 and found.longest_run.mean==pytest.approx((1+2/3)/2)
    assert all(math.isnan(o.mean) for o in repetition([[], '']))
    assert math.isnan(repetition(['one two three']).ngrams.mean)

def test_a_single_sequence_repeats_what_is_not_distinct():
    ids = [*REFERENCE.encode()]
    assert repetition([ids], 3).ngrams.mean==pytest.approx(1-distinct_ngrams([REFERENCE], 3))
    twice = repetition([ids, ids], 3).ngrams
    assert twice.mean==repetition([ids], 3).ngrams.mean and twice.se==0
    assert distinct_ngrams([REFERENCE]*2, 3)<distinct_ngrams([REFERENCE], 3)

def test_the_quality_of_texts_has_their_repetition_in_words():
    texts = [REFERENCE, 'the cat '*9, 'no no no on']
    measured = TextQuality(REFERENCE)(texts)
    assert (measured.repetition, measured.longest_run)==repetition(texts)
    assert measured.longest_run.mean>repetition([[*o.encode()] for o in texts]).longest_run.mean

def test_the_size_of_the_texts_is_there():
    measured = TextQuality(REFERENCE)(['abcdef', '', 'abc'])
    assert (measured.mean_length, measured.n_texts)==(3, 3)

def test_chunks_reach_from_the_first_to_the_last_character_and_do_not_overlap():
    text = ''.join(map(chr, range(200, 500)))
    for n,length in ((1, 300), (3, 100), (7, 40), (2, 1)):
        chunks = even_chunks(text, n, length)
        assert [*map(len, chunks)]==[length]*n and len(set(''.join(chunks)))==n*length
        assert chunks[0][0]==text[0] and (n==1 or chunks[-1][-1]==text[-1])

def test_shuffled_texts_have_the_characters_of_the_text_and_follow_the_seed():
    shuffled = shuffled_texts(REFERENCE, 1, len(REFERENCE))
    assert sorted(shuffled[0])==sorted(REFERENCE) and shuffled[0]!=REFERENCE
    assert shuffled_texts(REFERENCE, 3, 9, seed=1)==shuffled_texts(REFERENCE, 3, 9, seed=1)
    assert shuffled_texts(REFERENCE, 3, 9, seed=1)!=shuffled_texts(REFERENCE, 3, 9, seed=2)

@pytest.mark.parametrize('f, args, name', [
    (TextQuality, ('',), 'text'), (TextQuality, (b'a',), 'text'), (TextQuality, ('a', 0), 'order'),
    (TextQuality, ('a', 5, 0), 'min_letters'), (TextQuality('a'), ([],), 'texts'),
    (TextQuality('a'), ('a',), 'texts'), (TextQuality('a'), ([''],), 'texts'),
    (even_chunks, ('abc', 2, 2), 'n'), (even_chunks, ('abc', 1, 0), 'length'),
    (even_chunks, (1, 1, 1), 'text'),
    (repetition, ('a a a',), 'sequences'), (repetition, (3,), 'sequences'),
    (repetition, ([1, 2],), 'sequences'), (repetition, ([[1., 2.]],), 'sequences'),
    (repetition, ([['a']],), 'sequences'), (repetition, (['a'], 0), 'n'),
    (repetition, (torch.tensor([1, 2]),), 'sequences'),
    (shuffled_texts, ('abc', 4, 1), 'n'), (shuffled_texts, ('abc', 1, 0), 'length')])
def test_wrong_arguments_are_named(f, args, name):
    with pytest.raises(ValueError, match=f'\\b{name}\\b'): f(*args)

def test_the_table_has_a_row_for_each_setting(capsys):
    measured = TextQuality(REFERENCE)
    print_quality({'one': measured(TEXTS), 'another \x1b[31m': measured(TEXTS[:2])})
    title,*rows = capsys.readouterr().out.splitlines()
    assert 'known words' in title and len(rows)==2 and '\x1b' not in rows[1]
    assert re.findall(r'\d\.\d{3}', rows[0])[0]=='0.714'
    assert f'{measured(TEXTS).longest_run.mean:.3f} ± {measured(TEXTS).longest_run.se:.3f}' in rows[0]

def test_texts_without_a_word_have_a_dash_in_the_table(capsys):
    print_quality({'one': TextQuality(REFERENCE)(['日本語の文'])})
    assert capsys.readouterr().out.splitlines()[1].split()[:2]==['one', '–']

# Another model

def load_without_a_package(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(quality_module, 'find_spec',
                        lambda name: None if name=='transformers' else find_spec(name))

def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    load_without_a_package(monkeypatch)
    for f in (Judge, load_judge_tokenizer):
        with pytest.raises(ValueError, match='judge.*pip install transformers') as e: f('gpt2')
        assert '\n' not in str(e.value)

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A tiny GPT-2 with random weights, a context of 16 tokens, and byte pairs of the reference text"
    transformers = pytest.importorskip('transformers')
    from tokenizers import decoders, models, pre_tokenizers, Tokenizer, trainers
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    pairs.train_from_iterator([REFERENCE], trainers.BpeTrainer(
        vocab_size=290, special_tokens=['<end>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token='<end>')
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=290, n_positions=16, n_embd=16, n_layer=1, n_head=2,
                                     initializer_range=.5, bos_token_id=0, eos_token_id=0)
    place = tmp_path_factory.mktemp('judge')
    transformers.GPT2LMHeadModel(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place

def nats_by_hand(judge, text):
    "Minus the log-probability of each token, called with every beginning of a window after the end token"
    ids = judge.tokenizer.encode(text)
    nats = []
    for i,token in enumerate(ids):
        before = [0, *ids[i//15*15:i]]
        with torch.no_grad(): logits = judge.model(torch.tensor([before])).logits[0,-1]
        nats.append(-logits.double().log_softmax(0)[token].item())
    return nats

def test_perplexity_is_that_of_the_tokens_one_by_one(folder):
    "Of texts shorter and longer than the context"
    judge = Judge(folder)
    nats = [nats_by_hand(judge, text) for text in (*TEXTS, REFERENCE)]
    score = judge([*TEXTS, REFERENCE])
    total,n_tokens = sum(map(sum, nats)),sum(map(len, nats))
    n_chars = len(''.join([*TEXTS, REFERENCE]))
    assert max(map(len, nats))>15
    assert score.perplexity.mean==pytest.approx(math.exp(total/n_tokens), rel=1e-4)
    assert score.bits.mean==pytest.approx(total/math.log(2)/n_chars, rel=1e-4)
    want = ratio_estimate([sum(o) for o in nats], [*map(len, nats)]).se*math.exp(total/n_tokens)
    assert score.perplexity.se==pytest.approx(want, rel=1e-4)

def test_an_empty_text_beside_others_does_not_count(folder):
    judge = Judge(folder)
    assert judge([*TEXTS, '']).bits.mean==judge(TEXTS).bits.mean
    with pytest.raises(ValueError, match='texts'): judge([''])

@pytest.mark.parametrize('content', [None, '{}', '{"model_type": "none of them"}'])
def test_a_folder_without_a_model_is_named_in_one_line(folder, tmp_path, content):
    if content: (tmp_path/'config.json').write_text(content)
    with pytest.raises(ValueError, match='judge is .*expected the name or folder') as e: Judge(str(tmp_path))
    assert '\n' not in str(e.value)

def test_weights_that_are_pickles_are_not_read(folder, tmp_path):
    for file in folder.iterdir():
        if file.suffix!='.safetensors': (tmp_path/file.name).write_bytes(file.read_bytes())
    torch.save(Judge(folder).model.state_dict(), tmp_path/'pytorch_model.bin')
    with pytest.raises(ValueError, match='judge is'): Judge(tmp_path)

# In the report and the commands

@pytest.fixture(scope='module')
def dls(): return text_dls(REFERENCE*8, seq_len=32, bs=2, valid_pct=.5, device='cpu')

def learner(dls, noise=None, **config):
    "A model with random weights, and data"
    model = tiny_denoiser(dls.tokenizer.vocab_size, 32, noise=noise, **config)
    model.tokenizer = dls.tokenizer
    return SimpleNamespace(model=model, dls=dls)

def held_out_ids(dls): return dls.valid.dataset[0][0].as_subclass(torch.Tensor)

NOISES = dict(masking=(1,), hybrid=(.8, .2), substitution=(0, 1), deletion=(.5, 0, .5))

@pytest.mark.parametrize('weights', NOISES.values(), ids=NOISES)
def test_texts_are_those_of_the_options_in_the_heading(dls, weights, capsys):
    learn = learner(dls, Corruption(dls.tokenizer.vocab_size, *weights))
    ids,options = held_out_ids(dls),_writing(learn.model)
    texts = _print_samples(learn.model, 3)
    _print_continued(learn.model, ids, 3)
    _print_infill(learn.model, ids, 3)
    assert texts==[dls.tokenizer.decode(o) for o in sample(learn.model, len(texts), seed=3, **options)]
    headings = [line for line in capsys.readouterr().out.splitlines() if line.startswith('──')]
    spelled = ' '.join(f'--{name} {value}' for name,value in options.items())
    assert len(headings)==3 and all(spelled in o for o in headings)

def test_what_is_given_comes_back_around_what_is_written(dls, capsys):
    learn = learner(dls)
    ids = held_out_ids(dls)
    held_out = dls.tokenizer.decode(ids)
    _print_infill(learn.model, ids, 0)
    before,written,after = re.split('[⟦⟧]', capsys.readouterr().out.split('\n', 2)[2].rstrip('\n'))
    assert len(written)==11 and held_out==before+held_out[10:21]+after
    _print_continued(learn.model, ids, 0)
    before = capsys.readouterr().out.split('\n', 2)[2].split('⟦')[0]
    assert held_out.startswith(before) and len(before)>=4
    assert held_out[len(before)].isspace() and not before[-1].isspace()

def test_the_report_measures_texts_by_the_training_text(dls, capsys):
    learn = learner(dls)
    _print_text_quality(learn, [REFERENCE, REFERENCE[5:30]])
    printed = capsys.readouterr().out
    rows = {line[:8].strip(): line.split() for line in printed.splitlines()}
    train = dls.tokenizer.decode(dls.train.dataset.ids)
    want = TextQuality(train)([REFERENCE, REFERENCE[5:30]])
    assert rows['written'][1]==f'{want.known_words.mean:.3f}'
    assert rows['written'][-1]==f'{want.distinct:.3f}' and 'held' in rows['held out']
    assert f'{len(train):,} characters' in printed

def test_a_report_without_any_written_text_measures_the_held_out_ones(dls, capsys):
    _print_text_quality(learner(dls), ['', ''])
    printed = capsys.readouterr().out
    assert 'held out' in printed and 'written' not in printed

def test_a_stream_has_no_table(dls, capsys):
    train = SimpleNamespace(dataset=object())
    stream = SimpleNamespace(train=train, valid=dls.valid, tokenizer=dls.tokenizer)
    _print_text_quality(SimpleNamespace(model=learner(dls).model, dls=stream), TEXTS)
    assert not capsys.readouterr().out

def test_the_report_has_a_line_of_the_judge_for_written_and_for_held_out_texts(dls, folder, capsys):
    _print_text_quality(learner(dls), TEXTS, folder)
    judged = [line for line in capsys.readouterr().out.splitlines() if 'perplexity' in line]
    score = Judge(folder)(TEXTS)
    assert [o.split(',')[0] for o in judged]==['written', 'held out']
    assert f'{score.perplexity.mean:.1f} ±' in judged[0] and f'{score.bits.mean:.3f} ±' in judged[0]

def test_the_judge_of_sample_speaks_on_standard_error(dls, folder, tmp_path, capsys):
    learner(dls).model.save_pretrained(tmp_path)
    write_texts(tmp_path, n=3, steps=2)
    alone = capsys.readouterr()
    write_texts(tmp_path, n=3, steps=2, judge=folder)
    judged = capsys.readouterr()
    assert judged.out==alone.out and 'perplexity' in judged.err and 'perplexity' not in alone.err

def test_a_judge_that_cannot_be_loaded_is_named_before_a_text_is_written(dls, tmp_path, monkeypatch, capsys):
    learner(dls).model.save_pretrained(tmp_path)
    load_without_a_package(monkeypatch)
    with pytest.raises(ValueError, match='judge'): write_texts(tmp_path, judge='gpt2')
    assert not capsys.readouterr().out
