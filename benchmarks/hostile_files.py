"""Files of somebody who knows the format: whatever they say, the answer is one line, at once.

    python benchmarks/hostile_files.py

Makes models, tokenizers, checkpoints and compressed files that are wrong and have the right hashes, and
paths that lead to no file; reads each in a process of its own, forked from one that has imported bijdiff; and
records how that ended, in how many seconds of the processor, and how much memory it took above that process.
A file must be rejected, by a `ValueError` or an `OSError` with a message of one line, or come back as exactly
what it describes. In both cases the random state of PyTorch must be as before, and nothing else may be
printed.

Claims of compressed files come with few words, which rules of ordinary temperature soon use up. A rule that
makes every token certain needs no words: then the work is that of the tokens claimed, up to `most_tokens`.

Writes benchmarks/results/hostile_files.json."""
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import struct
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple
import torch
from safetensors.torch import save
from bijdiff.checks import check, is_whole
from bijdiff.console import command
from bijdiff.data.corpora import read_text
from bijdiff.data.subwords import get_tokenizer
from bijdiff.likelihood.codec import compress, decompress
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.model.headers import read_header, read_tensors
from bijdiff.model.saving import plain_weights, tensors_hash, write_atomically
from bijdiff.sampling.rules import UnmaskingRule
from bijdiff.training.checkpoint import CHECKPOINT, read_checkpoint
from common import result_path, run_record
from common import save as save_result

MOST_SECONDS,MOST_MIB = 1,200
WEIGHTS = 'model.safetensors'
FIXTURES = Path(__file__).resolve().parent.parent/'tests'/'fixtures'/'0.1'

# Models that are right

COSINE = dict(name='cosine', eps=1e-3)
NETWORKS = dict(
    plain={},
    time=dict(time_conditioning=True, noise=dict(mask=.5, substitute=.5, schedule=COSINE)),
    scales=dict(enable_multiscale=True, n_bijective_layers=1, n_layers=2),
    experts=dict(n_experts=2, k_active=1, couple='every'),
    gaps=dict(gap_head=True, noise=dict(mask=.5, delete=.5)),
)

def right_model(folder, network, tokenizer):
    "Save a small model with a tokenizer of this kind; return its folder"
    tokenizer = get_tokenizer(tokenizer, 'the cat sat on the mat\n'*9)
    config = dict(seq_len=16, d_model=8, n_heads=2, n_layers=1) | NETWORKS[network]
    model = BijectiveDenoiser(DenoiserConfig(tokenizer.vocab_size, **config))
    model.tokenizer = tokenizer
    return model.save_pretrained(folder)

class Parts(NamedTuple):
    "What a model file is made of"
    tensors:dict
    config:object # Content of config.json, before it is written as JSON
    tokenizer:object # Content of tokenizer.json

def read_parts(folder):
    "Return the parts of a model in a folder"
    return Parts(read_tensors(folder/WEIGHTS),
                 *(json.loads((folder/f'{name}.json').read_text()) for name in ('config', 'tokenizer')))

def as_json(o):
    "Return an object as JSON; bytes are JSON already"
    return o if isinstance(o, bytes) else json.dumps(o).encode()

def write_parts(folder, parts):
    "Write a model of any parts with the right hashes"
    files = {'config.json':as_json(parts.config), 'tokenizer.json':as_json(parts.tokenizer)}
    strings = dict(format='bijdiff', version='5', tensors=tensors_hash(parts.tensors))
    for name,content in files.items():
        strings[name] = tensors_hash({}, content)
        strings[f'content of {name}'] = content.decode()
    write_atomically(folder, files | {WEIGHTS:save(parts.tensors, strings)})

# Kinds of files that are wrong. Each function changes a right model in a folder

SIZES = ('vocab_size seq_len d_model n_heads n_layers n_bijective_layers lattice_bits coupling_hidden_dim '
         'coupling_depth local_window segment_length n_experts k_active coupler_dim').split()

def nested(depth, inside='1'):
    "Return lists inside lists, as JSON"
    return '['*depth + inside + ']'*depth

def any_value(rng):
    "Return a value that JSON can hold"
    numbers = [0, -1, 1, 3, .5, -1e300, 1e300, float('nan'), float('inf'), 10**18, 2**63, 10**400]
    strings = ['', '3', 'final', '\n', '\x00', 'a'*5000]
    others = [None, True, False, [], [1], {}, {'name':'cosine'}, {'mask':{}}, [[[]]]]
    return rng.choice(numbers+strings+others)

