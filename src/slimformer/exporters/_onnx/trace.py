"""The trace: a model as an ONNX graph, with a marker in the place of each attention and of each matrix in another form.

The model is traced as transformers runs it, except that the layers compute in (seq, batch, hidden), the order that fast graphs need.
A layer of an LSTM leaves a marker too: the tracer would write out as many steps as the example has.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir
import torch
from torch import nn

from slimformer.core.anatomy import Role
from slimformer.core.asking import asking_functions, distance_rows, distance_vectors, score_scale
from slimformer.core.deciding import answers_apart
from slimformer.core.dividing import MET, SEGMENTS, meeting_seen
from slimformer.core.patterning import BEYOND, fixed_marked
from slimformer.core.sieving import all_words
from slimformer.errors import ExportError
from slimformer.exporters._onnx.graph import required
from slimformer.exporters._onnx.parity import FILLING, REPORT, exit_output
from slimformer.exporters._onnx.rewrite import ATTENTION, DISTANT, FORMED, PATTERN, RECURRENT, TABLE, TURNED
from slimformer.exporters._onnx.sieves import END, before_name, state_name
from slimformer.families.base import Subject
from slimformer.forms.base import Formed, forms_in
from slimformer.students.recurrent import Recurrent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DISTANCE_KEYS, DISTANCE_QUERIES = "distance_keys", "distance_queries"  # (heads, size of a head, rows) each, scaled
MARKED = "slimformer_export"  # the name under which transformers finds the attention that leaves a marker
CHATTER = (  # known and harmless; any other warning is heard
    (FutureWarning, r".*isinstance\(treespec, LeafSpec\).*"),
    (UserWarning, r"# The axis name: .* will not be used.*"),
    (DeprecationWarning, r".*(torch\.jit|ast\.|onnxscript|node_version).*"),
)


def trace_model(subject: Subject, outputs: Sequence[str]) -> onnx_ir.Model:
    """The model as a SEQ_FIRST graph with markers; batch and sequence may have any length. ExportError if PyTorch cannot trace it.

    Each exit has an output of its own, behind the model's. In a model whose segments attend apart, the values SEGMENTS and MET have these
    names, by which `parts` finds them. Of a model with sieves all words are computed, and the values at which `sieves.sift` cuts have
    their names.
    """
    model, names = subject.model, subject.inputs

    class Flat(nn.Module):
        """Tensors in, a tuple of tensors out."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            result = self.model(**dict(zip(names, inputs, strict=True)), return_dict=True)
            inside = (*(seen[name] for name in inner), *cuts.values())
            return (*(result[name] for name in outputs), *said().values(), *inside)

    # One tensor per input: the tracer would take one object given twice for one input.
    example = tuple(torch.full((2, 8), FILLING.get(name, 0), dtype=torch.int64, device=subject.device) for name in names)
    longest = subject.family.positions(model.config.to_dict())
    batch, seq = torch.export.Dim("batch"), torch.export.Dim("seq", min=2, max=longest)
    inner = (SEGMENTS, MET) if subject.anatomy.meeting else ()
    inside = (*inner, *_cut_names(subject))
    ends = [*outputs, *map(exit_output, subject.anatomy.exits), *inside]
    with (
        _marked(subject),
        all_words(model),
        fixed_marked(_mark_fixed),
        _seen_cuts(subject) as cuts,
        _distinct_biases(model) as biases,
        answers_apart(model, turned=True) as said,
        meeting_seen(model) as seen,
        _quiet(),
        torch.no_grad(),
    ):
        try:
            program = _traced(Flat().eval(), example, {"inputs": tuple({0: batch, 1: seq} for _ in names)}, list(names), ends)
        except Exception as error:  # whatever tracing raises means the same to a user: this model cannot be exported
            first = str(error).strip().splitlines()[:1]
            raise ExportError(f"PyTorch could not trace {type(model).__name__}.", facts=first, help=REPORT) from error
        for name in reversed(inside):  # they were outputs so that they got their names
            assert program.model.graph.outputs[-1].name == name
            program.model.graph.outputs.pop()
        graph = program.model.graph
        for name, bias in biases.items():
            if bias is None:
                _take_bias(graph, f"model.{name}")
            elif f"model.{name}" in graph.initializers:
                graph.initializers[f"model.{name}"].const_value = onnx_ir.tensor(bias, name=f"model.{name}")
    return program.model


