"""Runs .onnx files of standard operators, and OpenVINO's own .xml files, in OpenVINO on the CPU; makes int8 models by NNCF.

Needs the extra `slimformer[openvino]`. Files with ONNX Runtime's own operators (fused attention, dynamic int8) are not accepted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, final

import numpy as np

from slimformer.errors import ExtraError, ModelError
from slimformer.exporters.base import FILES, OPENVINO, Arrays, Variant
from slimformer.files import whole_folder
from slimformer.runtimes._inputs import asked_outputs
from slimformer.runtimes.base import Runner, Runtime

INSTALL = "pip install 'slimformer[openvino]'"
EXAMPLES = 300  # NNCF's own default


@final
@dataclass(frozen=True)
class OpenVINO(Runtime):
    """OpenVINO's CPU plugin, in full precision."""

    extra: ClassVar[str | None] = "openvino"

    def available(self) -> bool:
        return find_spec("openvino") is not None

    def version(self) -> str:
        import openvino

        return str(openvino.__version__).split("-")[0]

    def accepts(self, path: Path) -> bool:
        if not path.is_file():
            return False
        return path.suffix == ".xml" or (path.suffix == ".onnx" and _standard(path))

    def load(self, path: Path, threads: int) -> Runner:
        if not self.available():
            raise ExtraError("the runtime 'openvino' is not installed.", help=INSTALL)
        import openvino

        core = openvino.Core()
        # Some CPUs would take bfloat16 by themselves; a speed bought with other numbers is no comparison, so precision stays float32.
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        try:
            model = core.compile_model(core.read_model(path), "CPU", settings)
            names = [item.get_any_name() for item in model.inputs]
            outputs = [item.get_any_name() for item in model.outputs]
            places = {name: outputs.index(name) for name in asked_outputs(outputs)}
        except RuntimeError as error:
            raise ModelError(
                f"OpenVINO {self.version()} cannot load {path}.",
                facts=str(error).strip().splitlines()[-1:],
                help=f"name a file of standard operators: {FILES[Variant.FLOAT].name} or {FILES[Variant.INT8_STATIC].name}.",
            ) from error
        request = model.create_infer_request()

        def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            try:
                results = request.infer({name: inputs[name] for name in names}, share_inputs=True)
            except (KeyError, RuntimeError) as error:  # an input that nobody gives, or one of another shape
                raise ModelError(
                    f"OpenVINO {self.version()} cannot run {path}.",
                    facts=str(error).strip().splitlines()[-1:],
                    help="bench it in ONNX Runtime, which is given what files of other tools want: --runtime onnxruntime.",
                ) from error
            return {name: np.array(results[place]) for name, place in places.items()}

        return run


def _standard(path: Path) -> bool:
    """Whether an ONNX file names no operators of ONNX Runtime's own, and does not branch; reads the nodes, not the weights.

    `load` refuses a broken file. Files that stop early were never tried in OpenVINO.
    """
    import onnx_ir

    try:
        graph = onnx_ir.load(path).graph
    except Exception:  # protobuf's, Python's and its own, for whatever is wrong with the file
        return True
    return all(node.domain in {"", "ai.onnx"} and node.op_type != "If" for node in graph)


def require_nncf() -> None:
    """ExtraError if OpenVINO or NNCF is missing."""
    if find_spec("openvino") is None or find_spec("nncf") is None:
        raise ExtraError("making OpenVINO's int8 model needs openvino and nncf, which are not installed.", help=INSTALL)


def nncf_int8(model: Path, batches: Sequence[Arrays], folder: Path) -> Path:
    """Quantizes a plain fp32 ONNX file to int8 as NNCF's users do (post-training, `model_type=TRANSFORMER`, 300 examples).

    Writes `folder`/openvino_model.xml and .bin, and gives the path of the .xml. For the dense teacher this is the baseline that is
    hardest to beat, and anybody gets it in a minute. ExtraError if OpenVINO or NNCF is missing.
    """
    require_nncf()
    import io
    import logging
    from contextlib import redirect_stdout

    import nncf
    import openvino

    names = {item.get_any_name() for item in openvino.Core().read_model(model).inputs}
    rows = [
        {name: np.asarray(batch[name][row : row + 1][:, : int(batch["attention_mask"][row].sum())]) for name in names}
        for batch in batches
        for row in range(len(batch["input_ids"]))
    ][:EXAMPLES]
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):  # its progress bars
            small = nncf.quantize(
                openvino.Core().read_model(model),
                nncf.Dataset(rows),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(rows),
            )
    finally:
        logger.setLevel(level)
    with whole_folder(folder) as part:
        openvino.save_model(small, part / OPENVINO.name, compress_to_fp16=False)
    return folder / OPENVINO.name
