"""Medical tables: a few labelled patients of a new hospital, or a few recordings of a new patient."""
