"""Helpers of the tests of compressed files: small models, and the layout of a file."""
import json
import random
import struct
import torch
from bijdiff.data.tokens import ByteTokenizer
from bijdiff.likelihood import codec
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.testing import random_weights

magic,version,checksum = codec._MAGIC,codec._VERSION,codec._checksum
CHECKSUM_BYTES = 16
LENGTH_AT = len(magic)+1 # the version is one byte
HEADER_AT = LENGTH_AT+4

def small_denoiser(tokenizer=None, seed=0, std=.3, logit_scale=1., **config_kwargs):
    "A denoiser in float32 with random weights, whose logits are multiplied by a number"
    torch.manual_seed(seed)
    tokenizer = tokenizer or ByteTokenizer()
    config_kwargs = dict(seq_len=16, d_model=8, n_heads=2, n_layers=2) | config_kwargs
    m = random_weights(BijectiveDenoiser(DenoiserConfig(tokenizer.vocab_size, **config_kwargs)), std)
    for p in m.output_head.parameters(): p.data *= logit_scale
    m.tokenizer = tokenizer
    return m.eval()

def random_bytes(n, seed=0): return random.Random(seed).randbytes(n)

def read_header(blob):
    "Header of a compressed file, and the number of its bytes that hold tokens"
    length, = struct.unpack('<I', blob[LENGTH_AT:HEADER_AT])
    header = json.loads(blob[HEADER_AT:HEADER_AT+length])
    return header, len(blob)-HEADER_AT-length-CHECKSUM_BYTES

def seal(body): return body+checksum(body)

def words_of(blob):
    "Words of a compressed file, as bytes"
    return blob[len(blob)-CHECKSUM_BYTES-read_header(blob)[1]:-CHECKSUM_BYTES]

def make_file(header, words, length=None):
    """A file with the right checksum

    The header is a dictionary, or bytes; another length may be written for it than it has."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    return seal(magic + struct.pack('<BI', version, length) + text + bytes(words))
