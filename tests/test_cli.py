"""The commands as a user runs them: other processes, real files."""
import json, os, resource, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file

small = '--seq_len 64 --bs 16 --d_model 16 --n_heads 2 --n_layers 2 --epochs 3 --device cpu --dtype float32'.split()

def command(name, *args, **kw):
    "Run a command of the package"
    return subprocess.Popen([sys.executable, Path(sys.executable).parent/name, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)

def finish(p):
    out,err = p.communicate(timeout=500)
    return p.returncode, out, err

@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    from bijdiff.data.corpora import pydoc_corpus
    path = tmp_path_factory.mktemp('corpus')/'text.txt'
    path.write_text(pydoc_corpus()[:80_000], encoding='utf-8')
    return path

@pytest.fixture(scope='module')
def trained(corpus, tmp_path_factory):
    "A model trained without interruption"
    out = tmp_path_factory.mktemp('trained')/'model'
    status,stdout,err = finish(command('bijdiff_train', '--corpus', corpus, '--out', out, *small))
    assert status==0, err
    return out,stdout

def test_train_shows_what_it_promises(trained):
    out,stdout = trained
    headings = [l.split() for l in stdout.splitlines()]
    assert ['epoch','train','loss','bound','±','log-det','inverse','error','tokens/s','time'] in headings
    assert all(o in stdout for o in ('[1]', '[3]', '⟦', str(out), 'training.png', 'film_strip.png', 'lattice bfloat16  0\n', 'lattice float32   0\n'))
    assert (out/'training.png').read_bytes()[:4]==b'\x89PNG'

def test_sample_and_score(trained, corpus, tmp_path):
    out,_ = trained
    status,text,err = finish(command('bijdiff_sample', out, '--n', 2, '--steps', 8, '--prompt', 'The '))
    assert status==0 and text.count('The ')>=2, err
    status,text,err = finish(command('bijdiff_sample', out, '--steps', 8, '--infill', 'The ____ is'))
    assert status==0 and text.startswith('The ') and text.rstrip().endswith(' is'), err
    part = tmp_path/'part.txt'
    part.write_text(corpus.read_text(encoding='utf-8')[:1000], encoding='utf-8')
    status,text,err = finish(command('bijdiff_score', out, part, '--n', 4))
    assert status==0 and 'bits per character' in text and '±' in text, err

def test_the_error_bar_of_a_total(trained):
    "As wide as the total of equal documents really spreads over seeds"
    from bijdiff.cli import _document, _load, _seeds, _total
    m,text = _load(str(trained[0])),'The with statement is used to wrap the execution of a block.'
    ids = torch.tensor(m.tokenizer.encode(text))
    totals = [_total([_document(m, 'file', text, ids, None, 8, s)[0] for s in _seeds(seed, 4)]) for seed in range(40)]
    spread,said = torch.tensor([t['bits'] for t in totals]).std().item(),sum(t['se']**2 for t in totals)**.5/40**.5
    assert .75<spread/said<1.33                                                  # the same noise for all four would give 2

@pytest.mark.parametrize('encoding', ['ascii','cp1252'])
def test_terminals_with_few_characters(corpus, tmp_path, encoding):
    kw = dict(env={**os.environ, 'PYTHONIOENCODING':encoding}, encoding=encoding)
    status,stdout,err = finish(command('bijdiff_train', '--corpus', corpus, '--out', tmp_path/'m', *small, '--epochs', 1, **kw))
    assert status==0 and 'three texts' in stdout, err
    status,text,err = finish(command('bijdiff_sample', tmp_path/'m', '--steps', 8, '--prompt', 'The ', **kw))
    assert status==0 and text.startswith('The '), err

def test_no_picture_of_a_former_run_is_left(corpus, tmp_path):
    "A run too short for a trend has no training.png, and leaves none beside its model"
    out = tmp_path/'m'
    out.mkdir()
    (out/'training.png').write_bytes(b'of a former run')
    status,stdout,err = finish(command('bijdiff_train', '--corpus', corpus, '--out', out, *small, '--epochs', 1, '--bs', 1000))
    assert status==0 and 'training.png' not in stdout and not (out/'training.png').exists(), err

def test_exact_scores_and_files_that_come_back(trained, corpus, tmp_path):
    out,part = trained[0],tmp_path/'part.txt'
    part.write_text(corpus.read_text(encoding='utf-8')[:1000], encoding='utf-8')
    status,text,err = finish(command('bijdiff_score', out, part, part, '--rule', 'confidence', '--steps', 4, '--json-file', tmp_path/'bits.json', '--picture', tmp_path/'bits.png'))
    assert status==0 and 'exact minus log-probability' in text and 'total' in text and '±' not in text, err
    rows = json.loads((tmp_path/'bits.json').read_text())['rows']
    assert rows[2]['bits']==pytest.approx(2*rows[0]['bits']) and (tmp_path/'bits.png').read_bytes()[:4]==b'\x89PNG'
    status,text,err = finish(command('bijdiff_sample', out, '--rule', 'spread', '--steps', 4, '--prompt', 'The '))
    assert status==0 and text.startswith('The '), err
    status,_,err = finish(command('bijdiff_score', out, part, tmp_path/'none.txt', '--rule', 'spread'))
    assert status==2 and 'none.txt does not exist' in err and err.count('\n')==1
    code = lambda *a: finish(command('bijdiff_compress', out, part, '--steps', 4, *a))
    status,text,err = code()
    assert status==0 and 'bits per byte' in text, err
    small = (tmp_path/'part.txt.bij').read_bytes()
    assert abs(8*len(small)-rows[0]['bits'])<.01*rows[0]['bits']+16*64+8*300                    # blocks of 64, and the header
    status,_,err = code()
    assert status==2 and 'exists; choose another name' in err and err.count('\n')==1
    assert code('--force')[0]==0 and (tmp_path/'part.txt.bij').read_bytes()==small
    status,_,err = finish(command('bijdiff_decompress', out, f'{part}.bij', '--out', tmp_path/'back.txt'))
    assert status==0 and (tmp_path/'back.txt').read_bytes()==part.read_bytes(), err
    for name,bad in dict(damaged=small[:100]+bytes([small[100]^1])+small[101:], cut=small[:-5], foreign=b'PK'+small).items():
        (tmp_path/f'{name}.bij').write_bytes(bad)
        status,_,err = finish(command('bijdiff_decompress', out, tmp_path/f'{name}.bij'))
        assert status==2 and err.count('\n')==1 and not (tmp_path/name).exists(), err
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith('.'))==[]

