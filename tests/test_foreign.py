"""Masked models of other libraries: networks of transformers and of plain PyTorch as denoisers.

Only the networks come from elsewhere: their likelihoods are summed over all sequences, their samples counted,
their files decoded."""
import importlib.util
import json
import math
import sys
from itertools import product
import pytest
import tokenizers
import torch
from torch import nn
from bijdiff.cli import bijdiff_compress, bijdiff_decompress, bijdiff_sample, bijdiff_score
from bijdiff.likelihood.bounds import nelbo_draws
from bijdiff.likelihood import codec
from bijdiff.likelihood.codec import compress, decompress
from bijdiff.likelihood.exact import all_orders_nats, document_nll, log_prob
from bijdiff.model.denoiser import check_denoiser
from bijdiff.model.foreign import check_sees_later, ForeignDenoiser, load_denoiser, load_masked_lm, MaskedLM
from bijdiff.sampling.generate import sample
from bijdiff.testing import chi_square

transformers = pytest.importorskip('transformers')
RULES = 'left_to_right','random','spread','block','confidence','entropy'
SPECIAL = ['[PAD]','[UNK]','[CLS]','[SEP]','[MASK]']
LETTERS = ['a','b','c']
SMALL = dict(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
             initializer_range=.5)

# Tokenizers and networks of transformers

def letters():
    "A tokenizer of transformers with three letters, between [CLS] and [SEP]"
    vocab = {t:i for i,t in enumerate([*SPECIAL, *LETTERS])}
    t = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, '[UNK]'))
    t.pre_tokenizer = tokenizers.pre_tokenizers.Split('', 'isolated')
    t.decoder = tokenizers.decoders.Fuse()
    around = [('[CLS]', 2), ('[SEP]', 3)]
    t.post_processor = tokenizers.processors.TemplateProcessing('[CLS] $A [SEP]', special_tokens=around)
    return wrapped(t)

def wrapped(t, **kwargs):
    "A tokenizer of the tokenizers library as one of transformers"
    names = dict(zip(('pad_token', 'unk_token', 'cls_token', 'sep_token', 'mask_token'), SPECIAL))
    kwargs = dict(names, model_max_length=64) | kwargs
    return transformers.PreTrainedTokenizerFast(tokenizer_object=t, **kwargs)

def bert(**kwargs):
    config = transformers.BertConfig(**dict(SMALL, max_position_embeddings=16) | kwargs)
    return transformers.BertForMaskedLM(config)

def modern_bert(**kwargs):
    ids = dict(pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3)
    config = transformers.ModernBertConfig(**dict(SMALL, max_position_embeddings=16, **ids) | kwargs)
    return transformers.ModernBertForMaskedLM(config)

def roberta(**kwargs):
    config = transformers.RobertaConfig(**dict(SMALL, max_position_embeddings=18, pad_token_id=1) | kwargs)
    return transformers.RobertaForMaskedLM(config)

NETWORKS = dict(bert=bert, modern_bert=modern_bert, roberta=roberta)

@pytest.fixture(params=NETWORKS)
def folder(request, tmp_path):
    "A folder with a network of random weights and its tokenizer, as transformers saves them"
    torch.manual_seed(0)
    return save(tmp_path/'model', NETWORKS[request.param](), letters())

def save(place, network, tokenizer):
    network.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place

# Networks of other kinds

def llada():
    "A network of Llama blocks in which every position sees all others, without a tokenizer"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, max_position_embeddings=16)
    net = transformers.LlamaForCausalLM(config).eval()
    def logits(ids):
        everything = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1], dtype=next(net.parameters()).dtype)
        return net(ids, attention_mask=everything).logits
    return net,logits

