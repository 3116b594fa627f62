"""The objectives against the papers: every formula is written out again from its definition, one token at a time, and shares no code with the library."""
import math
from itertools import product
import numpy as np, pytest, torch
from scipy.linalg import expm
from bijdiff.diffusion import objective
from bijdiff.diffusion.schedules import CosineSquared, get_schedule, LogLinear, Polynomial, Schedule
from bijdiff.diffusion.corruption import Corruption, GIDDCorruption, EventRates
from bijdiff.diffusion.objective import bound_integrand, prior_term, hybrid_nelbo, insertion_nelbo
from bijdiff.diffusion.objective import log_scores, masked_nelbo, reconstruction_term, score_entropy
from bijdiff.diffusion.objective import uniform_nelbo

V,T0 = 4,(.05, .3, .62, .97)                          # size of the alphabet, the mask is 4; one time per text
h,e = math.pi/2,.999                                  # eps is 1e-3
def geometric(t): return 1e-3*2e4**t
# alpha and its derivative, by hand
ALPHA = dict(log_linear=(lambda t: 1-e*t, lambda t: -e), polynomial=(lambda t: 1-e*t*t, lambda t: -2*e*t), cosine=(lambda t: 1-e*math.cos(h*(1-t)), lambda t: -e*h*math.sin(h*(1-t))),
             half_cosine=(lambda t: 1-e+e*math.cos(h*t), lambda t: -e*h*math.sin(h*t)), cosine_squared=(lambda t: 1-e+e*math.cos(h*t)**2, lambda t: -e*h*math.sin(2*h*t)),
             geometric=(lambda t: math.exp(-geometric(t)), lambda t: -math.log(2e4)*geometric(t)*math.exp(-geometric(t))))
names = pytest.mark.parametrize('name', ALPHA)

def slope(f, t, d=1e-4): return (8*(f(t+d)-f(t-d))-f(t+2*d)+f(t-2*d))/(12*d)
def softmax(o): return [math.exp(a)/sum(map(math.exp, o)) for a in o]
def onehot(x, n=V): return [float(i==x) for i in range(n)]

def problem(masks=True, tokens=True, dtype=torch.float64, scale=1.5, L=30, times=T0, seed=0):
    "Seeded logits, clean texts, noisy texts with or without masks and with or without substituted tokens, times"
    g = torch.Generator().manual_seed(seed)
    B,sample_categorical = len(times),lambda n: torch.randint(0, n, (len(times), L), generator=g)
    x0,noise,how = sample_categorical(V),sample_categorical(V),sample_categorical(3)
    xt = torch.where((how==1)&tokens, noise, torch.where((how==2)&masks, V, x0))
    return (scale*torch.randn(B, L, V, generator=g, dtype=torch.float64)).to(dtype), x0, xt, torch.tensor(times, dtype=torch.float64)

def slow(f, o, x0, xt, t): return torch.tensor([[f(*one, s) for one in zip(*text)] for *text,s in zip(o.tolist(), x0.tolist(), xt.tolist(), t.tolist())], dtype=torch.float64)
def same(got, want, tol=1e-8):
    assert got.shape==want.shape and got.dtype==torch.float64, 'shape and dtype'
    off = (got-want).abs()/want.abs().clamp(min=1)
    assert off.max()<tol and want.abs().max()>.01, f'off by {off.max():.1e}'

