"""Architecture searches, training of their results, trained networks, and searchers learned from records."""
