"""Texts for people: no character steers the terminal, whatever the model or the file has in it."""
import io, subprocess, sys, unicodedata, warnings
from contextlib import redirect_stdout
from pathlib import Path
import pytest, torch
from bijdiff.data.loaders import text_dls
from bijdiff.data.tokens import CharTokenizer
from bijdiff.display import visible
from bijdiff.documents import print_scores, write_texts
from bijdiff.pictures import film_strip, plot_bits, plot_film_strip
from bijdiff.reports import _print_infill, _print_samples
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
ROW = dict(file=TEXT[:25], tokens=1, characters=1, bits=1.)
PRINTED = {
    'show_batch': lambda model,dls: dls.train.show_batch(),
    'show_results': lambda model,dls: small_learner(dls=dls).show_results(),
    'film_strip': lambda model,dls: print(film_strip([ids(model.tokenizer)[None]], model.tokenizer)),
    'samples of a report': lambda model,dls: _print_samples(model, 0),
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
