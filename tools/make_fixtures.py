"""Write the files in tests/fixtures: model, checkpoint and compressed text, in the formats that are kept.

    python tools/make_fixtures.py FOLDER

FOLDER/0.1 has the formats of version 0.1, FOLDER/checkpoint_3 a checkpoint of format 3, FOLDER/codec_3 a
compressed text of format 3, with its model of random weights. The files in tests/fixtures are never written
again: a test reads them to see that old files are still read. New kinds of files go to a new folder beside
them."""
import json
import sys
from pathlib import Path
import torch
from bijdiff.data.loaders import text_dls
from bijdiff.data.tokens import CharTokenizer
from bijdiff.likelihood.codec import compress, fingerprint
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.model.saving import tensors_hash
from bijdiff.testing import quiet_fit, random_weights
from bijdiff.training.callbacks import EMACallback
from bijdiff.training.checkpoint import CheckpointCallback
from bijdiff.training.learner import diffusion_learner
from fastai.callback.all import Callback, CancelFitException, GradientAccumulation

TEXT = 'the quick brown fox jumps over the lazy dog. '*20
SIZES = dict(d_model=8, n_heads=2, n_layers=1)

class StopAfter(Callback):
    "Interrupt a training before an epoch"
    order = 100
    def __init__(self, epochs): self.epochs = epochs
    def before_epoch(self):
        if self.epoch==self.epochs: raise CancelFitException

def learner(*cbs):
    "A small learner on a fixed text"
    dls = text_dls(TEXT, seq_len=16, bs=8, device='cpu')
    return diffusion_learner(dls, optimizer='adam', config_kwargs=SIZES, cbs=list(cbs))

def uniform_model():
    "A denoiser whose logits are 0 on every machine, with its tokenizer"
    torch.manual_seed(0)
    model = BijectiveDenoiser(DenoiserConfig(27, seq_len=16, **SIZES))
    model.tokenizer = CharTokenizer(' abcdefghijklmnopqrstuvwxyz')
    return model.eval()

def write_checkpoint_3(folder):
    "Write a checkpoint with accumulated gradients and averages"
    cbs = CheckpointCallback(folder), GradientAccumulation(40), EMACallback(.9), StopAfter(2)
    quiet_fit(learner(*cbs), 3)

def write_all(folder):
    "Write a model, a compressed text and a checkpoint, and what they hold"
    model = uniform_model()
    blob = compress(model, b'a file that comes back', steps=4)
    (folder/'text.bij').write_bytes(blob)
    model.save_pretrained(folder/'uniform')
    random_weights(model, .3).save_pretrained(folder/'model')
    ids = torch.tensor([[27, 1, 2, 27, 3]])
    quiet_fit(learner(CheckpointCallback(folder), StopAfter(2)), 3)
    with torch.no_grad(): logits = model(ids)[0,0,:4].tolist()
    held = dict(weights=tensors_hash(model.state_dict()), logits=logits, fingerprint=fingerprint(model))
    (folder/'held.json').write_text(json.dumps(held, indent=1)+'\n')

def write_codec_3(folder):
    "Write a model of random weights and a compressed text, with context and an adaptive rule"
    model = random_weights(uniform_model(), .3)
    model.save_pretrained(folder/'model')
    text = b'a file that comes back on every machine by the bits of its network'
    blob = compress(model, text, 'confidence', steps=5, temperature=.8)
    (folder/'text.bij').write_bytes(blob)

if __name__=='__main__':
    for name,write in {'0.1':write_all, 'checkpoint_3':write_checkpoint_3, 'codec_3':write_codec_3}.items():
        folder = Path(sys.argv[1])/name
        folder.mkdir(parents=True)
        write(folder)
