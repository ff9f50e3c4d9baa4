"""Keywords mined from a catalogue, and embeddings that they sharpen."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TypeVar

import numpy as np
import polars as pl
import scipy.sparse as sp

from genretrieval.errors import DataError
from genretrieval.item_texts import is_words
from genretrieval.keywords import AttributeType, Keyword, KeywordDictionary, normalise
from genretrieval_pipelines.embed.linear import Matrix, unit_rows

KEYWORD_SHARE = 0.5
"""Share of the keywords in an enhanced vector, before it is scaled to length 1 (OneSearch)."""

_T = AttributeType
_V = TypeVar("_V")

# A column is of the type of the first of these words in its name: main_color is a Color.
_COLUMNS = {
    "manufacturer": _T.BRAND,
    "category": _T.ENTITY,
    "material": _T.MATERIAL,
    "fabric": _T.MATERIAL,
    "style": _T.STYLE,
    "function": _T.FUNCTION,
    "feature": _T.FUNCTION,
    "features": _T.FUNCTION,
    "location": _T.LOCATION,
    "origin": _T.LOCATION,
    "country": _T.LOCATION,
    "audience": _T.AUDIENCE,
    "gender": _T.AUDIENCE,
    "color": _T.COLOR,
    "colour": _T.COLOR,
    "shade": _T.COLOR,
    "scene": _T.SCENE,
    "occasion": _T.SCENE,
    "size": _T.SPECIFICATIONS,
    "capacity": _T.SPECIFICATIONS,
    "volume": _T.SPECIFICATIONS,
    "model": _T.MODEL,
    "anchor": _T.ANCHOR,
    "series": _T.SERIES,
    "collection": _T.SERIES,
    "marketing": _T.MARKETING,
    "promotion": _T.MARKETING,
    "season": _T.SEASON,
    "pattern": _T.PATTERN,
}


def _words(words: str) -> list[str]:
    """A list of terms; those of several words are written with "_"."""
    return [word.replace("_", " ") for word in words.split()]


# Words that say the same in every shop.
_KNOWN = {
    _T.COLOR: _words(
        """black white grey gray red pink purple violet blue navy green olive yellow orange brown beige ivory gold
        golden silver bronze turquoise teal burgundy coral nude multicolor transparent
        黑色 白色 灰色 红色 粉色 粉红色 紫色 蓝色 绿色 黄色 橙色 棕色 米色 金色 银色 透明"""
    ),
    _T.MATERIAL: _words(
        """cotton wool silk linen leather suede denim polyester nylon velvet cashmere fleece lace wood wooden bamboo
        metal steel stainless_steel aluminum aluminium copper brass glass ceramic porcelain plastic rubber silicone
        paper cardboard marble 纯棉 棉 羊毛 真丝 亚麻 皮革 真皮 牛仔 木质 金属 不锈钢 玻璃 陶瓷 塑料 硅胶"""
    ),
    _T.AUDIENCE: _words(
        """women women's woman ladies girls girl men men's man boys boy unisex kids children child baby babies toddler
        toddlers teens adults seniors 女 女士 男 男士 儿童 婴儿 宝宝 女童 男童 老人 学生"""
    ),
    _T.SEASON: _words("spring summer autumn winter all_season 春季 夏季 秋季 冬季 春秋 四季"),
    _T.PATTERN: _words(
        """striped stripes floral plaid checked polka_dot leopard camouflage paisley geometric
        条纹 碎花 格子 波点 豹纹 迷彩 印花 纯色"""
    ),
    _T.STYLE: _words(
        "vintage retro modern classic casual elegant bohemian minimalist 复古 简约 休闲 优雅 韩版 欧美 百搭"
    ),
    _T.SCENE: _words(
        """wedding party outdoor indoor office travel camping beach christmas halloween 婚礼 派对 户外 办公 旅行"""
    ),
    _T.FUNCTION: _words(
        """waterproof anti-aging moisturizing hydrating whitening portable wireless rechargeable foldable adjustable
        washable breathable 防水 保湿 美白 便携 无线 可折叠 透气 防晒"""
    ),
    _T.MARKETING: _words("new sale bestseller best_seller limited_edition free_shipping 新款 热卖 包邮 促销 限量 正品"),
}

_UNITS = _words(
    """oz fl fl_oz fl._oz ounce ounces ml cl l liter liters litre litres g gram grams kg mg lb lbs pound pounds mm cm
    meter meters inch inches ft feet yd w watt watts v volt volts mah gb tb mb hz ct count pk pack packs pc pcs piece
    pieces pair pairs sheets spf %"""
)
_CJK_UNITS = _words("毫升 升 毫克 克 千克 公斤 斤 毫米 厘米 米 寸 英寸 件 片 只 个 支 瓶 包 盒 双 套 条")

_STOPWORDS = _words(
    """a an and are as at be by for from in is it its no not of on or our that the this to up w with without you your
    de la le les du des el los las y con para por en et pour avec der die das und mit für von zu il e di per o da do
    的 和 与 及 或"""
)
_BOUND_NOTHING = {*_UNITS, *_STOPWORDS}
_PLACEHOLDERS = {
    "unknown",
    "none",
    "n/a",
    "null",
    "other",
    "others",
    "generic",
    "unbranded",
    "no brand",
    "various",
    "其他",
    "无品牌",
}

_HAN = re.compile("[\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")
_LONGEST_HAN = 6
_LONGEST = 40  # characters; what is longer is a sentence
_SHORTEST = 2

_NUMBER = r"\d+(?:[.,/]\d+)*"


def _any_of(words: Iterable[str]) -> str:
    longest_first = sorted(words, key=len, reverse=True)
    return "|".join(re.escape(word).replace("\\ ", " ?") for word in longest_first)


_SPECIFICATION = re.compile(
    rf"(?<![a-z0-9.,])(?:spf ?\d+|pack of \d+|{_NUMBER}(?: ?x ?{_NUMBER})*"
    rf"(?:[ -]?(?:{_any_of(_UNITS)})(?![a-z0-9])| ?(?:{_any_of(_CJK_UNITS)})))"
)
_MODEL = re.compile(r"(?!\d+(?:st|nd|rd|th)$)(?:[a-z]{1,4}-\d|[a-z0-9-]*(?:[a-z]\d|\d[a-z]))[a-z0-9-]*")
_TOKEN = re.compile(r"[^\s,;:!?()\[\]{}<>|\"*/\\=~，。、；：！？（）【】《》“”…·•]+")
_TRIMMED = "-–—'’.&+_#@$^`"
_PARTS = re.compile(r" & | and |/|,")


def mine_keywords(
    items: pl.DataFrame, *, min_items: int = 5, max_keywords: int = 20_000, max_titles: int = 100_000
) -> KeywordDictionary:
    """Keywords of a catalogue, by rules; of a term that several rules find, the first gives the type.

    1. Words known in every shop (colours, materials, audiences, ...; English and Chinese) that a title says.
    2. Column ``brand`` gives Brand, a name in two scripts ("香奈儿/Chanel") two; the last of ``categories`` gives
       Entity, split at "&", "and", "/" and ","; other columns of words give the type that their name says (``color``,
       ``main_material``, ``size``, ...).
    3. Numbers with a unit in titles give Specifications.
    4. Codes of letters and digits in titles give Model.
    5. Of titles, one to three neighbouring words without punctuation between them give Modifier, if neither end is a
       stopword, a unit or a number, and if no term of the rules above stands among several words: a match of
       "wella hair color" would hide the brand. So do two to six neighbouring Han characters, which no space divides
       into words, if they end where words end: on neither side one and the same character in most of the titles.

    Rules 3 to 5 ask for at least `min_items` titles. Left out are terms of less than 2 or more than 40
    characters, web addresses and placeholders such as "unknown". In other scripts written without spaces, rules 4 and
    5 see only what stands between spaces or punctuation; the others work in full.

    Args:
        items: the item table.
        min_items: titles that a term must be in, where the title is all that speaks for it.
        max_keywords: keywords at most; those of most items stay, at equal numbers the first in code point order.
        max_titles: of more titles, this many evenly spaced ones are read, which bounds time and memory.

    Returns:
        Normalised keywords, most frequent first; `Keyword.weight` is the share of items that have it.

    Raises:
        DataError: a setting is below 1.
    """
    if min(min_items, max_keywords, max_titles) < 1:
        raise DataError(
            f"min_items {min_items}, max_keywords {max_keywords}, max_titles {max_titles}: each must be at least 1"
        )
    titles = _titles(items, max_titles)
    phrases = _frequent(_count_each(titles, _phrases), min_items)
    mined: dict[str, Keyword] = {}
    for type_, counts in _known_words(titles):
        _add(mined, type_, counts, len(titles))
    for type_, counts in _from_columns(items):
        _add(mined, type_, counts, len(items))
    _add(mined, _T.SPECIFICATIONS, _frequent(_count_each(titles, _SPECIFICATION.findall), min_items), len(titles))
    _add(mined, _T.MODEL, {phrase: n for phrase, n in phrases.items() if _MODEL.fullmatch(phrase)}, len(titles))
    typed = KeywordDictionary(tuple(mined.values()))  # what a longer match must not hide
    others = {phrase: n for phrase, n in phrases.items() if " " not in phrase or not typed.match(phrase)}
    others |= {phrase: n for phrase, n in _han_phrases(titles, min_items).items() if not typed.match(phrase)}
    _add(mined, _T.MODIFIER, others, len(titles))
    kept = sorted(mined.values(), key=lambda keyword: (-keyword.weight, keyword.text))[:max_keywords]
    return KeywordDictionary(tuple(kept), "mined keywords")


def mined_columns(items: pl.DataFrame) -> list[str]:
    """The columns that `mine_keywords` reads."""
    named = {"title", "brand", "categories"}
    return [name for name in items.columns if name in named or _type_of(name, items.schema[name])]


def enhance(
    x_ND: Matrix, texts: Sequence[str], dictionary: KeywordDictionary, embed: Callable[[Sequence[str]], Matrix]
) -> Matrix:
    """Move the vector of each text towards its keywords: ``L2norm(0.5 e + 0.5 mean_k e(keyword_k))``.

    The keyword enhancement of OneSearch (arXiv 2509.03236). A keyword that a text says twice counts once.

    Args:
        x_ND: float32 ``[N, D]``, the vectors of `texts`; unit rows, or zeros.
        texts: what the keywords are looked for in.
        dictionary: the keywords.
        embed: what `x_ND` was made with; called once, with the keywords that occur.

    Returns:
        float32 ``[N, D]``, unit rows; the row of a text without keywords is that of `x_ND`.
    """
    named = [list(dict.fromkeys(match.keyword.text for match in dictionary.match(text))) for text in texts]
    row_of = {text: row for row, text in enumerate(sorted(set(chain.from_iterable(named))))}
    if not row_of:
        return x_ND
    n_keywords_N = np.array([len(keywords) for keywords in named])
    shares = np.repeat(1 / np.maximum(n_keywords_N, 1), n_keywords_N).astype(np.float32)
    columns = np.array([row_of[text] for text in chain.from_iterable(named)])
    ends = np.concatenate([[0], np.cumsum(n_keywords_N)])
    mean_ND = sp.csr_matrix((shares, columns, ends), shape=(len(named), len(row_of))) @ embed(list(row_of))
    mixed_ND = unit_rows((1 - KEYWORD_SHARE) * x_ND + KEYWORD_SHARE * mean_ND)
    return np.where(n_keywords_N[:, None] > 0, mixed_ND, x_ND)


def _add(mined: dict[str, Keyword], type_: AttributeType, counts: Mapping[str, int], n_items: int) -> None:
    for text, count in counts.items():
        mined.setdefault(text, Keyword(text, type_, count / n_items))


def _from_columns(items: pl.DataFrame) -> Iterator[tuple[AttributeType, Counter[str]]]:
    """Types, and in how many items each term of theirs is."""
    if "brand" in items.columns:
        yield _T.BRAND, _count(items["brand"].cast(pl.String).to_list(), lambda brand: brand.split("/"))
    if "categories" in items.columns:
        leaves = items["categories"].cast(pl.List(pl.String)).list.last().to_list()
        yield _T.ENTITY, _count(leaves, _PARTS.split)
    for name in items.columns:
        dtype = items.schema[name]
        type_ = _type_of(name, dtype)
        if type_ is None:
            continue
        if isinstance(dtype, pl.List):
            yield type_, _count(items[name].cast(pl.List(pl.String)).to_list(), lambda terms: terms)
        else:
            yield type_, _count(items[name].cast(pl.String).to_list(), lambda term: [term])


def _type_of(name: str, dtype: pl.DataType) -> AttributeType | None:
    """What the terms of a column of the shop's own are; None where it holds no words or its name does not say."""
    if not is_words(name, dtype):
        return None
    return next((_COLUMNS[word] for word in name.lower().split("_") if word in _COLUMNS), None)


