"""Recommendation for new users: from the first 5 or 10 ratings of a user, predict all later ones.

The data are 100,000 ratings of films from 0 to 10 (MovieTweetings). The 1,154 users with at least 20 ratings are tested
in five folds; the training uses the ratings of all other users. The score is the root mean squared error of each user,
and then the mean over users.

Three kinds of methods are compared. Ordinary methods are offsets, item kNN, matrix factorization, and its Bayesian
form. MeLU and CAVIA are networks that adapt by gradient steps. The third kind is a ridge regression per user on an
item's offset, factors, year and genres, in closed form. Its regularization, decay with time and center are λ. In one
variant, λ is the same for all users. In the other, a network g predicts λ from the first ratings. Both are trained by
hypergradients.

All hyperparameters are chosen in each fold on its training users. These are divided into four parts. For each part,
models are fitted to the other parts, so its users are new to them. g and the networks learn on these users. So the
statistics of items that they see for a user include no rating by this user. The design (inputs, sizes, rates) was
chosen on the training users of fold 0, by `--choose`. The test users of fold 0 had no influence on it.

    python experiments/recommend --full              minutes; writes experiments/results/recommend.md
    python experiments/recommend                     one seed, two of the five folds
    python experiments/recommend --smoke             seconds; synthetic ratings if there is no data folder; prints only
    python experiments/recommend --choose networks   compares designs on training users of fold 0; prints only
    python experiments/recommend --movielens PATH    the same for a copy of MovieLens, also with --full

If the command runs twice at the same time, the two processes share the folds.
PATH is the folder of MovieLens or its file of ratings (ratings.csv, ratings.dat or u.data).

MovieTweetings is read from the folder that METAOPT_DATA names. Predictions of all items for all users of a fold are in
memory, so a copy of MovieLens should not have more than 10,000 films and 10,000 users with 20 ratings.
"""
