"""Works that the notebooks name, and where to read them. tidy.py makes the first mention on each page a link."""

import re

ARXIV, DOI = "https://arxiv.org/abs/", "https://doi.org/"
WORKS = {  # what a work is called in a sentence: its address
    r"[Tt]he\s+(?:paper|preprint)\b|\bKeller et al\.": f"{ARXIV}2309.08045",
    r"\biRNNs?\b|\b[Ii]dentity[- ]RNN\b": f"{ARXIV}1504.00941",  # Le, Jaitly, Hinton 2015
    r"\bLSTM\b": f"{DOI}10.1162/neco.1997.9.8.1735",  # Hochreiter, Schmidhuber 1997
    r"\bGRU\b": f"{ARXIV}1406.1078",  # Cho et al. 2014
    r"\bS4\b": f"{ARXIV}2111.00396",  # Gu, Goel, Ré 2021
    r"\bLMU\b": "https://papers.nips.cc/paper/2019/hash/952285b9b7e7a1be5aa7849f32ffff05-Abstract.html",  # Voelker et al. 2019
    r"\bcoRNN\b": f"{ARXIV}2010.00951",  # Rusch, Mishra 2020
    r"\bUnICORNN\b": f"{ARXIV}2103.05487",  # Rusch, Mishra 2021
    r"\bLEM\b": f"{ARXIV}2110.04744",  # Rusch et al. 2021
    r"\bLipschitz RNN\b": f"{ARXIV}2006.12070",  # Erichson et al. 2020
    r"\bscoRNN\b": f"{ARXIV}1707.09520",  # Helfrich, Willmott, Ye 2017
    r"\bexpRNN\b": f"{ARXIV}1901.08428",  # Lezcano-Casado, Martínez-Rubio 2019
    r"\bSRNN\b|\bshuffling RNN\b": f"{ARXIV}2007.07324",  # Rotman, Wolf 2020
    r"\bFlashRNN\b": f"{ARXIV}2412.07752",  # Pöppel, Beck, Hochreiter 2024
    r"\bKalchbrenner et al\.": f"{ARXIV}1802.08435",  # the other WaveRNN, 2018
    r"\bAdam\b": f"{ARXIV}1412.6980",  # Kingma, Ba 2014
    r"\b[Ss]uccessive\s+halving\b": f"{ARXIV}1502.07943",  # Jamieson, Talwalkar 2015
    r"\bWelch(?:'s\s+test|\s+test)": f"{DOI}10.1093/biomet/34.1-2.28",  # Welch 1947
    r"\b[Gg]eneralized\s+phase\b": f"{DOI}10.1038/s41586-020-2802-y",  # Davis et al. 2020
    r"\bPhilox\b": f"{DOI}10.1145/2063384.2063405",  # Salmon et al. 2011
    r"\bSplitMix64\b": f"{DOI}10.1145/2660193.2660195",  # Steele, Lea, Flood 2014
}
NO_PROSE = re.compile(  # code, formulas, links, headings, HTML
    r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$\n]+\$|!?\[[^\]]*\]\([^)]*\)|^#.*?$|<[^>\n]+>",
    re.S | re.M,
)


def prose(text: str) -> str:
    "The text with everything else blanked, each letter in its place."
    return NO_PROSE.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)


def link_works(texts: list[str]) -> list[str]:
    "A page's pieces of Markdown, in which the first mention of each known work is a link."
    texts = list(texts)
    for name, address in WORKS.items():
        for i, text in enumerate(texts):
            mention, linked = re.search(name, prose(text)), text.find(f"]({address}")
            paragraph_end = text.find("\n\n", mention.end()) if mention else -1
            if linked >= 0 and (not mention or linked < paragraph_end or paragraph_end < 0):
                break  # in the paragraph of the first mention, or before it
            if mention:
                a, b = mention.span()
                texts[i] = f"{text[:a]}[{text[a:b]}]({address}){text[b:]}"
                break
    return texts