def _count(values: Iterable[_V | None], terms_of: Callable[[_V], Iterable[str | None]]) -> Counter[str]:
    """In how many values each term stands, normalised."""
    counts: Counter[str] = Counter()
    for value in values:
        if value is not None:
            counts.update({normalise(term) for term in terms_of(value) if term})
    return Counter({term: n for term, n in counts.items() if _is_keyword(term)})


def _is_keyword(term: str) -> bool:
    return (
        _SHORTEST <= len(term) <= _LONGEST
        and any(map(str.isalnum, term))
        and term not in _PLACEHOLDERS
        and not term.startswith(("http://", "https://"))
    )


def _titles(items: pl.DataFrame, at_most: int) -> list[str]:
    if "title" not in items.columns or not len(items):
        return []
    rows = np.unique(np.linspace(0, len(items) - 1, min(len(items), at_most)).astype(np.int64))
    return [normalise(title) for title in items["title"].cast(pl.String).fill_null("")[rows].to_list()]


def _known_words(titles: Sequence[str]) -> Iterator[tuple[AttributeType, Counter[str]]]:
    type_of = {normalise(word): type_ for type_, words in _KNOWN.items() for word in words}
    known = KeywordDictionary(tuple(Keyword(word, type_) for word, type_ in type_of.items()))
    counts = _count_each(titles, lambda title: (match.keyword for match in known.match(title)))
    for type_ in _KNOWN:
        yield type_, Counter({keyword.text: n for keyword, n in counts.items() if keyword.type is type_})


