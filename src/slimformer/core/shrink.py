"""The only code that changes shapes and forms: a model and a plan go in, a smaller copy comes out; `unshrink` goes back.

Cuts come first, then patterns, then forms, then junctions. A saved model is rebuilt in the same way: an empty skeleton is shrunk by
the saved plan, then the weights are loaded strictly.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from slimformer.core.anatomy import VOCABULARY_SITE, Anatomy, Kind, Matrix, Point, PointRole, Site, Tap
from slimformer.core.apart import Apart
from slimformer.core.deciding import put_exits
from slimformer.core.dividing import divide
from slimformer.core.form import Form
from slimformer.core.junction import EXIT, Exit
from slimformer.core.pattern import asking
from slimformer.core.patterning import put_patterns
from slimformer.core.plan import Decision, Plan
from slimformer.core.ranges import Ranges
from slimformer.core.sieving import put_sieves
from slimformer.core.standing import stand_in, take_part
from slimformer.core.token_ids import renumber
from slimformer.errors import PlanError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_LOUD = 1024.0  # a norm of a cut sublayer reads its input times this, so that the norm's epsilon counts for nothing


def shrink(model: PreTrainedModel, anatomy: Anatomy, decision: Decision | Plan) -> PreTrainedModel:
    """A copy of `model` that keeps only the units that `decision` keeps, in its forms, with its scales and weights folded in.

    Args:
        model: The model to copy; it may be on the meta device.
        anatomy: The anatomy of `model` as it stands.
        decision: What is to become of it, in the numbering of `anatomy`.

    Returns:
        A transformers model of the same class with smaller layers.

    Raises:
        PlanError: The decision does not fit the model.

    Example:
        >>> from slimformer import Plan, anatomy_of, shrink
        >>> from slimformer.testing.tiny import tiny
        >>> model = tiny("bert")  # three layers, each with four heads of eight dimensions
        >>> small = shrink(model, anatomy_of(model), Plan({"encoder.0.heads": (1, 3), "encoder.2.ffn": ()}))
        >>> small.bert.encoder.layer[0].attention.self.query
        Linear(in_features=32, out_features=16, bias=True)
        >>> "encoder.2.neurons" in anatomy_of(small).sites
        False
    """
    if isinstance(decision, Plan):
        decision = Decision(decision)
    decision.plan.check(anatomy)
    small = copy.deepcopy(model)
    gone = anatomy.gone(decision.plan)
    forms = {anatomy.matrices[name]: form for name, form in decision.plan.forms.items()}
    forms = {matrix: form for matrix, form in forms.items() if matrix.sublayer not in gone}
    factors = _factors(small, forms, decision.weights)
    exits = _exit_weights(anatomy, decision)
    with torch.no_grad():
        _replace(small, {name: value for name, value in decision.weights.items() if name not in factors | exits})
        for name, scale in decision.scales.items():
            _fold(small, anatomy, _site(anatomy, name), scale)
        for name, keep in decision.plan.keep.items():
            if name == VOCABULARY_SITE:
                _cut_pieces(small, anatomy.every_site[name], keep)
            elif anatomy.sites[name].sublayer not in gone:
                _cut(small, anatomy.sites[name], keep)
        if decision.plan.patterns:
            _cut_asking(small, anatomy.after(Plan(decision.plan.keep)), decision.plan)
        for matrix, form in forms.items():
            _put(small, matrix.module, form, factors)
            if matrix.decoder is not None and form != matrix.form:
                _decode(small, matrix, matrix.decoder)
    for name in anatomy.sites:
        if name in gone:
            for skip in anatomy.sites[name].skips:
                stand_in(small, skip)
    after, junctions = anatomy.after(decision.plan), decision.plan.junctions.items()
    put_patterns(small, after)
    given = {layer: junction for layer, junction in junctions if isinstance(junction, Exit)}
    if given:
        with torch.no_grad():
            put_exits(small, after, given, exits)
    for layer, junction in junctions:
        if isinstance(junction, Apart):
            divide(small, after, layer, junction)
    if decision.plan.junctions and after.sieves:
        put_sieves(small, after, after.sieves)
    before = cuts_of(model)
    if before is not None:
        remember_cuts(small, before.plan.then(decision.plan), decision.ranges)
    return small


def remember_cuts(model: PreTrainedModel, plan: Plan, ranges: Ranges | None) -> None:
    """Notes on a model what was cut of it since it was dense, as text; copies and further cuts keep the note up to date."""
    model.slimformer_cuts = (plan.to_json(), ranges and ranges.to_json())  # type: ignore[assignment]


def cuts_of(model: PreTrainedModel) -> Decision | None:
    """What was cut of a model since it was dense, and its ranges, if that was noted."""
    match getattr(model, "slimformer_cuts", None):
        case (str() as plan, ranges):
            return Decision(Plan.from_json(plan), ranges=Ranges.from_json(ranges) if isinstance(ranges, str) else None)
    return None


def _site(anatomy: Anatomy, name: str) -> Site:
    if name not in anatomy.sites:
        raise PlanError(f"the decision scales the site '{name}', which this model does not have.")
    return anatomy.sites[name]


def _replace(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        if name not in parameters or parameters[name].shape != value.shape:
            have = tuple(parameters[name].shape) if name in parameters else "no such parameter"
            raise PlanError(f"the decision re-solves '{name}' with shape {tuple(value.shape)}; the model has {have}.")
        parameters[name].copy_(value).add_(0.0)  # a masked -0.0 becomes 0.0, of which all bits are zero


def _factors(model: nn.Module, forms: Mapping[Matrix, Form], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of `weights` that belong to modules which the forms are about to put in."""
    there = {name for name, _ in model.named_parameters()}
    modules = {matrix.module for matrix in forms}
    return {name: value for name, value in weights.items() if name not in there and name.rpartition(".")[0] in modules}


