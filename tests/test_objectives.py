"""The losses against the papers: every formula is written out again from its definition, one token at a time,
without any code of the library."""
import math
from itertools import product
from typing import Callable, NamedTuple
import numpy as np, pytest, torch
from scipy.linalg import expm
from helpers import derivative, float64, seeded_generator
from bijdiff.diffusion import objective
from bijdiff.diffusion.schedules import CosineSquared, get_schedule, LogLinear, Polynomial, Schedule
from bijdiff.diffusion.corruption import Corruption, GIDDCorruption
from bijdiff.diffusion.objective import prior_term, hybrid_nelbo, insertion_nelbo
from bijdiff.diffusion.objective import log_scores, masked_nelbo, reconstruction_term, score_entropy
from bijdiff.diffusion.objective import uniform_nelbo
from bijdiff.model.denoiser import DenoiserOutput
from bijdiff.model.scoring import output_integrand

V = 4 # the mask is 4 as well
T0 = .05, .3, .62, .97 # the time of each sequence of a batch
KINDS = 'mask','substitute','delete'
half_pi = math.pi/2

# Schedules by hand

class Alpha(NamedTuple):
    "alpha and its derivative as functions of a number"
    alpha:Callable
    dalpha:Callable

e = 1-1e-3
def cos(t): return math.cos(half_pi*t)
def dcos(t): return -half_pi*math.sin(half_pi*t)
def sigma(t): return 1e-3*2e4**t # total noise of the geometric schedule
ALPHA = {
    'log_linear': Alpha(lambda t: 1-e*t, lambda t: -e),
    'polynomial': Alpha(lambda t: 1-e*t*t, lambda t: -2*e*t),
    'cosine': Alpha(lambda t: 1-e*cos(1-t), lambda t: e*dcos(1-t)),
    'half_cosine': Alpha(lambda t: 1-e+e*cos(t), lambda t: e*dcos(t)),
    'cosine_squared': Alpha(lambda t: 1-e+e*cos(t)**2, lambda t: 2*e*cos(t)*dcos(t)),
    'geometric': Alpha(lambda t: math.exp(-sigma(t)), lambda t: -math.log(2e4)*sigma(t)*math.exp(-sigma(t))),
}
each_schedule = pytest.mark.parametrize('name', ALPHA)

# Noises by hand: `state_probs` gives the probabilities of kept, masked, substituted and deleted

class Mixture(NamedTuple):
    "Noise with constant weights"
    weights:tuple # of masking, substitution and deletion
    names:str|tuple # schedule of all kinds, or of each kind
    @property
    def masks(self): return self.weights[0]>0
    @property
    def substitutes(self): return self.weights[1]>0

    def state_probs(self, t):
        "w_k (1-alpha_k(t)) for normalised weights w; the rest is kept"
        names = [self.names]*3 if isinstance(self.names, str) else self.names
        corrupted = np.array(self.weights)/sum(self.weights)*[1-ALPHA[name].alpha(t) for name in names]
        return np.array([1-corrupted.sum(), *corrupted])

    def corruption(self, T=None):
        if isinstance(self.names, str): schedule = get_schedule(self.names)
        else: schedule = {kind:get_schedule(name) for kind,name in zip(KINDS, self.names)}
        return Corruption(V, *self.weights, schedule=schedule, T=T)

class GIDD(NamedTuple):
    "The hybrid noise of von Rütte et al. 2025"
    p_uniform:float
    gamma:float
    masks = substitutes = True

    def state_probs(self, t):
        "(1-t, t, Vc, 0)/(1+Vc), for c = 2^gamma p/(V(1-p)) t^(gamma/2) (1-t)^(gamma/2)"
        p,gamma = self
        c = 2**gamma*p/(V*(1-p))*t**(gamma/2)*(1-t)**(gamma/2)
        return np.array([1-t, t, V*c, 0.])/(1+V*c)

    def corruption(self, T=None): return GIDDCorruption(V, *self, T=T)

def with_every_schedule(**weights):
    "Mixtures with these weights of masking, substitution and deletion, and each schedule"
    return {f'{kind}-{name}':Mixture(w, name) for (kind,w),name in product(weights.items(), ALPHA)}

SURVIVING = with_every_schedule(
    mask=(1,0,0),
    uniform=(0,1,0),
    hybrid=(.8,.2,0),
    unscaled=(1,3,0),
) | {
    'own schedules': Mixture((2,1,0), ('half_cosine','log_linear','half_cosine')),
    'own schedules, too': Mixture((1,1,0), ('geometric','cosine','geometric')),
    'gidd': GIDD(.1, 1.),
    'gidd 2': GIDD(.3, 2.),
    'gidd 3': GIDD(.6, .5),
}
DELETING = with_every_schedule(
    mask_delete=(1,0,1),
    all_three=(.5,.2,.3),
    delete=(0,0,1),
    uniform_delete=(0,1,2),
) | {
    'own schedules, all three': Mixture((5,2,3), ('cosine','half_cosine','log_linear')),
    'own schedules, masks': Mixture((1,0,3), ('half_cosine','cosine','polynomial')),
}
INSERTING = {name:noise for name,noise in DELETING.items() if noise.masks}

