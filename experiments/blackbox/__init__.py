"""Black boxes: searchers that learn from records of earlier tasks."""
