"""Texts for people: no character steers the terminal, whatever the model or the file has in it."""
import io, json, math, subprocess, sys, unicodedata, warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
import pytest, torch
from bijdiff import documents
from bijdiff.data.loaders import text_dls
from bijdiff.data.subwords import BPETokenizer
from bijdiff.data.tokens import CharTokenizer
from bijdiff.diffusion.corruption import Corruption
from bijdiff.display import visible
from bijdiff.documents import print_scores, write_texts
from bijdiff.likelihood.exact import char_bits
from bijdiff.pictures import film_strip, plot_bits, plot_film_strip
from bijdiff.reports import _print_continued, _print_infill, _print_samples
from bijdiff.testing import run_command, small_learner, tiny_denoiser

STEERING = '\x1b\a\b\r\0\x7f\x85\x9b\u061c\u200e\u200f\u202a\u202e\u2066\u2069\u2028\u2029\ufeff\ud800'
TEXT = ''.join(f'{c}[31m{c}\n\tword {c}' for c in STEERING)*12

def steering(text):
    "Characters of a text that a terminal obeys, other than line breaks and tabs"
    kinds = 'Cc', 'Cf', 'Cs', 'Zl', 'Zp'
    return {c for c in text if unicodedata.category(c) in kinds and c not in '\n\t\u200c\u200d'}

class Terminal(io.StringIO):
    "A terminal"
    def isatty(self): return True

@pytest.fixture(scope='module')
def tokenizer(): return CharTokenizer.train(TEXT)

@pytest.fixture(scope='module')
def model(tokenizer):
    "A model that writes little else than characters that steer terminals"
    m = tiny_denoiser(tokenizer.vocab_size, 64)
    m.tokenizer = tokenizer
    return m

@pytest.fixture(scope='module')
def dls(): return text_dls(TEXT, seq_len=16, bs=4)

ids = lambda tokenizer: torch.tensor(tokenizer.encode(TEXT[:64]))
ROW = dict(file=TEXT[:25], tokens=1, characters=1, bytes=1, bits=1., is_changed=True)
PRINTED = {
    'show_batch': lambda model,dls: dls.train.show_batch(),
    'show_results': lambda model,dls: small_learner(dls=dls).show_results(),
    'film_strip': lambda model,dls: print(film_strip([ids(model.tokenizer)[None]], model.tokenizer)),
    'samples of a report': lambda model,dls: _print_samples(model, 0),
    'beginning of a report': lambda model,dls: _print_continued(model, ids(model.tokenizer), 0),
    'infill of a report': lambda model,dls: _print_infill(model, ids(model.tokenizer), 0),
    'table of scores': lambda model,dls: print_scores([ROW], True),
}

@pytest.mark.parametrize('name', PRINTED)
def test_nothing_that_is_printed_steers_the_terminal(name, model, dls):
    with redirect_stdout(io.StringIO()) as out: PRINTED[name](model, dls)
    assert len(out.getvalue())>20 and not steering(out.getvalue())

def test_steering_is_seen():
    assert steering(TEXT)=={*STEERING} and steering('naïve\n\t👩\u200d👧 日本')==set()
    assert not steering(visible(TEXT))

def test_texts_go_as_they_are_into_files(model, tmp_path):
    "And with signs onto a terminal"
    model.save_pretrained(tmp_path)
    for place in (io.StringIO(), Terminal()):
        with redirect_stdout(place): write_texts(tmp_path, n=3, steps=2)
        assert bool(steering(place.getvalue()))!=place.isatty()

# Lines of JSON

@pytest.fixture(scope='module')
def folder(model, tmp_path_factory):
    "Folder of the model"
    path = tmp_path_factory.mktemp('saved')/'model'
    model.save_pretrained(path)
    return path

def rows_of(folder, place=None, **kwargs):
    "Lines of JSON that are written to a stream"
    place = place or io.StringIO()
    with redirect_stdout(place): write_texts(folder, json_lines=True, **kwargs)
    assert place.getvalue().isascii() and place.getvalue().endswith('}\n')
    return [json.loads(line) for line in place.getvalue().splitlines()]

def test_texts_in_json_are_exact_on_a_terminal_as_well(folder, tokenizer):
    for place in (io.StringIO(), Terminal()):
        rows = rows_of(folder, place, n=3, steps=2)
        assert not steering(place.getvalue()) and steering(rows[0]['text'])
        assert [o['text'] for o in rows]==[tokenizer.decode(o['ids']) for o in rows]
        assert [o['tokens'] for o in rows]==[64]*3 and [o['number'] for o in rows]==[0, 1, 2]

def test_texts_in_json_are_those_that_are_printed(folder):
    with redirect_stdout(io.StringIO()) as out: write_texts(folder, n=3, steps=2, seed=5)
    rows = rows_of(folder, n=3, steps=2, seed=5)
    assert ''.join(o['text']+'\n\n' for o in rows)==out.getvalue()