class PlainMDLM(nn.Module):
    "A masked diffusion network of PyTorch's own layers; the mask is its last id"
    def __init__(self, n_ids, length, dim=16):
        super().__init__()
        self.embed = nn.Embedding(n_ids, dim)
        self.place = nn.Parameter(torch.randn(length, dim))
        layer = nn.TransformerEncoderLayer(dim, 2, 32, dropout=0., batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(dim, n_ids)
    def features(self, ids): return self.blocks(self.embed(ids)+self.place[:ids.shape[1]])
    def forward(self, ids): return self.head(self.features(ids))

def make(kind):
    "A denoiser around a network of three clean ids"
    torch.manual_seed(1)
    if kind=='llada': return ForeignDenoiser(llada()[1], 8, 4, seq_len=8, never_written=[0, 1, 2, 3])
    net = PlainMDLM(4, 8).eval()
    if kind=='function': return ForeignDenoiser(net, n_ids=4, mask_id=3, seq_len=8)
    return ForeignDenoiser(net.features, n_ids=4, mask_id=3, seq_len=8, head=net.head)

KINDS = 'llada','function','split'

def all_texts(model, L):
    "All sequences of a length, (n^L, L)"
    clean = model.clean_ids.nonzero()[:,0].tolist()
    return torch.tensor([*product(clean, repeat=L)])

def judge_sums(model):
    "Probabilities of all sequences add up to 1 under every rule"
    texts = all_texts(model, 4)
    for rule in RULES:
        total = log_prob(model, texts, rule, steps=2).exp().sum().item()
        assert total==pytest.approx(1, abs=2e-5), rule

@pytest.mark.parametrize('kind', KINDS)
def test_probabilities_of_a_function_add_up_to_one(kind):
    judge_sums(make(kind))

def test_probabilities_of_a_model_of_transformers_add_up_to_one(folder):
    model = load_denoiser(f'hf:{folder}')
    check_denoiser(model)
    assert model.clean_ids.nonzero()[:,0].tolist()==[5, 6, 7]
    judge_sums(model)

def test_probability_of_special_tokens_would_be_missed(folder):
    "With [UNK] among the written ids three letters no longer have probability 1"
    network = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    more = MaskedLM(network, 4, 8, [0, 2, 3], None, [2], [3])
    texts = torch.tensor([*product([5, 6, 7], repeat=3)])
    assert log_prob(more, texts).exp().sum().item()<.99

# What the adapter does with a sequence

def test_conditionals_are_those_of_the_network_between_its_tokens(folder):
    "The network is called by hand, with [CLS] and [SEP] around; logits of special tokens are left out"
    model = load_denoiser(f'hf:{folder}')
    net = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    x = torch.tensor([[5, 4, 7, 4]])
    with torch.no_grad(): whole = net(torch.tensor([[2, 5, 4, 7, 4, 3]])).logits[:,1:-1]
    assert torch.equal(model(x), whole)
    given = log_prob(model, torch.tensor([[5, 6, 7, 5]]), template=torch.tensor([5, 4, 7, 5]))
    with torch.no_grad(): logits = net(torch.tensor([[2, 5, 4, 7, 5, 3]])).logits[0,2,5:]
    assert given.item()==pytest.approx(logits.double().log_softmax(-1)[1].item(), abs=1e-5)

def test_the_head_is_called_for_some_positions(folder):
    "Body and head are told apart where they give the logits of the whole network"
    model = load_denoiser(f'hf:{folder}')
    h = model.hidden(torch.tensor([[5, 4, 7]]))
    assert h.shape==(1, 3, 16)
    torch.testing.assert_close(model.head(h[0,1]), model(torch.tensor([[5, 4, 7]]))[0,1])

def test_a_head_that_is_not_the_whole_of_it_is_left_alone():
    "A network that does more to the logits of its head is called as a whole"
    class Odd(nn.Module):
        device,base_model_prefix = torch.device('cpu'),'body'
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Embedding(8, 4), Listed())
            self.cls = nn.Linear(4, 8)
        def forward(self, ids):
            return transformers.modeling_outputs.MaskedLMOutput(logits=2*self.cls(self.body(ids)[0]))
    class Listed(nn.Module):
        def forward(self, x): return [x]
    torch.manual_seed(0)
    network = Odd()
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(MaskedLM(network, 4, 8)(ids), network(ids).logits)

