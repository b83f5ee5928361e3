"""Omniglot: new characters from one or five drawings, by the MAML family and its usual baselines.

Methods are trained on background characters, rotated by 0, 90, 180 and 270 degrees. 64 other characters, not rotated,
select the λ of each training. The scores are on episodes of evaluation characters, which are the same for all methods:
5 or 20 ways, 1 or 5 shots, and Lake's 20 one-shot runs. The official split has other alphabets in the evaluation set.
The usual random split has 1,200 characters for training. Pixel prototypes (the nearest class mean by cosine) are the
baseline that every method must beat.

    python experiments/few_shot/omniglot                # conv4-64 on 28 × 28: hours; a GPU is of use
    python experiments/few_shot/omniglot --small        # three blocks of 16 filters on 14 × 14: for one processor core;
                                                  # methods with a head for each number of ways only have five
    python experiments/few_shot/omniglot --split random --methods MAML "prototypical networks"
    python experiments/few_shot/omniglot --smoke        # seconds; prints only

The number of inner steps at test is chosen by validation, for each number of shots. If a method learns a head, it has a
training for each number of shots (with --small, only for one shot). The lower picture has the accuracy after 0 to 10
inner steps at test, whatever the number of inner steps in training.

Main observations in the committed results: at full size, each training had minutes of a core. Prototypical networks
reach most of the accuracy in the literature. MAML with the batch's statistics reaches less, especially with 20 ways.
With --small, each training had a minute. There, all methods except CAVIA are ahead of pixel prototypes with 5 ways and
one shot. The largest gains are those of class means in feature space. Fine-tuning from them is next, and then MAML,
with ten inner steps at test after three in training.

A training is saved in the folder that `--work` names, with the split and its scores, separately for each version of the
code. If it was stopped, call the script again with the same arguments, and it continues from there. Omniglot is read
from the folder that METAOPT_DATA names. Results go to experiments/results/omniglot.md and .png, or omniglot_small.md
and .png.
"""
