"""Peak memory of the commands against the size of their file.

    python benchmarks/file_sizes.py

A small model is trained for one epoch on texts of several sizes, and scores and compresses files of the
same sizes. Every command runs as a process of its own, whose largest resident set the kernel keeps; that of a
process which has only imported what the command imports is subtracted. Files are compressed with --fast. Rows
that are in the result file are skipped."""
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from bijdiff.console import command
from bijdiff.data.corpora import pydoc_corpus
from common import add_row, has_row, result_path, resume, run_record, save

SIZES = .1, 1, 5, 20
NETWORK = dict(d_model=4, n_heads=1, n_layers=1, seq_len=256)

def peak_mib(*words):
    "Run a Python process to its end; return its largest resident set in MiB, and its seconds"
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.DEVNULL)
    _,status,usage = os.wait4(process.pid, 0)
    if status: raise RuntimeError(f'{words[0]} has ended with {os.waitstatus_to_exitcode(status)}')
    return usage.ru_maxrss/1024, time.perf_counter()-start

def words_of(name, *words):
    "Words that start a command of the package"
    return Path(sys.executable).parent/f'bijdiff_{name}', *words

def write_text(path, n_bytes):
    "Write a text of this size, which repeats the beginning of the language reference of Python"
    content = pydoc_corpus()[:50_000].encode('ascii', 'replace')
    path.write_bytes((content*(n_bytes//len(content)+1))[:n_bytes])

def commands(folder, text):
    "Words of the commands that are measured, by name, in an order in which each has what it needs"
    model,small,limit = folder/'model',folder/'small',['--most_tokens=1000000000']
    network = [f'--{name}={value}' for name,value in NETWORK.items()]
    training = ['--corpus', text, '--out', model, *network, '--epochs=1', '--bs=64', '--dtype=float32']
    return {
        'train': words_of('train', *training),
        'score, bound': words_of('score', model, text, '--n=2'),
        'score, rule': words_of('score', model, text, '--rule=spread', '--steps=1'),
        'compress': words_of('compress', model, text, '--out', small, '--steps=1', '--fast', *limit),
        'decompress': words_of('decompress', model, small, '--out', folder/'back', *limit),
    }

def measure(result, path, megabytes):
    "Add a row for each command with a file of a size"
    with tempfile.TemporaryDirectory() as d:
        folder,text = Path(d),Path(d)/'text.txt'
        write_text(text, int(megabytes*1e6))
        for name,words in commands(folder, text).items():
            mib,seconds = peak_mib(*words)
            above = mib-result['imports_mib']['runs' if name=='train' else 'documents']
            row = dict(command=name, megabytes=megabytes, peak_mib=round(mib), above_imports_mib=round(above),
                       bytes_per_byte=round(above*2**20/(megabytes*1e6), 1), seconds=round(seconds, 1))
            add_row(result['rows'], row)
        save(path, result)

@command
def file_sizes(
    most:float=20., # Largest size in MB
    out:str=None, # Result file; results/file_sizes.json if not given
):
    "Measure the peak memory of the commands against the size of their file"
    path = result_path(__file__, out)
    os.environ['OMP_NUM_THREADS'] = '1'
    result = resume(path, dict(network=NETWORK))
    imports = {name: round(peak_mib('-c', f'import bijdiff.{name}')[0]) for name in ('runs', 'documents')}
    result = run_record(__file__, network=NETWORK, imports_mib=imports) | dict(rows=result.get('rows', []))
    for megabytes in SIZES:
        if megabytes>most or has_row(result['rows'], megabytes=megabytes): continue
        measure(result, path, megabytes)

if __name__=='__main__': file_sizes()
