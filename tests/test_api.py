"""The names that `from bijdiff.all import *` brings in: a list that changes on purpose only."""
import inspect
import json
from pathlib import Path
import pytest
import bijdiff.all

root = Path(__file__).parent.parent

PINNED = {
    'Data': (
        'BPETokenizer ByteTokenizer CharTokenizer corpus_dls get_tokenizer load_corpus load_tokenizer '
        'open_source pair_dls pydoc_corpus read_text split_text text_dls tokenise train_tokenizer'),
    'Networks': (
        'BijectiveDenoiser call_denoiser canonical clean_posterior Denoiser DenoiserConfig DenoiserOutput '
        'eval_mode inverse_errors MDLMAdapter SEDDAdapter ForeignDenoiser load_denoiser '
        'load_published'),
    'Noise': (
        'Corruption Cosine CosineSquared Geometric get_schedule GIDDCorruption HalfCosine LogLinear '
        'low_discrepancy_times Polynomial Schedule'),
    'Losses': (
        'hybrid_nelbo insertion_nelbo log_scores masked_nelbo score_entropy uniform_nelbo'),
    'Training': (
        'BestModelCallback BlockNormCallback CheckpointCallback diffusion_learner EMACallback '
        'ExpertCallback LatticeUsageCallback ProbeCallback run_log RunLogCallback TableCallback '
        'TensorBoardCallback'),
    'Dynamics': (
        'area_under_curve compare_runs epochs_to_target fit_trend oscillation oscillation_windows '
        'plot_runs plot_spectrum plot_trend seed_interval'),
    'Writing': (
        'film_strip gif_bytes heal_blanks heal_prompt infill_template plot_film_strip prompt_template '
        'sample samplers_for self_correct TextQuality unmask UnmaskingRule write_answers'),
    'Likelihood': (
        'all_orders_nats answer_nll char_bits document_nll Estimate latent_nats log_prob nelbo '
        'nelbo_draws order_bound order_estimate order_nats plot_bits Score score_ids token_nll '
        'score_table format_scores SmallLanguage small_scores total_probability'),
    'Compression': (
        'compress compress_file decompress decompress_file fingerprint portable'),
    'Invertible layers': (
        'ActNorm AdditiveCoupling AffineCoupling as_transform Bijection BijectiveLinear BijectiveMoE '
        'BijectiveMultiHeadAttention BijectiveSequential BijectiveTransformer BijectiveTransformerBlock '
        'check_bijection ChunkedUpdate CouplingNet dense_logdet InvertibleLayerNorm LatticeError '
        'layer_by_layer MultiscaleTransformer split_halves to_lattice'),
}

def page_text():
    "Text of the page that the notebook of the list has stored"
    cells = json.loads((root/'nbs'/'99_all.ipynb').read_text(encoding='utf-8'))['cells']
    outputs = [o for c in cells for o in c.get('outputs', ())]
    return ''.join(''.join(o['data'].get('text/markdown', '')) for o in outputs if 'data' in o)

def test_the_list_is_the_pinned_one():
    names = {task:set(names.split()) for task,(_,names) in bijdiff.all.by_task.items()}
    assert names=={task:set(names.split()) for task,names in PINNED.items()}

def test_the_list_has_at_most_130_names_each_once():
    assert len(bijdiff.all.__all__)==len(set(bijdiff.all.__all__))<=130

@pytest.mark.parametrize('name', bijdiff.all.__all__)
def test_each_name_is_described_on_the_page(name):
    "A line with the first line of its docstring; run nbs/99_all.ipynb again where it differs"
    doc = inspect.getdoc(getattr(bijdiff.all, name)).split('\n')[0]
    assert doc and f'[{name}]' in page_text() and f'| {doc} |' in page_text()

def test_nothing_else_is_imported():
    scope = {}
    exec('from bijdiff.all import *', scope)
    assert scope.keys()-{'__builtins__'}==set(bijdiff.all.__all__)
