"""The noise before judges that share no code with it: counts against closed forms, texts put together again, Kolmogorov's equation by another integrator, Bayes' rule with matrices."""
import math
from functools import lru_cache
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.integrate import solve_ivp
from scipy.stats import norm
from bijdiff.diffusion import corruption
from bijdiff.diffusion.schedules import Cosine, CosineSquared, Geometric, get_schedule, HalfCosine, LogLinear
from bijdiff.diffusion.schedules import low_discrepancy_times, Polynomial, schedules
from bijdiff.diffusion.packing import count_gaps, pack
from bijdiff.diffusion.corruption import Corruption, corruption_from_dict, GIDDCorruption

V,h = 3,math.pi/2
# schedule: alpha by hand, from 1 at t=0 (but for the geometric one)
ALPHA = {'log_linear':(LogLinear(), lambda t: 1-.999*t), 'log_linear, eps 0':(LogLinear(0.), lambda t: 1-t), 'polynomial':(Polynomial(3., .01), lambda t: .01+.99*(1-t**3)), 'cosine':(Cosine(), lambda t: 1-.999*math.cos(h*(1-t))),
         'half_cosine':(HalfCosine(), lambda t: .001+.999*math.cos(h*t)), 'cosine_squared':(CosineSquared(), lambda t: .001+.999*math.cos(h*t)**2), 'geometric':(Geometric(.01, 8.), lambda t: math.exp(-.01*800**t))}
SHARES = dict(mask=(1,0,0), uniform=(0,1,0), hybrid=(8,2,0), mask_delete=(1,0,1), mostly_delete=(1,0,9), all_three=(.5,.2,.3), delete=(0,0,1), uniform_delete=(0,2,3))
KINDS = 'mask','substitute','delete'
# noise: (the noise, its schedules by hand); GIDD: (p_uniform, gamma)
NOISES = {f'{k}, {n}':(Corruption(V, *c, schedule=s), [a]*3) for k,c in SHARES.items() for n,(s,a) in ALPHA.items()} | {
    f'own schedules, {k}':(Corruption(V, *SHARES[k], schedule={o:ALPHA[n][0] for o,n in zip(KINDS, names)}), [ALPHA[n][1] for n in names])
    for k,names in {'hybrid':('cosine','log_linear','cosine'), 'mask_delete':('half_cosine','cosine','log_linear'), 'all_three':('cosine','half_cosine','log_linear'), 'uniform_delete':('cosine','polynomial','geometric')}.items()} | {
    f'gidd {p} {gamma}':(GIDDCorruption(V, p, gamma), (p, gamma)) for p,gamma in ((.1, 1.), (.3, 2.), (.6, .5))}
noises = pytest.mark.parametrize('name', NOISES)

def state_probs(name, t):
    "Kept, masked, substituted and deleted, by hand"
    c,how = NOISES[name]
    if isinstance(how, tuple):
        p,gamma = how
        odds = p/(1-p)*2**gamma*(t*(1-t))**(gamma/2)
        return np.array([1-t, t, odds, 0.])/(1+odds)
    shares = np.array(SHARES[name.replace('own schedules, ', '').split(',')[0]])
    hit = shares/shares.sum()*[1-a(t) for a in how]
    return np.array([1-hit.sum(), *hit])

def marginals(name, t):
    "What each clean token has become, (V, V+2)"
    k,m,u,d = state_probs(name, t)
    return np.hstack([k*np.eye(V)+u/V, np.full((V, 1), m), np.full((V, 1), d)])

def at(*t): return torch.tensor(t, dtype=torch.float64)
def seeded(seed): return torch.Generator().manual_seed(seed)

