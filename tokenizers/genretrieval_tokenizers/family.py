"""The methods as one family: settings that a recipe can hold, and fitting and loading by them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from genretrieval.errors import DataError
from genretrieval_tokenizers.keyword_aligned import KeywordAligned, KeywordAlignedConfig
from genretrieval_tokenizers.rk_fsq import RkFsq, RkFsqConfig
from genretrieval_tokenizers.rq_kmeans import RqKMeans, RqKMeansConfig
from genretrieval_tokenizers.rq_opq import RqOpq, RqOpqConfig
from genretrieval_tokenizers.rq_vae import RqVae, RqVaeConfig
from genretrieval_tokenizers.storage import read_format
from genretrieval_tokenizers.tokenizer import Tokenizer

VectorConfig = RqKMeansConfig | RqOpqConfig | RqVaeConfig | RkFsqConfig
"""Settings of one method that reads vectors alone; the field `method` says which."""
TokenizerConfig = VectorConfig | KeywordAlignedConfig
"""Settings of one method, also of the one that reads words."""

Pairs = NDArray[np.int32]

_LOAD: dict[str, Callable[[Path], Tokenizer | KeywordAligned]] = {
    "keyword_aligned": KeywordAligned.load,
    "rq_kmeans": RqKMeans.load,
    "rq_opq": RqOpq.load,
    "rq_vae": RqVae.load,
    "rk_fsq": RkFsq.load,
}


def needs_pairs(config: TokenizerConfig) -> bool:
    """Whether fitting cannot do without pairs of items that users meet together."""
    return isinstance(config, RqVaeConfig) and config.contrast is not None


def fit_tokenizer(x_ND: NDArray[np.floating], config: VectorConfig, pairs_P2: Pairs | None = None) -> Tokenizer:
    """Fit the method that `config` names; `KeywordAligned.fit` is apart, because it reads words.

    Args:
        x_ND: float ``[N, D]``, vectors of items, or of items and queries.
        config: settings.
        pairs_P2: int32 ``[P, 2]``, rows of `x_ND` that belong together (`genretrieval_tokenizers.swing`); read by
            methods for which `needs_pairs` is true.

    Raises:
        DataError: the vectors are not finite, or pairs are needed and there are none.
    """
    match config:
        case RqKMeansConfig():
            return RqKMeans.fit(x_ND, config)
        case RqOpqConfig():
            return RqOpq.fit(x_ND, config)
        case RqVaeConfig():
            return RqVae.fit(x_ND, config, pairs_P2)
        case RkFsqConfig():
            return RkFsq.fit(x_ND, config)


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a fitted tokenizer that makes codes of vectors alone.

    Raises:
        DataError: as `load_codebooks`; or it reads words.
    """
    loaded = load_codebooks(path)
    if isinstance(loaded, KeywordAligned):
        raise DataError(
            f"{path} is of the method 'keyword_aligned', which reads the words of items, and here are vectors alone; "
            "use `genretrieval tokenize fit` and `append`, which read the items"
        )
    return loaded


def load_codebooks(path: Path) -> Tokenizer | KeywordAligned:
    """Read a fitted tokenizer, whichever method it is of.

    Raises:
        DataError: the file is missing, damaged, no tokenizer, or of a method that this version does not know.
    """
    method = read_format(path).split(".")[1]
    if method not in _LOAD:
        raise DataError(
            f"{path} is of the method {method!r}; this version knows {', '.join(_LOAD)}. Update genretrieval, or "
            "tokenize anew, which gives every item a new ID and needs a newly trained generator"
        )
    return _LOAD[method](path)