# Problems, and losses token by token

def problem(masks=True, tokens=True, L=30, times=T0, scale=1.5):
    "Logits, (B, L, V), clean ids, noisy ids with or without masks and substituted tokens, and times"
    g = seeded_generator(0)
    B = len(times)
    def random_ids(n): return torch.randint(0, n, (B, L), generator=g)
    x0 = random_ids(V)
    noise = random_ids(V)
    kind = random_ids(3)
    xt = torch.where((kind==1)&tokens, noise, torch.where((kind==2)&masks, V, x0))
    logits = scale*torch.randn(B, L, V, generator=g, dtype=torch.float64)
    return logits, x0, xt, float64(*times)

def problem_for(noise, **kwargs):
    "A problem with the symbols that a noise can make"
    return problem(masks=noise.masks, tokens=noise.substitutes, **kwargs)

def token_by_token(f, *batch):
    "f of each position of some tensors (B, L, ...) and of the time of its sequence, the last tensor, (B,)"
    rows = zip(*(o.tolist() for o in batch))
    return float64(*[[f(*position, t) for position in zip(*sequence)] for *sequence,t in rows])

def assert_same(got, expected, tolerance=1e-8):
    "Assert equality in float64, relative for numbers above 1"
    assert got.shape==expected.shape
    assert got.dtype==torch.float64
    off = ((got-expected).abs()/expected.abs().clamp(min=1)).max()
    assert off<tolerance, f'off by {off:.1e}'
    assert expected.abs().max()>.01, 'nothing to compare'

def softmax(logits): return [math.exp(o)/sum(map(math.exp, logits)) for o in logits]
def one_hot(x): return [float(y==x) for y in range(V)]

# MDLM