def _exit_weights(anatomy: Anatomy, decision: Decision) -> dict[str, Tensor]:
    """Those of the decision's weights that belong to exits which it is about to put in."""
    inside = tuple(f"{anatomy.layer_modules[layer]}.{EXIT}." for layer in decision.plan.junctions)
    return {name: value for name, value in decision.weights.items() if name.startswith(inside)}


def _put(model: nn.Module, path: str, form: Form, factors: Mapping[str, Tensor]) -> None:
    """Replaces the matrix at `path` by its form, filled from `factors`; the parameters that are not there come nearest
    to the matrix."""
    dense = cast(Any, model.get_submodule(path))
    module = form.module(dense)
    slots = {name: slot for name, slot in module.named_parameters() if name != "bias"}
    given = {name.rpartition(".")[2]: value for name, value in factors.items() if name.rpartition(".")[0] == path}
    wrong = [name for name, value in given.items() if name not in slots or slots[name].shape != value.shape]
    if wrong:
        have = tuple(slots[wrong[0]].shape) if wrong[0] in slots else "no such parameter"
        raise PlanError(f"the decision fills '{path}.{wrong[0]}' with shape {tuple(given[wrong[0]].shape)}; {form} has {have}.")
    table = isinstance(dense, nn.Embedding)
    whole = set(given) == set(slots) or dense.weight.is_meta
    values = given if whole else {**form.weights(dense.weight, table=table), **given}
    for name, value in values.items():
        slots[name].copy_(value)
    model.set_submodule(path, module.train(dense.training))


def _decode(model: PreTrainedModel, matrix: Matrix, tied: str) -> None:
    """Lets the last Linear of a language model, whose weight was the word table, compute with the table in its new form."""
    path, table = tied.rpartition(".")[0], cast(Any, model.get_submodule(matrix.module))
    linear = cast(nn.Linear, model.get_submodule(path))
    model.set_submodule(path, table.decoder(linear).train(linear.training))
    for name in ("_tied_weights_keys", "all_tied_weights_keys"):  # of this model alone: its class has a table to tie
        ties = getattr(model, name) or {}
        setattr(model, name, {ours: theirs for ours, theirs in ties.items() if tied not in (ours, theirs)})


def _fold(model: nn.Module, anatomy: Anatomy, site: Site, scale: Tensor) -> None:
    """Multiplies `scale` (size,) into the Linear at each tap: its columns for an input, its rows and bias for an output."""
    if tuple(scale.shape) != (site.size,) or site.kind is Kind.HIDDEN or any(tap.residual for tap in site.taps):
        raise PlanError(
            f"site '{site.id}' takes {site.size} scales at a matrix, got shape {tuple(scale.shape)}.",
            help="a sublayer, or a hidden unit, is kept or cut; it has no scale.",
        )
    factored = {matrix.module: matrix.form for matrix in anatomy.factored(site)}
    for tap in site.taps:
        if tap.module in factored:
            raise PlanError(
                f"site '{site.id}' cannot be scaled: '{tap.module}' is stored as {factored[tap.module]}.",
                help="scale first, factor after.",
            )
        linear = cast(nn.Linear, model.get_submodule(tap.module))
        factor = scale.to(linear.weight).repeat_interleave(tap.unit)
        if tap.side == "input":
            linear.weight.mul_(factor)  # (out, in) * (in,)
        else:
            linear.weight.mul_(factor[:, None])
            if linear.bias is not None:
                linear.bias.mul_(factor)


