"""Runs .onnx files in ONNX Runtime on the CPU.

All files, ours and the baselines, get the same session options. Each option was measured to matter, and none is tuned to one graph
(docs/decisions/0002-onnx-graphs.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np

from slimformer.errors import ExtraError, ModelError
from slimformer.exporters.base import KERNELS_DOMAIN, SLIM, is_pair
from slimformer.kernels import sessions as kernels
from slimformer.runtimes._inputs import Port, asked_outputs, fit
from slimformer.runtimes._texts import TextRunner
from slimformer.runtimes.base import Runner, Runtime

if TYPE_CHECKING:
    from slimformer.tasks.base import Task

NUMBERS = re.compile(
    r"tensor\((float|float16|double|u?int\d+)\)"
)  # types of outputs that are read; a few files give texts or maps too


@final
@dataclass(frozen=True)
class OnnxRuntime(Runtime):
    """ONNX Runtime's CPU provider. The encoder of an encoder-decoder stands for both of its files: they write texts.

    `generation`: options of the search for a text that go before those of generation_config.json.
    """

    generation: Mapping[str, Any] = field(default_factory=dict)

    extra: ClassVar[str | None] = None
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime", "tokenizers", "numpy")

    def available(self) -> bool:
        return find_spec("onnxruntime") is not None

    def version(self) -> str:
        import onnxruntime

        return str(onnxruntime.__version__)

    def accepts(self, path: Path) -> bool:
        return path.is_file() and path.suffix == ".onnx"

    def load(self, path: Path, threads: int) -> Runner:
        if not self.available():
            raise ExtraError("the runtime 'onnxruntime' is not installed.", help="pip install onnxruntime")
        if is_pair(path):
            return TextRunner(path, threads, self.generation, self._open, self._failed)
        session = self._open(path, threads)
        ports, made = _ports(session.get_inputs()), _ports(session.get_outputs())
        made = [item for item in made if NUMBERS.fullmatch(item.type)]
        outputs = asked_outputs([item.name for item in made])

        def call(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            try:
                return dict(zip(outputs, session.run(outputs, inputs), strict=True))
            except Exception as error:
                raise self._failed(error, path, inputs) from error

        return fit(path, ports, made, call)

    def _open(self, path: Path, threads: int) -> Any:
        import onnxruntime

        try:
            session = onnxruntime.InferenceSession(str(path), _options(threads), providers=["CPUExecutionProvider"])
            _ports([*session.get_inputs(), *session.get_outputs()])  # their names may be no UTF-8
        except Exception as error:  # its exceptions have no common public type
            if f"{KERNELS_DOMAIN}:" in str(error):
                return kernels.session(path, options=_options(threads))
            raise ModelError(
                f"ONNX Runtime {self.version()} cannot load {path}.",
                facts=str(error).strip().splitlines()[:1],
                help=_advice(str(error), path),
            ) from error
        return session

    def _failed(self, error: Exception, path: Path, inputs: Mapping[str, np.ndarray]) -> ModelError:
        return ModelError(
            f"ONNX Runtime {self.version()} cannot run {path}.",
            facts=[
                *str(error).strip().splitlines()[:1],
                *(f"{name}: {array.dtype} of shape {list(array.shape)}" for name, array in inputs.items()),
            ],
            help=_advice(str(error), path),
        )

    def snippet(self, task: Task, folder: Path, file: str, texts: Sequence[tuple[str, ...]], max_length: int) -> str:
        if Path(file).name == SLIM.name:
            return super().snippet(task, folder, file, texts, max_length)
        return task.snippet(folder, file, texts, max_length)


def open_plain(file: Path, threads: int, profile: Path | None = None) -> Any:
    """ONNX Runtime's own session of a file. `profile`: where its profile goes (a prefix), and, with .onnx, the graph that it runs.

    ModelError if the file cannot be loaded.
    """
    import onnxruntime

    options = _options(threads)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
        options.optimized_model_filepath = f"{profile}.onnx"
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ModelError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {file}.",
            facts=str(error).strip().splitlines()[:1],
            help=_advice(str(error), file),
        ) from error


def _ports(items: Iterable[Any]) -> list[Port]:
    return [Port(item.name, item.type, item.shape) for item in items]


def _advice(reason: str, path: Path) -> str:
    """What to do about an error of ONNX Runtime."""
    causes = {
        r"external data|model_path must not be empty|_data|\.data\b": f"copy the files of its weights beside {path.name}; an .onnx file "
        "above 2 GB does not hold them.",
        r"IR version|opset|not a registered function/op": "update onnxruntime (pip install -U onnxruntime), or export the model for an "
        "older version; operators of other domains need their own library and cannot be benched.",
        r"indices element out of data bounds|out of bounds": "a token has no row in its table: the tokenizer beside the file, or "
        "a length limit, is that of another model.",
        r"Got invalid dimensions|Invalid rank": "the file takes other shapes than [batch, tokens]: export it again with dynamic axes.",
    }
    found = next((advice for cause, advice in causes.items() if re.search(cause, reason, re.IGNORECASE)), None)
    return found or "export the model again, or update onnxruntime."


def _options(threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1  # encoders are one chain of operators: nothing runs side by side
    options.log_severity_level = 4  # what goes wrong is raised, and told once
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it slows down whoever runs next
    return options
