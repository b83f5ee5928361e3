"""How to fine-tune a pre-trained network on few images, learned over other tasks.

A small convolutional network is pre-trained on CIFAR-10 (gray, 14 × 14 pixels). It is then fine-tuned on hand signs and
on drawings, with 5, 20 and 100 images per class. λ has a rate for each of four layers, and a strength of L2-SP for each
of them: the penalty strength/2 ‖θ − start‖², which pulls a layer to where it started (the head to zero).

**Learned λ.** g maps the number of images per class to λ. It is learned by hypergradients through whole fine-tunings
(`hypergrad.unrolled`, `predictors.amortize`, `hypergrad.over_tasks`) on tasks of four other sources: MNIST,
Fashion-MNIST, Omniglot (5 images per class only) and spectrograms of spoken digits. Hand signs and drawings are in none
of these tasks.

**Baselines**, on the same network, optimizer, steps and batches: *full fine-tuning* has one rate for all layers, and no
penalty. A *linear probe* trains the head only. *Hand-set rates* have a rate of the head, a factor for the other layers
and one strength. *From scratch* starts from random parameters. Their values are the best of a grid on training tasks,
for each number of images. The grid of hand-set rates takes as many operations as the hypergradients. The others get the
same training tasks.

    python experiments/hyperparameters/fine_tuning --full      minutes; writes results/fine_tuning.md and .png
    python experiments/hyperparameters/fine_tuning             two seeds
    python experiments/hyperparameters/fine_tuning --smoke     seconds; prints only

No choice depends on the test images, nor on any image of the two judged sources: the ranges, the grids and the steps
were set before these sources were read.

Needs cifar10_sub32.npz, mnist.npz, fashion_mnist_sub.npz, omniglot.npz, spoken_digits.npz, signdigits.npz and
quickdraw8.npz in the folder that METAOPT_DATA names.

L2-SP: Li, Grandvalet & Davoine, Explicit inductive bias for transfer learning, ICML 2018,
https://arxiv.org/abs/1802.01483.
"""
