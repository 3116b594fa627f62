"""Make the small model that comes with the package, `bijdiff:books`, from a trained one, and measure it.

    bijdiff_train --corpus classics --valid_split validation --tokenizer bpe --vocab_size 1024 --bs 16 \\
        --d_model 128 --n_layers 6 --steps 5500 --dropout 0 --dtype bfloat16 --store_activations \\
        --save_every 5min --out trained
    python benchmarks/small_model.py trained --corpus classics

`classics` is a folder with the splits train, validation and test: 143 English books published before 1925,
from https://github.com/mlschmitt/classic-books-markdown (commit 944882722e9a), one row a book.

The weights are saved in half precision, so that the folder `bijdiff/models/books` has at most 3 MB, and are
computed with in float32. Measured on the split `test`: the bound before and after that. Measured for several
samplers: the words of three letters and more that occur in 8 million characters of the training text."""
from pathlib import Path
from tempfile import TemporaryDirectory
import torch
from datasets import load_dataset
from bijdiff.console import command
from bijdiff.likelihood.bounds import score_ids
from bijdiff.likelihood.quality import even_chunks, TextQuality
from bijdiff.model.denoiser import BijectiveDenoiser
from common import n_params, result_path, rounded, run_record, save
from text_quality import write

PLACE = Path(__file__).resolve().parent.parent/'bijdiff'/'models'/'books'
MOST_BYTES = 3_000_000
REFERENCE_CHARS = 8_000_000
WRITERS = {
    'ancestral, temperature 1': dict(sampler='ancestral', steps=128),
    'ancestral, temperature 0.7': dict(sampler='ancestral', steps=128, temperature=.7),
    'left to right, temperature 0.7': dict(rule='left_to_right', temperature=.7),
    'spread, 64 passes, temperature 0.7': dict(rule='spread', steps=64, temperature=.7),
    'remask_loop, temperature 0.7': dict(sampler='remask_loop', steps=128, revise=.1, temperature=.7)}

def books_of(corpus, split):
    "Return the books of a split, one after the other"
    return '\n\n'.join(load_dataset(corpus, split=split)['text'])

def save_half(trained):
    "Save a trained model in half precision; return the number of bytes of its files"
    model = BijectiveDenoiser.from_pretrained(trained).half()
    with TemporaryDirectory() as folder:
        size = sum(path.stat().st_size for path in model.save_pretrained(folder).iterdir())
    if size>MOST_BYTES: raise ValueError(f'the files have {size:,} bytes; expected at most {MOST_BYTES:,}')
    model.save_pretrained(PLACE)
    return size

def bound(model, text, n, seed):
    "Return the bound on a text in bits per character, and its standard error"
    return rounded(score_ids(model, model.tokenizer.encode(text), n=n, seed=seed).bits(len(text)))

def quality_of(model, quality, n, seed):
    "Return a row of measures for each sampler"
    rows = []
    for name,options in WRITERS.items():
        texts,seconds = write(model, n, seed, options)
        measured = quality(texts)
        words = dict(known_words=rounded(measured.known_words), entropy=rounded(measured.entropy))
        rows.append(dict(name=name, **options, seconds=seconds, **words, text=texts[0]))
        print(name, words['known_words'])
    return rows

@command
def small_model(
    trained:str, # Folder of the trained model
    corpus:str='classics', # Folder with the splits train and test
    chars:int=100_000, # Characters of the test split for the bounds
    draws:int=8, # Draws of the noise
    n:int=8, # Texts of each sampler
    seed:int=0, # Seed of noise and samples
):
    "Save the model that comes with the package, and measure it"
    torch.set_num_threads(1)
    size,test = save_half(trained),books_of(corpus, 'test')
    models = {'float32': BijectiveDenoiser.from_pretrained(trained),
              'float16': BijectiveDenoiser.from_pretrained(PLACE)}
    bounds = {name: bound(o, test[:chars], draws, seed) for name,o in models.items()}
    print(size, 'bytes, bounds', bounds)
    quality = TextQuality(books_of(corpus, 'train')[:REFERENCE_CHARS])
    held_out = quality(even_chunks(test, 64, 1000))
    rows = quality_of(models['float16'], quality, n, seed)
    measured = dict(bytes=size, n_params=n_params(models['float16']), bounds=bounds, rows=rows,
                    held_out_known_words=rounded(held_out.known_words))
    settings = dict(chars=chars, draws=draws, n=n, seed=seed)
    save(result_path(__file__), dict(**measured, **run_record(__file__, **settings)))

if __name__=='__main__': small_model()
