"""One pass over the data for all metrics: scores, generations, their cache, the result."""
