"""The denoiser over many shapes: inverse, log-determinant, tokenizers, and the Hub without a network."""
import shutil
import huggingface_hub, pytest, torch
from hypothesis import given, settings, strategies as st
from bijdiff.data.tokens import CharTokenizer
from bijdiff.data.subwords import get_tokenizer, tokenizer_from_dict
from bijdiff.layers.bijection import check_bijection
from bijdiff.layers.block import BijectiveTransformer
from bijdiff.layers.lattice import LatticeError, to_lattice
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.testing import random_weights

SIZES = dict(
    n_layers=st.integers(1, 5),
    n_heads=st.sampled_from([1, 2]),
    head_dim=st.sampled_from([4, 8, 12]),
    L=st.integers(1, 40),
    B=st.integers(1, 3),
    window=st.sampled_from([0, 1, 7]),
)
SEEDS = st.integers(0, 10**6)

@settings(max_examples=40, deadline=None)
@given(**SIZES, seed=SEEDS, bf16=st.booleans())
def test_inverse_is_exact_on_the_lattice(n_layers, n_heads, head_dim, L, B, window, seed, bf16):
    torch.manual_seed(seed)
    d_model = head_dim*n_heads
    m = random_weights(BijectiveTransformer(n_layers, d_model, n_heads, lattice_bits=12, local_window=window))
    x = to_lattice(torch.randn(B, L, 2*d_model), 12)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=bf16):
        y,logdet = m(x)
        assert y.dtype==torch.float32
        assert torch.equal(m.inverse(y)[0], x)
    assert torch.equal(logdet, torch.zeros(B))
    assert not torch.equal(y, x)

@settings(max_examples=15, deadline=None)
@given(n_layers=st.integers(1, 3), L=st.integers(1, 4), window=st.sampled_from([0, 3]), seed=SEEDS)
def test_log_determinant_is_the_dense_one(n_layers, L, window, seed):
    torch.manual_seed(seed)
    m = random_weights(BijectiveTransformer(n_layers, 4, 2, local_window=window)).double()
    check_bijection(m, torch.randn(2, L, 8, dtype=torch.float64), atol=1e-7)

@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1, max_size=60), kind=st.sampled_from(['char', 'byte', 'bpe']))
def test_tokenizers_give_the_text_back(text, kind):
    tokenizer = get_tokenizer(kind, text)
    assert tokenizer.decode(tokenizer.encode(text))==text
    assert tokenizer_from_dict(tokenizer.to_dict())==tokenizer

def test_a_network_that_leaves_the_lattice_is_an_error():
    m = BijectiveTransformer(1, 4, 2, lattice_bits=12)
    torch.nn.init.constant_(m.blocks[0].f.pointwise[-1].bias, 2000.)
    with pytest.raises(LatticeError, match='lattice'): m(torch.zeros(1, 3, 8))

def test_dropout_is_resampled_but_inverts_in_eval_mode():
    m = random_weights(BijectiveTransformer(3, 8, 2, lattice_bits=12, dropout=.5))
    x = to_lattice(torch.randn(2, 9, 16), 12)
    with torch.no_grad():
        assert not torch.equal(m(x)[0], m(x)[0])
        m.eval()
        assert torch.equal(m.inverse(m(x)[0])[0], x)

def fake_hub(folder):
    "Return a class in place of `HfApi` that uploads to a folder of this machine"
    class FakeApi:
        def __init__(self, token=None): pass
        def create_repo(self, repo_id, private, exist_ok): assert repo_id=='me/model'
        def upload_folder(self, repo_id, folder_path): shutil.copytree(folder_path, folder)
    return FakeApi

def test_push_to_hub_uploads_what_from_pretrained_reads(monkeypatch, tmp_path):
    hub = tmp_path/'hub'
    monkeypatch.setattr(huggingface_hub, 'HfApi', fake_hub(hub))
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda repo, allow_patterns: hub)
    m = random_weights(BijectiveDenoiser(DenoiserConfig(5, seq_len=8, d_model=8, n_heads=2, n_layers=1)))
    m.tokenizer = CharTokenizer('abcde')
    m.push_to_hub('me/model')
    again = BijectiveDenoiser.from_pretrained('me/model')
    x = torch.randint(0, 6, (2, 8))
    with torch.no_grad(): assert torch.equal(again(x), m(x))
    assert again.tokenizer==m.tokenizer
