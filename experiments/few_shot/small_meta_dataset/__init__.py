"""A small Meta-Dataset: training on some sources, scored on unseen classes and on unseen sources.

Six sources of 14 × 14 images: Omniglot, drawings (QuickDraw), sign digits, spoken digits (spectrograms), Fashion-MNIST,
MNIST. For each of the last five there is one training, on Omniglot's background characters and the four others. It is
scored on the source that it never saw. The first training is also scored on Omniglot's evaluation characters. Ways,
shots and the balance of classes vary as in Meta-Dataset, with smaller numbers. If a source knows who drew or spoke,
support and query are by different people.

All methods see the same episodes. Pixel prototypes (the nearest class mean by cosine) learn nothing. The learned
features are concatenated with the image itself, scaled to length 1, so a network begins with the inputs of pixel
prototypes. The five trainings of a method run as one program, a `vmap` over the learner's two functions.

    python experiments/few_shot/small_meta_dataset             three seeds, 95 minutes on a core; writes the page
    python experiments/few_shot/small_meta_dataset --seeds 1   2.4 minutes for each of 13 methods
    python experiments/few_shot/small_meta_dataset --smoke     seconds; prints only

The sources are read from the folder that METAOPT_DATA names.
"""