def _cut(model: nn.Module, site: Site, keep: tuple[int, ...]) -> None:
    if len(keep) == site.size:
        return
    for piece in site.slices:
        old = model.get_parameter(piece.param)
        rows = torch.tensor(piece.rows(site.size, keep), dtype=torch.long, device=old.device)
        new = nn.Parameter(old.index_select(piece.dim, rows), requires_grad=old.requires_grad)
        for module, name in _holders(model, piece.param, old):
            setattr(module, name, new)
            _note_shape(module)
    if site.bias is not None:
        take_part(model, site.bias, keep)
    for counter in site.counters:
        setattr(model.get_submodule(counter.module), counter.attribute, len(keep) * counter.per_unit)


def _cut_asking(model: nn.Module, anatomy: Anatomy, plan: Plan) -> None:
    """Takes away the queries and keys of heads that need none by their patterns; `anatomy`: with the plan's cuts made."""
    for name, rules in plan.patterns.items():
        if name in anatomy.sites:
            site = anatomy.sites[name]
            named = anatomy.asking_parameters(site)
            pieces = tuple(piece for piece in site.slices if piece.param in named)
            stay = asking(anatomy.patterns_after(site, Plan(patterns={name: rules})))
            _cut(model, replace(site, slices=pieces, counters=(), bias=None), stay)