# Schedules
@pytest.mark.parametrize('name', ALPHA)
def test_schedules_by_hand(name):
    s,a = ALPHA[name]
    t = torch.linspace(.001, .999, 97, dtype=torch.float64)
    each,d = lambda f: torch.tensor([f(o) for o in t.tolist()], dtype=torch.float64),1e-6
    slope = each(lambda o: (a(o+d)-a(o-d))/(2*d))
    for got,want,tol in ((s.alpha(t), each(a), 1e-12), (s.dalpha(t), slope, 1e-7), (s.sigma(t), -each(a).log(), 1e-9), (s.dsigma(t)*each(a), -slope, 1e-7), (s.t(each(a)), t, 1e-7), (s.alpha(t.float()), each(a), 1e-5)):
        assert got.shape==t.shape and (got-want).abs().max()<tol
    assert s.alpha(t.float()).dtype==torch.float32 and (s.alpha(t).diff()<0).all()

@noises
def test_masses_by_hand(name):
    c,ts = NOISES[name][0],(.01, .2, .5, .8, .99)
    got,d = torch.stack(c.state_probs(at(*ts)), 1),torch.stack(c.state_prob_rates(at(*ts)), 1)
    assert np.abs(got.numpy()-[state_probs(name, t) for t in ts]).max()<1e-12 and (got.sum(1)-1).abs().max()<1e-12 and d.sum(1).abs().max()<1e-9
    assert np.abs(d.numpy()-[(state_probs(name, t+1e-6)-state_probs(name, t-1e-6))/2e-6 for t in ts]).max()<1e-6
    assert np.abs(c.marginals(torch.arange(V)[None].expand(5, V), at(*ts)).numpy()-[marginals(name, t) for t in ts]).max()<1e-12

def test_schedules_per_kind():
    "Each kind follows its own; one that is not given is the cosine one; one without a share does not matter"
    c,t = Corruption(V, 1, 1, 2, dict(mask=LogLinear(0.), delete=Polynomial(3., 0.))),at(.3, .6)
    assert torch.allclose(torch.stack(c.state_probs(t)[1:]), torch.stack([t/4, (1-Cosine().alpha(t))/4, t**3/2]), atol=1e-12)
    a,b = (Corruption(V, 1, 1, 0, dict(mask=LogLinear(), delete=o)) for o in (Geometric(), Cosine()))
    assert all(torch.equal(x, y) for x,y in zip(a.state_probs(t), b.state_probs(t)))
    one,three = Corruption(V, 1, 1, 1, LogLinear()),Corruption(V, 1, 1, 1, dict.fromkeys(KINDS, LogLinear()))
    assert all(torch.allclose(x, y) for x,y in zip(one.state_probs(t)+one.event_rates(t), three.state_probs(t)+three.event_rates(t)))
    assert Corruption(V, 2, 1, 1).weights==dict(mask=.5, substitute=.25, delete=.25) and Corruption(V).masks_only and not Corruption(V).deletes and Corruption(V, 1, 0, 1e-9).deletes