def huge_sizes(rng, folder, parts):
    "Sizes that are wrong by many orders of magnitude"
    some = rng.sample(SIZES, rng.choice([1, 1, 2]))
    parts.config.update({k: rng.choice([1, 3, 2**31, 7])*10**rng.randrange(1, 30) for k in some})

def wrong_types(rng, folder, parts):
    "Any values in fields of the configuration"
    for k in rng.sample(sorted(parts.config), rng.choice([1, 1, 3])): parts.config[k] = any_value(rng)

def missing_fields(rng, folder, parts):
    "A configuration, or a tokenizer, without some of its fields"
    part = rng.choice([parts.config, parts.config, parts.tokenizer])
    for k in rng.sample(sorted(part), rng.randrange(1, len(part)+1)): del part[k]

def unknown_fields(rng, folder, parts):
    "Fields of a version that does not exist"
    part = rng.choice([parts.config, parts.tokenizer])
    part[rng.choice(['depth', '', 'self', 'cls', 'd_model ', '\n', 'Kind'])] = any_value(rng)

def no_dictionary(rng, folder, parts):
    "Deep nesting, very many brackets, or no dictionary at all"
    depth = 10**rng.randrange(1, 6)
    texts = [nested(depth), '{"noise":'*depth + '1' + '}'*depth, f'{{"a":{nested(depth)}}}',
             '[' + '[],'*10**5 + '1]', '', '{', 'NaN', '3', '"a"', '\ufeff{}',
             '{"vocab_size":' + '9'*5000 + '}']
    part = rng.choice(['config', 'tokenizer'])
    return parts._replace(**{part:rng.choice(texts).encode()})

GEOMETRIC = dict(name='geometric', sigma_min=.1, sigma_max=9.)
NOISES = [
    dict(mask=1, schedule=dict(name='polynomial', power=2., eps=1e-3)), dict(p_uniform=.1, gamma=1., T=None),
    dict(mask=1, schedule=dict(mask=GEOMETRIC, substitute=GEOMETRIC))]

def change_somewhere(rng, o):
    "Change, remove or add one value in a dictionary, or in one inside it"
    inner = [v for v in o.values() if isinstance(v, dict) and v]
    if inner and rng.random()<.5: return change_somewhere(rng, rng.choice(inner))
    k = rng.choice([*o, 'T', 'name', 'p_uniform', 'schedule', 'self'])
    if rng.random()<.2: o.pop(k, None)
    else: o[k] = any_value(rng)

def wrong_noises(rng, folder, parts):
    "Noise with other keys, types and numbers"
    parts.config['noise'] = json.loads(json.dumps(rng.choice(NOISES)))
    for _ in range(rng.choice([1, 2])): change_somewhere(rng, parts.config['noise'])

def wrong_tokenizers(rng, folder, parts):
    "A tokenizer with other kinds, keys and types"
    for _ in range(rng.choice([1, 2])): change_somewhere(rng, parts.tokenizer)

FALSIFIERS = dict(
    truncation=dict(direction='Right', max_length=2, strategy='LongestFirst', stride=0),
    padding=dict(strategy=dict(Fixed=64), direction='Right', pad_to_multiple_of=None, pad_id=0, pad_type_id=0,
                 pad_token='!'),
    normalizer=dict(type='Lowercase'), pre_tokenizer=dict(type='Whitespace'), decoder=None,
    post_processor=dict(type='ByteLevel', add_prefix_space=True, trim_offsets=False, use_regex=False),
    added_tokens=[dict(id=0, content='the', single_word=False, lstrip=True, rstrip=True, normalized=False,
                       special=True)],
    version='2.0')
MODEL_FALSIFIERS = dict(dropout=.5, unk_token='!', continuing_subword_prefix='##', end_of_word_suffix='</w>',
                        fuse_unk=True, byte_fallback=True, ignore_merges=True, type='WordPiece')

