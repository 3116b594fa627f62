"""Texts for people: no character steers the terminal, whatever the model or the file has in it."""
import io, json, math, subprocess, sys, unicodedata, warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
import pytest, torch
from PIL import Image, ImageChops
from bijdiff import writing
from bijdiff.data.loaders import text_dls
from bijdiff.data.subwords import BPETokenizer
from bijdiff.data.tokens import CharTokenizer
from bijdiff.diffusion.corruption import Corruption
from bijdiff.display import visible
from bijdiff.documents import print_scores
from bijdiff.writing import write_texts
from bijdiff.likelihood.exact import char_bits
from bijdiff.pictures import _cell, _margin, film_strip, gif_bytes, plot_bits, plot_film_strip
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
    load = writing.load_model
    def loud(*args, **kwargs):
        print('loading')
        return load(*args, **kwargs)
    monkeypatch.setattr(writing, 'load_model', loud)
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
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter('always')
        gif_bytes(frames, tokenizer)
    assert len(notes)<=1 and all('no installed font' in str(note.message) for note in notes)

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

def test_a_mask_is_as_wide_as_its_token_beside_one_that_is_replaced_later():
    ids = torch.tensor(PAIRS.encode('the cat on the other mat'))[None]
    replaced = torch.full_like(ids, MASK)
    replaced[0,0] = PAIRS.encode('on')[0]
    assert film_strip([replaced, ids], PAIRS).split('\n')[0]==PAIRS.decode(replaced[0,:1])+'░'*21

# A text that writes itself

N_FADING = 5                     # frames after the last one of the sampler
GREY,WHITE,BLACK = (0xdd,)*3,(255,)*3,(0,)*3