def test_outputs_for_the_token_after_are_shifted():
    "A network that gives at each position a logit for the id two further: shifted, for that before it"
    class Next(nn.Module):
        device,base_model_prefix = torch.device('cpu'),''
        def forward(self, ids):
            found = nn.functional.one_hot(ids, 8).float()
            return transformers.modeling_outputs.MaskedLMOutput(logits=found)
    ids = torch.tensor([[5, 6, 7]])
    with_start = MaskedLM(Next(), 4, 8, before=[2], shifted=True)
    assert with_start(ids).argmax(-1).tolist()==[[2, 5, 6]]
    without = MaskedLM(Next(), 4, 8, shifted=True)
    assert without(ids).argmax(-1).tolist()==[[5, 5, 6]]
    assert MaskedLM(Next(), 4, 8, before=[2], after=[3])(ids).argmax(-1).tolist()==[[5, 6, 7]]

def test_later_tokens_matter_with_a_full_mask():
    "The network of Llama blocks depends on later tokens with a full mask, and not without"
    net,logits = llada()
    a = torch.tensor([[5, 6, 7], [5, 6, 5]])
    assert not torch.equal(*logits(a)[:,0])
    assert torch.equal(*net(a).logits[:,0])

# Samples and files

@pytest.mark.parametrize('rule', ['spread', 'confidence'])
def test_samples_are_as_frequent_as_their_likelihood_says(rule, tmp_path):
    torch.manual_seed(0)
    model = load_denoiser(f'hf:{save(tmp_path/"m", bert(initializer_range=.3), letters())}')
    texts = all_texts(model, 3)
    written = sample(model, 3000, rule=rule, steps=2, length=3, seed=1)
    assert bool(model.clean_ids[written].all())
    counts = (written[:,None]==texts).all(-1).sum(0)
    assert int(counts.sum())==3000
    assert chi_square(counts, log_prob(model, texts, rule, steps=2).exp())>1e-3

def byte_level(tmp_path, **kwargs):
    "A BERT with the byte-level tokenizer, whose every text comes back"
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocab = {t:i for i,t in enumerate([*SPECIAL, *sorted(alphabet)])}
    t = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token='[UNK]'))
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = tokenizers.decoders.ByteLevel()
    torch.manual_seed(0)
    network = bert(vocab_size=len(vocab), max_position_embeddings=64, initializer_range=.2, **kwargs)
    return save(tmp_path/'bytes', network, wrapped(t))

TEXT = 'Any text — of ¾ bytes, Capitals  and   spaces.\n'*9

def test_a_file_has_the_size_that_the_likelihood_says(tmp_path):
    "The compressed text comes back; within 1% and 64 bits, header apart"
    model = load_denoiser(f'hf:{byte_level(tmp_path)}')
    blob = compress(model, TEXT.encode(), 'spread', steps=8, context=0)
    assert decompress(model, blob)==TEXT.encode()
    ids = torch.tensor(model.tokenizer.encode(TEXT))
    bits = document_nll(model, ids, 'spread', steps=8).sum().item()/math.log(2)
    *_,words = codec._unpack(blob)
    assert abs(32*len(words)-bits)<.01*bits+64

def test_a_text_that_the_tokenizer_changes_is_not_compressed(tmp_path):
    "WordPiece makes small letters of capitals"
    model = load_denoiser(f'hf:{word_piece(tmp_path)}')
    assert decompress(model, compress(model, b'a b'))==b'a b'
    with pytest.raises(ValueError, match='gives back'): compress(model, b'A b')

def word_piece(tmp_path):
    "A BERT with a tokenizer of small letters"
    words = [*SPECIAL, 'a', 'b', '##a', '##b']
    vocab = {t:i for i,t in enumerate(words)}
    t = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token='[UNK]'))
    t.normalizer = tokenizers.normalizers.BertNormalizer()
    t.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    t.decoder = tokenizers.decoders.WordPiece()
    torch.manual_seed(0)
    return save(tmp_path/'pieces', bert(vocab_size=len(words)), wrapped(t))

# The bound and the likelihood

