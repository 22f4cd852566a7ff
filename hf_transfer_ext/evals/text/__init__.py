"""Text against text: ROUGE, stemming, sentence encoders and entailment models."""
