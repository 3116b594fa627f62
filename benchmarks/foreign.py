"""Masked models of transformers, trained with its own loop, and scored beside one of ours.

    python benchmarks/foreign.py MODEL

MODEL is a folder that bijdiff_train wrote on the embedded corpus. A BERT and a ModernBERT (128 wide, four
layers) learn the training part of that corpus, with byte pairs of 1,024 tokens, by the Trainer of
transformers and its collator of masks: a fraction of the tokens is hidden, 0.15 as in BERT, 0.3 as in
ModernBERT, or a random one as in masked diffusion. Each is saved and loaded again by
`load_denoiser('hf:FOLDER')`. The first held-out characters are then scored in bits per byte, exactly, by
several unmasking rules, and by the bound; MODEL likewise. `by_frequency` is the score by the frequencies of
tokens alone. Writes benchmarks/results/foreign.json after every model. Models that are there are skipped:
remove the file to begin again."""
import math
import tempfile
import tokenizers
import torch
import transformers
from bijdiff.console import command
from bijdiff.data.corpora import load_corpus, split_text
from bijdiff.likelihood.bounds import score_ids
from bijdiff.likelihood.exact import document_nll
from bijdiff.model.foreign import load_denoiser
from common import add_row, has_row, n_params, result_path, resume, run_record, save, timed

SPECIAL = ['[PAD]','[UNK]','[CLS]','[SEP]','[MASK]']
SIZES = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512)
RULES = ('left_to_right', None), ('spread', None), ('spread', 16), ('confidence', None)

def make_tokenizer(text, vocab_size=1024):
    "Train byte pairs with the tokenizers library; return them as a tokenizer of transformers"
    pairs = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token='[UNK]'))
    pairs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size+len(SPECIAL), special_tokens=SPECIAL,
                                             initial_alphabet=alphabet, show_progress=False)
    pairs.train_from_iterator(text.splitlines(keepends=True), trainer)
    around = [(o, pairs.token_to_id(o)) for o in ('[CLS]', '[SEP]')]
    single = tokenizers.processors.TemplateProcessing('[CLS] $A [SEP]', special_tokens=around)
    pairs.post_processor = single
    names = dict(zip(('pad_token','unk_token','cls_token','sep_token','mask_token'), SPECIAL))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=pairs, **names)

def make_network(kind, tokenizer, length):
    "Return a network of transformers with fresh weights"
    sizes = SIZES | dict(vocab_size=len(tokenizer), max_position_embeddings=length+2)
    if kind=='BERT': return transformers.BertForMaskedLM(transformers.BertConfig(**sizes))
    ids = dict(pad_token_id=0, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3)
    return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**sizes, **ids))

class RandomFraction(transformers.DataCollatorForLanguageModeling):
    "Mask a random fraction of the tokens, another one in each batch"
    def torch_call(self, examples):
        self.mlm_probability = max(torch.rand(()).item(), .02)
        return super().torch_call(examples)

def collator(tokenizer, fraction):
    "Return the collator of masks of transformers: of a fixed fraction, or of a random one if None"
    if fraction is None: return RandomFraction(tokenizer, mask_replace_prob=1., random_replace_prob=0.)
    return transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=fraction)

def examples(tokenizer, text, length):
    "Chunks of a text between [CLS] and [SEP]"
    ids = tokenizer(text, add_special_tokens=False, verbose=False)['input_ids']
    chunks = [ids[i:i+length] for i in range(0, len(ids)-length+1, length)]
    return [dict(input_ids=[tokenizer.cls_token_id, *c, tokenizer.sep_token_id]) for c in chunks]

def train(network, tokenizer, text, fraction, lr, length, steps, seed):
    "Train with the loop of transformers; return seconds"
    with tempfile.TemporaryDirectory() as place:
        options = transformers.TrainingArguments(
            place, max_steps=steps, per_device_train_batch_size=8, learning_rate=lr, warmup_steps=steps//10,
            lr_scheduler_type='cosine', seed=seed, save_strategy='no', report_to=[], logging_steps=100,
            disable_tqdm=True, dataloader_pin_memory=False, use_cpu=not torch.cuda.is_available())
        trainer = transformers.Trainer(network, options, collator(tokenizer, fraction),
                                       examples(tokenizer, text, length))
        return timed(trainer.train)[1]

def scores(model, text, draws):
    "Bits per byte of a text by each rule, exactly, and by the bound with its error"
    ids = torch.tensor(model.tokenizer.encode(text))
    n_bytes = len(text.encode())
    found = {}
    for rule,steps in RULES:
        nats,seconds = timed(lambda: document_nll(model, ids, rule, steps).sum().item())
        name = rule if steps is None else f'{rule}, {steps} steps'
        found[name] = dict(bits_per_byte=round(nats/math.log(2)/n_bytes, 4), seconds=round(seconds, 1))
        print(name, found[name], flush=True)
    bits,se = score_ids(model, ids, draws).bits(n_bytes)
    return found | dict(bound=dict(bits_per_byte=round(bits, 4), se=round(se, 4)))

def by_frequency(tokenizer, text, held_out):
    "Bits per byte of the held-out text by the frequencies of its tokens in the training text, plus one each"
    counts,ids = (torch.tensor(tokenizer(o, add_special_tokens=False, verbose=False)['input_ids'])
                  for o in (text, held_out))
    log_p = (counts.bincount(minlength=len(tokenizer))+1.).double().log()
    nats = len(ids)*log_p.logsumexp(0)-log_p[ids].sum()
    return round(nats.item()/math.log(2)/len(held_out.encode()), 4)

@command
def foreign(
    model:str, # Folder of a model of ours, trained on the embedded corpus
    steps:int=2000, # Steps of each training
    length:int=128, # Tokens of a sequence, without [CLS] and [SEP]
    n:int=8000, # Held-out characters that are scored
    draws:int=32, # Draws of the noise for the bound
    seed:int=0, # Seed of weights, data order and masks
    threads:int=1, # Threads of PyTorch
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Train masked models of transformers, and score them beside one of ours"
    torch.set_num_threads(threads)
    target = result_path(__file__, out)
    settings = dict(steps=steps, length=length, n=n, draws=draws, seed=seed)
    old = resume(target, settings)
    rows = old.get('rows', [])
    record = run_record(__file__, old=old, **settings) | dict(transformers=transformers.__version__)
    text,held_out = split_text(load_corpus('pydoc'))
    tokenizer = make_tokenizer(text)
    record |= dict(by_frequency=by_frequency(tokenizer, text, held_out[:n]))
    for kind,fraction,lr in (('BERT', .15, 5e-4), ('ModernBERT', .3, 2e-3), ('BERT', None, 5e-4)):
        if has_row(rows, kind=kind, fraction=fraction): continue
        transformers.set_seed(seed)
        network = make_network(kind, tokenizer, length)
        seconds = train(network, tokenizer, text, fraction, lr, length, steps, seed)
        with tempfile.TemporaryDirectory() as place:
            network.save_pretrained(place)
            tokenizer.save_pretrained(place)
            loaded = load_denoiser(f'hf:{place}', seq_len=length)
        size = dict(lr=lr, n_params=n_params(network), seconds=round(seconds))
        add_row(rows, dict(kind=kind, fraction=fraction, **size, scores=scores(loaded, held_out[:n], draws)))
        save(target, dict(rows=rows) | record)
    if not has_row(rows, kind='bijdiff'):
        ours = load_denoiser(model)
        add_row(rows, dict(kind='bijdiff', n_params=n_params(ours), scores=scores(ours, held_out[:n], draws)))
        save(target, dict(rows=rows) | record)

if __name__=='__main__': foreign()