@pytest.mark.parametrize('noise,samplers', [
    ('--substitute .2', ['ancestral','euler']), ('--mask 0 --substitute 1 --objective score_entropy', ['tweedie']), ('--objective score_entropy', ['first_hitting','confidence']), ('--mask .4 --substitute .2 --delete .4', ['insertion'])])
def test_every_noise_trains_samples_and_scores(corpus, tmp_path, noise, samplers):
    out = tmp_path/'model'
    status,stdout,err = finish(command('bijdiff_train', '--corpus', corpus, '--out', out, *small, *noise.split(), '--epochs', 1))
    assert status==0 and 'lattice float32   0\n' in stdout and '⟦' in stdout, err
    for s in samplers:
        status,text,err = finish(command('bijdiff_sample', out, '--sampler', s, '--steps', 8, '--prompt', 'The '))
        assert status==0 and text.startswith('The '), err
    status,text,err = finish(command('bijdiff_sample', out, '--steps', 8, '--infill', 'The ____ is'))
    assert status==0 and text.startswith('The ') and text.rstrip('\n').endswith(' is') and '░' not in text, err
    part = tmp_path/'part.txt'
    part.write_text(corpus.read_text(encoding='utf-8')[:300], encoding='utf-8')
    status,text,err = finish(command('bijdiff_score', out, part, '--n', 4))
    assert status==0 and 'bits per character' in text, err
    status,_,err = finish(command('bijdiff_sample', out, '--sampler', 'first_hitting' if 'delete' in noise or 'substitute' in noise else 'insertion'))
    assert status==2 and "for this model's noise" in err and err.count('\n')==1

