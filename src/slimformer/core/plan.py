"""A plan: the units of a model that are kept, and the form of its matrices. A saved model remembers no more.

A `Plan` names, for each site, the units that stay, in the numbering of the *original* model, the form of each matrix that
is not dense, the junctions behind layers, and the patterns of heads. Within a plan cuts come first, then patterns, of the heads that the
cuts leave, then forms, in the shapes that both leave, then junctions. Plans compose with `then`, are checked against an anatomy before
anything is changed, and have a digest. A `Decision` is a plan with the numbers that a method wants folded into the weights. Neither
changes a model: that is `shrink.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from slimformer.core.anatomy import VOCABULARY_SITE, Anatomy, Kind, Site, heads_of
from slimformer.core.apart import Apart
from slimformer.core.form import DENSE, Form, form_from_data
from slimformer.core.junction import Exit, Junction, Sieve, junction_from_data
from slimformer.core.pattern import Fixed, Patterns, asking, over, pattern_from_data
from slimformer.core.ranges import Ranges
from slimformer.digests import digest
from slimformer.errors import PlanError, nearest

if TYPE_CHECKING:
    from torch import Tensor

# Of plan.json: 1 knows no forms, 2 no junctions, 3 no patterns; a plan without them is still written so.
VERSIONS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Plan:
    """Units kept per site, in the numbering of the original model, and the form of each matrix that is not dense.

    Attributes:
        keep: Site -> the units that stay, rising; an absent site keeps everything.
        forms: Matrix -> its form.
        junctions: Layer, such as "encoder.2" -> what stands there: an exit, a sieve for its words, or the place where two segments meet.
        patterns: Site of heads -> an entry for each head that is left, in their order: what it attends to by a rule, or None.

    Example:
        >>> from slimformer import Plan
        >>> first = Plan({"encoder.0.heads": (0, 2, 3), "encoder.1.ffn": ()})  # three heads stay, a block goes
        >>> then = Plan({"encoder.0.heads": (1,)})  # of those three, the second
        >>> dict(first.then(then).keep)
        {'encoder.0.heads': (2,), 'encoder.1.ffn': ()}
        >>> Plan.from_json(first.to_json()) == first
        True
    """

    keep: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    forms: Mapping[str, Form] = field(default_factory=dict)
    junctions: Mapping[str, Junction] = field(default_factory=dict)
    patterns: Mapping[str, Patterns] = field(default_factory=dict)

    def __post_init__(self) -> None:
        frozen = {site: tuple(int(unit) for unit in units) for site, units in sorted(self.keep.items())}
        object.__setattr__(self, "keep", MappingProxyType(frozen))
        forms = {matrix: form for matrix, form in sorted(self.forms.items()) if form != DENSE}
        object.__setattr__(self, "forms", MappingProxyType(forms))
        object.__setattr__(self, "junctions", MappingProxyType(dict(sorted(self.junctions.items()))))
        patterns = {site: tuple(rules) for site, rules in sorted(self.patterns.items()) if any(rules)}
        object.__setattr__(self, "patterns", MappingProxyType(patterns))

    def __reduce__(self) -> tuple[type[Plan], tuple[dict[str, Any], ...]]:
        parts = (self.keep, self.forms, self.junctions, self.patterns)
        return Plan, tuple(dict(part) for part in parts)  # a MappingProxyType cannot be pickled

    def __hash__(self) -> int:
        return hash(tuple(tuple(part.items()) for part in (self.keep, self.forms, self.junctions, self.patterns)))

    def then(self, later: Plan) -> Plan:
        """This plan followed by `later`, which speaks in the numbering that this one leaves.

        Args:
            later: The plan for the model that this one leaves.

        Returns:
            One plan for the original model.

        Raises:
            PlanError: `later` keeps units that are gone, or changes a form again.

        Example:
            >>> from slimformer import Plan
            >>> Plan({"encoder.0.heads": (1, 3)}).then(Plan({"encoder.0.heads": (1,)})).keep["encoder.0.heads"]
            (3,)
        """
        keep = dict(self.keep)
        for site, units in later.keep.items():
            base = keep.get(site)
            known = base if base is not None else self.patterns.get(site)
            if known is not None and units and max(units) >= len(known):
                raise PlanError(
                    f"site '{site}' has {len(known)} units left, the later plan keeps unit {max(units)}.",
                    help="a later plan counts the units that the earlier one leaves, from 0.",
                )
            keep[site] = units if base is None else tuple(base[unit] for unit in units)
        for matrix in later.forms:
            if matrix in self.forms:
                raise PlanError(
                    f"matrix '{matrix}' has the form {self.forms[matrix]}, the later plan gives it another.",
                    help="a matrix changes its form once.",
                )
        for layer, junction in later.junctions.items():
            if layer in self.junctions and not _settles(self.junctions[layer], junction):
                raise PlanError(
                    f"layer '{layer}' has {_called(self.junctions[layer])}, the later plan puts another there.",
                    help="a layer has one.",
                )
        patterns = dict(self.patterns)
        for site, units in later.keep.items():
            if site in patterns:
                patterns[site] = tuple(patterns[site][unit] for unit in units)
        for site, rules in later.patterns.items():
            before = patterns.get(site) or (None,) * len(rules)
            _check_given(site, before, rules)
            patterns[site] = over(before, rules)
        return Plan(keep, {**self.forms, **later.forms}, {**self.junctions, **later.junctions}, patterns)

    def within_layers(self) -> Plan:
        """This plan without what it says of the vocabulary: a saved config.json has the vocabulary as it was cut.

        Returns:
            The plan for the model that such a config describes.

        Example:
            >>> from slimformer import Plan
            >>> Plan({"encoder.1.ffn": (), "vocabulary": (0, 2)}).within_layers() == Plan({"encoder.1.ffn": ()})
            True
        """
        keep = {site: units for site, units in self.keep.items() if site != VOCABULARY_SITE}
        return Plan(keep, self.forms, self.junctions, self.patterns)

    def check(self, anatomy: Anatomy) -> None:
        """Raises an error unless the plan fits a model.

        The sites must exist, their kept units rise and lie within the site, and the forms suit the matrices. A cut must not run
        through a matrix that has a form already: cut first, factor after. Its whole sublayer may still go.

        Args:
            anatomy: What the model consists of, before this plan.

        Raises:
            PlanError: The plan does not fit; the message names the site or matrix.

        Example:
            >>> from slimformer import Plan, anatomy_of
            >>> from slimformer.testing.tiny import tiny
            >>> Plan({"encoder.0.heads": (1, 3)}).check(anatomy_of(tiny("bert")))
        """
        for name, units in self.keep.items():
            site = anatomy.every_site.get(name)
            if site is None:
                raise PlanError(
                    f"the plan names the site '{name}', which this model does not have.",
                    help=f"{nearest(name, anatomy.every_site)}; `slimformer inspect` lists them.",
                )
            wrong = [unit for unit in units if not 0 <= unit < site.size]
            if wrong:
                raise PlanError(
                    f"site '{name}' has {site.size} {site.kind}, the plan keeps {site.kind} {wrong[0]}.",
                    facts=[f"kept: {' '.join(map(str, units))}      allowed: 0..{site.size - 1}"],
                    help=f"the plan was made for another model; its digest is {self.digest()}.",
                )
            if list(units) != sorted(set(units)):
                raise PlanError(
                    f"site '{name}': kept units must rise and be distinct, got {' '.join(map(str, units))}.",
                    help="sort them and drop the doubles.",
                )
            if not units and name == VOCABULARY_SITE:
                raise PlanError("the plan keeps no piece of the vocabulary.", help="keep those that the texts need.")
            if not units and site.sublayer is not None and self.keep.get(site.sublayer) != ():
                raise PlanError(
                    f"site '{name}' keeps nothing, yet its sublayer '{site.sublayer}' stays.",
                    help=f"cut the sublayer too: keep['{site.sublayer}'] = ().",
                )
            if not units and site.kind is Kind.HIDDEN:
                raise PlanError(f"site '{name}' keeps nothing: no model would be left.", help="keep at least one of its units.")
            factored = anatomy.factored(site)
            if factored and len(units) < site.size and site.sublayer not in anatomy.gone(self):
                raise PlanError(
                    f"site '{name}' cannot be cut: its {factored[0].role} matrix '{factored[0].id}' is stored as "
                    f"{factored[0].form}.",
                    facts=["a unit is a row or column of a matrix, and a factored matrix has none of its own."],
                    help="cut first, factor after.",
                )
            if site.id in anatomy.patterns and units and not asking([anatomy.patterns[name][unit] for unit in units]):
                raise PlanError(
                    f"site '{name}' would keep only heads without queries and keys.", help="keep one that has them."
                )
            if site.kind is Kind.HIDDEN and anatomy.exits and len(units) < site.size:
                raise PlanError(
                    f"site '{name}' cannot be cut: exits read the hidden states.", help="cut first, then train exits."
                )
            meeting = next(iter(anatomy.meeting.values()), None)
            if name == VOCABULARY_SITE and meeting is not None and meeting.separator is not None and len(units) < site.size:
                raise PlanError(
                    f"site '{name}' cannot be cut: segments are told by the separator {meeting.separator}, whose id would change.",
                    help="cut the vocabulary first.",
                )
        self._check_patterns(anatomy)
        self._check_forms(anatomy)
        self._check_junctions(anatomy)

    def _check_patterns(self, anatomy: Anatomy) -> None:
        gone = anatomy.gone(self)
        for name, rules in self.patterns.items():
            site = anatomy.sites.get(name)
            if site is None or site.kind is not Kind.HEADS:
                heads = [item.id for item in anatomy.of_kind(Kind.HEADS)]
                raise PlanError(
                    f"the plan gives patterns to '{name}', and this model has no such heads.", help=nearest(name, heads)
                )
            if len(anatomy.stacks) > 1:
                raise PlanError(f"site '{name}' can have no patterns: the model writes texts.", help="they are for encoders.")
            if site.sublayer in gone:
                continue
            left = len(self.keep[name]) if name in self.keep else site.size
            if len(rules) != left:
                raise PlanError(
                    f"site '{name}' has {left} heads left, and the plan has patterns for {len(rules)}.",
                    help="give an entry to each of them, and None to those that attend as they did.",
                )
            problem = next((why for rule in rules if rule is not None and (why := rule.problem())), None)
            if problem is not None:
                raise PlanError(f"site '{name}': {problem}.")
            before = anatomy.patterns.get(name, (None,) * site.size)
            before = before if name not in self.keep else tuple(before[unit] for unit in self.keep[name])
            _check_given(name, before, rules)
            if any(isinstance(rule, Fixed) for rule in rules):
                self._check_fixed(anatomy, site, over(before, rules))
        if self.patterns or anatomy.patterns:
            together = {**anatomy.junctions, **self.junctions}
            other = next((layer for layer, junction in together.items() if not isinstance(junction, Exit)), None)
            if other is not None:
                raise PlanError(
                    f"heads have patterns, which count the words of a whole text, and layer '{other}' has {_called(together[other])}.",
                    help="a model with patterns has no sieves, and its segments attend to each other in all layers.",
                )

    def _check_fixed(self, anatomy: Anatomy, site: Site, rules: Patterns) -> None:
        if not asking(rules):
            raise PlanError(
                f"site '{site.id}' would have no head with queries and keys left.",
                help="leave one of its heads without a pattern.",
            )
        factored = next((matrix for matrix in anatomy.asking_matrices(site) if not matrix.dense), None)
        if factored is not None:
            raise PlanError(
                f"heads of site '{site.id}' cannot lose their queries and keys: '{factored.id}' is stored as {factored.form}.",
                help="fix heads first, factor after.",
            )

    def _check_junctions(self, anatomy: Anatomy) -> None:
        for layer, junction in self.junctions.items():
            what = _called(junction)
            noun = what.partition(" ")[2]
            if layer not in anatomy.layer_modules:
                raise PlanError(
                    f"the plan puts {what} at the layer '{layer}', which this model does not have.",
                    help=nearest(layer, anatomy.layer_modules),
                )
            if layer in anatomy.junctions and not _settles(anatomy.junctions[layer], junction):
                raise PlanError(f"layer '{layer}' has {_called(anatomy.junctions[layer])} already.", help="a layer has one.")
            if anatomy.layer_modules[layer] == anatomy.layers[-1] or len(anatomy.stacks) > 1:
                raise PlanError(
                    f"there can be no {noun} behind '{layer}': it is the end of the model, or the model writes texts."
                )
            problem = junction.problem()
            if problem is not None:
                raise PlanError(f"there can be no {noun} behind '{layer}': {problem}.")
        together = {**anatomy.junctions, **self.junctions}
        if len(together) > 1 and any(isinstance(junction, Apart) for junction in together.values()):
            raise PlanError(
                f"segments that attended apart meet behind one layer, and the plan has junctions behind {len(together)}.",
                help="such a model has no exits and no sieves, and its segments meet once.",
            )
        if len({type(junction) for junction in together.values()}) > 1:
            raise PlanError("a model has exits or sieves, not both.", help="leave out one of the two.")
        self._check_sieves(anatomy, together)

    def _check_sieves(self, anatomy: Anatomy, junctions: Mapping[str, Junction]) -> None:
        gone = anatomy.gone(self)
        for layer, junction in junctions.items():
            heads = anatomy.sites.get(heads_of(layer))
            if isinstance(junction, Sieve) and (heads is None or heads.sublayer in gone):
                raise PlanError(
                    f"there can be no sieve at '{layer}' without its attention, which tells the words that stay.",
                    help="cut layers first, then take words out.",
                )

    def _check_forms(self, anatomy: Anatomy) -> None:
        gone = anatomy.gone(self)
        for name, form in self.forms.items():
            matrix = anatomy.matrices.get(name)
            if matrix is None:
                raise PlanError(
                    f"the plan gives a form to the matrix '{name}', which this model does not have.",
                    help=nearest(name, anatomy.matrices),
                )
            if matrix.sublayer in gone:
                continue
            if not matrix.dense:
                raise PlanError(
                    f"matrix '{name}' is stored as {matrix.form} already.",
                    help="a matrix changes its form once; prune before that.",
                )
            if matrix.tied is not None:
                raise PlanError(
                    f"matrix '{name}' cannot be stored as {form}: it is tied to '{matrix.tied}', "
                    "which reads it as a plain matrix.",
                    help="leave it dense, or untie the two (tie_word_embeddings: false in config.json) and train both.",
                )
            problem = form.problem(anatomy.cut(matrix, self).shape, table=matrix.table)
            if problem is not None:
                raise PlanError(f"matrix '{name}' cannot be stored as {form}: {problem}.")

    def digest(self) -> str:
        """Twelve hexadecimal digits that name this plan.

        Returns:
            The same for equal plans.

        Example:
            >>> from slimformer import Plan
            >>> Plan({"encoder.0.heads": (1, 3)}).digest() == Plan({"encoder.0.heads": [1, 3]}).digest()
            True
        """
        return digest(self.to_json())

    def to_json(self) -> str:
        """The plan as JSON; `Plan.from_json` gives it back exactly.

        Returns:
            One line.

        Example:
            >>> from slimformer import Plan
            >>> Plan({"encoder.0.heads": (1, 3)}).to_json()
            '{"keep": {"encoder.0.heads": [1, 3]}, "version": 1}'
        """
        keep = {site: list(units) for site, units in self.keep.items()}
        data: dict[str, Any] = {"version": 1, "keep": keep}
        if self.forms or self.junctions or self.patterns:
            data |= {"version": 2, "forms": {matrix: form.to_data() for matrix, form in self.forms.items()}}
        if self.junctions:
            junctions = {layer: junction.to_data() for layer, junction in self.junctions.items()}
            data |= {"version": 3, "junctions": junctions}
        if self.patterns:
            patterns = {site: [rule and rule.to_data() for rule in rules] for site, rules in self.patterns.items()}
            data |= {"version": 4, "junctions": data.get("junctions", {}), "patterns": patterns}
        return json.dumps(data, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan written by `to_json`.

        Args:
            text: What plan.json holds.

        Returns:
            The plan.

        Raises:
            PlanError: It is anything else.

        Example:
            >>> from slimformer import Plan
            >>> Plan.from_json('{"keep": {"encoder.1.ffn": []}, "version": 1}') == Plan({"encoder.1.ffn": ()})
            True
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"the plan is not JSON: {error}.", help="it should be a plan.json that save() wrote.") from None
        if not isinstance(data, dict) or not {"version", "keep"} <= set(data) or not isinstance(data["keep"], dict):
            raise PlanError("the plan is not {version, keep}.", help="it should be a plan.json that save() wrote.")
        version = data["version"]
        if type(version) is not int or version not in VERSIONS:
            raise PlanError(
                f"the plan has version {version!r}, this slimformer reads {' and '.join(map(str, VERSIONS))}.",
                help="install the slimformer that wrote it, or make the model again.",
            )
        parts = ("keep", "forms", "junctions", "patterns")[:version]
        forms, junctions, patterns = data.get("forms", {}), data.get("junctions", {}), data.get("patterns", {})
        if set(data) != {"version", *parts} or not all(isinstance(data[part], dict) for part in parts):
            raise PlanError(
                f"the plan is not what version {version} holds: {', '.join(sorted(data))}.",
                help="it should be a plan.json that save() wrote.",
            )
        for site, units in data["keep"].items():
            if not isinstance(units, list) or any(type(unit) is not int or unit < 0 for unit in units):
                raise PlanError(f"site '{site}': kept units must be a list of whole numbers from 0.")
        for site, rules in patterns.items():
            if not isinstance(rules, list):
                raise PlanError(f"site '{site}': patterns must be a list with an entry for each head.")
        return Plan(
            {site: tuple(units) for site, units in data["keep"].items()},
            {matrix: form_from_data(form, matrix) for matrix, form in forms.items()},
            {layer: junction_from_data(junction, layer) for layer, junction in junctions.items()},
            {site: tuple(pattern_from_data(rule, site) for rule in rules) for site, rules in patterns.items()},
        )


def _check_given(site: str, before: Patterns, later: Patterns) -> None:
    twice = next((head for head, (own, new) in enumerate(zip(before, later, strict=False)) if own and new), None)
    if len(before) != len(later) or twice is not None:
        which = f"head {twice} attends by a pattern already" if twice is not None else f"it has {len(before)} heads left"
        raise PlanError(
            f"site '{site}' cannot get these patterns: {which}.", help="give an entry to each head that is left, once."
        )


def _settles(before: Junction, junction: Junction) -> bool:
    """Whether a junction may take the place of one before: a sieve whose threshold is settled again."""
    return all(isinstance(item, Sieve) and item.threshold is not None for item in (before, junction))


def _called(junction: Junction) -> str:
    return {Exit: "an exit", Sieve: "a sieve"}.get(type(junction), "a place where segments meet")


@dataclass(frozen=True)
class Decision:
    """A plan, and the numbers to fold into the weights while cutting.

    `plan`: what is kept. `scales`: site -> (size,), multiplied at the site's taps, in the numbering before the cut. `weights`:
    parameter name -> new values, in shapes before the cut, from a method that repairs the units that stay. The parameters of
    a new form have names there too, "<module>.a" for instance; a parameter that is left out comes nearest to the matrix as it
    is after the cut. So have those of an exit, "<layer>.exit.out.weight"; one that is left out is 0. `ranges`: the ranges of
    activations, if a method learned them; they hold for the model as it then is, and the next stage drops them. `notes`: sentences
    that the user should read.

    >>> import torch
    >>> from slimformer import Decision, Plan, anatomy_of, shrink
    >>> from slimformer.testing.tiny import tiny
    >>> model = tiny("bert")
    >>> scales = {"encoder.0.heads": torch.tensor([1.0, 1.0, 0.5, 1.0])}  # the third head counts half, the last goes
    >>> small = shrink(model, anatomy_of(model), Decision(Plan({"encoder.0.heads": (0, 1, 2)}), scales=scales))
    >>> small.num_parameters() < model.num_parameters()
    True
    """

    plan: Plan = field(default_factory=Plan)
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    ranges: Ranges | None = None
    notes: tuple[str, ...] = ()