@pytest.mark.parametrize('options', [
    dict(), dict(steps=3, temperature=.5), dict(steps=3, top_p=.5, sampler='ancestral', prompt='word '),
    dict(sampler='first_hitting', temperature=.7), dict(sampler='confidence', steps=2),
    dict(rule='random', seed=5), dict(rule='block', threshold=.05, infill='[31m____ word'),
    dict(rule='entropy', budget=6., temperature=.8, seed=2),
    dict(rule='margin', steps=4, guidance=2., prompt='word')], ids=str)
def test_a_line_has_all_that_is_needed_to_write_its_text_again(folder, options):
    rows = rows_of(folder, n=2, **options)
    for row in rows:
        assert row['seed']==options.get('seed', 0) and ('rule' in row)!=('sampler' in row)
        given = {k:row[k] for k in ('n', 'seed', 'prompt', 'infill') if k in row}
        assert rows_of(folder, **given, **row.get('rule', {}), **row.get('sampler', {}))==rows

def test_defaults_of_a_sampler_are_written_out(folder):
    assert rows_of(folder)[0]['sampler']==dict(sampler='ancestral', steps=128, temperature=1., top_p=1.)

def saved(path, noise=None, eod=False):
    "Folder of a model of the letters a and b"
    tokenizer = CharTokenizer('ab', eod=eod)
    model = tiny_denoiser(tokenizer.vocab_size, 16, noise=noise)
    model.tokenizer = tokenizer
    model.save_pretrained(path)
    return path

def test_steps_that_find_lengths_are_named(tmp_path):
    row, = rows_of(saved(tmp_path, Corruption(2, .5, 0, .5)), infill='a____b', steps=2)
    assert row['sampler']=={**rows_of(tmp_path, steps=2)[0]['sampler'], 'length_steps':64}

def test_a_text_that_has_ended_has_its_ids_alone(tmp_path):
    "And the rule that is taken then"
    rows = rows_of(saved(tmp_path, eod=True), prompt='ab', n=8)
    assert all(o['rule']==dict(rule='left_to_right') and o['ids'][:2]==[0, 1] for o in rows)
    assert all(len(o['text'])==o['tokens']==len(o['ids']) for o in rows)
    assert min(o['tokens'] for o in rows)<16 and not {2} & {i for o in rows for i in o['ids']}

def test_whatever_else_is_printed_goes_to_standard_error(folder, monkeypatch, capsys):
    load = documents.load_model
    def loud(*args, **kwargs):
        print('loading')
        return load(*args, **kwargs)
    monkeypatch.setattr(documents, 'load_model', loud)
    write_texts(folder, json_lines=True, steps=2)
    printed = capsys.readouterr()
    assert json.loads(printed.out)['tokens']==64 and printed.err=='loading\n'

# Bars

def screen(written):
    "Lines of a terminal after all has been written to it"
    lines = []
    for line in written.split('\n'):
        cells = []
        for part in line.split('\r'): cells[:len(part)] = part
        lines.append(''.join(cells).rstrip())
    return lines

def written_on(out, err, folder, **kwargs):
    "What texts and bar write on standard output and on standard error"
    with redirect_stdout(out), redirect_stderr(err): write_texts(folder, **kwargs)
    return out.getvalue(),err.getvalue()

def test_a_bar_counts_texts_on_standard_error_alone(folder):
    for options in (dict(), dict(json_lines=True)):
        plain = written_on(io.StringIO(), io.StringIO(), folder, n=3, steps=2, **options)
        shown = written_on(io.StringIO(), Terminal(), folder, n=3, steps=2, **options)
        assert plain[1]=='' and shown[0]==plain[0] and '0/3' in shown[1]
        assert screen(shown[1])==['']
        assert written_on(io.StringIO(), Terminal(), folder, n=1, steps=2, **options)[1]==''

@pytest.mark.parametrize('options', [dict(), dict(json_lines=True)], ids=str)
def test_a_bar_leaves_no_trace_between_texts(folder, options):
    "Of output and bar on one terminal"
    place,alone = Terminal(),Terminal()
    written_on(place, place, folder, n=3, steps=2, **options)
    written_on(alone, io.StringIO(), folder, n=3, steps=2, **options)
    assert '0/3' in place.getvalue() and screen(place.getvalue())==screen(alone.getvalue())

def test_a_bar_is_gone_when_a_mistake_is_reported(folder):
    place = Terminal()
    with pytest.raises(ValueError, match='steps'): written_on(place, place, folder, n=3, steps=0)
    assert '0/3' in place.getvalue() and screen(place.getvalue())==['']

# Commands

def test_errors_and_notes_of_commands_are_visible():
    from bijdiff.console import command
    @command
    def fail(name:str):
        warnings.warn(f'a note on \x1b]0;{name}\a')
        raise ValueError(f'{name} is \x1b[2J; expected a text')
    status,_,err = run_command(fail, 'x\u202e')
    assert status==2 and err.count('\n')==2 and '␛' in err and not steering(err)

# Pictures