def _traced(flat: nn.Module, example: tuple[Any, ...], shapes: dict[str, Any], names: list[str], ends: list[str]) -> Any:
    """The ONNX program of a model, by a short way if there is one.

    PyTorch takes the operators that it captured apart, which is half of the time, and finds little to do in an encoder: what ONNX
    does not have are conversions. Where these are all, nothing is taken apart; what has other operators goes the long way.
    """
    export = partial(torch.onnx.export, dynamo=True, verbose=False, input_names=names, output_names=ends)
    with suppress(Exception):  # the long way tells what is wrong
        captured = _captured(flat, example, shapes)
        _without_decomposing(captured)
        return export(captured, (), dynamic_shapes=shapes)
    return export(flat, example, dynamic_shapes=shapes)


def _captured(flat: nn.Module, example: tuple[Any, ...], shapes: dict[str, Any]) -> torch.export.ExportedProgram:
    """The operators of a model; a range of lengths that it does not allow is narrowed as PyTorch suggests."""
    capture = partial(torch.export.export, flat, example, strict=False, prefer_deferred_runtime_asserts_over_guards=True)
    try:
        return capture(dynamic_shapes=shapes)
    except torch._dynamo.exc.UserError as error:
        refine = torch.export.dynamic_shapes.refine_dynamic_shapes_from_suggested_fixes
        return capture(dynamic_shapes=refine(error.msg, shapes))