# MDLM: Sahoo et al. 2024, equation 10, and equation 8 times T
def judge_mdlm(name, T=None):
    a,da = ALPHA[name]
    def token(logits, x, z, t):
        if z!=V: return 0.
        weight = da(t)/(1-a(t)) if T is None else T*(a(t)-a(t-1/T))/(1-a(t))
        return weight*math.log(softmax(logits)[x])
    args = problem(tokens=False, times=T0 if T is None else [k/T for k in sorted({1, (T+1)//2, T})])
    same(masked_nelbo(*args, get_schedule(name), T), slow(token, *args))
@names
@pytest.mark.parametrize('T', [None, 1, 7, 1000])
def test_masked_bound_is_that_of_mdlm(name, T): judge_mdlm(name, T)

# SEDD: Lou et al. 2024, denoising score entropy with its constant, rates Q and p_{t|0} = exp(sigma Q); row: from
def rate_matrix(noise):
    Q = np.zeros((V+1, V+1))
    if noise=='absorb': Q[:V,V] = 1
    else: Q[:V,:V] = 1/V
    return Q-np.diag(Q.sum(1))

def judge_sedd(name, noise):
    a,da = ALPHA[name]
    Q = rate_matrix(noise)
    def token(log_s, x, z, t):
        sigma,dsigma,out = -math.log(a(t)),-da(t)/a(t),0.
        P = expm(sigma*Q)
        for y in range(V):
            if y==z or not Q[y,z]: continue
            r = P[x,y]/P[x,z]
            out += dsigma*Q[y,z]*(math.exp(log_s[y])-r*log_s[y]+(r*(math.log(r)-1) if r>0 else 0))
        return out
    args = problem(masks=noise=='absorb', tokens=noise!='absorb')
    same(score_entropy(*args, get_schedule(name), noise), slow(token, *args))
@names
@pytest.mark.parametrize('noise', ['absorb', 'uniform'])
def test_score_entropy_is_that_of_sedd(name, noise): judge_sedd(name, noise)

@names
def test_score_entropy_is_that_of_sedd_in_closed_form(name):
    "With ratios 1/(e^sigma-1) of absorbing noise, and 1-N/(e^sigma-1+N) of uniform noise, as published code has them"
    a,da = ALPHA[name]
    def absorb(log_s, x, z, t):
        sigma,dsigma = -math.log(a(t)),-da(t)/a(t)
        r = math.exp(-sigma)/(1-math.exp(-sigma))
        return dsigma*(sum(map(math.exp, log_s))-r*log_s[x]+r*(math.log(r)-1)) if z==V else 0.
    def uniform(log_s, x, z, t):
        em1,dsigma = 1/a(t)-1,-da(t)/a(t)
        ratio = 1-V/(em1+V)
        positive,negative = sum(math.exp(o) for y,o in enumerate(log_s) if y!=z)/V,sum(o for y,o in enumerate(log_s) if y!=z)/V
        if x==z: return dsigma*(positive-ratio*negative+(V-1)/V*ratio*(math.log(ratio)-1))
        return dsigma*(positive-negative-log_s[x]/em1+((-math.log(ratio)-1)/ratio-(V-2))/V)
    for noise,f in dict(absorb=absorb, uniform=uniform).items():
        args = problem(masks=noise=='absorb', tokens=noise!='absorb')
        same(score_entropy(*args, get_schedule(name), noise), slow(f, *args))

# The noise itself, by hand: name of the schedules or (p_uniform, gamma) -> alpha(t) and the noise vector beta(t) pi(t) over tokens and mask
def interpolation(shares, names):
    if shares=='gidd':
        p,gamma = names
        c = lambda t: 2**gamma*p/(V*(1-p))*t**(gamma/2)*(1-t)**(gamma/2)
        return lambda t: (1-t)/(1+V*c(t)), lambda t: np.array([c(t)]*V+[t])/(1+V*c(t))
    m,u = shares[0]/sum(shares[:2]),shares[1]/sum(shares[:2])
    am,au = (ALPHA[n][0] for n in (names if isinstance(names, tuple) else (names, names)))
    return lambda t: 1-m*(1-am(t))-u*(1-au(t)), lambda t: np.array([u*(1-au(t))/V]*V+[m*(1-am(t))])

def noise_of(shares, names, T=None):
    if shares=='gidd': return GIDDCorruption(V, *names, T=T)
    return Corruption(V, *shares, schedule=get_schedule(names) if isinstance(names, str) else {k:get_schedule(n) for k,n in zip(('mask','substitute','delete'), names)}, T=T)

ALIVE = {f'{kind}-{n}':(shares, n) for (kind,shares),n in product(dict(mask=(1,0), uniform=(0,1), hybrid=(.8,.2), unscaled=(1,3)).items(), ALPHA)} | {
    'own schedules':((2,1), ('half_cosine','log_linear')), 'own schedules, too':((1,1), ('geometric','cosine')), 'gidd':('gidd', (.1,1.)), 'gidd 2':('gidd', (.3,2.)), 'gidd 3':('gidd', (.6,.5))}
def args_for(shares, **kw): return problem(masks=shares=='gidd' or shares[0]>0, tokens=shares=='gidd' or shares[1]>0, **kw)

# GIDD: von Rütte et al. 2025, theorem 3.1
def judge_gidd(name):
    shares,n = ALIVE[name]
    alpha,betapi = interpolation(shares, n)
    def token(logits, x, z, t):
        a,b = alpha(t),1-alpha(t)
        pi,dpi = betapi(t)/b,slope(lambda s: betapi(s)/(1-alpha(s)), t)
        q,qhat = (a*np.array([*p,0.])+betapi(t) for p in (onehot(x), softmax(logits)))
        weight = (b*dpi[z]-slope(alpha, t)/a*pi[z])/q[z]
        kl = sum(q[y]*math.log(q[y]/qhat[y]) for y in range(V+1) if q[y]>0)
        return weight*(kl+q[z]/qhat[z]-math.log(q[z]/qhat[z])-1)
    args = args_for(shares)
    same(hybrid_nelbo(*args, noise_of(shares, n)), slow(token, *args))
@pytest.mark.parametrize('name', ALIVE)
def test_hybrid_bound_is_that_of_gidd(name): judge_gidd(name)

# UDLM: Schiff et al. 2024, the continuous-time bound
def judge_udlm(name):
    a,da = ALPHA[name]
    def token(logits, x, i, t):
        bar,hat = ([V*a(t)*p+1-a(t) for p in o] for o in (onehot(x), softmax(logits)))
        return da(t)/(V*a(t))*(V/bar[i]-V/hat[i]-sum(bar[j]/bar[i]*math.log(hat[i]*bar[j]/(hat[j]*bar[i])) for j in range(V)))
    args = problem(masks=False)
    same(uniform_nelbo(*args, get_schedule(name)), slow(token, *args))
@names
def test_uniform_bound_is_that_of_udlm(name): judge_udlm(name)

@names
def test_schedules_by_name(name):
    "The name stands for the schedule with its defaults, wherever one is taken"
    s = get_schedule(name)
    masks,tokens = problem(tokens=False),problem(masks=False)
    for f in (lambda s: masked_nelbo(*masks, s), lambda s: masked_nelbo(*masks, s, 1000), lambda s: uniform_nelbo(*tokens, s), lambda s: score_entropy(*masks, s), lambda s: score_entropy(*tokens, s, 'uniform'), lambda s: reconstruction_term(*masks[:3], s),
              lambda s: prior_term(*masks[:2], s), lambda s: hybrid_nelbo(*masks, Corruption(V, 1, 1, schedule=s)), lambda s: hybrid_nelbo(*masks, Corruption(V, 1, 1, schedule=dict(mask=s)))): assert torch.equal(f(name), f(s))

BAD = {'masks in uniform noise':(lambda o, x, z, t: uniform_nelbo(o, x, torch.full_like(z, V), t, LogLinear()), 'xt has ids from 4 to 4; expected 0 to 3'), 'other tokens in masks':(lambda o, x, z, t: masked_nelbo(o, x, (x+1)%V, t, LogLinear()), r'xt differs from x0 at \[0, 0\]'),
       'steps of deletion':(lambda *a: hybrid_nelbo(*a, Corruption(V, delete=1, T=4)), 'T is 4; with deletion'), 'no schedule':(lambda o, x, z, t: masked_nelbo(o, x, x, t, 'linear'), "schedule is 'linear'")}
@pytest.mark.parametrize('name', BAD)
def test_what_would_cost_nothing_is_refused(name):
    f,message = BAD[name]
    with pytest.raises(ValueError, match=message): f(*problem())

# T steps: T times the divergence of the posteriors, by Bayes' rule with matrices
def judge_steps(name, T):
    shares,n = ALIVE[name]
    alpha,betapi = interpolation(shares, n)
    def token(logits, x, z, t):
        s = max(t-1/T, 0.)
        k = alpha(t)/alpha(s)
        step = k*np.eye(V+1)+np.ones((V+1, 1))*(betapi(t)-k*betapi(s))                     # row: from
        def posterior(p):
            joint = [(alpha(s)*o+betapi(s)[y])*step[y,z] for y,o in enumerate([*p,0.])]
            return [o/sum(joint) for o in joint]
        return T*sum(q*math.log(q/qhat) for q,qhat in zip(posterior(onehot(x)), posterior(softmax(logits))) if q>0)
    logits,x0,xt,t = args_for(shares, times=[k/T for k in sorted({2, (T+3)//2, T-1})])
    same(hybrid_nelbo(logits, x0, xt, t, noise_of(shares, n, T)), slow(token, logits, x0, xt, t))
@pytest.mark.parametrize('T', [4, 50])
@pytest.mark.parametrize('name', ALIVE)
def test_steps_are_posteriors_by_bayes_rule(name, T): judge_steps(name, T)

# With deletion too: divergence of the two reverse processes of jumps (Campbell et al. 2022, proposition 2), rates from the derivatives of the masses
DELETING = {f'{kind}-{n}':(shares, n) for (kind,shares),n in product(dict(mask_delete=(1,0,1), all_three=(.5,.2,.3), delete=(0,0,1), uniform_delete=(0,1,2)).items(), ALPHA)} | {
    'own schedules, all three':((5,2,3), ('cosine','half_cosine','log_linear')), 'own schedules, masks':((1,0,3), ('half_cosine','cosine','polynomial'))}

def state_probs(shares, names):
    "Kept, masked, substituted and deleted at a time, by hand"
    shares = np.array([*shares, 0., 0.][:3])/sum(shares)
    alphas = [ALPHA[n][0] for n in ((names,)*3 if isinstance(names, str) else (*names, names[0])[:3])]
    def at(t):
        hit = [c*(1-a(t)) for c,a in zip(shares, alphas)]
        return np.array([1-sum(hit), *hit])
    return at

def rates(at, t):
    "Rates of redraws as any token and as mask: the two unknowns of the two balances of the kept and the substituted"
    (k,m,u,d),(dk,dm,du,dd) = at(t),slope(at, t)
    A = k+m+u
    if m==0: return -dk/k-dd/A,0.                                                   # tokens are deleted, all at one rate
    return np.linalg.solve([[1, 1], [A-u, -u]], [-dk/k, du])

def reverse_rates(shares, n):
    at = state_probs(shares, n)
    def token(logits, x, z, t):
        (k,m,u,d),(to_token,to_mask) = at(t),rates(at, t)
        q,qhat = ([k*o+u/V for o in p]+[m] for p in (onehot(x), softmax(logits)))
        out,rate = 0.,to_mask if z==V else to_token/V                             # of y becoming z
        for y in range(V+1):
            if y==z or (y==V and m==0): continue
            true,model = rate*q[y]/q[z],rate*qhat[y]/qhat[z]
            out += model-true+(true*math.log(true/model) if true>0 else 0.)
        return out
    return token

def possible(shares): return dict(masks=shares[0]>0, tokens=shares[1]>0)
def judge_reverse(name):
    shares,n = DELETING[name]
    args = problem(**possible(shares))
    got,want = hybrid_nelbo(*args, noise_of(shares, n)),slow(reverse_rates(shares, n), *args)
    if shares[:2]==(0,0): assert not got.any() and want.abs().max()<1e-9               # nothing is ever redrawn
    else: same(got, want)
@pytest.mark.parametrize('name', DELETING)
def test_bound_with_deletion_is_the_divergence_of_reverse_rates(name): judge_reverse(name)

# Insertion: kappa (ghat - g - g log ghat)
def judge_insertion(name):
    shares,n = DELETING[name]
    at,g = state_probs(shares, n),torch.Generator().manual_seed(1)
    logits,gaps,real = torch.randn(4, 9, generator=g, dtype=torch.float64),torch.randint(0, 4, (4, 9), generator=g),torch.rand(4, 9, generator=g)<.8
    def gap(o, count, is_real, t):
        (k,m,u,d),dd = at(t),slope(at, t)[3]
        guess = math.exp(o)*d/(k+m+u)
        return dd/d*(guess-count-count*math.log(guess)) if is_real else 0.
    same(insertion_nelbo(logits, gaps, real, torch.tensor(T0), noise_of(shares, n)), slow(gap, logits, gaps, real, torch.tensor(T0)), 1e-6)     # T0 in float32
INSERTING = [k for k,(shares,_) in DELETING.items() if shares[0]]
@pytest.mark.parametrize('name', INSERTING)
def test_insertions_as_defined(name): judge_insertion(name)

@pytest.mark.parametrize('name', [*ALIVE, *DELETING])
def test_end_terms_as_defined(name):
    "At 0 the posterior of the clean token given its own symbol; at 1 the divergence of the jump to nothing but noise, of those alive"
    shares,n = {**ALIVE, **DELETING}[name]
    if shares=='gidd': at = lambda t: (lambda a,b: np.array([a(t), b(t)[V], V*b(t)[0], 0.]))(*interpolation(shares, n))
    else: at = state_probs(shares, n)
    def q(p, t): return [at(t)[0]*o+at(t)[2]/V for o in p]+[at(t)[1]]
    def opening(logits, x, z, t):
        if q(onehot(x), 0.)[z]<=0: return 0.
        return -math.log(softmax(logits)[x]*q(onehot(x), 0.)[z]/q(softmax(logits), 0.)[z])
    def closing(logits, x, z, t): return sum(a*math.log(a/b) for a,b in zip(q(onehot(x), 1.), q(softmax(logits), 1.)) if a>0)/(1-at(1.)[3])
    logits,x0,xt,t = problem(**(possible(shares) if shares!='gidd' else {}))
    for got,f in ((reconstruction_term(logits, x0, xt, noise_of(shares, n)), opening), (prior_term(logits, x0, noise_of(shares, n)), closing)):
        assert got.shape==x0.shape and (got-slow(f, logits, x0, xt, t)).abs().max()<1e-8, f.__name__

@pytest.mark.parametrize('name', [*ALIVE, *INSERTING])
def test_integrand_is_the_sum_over_the_symbols_there_are(name):
    "Texts of different lengths, sampled; those behind the end do not count"
    shares,n = {**ALIVE, **DELETING}[name]
    c,(_,x0,_,t),lengths = noise_of(shares, n),problem(L=12),torch.tensor([12, 0, 5, 9])
    noisy,o = c.corrupt(x0, t, torch.Generator().manual_seed(0), lengths),problem(L=12)[0]
    tokens = hybrid_nelbo(o, noisy.x0, noisy.xt, t, c) if name!='mask-cosine' else masked_nelbo(o, noisy.x0, noisy.xt, t, get_schedule('cosine'))     # each of them judged above
    want = torch.zeros(4, dtype=torch.float64)
    for b in range(4):
        for i in range(int(noisy.lengths[b])): want[b] += tokens[b,i]
    if c.deletes:
        gaps = torch.randn(4, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        inserted = insertion_nelbo(gaps, noisy.gaps, torch.ones(4, 13, dtype=torch.bool), t, c)
        for b in range(4):
            for i in range(int(noisy.lengths[b])+1): want[b] += inserted[b,i]
    same(bound_integrand(o, noisy, t, c, gaps if c.deletes else None), want, 1e-12)

# Gradients: against finite differences
GRADIENTS = {'masked':(lambda o, *a: masked_nelbo(o, *a, LogLinear()), {'tokens':False}), 'masked, 100 steps':(lambda o, *a: masked_nelbo(o, *a, LogLinear(), 100), {'tokens':False}), 'uniform':(lambda o, *a: uniform_nelbo(o, *a, CosineSquared()), {'masks':False}),
             'score entropy, absorb':(lambda o, *a: score_entropy(o, *a, LogLinear(), 'absorb'), {'tokens':False}), 'score entropy, uniform':(lambda o, *a: score_entropy(o, *a, LogLinear(), 'uniform'), {'masks':False}),
             'scores of a denoiser':(lambda o, x0, xt, t: log_scores(o, xt, t, Corruption(V, 1, 1)), {}), 'reconstruction':(lambda o, x0, xt, t: reconstruction_term(o, x0, xt, Corruption(V, 1, 1, schedule=get_schedule('geometric'))), {}),
             'closing':(lambda o, x0, xt, t: prior_term(o, x0, Corruption(V, 1, 1, schedule=LogLinear(.1))), {})}
GRADIENTS |= {f'hybrid, {k}':(lambda o, *a, c=c: hybrid_nelbo(o, *a, c), {'tokens':k!='mask, delete'}) for k,c in {'10%':Corruption(V, 9, 1), 'own schedules':noise_of((2,1), ('half_cosine','log_linear')), 'gidd':GIDDCorruption(V),
              '100 steps':Corruption(V, 1, 1, T=100), 'gidd, 100 steps':GIDDCorruption(V, T=100), 'mask, delete':Corruption(V, 1, 0, 1), 'all three':Corruption(V, 1, 1, 1)}.items()}
@pytest.mark.parametrize('name', GRADIENTS)
def test_gradients_are_finite_differences(name):
    f,kw = GRADIENTS[name]
    o,*args = problem(L=5, **kw)
    assert torch.autograd.gradcheck(lambda o: f(o, *args), o.requires_grad_(), eps=1e-6, atol=1e-6, rtol=1e-5)

def test_gradient_of_insertions_is_finite_differences():
    g = torch.Generator().manual_seed(0)
    o,gaps,real = torch.randn(4, 6, generator=g, dtype=torch.float64),torch.randint(0, 3, (4, 6), generator=g),torch.rand(4, 6, generator=g)<.7
    assert torch.autograd.gradcheck(lambda o: insertion_nelbo(o, gaps, real, torch.tensor(T0).double(), Corruption(V, 1, 1, 1)), o.requires_grad_(), eps=1e-6, atol=1e-6)

# Precision
NOISES = dict(mask=(1,0,0), uniform=(0,1,0), hybrid=(8,2,0), mask_delete=(1,0,1), all_three=(5,2,3), delete=(0,0,1), uniform_delete=(0,1,1))
def noises(schedule, T=None):
    "Every noise with a schedule; with T steps those that can have them"
    return {k:Corruption(V, *c, schedule=schedule, T=T) for k,c in NOISES.items() if not (c[2] and T)} | {'gidd':GIDDCorruption(V, T=T), 'gidd 2':GIDDCorruption(V, .5, 2., T=T)}

@names
@pytest.mark.parametrize('T', [None, 100])
def test_per_token_and_float32_agrees_with_float64(name, T):
    losses = {k:lambda o, *a, c=c: hybrid_nelbo(o, *a, c) for k,c in noises(get_schedule(name), T).items()} | {'mdlm':lambda o, *a: masked_nelbo(o, *a, get_schedule(name), T)}
    if T is None: losses |= {f'sedd {k}':lambda o, *a, k=k: score_entropy(o, *a, get_schedule(name), k) for k in ('absorb', 'uniform')}
    for kind,f in losses.items():
        o,*args = problem(masks=kind.split()[-1] not in ('uniform', 'uniform_delete', 'delete'), tokens=kind not in ('mask', 'mdlm', 'sedd absorb', 'mask_delete', 'delete'))
        a,b = f(o, *args),f(o.float(), *args)
        assert a.dtype==torch.float64 and b.dtype==torch.float32 and a.shape==b.shape==(4, 30), kind
        assert ((a-b).abs()<=1e-4*a.abs()+5e-5).all() and (a.mean()-b.mean()).abs()<=1e-5*a.mean(), f'{kind}: off by {(a-b).abs().max():.1e} nats'    # near t=1 they are differences of nearly equal numbers
        assert (a>=-1e-12).all() and (a.any() or kind=='delete'), f'{kind} is a divergence'
        assert torch.allclose(f(o.flip(1), args[0].flip(1), args[1].flip(1), args[2]).flip(1), a, rtol=1e-9, atol=1e-9) and torch.allclose(f(o[1:2], *(v[1:2] for v in args)), a[1:2], rtol=1e-9), f'{kind}: each token by itself'

# At the ends of time and for extreme logits
EDGES = {k:get_schedule(k) for k in ALPHA} | {'eps 0':LogLinear(0.), 'eps 0, squared':CosineSquared(0.), 'root':Polynomial(.5), 'power 2.5':Polynomial(2.5)}
ENDS = {None:((0., .5, 1., 1e-4), (0.,)*4, (1.,)*4, (1e-6, 1-1e-6, .2, .9)), 100:((.01, .5, 1., .02), (.01,)*4, (1.,)*4)}
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=['float64', 'float32'])
@pytest.mark.parametrize('name', EDGES)
def test_finite_at_the_ends_of_time_and_for_extreme_logits(name, dtype):
    "For logits up to 50 (40 in float32, whose largest number is e^88), and texts that end before the batch does"
    big,bad = 50 if dtype==torch.float64 else 40,[]
    for T,scale in product(ENDS, (1, big)):
        for (kind,c),times,lengths in product(noises(EDGES[name], T).items(), ENDS[T], (None, torch.tensor([12, 7, 10, 0]))):
            if name=='root' and c.deletes: times = [max(t, 1e-9) for t in times]                 # at 0 insertions come infinitely fast
            o,x0,_,t = problem(L=12, scale=1, times=times)
            o = (o if scale==1 else scale*o.sign()).to(dtype).requires_grad_()
            noisy = c.corrupt(x0, t, torch.Generator().manual_seed(0), lengths)
            gaps = (o[...,0].detach().clamp(-20, 20)[:,:1]*torch.ones(13)).to(dtype).requires_grad_() if c.deletes and c.weights['mask'] else None
            if c.deletes and gaps is None: loss = torch.where(noisy.text, hybrid_nelbo(o, noisy.x0, noisy.xt, t, c), 0.).sum(1)
            else: loss = bound_integrand(o, noisy, t, c, gaps)
            grads = torch.autograd.grad(loss.sum(), [o]+([gaps] if gaps is not None else []))
            if not (loss.dtype==dtype and loss.shape==(4,) and loss.isfinite().all() and all(v.isfinite().all() for v in grads)): bad.append((kind, T, scale, times, lengths is not None))
    assert not bad, f'{len(bad)}, such as {bad[:4]}'

def test_first_step_from_a_rounded_time():
    "A float32 time may lie a little before the first step's end: the step begins at 0 all the same"
    for T,name in product((5, 100, 1000), sorted(set(EDGES)-{'root'})):                           # whose slope at 0 is infinite
        schedule = EDGES[name]
        o,x0,xt,_ = problem(tokens=False, times=(1/T,))
        for f in (lambda t: masked_nelbo(o, x0, xt, t, schedule, T), lambda t: hybrid_nelbo(o, x0, xt, t, Corruption(V, 1, 1, schedule=schedule, T=T))):
            assert torch.allclose(f(torch.tensor([1/T], dtype=torch.float32)), f(torch.tensor([1/T], dtype=torch.float64)), rtol=1e-4, atol=1e-5), (T, name)

# Faults that the judges above must refuse
def times_(f, by=1.01): return lambda *a, **kw: f(*a, **kw)*by
def swapped(f): return lambda self, t: EventRates(*(lambda r: (r.to_token, r.to_mask, r.delete))(f(self, t)))
def fault(where, name, how): return where, name, how(getattr(where, name))
FAULTS = {'weight of time':(fault(objective, 'time_weight', times_), [judge_mdlm], 'log_linear'), 'weight of a step':(fault(objective, 'time_weight', times_), [lambda n: judge_mdlm(n, 7)], 'cosine'),
          'derivative of alpha':(fault(LogLinear, 'dalpha', times_), [judge_mdlm, judge_udlm, lambda n: judge_sedd(n, 'absorb'), lambda n: judge_sedd(n, 'uniform'), lambda n: judge_gidd(f'hybrid-{n}'), lambda n: judge_reverse(f'all_three-{n}'), lambda n: judge_insertion(f'all_three-{n}')], 'log_linear'),
          'alpha':(fault(LogLinear, 'alpha', times_), [judge_mdlm, judge_udlm, lambda n: judge_steps(f'hybrid-{n}', 50)], 'log_linear'), 'noise rate':(fault(Schedule, 'dsigma', times_), [lambda n: judge_sedd(n, 'absorb'), lambda n: judge_sedd(n, 'uniform')], 'cosine'),
          'rates swapped':(fault(Corruption, 'event_rates', swapped), [lambda n: judge_gidd(f'hybrid-{n}'), lambda n: judge_reverse(f'all_three-{n}'), judge_udlm], 'cosine'),
          'marginals of the network':(fault(objective, 'log_marginals', lambda f: lambda p, m: f(p, m)+.001), [judge_udlm, lambda n: judge_gidd(f'mask-{n}'), lambda n: judge_reverse(f'mask_delete-{n}')], 'cosine'),
          'posterior':(fault(Corruption, 'reverse_posterior', lambda f: lambda self, p, z, s, t: f(self, p, z, s*.99, t)), [lambda n: judge_steps(f'uniform-{n}', 50), lambda n: judge_steps(f'mask-{n}', 4), lambda _: judge_steps('gidd', 4)], 'cosine'),
          'expected gaps':(fault(objective, 'expected_gaps', lambda f: lambda *a: f(*a)+.01), [lambda n: judge_insertion(f'mask_delete-{n}')], 'cosine'),
          'shares of gidd':(fault(GIDDCorruption, 'state_probs', lambda f: lambda self, t: f(self, t*.99)), [lambda _: judge_gidd('gidd')], '')}
@pytest.mark.parametrize('name', FAULTS)
def test_judges_refuse_a_fault(name, monkeypatch):
    patch,judges,schedule = FAULTS[name]
    for judge in judges:
        judge(schedule)                                                                # what is honest is accepted
        with monkeypatch.context() as m:
            m.setattr(*patch)
            with pytest.raises(AssertionError, match='off by'): judge(schedule)
