"""Few-shot learning: initializations and embeddings over many tasks."""