def _without_decomposing(captured: torch.export.ExportedProgram) -> None:
    """Lets nothing be taken apart in a program that changes no value in place.

    A conversion that changes nothing goes, so that a constant keeps its name; one to another type is an operator that ONNX has.
    """
    aten, graph = torch.ops.aten, captured.graph
    called = [node for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    if any(node.target._schema.is_mutable for node in called):
        return
    for node in called:
        if node.target not in (aten.to.dtype, aten.to.device, aten.to.dtype_layout):
            continue
        value, names = node.args[0], (argument.name for argument in node.target._schema.arguments)
        dtype = (dict(zip(names, node.args, strict=False)) | node.kwargs).get("dtype") or value.meta["val"].dtype
        if dtype == value.meta["val"].dtype and graph.output_node() not in node.users:
            node.replace_all_uses_with(value)
            graph.erase_node(node)
        else:
            node.target, node.args, node.kwargs = aten._to_copy.default, (value,), {"dtype": dtype}
    captured.run_decompositions = lambda *_: captured  # type: ignore[method-assign]


def _cut_names(subject: Subject) -> list[str]:
    """The names of the values at which the graph is cut at sieves, in the order in which they are computed."""
    sieves = subject.anatomy.sieves
    if not sieves:
        return []
    comes_back = not type(subject.model).__name__.endswith("ForSequenceClassification")
    kinds = [before_name, state_name] if comes_back else [state_name]
    return [kind(layer) for layer in sieves for kind in kinds] + ([END] if comes_back else [])


@contextmanager
def _seen_cuts(subject: Subject) -> Iterator[dict[str, Any]]:
    """The values that `_cut_names` names, as the latest pass computed them."""
    names, anatomy, model = _cut_names(subject), subject.anatomy, subject.model
    seen: dict[str, Any] = dict.fromkeys(names)

    def note(name: str, value: Any) -> None:
        if name in seen:
            seen[name] = value if isinstance(value, torch.Tensor) else value[0]

    with ExitStack() as stack:
        for layer in anatomy.sieves:
            module = model.get_submodule(anatomy.layer_modules[layer])
            into = [
                item.module
                for item in anatomy.matrices.values()
                if item.role is Role.FFN_IN and item.id.startswith(f"{layer}.")
            ]
            before, state = before_name(layer), state_name(layer)
            hooks = [module.register_forward_pre_hook(lambda _, args, name=before: note(name, args[0]))]
            if into:
                inner = model.get_submodule(into[0])
                hooks.append(inner.register_forward_pre_hook(lambda _, args, name=state: note(name, args[0])))
            else:
                hooks.append(module.register_forward_hook(lambda _, __, output, name=state: note(name, output)))
            for hook in hooks:
                stack.callback(hook.remove)
        if END in seen:
            last = model.get_submodule(anatomy.layers[-1])
            stack.callback(last.register_forward_hook(lambda _, __, output: note(END, output), prepend=True).remove)
        yield seen


def recurrent_in(model: nn.Module) -> list[Recurrent]:
    """The layers of LSTMs."""
    return [module for module in model.modules() if isinstance(module, Recurrent)]


def _mark_attention(
    module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float | None = None, **rest: Any
) -> tuple[Any, None]:
    """An attention function for transformers that leaves a marker: (., heads, ., dim) in, (., ., heads, dim) out.

    What is added to the scores of words beyond a span is one more input, if heads have spans, and so is a bias for positions.
    """
    outer, heads, inner, dim = query.shape
    attributes: dict[str, Any] = {"scale": float(scaling or dim**-0.5), "heads": int(heads), "width": int(heads * dim)}
    inputs = [*(item.transpose(1, 2) for item in (query, key, value)), attention_mask]
    inputs += [item for item in (rest.get(BEYOND), rest.get("position_bias")) if item is not None]
    shape = (outer, inner, heads, dim)
    return torch.onnx.ops.symbolic("::".join(ATTENTION), inputs, attributes, dtype=query.dtype, shape=shape), None


def _mark_turned(attention: nn.Module, inputs: str, out: str, head_dim: int) -> Any:
    """A forward pass for an attention with one matrix for queries, keys and values, whose positions turn queries and keys, that leaves a
    marker: it has two more inputs, the cosines and sines of the turns, and the width of its window if it has one."""

    def forward(hidden_states: Any, position_embeddings: Any = None, attention_mask: Any = None, **_: Any) -> Any:
        states = attention.get_submodule(inputs)(hidden_states)  # (., ., 3 * heads * dim)
        width = states.shape[-1] // 3
        parts = [states[..., place * width : (place + 1) * width] for place in range(3)]
        attributes: dict[str, Any] = {"scale": head_dim**-0.5, "heads": width // head_dim, "width": width}
        attributes["window"] = int(getattr(attention, "sliding_window", None) or 0)
        mixed = torch.onnx.ops.symbolic(
            "::".join(TURNED),
            [*parts, attention_mask, *position_embeddings],
            attributes,
            dtype=parts[0].dtype,
            shape=parts[0].shape,
        )
        return attention.get_submodule(out)(mixed), None

    return forward


def _mark_distant(attention: Any, vectors: Sequence[str], rows: list[int]) -> Any:
    """A forward pass for an attention whose scores have terms for distances that leaves a marker: its further inputs are the vectors of
    these, and it has the row of each distance."""

    def forward(hidden_states: Any, attention_mask: Any, *_: Any, **__: Any) -> Any:
        parts = [linear(hidden_states) for linear in (attention.query_proj, attention.key_proj, attention.value_proj)]
        width = parts[0].shape[-1]
        attributes: dict[str, Any] = {"scale": score_scale(attention), "heads": width // attention.attention_head_size}
        attributes |= {"width": width, "keys": int(DISTANCE_KEYS in vectors), "rows": rows}
        constants = [attention.get_buffer(name) for name in vectors]
        mixed = torch.onnx.ops.symbolic(
            "::".join(DISTANT), [*parts, attention_mask, *constants], attributes, dtype=parts[0].dtype, shape=parts[0].shape
        )
        return mixed, None

    return forward


def _mark_fixed(values: Any, attends: str, mask: Any) -> Any:
    """Leaves a marker for heads with a fixed pattern: (., ., width) in and out."""
    attributes: dict[str, Any] = {"attends": attends}
    return torch.onnx.ops.symbolic(
        "::".join(PATTERN), [values, mask], attributes, dtype=values.dtype, shape=tuple(values.shape)
    )


def _plain_mask(*, attention_mask: Any, **_: Any) -> Any:
    """The mask as it came, (batch, seq): the marker reads it."""
    return attention_mask


def _mark_form(name: str, module: Formed) -> Any:
    """A forward pass for a matrix in another form that leaves a marker with its parameters, and adds the bias if there is one."""
    parts = [part for part, _ in module.named_parameters() if part != "bias"]
    has_bias = "bias" in dict(module.named_parameters())
    marker, width = "::".join(TABLE if module.table else FORMED), module.shape[1 if module.table else 0]

    def forward(input: torch.Tensor) -> torch.Tensor:
        # Parameters are read from the module: the tracer would take a tensor that it holds by itself for a constant without a name.
        values = [module.get_parameter(part) for part in parts]
        shape, dtype = (*input.shape, width) if module.table else (*input.shape[:-1], width), values[0].dtype
        product = torch.onnx.ops.symbolic(marker, [input, *values], {"module": name}, dtype=dtype, shape=shape)
        return product + module.get_parameter("bias").to(dtype) if has_bias else product

    return forward


def _mark_recurrent(module: Recurrent) -> Any:
    """A forward pass for a layer of an LSTM that leaves a marker with its words, the mask, and its weights, direction after direction."""
    names = [f"{part}_l0{end}" for end in ("", "_reverse") for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]

    def forward(words: torch.Tensor, mask: torch.Tensor) -> Any:
        weights = [module.lstm.get_parameter(name) for name in names]
        batch, seq, _ = words.shape
        shapes = ((batch, seq, 2 * module.units), (batch, 2 * module.units))
        attributes: dict[str, Any] = {"units": module.units}
        return torch.onnx.ops.symbolic_multi_out(
            "::".join(RECURRENT), [words, mask, *weights], attributes, dtypes=(words.dtype,) * 2, shapes=shapes
        )

    return forward


@contextmanager
def _marked(subject: Subject) -> Iterator[None]:
    """Lets attentions and matrices in other forms leave markers, and the layers compute in (seq, batch, hidden)."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(MARKED, _mark_attention)
    AttentionMaskInterface.register(MARKED, _plain_mask)
    model: PreTrainedModel = subject.model
    before = model.config._attn_implementation

    def turn(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0].transpose(0, 1), *output[1:])
        return output.transpose(0, 1)

    with ExitStack() as stack:
        stack.callback(setattr, model.config, "_attn_implementation", before)
        model.config._attn_implementation = MARKED
        stack.enter_context(asking_functions(model, MARKED))
        stack.enter_context(_one_bias(model))
        stack.enter_context(_distances_known(subject))
        for name, module in forms_in(model).items():
            stack.callback(delattr, module, "forward")
            module.forward = _mark_form(name, module)
        for name, forward in _turned_attentions(subject):
            attention = model.get_submodule(name)
            stack.callback(delattr, attention, "forward")
            attention.forward = forward
        for layer in recurrent_in(model):
            stack.callback(delattr, layer, "forward")
            layer.forward = _mark_recurrent(layer)  # type: ignore[method-assign]
        (encoder,) = subject.anatomy.stacks
        assert encoder.embedding is not None, "an encoder's embedding is a module"
        for name in (encoder.embedding, encoder.norm or encoder.layers[-1]) if encoder.layers else ():
            stack.callback(model.get_submodule(name).register_forward_hook(turn).remove)
        yield


@contextmanager
def _one_bias(model: nn.Module) -> Iterator[None]:
    """Lets a stack compute the bias that its attentions share from hidden states (seq, batch, hidden), once for all rows."""
    stacks: list[Any] = [module for module in model.modules() if hasattr(module, "compute_position_bias")]
    for module in stacks:
        module.compute_position_bias = partial(
            lambda own, states: own(states.transpose(0, 1)[:1]), module.compute_position_bias
        )
    try:
        yield
    finally:
        for module in stacks:
            del module.compute_position_bias


@contextmanager
def _distances_known(subject: Subject) -> Iterator[None]:
    """Lets attentions whose scores have terms for distances leave markers with what follows from the weights alone."""
    anatomy, model = subject.anatomy, subject.model
    found = [anatomy.attentions[site.id] for site in anatomy.sites.values() if site.terms]
    if not found:
        yield
        return
    stack: Any = model.get_submodule(anatomy.layers[0].rpartition(".")[0].rpartition(".")[0])
    with ExitStack() as marks, torch.no_grad():
        table = stack.get_rel_embedding()  # (rows, hidden)
        for name in found:
            attention: Any = model.get_submodule(name)
            vectors = dict(
                zip(
                    (DISTANCE_KEYS, DISTANCE_QUERIES),
                    distance_vectors(attention, table[: 2 * attention.pos_ebd_size]),
                    strict=True,
                )
            )
            there = {name: value for name, value in vectors.items() if value is not None}
            for buffer, value in there.items():
                marks.callback(delattr, attention, buffer)
                attention.register_buffer(
                    buffer, (value * score_scale(attention)).transpose(1, 2).contiguous(), persistent=False
                )
            marks.callback(delattr, attention, "forward")
            attention.forward = _mark_distant(attention, list(there), distance_rows(attention).tolist())
        ways: dict[str, Any] = {"get_rel_embedding": lambda: None, "get_rel_pos": lambda *_: None}
        for name, way in (ways | {"get_attention_mask": lambda mask: mask}).items():  # (batch, seq): the marker reads it
            marks.callback(delattr, stack, name)
            setattr(stack, name, way)
        yield


def _turned_attentions(subject: Subject) -> Iterator[tuple[str, Any]]:
    """The attentions with one matrix for queries, keys and values, each with a forward pass that leaves a marker."""
    anatomy = subject.anatomy
    for heads, name in anatomy.attentions.items():
        site = anatomy.sites[heads]
        inside = {
            item.role: item.module.removeprefix(f"{name}.")
            for item in anatomy.matrices.values()
            if item.sublayer == site.sublayer
        }
        if Role.QUERY_KEY_VALUE in inside:
            names = inside[Role.QUERY_KEY_VALUE], inside[Role.ATTENTION_OUT]
            yield name, _mark_turned(subject.model.get_submodule(name), *names, site.taps[0].unit)


def _take_bias(graph: onnx_ir.Graph, name: str) -> None:
    """Takes a bias that the model does not have out of the graph, and gives its product the name of its weight."""
    value = graph.initializers.get(name)
    for node in [] if value is None else [use.node for use in value.uses()]:
        product: onnx_ir.Node | None = node
        if node.op_type == "Gemm":
            node.replace_input_with(2, None)
        else:
            (rest,) = (required(item) for item in node.inputs if item is not value)
            product = rest.producer()
            node.outputs[0].replace_all_uses_with(rest, replace_graph_outputs=True)
            graph.remove(node, safe=True)
        assert product is not None, "a bias is added to a product"
        product.name = f"{name.removesuffix('.bias')}.weight"
        if product.name not in graph.initializers:
            required(product.inputs[1]).name = product.name
    graph.initializers.pop(name, None)


@contextmanager
def _distinct_biases(model: nn.Module) -> Iterator[dict[str, np.ndarray | None]]:
    """Gives each bias values of its own, and puts the true ones back; yields the true ones by name.

    The tracer keeps one of several equal constants, and products are told apart by the names of their biases. So a Linear without a bias
    gets one for that time; its true one is None.
    """
    bare = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module.bias is None}
    modules = {
        name: dict(module.named_parameters())
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Formed))
    }
    biases = {f"{name}.bias": parameters["bias"] for name, parameters in modules.items() if "bias" in parameters}
    true = {name: bias.detach().clone() for name, bias in biases.items()}
    try:
        with torch.no_grad():
            for index, bias in enumerate(biases.values()):
                bias.copy_(torch.linspace(index + 0.25, index + 0.75, len(bias)))  # no constant of a model looks like that
            for index, module in enumerate(bare.values(), len(biases)):
                values = torch.linspace(index + 0.25, index + 0.75, module.out_features)
                module.bias = nn.Parameter(values.to(module.weight), requires_grad=False)
        given: dict[str, np.ndarray | None] = {f"{name}.bias": None for name in bare}
        yield given | {name: value.float().cpu().numpy() for name, value in true.items()}
    finally:
        for module in bare.values():
            module.bias = None
        with torch.no_grad():
            for name, bias in biases.items():
                bias.copy_(true[name])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the tracer's known and harmless warnings, and restores logging."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        for category, message in CHATTER:
            warnings.filterwarnings("ignore", message=message, category=category)
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
