"""Writes runs/texts.txt, the plain texts that the embedding rows learn from: 25,000 sentences, captions, questions and paragraphs.

They are STS-B's training sentences, and draws of Multi30k's English captions and of the questions and paragraphs of SQuAD's training
file, mixed. No label is read, and no dev text of any of them is among them.
"""

from __future__ import annotations

import gzip
import json
import random

from work import ROOT

SHARED = ROOT.parent / "shared" / "data"
CAPTIONS, QUESTIONS, PARAGRAPHS = 6000, 6000, 2500


def main() -> None:
    """Draws and writes."""
    draw = random.Random(0)
    texts: list[str] = []
    for line in (SHARED / "glue" / "STS-B" / "train.tsv").read_text(encoding="utf-8").split("\n")[1:]:
        parts = line.split("\t")
        texts += parts[7:9] if len(parts) > 8 else []
    with gzip.open(SHARED / "multi30k" / "train.en.gz", "rt", encoding="utf-8") as file:
        texts += draw.sample(file.read().splitlines(), CAPTIONS)
    articles = json.loads((SHARED / "squad" / "train-v1.1.json").read_text(encoding="utf-8"))["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    texts += draw.sample([asked["question"].strip() for paragraph in paragraphs for asked in paragraph["qas"]], QUESTIONS)
    texts += draw.sample([paragraph["context"].replace("\n", " ") for paragraph in paragraphs], PARAGRAPHS)
    kept = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    draw.shuffle(kept)
    place = ROOT / "runs" / "texts.txt"
    place.parent.mkdir(exist_ok=True)
    place.write_text("\n".join(kept) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