def exact_bound(model, x):
    "Nats by the bound in continuous time, with the mean over all sets of masks taken exactly"
    L = x.shape[1]
    total = 0.
    for masked in product([False, True], repeat=L):
        m = torch.tensor(masked)
        n = int(m.sum())
        if not n: continue
        logp = model(torch.where(m, model.mask_id, x)).double()
        logp = logp[...,model.clean_ids].log_softmax(-1)
        ranks = model.clean_ids.cumsum(0)-1
        nll = -logp.gather(-1, ranks[x][...,None])[...,0]
        weight = 1/(math.comb(L, n)*n) # integral of t^n (1-t)^(L-n) / t over all times
        total = total+weight*(nll*m).sum(-1)
    return total

@pytest.mark.parametrize('kind', KINDS)
def test_the_exact_bound_is_above_the_likelihood_of_random_orders(kind):
    "And the likelihood of a single rule may lie on either side of the bound"
    model = make(kind)
    texts = all_texts(model, 4)
    with torch.no_grad(): bound = exact_bound(model, texts)
    assert bool((bound>=all_orders_nats(model, texts)-1e-5).all())
    draws = nelbo_draws(model, texts, 200, seed=0).double().mean(1)
    assert (draws.mean()-bound.mean()).abs()<4*draws.std()/200**.5<.4
    by_rule = -log_prob(model, texts, 'left_to_right')
    assert bool((by_rule>bound).any()) and bool((by_rule<bound).any())

# Bad input

def test_a_causal_network_is_rejected(tmp_path):
    torch.manual_seed(0)
    place = save(tmp_path/'causal', bert(is_decoder=True), letters())
    with pytest.raises(ValueError, match='do not depend on later tokens'): load_masked_lm(place)
    check_sees_later(make('llada'))
    causal = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()
    with pytest.raises(ValueError, match='do not depend on later tokens'):
        check_sees_later(ForeignDenoiser(lambda ids: causal(ids).logits, 8, 4, 8))