# Counts
TIMES,N = (.05, .3, .7, .95),20_000                                                      # tokens of each kind and time
def counts(c, t, seed=0):
    "How often each clean token (row) became each symbol or was deleted, and how often both of two neighbours were hit in the same way, with the number of pairs"
    x0 = torch.arange(V).repeat_interleave(2).repeat(N//2)[None]                               # 0 0 1 1 2 2 ...
    n = c.corrupt(x0, at(t), seeded(seed))
    z = torch.full_like(x0, V+1)[0]
    m = int(n.lengths[0])
    z[n.position[0,:m]] = n.xt[0,:m]
    assert torch.equal(n.x0[0,:m], x0[0,n.position[0,:m]])
    table = torch.zeros(V, V+2).index_put_((x0[0], z), torch.ones(V*N), accumulate=True).numpy()
    pairs = [((z[0::2]==o)&(z[1::2]==o)).sum().item() for o in (V, V+1)]
    return table, pairs, len(z)//2

def z_scores(name, c, t, seed=0):
    "Standard scores of all counts; what is impossible must not happen"
    table,pairs,n = counts(c, t, seed)
    q,(k,m,u,d) = marginals(name, t),state_probs(name, t)
    got,of,want = np.array([*table.ravel(), *pairs]),np.array([N]*q.size+[n, n]),np.array([*q.ravel(), m*m, d*d])
    sure = (want<1e-12)|(want>1-1e-12)
    assert (got[sure]==(of*want)[sure].round()).all(), 'impossible'
    return ((got-of*want)[~sure]/np.sqrt(of*want*(1-want))[~sure])

TESTS = len(NOISES)*len(TIMES)*(V*(V+2)+2)
def judge_counts(name, c=None):
    "A z-test of every frequency, at the level of one in a thousand for all tests of all noises together (Bonferroni)"
    worst = max(np.abs(z_scores(name, c or NOISES[name][0], t, i)).max(initial=0.) for i,t in enumerate(TIMES))
    assert worst<norm.isf(1e-3/2/TESTS), f'{worst:.1f} standard errors off'
@noises
def test_frequencies_are_the_masses(name): judge_counts(name)

FAULTS = {'a little less time':('all_three, log_linear', lambda z: lambda x0, m, V, g: z(x0, type(m)(m.kept+.02*(1-m.kept), *(.98*o for o in m[1:])), V, g)), 'masks and substitutes change places':('hybrid, cosine', lambda z: lambda x0, m, V, g: z(x0, type(m)(m.kept, m.substitute, m.mask, m.delete), V, g)),
          'one token is never drawn':('uniform, log_linear', lambda z: lambda x0, m, V, g: torch.where((o := z(x0, m, V, g))==V-1, x0, o)), 'neighbours share their fate':('mask_delete, cosine', lambda z: lambda x0, m, V, g: torch.where((o := z(x0[:,::2], m, V, g).repeat_interleave(2, 1))<V, x0, o)),
          'shifted by one':('hybrid, log_linear', lambda z: lambda x0, m, V, g: z(x0.roll(1, 1), m, V, g))}
@pytest.mark.parametrize('fault', FAULTS)
def test_the_z_test_refuses(fault, monkeypatch):
    name,spoil = FAULTS[fault]
    monkeypatch.setattr(corruption, '_draw', spoil(corruption._draw))
    with pytest.raises(AssertionError, match='standard errors off|impossible'): judge_counts(name)

# Alignment and gaps
def slow_gaps(position, n):
    "From the positions of what is left: how many are missing before each, and after the last"
    out,last = [],-1
    for p in position: out.append(p-last-1); last = p
    return out+[n-1-last]

def judge_texts(c, x0, lengths, n):
    "Every text, symbol by symbol, with nothing but lists"
    B,L = x0.shape
    assert all(o.shape==(B, L) for o in (n.xt, n.x0, n.text, n.position)) and n.gaps.shape==(B, L+1) and n.text.dtype==torch.bool
    for clean,N,xt,back,text,gaps,position,m in zip(x0.tolist(), lengths.tolist(), *(o.tolist() for o in n), n.lengths.tolist()):
        position_,clean = position[:m],clean[:N]
        assert text==[True]*m+[False]*(L-m) and set(xt[m:])<={c.mask_id} and set(back[m:])|set(position[m:])<={0}, 'behind the end'
        assert all(a<b for a,b in zip(position_, position_[1:])) and all(0<=p<N for p in position_), 'in order'
        assert gaps==slow_gaps(position_, N)+[0]*(L-m), 'gaps'
        assert sum(gaps)+m==N and (c.deletes or m==N), 'nothing is lost'
        rebuilt,missing = [],[o for i,o in enumerate(clean) if i not in set(position_)]
        for g,token in zip(gaps, back[:m]+[None]): rebuilt += [missing.pop(0) for _ in range(g)]+[token]*(token is not None)
        assert rebuilt==clean, 'put together again'
        for z,token in zip(xt, back[:m]):
            if z==c.mask_id: assert c.weights['mask'], 'no masks without a share'
            elif not c.weights['substitute']: assert z==token, 'kept or masked'
            else: assert 0<=z<c.vocab_size, 'a token'

share = st.sampled_from([0., 0., .1, 1., 3.])
@st.composite
def some_noise(draw):
    V,shares = draw(st.integers(1, 7)),draw(st.tuples(share, share, share).filter(any))
    if draw(st.integers(0, 7))==0: return GIDDCorruption(V, draw(st.floats(.05, .9)), draw(st.floats(.2, 2.)))
    s = st.sampled_from(sorted(schedules)).map(get_schedule)
    return Corruption(V, *shares, schedule=draw(st.one_of(s, st.fixed_dictionaries({k:s for k in KINDS}))))

texts = dict(L=st.integers(0, 24), seed=st.integers(0, 2**32), ragged=st.booleans())
def some_texts(c, L, seed, ragged, B):
    g = seeded(seed)
    x0,t,lengths = torch.randint(0, c.vocab_size, (B, L), generator=g),torch.rand(B, generator=g, dtype=torch.float64),torch.randint(0, L+1, (B,), generator=g) if ragged else torch.full((B,), L)
    t[0],t[-1] = 0,1
    return x0, lengths, c.corrupt(x0, t, g, lengths if ragged else None)

@settings(max_examples=100, deadline=None)
@given(c=some_noise(), **texts)
def test_texts_can_be_put_together_again(c, L, seed, ragged): judge_texts(c, *some_texts(c, L, seed, ragged, 100))       # 10,000 texts

@settings(max_examples=200, deadline=None)
@given(surviving=st.lists(st.booleans(), max_size=12), n=st.integers(0, 12))
def test_packing_and_gaps(surviving, n):
    L = len(surviving); n = min(n, L); surviving = [a and i<n for i,a in enumerate(surviving)]
    left,mask = [i for i in range(L) if surviving[i]],torch.tensor([surviving], dtype=torch.bool).view(1, L)
    assert pack(torch.arange(L)[None], mask, 99).tolist()==[left+[99]*(L-len(left))]
    assert count_gaps(mask, torch.arange(L)[None]<n).tolist()==[slow_gaps(left, n)+[0]*(L-len(left))]

@pytest.mark.parametrize('spoil', ['gaps', 'position', 'x0', 'xt', 'text'])
def test_the_judge_of_texts_refuses(spoil):
    c = Corruption(5, 1, 0, 1, schedule=LogLinear())
    x0,lengths,n = some_texts(c, 20, 0, True, 50)
    judge_texts(c, x0, lengths, n)
    i = int(((n.lengths>2)&(n.lengths<lengths)).nonzero()[0])                                # something is left, and something missing
    wrong = getattr(n, spoil).clone()
    wrong[i] = dict(gaps=wrong[i].roll(1), position=wrong[i].roll(1), x0=(wrong[i]+1)%5, xt=(wrong[i]+1)%6, text=wrong[i].roll(1))[spoil]
    with pytest.raises(AssertionError): judge_texts(c, x0, lengths, n._replace(**{spoil:wrong}))

@settings(max_examples=50, deadline=None)
@given(c=some_noise(), **texts)
def test_seeds_fix_everything(c, L, seed, ragged):
    a = some_texts(c, L, seed, ragged, 8)[2]
    torch.rand(1)                                                                            # the global generator plays no part
    assert all(torch.equal(x, y) for x,y in zip(a, some_texts(c, L, seed, ragged, 8)[2]))
    d = corruption_from_dict(c.vocab_size, c.to_dict())
    assert all(torch.allclose(x, y, atol=1e-12) for x,y in zip(d.state_probs(at(.2, .7)), c.state_probs(at(.2, .7)))) and type(d) is type(c) and d.T==c.T

def test_other_seeds_give_other_texts():
    c,x0,t = Corruption(9, 1, 1, 1),torch.zeros(4, 50, dtype=torch.long),at(.2, .4, .6, .8)
    assert not torch.equal(c(x0, t, seeded(0)), c(x0, t, seeded(1)))
    def default(s): torch.manual_seed(s); return c(x0, t)
    assert torch.equal(default(0), default(0)) and not torch.equal(default(0), default(1))
    kept = x0.clone(); assert torch.equal(c(x0, t, seeded(0)), c.corrupt(x0, t, seeded(0)).xt) and torch.equal(x0, kept)

# The process
def slope(f, t, d=1e-4): return (8*(f(t+d)-f(t-d))-f(t+2*d)+f(t-2*d))/(12*d)
@noises
def test_generator_has_the_marginals(name):
    "Kolmogorov's equation with masses by hand; rates are rates; only masks vanish, where there are any; nothing depends on which token it is"
    c = NOISES[name][0]
    for t in (.1, .4, .8):
        Q = c.generator(at(t))[0].numpy()
        assert np.abs(slope(lambda s: marginals(name, s), t)-marginals(name, t)@Q).max()<1e-7
        assert np.abs(Q.sum(1)).max()<1e-9 and (Q-np.diag(np.diag(Q))>=-1e-12).all() and not Q[V+1].any()
        assert not Q[:V,V+1].any() if c.weights['mask'] else not Q[:V,V].any()
        swap = [1, 0, *range(2, V+2)]
        assert np.allclose(Q, Q[swap][:,swap])

@settings(max_examples=150, deadline=None)
@given(c=some_noise(), t=st.floats(1e-4, 1-1e-4))
def test_rates_are_never_negative(c, t): assert all((r>=-1e-9).all() and r.isfinite().all() for r in c.event_rates(at(t)))

@pytest.mark.parametrize('gamma', [2.5, 4.])
def test_gidd_whose_rates_would_be_negative_is_an_error(gamma):
    "Above gamma=2 the share of substitution falls faster than redraws can make it fall"
    with pytest.raises(ValueError, match='gamma'): GIDDCorruption(V, .2, gamma)

@lru_cache(None)
def integrated(name, s, t):
    "Kolmogorov's forward equation by scipy"
    c = NOISES[name][0]
    f = lambda a, P: (P.reshape(V+2, V+2)@c.generator(at(a))[0].numpy()).ravel()
    return solve_ivp(f, (s, t), np.eye(V+2).ravel(), method='DOP853', rtol=1e-9, atol=1e-12).y[:,-1].reshape(V+2, V+2)

INTERVALS = (.1, .5), (.3, .6), (.6, .95)
@noises
def test_transition_is_the_integral_of_the_generator(name):
    c = NOISES[name][0]
    for s,t in INTERVALS:
        got = c.transition(at(s), at(t))[0].numpy()
        assert np.abs(got-integrated(name, s, t)).max()<(3e-4 if c.deletes else 1e-7), (s, t)
        assert np.abs(got.sum(1)-1).max()<1e-12 and np.abs(marginals(name, s)@got-marginals(name, t)).max()<(3e-4 if c.deletes else 1e-9)
    assert np.abs(c.transition(at(.4), at(.4))[0].numpy()-np.eye(V+2)).max()<1e-12

@noises
def test_transitions_are_probabilities(name):
    "Up to the ends of time; and what the events cannot do has probability 0"
    c,last = NOISES[name][0],1-1e-9 if 'eps 0' in name or 'gidd' in name else 1.
    for s,t in ((0., .5), (.2, .3), (.5, last), (.9, last), (0., last)):
        P = c.transition(at(s), at(t))[0]
        assert P.isfinite().all() and P.min()>-1e-9 and (P.sum(1)-1).abs().max()<1e-9, (s, t, P.min())
        if not c.weights['substitute'] and 'gidd' not in name: assert (P[:V,:V]-torch.diag(P.diag()[:V])).abs().max()<1e-9 and P[V,:V].abs().max()<1e-9, (s, t, 'no token becomes another one')
        if not c.weights['mask']: assert P[:V,V].abs().max()<1e-9, (s, t, 'no masks')

@noises
def test_reverse_posterior_is_bayes_rule(name):
    "For one-hot and for soft distributions of the clean token, and every symbol it may have become"
    c,g = NOISES[name][0],np.random.default_rng(0)
    probs = np.concatenate([np.eye(V), g.dirichlet(np.ones(V), 3)])
    for s,t in INTERVALS:
        P,prior = integrated(name, s, t)[:V+1,:V+1],(probs@marginals(name, s))[:,:V+1]
        symbols = [z for z in range(V+1) if state_probs(name, t)[1]>0 or z<V]
        joint = prior[:,:,None]*P                                                              # (clean, at s, at t)
        want = (joint/joint.sum(1, keepdims=True).clip(1e-300)).transpose(0, 2, 1)[:,symbols]
        n,one = len(symbols),torch.ones(len(probs), dtype=torch.float64)
        got = c.reverse_posterior(torch.tensor(probs)[:,None].expand(-1, n, -1), torch.tensor(symbols).expand(len(probs), n), s*one, t*one)
        ok = joint.sum(1)[:,symbols]>1e-9                                                      # of what is possible
        assert np.abs(got.numpy()-want)[ok].max()<(2e-3 if c.deletes else 1e-7), (s, t)
        assert np.abs(got.numpy().sum(-1)-1)[ok].max()<1e-9

@pytest.mark.parametrize('name', [k for k,(c,_) in NOISES.items() if not c.weights['substitute']])
def test_a_token_that_can_only_have_been_kept_was_kept(name):
    "Without substitution what stands at t stood at s, whatever the network thinks; also from t=1"
    c = NOISES[name][0]
    for s,t in (*INTERVALS, (.5, .999), (.5, 1.), (.99, 1.)):
        if t==1 and 'eps 0' in name: continue                                                  # no tokens are left
        z = torch.arange(V)[None]
        got = c.reverse_posterior(torch.tensor([[.2, .3, .5]], dtype=torch.float64).expand(1, V, V), z, at(s), at(t))[0]
        assert (got-torch.eye(V, V+1)).abs().max()<1e-6, (s, t, got)

@pytest.mark.parametrize('name', ['uniform, cosine', 'gidd 0.1 1.0', 'all_three, log_linear', 'mask_delete, cosine'])
def test_reverse_posterior_is_what_a_simulation_counts(name):
    "A million copies of a token, hit event by event in small steps of the rates"
    c,g,n,s,t,steps = NOISES[name][0],np.random.default_rng(1),10**6,.3,.6,400
    pairs = np.diag(g.multinomial(n, marginals(name, s)[1]))                                # how many were what at s, and are what now
    for i in range(steps):
        step = np.eye(V+2)+c.generator(at(s+(t-s)*(i+.5)/steps))[0].numpy()*(t-s)/steps
        pairs = np.stack([sum(g.multinomial(k, p) for k,p in zip(row, step)) for row in pairs])
    for now,m in enumerate(pairs.sum(0)[:V+1]):
        if not m: continue
        q = c.reverse_posterior(torch.eye(V, dtype=torch.float64)[1].expand(1, 1, V), torch.tensor([[now]]), at(s), at(t))[0,0].numpy()
        assert (np.abs(pairs[:V+1,now]/m-q)<=5*np.sqrt(q*(1-q)/m)+1e-3).all(), (now, pairs[:V+1,now]/m, q)

# Bad input
x = torch.zeros(2, 4, dtype=torch.long)
BAD = {'negative share':(lambda: Corruption(V, -1.), 'mask is -1'), 'nan share':(lambda: Corruption(V, substitute=math.nan), 'substitute is nan'), 'infinite share':(lambda: Corruption(V, delete=math.inf), 'delete is inf'), 'no share':(lambda: Corruption(V, 0, 0, 0), 'all 0'),
       'no vocabulary':(lambda: Corruption(0), 'vocab_size is 0'), 'T 0':(lambda: Corruption(V, T=0), 'T is 0'), 'T negative':(lambda: GIDDCorruption(V, T=-3), 'T is -3'), 'unknown kind':(lambda: Corruption(V, schedule=dict(insert=Cosine())), 'insert'),
       'p_uniform 0':(lambda: GIDDCorruption(V, 0.), 'p_uniform'), 'p_uniform 1':(lambda: GIDDCorruption(V, 1.), 'p_uniform'), 'p_uniform nan':(lambda: GIDDCorruption(V, math.nan), 'p_uniform'), 'gamma 0':(lambda: GIDDCorruption(V, .1, 0.), 'gamma'), 'gamma nan':(lambda: GIDDCorruption(V, .1, math.nan), 'gamma'),
       'eps 1':(lambda: LogLinear(1.), 'eps is 1'), 'eps negative':(lambda: Cosine(-.1), 'eps'), 'eps nan':(lambda: HalfCosine(math.nan), 'eps'), 'power 0':(lambda: Polynomial(0.), 'power'), 'power nan':(lambda: Polynomial(math.nan), 'power'), 'sigmas':(lambda: Geometric(1., 1.), 'sigma_min'), 'sigma nan':(lambda: Geometric(math.nan), 'sigma_min'),
       'schedule':(lambda: get_schedule('linear'), 'expected one of'), 'id too large':(lambda: Corruption(V)(x+V, at(.5, .5)), 'expected 0 to 2'), 'the mask is no clean token':(lambda: Corruption(V).corrupt(torch.full((1, 1), V), at(.5)), 'x0 has ids'), 'negative id':(lambda: Corruption(V)(x-1, at(.5, .5)), 'ids from -1'),
       'no batch':(lambda: Corruption(V)(x[0], at(.5)), 'expected \\(B, L\\)'), 't above 1':(lambda: Corruption(V)(x, at(.5, 1.01)), 't has values'), 't below 0':(lambda: Corruption(V)(x, at(-.01, .5)), 't has values'), 't nan':(lambda: Corruption(V)(x, at(math.nan, .5)), 't has values'),
       'too few t':(lambda: Corruption(V)(x, at(.5)), 't has shape'), 't not one per text':(lambda: Corruption(V)(x, torch.full((2, 1), .5)), 't has shape'), 's after t':(lambda: Corruption(V).transition(at(.5), at(.4)), 'expected s at most t'), 'posterior of s after t':(lambda: Corruption(V).reverse_posterior(torch.full((2, 4, V), 1/3), x, at(.5, .6), at(.4, .7)), 'expected s at most t')}
@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_an_error(name):
    f,message = BAD[name]
    with pytest.raises(ValueError, match=message): f()

# Times
@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 300), T=st.one_of(st.none(), st.integers(1, 2000)), seed=st.integers(0, 2**32))
def test_times_are_even_and_on_the_grid(n, T, seed):
    t = low_discrepancy_times(n, T, seeded(seed))
    assert t.shape==(n,) and t.dtype==torch.float64 and torch.equal(t, low_discrepancy_times(n, T, seeded(seed)))
    if T is None:
        assert (t>=0).all() and (t<1).all() and (n==1 or (t.sort()[0].diff()-1/n).abs().max()<1e-12)
        return
    steps = (t*T).round()
    assert torch.equal(t, steps/T) and (steps>=1).all() and (steps<=T).all()
    counts = torch.bincount(steps.long(), minlength=T+1)[1:]
    assert (counts.double()-n/T).abs().max()<1+1e-9                                                # each step as often as the others, give or take one

def test_times_are_uniform():
    "Each time by itself: Kolmogorov and Smirnov, and with T steps each step as often as the others"
    from scipy.stats import chisquare, kstest
    g = seeded(0)
    t = torch.stack([low_discrepancy_times(8, generator=g) for _ in range(3000)]).numpy()
    assert min(kstest(o, 'uniform').pvalue for o in t.T)>1e-4
    k = torch.stack([low_discrepancy_times(8, 5, g) for _ in range(3000)]).numpy()*5
    assert min(chisquare(np.bincount(o.round().astype(int), minlength=6)[1:]).pvalue for o in k.T)>1e-4
