"""Small tokenizers and sources with the methods that stores, loaders and streams use."""
import random
from collections import Counter
from typing import NamedTuple
import numpy as np

class Part(NamedTuple):
    "A document or a part of it"
    text:str
    ends:bool

class BytesWithEnd:
    "Bytes, and one more token for the end of a document"
    kind = 'byte'
    eod_id = 256
    vocab_size = 257
    dtype = np.uint16
    fingerprint = 'bytes'
    def encode_batch(self, texts, replace=False):
        return [np.frombuffer(text.encode(), np.uint8).astype(self.dtype) for text in texts]
    def unknown(self, text): return Counter(c for c in text if c=='#')
    def to_dict(self): return dict(kind='byte', eod=True)

class ListSource:
    "Documents of a list of parts; parts that are read are recorded"
    name = 'a list'
    n_bytes = None
    def __init__(self, parts, fingerprint='source'):
        self.list = [Part(*part) for part in parts]
        self.fingerprint = fingerprint
        self.read = []
    def parts(self, first=0):
        for i in range(first, len(self.list)):
            self.read.append(i)
            yield self.list[i]
    def shuffled(self, seed):
        return ListSource(random.Random(seed).sample(self.list, len(self.list)), f'{self.fingerprint}-{seed}')

def random_parts(n, seed=0, longest=60):
    "Parts of documents of random words; a third of them do not end their document, the last one does"
    rng = random.Random(seed)
    words = 'a', 'word', 'of', 'Ünicode', '\n\n', '#'
    texts = [' '.join(rng.choices(words, k=rng.randrange(longest))) for _ in range(n)]
    return [(text, rng.random()>.3) for text in texts[:-1]]+[(texts[-1], True)]

def ids_of(parts):
    "Ids of all parts by the tokenizer above, one after the other"
    return np.concatenate([[*text.encode()]+[256]*ends for text,ends in parts]).astype(int).tolist()

def document_sequences(parts, seq_len):
    "Sequences of each document by itself, filled up with the end-of-document token"
    documents,found = [[]],[]
    for i in ids_of(parts):
        documents[-1].append(i)
        if i==256: documents.append([])
    for ids in documents[:-1]:
        ids = ids+[256]*(-len(ids)%seq_len)
        found += [ids[i:i+seq_len] for i in range(0, len(ids), seq_len)]
    return found