@pytest.mark.parametrize('extra', [[], ['--lambda_likelihood', '.1'], ['--substitute', '.2', '--delete', '.3']], ids=['plain', 'latent', 'all three kinds of noise'])
def test_killed_and_resumed_is_bitwise_equal(corpus, tmp_path, extra):
    "kill -9 in the middle, --resume, and the weights are those of an uninterrupted run"
    args = ['--corpus', corpus, *small, *extra]
    whole,broken = tmp_path/'whole',tmp_path/'broken'
    status,_,err = finish(command('bijdiff_train', *args, '--out', whole))
    assert status==0, err
    p = command('bijdiff_train', *args, '--out', broken)
    for _ in range(3000):                                      # until the first epoch is saved
        if (broken/'checkpoint.safetensors').exists() or p.poll() is not None: break
        time.sleep(.05)
    time.sleep(.2)
    p.send_signal(signal.SIGKILL)
    assert finish(p)[0]==-9
    assert (broken/'checkpoint.safetensors').exists() and not (broken/'model.safetensors').exists()

    status,_,err = finish(command('bijdiff_train', *args, '--out', broken))
    assert status==2 and 'holds an interrupted run; continue it with --resume' in err
    status,_,err = finish(command('bijdiff_train', *args, '--out', broken, '--resume', '--lr', '1e-4'))
    assert status==2 and 'different configuration: lr was 0.003 and is 0.0001' in err and err.count('\n')==1
    status,_,err = finish(command('bijdiff_train', *args, '--out', broken, '--resume'))
    assert status==0, err
    a,b = (load_file(d/'model.safetensors') for d in (whole,broken))
    assert a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert not (broken/'checkpoint.safetensors').exists()

def test_full_disk_keeps_the_old_model(trained, corpus, tmp_path):
    "Writing stops at a file size limit, as on a full disk: one line, status 2, and the old model still loads"
    from bijdiff.model.denoiser import BijectiveDenoiser
    out = tmp_path/'model'
    BijectiveDenoiser.from_pretrained(trained[0]).save_pretrained(out)
    before = {p.name:p.read_bytes() for p in out.iterdir()}
    limit = lambda: (signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    status,_,err = finish(command('bijdiff_train', '--corpus', corpus, '--out', out, *small, preexec_fn=limit))
    assert status==2 and err.strip().splitlines()[-1].startswith('bijdiff_train: error: '), err
    assert {p.name:p.read_bytes() for p in out.iterdir()}==before

@pytest.mark.parametrize('args,message', [
    ('--schedule linear', "schedule is 'linear'"), ('--bijective_ratio 1.5', 'bijective_ratio is 1.5'), ('--n_heads 3', 'n_heads is 3'),
    ('--corpus missing.txt', 'missing.txt does not exist'), ('--seq_len 999999', 'expected at least seq_len=999999'), ('--epochs none', 'invalid int value'),
    ('--n_bijective_layers 9', 'n_bijective_layers is 9'), ('--T 0', 'T is 0'), ('--mask 0', 'mask, substitute and delete are all 0'), ('--substitute -1', 'substitute is -1.0'),
    ('--mask 0 --delete 1', 'expected some masking as well'), ('--delete 1 --T 50', 'T is 50; with deletion'), ('--objective mse', "objective is 'mse'"), ('--substitute 1 --objective score_entropy', 'expected masking alone or substitution alone'), ('--resume', 'no interrupted run'), ('--lambda_likelihood -1', 'lambda_likelihood is -1')])
def test_bad_options(corpus, tmp_path, args, message):
    status,_,err = finish(command('bijdiff_train', '--corpus', corpus, *small, '--out', tmp_path/'never', *args.split()))
    assert status==2 and message in err.splitlines()[-1], err
    assert 'Traceback' not in err and not (tmp_path/'never').exists()

def test_resumes_after_the_last_epoch(corpus, tmp_path):
    "A run that could not save its model at the end can still do so"
    from bijdiff.training.checkpoint import CheckpointCallback
    args = ['--corpus', corpus, *small, '--out', tmp_path/'m']
    script = tmp_path/'bijdiff_train.py'                                     # its name makes it the command
    script.write_text("from bijdiff.model.denoiser import BijectiveDenoiser as D\ndef full(*a): raise OSError(28, 'No space left on device')\n"
                      "D.save_pretrained = full\nfrom bijdiff.cli import bijdiff_train\nbijdiff_train()")
    res = subprocess.run([sys.executable, script, *map(str, args)], capture_output=True, text=True)
    assert res.returncode==2 and 'No space left on device' in res.stderr, res.stderr
    status,_,err = finish(command('bijdiff_train', *args, '--resume'))
    assert status==0 and (tmp_path/'m'/'model.safetensors').exists(), err
