"""Asks a served model as many callers at once would, and checks every answer against that of the text alone.

    python benchmarks/serving.py ./small --texts dev.tsv                         # 100,000 requests on 64 connections
    python benchmarks/serving.py ./my-bert ./small --texts dev.tsv --requests 20000

Of each folder a server is started; a plain model of transformers, which holds no ONNX file, is exported first, with fused operators.
The callers are in this process, on the same machine, so the figures are those of both together. Told are requests per second, the
seconds that 50, 95 and 99 of 100 requests took at most, and answers that are not those of the text alone within
1e-3. Afterwards come malformed, oversized and broken-off requests: each must be answered by an error of its kind, or by nothing, and the
server must answer right still.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from slimformer import registry
from slimformer.data.batching import collate
from slimformer.data.tokenizer import cutting, load_tokenizer, max_length_of, pad_id_of
from slimformer.measuring.sessions import open_session
from slimformer.measuring.timing import model_inputs
from slimformer.reporting.delivered import model_files
from slimformer.serving.answering import Classes, Served, Vectors, served_model
from slimformer.tasks.base import Features

TOLERANCE = 1e-3
HOSTILE = (
    (b"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1\r\n\r\n{", (b"400",)),
    (b"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99999999\r\n\r\n", (b"413",)),
    (b"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n", (b"400", b"")),
    (b"GET / HTTP/9.9\r\n\r\n", (b"400", b"")),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20, (b"400", b"")),
    (b"POST /classify HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n", (b"400", b"")),
    (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", (b"404", b"400", b"414", b"")),
    (b"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n{", (b"",)),
)


def alone(served: Served, texts: list[str]) -> list[np.ndarray]:
    """The output of each text in a batch of its own."""
    session, answerer = open_session(served.file, 2), served.answerer
    found = []
    for (row,) in answerer.rows(prompted(served, texts)):
        feeds = {"input_ids": [row.ids], "attention_mask": [[1] * len(row)], "token_type_ids": [row.types]}
        found.append(answerer.read(session({name: np.array(value, np.int64) for name, value in feeds.items()}))[0])
    return found


def prompted(served: Served, texts: list[str]) -> list[Any]:
    answerer = served.answerer
    return answerer.prompted(texts, answerer.prompt(None, "query")) if isinstance(answerer, Vectors) else list(texts)


def body_of(served: Served, text: str) -> bytes:
    asked = {"input": text, "input_type": "query"} if isinstance(served.answerer, Vectors) else {"inputs": text}
    data = json.dumps(asked).encode()
    head = f"POST {served.answerer.path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    return head.encode() + data


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
    return int(head.split()[1]), await reader.readexactly(length)


def is_right(served: Served, body: bytes, wanted: np.ndarray) -> bool:
    data = json.loads(body)
    if isinstance(served.answerer, Classes):
        told = {item["label"]: item["score"] for item in data[0]}
        right = {item["label"]: item["score"] for item in served.answerer.shares(wanted)}
        return all(abs(told[name] - share) <= TOLERANCE for name, share in right.items())
    return bool(np.abs(np.asarray(data["data"][0]["embedding"]) - wanted).max() <= TOLERANCE)


async def load(
    served: Served, port: int, texts: list[str], wanted: list[np.ndarray], requests: int, connections: int
) -> dict[str, Any]:
    bodies = [body_of(served, text) for text in texts]
    draw = random.Random(0)
    order = iter([draw.randrange(len(texts)) for _ in range(requests)])
    seconds: list[float] = []
    counts: Counter[str] = Counter(wrong=0)

    async def caller() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for place in order:
            start = time.perf_counter()
            writer.write(bodies[place])
            status, body = await answer_of(reader)
            seconds.append(time.perf_counter() - start)
            counts[str(status)] += 1
            if status == 200 and not is_right(served, body, wanted[place]):
                counts["wrong"] += 1
        writer.close()

    start = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(connections)))
    whole = time.perf_counter() - start
    p50, p95, p99 = (1000 * float(np.percentile(seconds, share)) for share in (50, 95, 99))
    return {"requests_per_second": requests / whole, "p50_ms": p50, "p95_ms": p95, "p99_ms": p99, **counts}


async def hostile(port: int, rounds: int) -> int:
    """How many hostile requests were answered otherwise than they should be."""
    wrong = 0
    for number in range(rounds):
        data, fitting = HOSTILE[number % len(HOSTILE)]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(data)
            await writer.drain()
            line = await asyncio.wait_for(reader.readline(), 0.5)
            told = line.split()[1] if line else b""
        except (TimeoutError, ConnectionError):
            told = b""
        wrong += told not in fitting
        writer.close()
    return wrong


def exported(folder: Path, texts: list[str], scratch: Path) -> Path:
    """A plain model as fp32 with fused operators, beside its config and tokenizer."""
    from slimformer import load
    from slimformer.exporters.base import Variant
    from slimformer.families.base import subject_of
    from slimformer.measuring.beside import make_readable
    from slimformer.saving.checkpoint import write_surroundings

    model, tokenizer = load(folder), load_tokenizer(folder)
    with cutting(tokenizer, max_length_of(folder)):
        rows = tokenizer.encode_batch(texts[:40])
    columns = {"input_ids": [row.ids for row in rows], "token_type_ids": [row.type_ids for row in rows]}
    features = Features(columns, range(len(rows)), 0, pad_id_of(tokenizer, folder))
    exporter = registry.find("exporters", "onnx")()
    file = scratch / exporter.kinds_for(model)[Variant.FUSED].name
    batches = [collate(features, rows, model_inputs(features)) for rows in ([0], [*range(len(rows))])]
    exporter.export(model, batches, file, Variant.FUSED)
    write_surroundings(model, scratch, tokenizer_from=folder)
    make_readable(subject_of(model), folder, scratch)
    return file


def measured(folder: Path, texts: list[str], requests: int, connections: int, threads: int) -> dict[str, Any]:
    plain = folder.is_dir() and not model_files(folder)
    with tempfile.TemporaryDirectory() as scratch:
        return raced(folder, exported(folder, texts, Path(scratch)) if plain else folder, texts, requests, connections, threads)


def raced(folder: Path, path: Path, texts: list[str], requests: int, connections: int, threads: int) -> dict[str, Any]:
    """Serves what lies at `path`, and asks it."""
    served = served_model(path)
    wanted = alone(served, texts)
    command = [sys.executable, "-m", "slimformer", "serve", str(path), "--port", "0", "--threads", str(threads)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline().split(" at http://")[1].split("/")[0].rsplit(":", 1)[1])
            asyncio.run(load(served, port, texts, wanted, 200, 4))
            found = asyncio.run(load(served, port, texts, wanted, requests, connections))
            found["hostile_wrong"] = asyncio.run(hostile(port, 10 * len(HOSTILE)))
            after = asyncio.run(load(served, port, texts, wanted, 200, 4))
            found["right_after"] = after["200"] - after["wrong"]
        finally:
            process.terminate()
    return {
        "model": folder.name if folder.is_dir() else served.name,
        "file": served.file.name,
        "connections": connections,
        **found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", type=Path, nargs="+", help="folders that slimformer delivered; the first may be the dense model's"
    )
    parser.add_argument("--texts", type=Path, required=True, help="a table with a header; its first column has the texts")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON lines, a row for each folder")
    asked = parser.parse_args()
    with asked.texts.open(encoding="utf-8", newline="") as file:
        texts = [row[0] for row in list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:1001]]
    for folder in asked.folders:
        found = measured(folder, texts, asked.requests, asked.connections, asked.threads)
        print(json.dumps(found), flush=True)
        if asked.out is not None:
            with asked.out.open("a", encoding="utf-8") as out:
                out.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