def _count_each(titles: Iterable[str], found_in: Callable[[str], Iterable[_V]]) -> Counter[_V]:
    """In how many titles each thing is found."""
    return Counter(chain.from_iterable(set(found_in(title)) for title in titles))


def _frequent(counts: Counter[str], min_items: int) -> Counter[str]:
    return Counter({text: n for text, n in counts.items() if n >= min_items and _is_keyword(text)})


def _phrases(title: str) -> Iterator[str]:
    """One to three neighbouring words of a normalised title, with nothing but a space between them."""
    words: list[tuple[int, int]] = []
    for token in _TOKEN.finditer(title):
        word = token[0].strip(_TRIMMED)
        start = token.start() + token[0].find(word)
        if not word or (words and title[words[-1][1] : start] != " "):
            words.clear()
        if word:
            words = [*words[-2:], (start, start + len(word))]
            if _may_end_a_phrase(word):
                yield from (title[i : start + len(word)] for i, j in words if _may_end_a_phrase(title[i:j]))


def _han_phrases(titles: Sequence[str], min_items: int) -> dict[str, int]:
    """Frequent runs of two to six Han characters that end where words end, and in how many titles each is."""
    runs = [_HAN.findall(title) for title in titles]
    frequent: Counter[str] = Counter()
    grown = {char for title in runs for run in title for char in run}
    for length in range(2, _LONGEST_HAN + 1):
        # A run that is frequent has frequent parts, so what is counted stays small.
        counts = Counter(
            chain.from_iterable(
                {part for run in title for part in _parts(run, length) if {part[1:], part[:-1]} <= grown}
                for title in runs
            )
        )
        counts = Counter({part: n for part, n in counts.items() if n >= min_items})
        frequent |= counts
        grown = set(counts)
    beside: dict[str, tuple[Counter[str], Counter[str]]] = {part: (Counter(), Counter()) for part in frequent}
    for run in chain.from_iterable(runs):
        for length in range(2, _LONGEST_HAN + 1):
            for start, part in enumerate(_parts(run, length)):
                if part in beside:
                    beside[part][0][run[max(0, start - 1) : start]] += 1
                    beside[part][1][run[start + length : start + length + 1]] += 1
    return {part: n for part, n in frequent.items() if all(map(_ends, beside[part]))}


def _parts(run: str, length: int) -> list[str]:
    return [run[start : start + length] for start in range(len(run) - length + 1)]


def _ends(neighbours: Counter[str]) -> bool:
    """Whether a run of characters mostly ends here; the neighbour ``""`` is an end of its own."""
    inside = max((n for char, n in neighbours.items() if char), default=0)
    return 2 * inside <= neighbours.total()


def _may_end_a_phrase(word: str) -> bool:
    return any(map(str.isalpha, word)) and not (word in _BOUND_NOTHING or _SPECIFICATION.match(word))
