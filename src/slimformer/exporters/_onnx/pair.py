"""The graphs of an encoder-decoder: its encoder, and its decoder for the first tokens and for each one after them.

They are written from the anatomy, operator by operator, and not traced: a decoder's cache is an object that tracers lose, and a search
exports dozens of models, at seconds each. What a family computes around its layers it says itself (`Surroundings`); whatever else a
model might compute is found when files are compared with it.

A decoder reads its sentence from keys and values with a row for each sentence, or for each beam: rows that follow one another and
share a sentence ask it together. So beams cost no copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from slimformer.core.anatomy import SHARED_BIAS, Skip
from slimformer.core.standing import is_skipped
from slimformer.errors import ExportError
from slimformer.exporters._onnx.graph import IR_VERSIONS, MICROSOFT, OLDEST_OPSET
from slimformer.exporters._onnx.rewrite import FORMED, MASKED, TABLE, lower_forms
from slimformer.families.base import Attention, FeedForward, StackTable, Subject
from slimformer.forms.base import Formed, forms_in, numbers_of

GraphPart = Literal["encoder", "first", "next"]
GRAPH_PARTS: tuple[GraphPart, ...] = ("encoder", "first", "next")
CACHE_FLAG = "use_cache_branch"  # names as optimum and transformers.js have them
LAST = "model.lm_head.weight"  # the matrix that gives the scores of words,
LAST_TABLE = "model.lm_head.table"  # and the table of words that it often is
HIDDEN, ENCODED, MASK = "last_hidden_state", "encoder_hidden_states", "encoder_attention_mask"
ROWS, SENTENCES, SOURCE, TARGET, SAID = (
    "batch_size",
    "sentences",
    "encoder_sequence_length",
    "decoder_sequence_length",
    "past_length",
)


def past_name(layer: int, side: str, what: str) -> str:
    """The input with keys or values of a layer; `side` is "decoder" for its own tokens, "encoder" for the sentence."""
    return f"past_key_values.{layer}.{side}.{what}"


def present_name(layer: int, side: str, what: str) -> str:
    """The output that becomes `past_name` of the next token."""
    return f"present.{layer}.{side}.{what}"


@dataclass(frozen=True)
class Writing:
    """How graphs are written: `fused` with operators that ONNX Runtime alone has, where they are faster.

    `apart`: each layer of the decoder reads the encoder's output under a name of its own, because each has a range of its own.
    """

    subject: Subject
    fused: bool
    apart: bool = False

    def graph(self, part: GraphPart) -> ir.Model:
        """One of the graphs, a whole model: it can be run as it is."""
        return _Writer(self, part).model()


class _Writer:
    """Writes one graph, from its inputs on. Hidden states are (batch, seq, hidden), in a fused encoder (seq, batch, hidden)."""

    def __init__(self, how: Writing, part: GraphPart) -> None:
        self.subject, self.fused, self.apart, self.part = how.subject, how.fused, how.apart, part
        subject = how.subject
        self.net: Any = subject.model
        self.around = subject.family.surroundings(self.net)
        skeleton = subject.family.skeleton_of(self.net)
        self.table: StackTable = skeleton
        if part != "encoder":
            assert skeleton.decoder is not None, "a family with surroundings has a decoder"
            self.table = skeleton.decoder
        self.prefix = "" if self.net.base_model is self.net else f"{self.net.base_model_prefix}."
        self.modules: Mapping[str, Any] = dict(self.net.named_modules())
        self.nodes = ir.Graph([], [], nodes=[], opset_imports={"": OLDEST_OPSET}, name=part)
        self.turned = self.fused and part == "encoder"
        self.layers = [
            f"{self.prefix}{self.table.layers}.{name}"
            for name, _ in self.modules[self.prefix + self.table.layers].named_children()
        ]
        self._constants: dict[Any, ir.Value] = {}
        self._named = set[str]()

    # -- the parts

    def model(self) -> ir.Model:
        if self.part == "encoder":
            self._encoder()
        else:
            self._decoder()
        forms = forms_in(self.net)
        here = {node.attributes["module"].as_string() for node in self.nodes if (node.domain, node.op_type) in (FORMED, TABLE)}
        lower_forms(self.nodes, {name: form for name, form in forms.items() if name in here})
        model = ir.Model(self.nodes, ir_version=IR_VERSIONS[OLDEST_OPSET], producer_name="slimformer")
        if any(node.domain == MICROSOFT for node in self.nodes):
            self.nodes.opset_imports[MICROSOFT] = 1
        return model

    def _encoder(self) -> None:
        ids = self.input("input_ids", ir.DataType.INT64, (ROWS, SOURCE))
        mask = self.input("attention_mask", ir.DataType.INT64, (ROWS, SOURCE))
        length = self.op("Shape", [ids], start=1, end=2)
        state = self.embedded(ids, None, length)
        if self.turned:
            state = self.op("Transpose", [state], perm=[1, 0, 2])
        state = self.normed(state, self.table.embedding_norm, top=True)
        hidden = self.mask_bias(mask)  # (batch, 1, 1, seq)
        distances = self.distances(length, length) if self.has_bias else None
        for path in self.layers:
            block = self.table.attention.under(path)
            if self.is_there(block.skips):
                summand = self.summand(block, distances, hidden)
                state = self.block(state, block, lambda value, b=block, s=summand: self.attend_all(value, b, s))
            state = self.feed_forward(state, path)
        state = self.normed(state, self.table.norm, top=True)
        if self.turned:
            state = self.op("Transpose", [state], perm=[1, 0, 2])
        self.output(state, HIDDEN, (ROWS, SOURCE, self.width))

    def _decoder(self) -> None:
        again = self.part == "next"
        mask = self.input(MASK, ir.DataType.INT64, (SENTENCES, SOURCE))
        ids = self.input("input_ids", ir.DataType.INT64, (ROWS, 1 if again else TARGET))
        encoded = None if again else self.input(ENCODED, ir.DataType.FLOAT, (SENTENCES, SOURCE, self.width))
        past = [self.past_inputs(layer) for layer in range(len(self.layers))] if again else None
        length = self.op("Shape", [ids], start=1, end=2)
        said = self.op("Shape", [past[0]["decoder", "key"]], start=2, end=3) if past else None
        state = self.normed(self.embedded(ids, said, length), self.table.embedding_norm, top=True)
        hidden = self.mask_bias(mask)  # (sentences, 1, 1, source)
        reach = self.op("Add", [said, length]) if said is not None else length  # keys of the own text
        distances = self.distances(length, reach) if self.has_bias else None
        causal = None if again else self.causal(length)
        sentences = self.op("Shape", [mask], start=0, end=1)
        for layer, path in enumerate(self.layers):
            own = past[layer] if past else {}
            block = self.table.attention.under(path)
            if self.is_there(block.skips):
                summand = self.summand(block, distances, causal)
                state = self.block(
                    state, block, lambda value, b=block, s=summand, o=own, n=layer: self.attend_own(value, b, s, o, n)
                )
            else:
                self.count(ids, own, layer)
            assert self.table.cross is not None
            block = self.table.cross.under(path)
            if self.is_there(block.skips):
                state = self.block(
                    state,
                    block,
                    lambda value, b=block, o=own, n=layer: self.attend_source(value, b, encoded, hidden, sentences, o, n),
                )
            elif not again:
                self.count_source(mask, layer)
            state = self.feed_forward(state, path)
        self.scores(self.normed(state, self.table.norm, top=True))
        self.nodes.outputs.insert(0, self.nodes.outputs.pop())

    def past_inputs(self, layer: int) -> dict[tuple[str, str], ir.Value]:
        return {
            (side, what): self.input(past_name(layer, side, what), ir.DataType.FLOAT, self.cache_shape(layer, side))
            for side in ("decoder", "encoder")
            for what in ("key", "value")
        }

    def cache_shape(self, layer: int, side: str) -> tuple[str | int, ...]:
        """(rows, heads, tokens, size of a head); heads are a name, where they are not those of the config that others read."""
        rows, tokens = (ROWS, SAID) if side == "decoder" else (SENTENCES, SOURCE)
        block = self.table.attention if side == "decoder" else self.table.cross
        assert block is not None
        here = block.under(self.layers[layer])
        if not self.is_there(here.skips):
            return rows, f"heads.{layer}.{side}", tokens, f"size.{layer}.{side}"
        heads, size = self.heads(here)
        usual = getattr(self.net.config, self.table.attention_heads)
        return rows, heads if heads == usual else f"heads.{layer}.{side}", tokens, size

    # -- blocks

    def block(self, state: ir.Value, block: Attention | FeedForward, compute: Any) -> ir.Value:
        """A sublayer with its residual, the norm in front of it or behind."""
        if block.end is None:
            return self.op("Add", [state, compute(self.normed(state, block.norm))])
        return self.normed(self.op("Add", [state, compute(state)]), block.norm)

    def feed_forward(self, state: ir.Value, path: str) -> ir.Value:
        block = self.table.ffn.under(path)
        if not self.is_there(block.skips):
            return state

        def compute(value: ir.Value) -> ir.Value:
            inner = self.activated(self.product(value, block.gate or block.into))
            if block.gate is not None:
                inner = self.op("Mul", [inner, self.product(value, block.into)])
            return self.product(inner, block.out)

        return self.block(state, block, compute)

    def attend_all(self, value: ir.Value, block: Attention, summand: ir.Value) -> ir.Value:
        """Every token asks every token; in a fused graph heads are read by strides, without copies."""
        heads, size = self.heads(block)
        split, scale = self.numbers(0, 0, heads, size), self.scale(block)
        q, k, v = (self.op("Reshape", [self.product(value, name), split]) for name in (block.query, block.key, block.value))
        if self.turned:
            strides = {"transBatchA": 1, "transBatchB": 1, "transB": 1, "alpha": scale}
            scores = self.op("FusedMatMul", [q, k], MICROSOFT, **strides)  # (batch, heads, seq, seq)
        else:
            q = self.op("Transpose", [q], perm=[0, 2, 1, 3])
            scores = self.op("MatMul", [self.scaled(q, scale), self.op("Transpose", [k], perm=[0, 2, 3, 1])])
            v = self.op("Transpose", [v], perm=[0, 2, 1, 3])
        shares = self.op("Softmax", [self.op("Add", [scores, summand])], axis=-1)
        fused = ("FusedMatMul", [shares, v], MICROSOFT)
        mixed = self.op(*fused, transBatchB=1) if self.turned else self.op("MatMul", [shares, v])  # (batch, heads, seq, size)
        mixed = self.op("Transpose", [mixed], perm=[2, 0, 1, 3] if self.turned else [0, 2, 1, 3])
        return self.product(self.op("Reshape", [mixed, self.numbers(0, 0, heads * size)]), block.out)

    def attend_own(
        self, value: ir.Value, block: Attention, summand: ir.Value | None, past: Mapping[tuple[str, str], ir.Value], layer: int
    ) -> ir.Value:
        """The tokens ask those that were said and themselves: their keys and values go to the outputs."""
        heads, size = self.heads(block)
        q, k, v = (self.product(value, name) for name in (block.query, block.key, block.value))
        q, k, v = (self.by_heads(item, heads, size) for item in (q, k, v))  # (batch, heads, seq, size)
        if past:
            k = self.op("Concat", [past["decoder", "key"], k], axis=2)
            v = self.op("Concat", [past["decoder", "value"], v], axis=2)
        self.cache(k, layer, "decoder", "key")
        self.cache(v, layer, "decoder", "value")
        return self.product(self.mixed(q, k, v, self.scale(block), summand, heads * size), block.out)

    def attend_source(
        self,
        value: ir.Value,
        block: Attention,
        encoded: ir.Value | None,
        hidden: ir.Value,
        sentences: ir.Value,
        past: Mapping[tuple[str, str], ir.Value],
        layer: int,
    ) -> ir.Value:
        """The tokens ask the sentence; its keys and values are computed once and handed on."""
        heads, size = self.heads(block)
        if encoded is None:
            k, v = past["encoder", "key"], past["encoder", "value"]
        else:
            split = self.numbers(0, 0, heads, size)
            encoded = self.op("Identity", [encoded]) if self.apart else encoded
            k, v = (
                self.op("Transpose", [self.op("Reshape", [self.product(encoded, name), split])], perm=[0, 2, 1, 3])
                for name in (block.key, block.value)
            )
            self.cache(k, layer, "encoder", "key")
            self.cache(v, layer, "encoder", "value")
        q = self.product(value, block.query)  # (batch, seq, width)
        shape = self.op("Concat", [sentences, self.numbers(-1, heads, size)], axis=0)
        grouped = self.op(
            "Transpose", [self.op("Reshape", [q, shape])], perm=[0, 2, 1, 3]
        )  # (sentences, heads, beams * seq, size)
        mixed = self.mixed(grouped, k, v, self.scale(block), hidden, heads * size)
        return self.product(self.op("Reshape", [mixed, self.op("Shape", [q])]), block.out)

    def mixed(self, q: ir.Value, k: ir.Value, v: ir.Value, scale: float, summand: ir.Value | None, width: int) -> ir.Value:
        """Values by their shares: (., heads, seq, size) and (., heads, keys, size) twice -> (., seq, width)."""
        if self.fused:
            scores = self.op("FusedMatMul", [q, k], MICROSOFT, transB=1, alpha=scale)
        else:
            scores = self.op("MatMul", [self.scaled(q, scale), self.op("Transpose", [k], perm=[0, 1, 3, 2])])
        if summand is not None:
            scores = self.op("Add", [scores, summand])
        mixed = self.op("MatMul", [self.op("Softmax", [scores], axis=-1), v])
        joined = self.op("Transpose", [mixed], perm=[0, 2, 1, 3])
        return self.op("Reshape", [joined, self.numbers(0, 0, width)])

    def by_heads(self, value: ir.Value, heads: int, size: int) -> ir.Value:
        """(batch, seq, width) -> (batch, heads, seq, size); for one token nothing is moved."""
        if self.part == "next":
            return self.op("Reshape", [value, self.numbers(0, heads, 1, size)])
        return self.op("Transpose", [self.op("Reshape", [value, self.numbers(0, 0, heads, size)])], perm=[0, 2, 1, 3])

    def count(self, ids: ir.Value, past: Mapping[tuple[str, str], ir.Value], layer: int) -> None:
        """An attention that is gone hands on a zero for each token: the length of its cache says how many were said."""
        wide = self.op("Unsqueeze", [self.op("Cast", [ids], to=int(ir.DataType.FLOAT)), self.numbers(1, 3)])
        zero = self.op("Mul", [wide, self.number(0.0)])  # (batch, 1, seq, 1)
        for what in ("key", "value"):
            value = self.op("Concat", [past["decoder", what], zero], axis=2) if past else self.op("Identity", [zero])
            self.cache(value, layer, "decoder", what)

    def count_source(self, mask: ir.Value, layer: int) -> None:
        """The same for one that asked the sentence: nobody reads it, but whoever runs the file hands it on."""
        wide = self.op("Unsqueeze", [self.op("Cast", [mask], to=int(ir.DataType.FLOAT)), self.numbers(1, 3)])
        for what in ("key", "value"):
            self.cache(self.op("Mul", [wide, self.number(0.0)]), layer, "encoder", what)

    def scores(self, state: ir.Value) -> None:
        """The score of each word for each token: (batch, seq, words)."""
        if self.around.last_scale != 1.0:
            state = self.op("Mul", [state, self.number(self.around.last_scale)])
        name, last = "lm_head", self.net.get_output_embeddings()
        state.type = state.type or ir.TensorType(ir.DataType.FLOAT)
        if not isinstance(last, nn.Linear):
            raise ExportError(
                f"the last matrix of {type(self.net).__name__} is a {type(last).__name__}, which no file is made of.",
                help="leave the word table in its plain form.",
            )
        self.name_source(state, name)
        words = int(last.weight.shape[0])
        result = self.op("MatMul", [state, self.parameter(LAST, last.weight, turned=True)])
        bias = self.last_bias(last)
        if bias is not None:
            result = self.op("Add", [result, self.constant(bias, f"model.{name}.bias")])
        self.output(result, "logits", (ROWS, 1 if self.part == "next" else TARGET, words))

    def last_bias(self, last: nn.Linear) -> np.ndarray | None:
        """What is added to the scores of all words; None if that is nothing."""
        bias = np.zeros(last.weight.shape[0], np.float32) if last.bias is None else numbers_of(last.bias)
        if self.around.last_bias is not None:
            bias = bias + numbers_of(self.net.get_buffer(self.around.last_bias)).reshape(-1)
        return bias if bias.any() else None

    # -- positions, masks, biases

    def embedded(self, ids: ir.Value, said: ir.Value | None, length: ir.Value) -> ir.Value:
        """Words, scaled, and their positions: (batch, seq, hidden)."""
        path = next(self.prefix + name for name in self.table.words if self.prefix + name in self.modules)
        module, last = self.modules[path], self.net.get_output_embeddings()
        if isinstance(module, Formed):
            parts = [self.parameter(f"model.{path}.{name}", value) for name, value in module.named_parameters()]
            state = self.op(TABLE[1], [ids, *parts], TABLE[0], module=path)
        else:
            tied = self.part != "encoder" and isinstance(last, nn.Linear) and last.weight is module.weight
            table = self.parameter(LAST_TABLE if tied else f"model.{path}.weight", module.weight)
            state = self.op("Gather", [table, ids])
        if self.around.word_scale != 1.0:
            state = self.op("Mul", [state, self.number(self.around.word_scale)])
        if self.around.positions is None:
            return state
        place = self.around.positions[0 if self.part == "encoder" else 1]
        rows = numbers_of(self.modules[place].weight)[self.around.first_position :]
        begin = self.numbers(0) if said is None else said
        end = length if said is None else self.op("Add", [said, length])
        return self.op(
            "Add", [state, self.op("Slice", [self.constant(rows, f"model.{place}.weight"), begin, end, self.numbers(0)])]
        )

    def mask_bias(self, mask: ir.Value) -> ir.Value:
        """The summand of scores: 0 where `mask` (rows, seq) is 1, MASKED elsewhere: (rows, 1, 1, seq)."""
        lost = self.op("Sub", [self.number(1.0), self.op("Cast", [mask], to=int(ir.DataType.FLOAT))])
        return self.op("Unsqueeze", [self.op("Mul", [lost, self.number(MASKED)]), self.numbers(1, 2)])

    def causal(self, length: ir.Value) -> ir.Value:
        """The summand that hides later tokens: (seq, seq)."""
        later = self.op("Greater", [self.steps(length, length), self.constant(np.int64(0), "constant")])
        return self.op("Mul", [self.op("Cast", [later], to=int(ir.DataType.FLOAT)), self.number(MASKED)])

    def steps(self, queries: ir.Value, keys: ir.Value) -> ir.Value:
        """How far each key lies behind each of the last `queries` places: (queries, keys); negative in front of it."""
        zero, one = (self.constant(np.int64(value), "constant") for value in (0, 1))
        first = self.op("Squeeze", [self.op("Sub", [keys, queries]), self.numbers(0)])
        end = self.op("Squeeze", [keys, self.numbers(0)])
        asked = self.op("Unsqueeze", [self.op("Range", [zero, end, one]), self.numbers(0)])
        asking = self.op("Unsqueeze", [self.op("Range", [first, end, one]), self.numbers(1)])
        return self.op("Sub", [asked, asking])

    @property
    def has_bias(self) -> bool:
        return self.table.attention.shares_bias

    @cached_property
    def bias_owner(self) -> Any:
        """The attention whose table of biases all of the stack read."""
        attentions = (self.modules[self.table.attention.under(path).module] for path in self.layers)
        return next(module for module in attentions if module.has_relative_attention_bias)

    def distances(self, queries: ir.Value, keys: ir.Value) -> ir.Value:
        """The bias of each pair of places, by head of the whole model: (heads, queries, keys)."""
        owner = self.bias_owner
        far = max(int(owner.relative_attention_max_distance), int(owner.relative_attention_num_buckets))
        low, high = (-far, far) if self.part == "encoder" else (-far, 0)  # beyond, all distances have one bucket
        reach = torch.arange(low, high + 1, device=owner.relative_attention_bias.weight.device)
        buckets = owner._relative_position_bucket(
            reach,
            bidirectional=not owner.is_decoder,
            num_buckets=owner.relative_attention_num_buckets,
            max_distance=owner.relative_attention_max_distance,
        )
        values = numbers_of(owner.relative_attention_bias.weight)[buckets.cpu().numpy()]  # (distances, heads)
        ends = (self.constant(np.int64(end), "constant") for end in (low, high))
        inside = self.op("Clip", [self.steps(queries, keys), *ends])
        places = self.op("Sub", [inside, self.constant(np.int64(low), "constant")])
        got = self.op("Gather", [self.constant(values, f"model.{self.part_of_bias}.{SHARED_BIAS}"), places])
        return self.op("Transpose", [got], perm=[2, 0, 1])

    @property
    def part_of_bias(self) -> str:
        return "encoder" if self.part == "encoder" else "decoder"

    def summand(self, block: Attention, distances: ir.Value | None, mask: ir.Value | None) -> Any:
        """What is added to the scores of an attention: its part of the shared biases, and the mask; shared by equal parts."""
        if distances is None:
            return mask
        heads = tuple(getattr(self.modules[block.module], "own_heads", ()))
        key = ("summand", heads)
        if key not in self._constants:
            part = self.op("Gather", [distances, self.numbers(*heads)]) if heads else distances
            self._constants[key] = part if mask is None else self.op("Add", [part, mask])
        return self._constants[key]

    # -- operators

    @property
    def width(self) -> int:
        return self.subject.anatomy.hidden_size

    def is_there(self, skips: Sequence[Skip]) -> bool:
        return not any(is_skipped(self.modules.get(skip.module)) for skip in skips)

    def heads(self, block: Attention) -> tuple[int, int]:
        """The number of heads, and the size of one."""
        name = next(name for name, module in self.subject.anatomy.attentions.items() if module == block.module)
        site = self.subject.anatomy.sites[name]
        return site.size, site.slices[0].unit

    def scale(self, block: Attention) -> float:
        return float(self.modules[block.module].scaling)

    def scaled(self, value: ir.Value, scale: float) -> ir.Value:
        return value if scale == 1.0 else self.op("Mul", [value, self.number(scale)])

    def product(self, value: ir.Value, path: str) -> ir.Value:
        """The product with the matrix of a Linear, its bias added; a marker if the matrix has another form."""
        module = self.modules[path]
        value.type = value.type or ir.TensorType(ir.DataType.FLOAT)  # calibration makes an output of it
        self.name_source(value, path)
        bias = module.bias
        if isinstance(module, Formed):
            parts = [self.parameter(f"model.{path}.{name}", part) for name, part in module.named_parameters() if name != "bias"]
            result = self.op(FORMED[1], [value, *parts], FORMED[0], module=path)
        else:
            result = self.op("MatMul", [value, self.parameter(f"model.{path}.weight", module.weight, turned=True)])
        if bias is not None:
            result = self.op("Add", [result, self.parameter(f"model.{path}.bias", bias)])
        return result

    def name_source(self, value: ir.Value, path: str) -> None:
        """Names what a product reads after the first that reads it: so it has the same name in all graphs."""
        if value.name is None or value.name not in self._named:
            value.name = f"{path}.input"
            self._named.add(value.name)

    def normed(self, value: ir.Value, name: str | None, top: bool = False) -> ir.Value:
        """A LayerNorm, or T5's without a mean and a shift. `top`: the name lacks the prefix of the base model."""
        if name is None:
            return value
        path = self.prefix + name if top else name
        module = self.modules[path]
        gain = self.parameter(f"model.{path}.weight", module.weight)
        if not isinstance(module, nn.LayerNorm):
            square = self.op("ReduceMean", [self.op("Pow", [value, self.number(2.0)])], axes=[-1], keepdims=1)
            root = self.op("Sqrt", [self.op("Add", [square, self.number(float(module.variance_epsilon))])])
            return self.op("Mul", [self.op("Div", [value, root]), gain])
        shift = self.parameter(f"model.{path}.bias", module.bias)
        if not self.fused:
            return self.op("LayerNormalization", [value, gain, shift], axis=-1, epsilon=float(module.eps))
        ones, zeros = self.channels
        result = self.op("InstanceNormalization", [value, ones, zeros], epsilon=float(module.eps))
        return self.op("Add", [self.op("Mul", [result, gain]), shift])

    @cached_property
    def channels(self) -> tuple[ir.Value, ir.Value]:
        """Ones and zeros for the middle axis of a hidden state: its batch in a fused encoder, its tokens in a decoder."""
        one, zero = (self.constant(np.asarray([value], np.float32), "constant") for value in (1.0, 0.0))
        if self.part == "next":
            return one, zero
        ids = next(value for value in self.nodes.inputs if value.name == "input_ids")
        axis = 0 if self.turned else 1
        size = self.op("Shape", [ids], start=axis, end=axis + 1)
        return self.op("Expand", [one, size]), self.op("Expand", [zero, size])

    def activated(self, value: ir.Value) -> ir.Value:
        match self.around.activation:
            case "relu":
                return self.op("Relu", [value])
            case "gelu":
                if self.fused:
                    return self.op("Gelu", [value], MICROSOFT)
                root, one, half = (self.number(number) for number in (np.sqrt(2.0), 1.0, 0.5))
                share = self.op("Add", [self.op("Erf", [self.op("Div", [value, root])]), one])
                return self.op("Mul", [self.op("Mul", [value, share]), half])
            case "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast":
                cube = self.op("Mul", [self.op("Mul", [value, value]), value])
                sum_ = self.op("Add", [value, self.op("Mul", [cube, self.number(0.044715)])])
                tanh = self.op("Tanh", [self.op("Mul", [sum_, self.number(np.sqrt(2.0 / np.pi))])])
                return self.op("Mul", [self.op("Mul", [value, self.op("Add", [tanh, self.number(1.0)])]), self.number(0.5)])
            case "silu" | "swish":
                return self.op("Mul", [value, self.op("Sigmoid", [value])])
            case "tanh":
                return self.op("Tanh", [value])
        raise ExportError(
            f"the activation '{self.around.activation}' of {type(self.net).__name__} is not known to files of encoder-decoders.",
            help="known: relu, gelu, gelu_new, gelu_pytorch_tanh, gelu_fast, silu, swish, tanh.",
        )

    # -- nodes and constants

    def op(self, kind: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Any) -> ir.Value:
        node = ir.node(kind, inputs, attributes or None, domain=domain)
        self.nodes.append(node)
        return node.outputs[0]

    def input(self, name: str, kind: ir.DataType, shape: Sequence[str | int]) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))
        self.nodes.inputs.append(value)
        self._named.add(name)
        return value

    def output(self, value: ir.Value, name: str, shape: Sequence[str | int]) -> None:
        if value.is_graph_output() or value.producer() is None:
            value = self.op("Identity", [value])
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
        self.nodes.outputs.append(value)

    def cache(self, value: ir.Value, layer: int, side: str, what: str) -> None:
        shape = self.cache_shape(layer, side)
        tokens = "present_length" if side == "decoder" else SOURCE
        self.output(value, present_name(layer, side, what), (*shape[:2], tokens, shape[3]))

    def numbers(self, *values: int) -> ir.Value:
        return self.constant(np.asarray(values, np.int64), "constant")

    def number(self, value: float) -> ir.Value:
        return self.constant(np.float32(value), "constant")

    def parameter(self, name: str, tensor: torch.Tensor, turned: bool = False) -> ir.Value:
        if ("parameter", name) not in self._constants:
            values = numbers_of(tensor)
            self._constants["parameter", name] = self._initializer(np.ascontiguousarray(values.T) if turned else values, name)
        return self._constants["parameter", name]

    def constant(self, values: Any, name: str) -> ir.Value:
        array = np.asarray(values)
        key = (name, str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._initializer(array, name)
        return self._constants[key]

    def _initializer(self, values: np.ndarray, name: str) -> ir.Value:
        unique, count = name, 1
        while unique in self.nodes.initializers:
            unique, count = f"{name}_{count}", count + 1
        return _initializer_of(self.nodes, values, unique)


# -- Two graphs in one -------------------------------------------------------------------------------------------------------


def merge(first: ir.Model, again: ir.Model, empty: Mapping[str, tuple[int, int]]) -> ir.Model:
    """One graph that holds both as branches of an `If`, as optimum makes it, with the weights that they share stored once.

    `empty`: outputs that the second graph lacks, which nobody needs there, with the heads and sizes of the arrays without a
    row that it gives for them.
    """
    inputs: dict[str, ir.Value] = {}
    for graph in (first.graph, again.graph):
        for value in graph.inputs:
            inputs.setdefault(str(value.name), ir.Value(name=value.name, shape=value.shape, type=value.type))
    ids = next(value for value in first.graph.inputs if value.name == "input_ids")
    inputs["input_ids"].shape = ids.shape
    flag = ir.Value(name=CACHE_FLAG, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.BOOL))
    for name, (heads, size) in empty.items():
        node = ir.node("Constant", [], {"value": ir.tensor(np.zeros((0, heads, 1, size), np.float32))})
        again.graph.append(node)
        node.outputs[0].name = name
        again.graph.outputs.append(node.outputs[0])
    places = {str(value.name): value for value in again.graph.outputs}
    ordered = [places[str(value.name)] for value in first.graph.outputs]
    again.graph.outputs.clear()
    again.graph.outputs.extend(ordered)
    outer = ir.Graph([*inputs.values(), flag], [], nodes=[], opset_imports=dict(first.graph.opset_imports), name="decoder")
    outer.opset_imports.update(again.graph.opset_imports)
    outs = [(str(value.name), value.shape, value.type) for value in first.graph.outputs]
    for part, graph in (("first", first.graph), ("next", again.graph)):
        _lift(graph, part, inputs, outer)
    for end in ("", ".int8", ".scale"):
        _store_once(outer, LAST + end, LAST_TABLE + end)
    node = ir.node("If", [flag], {"then_branch": again.graph, "else_branch": first.graph}, num_outputs=len(outs))
    outer.append(node)
    for value, (name, shape, kind) in zip(node.outputs, outs, strict=True):
        value.name, value.shape, value.type = name, shape, kind
        outer.outputs.append(value)
    return ir.Model(outer, ir_version=first.ir_version, producer_name="slimformer")