def false_byte_pairs(rng, folder, parts):
    "Byte pairs that would cut off, fill up, change or redraw the tokens of a text"
    inner = json.loads(parts.tokenizer['json'])
    vocab,merges = inner['model']['vocab'],inner['model']['merges']
    ids = [-1, 2**32, 10**400, 1.5, '1', 7, None]
    pairs = [['q', 'zz'], ['q'], 'a', 'a b c', 3, None, [1, 2], [[], []]]
    changes = [lambda: inner.update([rng.choice([*FALSIFIERS.items()])]),
               lambda: inner['model'].update([rng.choice([*MODEL_FALSIFIERS.items()])]),
               lambda: vocab.update({rng.choice([*vocab]):rng.choice(ids)}),
               lambda: vocab.pop(rng.choice([*vocab])),
               lambda: vocab.update({rng.choice(['', 'ab cd', '\U0001f600', '\x00']):len(vocab)}),
               lambda: merges.append(rng.choice(pairs)),
               lambda: inner.update(model=any_value(rng)),
               lambda: inner.pop(rng.choice([*inner])),
               lambda: inner['model'].update(vocab=any_value(rng))]
    rng.choice(changes)()
    parts.tokenizer['json'] = json.dumps(inner)

def wrong_tensors(rng, folder, parts):
    "Tensors of other names, shapes and types; or one too many, or too few"
    tensors = parts.tensors
    k = rng.choice([*tensors])
    v = tensors[k]
    name = rng.choice(['', 'x', '\n', f'_orig_mod.{k}', f'module.{k}'])
    changes = [lambda: tensors.pop(k), lambda: tensors.update({k:torch.cat([v, v])}),
               lambda: tensors.update({k:v.flatten()[None]}), lambda: tensors.update({k:v.flatten()[:0]}),
               lambda: tensors.update({k:v.long()}), lambda: tensors.update({k:v.to(torch.complex64)}),
               lambda: tensors.update({name:tensors.pop(k)}),
               lambda: tensors.update({k:torch.zeros(0, 2**40)})]
    rng.choice(changes)()