def test_a_kind_without_masks_is_rejected(tmp_path):
    config = transformers.GPT2Config(vocab_size=8, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    place = save(tmp_path/'gpt', transformers.GPT2LMHeadModel(config), letters())
    with pytest.raises(ValueError, match='the kind of the model is .?gpt2'): load_masked_lm(place)

def test_a_tokenizer_without_a_mask_needs_one(tmp_path):
    torch.manual_seed(0)
    place = save(tmp_path/'m', bert(), wrapped(letters().backend_tokenizer, mask_token=None))
    with pytest.raises(ValueError, match='mask_id'): load_masked_lm(place)
    assert load_masked_lm(place, mask_id=4).mask_id==4
    with pytest.raises(ValueError, match='mask_id'): load_masked_lm(place, mask_id=99)

@pytest.mark.parametrize('name', ['/no/such/folder', './no_such_folder'])
def test_a_folder_that_is_not_there(name):
    with pytest.raises(ValueError, match=f'model is .?hf:{name}'): load_denoiser(f'hf:{name}')

def test_a_model_is_as_long_as_its_positions(folder):
    "16 positions, or 18 with two that RoBERTa does not use, less [CLS] and [SEP]"
    assert load_masked_lm(folder).seq_len==14
    assert load_masked_lm(folder, seq_len=5).seq_len==5
    with pytest.raises(ValueError, match='seq_len is 15'): load_masked_lm(folder, seq_len=15)
    load_masked_lm(folder)(torch.full((1, 14), 4))

def test_pickles_are_not_read(tmp_path):
    torch.manual_seed(0)
    place = save(tmp_path/'m', bert(), letters())
    weights = bert().state_dict()
    (place/'model.safetensors').unlink()
    torch.save(weights, place/'pytorch_model.bin')
    with pytest.raises(ValueError, match='hf:'): load_masked_lm(place)

def test_missing_weights_are_an_error(tmp_path):
    "A network whose head is not in the file would get a random one"
    torch.manual_seed(0)
    net = transformers.BertModel(transformers.BertConfig(**SMALL, max_position_embeddings=16))
    with pytest.raises(ValueError, match='weights that the file lacks'):
        load_masked_lm(save(tmp_path/'m', net, letters()))

def test_code_of_a_model_is_not_run(tmp_path):
    "A folder with code of its own is refused unless it is trusted"
    place = save(tmp_path/'m', bert(), letters())
    config = json.loads((place/'config.json').read_text())
    config |= dict(model_type='own', auto_map={'AutoConfig':'own.OwnConfig', 'AutoModel':'own.Own'})
    (place/'config.json').write_text(json.dumps(config))
    (place/'own.py').write_text(f'open({str(tmp_path/"ran")!r}, "w")')
    with pytest.raises(ValueError, match='hf:'): load_masked_lm(place)
    assert not (tmp_path/'ran').exists()

OWN_CODE = '''
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

class OwnConfig(PretrainedConfig):
    model_type = 'own'
    def __init__(self, vocab_size=8, dim=16, max_sequence_length=16, mask_token_id=4, **kwargs):
        self.vocab_size,self.dim,self.max_sequence_length = vocab_size,dim,max_sequence_length
        super().__init__(**kwargs)
        self.mask_token_id = mask_token_id

class Own(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.mix = nn.Linear(config.dim, config.dim)
        self.head = nn.Linear(config.dim, config.vocab_size)
        self.post_init()
    def forward(self, input_ids):
        h = self.embed(input_ids)
        return MaskedLMOutput(logits=self.head((h+self.mix(h).sum(1, keepdim=True)).tanh()))
'''

def own_model(place):
    "A folder of a model with code of its own and no mask in its tokenizer, in the manner of LLaDA"
    place.mkdir()
    (place/'own.py').write_text(OWN_CODE)
    spec = importlib.util.spec_from_file_location('own', place/'own.py')
    own = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
    torch.manual_seed(0)
    network = own.Own(own.OwnConfig())
    save(place, network, wrapped(letters().backend_tokenizer, mask_token=None))
    config = json.loads((place/'config.json').read_text())
    config |= dict(auto_map={'AutoConfig':'own.OwnConfig', 'AutoModel':'own.Own'})
    (place/'config.json').write_text(json.dumps(config))
    return network,place

def test_a_model_with_code_of_its_own_is_loaded_if_it_is_trusted(tmp_path):
    "Its logits are those of the network; the mask stands in its configuration"
    network,place = own_model(tmp_path/'own_model')
    with pytest.raises(ValueError, match='trust_remote_code'): load_denoiser(f'hf:{place}')
    model = load_denoiser(f'hf:{place}', trust_remote_code=True)
    assert (model.mask_id, model.seq_len)==(4, 14)
    x = torch.tensor([[5, 4, 7]])
    with torch.no_grad(): whole = network.eval()(torch.tensor([[2, 5, 4, 7, 3]])).logits[:,1:-1]
    torch.testing.assert_close(model(x), whole)
    judge_sums(model)

def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(ImportError, match='pip install transformers'): load_denoiser('hf:any')

def test_a_torchvision_that_does_not_fit_is_named(monkeypatch):
    class Lazy:
        @property
        def PreTrainedModel(self):
            try: raise RuntimeError('operator torchvision::nms does not exist')
            except RuntimeError as e: raise ModuleNotFoundError('Could not import module') from e
    monkeypatch.setitem(sys.modules, 'transformers', Lazy())
    message = 'torchvision::nms.*pip uninstall torchvision'
    with pytest.raises(ImportError, match=message): load_denoiser('hf:any')

def test_options_of_hf_are_not_for_a_folder(tmp_path):
    with pytest.raises(ValueError, match='seq_len'): load_denoiser(tmp_path, seq_len=4)
    with pytest.raises(ValueError, match='mask'):
        make('function').hidden(torch.zeros(1, 3).long(), mask=torch.tensor([[True, True, False]]))

# Commands

def score_lines(capsys, *args, **kwargs):
    "What bijdiff_score prints with lines of JSON on standard output"
    bijdiff_score(*map(str, args[:1]), [str(o) for o in args[1:]], json_file='-', json_lines=True, **kwargs)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

def test_lines_of_json_in_and_out(tmp_path, capsys):
    "A document for each line and for a file; the sum of the bits is that of the rule, with seed and versions"
    place = save(tmp_path/'m', bert(), letters())
    lines = tmp_path/'texts.jsonl'
    lines.write_text('{"text":"abc"}\n\n{"text":"ca", "other":1}\n')
    one = tmp_path/'one.txt'
    one.write_text('abcabc')
    rows = score_lines(capsys, f'hf:{place}', lines, one, rule='random', steps=2, seed=7)
    assert [r['file'] for r in rows]==[f'{lines}:1', f'{lines}:3', str(one)]
    assert [r['bytes'] for r in rows]==[3, 2, 6]
    model = load_denoiser(f'hf:{place}')
    for r,text in zip(rows, ('abc', 'ca', 'abcabc')):
        ids = torch.tensor([model.tokenizer.encode(text)])
        nats = -log_prob(model, ids, 'random', 2, seed=7).item()
        assert r['bits_per_byte']==pytest.approx(nats/math.log(2)/len(text), rel=1e-5)
        assert (r['seed'], r['torch'], r['device'], r['is_changed'])==(7, torch.__version__, 'cpu', False)

@pytest.mark.parametrize('line', ['{"txt":"a"}', '"a"', '{"text":1}', '{"text":"a"', '{"text":""}'])
def test_a_wrong_line_is_named(line, tmp_path):
    place = save(tmp_path/'m', bert(), letters())
    lines = tmp_path/'texts.jsonl'
    lines.write_text('{"text":"abc"}\n'+line+'\n')
    with pytest.raises(ValueError, match=f'{lines}:2'): bijdiff_score(f'hf:{place}', [str(lines)])

def test_a_changed_text_is_scored_as_it_comes_back(tmp_path, capsys):
    place,text = word_piece(tmp_path),tmp_path/'text.txt'
    text.write_text('A  bA')
    bijdiff_score(f'hf:{place}', [str(text)], rule='spread', steps=2)
    assert 'the tokenizer changes this text' in capsys.readouterr().out
    row, = score_lines(capsys, f'hf:{place}', text, rule='spread', steps=2)
    assert (row['is_changed'], row['bytes'])==(True, len('a ba'))
    text.write_text('a ba')
    same, = score_lines(capsys, f'hf:{place}', text, rule='spread', steps=2)
    assert (same['is_changed'], same['bits'])==(False, row['bits'])
    text.write_text('a z')
    with pytest.raises(ValueError, match='outside its vocabulary'): bijdiff_score(f'hf:{place}', [str(text)])

def test_the_other_commands_take_such_a_model(tmp_path, capsys):
    "Texts begin as they are told; a file comes back"
    name = f'hf:{byte_level(tmp_path)}'
    bijdiff_sample(name, n=2, prompt='A pr', seq_len=20, steps=4, sampler='ancestral')
    assert capsys.readouterr().out.count('A pr')==2
    text,back = tmp_path/'text.txt',tmp_path/'back.txt'
    text.write_text(TEXT, encoding='utf-8')
    bijdiff_compress(name, str(text), steps=4, seq_len=30)
    bijdiff_decompress(name, f'{text}.bij', str(back), seq_len=30)
    assert back.read_bytes()==text.read_bytes()
    with pytest.raises(ValueError, match='another model|expected the same'):
        bijdiff_decompress(name, f'{text}.bij', str(back), seq_len=31, force=True)

def test_options_of_foreign_models_have_no_effect_on_others(tmp_path):
    text = tmp_path/'text.txt'
    text.write_text('a')
    for options in (dict(mask_id=3), dict(seq_len=3), dict(shifted=True), dict(dtype='bfloat16')):
        name, = options
        with pytest.raises(ValueError, match=f'{name} is .* and has no effect'):
            bijdiff_score(str(tmp_path), [str(text)], **options)