def _lift(graph: ir.Graph, part: str, inputs: Mapping[str, ir.Value], outer: ir.Graph) -> None:
    """Makes a graph a branch: its inputs and constants become those of the graph around it, and its names its own."""
    for value in list(graph.inputs):
        value.replace_all_uses_with(inputs[str(value.name)], replace_graph_outputs=True)
    graph.inputs.clear()
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        assert tensor is not None
        there = outer.initializers.get(name)
        count = 1
        while there is not None and not _equal(there.const_value, tensor):
            count += 1
            there = outer.initializers.get(f"{name}_{part}_{count}")
        if there is None:
            unique = name if count == 1 else f"{name}_{part}_{count}"
            there = ir.Value(name=unique, shape=value.shape, type=value.type, const_value=tensor)
            outer.register_initializer(there)
        value.replace_all_uses_with(there)
        del graph.initializers[name]
    for node in graph:
        for number, value in enumerate(node.outputs):
            value.name = f"{part}.{value.name or number}"


def _store_once(graph: ir.Graph, matrix: str, table: str) -> None:
    """Makes a matrix the transpose of a table, if it is, or their scales one: runtimes turn it once, when they load the file."""
    one, other = (graph.initializers.get(name) for name in (matrix, table))
    if one is None or other is None or one.const_value is None or other.const_value is None:
        return
    values = one.const_value.numpy()
    if not np.array_equal(values.T.reshape(other.const_value.shape.numpy()), other.const_value.numpy()):
        return
    if values.ndim == 2:
        node = ir.node("Transpose", [other], {"perm": [1, 0]})
    else:
        node = ir.node("Squeeze", [other, _initializer_of(graph, np.asarray([1], np.int64), "axis")])
    graph.append(node)
    one.replace_all_uses_with(node.outputs[0])
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = f"{matrix}.turned", one.shape, one.type
    del graph.initializers[matrix]


def _initializer_of(graph: ir.Graph, values: np.ndarray, name: str) -> ir.Value:
    tensor = ir.tensor(values, name=name)
    value = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _equal(one: Any, other: Any) -> bool:
    a, b = one.numpy(), other.numpy()
    return a is b or (a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b))