def many_tensors(rng, folder, parts):
    "Thousands of tensors, and a configuration with as many layers as they allow"
    n = rng.randrange(100, 8000)
    parts.tensors.update({f'backbone.blocks.{i}.{rng.choice(["x", "f"])}':torch.zeros(1) for i in range(n)})
    parts.config['n_layers'] = rng.choice([n, n//4, n//13])
    parts.config['n_experts'] = rng.choice([None, None, 2, 50])

def counted_tensors(rng, folder, parts):
    "As many tensors as the network of the configuration has, up to 2,000, with other names or shapes"
    parts.config['n_layers'] = rng.randrange(2, 100)
    config = DenoiserConfig(**{k:v for k,v in parts.config.items() if k not in ('format', 'version')})
    with torch.device('meta'): names = [*BijectiveDenoiser(config).state_dict()][:2000]
    if rng.random()<.5: names = [f'{name}{rng.randrange(9)}' for name in names]
    return parts._replace(tensors={name:torch.zeros(rng.randrange(3)) for name in names})

def heavy_headers(rng, folder, parts):
    "Megabytes of small values, each of which takes many times its length as an object of Python"
    piece = rng.choice(['[],', '{},', '"ab",', '1e9,', '-9999,', '"\\u00e9",', '1' + '0'*300 + ','])
    n = min(rng.choice([10**4, 10**5, 2*10**5, 2**18-9, 10**6]), 3*2**20//len(piece))
    values = f'[{piece*n}1]'
    keys = '{' + ''.join(f'"{i:x}":{i%7},' for i in range(min(n, 3*10**5))) + '"a":1}'
    content = rng.choice([f'{{"a":{values}}}', keys, f'{{"kind":"bpe","json":{json.dumps(keys)}}}', values,
                          f'{{"kind":"char","chars":{values}}}'])
    return parts._replace(**{rng.choice(['config', 'tokenizer']):content.encode()})

def no_numbers(rng, folder, parts):
    "Weights that are not finite: a right file, which comes back as it is"
    for v in parts.tensors.values(): v.fill_(rng.choice([float('nan'), float('inf'), 3e38, -1e-45]))

def write_raw(rng, path):
    "Write a safetensors file whose header is no header"
    entry = '"%s":{"dtype":"F32","shape":[%s],"data_offsets":[0,%s]}'
    entries = [entry%('a', '1'+'0'*13, '4'), entry%('a', '-1', '4'), entry%('a', '1', '9'*30),
               ','.join([entry%('a', '1', '4')]*9), '"__metadata__":{"format":3}', '"a":'+nested(9),
               '"a":"' + 'x'*2**23 + '"']
    texts = ['{}', '[]', '', ' '*2**23, nested(10**5), '{' + '[],'*10**6]
    header = rng.choice(texts + [f'{{{o}}}' for o in entries]).encode()
    size = rng.choice([len(header)]*6+[0, 2**62, 2**64-1, 10**9, len(header)-1])
    path.write_bytes(max(size, 0).to_bytes(8, 'little') + header + bytes(4))

def wrong_headers(rng, folder, parts):
    "Headers that are no JSON, too long or too deep"
    write_raw(rng, folder/WEIGHTS)
    return folder

def other_versions(rng, folder, parts):
    "Formats and versions that do not exist"
    strings = read_header(folder/WEIGHTS).strings
    values = ['', '4', '6', '²', '9'*5000, '5\n', '５', '-5', '5.0', 'bijdiff']
    strings[rng.choice(['format', 'version', 'version'])] = rng.choice(values)
    (folder/WEIGHTS).write_bytes(save(parts.tensors, strings))
    return folder

def make_no_file(rng, path):
    "Put something at a path that is not a file"
    path.unlink(missing_ok=True)
    kind = rng.choice(['zero', 'pipe', 'socket', 'folder', 'loop', 'nothing'])
    if kind=='zero': path.symlink_to('/dev/zero')
    if kind=='pipe': os.mkfifo(path)
    if kind=='folder': path.mkdir()
    if kind=='loop': path.symlink_to(path)
    if kind=='socket':
        here = os.getcwd()
        os.chdir(path.parent)                                     # as the path of a socket may not be long
        with socket.socket(socket.AF_UNIX) as s: s.bind(path.name)
        os.chdir(here)

def no_model(rng, folder, parts):
    "A device, a pipe, a socket or a folder in place of the weights"
    make_no_file(rng, folder/WEIGHTS)
    return folder

def no_text(rng, folder, parts):
    "A device, a pipe, a socket or a folder in place of a text"
    make_no_file(rng, folder/'text')
    return folder/'text'

def wrong_checkpoints(rng, folder, parts):
    "Checkpoints with other records and other headers"
    shutil.copy(FIXTURES/CHECKPOINT, folder)
    path = folder/CHECKPOINT
    if rng.random()<.3:
        write_raw(rng, path)
        return path
    tensors,strings = read_tensors(path),read_header(path).strings
    records = json.loads(strings['bijdiff_checkpoint'])
    change_somewhere(rng, records)
    rest = rng.choice([json.dumps(records), nested(10**5), '', '3', '[]', '{"a":' + nested(30) + '}'])
    strings |= dict(bijdiff_checkpoint=rest, hash=tensors_hash(tensors, rest.encode()))
    path.write_bytes(save(tensors, strings))
    return path

def wrong_checkpoint_devices(rng, folder, parts):
    "A device, a pipe, a socket or a folder in place of a checkpoint"
    make_no_file(rng, folder/CHECKPOINT)
    return folder/CHECKPOINT

class Compressed(NamedTuple):
    "What a compressed file is made of"
    start:bytes # Magic number and version
    header:dict
    words:bytes

def right_compressed(folder, **kwargs):
    "Compress a few bytes with the model in a folder; return the parts of the file"
    blob = compress(BijectiveDenoiser.from_pretrained(folder), b'the cat', steps=4, **kwargs)
    n, = struct.unpack('<I', blob[9:13])
    return Compressed(blob[:9], json.loads(blob[13:13+n]), blob[13+n:-16])

def write_compressed(folder, parts, header=None, words=None, length=None):
    "Write a compressed file with the right checksum; return its path"
    head = as_json(parts.header if header is None else header)
    body = parts.start + struct.pack('<I', len(head) if length is None else length) + head
    body += parts.words if words is None else words
    path = folder/'text.bij'
    path.write_bytes(body + hashlib.sha256(body).digest()[:16])
    return path

def wrong_compressed(rng, folder, parts):
    "Compressed files with other headers; other numbers of tokens are not among them"
    packed = right_compressed(folder)
    for _ in range(rng.choice([1, 2])): change_somewhere(rng, packed.header)
    if is_whole(packed.header.get('tokens')): packed.header['tokens'] = 7
    texts = [packed.header]*2 + [o.encode() for o in (nested(10**5), '[]', '', '{"a":'+nested(30)+'}')]
    return write_compressed(folder, packed, rng.choice(texts))

def compressed_claims(rng, folder, parts):
    "Compressed files of a few words that claim very many tokens, streams and so much context"
    packed = right_compressed(folder)
    packed.header.update(
        tokens=rng.choice([10**9, 2**24, 2**24, 2**53, 10**400, rng.randrange(2**24)]),
        streams=rng.choice([1, 16, 512, 512, 2**20, 2**53]), context=rng.choice([0, 0, 4, 15, 15, 16, 2**53]),
        rule=dict(rule=rng.choice(UnmaskingRule.names), steps=rng.choice([1, 4, 16])))
    return write_compressed(folder, packed, words=rng.randbytes(4*rng.choice([0, 1, 2, 5, 12])))

def compressed_words(rng, folder, parts):
    "Compressed files with other words, too many or too few of them, or other numbers of tokens"
    packed = right_compressed(folder)
    words = packed.words
    others = [words+bytes(4), words[:-4], words+b'a', b'', rng.randbytes(len(words)), rng.randbytes(4000),
              b'\xff'*400, bytes(400)]
    packed.header['tokens'] = rng.choice([0, 6, 7, 7, 8, 100])
    return write_compressed(folder, packed, words=rng.choice(others))

def compressed_rules(rng, folder, parts):
    "Compressed files with rules of absurd values"
    packed = right_compressed(folder)
    absurd = [0, -1, 1e-300, 1e300, 5e-324, 10**400, 2**53, 2**63, 2**64-1, [], [0, 0], [*range(10**4)], 'f']
    rule = dict(rule=rng.choice(UnmaskingRule.names))
    for k in rng.sample(sorted(UnmaskingRule.__dataclass_fields__), rng.choice([1, 1, 2])):
        rule[k] = any_value(rng) if rng.random()<.2 else rng.choice(absurd)
    if rng.random()<.2: rule['schedule'] = rng.choice([GEOMETRIC, COSINE | dict(eps=rng.choice(absurd))])
    packed.header['rule'] = rule
    return write_compressed(folder, packed)

def compressed_arithmetics(rng, folder, parts):
    "Compressed files of other machines, with very many threads, or no description of a machine"
    packed = right_compressed(folder, fast=True)
    arithmetic = packed.header['arithmetic']
    if rng.random()<.5: arithmetic['threads'] = rng.choice([0, -1, 2, 64, 256, 257, 2**31, 10**400])
    else: change_somewhere(rng, arithmetic)
    names = ['portable 0', 'portable 1', 'a'*10**5, nested(9)]
    if rng.random()<.2: packed.header['arithmetic'] = rng.choice(names)
    return write_compressed(folder, packed)

def compressed_headers(rng, folder, parts):
    "Compressed files with very long headers, or with a length that is not theirs"
    packed = right_compressed(folder)
    n = rng.choice([10**3, 10**5, 2**17])
    head = as_json(packed.header)
    keys = as_json({f'{i:x}':0 for i in range(n//2)})
    changes = [dict(model='a'*n), dict(rule=dict(rule=[*range(n)])), {'a'*n:1}]
    texts = [head, head+bytes(3), b' '*2**20, as_json([0]*n), keys]
    texts += [as_json(packed.header | o) for o in changes]
    lengths = [None, None, None, 0, 1, len(head)-4, len(head)+4, 2**20, 2**20+1, 2**32-1]
    return write_compressed(folder, packed, rng.choice(texts), length=rng.choice(lengths))

KINDS = {f.__name__:f for f in (
    huge_sizes, wrong_types, missing_fields, unknown_fields, no_dictionary, wrong_noises, wrong_tokenizers,
    false_byte_pairs, wrong_tensors, many_tensors, counted_tensors, heavy_headers, no_numbers, wrong_headers,
    other_versions, no_model, no_text, wrong_checkpoints, wrong_checkpoint_devices,
    wrong_compressed, compressed_claims, compressed_words, compressed_rules, compressed_arithmetics,
    compressed_headers)}

def make_hostile(kind, rng, folder):
    "Write a file of a kind into an empty folder; return its path"
    tokenizer = 'bpe' if kind=='false_byte_pairs' else rng.choice(['char', 'byte', 'bpe'])
    network = 'plain' if 'compressed' in kind else rng.choice([*NETWORKS])
    parts = read_parts(right_model(folder, network, tokenizer))
    made = KINDS[kind](rng, folder, parts)
    if isinstance(made, Path): return made
    write_parts(folder, made or parts)
    return folder

# Reading

def check_same(folder, model):
    "Check that a model is what its file describes"
    header = read_header(folder/WEIGHTS)
    values = json.loads(header.strings['content of config.json'])
    config = asdict(DenoiserConfig(**{k:v for k,v in values.items() if k not in ('format', 'version')}))
    same = asdict(model.config)==config and tensors_hash(plain_weights(model))==header.strings['tensors']
    if 'content of tokenizer.json' in header.strings:
        same = same and model.tokenizer.to_dict()==json.loads(header.strings['content of tokenizer.json'])
    assert same, 'the model is another one than its file describes'

def read(path):
    "Read a model, a checkpoint or a text"
    if path.name==CHECKPOINT: return read_checkpoint(path.parent)
    if path.name=='text': return read_text(path)
    model = BijectiveDenoiser.from_pretrained(path.parent if path.suffix=='.bij' else path)
    if path.suffix=='.bij': return decompress(model, path.read_bytes())
    check_same(path, model)

def outcome(path):
    "Return how reading ends: 'read', 'rejected', or what is wrong with the end"
    state = torch.get_rng_state()
    try: read(path)
    except (ValueError, OSError) as e:
        message = str(e)
        is_line = 0<len(message)<1000 and '\n' not in message
        end = 'rejected' if is_line else f'message {message!r:.300}'
    except BaseException as e: end = f'{type(e).__name__}: {e}'[:300]
    else: end = 'read'
    return end if torch.equal(state, torch.get_rng_state()) else f'{end}, with another random state'

def peak_mib():
    "Return the largest memory that this process has had, in MiB"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024

def report(path, target, printed):
    "Read a file in this process, and write how that ended"
    for stream in (1, 2): os.dup2(os.open(printed, os.O_WRONLY|os.O_CREAT), stream)
    size = int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size+2**33, size+2**33))
    signal.alarm(20)
    before,start,cpu = peak_mib(),time.perf_counter(),time.process_time()
    end = outcome(path)
    seconds,wall = time.process_time()-cpu,time.perf_counter()-start
    target.write_text(json.dumps(dict(end=end, seconds=seconds, wall=wall, mib=peak_mib()-before)))

def read_apart(path, place):
    "Read a file in a forked process; return how that ended, its seconds and its MiB"
    target,printed = place/'report',place/'printed'
    child = os.fork()
    if child==0:
        try: report(path, target, printed)
        finally: os._exit(0)
    os.waitpid(child, 0)
    text = printed.read_text(errors='replace')
    if not target.exists():
        return dict(end=f'killed after 20 s; {text[-300:]}', seconds=20., wall=20., mib=0.)
    result = json.loads(target.read_text())
    return result if not text else result | dict(end=f"{result['end']}, and printed {text!r:.300}")

def try_kind(kind, seed):
    "Make a file of a kind and read it"
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.manual_seed(seed)
        path = make_hostile(kind, random.Random(f'{kind} {seed}'), Path(place)/'files')
        return read_apart(path, Path(place))

def is_right(result):
    "Return True for an end as it should be, soon enough and with little memory"
    return result['end'] in ('read', 'rejected') and result['seconds']<MOST_SECONDS and result['mib']<MOST_MIB

def summary(results):
    "Return how the files of a kind ended, and the most time and memory that one of them took"
    ends = Counter(r['end'] for r in results)
    most = lambda k, digits: round(max(r[k] for r in results), digits)
    return dict(files=len(results), rejected=ends['rejected'], read=ends['read'],
                right=sum(map(is_right, results)), seconds=most('seconds', 3), wall_seconds=most('wall', 3),
                mib=most('mib', 0))

@command
def hostile_files(
    n:int=40, # Files of each kind
    seed:int=0, # Seed of the files
    kinds:str='', # Names of kinds, separated by commas; all if not given
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Count how hostile files are answered"
    names = kinds.split(',') if kinds else [*KINDS]
    check(not {*names}-{*KINDS}, 'kinds', kinds, f"some of {', '.join(KINDS)}")
    torch.set_num_threads(1)
    rows,wrong = {},[]
    for kind in names:
        results = [try_kind(kind, seed*1000+i) for i in range(n)]
        rows[kind] = summary(results)
        wrong += [dict(kind=kind, number=i, **r) for i,r in enumerate(results) if not is_right(r)]
        print(kind, rows[kind], flush=True)
    for r in wrong: print(r)
    total = dict(files=sum(r['files'] for r in rows.values()), right=sum(r['right'] for r in rows.values()))
    limits = dict(most_seconds=MOST_SECONDS, most_mib=MOST_MIB)
    record = run_record(__file__, n=n, seed=seed, **limits)
    save_result(result_path(__file__, out), record | dict(total=total, kinds=rows, wrong=wrong))

if __name__=='__main__': hostile_files()
