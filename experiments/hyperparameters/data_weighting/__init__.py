"""Which windows of text to train a language model on, when half of them are corrupted.

A transformer reads windows of Shakespeare. Half of the training windows are corrupted, in three equally frequent ways:
their characters are shuffled, they repeat a few of their characters, or they come from another source (SMS messages in
Shakespeare's alphabet). A small clean text, the validation text, is given too. Each method gives every window a score.
A new model is then trained on the half with the highest scores, with the same number of steps for all methods.

* **metagradient, a weight per window**: λ are N weights in (0, 1). `hypergrad.unrolled` differentiates the validation
  loss at the end of training with respect to all of them. λ only weights examples, so that the mixed product of a step
  is a Jacobian-vector product (`inner.weighted`).
* **metagradient, a scorer**: a small network maps the characters of a window to its weight. `predictors.amortize` pulls
  such hypergradients, through shorter trainings, back to the weights of this network. It also scores windows that it
  has not seen.
* **online, a scorer**: the same network learns while one model is trained, without second derivatives
  (`hypergrad.f2sa`).

Controls: uniform weights, the clean windows (oracle), a random half, and the loss of reference models. *Perplexity*
keeps windows of small loss under a model that was trained on the validation text. *Loss difference* (Moore & Lewis)
keeps windows whose loss falls most if the uniform model continues with the validation text. All methods know that half
of the windows is corrupted. Each one is also trained on its windows and the validation text together, since that text
might be worth more than the selection.

The settings (sizes, rates, outer steps, steps of the reference models) were set before the first run, of seed 0. After
it, the scorer got more outer steps through shorter trainings. So the result has seeds from 1 on.

    python experiments/hyperparameters/data_weighting --full      minutes; writes results/data_weighting.md and .png
    python experiments/hyperparameters/data_weighting             one seed
    python experiments/hyperparameters/data_weighting --smoke     seconds; prints only

Needs tiny_shakespeare.txt.gz and sms_spam.tsv.gz in the folder that METAOPT_DATA names.

Moore & Lewis, Intelligent selection of language model training data, ACL 2010; Engstrom et al., Optimizing ML training
with metagradient descent, 2025, https://arxiv.org/abs/2503.13751; Kwon et al., ICML 2023,
https://arxiv.org/abs/2301.10945.
"""
