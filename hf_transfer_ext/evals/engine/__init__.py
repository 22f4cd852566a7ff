"""The evaluation engine: one pass over the data for all metrics, with scores, generations, cache and result."""
