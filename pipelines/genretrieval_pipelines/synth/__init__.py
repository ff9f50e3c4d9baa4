"""The demo shop: a believable shop made from a seed, with its latent truth and the ranker that knows it."""

from genretrieval_pipelines.synth.propensity import Oracle
from genretrieval_pipelines.synth.shop import ShopConfig, ShopSummary, gini, synthesize

__all__ = ["Oracle", "ShopConfig", "ShopSummary", "gini", "synthesize"]
