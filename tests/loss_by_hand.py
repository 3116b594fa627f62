"""The training loss written out from its formulas, for the half-cosine schedule, without the package's code.

A token is kept with probability alpha(t), and otherwise masked, substituted or deleted in proportion to the
weights m, u and d. Times have the shape (B, 1, 1) for symbols, and (B, 1) for gaps."""
import math, torch
import torch.nn.functional as F

EPS,HALF_PI = .001,math.pi/2

def alpha(t):
    "eps + (1-eps) cos(pi t/2)"
    return EPS+(1-EPS)*(HALF_PI*t).cos()

def alpha_rate(t):
    "Derivative of alpha: -(1-eps) pi/2 sin(pi t/2)"
    return -(1-EPS)*HALF_PI*(HALF_PI*t).sin()

def normalised(weights):
    "Weights m, u and d that add up to 1"
    return [w/sum(weights) for w in weights]

def state_probs(t, weights):
    "Probabilities of kept, masked, substituted and deleted: alpha, m (1-alpha), u (1-alpha), d (1-alpha)"
    return [alpha(t), *(w*(1-alpha(t)) for w in normalised(weights))]

def state_prob_rates(t, weights):
    "Derivatives of the state probabilities: alpha', -m alpha', -u alpha', -d alpha'"
    return [alpha_rate(t), *(-w*alpha_rate(t) for w in normalised(weights))]

def symbol_probs(token_probs, t, weights):
    "Probability of each symbol, (B, L, V+1): alpha p + P_u/V for a token, P_m for the mask"
    kept,masked,substituted,_ = state_probs(t, weights)
    B,L,V = token_probs.shape
    return torch.cat([kept*token_probs+substituted/V, masked.expand(B, L, 1)], -1)

def true_and_model_probs(logits, x0, t, weights):
    "Symbol probabilities given the clean tokens, and given the network's prediction"
    clean = F.one_hot(x0, logits.shape[-1]).double()
    return [symbol_probs(p, t, weights) for p in (clean, logits.double().softmax(-1))]

def p_log_ratio(p, q):
    "p log(p/q), and 0 where p is 0"
    log_ratio = (p.clamp(min=1e-300)/q.clamp(min=1e-300)).log()
    return torch.where(p>0, p*log_ratio, 0.)

def rate_into(here, t, weights):
    """Rate of the jumps into the symbol of each position, (B, L, 1): s/V for a token, r-s for the mask.
    The balance alpha' = -r alpha gives r, and P_u' = s (alpha+P_m+P_u) - r P_u gives s."""
    kept,masked,substituted,_ = state_probs(t, weights)
    kept_rate,_,substituted_rate,_ = state_prob_rates(t, weights)
    r = -kept_rate/kept
    s = (substituted_rate+substituted*r)/(kept+masked+substituted)
    return torch.where(here[...,-1:], r-s, s/(here.shape[-1]-1))

def reverse_rates(probs, here, t, weights):
    "Rates of the reverse jumps from symbol z to each other symbol y: rate_into(z) p(y)/p(z)"
    ratios = probs/(probs*here).sum(-1, keepdim=True)
    return rate_into(here, t, weights)*ratios.masked_fill(here, 0.)

def continuous_loss(logits, x0, z, t, weights):
    "Divergence of the modelled from the true reverse rates, (B, L): sum of R_model - R + R log(R/R_model)"
    here = F.one_hot(z, logits.shape[-1]+1).bool()
    probs = true_and_model_probs(logits, x0, t, weights)
    true,model = (reverse_rates(p, here, t, weights) for p in probs)
    return (model-true+p_log_ratio(true, model)).sum(-1)

def discrete_loss(logits, x0, z, t, weights, T):
    """T times the divergence of posteriors over the symbols at s = t - 1/T, by Bayes' rule, (B, L).
    From s to t a symbol is kept with probability alpha(t)/alpha(s); otherwise it is masked or substituted."""
    here = F.one_hot(z, logits.shape[-1]+1).bool()
    (B,L,V),s = logits.shape,t-1/T
    kept = alpha(t)/alpha(s)
    m,u,_ = normalised(weights)
    resampled = torch.cat([(u*(1-kept)/V).expand(B, L, V), (m*(1-kept)).expand(B, L, 1)], -1)
    likelihood = kept*here+(resampled*here).sum(-1, keepdim=True)
    joints = [p*likelihood for p in true_and_model_probs(logits, x0, s, weights)]
    true,model = (joint/joint.sum(-1, keepdim=True) for joint in joints)
    return T*p_log_ratio(true, model).sum(-1)

def token_loss(logits, x0, z, t, weights, T=None):
    "Nats of each symbol, (B, L), in continuous time or in T steps"
    t = t.double()[:,None,None]
    return discrete_loss(logits, x0, z, t, weights, T) if T else continuous_loss(logits, x0, z, t, weights)

def gap_loss(gap_logits, gaps, t, weights):
    "Nats of the gaps, (B, L+1): P_d'/P_d (ghat - g - g log ghat), with ghat = exp(gap logit) P_d/(1-P_d)"
    t = t.double()[:,None]
    *surviving,deleted = state_probs(t, weights)
    ghat = gap_logits.double().exp()*deleted/sum(surviving)
    return state_prob_rates(t, weights)[-1]/deleted*(ghat-gaps-gaps*ghat.log())

@torch.no_grad()
def batch_loss(learn, noisy, t, weights, T=None):
    "Nats per clean token of a `NoisyBatch`, from the learner's network in evaluation mode"
    xt,x0,text,gaps,_ = noisy
    config,training = learn.model.config,learn.model.training
    times = t.float() if config.time_conditioning else None
    out = learn.model.eval()(xt, times, text if config.gap_head else None)
    learn.model.train(training)
    if not config.gap_head: return (token_loss(out, x0, xt, t, weights, T).sum(1)/xt.shape[1]).mean().item()
    logits,gap_logits = out
    nats = (token_loss(logits, x0, xt, t, weights)*text).sum(1)
    nats = nats+(gap_loss(gap_logits, gaps, t, weights)*F.pad(text, (1, 0), value=True)).sum(1)
    return (nats/xt.shape[1]).mean().item()
