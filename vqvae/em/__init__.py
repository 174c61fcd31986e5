"""Exact expectation-maximisation: images with one finite latent z in {0..K-1} each, and every sum done in full.

    P(y) = sum_z P_pri(z) P_dec(y | z) = sum_k pi_k prod_d P_kd(y_d)

with y_d the D = C H W pixels of an image, independent given z. Here nothing of the bound is left to a network:

    -ln P(y)  <=  E_q[ -ln pi_z  -  sum_d ln P_zd(y_d)  +  ln q(z | y) ]   for any encoder q
    negative  =        rate      +  distortion          -  entropy

EM is descent of that one bound in turns. The E step sets the encoder to the posterior and closes the bound,

    q(k | y)  =  pi_k P_k(y) / P(y),        negative ELBO  =  -ln P(y);

the M step sets prior and decoder to the best ones for this encoder, with N_k = sum_n q(k | y_n):

    pi_k       =  N_k / N
    P_kd(v)    =  (sum_n q(k | y_n) [y_nd = v] + alpha) / (N_k + V alpha)                          V levels
    mu_kd      =  sum_n q(k | y_n) y_nd / N_k,      s_kd^2 = sum_n q(k | y_n) (y_nd - mu_kd)^2 / N_k

So what never rises is the negative ELBO or, where alpha > 0, its sum with -ln of the parameters' prior: alpha is a
Dirichlet prior, density prod theta^alpha up to a constant, of every pixel of every component. `Fit.objective` is
that sum over the number of images. Hard EM takes for q its own argmax: the entropy is 0 and the bound stays open, but
it falls too. With Gaussians of one fixed variance and even weights hard EM is k-means (Lloyd 1982).

Sources: Dempster, Laird, Rubin 1977; as alternating descent of one bound, Neal and Hinton 1998; seeds by k-means++,
Arthur and Vassilvitskii 2007.

Departures:

- A component whose share of the data is 0 keeps its parameters (a categorical one with alpha > 0 gets the
  prior's mode, even odds), which the bound cannot feel. It is not put elsewhere: that could raise the bound.
- Gaussian variances have a floor, without which the bound has none. The M step stays exact under it, for the
  best variance in an interval is the best one clamped.
- Fits start from an M step on softened assignments to the nearest seeds: under hard ones with alpha = 0 most
  images would be impossible to most components for ever.
- Tables, and sums over levels, are in float32 by default, sums over pixels and components in float64.
  `mixture.double()` keeps float64 throughout: there the identities above hold to 1e-10.

How it is fast and small. A categorical model is a table of ln P_kd(v), "(d v) k": 800 MB in float32 for K = 1000,
28x28 pixels and 256 levels. Given an image it says which rows to add up: the E step is `embedding_bag`, a few pixels
at a time. Sorted by level, pixels say which images to add up for each row: the M step is `embedding_bag` again,
over the posterior. Images pass in chunks, so beside the images a fit holds two such tables and no N x K matrix.
"""

from vqvae.em.mixture import Mixture
from vqvae.em.pixels import BernoulliPixels, CategoricalPixels, GaussianPixels

__all__ = ["BernoulliPixels", "CategoricalPixels", "GaussianPixels", "Mixture"]
