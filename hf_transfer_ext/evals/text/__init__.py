"""Compare texts: ROUGE, stemming, sentence encoders and entailment models."""
