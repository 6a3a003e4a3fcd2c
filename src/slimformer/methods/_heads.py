"""What a model must be for methods that give its heads patterns."""

from __future__ import annotations

from slimformer.core.anatomy import Anatomy
from slimformer.core.patterning import PATTERNED_TYPES
from slimformer.errors import TargetError


def check_heads(anatomy: Anatomy) -> None:
    """TargetError if the heads of a model cannot attend by patterns, whatever these are."""
    why = None
    if len(anatomy.stacks) > 1:
        why = "it writes texts"
    elif not anatomy.attentions:
        why = "it has no attention"
    elif anatomy.attends_otherwise:
        why = anatomy.attends_otherwise
    elif anatomy.sieves or anatomy.meeting:
        why = "words leave on their way" if anatomy.sieves else "its segments attend apart"
    elif anatomy.exits:
        why = "it has exits, which were fitted to it"
    if why is not None:
        raise TargetError(
            f"the heads of this model cannot attend by patterns: {why}.",
            help=f"start from an encoder before that, of one of these types: {', '.join(PATTERNED_TYPES)}.",
        )