def assert_mdlm(name, T=None):
    """Sahoo et al. 2024: a masked token costs alpha'/(1-alpha) log p(x), equation 10

    With T steps it costs T (alpha(t)-alpha(t-1/T))/(1-alpha(t)) log p(x), T times equation 8.
    """
    alpha,dalpha = ALPHA[name]
    def weight(t):
        if T is None: return dalpha(t)/(1-alpha(t))
        return T*(alpha(t)-alpha(t-1/T))/(1-alpha(t))
    def token(logits, x, z, t):
        return weight(t)*math.log(softmax(logits)[x]) if z==V else 0.
    times = T0 if T is None else [k/T for k in sorted({1, (T+1)//2, T})]
    args = problem(tokens=False, times=times)
    assert_same(masked_nelbo(*args, get_schedule(name), T), token_by_token(token, *args))

@each_schedule
@pytest.mark.parametrize('T', [None, 1, 7, 1000])
def test_masked_bound_is_that_of_mdlm(name, T): assert_mdlm(name, T)

# SEDD: rows of rate matrices are what a token is, columns what it becomes

def rate_matrix(noise):
    "Rates of absorbing noise, 1 to the mask, and of uniform noise, 1/V to every token"
    Q = np.zeros((V+1, V+1))
    if noise=='absorb': Q[:V,V] = 1
    else: Q[:V,:V] = 1/V
    return Q-np.diag(Q.sum(1))

def problem_of_scores(noise):
    "A problem with the symbols of absorbing or of uniform noise"
    return problem(masks=noise=='absorb', tokens=noise=='uniform')

def assert_sedd(name, noise):
    """Lou et al. 2024, denoising score entropy with its constant

    The sum over y!=z of sigma' Q(y,z) (exp(s_y) - r s_y + r (log r - 1)), for r = P(x,y)/P(x,z) and
    P = exp(sigma Q).
    """
    alpha,dalpha = ALPHA[name]
    Q = rate_matrix(noise)
    def token(log_score, x, z, t):
        dsigma = -dalpha(t)/alpha(t)
        P = expm(-math.log(alpha(t))*Q)
        out = 0.
        for y in range(V):
            if y==z or not Q[y,z]: continue
            r = P[x,y]/P[x,z]
            constant = r*(math.log(r)-1) if r>0 else 0.
            out += dsigma*Q[y,z]*(math.exp(log_score[y])-r*log_score[y]+constant)
        return out
    args = problem_of_scores(noise)
    assert_same(score_entropy(*args, get_schedule(name), noise), token_by_token(token, *args))

@each_schedule
@pytest.mark.parametrize('noise', ['absorb', 'uniform'])
def test_score_entropy_is_that_of_sedd(name, noise): assert_sedd(name, noise)

def closed_absorb(alpha, dalpha):
    "Score entropy of a masked token as published code has it, with the ratio 1/(e^sigma-1)"
    def token(log_score, x, z, t):
        if z!=V: return 0.
        ratio = alpha(t)/(1-alpha(t))
        entropy = sum(map(math.exp, log_score))-ratio*log_score[x]+ratio*(math.log(ratio)-1)
        return -dalpha(t)/alpha(t)*entropy
    return token

def closed_uniform(alpha, dalpha):
    "Score entropy of uniform noise as published code has it, with the ratio 1-V/(e^sigma-1+V)"
    def token(log_score, x, z, t):
        odds = 1/alpha(t)-1
        ratio = 1-V/(odds+V)
        others = [o for y,o in enumerate(log_score) if y!=z]
        positive = sum(map(math.exp, others))/V
        negative = sum(others)/V
        if x==z: entropy = positive-ratio*negative+(V-1)/V*ratio*(math.log(ratio)-1)
        else: entropy = positive-negative-log_score[x]/odds+((-math.log(ratio)-1)/ratio-(V-2))/V
        return -dalpha(t)/alpha(t)*entropy
    return token

@each_schedule
@pytest.mark.parametrize('noise, closed', [('absorb', closed_absorb), ('uniform', closed_uniform)])
def test_score_entropy_is_that_of_sedd_in_closed_form(name, noise, closed):
    args = problem_of_scores(noise)
    expected = token_by_token(closed(*ALPHA[name]), *args)
    assert_same(score_entropy(*args, get_schedule(name), noise), expected)

# GIDD

def alpha_of(noise):
    "alpha(t) of a noise without deletion"
    return lambda t: noise.state_probs(t)[0]

def noise_vector(noise):
    "beta(t) pi(t), probabilities that a token has become each token or the mask, of a noise without deletion"
    def beta_pi(t):
        _,masked,substituted,_ = noise.state_probs(t)
        return np.array([substituted/V]*V+[masked])
    return beta_pi

def assert_gidd(name):
    """von Rütte et al. 2025, theorem 3.1: w(z) (KL(q | q') + r - log r - 1), for r = q(z)/q'(z)

    q and q' are alpha p + beta pi of the clean token and of the network, w is (beta pi' - alpha'/alpha pi)/q.
    """
    noise = SURVIVING[name]
    alpha = alpha_of(noise)
    beta_pi = noise_vector(noise)
    def pi(t): return beta_pi(t)/(1-alpha(t))
    def token(logits, x, z, t):
        a = alpha(t)
        dpi = derivative(pi, t)
        q,q_model = (a*np.array([*p,0.])+beta_pi(t) for p in (one_hot(x), softmax(logits)))
        weight = ((1-a)*dpi[z]-derivative(alpha, t)/a*pi(t)[z])/q[z]
        kl = sum(q[y]*math.log(q[y]/q_model[y]) for y in range(V+1) if q[y]>0)
        r = q[z]/q_model[z]
        return weight*(kl+r-math.log(r)-1)
    args = problem_for(noise)
    assert_same(hybrid_nelbo(*args, noise.corruption()), token_by_token(token, *args))

@pytest.mark.parametrize('name', SURVIVING)
def test_hybrid_bound_is_that_of_gidd(name): assert_gidd(name)

# UDLM

def assert_udlm(name):
    """Schiff et al. 2024, the continuous-time bound

    alpha'/(V alpha) (V/q_z - V/q'_z - sum over y of q_y/q_z log(q'_z q_y/(q'_y q_z))), for q and q',
    V alpha p + 1-alpha of the clean token and of the network.
    """
    alpha,dalpha = ALPHA[name]
    def token(logits, x, z, t):
        a = alpha(t)
        q,q_model = ([V*a*o+1-a for o in p] for p in (one_hot(x), softmax(logits)))
        cross = sum(q[y]/q[z]*math.log(q_model[z]*q[y]/(q_model[y]*q[z])) for y in range(V))
        return dalpha(t)/(V*a)*(V/q[z]-V/q_model[z]-cross)
    args = problem(masks=False)
    assert_same(uniform_nelbo(*args, get_schedule(name)), token_by_token(token, *args))

@each_schedule
def test_uniform_bound_is_that_of_udlm(name): assert_udlm(name)

# Arguments

@each_schedule
def test_schedules_by_name(name):
    "A name stands for the schedule with its defaults, wherever a schedule is an argument"
    masks = problem(tokens=False)
    tokens = problem(masks=False)
    losses = [
        lambda s: masked_nelbo(*masks, s),
        lambda s: masked_nelbo(*masks, s, 1000),
        lambda s: uniform_nelbo(*tokens, s),
        lambda s: score_entropy(*masks, s),
        lambda s: score_entropy(*tokens, s, 'uniform'),
        lambda s: reconstruction_term(*masks[:3], s),
        lambda s: prior_term(*masks[:2], s),
        lambda s: hybrid_nelbo(*masks, Corruption(V, 1, 1, schedule=s)),
        lambda s: hybrid_nelbo(*masks, Corruption(V, 1, 1, schedule=dict(mask=s))),
    ]
    for loss in losses: assert torch.equal(loss(name), loss(get_schedule(name)))

def masks_in_uniform_noise(logits, x0, xt, t):
    return uniform_nelbo(logits, x0, torch.full_like(xt, V), t, LogLinear())
def tokens_in_masking_noise(logits, x0, xt, t): return masked_nelbo(logits, x0, (x0+1)%V, t, LogLinear())
def steps_of_deletion(*args): return hybrid_nelbo(*args, Corruption(V, delete=1, T=4))
def unknown_schedule(logits, x0, xt, t): return masked_nelbo(logits, x0, x0, t, 'linear')
BAD = {
    masks_in_uniform_noise: '^xt has ids from 4 to 4',
    tokens_in_masking_noise: r'\bxt\b.*\[0, 0\]',
    steps_of_deletion: r'\bT is 4',
    unknown_schedule: "^schedule is 'linear'",
}
@pytest.mark.parametrize('f', BAD, ids=lambda f: f.__name__)
def test_input_that_would_cost_nothing_is_rejected(f):
    with pytest.raises(ValueError, match=BAD[f]): f(*problem())

# T steps

def assert_steps(name, T):
    """T times the divergence of the posteriors of z_s at s = t-1/T, of the clean token and of the network

    They are q(z_s) P(z_t | z_s)/q(z_t) by Bayes' rule, for q = alpha p + beta pi and the transition matrix
    P = k I + beta(t) pi(t) - k beta(s) pi(s), k = alpha(t)/alpha(s).
    """
    noise = SURVIVING[name]
    alpha = alpha_of(noise)
    beta_pi = noise_vector(noise)
    def token(logits, x, z, t):
        s = max(t-1/T, 0.)
        k = alpha(t)/alpha(s)
        P = k*np.eye(V+1)+np.ones((V+1, 1))*(beta_pi(t)-k*beta_pi(s))
        def posterior(p):
            joint = [(alpha(s)*o+beta_pi(s)[y])*P[y,z] for y,o in enumerate([*p,0.])]
            return [o/sum(joint) for o in joint]
        pairs = zip(posterior(one_hot(x)), posterior(softmax(logits)))
        return T*sum(q*math.log(q/q_model) for q,q_model in pairs if q>0)
    args = problem_for(noise, times=[k/T for k in sorted({2, (T+3)//2, T-1})])
    assert_same(hybrid_nelbo(*args, noise.corruption(T)), token_by_token(token, *args))

@pytest.mark.parametrize('T', [4, 50])
@pytest.mark.parametrize('name', SURVIVING)
def test_steps_are_posteriors_by_bayes_rule(name, T): assert_steps(name, T)

# Deletion

def resampling_rates(noise, t):
    """Rates r_u and r_m at which symbols are resampled as any token and as the mask

    Two balances fix them: kept tokens leave, -kept' = (r_u+r_m) kept, and substituted ones come and go,
    substituted' = r_u surviving - (r_u+r_m) substituted. Without masking, all tokens are deleted at one rate.
    """
    kept,masked,substituted,_ = noise.state_probs(t)
    dkept,_,dsubstituted,ddeleted = derivative(noise.state_probs, t)
    surviving = kept+masked+substituted
    if masked==0: return -dkept/kept-ddeleted/surviving,0.
    balances = [[1, 1], [surviving-substituted, -substituted]]
    return np.linalg.solve(balances, [-dkept/kept, dsubstituted])

def reverse_divergence(noise):
    """Campbell et al. 2022, proposition 2: divergence of the reverse processes of clean token and network

    The sum over y!=z of b - a + a log(a/b), for reverse rates a = R(y,z) q_y/q_z and b = R(y,z) q'_y/q'_z.
    """
    def token(logits, x, z, t):
        kept,masked,substituted,_ = noise.state_probs(t)
        to_token,to_mask = resampling_rates(noise, t)
        q,q_model = ([kept*o+substituted/V for o in p]+[masked] for p in (one_hot(x), softmax(logits)))
        rate = to_mask if z==V else to_token/V
        out = 0.
        for y in range(V+1):
            if y==z or (y==V and masked==0): continue
            a = rate*q[y]/q[z]
            b = rate*q_model[y]/q_model[z]
            out += b-a+(a*math.log(a/b) if a>0 else 0.)
        return out
    return token

def assert_reverse(name):
    "Without masking and substitution nothing is ever resampled, and the divergence is 0"
    noise = DELETING[name]
    args = problem_for(noise)
    got = hybrid_nelbo(*args, noise.corruption())
    expected = token_by_token(reverse_divergence(noise), *args)
    if noise.masks or noise.substitutes: assert_same(got, expected)
    else:
        assert not got.any()
        assert expected.abs().max()<1e-9

@pytest.mark.parametrize('name', DELETING)
def test_bound_with_deletion_is_the_divergence_of_reverse_rates(name): assert_reverse(name)

def assert_insertion(name):
    "A gap of n tokens costs deleted'/deleted (g - n - n log g), expecting g = exp(logit) deleted/surviving"
    noise = DELETING[name]
    generator = seeded_generator(1)
    logits = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    gaps = torch.randint(0, 4, (4, 9), generator=generator)
    real = torch.rand(4, 9, generator=generator)<.8
    t = torch.tensor(T0) # in float32, hence the tolerance
    def gap(logit, n, is_real, t):
        if not is_real: return 0.
        kept,masked,substituted,deleted = noise.state_probs(t)
        rate = derivative(noise.state_probs, t)[3]/deleted
        g = math.exp(logit)*deleted/(kept+masked+substituted)
        return rate*(g-n-n*math.log(g))
    got = insertion_nelbo(logits, gaps, real, t, noise.corruption())
    assert_same(got, token_by_token(gap, logits, gaps, real, t), 1e-6)

@pytest.mark.parametrize('name', INSERTING)
def test_insertions_as_defined(name): assert_insertion(name)

# Both ends of time, and all terms together

EVERY_NOISE = SURVIVING | DELETING

def symbol_probs(noise, p, t):
    "q_t = kept p + substituted/V of each token, and masked, for clean tokens of distribution p"
    kept,masked,substituted,_ = noise.state_probs(t)
    return [kept*o+substituted/V for o in p]+[masked]

def reconstruction(noise):
    "-log of the posterior p(x) q_0(z|x)/q'_0(z) of the clean token, given its symbol at time 0"
    def token(logits, x, z, t):
        q = symbol_probs(noise, one_hot(x), 0.)[z]
        if q<=0: return 0.
        p = softmax(logits)
        return -math.log(p[x]*q/symbol_probs(noise, p, 0.)[z])
    return token

def prior(noise):
    "Divergence of q_1 and q'_1, those of the last jump to nothing but noise, for a token that survives"
    def token(logits, x, z, t):
        q,q_model = (symbol_probs(noise, p, 1.) for p in (one_hot(x), softmax(logits)))
        surviving = 1-noise.state_probs(1.)[3]
        return sum(a*math.log(a/b) for a,b in zip(q, q_model) if a>0)/surviving
    return token

def assert_end_term(got, expected):
    "Assert equality of two terms, (B, L), which may be 0"
    assert got.shape==expected.shape
    assert (got-expected).abs().max()<1e-8

@pytest.mark.parametrize('name', EVERY_NOISE)
def test_reconstruction_term_as_defined(name):
    noise = EVERY_NOISE[name]
    logits,x0,xt,t = problem_for(noise)
    got = reconstruction_term(logits, x0, xt, noise.corruption())
    assert_end_term(got, token_by_token(reconstruction(noise), logits, x0, xt, t))

@pytest.mark.parametrize('name', EVERY_NOISE)
def test_prior_term_as_defined(name):
    noise = EVERY_NOISE[name]
    logits,x0,xt,t = problem_for(noise)
    got = prior_term(logits, x0, noise.corruption())
    assert_end_term(got, token_by_token(prior(noise), logits, x0, xt, t))

def sum_of_first(values, n):
    "Sum of the first n[b] values of each row b, one by one"
    out = torch.zeros(len(values), dtype=torch.float64)
    for b,row in enumerate(values):
        for i in range(int(n[b])): out[b] += row[i]
    return out

def integrand(c, logits, noisy, t, gap_logits=None):
    "Integrand of the bound of a noise, (B,), for any network that gave these outputs"
    return output_integrand(None, DenoiserOutput(logits, gap_logits), noisy, t, c)

@pytest.mark.parametrize('name', SURVIVING | INSERTING)
def test_integrand_is_the_sum_over_tokens_and_gaps(name):
    "Sequences of different lengths; nothing after their ends counts. The summands are tested above"
    c = EVERY_NOISE[name].corruption()
    logits,x0,_,t = problem(L=12)
    noisy = c.corrupt(x0, t, seeded_generator(0), torch.tensor([12, 0, 5, 9]))
    if name=='mask-cosine': tokens = masked_nelbo(logits, noisy.x0, noisy.xt, t, get_schedule('cosine'))
    else: tokens = hybrid_nelbo(logits, noisy.x0, noisy.xt, t, c)
    expected = sum_of_first(tokens, noisy.lengths)
    gap_logits = None
    if c.deletes:
        gap_logits = torch.randn(4, 13, dtype=torch.float64, generator=seeded_generator(2))
        every_gap = torch.ones(4, 13, dtype=torch.bool)
        inserted = insertion_nelbo(gap_logits, noisy.gaps, every_gap, t, c)
        expected += sum_of_first(inserted, noisy.lengths+1)
    assert_same(integrand(c, logits, noisy, t, gap_logits), expected, 1e-12)

# Gradients: against finite differences

def hybrid(corruption): return lambda logits, x0, xt, t: hybrid_nelbo(logits, x0, xt, t, corruption)
def of_masks(logits, x0, xt, t): return masked_nelbo(logits, x0, xt, t, LogLinear())
def of_masks_in_steps(logits, x0, xt, t): return masked_nelbo(logits, x0, xt, t, LogLinear(), 100)
def of_uniform_noise(logits, x0, xt, t): return uniform_nelbo(logits, x0, xt, t, CosineSquared())
def of_scores(noise): return lambda scores, x0, xt, t: score_entropy(scores, x0, xt, t, LogLinear(), noise)
def scores_of_logits(logits, x0, xt, t): return log_scores(logits, xt, t, Corruption(V, 1, 1))
def at_time_0(logits, x0, xt, t):
    return reconstruction_term(logits, x0, xt, Corruption(V, 1, 1, schedule=get_schedule('geometric')))
def at_time_1(logits, x0, xt, t): return prior_term(logits, x0, Corruption(V, 1, 1, schedule=LogLinear(.1)))

MASKS = dict(tokens=False)
TOKENS = dict(masks=False)
BOTH = {}
GRADIENTS = {
    'masked': (of_masks, MASKS),
    'masked, 100 steps': (of_masks_in_steps, MASKS),
    'uniform': (of_uniform_noise, TOKENS),
    'score entropy, absorb': (of_scores('absorb'), MASKS),
    'score entropy, uniform': (of_scores('uniform'), TOKENS),
    'scores of a denoiser': (scores_of_logits, BOTH),
    'reconstruction': (at_time_0, BOTH),
    'prior': (at_time_1, BOTH),
    'hybrid, 10%': (hybrid(Corruption(V, 9, 1)), BOTH),
    'hybrid, own schedules': (hybrid(SURVIVING['own schedules'].corruption()), BOTH),
    'hybrid, gidd': (hybrid(GIDDCorruption(V)), BOTH),
    'hybrid, 100 steps': (hybrid(Corruption(V, 1, 1, T=100)), BOTH),
    'hybrid, gidd, 100 steps': (hybrid(GIDDCorruption(V, T=100)), BOTH),
    'hybrid, mask, delete': (hybrid(Corruption(V, 1, 0, 1)), MASKS),
    'hybrid, all three': (hybrid(Corruption(V, 1, 1, 1)), BOTH),
}
@pytest.mark.parametrize('name', GRADIENTS)
def test_gradients_are_finite_differences(name):
    f,symbols = GRADIENTS[name]
    logits,*args = problem(L=5, **symbols)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda o: f(o, *args), logits, eps=1e-6, atol=1e-6, rtol=1e-5)

def test_gradient_of_insertions_is_finite_differences():
    g = seeded_generator(0)
    logits = torch.randn(4, 6, generator=g, dtype=torch.float64).requires_grad_()
    gaps = torch.randint(0, 3, (4, 6), generator=g)
    real = torch.rand(4, 6, generator=g)<.7
    def f(o): return insertion_nelbo(o, gaps, real, torch.tensor(T0).double(), Corruption(V, 1, 1, 1))
    assert torch.autograd.gradcheck(f, logits, eps=1e-6, atol=1e-6)

# Precision

WEIGHTS = dict( # of masking, substitution and deletion
    mask=(1,0,0),
    uniform=(0,1,0),
    hybrid=(8,2,0),
    mask_delete=(1,0,1),
    all_three=(5,2,3),
    delete=(0,0,1),
    uniform_delete=(0,1,1),
)
def noises(schedule, T=None):
    "Every noise with a schedule; with T steps only those without deletion"
    mixtures = {kind:w for kind,w in WEIGHTS.items() if T is None or not w[2]}
    found = {kind:Corruption(V, *w, schedule=schedule, T=T) for kind,w in mixtures.items()}
    return found | {'gidd':GIDDCorruption(V, T=T), 'gidd 2':GIDDCorruption(V, .5, 2., T=T)}

def losses(schedule, T):
    "Each loss of logits, x0, xt and t that a schedule can have, and the symbols of its noise"
    def mdlm(*args): return masked_nelbo(*args, schedule, T)
    found = {'mdlm':(mdlm, MASKS)}
    for kind,c in noises(schedule, T).items():
        symbols = dict(masks=kind not in ('uniform','uniform_delete','delete'),
                       tokens=kind not in ('mask','mask_delete','delete'))
        found[kind] = hybrid(c),symbols
    if T is None:
        found['sedd absorb'] = (lambda *args: score_entropy(*args, schedule, 'absorb')),MASKS
        found['sedd uniform'] = (lambda *args: score_entropy(*args, schedule, 'uniform')),TOKENS
    return found

def every_loss():
    "Name, function and symbols of every loss, for every schedule, in continuous time and in steps"
    found = []
    for name,T in product(ALPHA, (None, 100)):
        for kind,(loss,symbols) in losses(get_schedule(name), T).items():
            found.append(pytest.param(kind, loss, symbols, id=f'{kind}-{name}-{T}'))
    return found

each_loss = pytest.mark.parametrize('kind, loss, symbols', every_loss())

@each_loss
def test_float32_agrees_with_float64(kind, loss, symbols):
    "Near t=1 losses are differences of nearly equal numbers, hence the absolute tolerance"
    logits,*args = problem(**symbols)
    a = loss(logits, *args)
    b = loss(logits.float(), *args)
    assert a.dtype==torch.float64
    assert b.dtype==torch.float32
    assert a.shape==b.shape==(4, 30)
    assert ((a-b).abs()<=1e-4*a.abs()+5e-5).all(), f'off by {(a-b).abs().max():.1e} nats'
    assert (a.mean()-b.mean()).abs()<=1e-5*a.mean()

@each_loss
def test_losses_are_divergences(kind, loss, symbols):
    "They are not negative; with deletion alone nothing is resampled, so that tokens cost nothing"
    nats = loss(*problem(**symbols))
    assert (nats>=-1e-12).all()
    assert nats.any() or kind=='delete'

@each_loss
def test_each_token_costs_the_same_in_another_place_and_batch(kind, loss, symbols):
    *tensors,t = problem(**symbols)
    nats = loss(*tensors, t)
    flipped = loss(*[o.flip(1) for o in tensors], t).flip(1)
    assert torch.allclose(flipped, nats, rtol=1e-9, atol=1e-9)
    alone = loss(*[o[1:2] for o in tensors], t[1:2])
    assert torch.allclose(alone, nats[1:2], rtol=1e-9)

# At the ends of time and for extreme logits

EDGES = {name:get_schedule(name) for name in ALPHA} | {
    'eps 0': LogLinear(0.),
    'eps 0, squared': CosineSquared(0.),
    'root': Polynomial(.5), # its slope at 0 is infinite
    'power 2.5': Polynomial(2.5),
}
ENDS = { # number of steps: times of a batch
    None: [(0., .5, 1., 1e-4), (0.,)*4, (1.,)*4, (1e-6, 1-1e-6, .2, .9)],
    100: [(.01, .5, 1., .02), (.01,)*4, (1.,)*4],
}

def loss_and_gradients(c, logits, noisy, t):
    "Integrand of the bound, (B,), and its gradients; of tokens only, where a noise deletes without masks"
    inputs = [logits]
    if c.deletes and c.weights['mask']:
        gap_logits = logits[:,:1,0].detach().clamp(-20, 20)*torch.ones(13)
        inputs.append(gap_logits.to(logits.dtype).requires_grad_())
        loss = integrand(c, logits, noisy, t, inputs[1])
    elif c.deletes:
        tokens = hybrid_nelbo(logits, noisy.x0, noisy.xt, t, c)
        loss = torch.where(noisy.attention_mask, tokens, 0.).sum(1)
    else: loss = integrand(c, logits, noisy, t)
    return loss, torch.autograd.grad(loss.sum(), inputs)

def is_finite(c, times, lengths, scale, dtype):
    "Return True if the loss of extreme logits, -scale and scale, or of usual ones, for scale 1, is finite"
    logits,x0,_,t = problem(L=12, scale=1, times=times)
    if scale>1: logits = scale*logits.sign()
    noisy = c.corrupt(x0, t, seeded_generator(0), lengths)
    loss,gradients = loss_and_gradients(c, logits.to(dtype).requires_grad_(), noisy, t)
    return loss.dtype==dtype and loss.shape==(4,) and all(o.isfinite().all() for o in (loss, *gradients))

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=['float64', 'float32'])
@pytest.mark.parametrize('name', EDGES)
def test_finite_at_the_ends_of_time_and_for_extreme_logits(name, dtype):
    "Logits up to 50 (40 in float32, whose largest number is e^88), and sequences shorter than the batch"
    extreme = 50 if dtype==torch.float64 else 40
    every_length = None,torch.tensor([12, 7, 10, 0])
    bad = []
    for T,scale in product(ENDS, (1, extreme)):
        for (kind,c),times,lengths in product(noises(EDGES[name], T).items(), ENDS[T], every_length):
            # at 0 insertions come infinitely fast
            if name=='root' and c.deletes: times = [max(t, 1e-9) for t in times]
            if not is_finite(c, times, lengths, scale, dtype):
                bad.append((kind, T, scale, times, lengths is not None))
    assert not bad, f'{len(bad)}, such as {bad[:4]}'

@pytest.mark.parametrize('name', sorted(set(EDGES)-{'root'}))
@pytest.mark.parametrize('T', [5, 100, 1000])
def test_first_step_from_a_rounded_time(name, T):
    "A float32 time may lie a little before the first step's end: the step begins at 0 all the same"
    schedule = EDGES[name]
    logits,x0,xt,_ = problem(tokens=False, times=(1/T,))
    c = Corruption(V, 1, 1, schedule=schedule, T=T)
    rounded = torch.tensor([1/T], dtype=torch.float32)
    exact = float64(1/T)
    losses = [
        lambda t: masked_nelbo(logits, x0, xt, t, schedule, T),
        lambda t: hybrid_nelbo(logits, x0, xt, t, c),
    ]
    for loss in losses: assert torch.allclose(loss(rounded), loss(exact), rtol=1e-4, atol=1e-5)

# Planted faults, which the assertions above must notice

def one_percent_more(f): return lambda *args, **kwargs: f(*args, **kwargs)*1.01
def slightly_more(f): return lambda *args: f(*args)+.001
def gaps_slightly_larger(f): return lambda *args: f(*args)+.01
def rates_swapped(f):
    def wrong(self, t):
        rates = f(self, t)
        return rates._replace(to_mask=rates.to_token, to_token=rates.to_mask)
    return wrong
def earlier(f): return lambda self, t: f(self, t*.99)
def from_earlier(f): return lambda self, p, xt, s, t: f(self, p, xt, s*.99, t)

class Fault(NamedTuple):
    "Owner and name of a function, what makes a wrong one of it, and the assertions that must notice"
    owner:object
    name:str
    wrong:Callable
    noticed_by:list

FAULTS = {
    'weight of time': Fault(objective, 'time_weight', one_percent_more, [
        (assert_mdlm, 'log_linear')]),
    'weight of a step': Fault(objective, 'time_weight', one_percent_more, [
        (assert_mdlm, 'cosine', 7)]),
    'derivative of alpha': Fault(LogLinear, 'dalpha', one_percent_more, [
        (assert_mdlm, 'log_linear'),
        (assert_udlm, 'log_linear'),
        (assert_sedd, 'log_linear', 'absorb'),
        (assert_sedd, 'log_linear', 'uniform'),
        (assert_gidd, 'hybrid-log_linear'),
        (assert_reverse, 'all_three-log_linear'),
        (assert_insertion, 'all_three-log_linear')]),
    'alpha': Fault(LogLinear, 'alpha', one_percent_more, [
        (assert_mdlm, 'log_linear'),
        (assert_udlm, 'log_linear'),
        (assert_steps, 'hybrid-log_linear', 50)]),
    'noise rate': Fault(Schedule, 'dsigma', one_percent_more, [
        (assert_sedd, 'cosine', 'absorb'),
        (assert_sedd, 'cosine', 'uniform')]),
    'rates swapped': Fault(Corruption, 'event_rates', rates_swapped, [
        (assert_gidd, 'hybrid-cosine'),
        (assert_reverse, 'all_three-cosine'),
        (assert_udlm, 'cosine')]),
    'marginals of the network': Fault(objective, 'log_marginals', slightly_more, [
        (assert_udlm, 'cosine'),
        (assert_gidd, 'mask-cosine'),
        (assert_reverse, 'mask_delete-cosine')]),
    'posterior': Fault(Corruption, 'reverse_posterior', from_earlier, [
        (assert_steps, 'uniform-cosine', 50),
        (assert_steps, 'mask-cosine', 4),
        (assert_steps, 'gidd', 4)]),
    'expected gaps': Fault(objective, 'expected_gaps', gaps_slightly_larger, [
        (assert_insertion, 'mask_delete-cosine')]),
    'state probabilities of gidd': Fault(GIDDCorruption, 'state_probs', earlier, [
        (assert_gidd, 'gidd')]),
}
@pytest.mark.parametrize('name', FAULTS)
def test_a_fault_is_noticed(name, monkeypatch):
    fault = FAULTS[name]
    for assertion,*args in fault.noticed_by:
        assertion(*args)
        with monkeypatch.context() as patched:
            patched.setattr(fault.owner, fault.name, fault.wrong(getattr(fault.owner, fault.name)))
            with pytest.raises(AssertionError, match='off by'): assertion(*args)