@pytest.mark.parametrize('text', [
    '日本語の文章です。', '👩🏽‍🚀🚀 emoji', 'a\x1b[31m\r\n\0b\u202ec', '\ue000\ue001$x^2$\\frac'])
def test_pictures_of_any_text_warn_once_at_most(text):
    "Of the characters that no font has; never Matplotlib, once a character"
    tokenizer = CharTokenizer(''.join(sorted({*text})))
    frames = [torch.tensor(tokenizer.encode(text))[None]]
    for draw in (lambda: plot_bits([(c, 1.) for c in text*3]), lambda: plot_film_strip(frames*3, tokenizer)):
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter('always')
            fig = draw()
            fig.canvas.draw()
        assert len(notes)<=1 and all('no installed font' in str(note.message) for note in notes)
        assert not any(steering(t.get_text()) for ax in fig.axes for t in ax.texts)

# Warnings of other packages

old_function = """
import sys, types, warnings
import torch.jit
def script(f):
    warnings.warn('`torch.jit.script` is deprecated.', FutureWarning, stacklevel=2)
    return f
torch.jit.script = script
"""

def error_of_import(module):
    "What a new process that imports a module prints on stderr"
    command = [sys.executable, '-c', f'{old_function}import {module}']
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr

@pytest.mark.parametrize('module', ['bijdiff.all', 'bijdiff.runs', 'bijdiff.documents'])
def test_importing_warns_of_nothing(module):
    "As with torch 2.14, of whose torch.jit.script fastai makes use"
    assert error_of_import(module)==''

def test_the_warning_would_be_seen():
    assert 'FutureWarning' in error_of_import('fastai.layers')

# Tokens of several characters

PAIRS = BPETokenizer.train('the cat sat on the mat, and the dog on the other mat\n'*20, 290)
MASK = PAIRS.vocab_size

def frames_of(text, n=6):
    "Frames in which the tokens of a text appear in random order"
    ids = torch.tensor(PAIRS.encode(text))
    at = torch.rand(len(ids), generator=torch.Generator().manual_seed(0))
    return [torch.where(at<k/(n-1), ids, MASK)[None] for k in range(n)]

@pytest.mark.parametrize('text', ['the cat on the other mat\nsat', 'été “日本” 👩 the', 'a\ufffdb'])
def test_a_text_does_not_move_while_it_is_written(text):
    lines = film_strip(frames_of(text), PAIRS).split('\n')
    assert lines[-1]==visible(text)
    for line in lines:
        assert len(line)==len(text)
        assert all(a in ('░', '\ufffd', b) for a,b in zip(line, lines[-1]))

def drawn(fig):
    "Place of each character of each frame, and its colour"
    return [{t.get_position(): (t.get_text(), t.get_color()) for t in ax.texts} for ax in fig.axes]

def test_every_character_has_a_cell_and_new_tokens_are_red_as_a_whole():
    text = 'the cat on the other mat'
    ids = torch.tensor(PAIRS.encode(text))[None]
    hidden = ids.clone()
    hidden[0,1] = MASK                                                                       # ' cat'
    first,second = drawn(plot_film_strip([hidden, ids], PAIRS, width=10))
    cells = {(i%10, -(i//10)): c for i,c in enumerate(text) if c!=' '}
    assert {at: c for at,(c,_) in second.items()}==cells
    new = {(i, 0) for i in (4, 5, 6)}
    assert {at for at,(_,colour) in second.items() if colour!='black'}==new
    assert first.keys()==cells.keys()-new

def test_masks_are_bars_as_wide_as_their_tokens():
    "That of ' other' is cut in two by the end of the line"
    ids = torch.tensor(PAIRS.encode('the cat on the other mat'))[None]
    fig = plot_film_strip([torch.full_like(ids, MASK), ids], PAIRS, width=17)
    boxes = [path.get_extents() for path in fig.axes[0].collections[0].get_paths()]
    widths = [round(box.width+.2) for box in boxes]
    assert widths==[3, 4, 3, 4, 3, 3, 4] and [round(box.y0+.3) for box in boxes]==[0]*5+[-1]*2

def test_replaced_and_inserted_tokens_have_cells_of_their_own():
    texts = 'the cat', 'the other cat', 'on the mat'
    frames = [torch.tensor(PAIRS.encode(text))[None] for text in texts]
    assert film_strip(frames, PAIRS)=='\n'.join(texts)

def test_a_byte_of_no_character_is_a_sign():
    ids = torch.tensor([PAIRS.encode('é')[0], *PAIRS.encode('a')])[None]
    assert film_strip([ids], PAIRS)=='\ufffda'

def test_bits_of_a_token_are_those_of_its_characters_in_equal_parts():
    ids = torch.tensor(PAIRS.encode('the é'))
    chars,bits = zip(*char_bits(PAIRS, ids, torch.arange(1., len(ids)+1)*math.log(2)))
    assert ''.join(chars)=='the é' and PAIRS.decode(ids[:1])=='the'
    assert bits[:3]==pytest.approx([1/3]*3) and sum(bits)==pytest.approx(sum(range(1, len(ids)+1)))
