"""What every quality table shows beside our figures: strong, simple rankings of the same cases.

Each ranks through one interface, `ranking.Baseline`: `counts` (popularity, last-item Markov, popularity per
query), `sasrec`, `search` (BM25, dense retrieval). `blend` joins two rankings.
"""
