"""Zeros of an earlier stage stay exact zeros through a training with decay, all else moves, and no mask is left."""

from __future__ import annotations

import torch
from toy_task import context, fit, rows, with_model

from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.families.base import anatomy_of
from slimformer.forms.kronecker import Kronecker
from slimformer.log import Log
from slimformer.methods.keep_zeros import KeepZeros
from slimformer.training.stage import Train

QUERY = "bert.encoder.layer.0.attention.self.query.weight"
BIAS = "bert.encoder.layer.0.attention.self.query.bias"
SETTINGS = Train(steps=6, lr=3e-3, batch_size=16, precision="fp32", weight_decay=0.1)


def test_zeros_stay_and_the_rest_trains(tmp_path):
    features = rows(48)
    around = context(features=features)
    parameters = dict(around.model.named_parameters())
    with torch.no_grad():
        parameters[QUERY][:8, 8:16] = 0
        parameters[BIAS].zero_()
    before = parameters[QUERY].detach().clone()
    fit(around, features, (KeepZeros(),), SETTINGS, tmp_path, Log(None, quiet=True))
    after = parameters[QUERY].detach()
    assert torch.equal(after == 0, before == 0)
    assert bool(((after != before) == (before != 0)).all())
    assert bool((parameters[BIAS] != 0).all())  # a bias is not held
    assert not any("forward" in vars(module) for module in around.model.modules())


def test_zeros_of_a_word_table_stay_and_a_padding_row_alone_masks_nothing(tmp_path):
    features = rows(48)
    around = context(features=features)
    table = around.model.get_input_embeddings().weight
    with torch.no_grad():
        table[1].zero_()  # the padding
        assert KeepZeros().attach(around).zeros == 0
        table[5:90, :8] = 0
    before = table.detach().clone()
    fit(around, features, (KeepZeros(),), SETTINGS, tmp_path, Log(None, quiet=True))
    after = table.detach()
    assert torch.equal(after[5:90] == 0, before[5:90] == 0)
    assert int((after != before).sum()) > 1000


def test_without_it_the_same_training_fills_them(tmp_path):
    features = rows(48)
    around = context(features=features)
    query = dict(around.model.named_parameters())[QUERY]
    with torch.no_grad():
        query[:8, 8:16] = 0
    fit(around, features, (), SETTINGS, tmp_path, Log(None, quiet=True))
    assert bool((query != 0).all())


def test_reports_the_share_it_holds():
    around = context()
    with torch.no_grad():
        dict(around.model.named_parameters())[QUERY].zero_()
    method = KeepZeros()
    state = method.attach(around)
    masked = [name for name, module in around.model.named_modules() if "forward" in vars(module)]
    state.close()
    assert masked == [QUERY.removesuffix(".weight")]
    per_layer = 4 * 32 * 32 + 2 * 32 * 24
    assert method.report(state)["zeros"] == 32 * 32 / (3 * per_layer)


def test_a_factored_matrix_has_no_zeros_to_hold(tmp_path):
    around = context(features=rows(48))
    plan = Plan(forms={"encoder.1.query": Kronecker((2, 2)), "embeddings.word": Kronecker((99, 8))})
    with torch.no_grad():
        around.model.get_parameter(QUERY)[:8, 8:16] = 0
    small = shrink(around.model, around.anatomy, plan)
    state = KeepZeros().attach(with_model(around, small, anatomy_of(small)))
    dense = sum(matrix.parameters for matrix in anatomy_of(small).matrices.values() if matrix.dense)
    assert state.zeros * dense == 64
    state.close()
