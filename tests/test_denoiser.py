"""The denoiser against judges that share no code with it: properties over many shapes, and the Hub with its network taken away."""
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st
from bijdiff.all import *

def randomise(m, std=.3):
    for p in m.parameters(): torch.nn.init.normal_(p, std=std)
    return m

sizes = dict(n_layers=st.integers(1, 5), n_heads=st.sampled_from([1, 2]), d=st.sampled_from([4, 8, 12]), L=st.integers(1, 40), B=st.integers(1, 3),
             window=st.sampled_from([0, 1, 7]), seed=st.integers(0, 10**6), bf16=st.booleans())

@settings(max_examples=40, deadline=None)
@given(**sizes)
def test_inverse_is_exact_on_the_lattice(n_layers, n_heads, d, L, B, window, seed, bf16):
    torch.manual_seed(seed)
    m = randomise(BijectiveTransformer(n_layers, d*n_heads, n_heads, lattice_bits=12, local_window=window))
    x = to_lattice(torch.randn(B, L, 2*d*n_heads), 12)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=bf16):
        y,logdet = m(x)
        assert y.dtype==torch.float32 and torch.equal(m.inverse(y)[0], x)
    assert torch.equal(logdet, torch.zeros(B)) and not torch.equal(y, x)

@settings(max_examples=15, deadline=None)
@given(n_layers=st.integers(1, 3), L=st.integers(1, 4), window=st.sampled_from([0, 3]), seed=st.integers(0, 10**6))
def test_log_determinant_is_the_dense_one(n_layers, L, window, seed):
    torch.manual_seed(seed)
    m = randomise(BijectiveTransformer(n_layers, 4, 2, local_window=window)).double()
    check_bijection(m, torch.randn(2, L, 8, dtype=torch.float64), atol=1e-7)

@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1, max_size=60), kind=st.sampled_from(['char', 'byte', 'bpe']))
def test_tokenizers_give_the_text_back(text, kind):
    tok = get_tokenizer(kind, text)
    assert tok.decode(tok.encode(text))==text
    assert tokenizer_from_dict(tok.to_dict())==tok

def test_a_network_that_leaves_the_lattice_is_an_error():
    m = BijectiveTransformer(1, 4, 2, lattice_bits=12)
    torch.nn.init.constant_(m.blocks[0].f.pointwise[-1].bias, 2000.)
    with pytest.raises(LatticeError, match='leaves the lattice'): m(torch.zeros(1, 3, 8))

def test_dropout_is_redrawn_but_inverts_in_eval_mode():
    m = randomise(BijectiveTransformer(3, 8, 2, lattice_bits=12, dropout=.5))
    x = to_lattice(torch.randn(2, 9, 16), 12)
    with torch.no_grad():
        assert not torch.equal(m(x)[0], m(x)[0])
        m.eval()
        assert torch.equal(m.inverse(m(x)[0])[0], x)

def tiny():
    m = randomise(BijectiveDenoiser(DenoiserConfig(5, seq_len=8, d_model=8, n_heads=2, n_layers=1)))
    m.tokenizer = CharTokenizer('abcde')
    return m

def test_push_to_hub_uploads_what_from_pretrained_reads(monkeypatch, tmp_path):
    import huggingface_hub, shutil
    class Api:
        def __init__(self, token=None): pass
        def create_repo(self, repo_id, private, exist_ok): assert repo_id=='me/model'
        def upload_folder(self, repo_id, folder_path): return shutil.copytree(folder_path, tmp_path/'hub')
    monkeypatch.setattr(huggingface_hub, 'HfApi', Api)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda repo, allow_patterns: tmp_path/'hub')
    m = tiny()
    m.push_to_hub('me/model')
    again = BijectiveDenoiser.from_pretrained('me/model')
    x = torch.randint(0, 6, (2, 8))
    with torch.no_grad(): assert torch.equal(again(x), m(x))
    assert again.tokenizer==m.tokenizer
