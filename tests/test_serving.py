"""The service of a model, asked as clients ask it: answers checked by hand, limits, mistakes, many callers at once, a clean end.

The models are bags of words as ONNX, so that every answer is a sum of known numbers.
"""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from tiny_export import LABELS, WEIGHTS, export

from slimformer.errors import ExtraError, ModelError, OutputError
from slimformer.measuring.sessions import open_session
from slimformer.serving import server
from slimformer.serving.answering import Answerer, Classes, Scores, Spans, Vectors, served_model
from slimformer.serving.batching import MOST_WASTE, Batcher, Limits, next_batch
from slimformer.serving.web import app_of

TAGS = ("O", "B-LOC")  # what `WEIGHTS` mean for a tagger: "great" and "fine" are places


def changed(folder: Path, **config: Any) -> Path:
    """The exported folder with other facts in its config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config), encoding="utf-8")
    return folder


def tagger(folder: Path) -> Path:
    """The same table without the sum: each token has its own logits."""
    export(folder)
    model = onnx.load(folder / "model.onnx")
    del model.graph.node[-1]
    model.graph.node[-1].output[0] = "logits"
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", "seq", 2]))
    onnx.save(model, folder / "model.onnx")
    names = {"id2label": dict(enumerate(TAGS)), "label2id": {name: index for index, name in enumerate(TAGS)}}
    return changed(folder, architectures=["BertForTokenClassification"], **names)


def reranker(folder: Path) -> Path:
    """One number for a pair: what is good in it."""
    export(folder)
    model = onnx.load(folder / "model.onnx")
    good = np.array([[values[1]] for values in WEIGHTS.values()], dtype=np.float32)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(good, "table"))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 1]))
    onnx.save(model, folder / "model.onnx")
    identity = {"activation_fn": "torch.nn.modules.linear.Identity"}
    return changed(folder, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}, sentence_transformers=identity)


def embedder(folder: Path, **head: Any) -> Path:
    """The sums as vectors, of length 1 unless `normalize` says otherwise."""
    export(folder)
    model = onnx.load(folder / "model.onnx")
    model.graph.node[-1].output[0] = "sums" if head.get("normalize", True) else "sentence_embedding"
    if head.get("normalize", True):
        model.graph.node.append(helper.make_node("LpNormalization", ["sums"], ["sentence_embedding"], axis=1, p=2))
    model.graph.output[0].name = "sentence_embedding"
    onnx.save(model, folder / "model.onnx")
    return changed(folder, sentence_embedding={"pooling": ["mean"], "normalize": True, **head})


def sums(text: str) -> np.ndarray:
    return np.sum([WEIGHTS[word] for word in text.split()], axis=0)


def shares(text: str) -> dict[str, float]:
    values = np.exp(sums(text) - sums(text).max())
    return dict(zip(LABELS, values / values.sum(), strict=True))


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("served") / "small")


@pytest.fixture
def ask(classes: Path) -> Iterator[TestClient]:
    with TestClient(app_of(served_model(classes), threads=1)) as client:
        yield client


def client_of(folder: Path, **limits: int) -> TestClient:
    return TestClient(app_of(served_model(folder), threads=1, limits=Limits(**limits)))


def message(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"]
    error = answer.json()["error"]
    assert set(error) == {"message", "type"}
    return str(error["message"])


# -- Answers -------------------------------------------------------------------------------------------------------------------


def test_classes_are_told_with_their_shares_the_largest_first(ask: TestClient) -> None:
    found = ask.post("/classify", json={"inputs": ["great film", "dull dull", "fine film dull film film film"]}).json()
    for text, answer in zip(("great film", "dull dull", "fine film dull film film film"), found, strict=True):
        assert [item["score"] for item in answer] == sorted((item["score"] for item in answer), reverse=True)
        assert {item["label"]: item["score"] for item in answer} == pytest.approx(shares(text), rel=1e-5)
    assert ask.post("/classify", json={"inputs": "dull dull"}).json() == found[1:2]
    (pair,) = ask.post("/classify", json={"inputs": [["great", "film"]]}).json()
    assert {item["label"]: item["score"] for item in pair} == pytest.approx(shares("great film"), rel=1e-5)


def test_of_several_labels_each_has_a_share_of_its_own(tmp_path: Path) -> None:
    folder = changed(export(tmp_path / "small"), problem_type="multi_label_classification")
    with client_of(folder) as client:
        (answer,) = client.post("/classify", json={"inputs": "great dull"}).json()
    assert {item["label"]: item["score"] for item in answer} == pytest.approx(
        {"bad": 1 / (1 + np.exp(-2.0)), "good": 1 / (1 + np.exp(-3.0))}, rel=1e-5
    )


def test_vectors_have_the_shape_that_clients_of_openai_know(tmp_path: Path) -> None:
    texts = ["great dull", "fine"]
    wanted = [sums(text) / np.linalg.norm(sums(text)) for text in texts]
    with client_of(embedder(tmp_path / "small")) as client:
        answer = client.post("/v1/embeddings", json={"input": texts, "model": "whatever", "user": "me"}).json()
        assert [item["index"] for item in answer["data"]] == [0, 1]
        assert np.allclose([item["embedding"] for item in answer["data"]], wanted, atol=1e-6)
        assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
        packed = client.post("/embeddings", json={"input": texts[0], "encoding_format": "base64"}).json()["data"][0][
            "embedding"
        ]
        assert np.allclose(np.frombuffer(base64.b64decode(packed), "<f4"), wanted[0], atol=1e-6)
        short = client.post("/v1/embeddings", json={"input": texts, "dimensions": 1}).json()
        assert [item["embedding"] for item in short["data"]] == [pytest.approx([1.0]), pytest.approx([0.0])]
        assert "more than the 2" in message(client.post("/v1/embeddings", json={"input": texts, "dimensions": 3}), 400)


def test_who_reads_queries_and_passages_apart_must_be_told_which_they_are(tmp_path: Path) -> None:
    folder = embedder(tmp_path / "small", normalize=False, prompts={"query": "great ", "document": "dull "})
    with client_of(folder) as client:

        def vector(**more: str) -> list[float]:
            answer: list[float] = client.post("/v1/embeddings", json={"input": "fine", **more}).json()["data"][0]["embedding"]
            return answer

        assert vector(input_type="query") == vector(prompt_name="query") == [0.0, 4.0]
        assert vector(input_type="passage") == vector(input_type="document") == [2.0, 1.0]
        assert '"input_type": "query"' in message(client.post("/v1/embeddings", json={"input": "fine"}), 400)
        assert "no prompt 'quer'" in message(client.post("/v1/embeddings", json={"input": "x", "prompt_name": "quer"}), 400)
    with client_of(changed(folder, sentence_embedding={"pooling": ["mean"], "lower": True})) as client:
        assert client.post("/v1/embeddings", json={"input": "GREAT"}).json()["data"][0]["embedding"] == [0.0, 3.0]


def test_texts_are_ordered_in_the_words_of_both_kinds_of_clients(tmp_path: Path) -> None:
    with client_of(reranker(tmp_path / "small")) as client:
        asked = {"query": "film", "documents": ["dull", {"text": "great"}, "fine"]}
        found = client.post("/rerank", json={**asked, "return_documents": True}).json()["results"]
        assert found == [
            {"index": 1, "relevance_score": 3.0, "document": {"text": "great"}},
            {"index": 2, "relevance_score": 1.0, "document": {"text": "fine"}},
            {"index": 0, "relevance_score": 0.0, "document": {"text": "dull"}},
        ]
        assert [item["index"] for item in client.post("/v1/rerank", json={**asked, "top_n": 2}).json()["results"]] == [1, 2]
        texts = {"query": "great", "texts": ["dull", "fine"], "return_text": True}
        assert client.post("/rerank", json=texts).json() == [
            {"index": 1, "score": 4.0, "text": "fine"},
            {"index": 0, "score": 3.0, "text": "dull"},
        ]
        for wrong in ({"query": "x"}, {"query": "x", "texts": ["a"], "documents": ["b"]}):
            assert '"documents", or "texts"' in message(client.post("/rerank", json=wrong), 400)
        assert '"text"' in message(client.post("/rerank", json={"query": "x", "documents": [{"title": "a"}]}), 400)


def test_scores_are_what_the_folder_says(tmp_path: Path) -> None:
    folder = changed(
        reranker(tmp_path / "small"), sentence_transformers={"activation_fn": "torch.nn.modules.activation.Sigmoid"}
    )
    with client_of(folder) as client:
        (answer,) = client.post("/rerank", json={"query": "film", "texts": ["great"]}).json()
    assert answer["score"] == pytest.approx(1 / (1 + np.exp(-3.0)), rel=1e-5)


def test_spans_have_their_places_in_the_text_also_where_it_needs_windows(tmp_path: Path) -> None:
    folder = tagger(tmp_path / "small")
    long = " ".join(["dull"] * 100 + ["great"] + ["dull"] * 50 + ["fine", "fine"])
    with client_of(folder) as client:
        short, windows = client.post("/tag", json={"inputs": ["dull great film", long]}).json()
    score = 1 / (1 + np.exp(-3.0))
    assert short == [{"label": "LOC", "start": 5, "end": 10, "text": "great", "score": pytest.approx(score, rel=1e-5)}]
    assert [(item["start"], item["text"]) for item in windows] == [
        (long.index("great"), "great"),
        (long.index("fine"), "fine"),
        (long.rindex("fine"), "fine"),
    ]


def test_spans_of_several_words_are_joined_as_their_letters_say(tmp_path: Path) -> None:
    folder = tagger(tmp_path / "small")

    def spans(names: tuple[str, ...], ids: list[int]) -> list[tuple[str, str]]:
        """What a tagger with these tags tells of "a b c ...", whose words have these ids."""
        answerer = served_model(changed(folder, id2label=dict(enumerate(names)), label2id={})).answerer
        assert isinstance(answerer, Spans)
        text = " ".join("abcdefgh"[: len(ids)])
        (rows,) = answerer.rows([text])
        logits = [10.0 * np.eye(len(names))[ids]]
        return [(item["label"], item["text"]) for item in answerer.spans(text, rows, logits)]

    bio = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
    assert spans(bio, [1, 2, 0, 3, 3, 4, 2]) == [("PER", "a b"), ("LOC", "d"), ("LOC", "e f"), ("PER", "g")]
    bioes = ("O", "B-PER", "I-PER", "E-PER", "S-PER")
    assert spans(bioes, [1, 2, 3, 4, 4, 1, 3]) == [("PER", "a b c"), ("PER", "d"), ("PER", "e"), ("PER", "f g")]
    assert spans(("O", "PER", "LOC"), [1, 1, 2, 0, 2]) == [("PER", "a b"), ("LOC", "c"), ("LOC", "e")]
    assert spans(("NOUN", "VERB"), [0, 0, 1]) == [("NOUN", "a"), ("NOUN", "b"), ("VERB", "c")]


# -- Limits and mistakes -------------------------------------------------------------------------------------------------------


def test_what_is_too_much_is_refused_by_its_measure(classes: Path) -> None:
    with client_of(classes, items=3, characters=300, body=1000) as client:
        assert "4 texts are more than the 3" in message(client.post("/classify", json={"inputs": ["dull"] * 4}), 413)
        assert "301 characters" in message(client.post("/classify", json={"inputs": "x" * 301}), 413)
        assert "1,000" in message(client.post("/classify", json={"inputs": "x" * 2000}), 413)

        def parts() -> Iterator[bytes]:
            yield b'{"inputs": "'
            for _ in range(20):
                yield b"x" * 100
            yield b'"}'

        assert "1,000" in message(client.post("/classify", content=parts(), headers={"content-type": "application/json"}), 413)
        assert client.post("/classify", json={"inputs": "great"}).status_code == 200


def test_texts_that_are_too_long_are_cut_unless_the_caller_minds(ask: TestClient) -> None:
    long = "great " * 63 + "dull dull"
    (answer,) = ask.post("/classify", json={"inputs": long}).json()
    assert {item["label"]: item["score"] for item in answer} == pytest.approx(shares("great " * 63 + "dull"), rel=1e-5)
    assert "more than 64 tokens" in message(ask.post("/classify", json={"inputs": long, "truncate": False}), 413)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "no JSON"),
        (b"[1]", "JSON object"),
        (b'"text"', "JSON object"),
        (b"{}", '"inputs": it is missing'),
        (b'{"inputs": 3}', '"inputs": it must be a text or a list of texts'),
        (b'{"inputs": ["a", 3]}', '"inputs": it must be a text or a list of texts'),
        (b'{"inputs": [["a"]]}', '"inputs": it must be a text'),
        (b'{"inputs": []}', "there is no text"),
        (b'{"inputs": "a", "truncate": "maybe"}', '"truncate"'),
        (b'{"inputs": "\xff"}', ""),
        (b'{"inputs": "\\ud800"}', ""),
        (b"[" * 100_000, ""),
    ],
)
def test_a_mistake_is_one_line_and_the_server_goes_on(ask: TestClient, body: bytes, said: str) -> None:
    answer = ask.post("/classify", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400)
    if answer.status_code == 400:
        assert said in message(answer, 400)
    assert ask.post("/classify", json={"inputs": "great"}).status_code == 200


def test_places_that_are_not_there_name_the_one_that_is(ask: TestClient) -> None:
    assert "it answers /classify" in message(ask.post("/v1/embeddings", json={"input": "x"}), 404)
    assert message(ask.get("/nowhere"), 404)
    assert message(ask.get("/classify"), 405)
    assert "content-type" in message(
        ask.post("/classify", content=b'{"inputs": "a"}', headers={"content-type": "text/plain"}), 400
    )


def test_each_request_has_an_id_and_is_counted(ask: TestClient) -> None:
    assert ask.get("/health", headers={"x-request-id": "mine-7"}).headers["x-request-id"] == "mine-7"
    made = {ask.get("/health", headers={"x-request-id": name}).headers["x-request-id"] for name in ("", "x" * 200)}
    assert len(made) == 2
    assert all(len(name) == 32 for name in made)
    ask.post("/classify", json={"inputs": ["great film film", "dull"]})
    ask.get("/secret/place")
    lines = ask.get("/metrics").text.splitlines()
    assert 'slimformer_requests_total{path="/classify",status="200"} 1.0' in lines
    assert 'slimformer_requests_total{path="other",status="404"} 1.0' in lines
    assert "slimformer_tokens_total 4.0" in lines  # three tokens in a batch, one in another: 1 is less than half of 3
    assert "slimformer_waiting_rows 0.0" in lines


# -- Many at once --------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 300), min_size=1, max_size=80), st.integers(1, 32))
def test_a_batch_holds_the_oldest_row_and_little_padding(lengths: list[int], most: int) -> None:
    chosen = next_batch(lengths, most, 1000)
    sizes = [max(1, lengths[place]) for place in chosen]
    assert chosen[0] == 0
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= most
    assert max(sizes) <= MOST_WASTE * min(sizes)
    assert len(chosen) == 1 or max(sizes) * len(chosen) <= 1000


def test_answers_of_many_callers_are_those_of_each_alone(classes: Path) -> None:
    words = [word for word in WEIGHTS if word not in ("[PAD]", "[UNK]")]
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(words, size=draw.integers(1, 30))) for _ in range(400)]
    app = app_of(served_model(classes), threads=1)

    async def all_of_them() -> list[dict[str, float]]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://small") as client:

            async def one(text: str) -> dict[str, float]:
                (answer,) = (await client.post("/classify", json={"inputs": text})).json()
                return {item["label"]: item["score"] for item in answer}

            async with app.router.lifespan_context(app):
                found = await asyncio.gather(*map(one, texts))
                metrics = (await client.get("/metrics")).text
        batches = next(line for line in metrics.splitlines() if line.startswith("slimformer_batch_rows_count"))
        assert float(batches.split()[1]) < len(texts) / 2  # rows of several callers ran together
        return found

    for text, answer in zip(texts, asyncio.run(all_of_them()), strict=True):
        assert answer == pytest.approx(shares(text), rel=1e-4)


def test_who_would_wait_too_long_is_told_at_once_and_who_goes_away_waits_no_more(classes: Path) -> None:
    app = app_of(served_model(classes), threads=1, limits=Limits(waiting=4))

    async def crowd() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://small") as client:
            asked = [client.post("/classify", json={"inputs": ["great", "great film"]}) for _ in range(20)]
            gone = asyncio.create_task(client.post("/classify", json={"inputs": "great"}))
            answers = asyncio.gather(*asked)  # nobody computes yet
            await asyncio.sleep(0.3)
            gone.cancel()
            async with app.router.lifespan_context(app):
                return await answers

    answers = asyncio.run(crowd())
    taken = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(taken) + len(refused) == 20
    assert 1 <= len(taken) <= 3
    assert refused[0].headers["retry-after"] == "1"
    assert "wait already" in message(refused[0], 429)


def test_what_is_computed_when_it_ends_is_answered(classes: Path) -> None:
    served = served_model(classes)

    async def ended() -> int:
        batcher = Batcher(open_session(served.file, 1), served.answerer)
        rows = [row for some in served.answerer.rows(["great film"] * 100) for row in some]
        batcher.start()
        asked = asyncio.create_task(batcher.answers(rows))
        await asyncio.sleep(0)
        while batcher.waiting == len(rows):  # until the first batch is taken
            await asyncio.sleep(0)
        await batcher.stop()
        return len(await asyncio.wait_for(asked, 5))

    assert asyncio.run(ended()) == 100


def test_a_batch_that_fails_fails_alone(tmp_path: Path) -> None:
    folder = export(tmp_path / "small")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["beyond"] = 5000  # an id without a row in the table
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with client_of(folder) as client:
        assert "cannot run" in message(client.post("/classify", json={"inputs": "beyond"}), 400)
        assert client.post("/classify", json={"inputs": "great"}).status_code == 200


# -- Folders, the page and the process -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "kind"), [(export, Classes), (tagger, Spans), (reranker, Scores), (embedder, Vectors)])
def test_what_a_folder_answers_follows_from_it(tmp_path: Path, make: Any, kind: type[Answerer]) -> None:
    folder = make(tmp_path / "small")
    assert type(served_model(folder).answerer) is kind
    (folder / "onnx").mkdir()
    (folder / "model.onnx").rename(folder / "onnx" / "model.onnx")  # as other tools put them
    served = served_model(folder)
    assert type(served.answerer) is kind
    assert served.name == served_model(folder / "onnx" / "model.onnx").name == "small"


def test_folders_that_answer_nothing_are_refused(tmp_path: Path) -> None:
    folder = changed(export(tmp_path / "small"), architectures=["BertForQuestionAnswering"])
    with pytest.raises(ModelError, match="(?s)BertForQuestionAnswering.*served are embeddings"):
        served_model(folder)
    (folder / "model.onnx").unlink()
    with pytest.raises(ModelError, match="no ONNX file"):
        served_model(folder)
    with pytest.raises(ModelError, match="no such folder"):
        served_model(tmp_path / "nothing")


def test_the_page_shows_the_model_and_its_card_and_runs_none_of_it(classes: Path) -> None:
    (classes / "README.md").write_text("# small\n<script>alert(1)</script>", encoding="utf-8")
    (classes / "report.html").write_text("<title>proof</title>", encoding="utf-8")
    with client_of(classes) as client:
        page = client.get("/").text
        assert "<h1>small</h1>" in page
        assert "&lt;script&gt;alert(1)" in page
        assert "alert(1)</script>" not in page
        assert "curl http://testserver/classify" in page
        assert "proof" in client.get("/report").text
        assert client.get("/info").json()["labels"] == list(LABELS)
        assert client.get("/v1/models").json()["data"][0]["id"] == "small"
    (classes / "report.html").unlink()
    with client_of(classes) as client:
        assert 'href="report"' not in client.get("/").text
        assert "no report.html" in message(client.get("/report"), 404)


def test_a_taken_port_and_a_missing_package_are_told(classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OutputError, match="(?s)cannot listen on.*--port"):
        server.serve(classes, port=taken.getsockname()[1])
    monkeypatch.setattr(server, "find_spec", {}.get)
    with pytest.raises(ExtraError, match=r"slimformer\[serve\]"):
        server.serve(classes)


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_cleanly_and_answers_first_who_asked_before(classes: Path, by: signal.Signals) -> None:
    command = [sys.executable, "-m", "slimformer", "serve", str(classes), "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("small answers at http://127.0.0.1:"), line
        base = line.split()[3].removesuffix("/classify")
        body = json.dumps({"inputs": ["great film"] * 1000}).encode()
        request = urllib.request.Request(f"{base}/classify", body, {"content-type": "application/json"})
        for _ in range(100):
            try:
                urllib.request.urlopen(f"{base}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        with urllib.request.urlopen(request, timeout=20) as answer:
            process.send_signal(by)
            assert len(json.load(answer)) == 1000
        assert process.wait(timeout=20) == 0
        assert process.stdout.read() == ""
