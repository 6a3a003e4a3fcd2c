"""Where the time of a BERT-base goes on this machine: the measurement of section 2 of Ganesh et al. (2021), with random weights.

    python benchmarks/parts.py --out ./profile

The paper: one sentence of 256 tokens; on a Xeon E5-1620 the linear layers dominate and follow their operations, attention's core costs
little, the embedding next to nothing. The weights do not matter for the time, so they are random and nothing is downloaded. ONNX
Runtime's fused fp32 file and our dynamic int8 file stand beside PyTorch.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import transformers
from rich.console import Console

from slimformer.exporters.base import Variant
from slimformer.exporters.onnx import Onnx
from slimformer.families.base import Subject, subject_of
from slimformer.measuring.machine import cores
from slimformer.measuring.profile import Texts, profile_all, random_texts
from slimformer.reporting.profiles import draw_profiles, write_profiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128, 256, 512], help="tokens of a text")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32], help="texts of a run")
    parser.add_argument("--layers", type=int, default=12, help="layers of the model, 12 as in BERT-base")
    parser.add_argument("--rounds", type=int, default=5, help="runs that are watched, and as many that are not")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--torch-alone", action="store_true", help="export nothing")
    parser.add_argument("--out", type=Path, help="folder for profile.html")
    given = parser.parse_args()
    torch.manual_seed(0)
    config = transformers.BertConfig(num_hidden_layers=given.layers)
    subject = subject_of(transformers.BertForSequenceClassification(config).eval())
    texts = [Texts(batch, length) for length in given.lengths for batch in given.batches]
    with tempfile.TemporaryDirectory() as scratch:
        files = {} if given.torch_alone else exported(subject, Path(scratch))
        found = profile_all(subject, "BERT-base", dict(files), texts, threads=given.threads, rounds=given.rounds)
    for table in draw_profiles(found):
        Console().print(table, "")
    if given.out is not None:
        print(f"page: {write_profiles(found, given.out)}")


def exported(subject: Subject, folder: Path) -> dict[str, Path]:
    """The model as fp32 and as int8."""
    batches = [
        {name: column.numpy() for name, column in random_texts(subject, Texts(*shape)).items()}
        for shape in ((1, 16), (4, 24), (2, 9))
    ]
    files = {"fp32": Variant.FUSED, "int8": Variant.INT8_DYNAMIC}
    for name, variant in files.items():
        Onnx(agreement=0.0).export(subject.model, batches, folder / f"{name}.onnx", variant, ("logits",))
    return {name: folder / f"{name}.onnx" for name in files}


if __name__ == "__main__":
    main()