def _cut_pieces(model: PreTrainedModel, site: Site, keep: tuple[int, ...]) -> None:
    """Leaves the rows `keep` of the word table, and of all that is tied to it or has an entry for each piece."""
    if len(keep) == site.size:
        return
    renumber(model, keep)
    cut: dict[int, Tensor] = {}  # the old tensor's id -> the new one: tied ones stay one
    for piece in site.slices:
        path, _, name = piece.param.rpartition(".")
        module: Any = model.get_submodule(path)
        old = getattr(module, name)
        if any(old is new for new in cut.values()):
            continue  # another name of the same module
        if id(old) not in cut:
            rows = old.index_select(piece.dim, torch.tensor(keep, dtype=torch.long, device=old.device))
            cut[id(old)] = nn.Parameter(rows, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else rows
        setattr(module, name, cut[id(old)])
        _note_shape(module)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.padding_idx = keep.index(module.padding_idx) if module.padding_idx in keep else None


def _holders(model: nn.Module, parameter: str, value: Tensor) -> list[tuple[nn.Module, str]]:
    """The modules that hold a parameter, each with its own name for it: several if it is tied."""
    path, _, name = parameter.rpartition(".")
    owner = model.get_submodule(path)
    if not isinstance(owner, nn.Embedding):
        return [(owner, name)]
    return [
        (module, name) for module in model.modules() for name, held in module.named_parameters(recurse=False) if held is value
    ]


def _note_shape(module: Any) -> None:
    """Brings what a module says of its shape in line with its weight."""
    match module:
        case nn.Linear():
            module.out_features, module.in_features = module.weight.shape
        case nn.Embedding():
            module.num_embeddings, module.embedding_dim = module.weight.shape
        case nn.LayerNorm():
            module.normalized_shape = tuple(module.weight.shape)


# -- Back to dense shapes ------------------------------------------------------------------------------------------------------


def unshrink(small: PreTrainedModel, dense: PreTrainedModel, anatomy: Anatomy, plan: Plan) -> PreTrainedModel:
    """`dense` with the weights of `small`: the same outputs from plain matrices of the shapes before the cut.

    Units that were cut become zeros, and forms are multiplied out. A sublayer that was cut adds nothing, and its norm undoes the
    norm in front of it: that one stops scaling, and hands its weights on.

    `dense` is a model of the same class, on any device or the meta device; its weights are replaced. `anatomy` is that of `dense`,
    and `plan` what was cut of it; its vocabulary is that of `small`. Raises PlanError if they do not fit together, if a norm in
    front has another width, or if hidden units were cut.

    >>> import torch
    >>> from slimformer import Plan, anatomy_of, shrink
    >>> from slimformer.testing.tiny import batch, tiny
    >>> model, plan = tiny("bert"), Plan({"encoder.0.heads": (1, 3), "encoder.2.ffn": ()})
    >>> small = shrink(model, anatomy_of(model), plan)
    >>> wide = unshrink(small, tiny("bert"), anatomy_of(model), plan)
    >>> wide.num_parameters() == model.num_parameters()
    True
    >>> inputs = batch(model)
    >>> torch.allclose(wide(**inputs).logits, small(**inputs).logits, atol=1e-5)
    True
    """
    plan = plan.within_layers()
    plan.check(anatomy)
    if any(site.id in plan.keep for site in anatomy.of_kind(Kind.HIDDEN)):
        raise PlanError(
            "no plain weights give the same answers with hidden units put back: a norm would count their zeros.",
            help="use the files that were exported.",
        )
    if any(isinstance(junction, Apart) for junction in plan.junctions.values()):
        raise PlanError(
            "no plain weights give the same answers: in a plain model each token attends to both segments, in all layers.",
            help="use the files that were exported.",
        )
    if plan.patterns:
        raise PlanError(
            "no plain weights give the same answers: in a plain model no head attends by position, or within a span.",
            help="use the files that were exported.",
        )
    if plan.junctions:
        raise PlanError(
            "no plain weights give the same answers as a model with exits or sieves: a plain model has none.",
            help="use the files that were exported.",
        )
    have, gone = small.state_dict(), anatomy.gone(plan)
    for name in plan.forms:
        matrix = anatomy.matrices[name]
        if matrix.sublayer not in gone:
            whole = cast(Any, small.get_submodule(matrix.module)).matrix().detach()
            have |= dict.fromkeys(filter(None, (f"{matrix.module}.weight", matrix.decoder)), whole)
    cut = anatomy.inside(gone)
    state: dict[str, Tensor] = {}
    for name, slot in dense.state_dict().items():
        if name in have:
            state[name] = _spread(have[name], name, tuple(slot.shape), anatomy, plan)
        elif name.startswith(cut):
            state[name] = torch.zeros(slot.shape, dtype=torch.float32)
        else:
            raise PlanError(f"the plan does not fit: the cut model has no '{name}'.")
    _undo_norms(state, anatomy, gone)
    dense.load_state_dict(state, strict=True, assign=True)
    dense.tie_weights(missing_keys=set(), recompute_mapping=False)  # but what is not equal
    return dense.eval()


def _spread(values: Tensor, name: str, shape: tuple[int, ...], anatomy: Anatomy, plan: Plan) -> Tensor:
    """The values of a cut parameter at the places where they were before the cut, and zeros around them."""
    for site in anatomy.sites.values():
        keep = plan.keep.get(site.id)
        for piece in site.slices if keep is not None and len(keep) < site.size else ():
            if piece.param == name:
                rows = torch.tensor(piece.rows(site.size, keep or ()), dtype=torch.long, device=values.device)
                wide = list(values.shape)
                wide[piece.dim] = shape[piece.dim]
                values = values.new_zeros(wide).index_copy(piece.dim, rows, values)
    if tuple(values.shape) != shape:
        raise PlanError(f"the plan does not fit: '{name}' has shape {tuple(values.shape)}, expected {shape}.")
    return values


def _ends_with(tap: Tap, norm: Point) -> bool:
    """Whether a norm ends its sublayer, whose tap is given, or begins it, and is not one of a part within."""
    return tap.branch or f"{norm.modules[0]}.".startswith(f"{tap.module}.")


def _undo_norms(state: dict[str, Tensor], anatomy: Anatomy, gone: set[str]) -> None:
    """Hands the weights of each norm in front of a cut sublayer on to the sublayer's own norm, which stayed without a purpose.

    A sublayer that begins with its norm needs none: it adds zero.
    """
    norms = [point for point in anatomy.points.values() if point.role is PointRole.NORM and point.side == "output"]
    ends = {site.id: site.taps[0] for site in anatomy.of_kind(Kind.SUBLAYER)}
    norms = [point for point in norms if point.sublayer is None or _ends_with(ends[point.sublayer], point)]
    for tap in (ends[name] for name in gone):
        slot = f"{tap.module}.weight"
        if not tap.branch and slot in state and not any(tap.module in norm.modules for norm in norms):
            state[slot] = torch.ones_like(state[slot])  # it only scales, and divides by nothing
    for before, point in pairwise((None, *norms)):
        if point is None or point.sublayer not in gone or ends[str(point.sublayer)].branch:
            continue
        help = "use the files that were exported, or keep that sublayer."
        if before is None or before.tokens is not point.tokens:
            raise PlanError(
                f"no plain weights give the same answers without '{point.sublayer}': no norm lies in front of it.", help=help
            )
        (giver,), (taker,) = before.modules, point.modules
        for part, rest in (("weight", _LOUD), ("bias", 0.0)):
            values, old = state[f"{giver}.{part}"], state[f"{taker}.{part}"]
            if values.shape != old.shape:
                raise PlanError(
                    f"no plain weights give the same answers without '{point.sublayer}': the norm in front of it, '{giver}', is "
                    f"{len(values)} wide and not {len(old)}.",
                    help=help,
                )
            state[f"{taker}.{part}"] = values
            state[f"{giver}.{part}"] = torch.full_like(values, rest)
