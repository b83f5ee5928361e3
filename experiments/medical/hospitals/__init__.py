"""Diagnosis at a new hospital from 20 labelled patients: probabilities, abstention and subgroups.

Research, not a medical device.

**Heart disease**, leaving one of four hospitals out. From 20 of its patients, predict the disease of the others. Each
of 200 resamples draws another 20 patients. g is linear. It sees 7 numbers that describe the 20 patients, and predicts λ
of a logistic model (`model.py`). λ has the shrinkage to the pooled model of the other hospitals, the prior shift, the
class weights and the temperature. λ also has the weights of columns with missing values, and of the marks of these
missing values. g is learned by hypergradients on resampled tasks from the three training hospitals (`worlds.py`). The
control "one λ" has the same model and training, but its g does not see the features.

Nothing of the new hospital except for the 20 labelled patients enters a choice: neither labels nor features of others.
The penalty of the pooled model and its intercepts (one, or one per hospital) are chosen by leaving out each of the
three training hospitals in turn (log loss). The inputs (codes, marks of gaps) are those of
`few_shot/personalization.py`, which were chosen after a look at linear models on all four hospitals.

**Made-up sites.** scikit-learn's breast cancer (quarters by mean texture) and diabetes (progression above 140, quarters
by age) have no hospitals. The features of g, its decay and the resampling were chosen on them, so their results are
not a test. Their pooled models have one intercept, and g has one seed.

The outer loss is the log loss on 40 other patients of the resampled site. Baselines: the class share, pooled logistic
regression, and the same with the site's own intercept or with Platt scaling. Another baseline is the site's own
logistic regression, with Platt scaling of its out-of-fold scores. Platt scaling has Platt's smoothed targets. Its
shrunken form has a ridge penalty instead, which is chosen on the training sites (`baselines.py`).

    python experiments/medical/hospitals --full      minutes; writes experiments/results/medical.md and its picture
    python experiments/medical/hospitals             one seed of g, heart disease only
    python experiments/medical/hospitals --smoke     seconds; prints only

Heart disease: Janosi, Steinbrunn, Pfisterer & Detrano, UCI, read from the folder that METAOPT_DATA names.
"""