def shown(gif):
    "Frames of a GIF as a viewer shows them, and how long, in hundredths of a second"
    image,frames,durations = Image.open(io.BytesIO(gif)),[],[]
    for k in range(image.n_frames):
        image.seek(k)
        frames.append(image.convert('RGB'))
        durations.append(image.info['duration']//10)
    return frames, durations

def cells(frame):
    "Pixels of each cell of a frame, line by line"
    w,h = _cell
    corners = [(x, y) for y in range(_margin, frame.height-_margin, h)
               for x in range(_margin, frame.width-_margin, w)]
    return [frame.crop((x, y, x+w, y+h)) for x,y in corners]

def colours(image): return {colour for _,colour in image.getcolors()}
def is_bar(cell): return GREY in colours(cell) and colours(cell)<={GREY, WHITE}
def is_blank(cell): return colours(cell)=={WHITE}
def is_coloured(cell): return any(len({*colour})>1 for colour in colours(cell))

def changed_cells(a, b):
    "Numbers of the cells in which two frames differ; the margins may not"
    outside = ImageChops.difference(a, b)
    outside.paste(BLACK, (_margin, _margin, a.width-_margin, a.height-_margin))
    assert outside.getbbox() is None
    return [i for i,(one,other) in enumerate(zip(cells(a), cells(b))) if one.tobytes()!=other.tobytes()]

LETTERS = CharTokenizer('abcdefghij\n')
BLANK = LETTERS.vocab_size

def ids_of(text):
    "Ids of one sequence of letters and masks, (1, L)"
    return torch.tensor([[BLANK if c=='░' else LETTERS.encode(c)[0] for c in text]], dtype=torch.long)

def gif_of(*texts, **kwargs):
    "Frames and durations of the GIF in which these texts follow each other"
    return shown(gif_bytes([ids_of(o) for o in texts], LETTERS, **kwargs))

def test_a_gif_shows_every_frame_in_its_time_and_stays_at_the_end():
    frames,durations = gif_of(*('abcd'[:k]+'░'*(4-k) for k in range(5)), seconds=3)
    assert len(frames)==5+N_FADING and durations==[60]*5+[8]*(N_FADING-1)+[200]
    assert Image.open(io.BytesIO(gif_bytes([ids_of('a')], LETTERS))).info['loop']==0

def test_a_gif_begins_with_bars_and_ends_with_black_letters():
    frames,_ = gif_of('░░░░', 'a░c░', 'abc\n')
    assert all(map(is_bar, cells(frames[0])))
    assert not any(is_bar(c) or is_blank(c) or is_coloured(c) for c in cells(frames[-1]))

def test_a_frame_differs_where_a_token_is_new_or_fades():
    frames,_ = gif_of('░░░░░░', '░b░░░░', '░b░░e░', width=4)
    assert frames[0].size==(4*_cell[0]+2*_margin, 2*_cell[1]+2*_margin)
    assert changed_cells(frames[0], frames[1])==[1]
    assert changed_cells(frames[1], frames[2])==[1, 4]
    assert [is_coloured(c) for c in cells(frames[2])]==[i in (1, 4) for i in range(8)]
    assert [is_bar(c) for c in cells(frames[-1])]==[i in (0, 2, 3, 5) for i in range(8)]

def test_a_new_token_fades_to_black():
    frames,_ = gif_of('░', *'a'*(N_FADING+3))
    reds = [max(r-g for r,g,b in colours(f)) for f in frames]
    assert reds[0]==0 and reds[1]>150 and reds[1:N_FADING+2]==sorted(reds[1:N_FADING+2], reverse=True)
    assert reds[N_FADING+1:]==[0]*len(reds[N_FADING+1:]) and reds[N_FADING]>0

def test_given_tokens_are_black_from_the_beginning():
    frames,_ = gif_of('a░', 'ab')
    assert [is_coloured(c) for c in cells(frames[0])+cells(frames[1])]==[False, False, False, True]

def test_tokens_that_are_masked_or_replaced_again_are_seen_to_change():
    frames,_ = gif_of('░b', 'ab', '░b', 'cb', 'cd')
    first,second = zip(*map(cells, frames))
    assert [is_bar(c) for c in first[:5]]==[True, False, True, False, False]
    assert is_coloured(first[3]) and not is_coloured(second[3]) and is_coloured(second[4])
    assert first[-1].tobytes()!=cells(gif_of('░b', 'ab')[0][-1])[0].tobytes()

def test_masks_of_a_gif_are_as_wide_as_their_tokens():
    text = 'the cat on the other mat'
    frames,_ = shown(gif_bytes(frames_of(text), PAIRS, width=17))
    assert [is_bar(c) for c in cells(frames[0])]==[True]*24+[False]*10
    assert [is_blank(c) for c in cells(frames[-1])[:24]]==[c==' ' for c in text]

def test_inserted_tokens_are_coloured_and_those_that_they_move_are_not():
    "Also where the same letters stand before the ones that were moved"
    texts = 'cab', 'c░ab', 'cdab', 'abcdaeb░'
    frames = [[ids_of('a')[0], ids_of(o)[0]] for o in texts]
    found,_ = shown(gif_bytes(frames, LETTERS, which=1))
    numbers = [[i for i,c in enumerate(cells(f)) if is_coloured(c)] for f in found[:4]]
    assert len(found)==4+N_FADING and numbers==[[], [], [1], [0, 1, 3, 5]]
    assert is_bar(cells(found[1])[1]) and is_bar(cells(found[-1])[7]) and is_blank(cells(found[0])[3])

def test_masks_that_are_inserted_are_not_those_that_were_written():
    "As many masks in both frames, yet the last letter is the one that has moved"
    frames,_ = gif_of('░░a', 'bca░░░')
    assert [is_coloured(c) for c in cells(frames[1])]==[True, True, False, False, False, False]

def test_a_gif_begins_with_an_empty_sequence():
    for texts in (('', 'ab'), ('', '')):
        frames,_ = gif_of(*texts)
        assert all(map(is_blank, cells(frames[0]))) and len(cells(frames[0]))==max(1, len(texts[1]))

@pytest.mark.parametrize('n, seconds, expected', [(500, 6, 95), (60, 6, 60), (60, .5, 25), (60, .001, 2)])
def test_a_gif_has_evenly_chosen_frames_that_browsers_do_not_slow_down(n, seconds, expected):
    frames,durations = gif_of(*('abcdefghij'[k%10] for k in range(n)), seconds=seconds)
    assert len(frames)<=expected+N_FADING<=100 and min(durations)>=2
    assert sum(durations[:-N_FADING])==pytest.approx(max(100*seconds, 2*expected), abs=1)

def test_the_same_frames_make_the_same_bytes():
    frames = frames_of('the cat on the other mat', 12)
    assert gif_bytes(frames, PAIRS)==gif_bytes([f.clone() for f in frames], PAIRS)

def test_the_gif_of_256_characters_and_64_frames_is_below_150_kB():
    text = (Path(__file__).parent.parent/'LICENSE').read_text(encoding='utf-8')[2000:2256]
    tokenizer = CharTokenizer.train(text)
    ids,at = torch.tensor(tokenizer.encode(text)),torch.rand(256, generator=torch.Generator().manual_seed(0))
    frames = [torch.where(at<k/63, ids, tokenizer.vocab_size)[None] for k in range(64)]
    gif = gif_bytes(frames, tokenizer)
    assert Image.open(io.BytesIO(gif)).n_frames==64+N_FADING and len(gif)<150_000

def test_colours_of_a_gif_are_chosen():
    frames,_ = gif_of('░a', 'ba', colours=('blue', 'white', '#333333', 'black'))
    bar,given = cells(frames[0])
    assert colours(bar)=={(0x33,)*3, BLACK} and WHITE in colours(given) and BLACK in colours(given)
    assert (0, 0, 255) in colours(cells(frames[1])[0])

@pytest.mark.parametrize('name, value', [
    ('frames', []), ('tokenizer', None), ('which', 1), ('which', -1), ('width', 0), ('width', 2.5),
    ('seconds', 0), ('seconds', -1), ('seconds', math.nan), ('seconds', 601),
    ('colours', 'red'), ('colours', ('red', 'red', 'red')), ('colours', ('red', 'red', 'red', 'no'))])
def test_a_gif_of_wrong_arguments_is_rejected_by_name(name, value):
    with pytest.raises(ValueError, match=f'{name} is .*; expected'):
        gif_bytes(**dict(frames=[ids_of('ab')], tokenizer=LETTERS) | {name: value})

def test_a_gif_that_would_be_too_high_is_rejected():
    with pytest.raises(ValueError, match='width is 1; expected'):
        gif_bytes([torch.zeros(1, 4000, dtype=torch.long)], LETTERS, width=1)
